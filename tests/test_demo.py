"""The demo: a small real run, what it must notice, and how its processes end."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from eplb_core import Topology
from eplb_core.commands import app
from eplb_torch.demo import run, serving
from eplb_torch.demo.corpus import read_domains
from eplb_torch.demo.model import VOCAB_SIZE
from eplb_torch.demo.ranks import RankFailure, run_ranks
from eplb_torch.demo.results import DemoResult, PhaseResult, TrainingResult

SMALL = ["demo", "--ranks", "2", "--steps", "8"]


@pytest.fixture(scope="module")
def domains():
    return read_domains(VOCAB_SIZE, seed=3)


def test_a_small_run_keeps_its_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REQUESTS", 64)
    file = tmp_path / "result.json"
    shown = CliRunner().invoke(app, [*SMALL, "--json", str(file)])
    assert shown.exit_code == 0, shown.output
    result = json.loads(file.read_text())
    assert result["ep_size"] == 2
    assert result["problems"] == []
    assert 0 < result["balancedness_before"] < result["balancedness_after"] <= 1
    assert result["max_abs_logit_difference"] < 1e-4
    assert [phase["traffic"] for phase in result["phases"]] == ["prose", "code", "mix"]
    for name in ("moved_experts", "bytes_moved"):
        assert result[name] == sum(phase[name] for phase in result["phases"]) > 0
    # Three matrices of 64 x 32 float64 make an expert.
    assert result["bytes_moved"] == result["moved_experts"] * 3 * 64 * 32 * 8
    for phase in result["phases"]:
        assert phase["balancedness_after"] >= 0.85
        for load in (phase["rank_load_before"], phase["rank_load_after"]):
            np.testing.assert_allclose(np.sum(load, axis=1), 4 * phase["tokens"])
        assert f"{phase['balancedness_before']:.3f} → {phase['balancedness_after']:.3f}" in shown.output


def serve_with_experts_in_wrong_slots(rank, send, job):
    genuine = serving.expert_parallel

    def confused(*args):
        experts = genuine(*args)
        for tensor in experts.weights.layers[1].values():
            tensor.copy_(tensor.roll(rank, dims=0))
        return experts

    serving.expert_parallel = confused
    serving.serve_phases(rank, send, job)


def serve_until_a_rank_dies(rank, send, job):
    genuine, served = serving._serve, []

    def mortal(*args):
        if rank == 1 and len(served) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        served.append(args)
        return genuine(*args)

    serving._serve = mortal
    serving.serve_phases(rank, send, job)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (serve_with_experts_in_wrong_slots, "logits differ from the unmodified model's by"),
        (serve_until_a_rank_dies, "rank 1 died with exit code -9"),
    ],
)
def test_the_demo_fails_when_a_rank_errs_or_dies(worker, message, domains, monkeypatch):
    monkeypatch.setattr(run, "read_domains", lambda *_: domains)
    monkeypatch.setattr(run, "REQUESTS", 16)
    monkeypatch.setattr(run, "serve_phases", worker)
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not multiprocessing.active_children()


def say_and_end(rank, send, word):
    send((rank, word, dist.get_world_size()))


def test_ranks_pass_messages_to_the_parent():
    messages = run_ranks(say_and_end, 3, "hello", timeout=60, group_timeout=30)
    assert sorted(messages) == [(rank, "hello", 3) for rank in range(3)]


def raise_on_rank_1(rank, send):
    if rank == 1:
        raise ValueError("no such expert")
    dist.barrier()


def die_on_rank_1(rank, send):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def stop_on_rank_1(rank, send):
    if rank == 1:
        signal.pause()
    dist.barrier()


@pytest.mark.parametrize(
    ("worker", "group_timeout", "message"),
    [
        (raise_on_rank_1, 60, "ValueError: no such expert"),
        (die_on_rank_1, 60, "rank 1 died with exit code 7"),
        (stop_on_rank_1, 4, r"ranks \[1\] had not finished and were stopped"),
    ],
)
def test_a_lost_rank_is_named_and_ends_the_others(worker, group_timeout, message):
    start = time.monotonic()
    with pytest.raises(RankFailure, match=message):
        list(run_ranks(worker, 2, timeout=100, group_timeout=group_timeout))
    assert time.monotonic() - start < 50
    assert not multiprocessing.active_children()


def pause(rank, send):
    send("ready")
    signal.pause()


def test_ranks_end_with_their_time_and_with_the_interest_of_the_parent():
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] had not finished"):
        list(run_ranks(pause, 2, timeout=5, group_timeout=60))
    messages = run_ranks(pause, 2, timeout=60, group_timeout=60)
    assert next(messages) == "ready"
    messages.close()
    assert not multiprocessing.active_children()


def test_no_text_is_served_twice(domains):
    phases = run.make_phases(domains, seed=0)
    windows = [window for phase in phases for window in (phase.measured, phase.fresh)]
    assert all(window.shape == (run.REQUESTS, run.REQUEST_LENGTH) for window in windows)
    requests = [tuple(request.tolist()) for window in windows for request in window]
    assert len(set(requests)) == len(requests)


def test_the_corpus_depends_on_the_seed_alone(domains):
    again, other = read_domains(VOCAB_SIZE, seed=3), read_domains(VOCAB_SIZE, seed=4)
    for name in domains:
        assert all(map(np.array_equal, domains[name], again[name]))
        assert not np.array_equal(domains[name].held_out, other[name].held_out)
        assert max(int(part.max()) for part in domains[name]) < VOCAB_SIZE


def phase(**changes):
    fields = {
        "traffic": "prose",
        "tokens": 6,
        "balancedness_before": 0.5,
        "balancedness_after": 0.9,
        "rank_load_before": np.asarray([[6.0, 2.0], [3.0, 5.0]]),
        "rank_load_after": np.asarray([[4.0, 4.0], [4.0, 4.0]]),
        "moved_experts": 3,
        "bytes_moved": 100,
        "planning_ms": 1.0,
        "moving_ms": 2.0,
        "max_abs_logit_difference": 0.0,
    }
    return PhaseResult(**fields | changes)


def demo_result(*phases):
    return DemoResult(Topology(2, 20), "greedy", 0, TrainingResult(1, 1.0, 7.0, 6.0), phases, 1.0)


def test_figures_over_all_phases():
    result = demo_result(phase(), phase(moved_experts=4, max_abs_logit_difference=1e-9)).to_json()
    assert (result["moved_experts"], result["bytes_moved"]) == (7, 200)
    assert result["max_abs_logit_difference"] == 1e-9
    assert result["balancedness_before"] == pytest.approx(8 / 11)
    assert result["balancedness_after"] == 1.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"balancedness_after": 0.849}, "prose: balancedness after balancing is 0.849"),
        ({"balancedness_after": float("nan")}, "prose: balancedness"),
        ({"max_abs_logit_difference": 1e-4}, "prose: logits differ"),
        ({"max_abs_logit_difference": float("inf")}, "prose: logits differ"),
    ],
)
def test_broken_promises_are_found_in_any_phase(changes, problem):
    problems = demo_result(phase(traffic="code"), phase(**changes)).problems()
    assert [problem is not None and text.startswith(problem) for text in problems] == [True] * (problem is not None)
