"""The demo: small real runs, what it must notice, and how its processes end."""

import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from datetime import timedelta

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from eplb_core import Topology
from eplb_core.commands import app
from eplb_core.elastic import grow
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.demo import ranks, run, server, serving, traffic
from eplb_torch.demo.corpus import read_domains
from eplb_torch.demo.display import rank_bars, show_result
from eplb_torch.demo.hosts import Hosts
from eplb_torch.demo.live import LineView, LiveView, make_view
from eplb_torch.demo.loss import Recovered, Rehosted, describe_loss, rehosted
from eplb_torch.demo.model import VOCAB_SIZE, expert_rows, load_model, new_model, save_model
from eplb_torch.demo.ranks import Killed, RankFailure, run_ranks
from eplb_torch.demo.record import Progress, Record, Step
from eplb_torch.demo.results import DemoResult, PhaseResult, TrainingResult
from eplb_torch.elastic import ElasticGroup

SMALL = ["demo", "--ranks", "2", "--steps", "8"]


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    """Ranks are forked with what workers of this file import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_PRELOAD", [*ranks._PRELOAD, "tests.test_demo"])
        ranks.prepare_ranks()
        yield


@pytest.fixture(scope="module")
def domains():
    return read_domains(VOCAB_SIZE, seed=3)


@pytest.fixture
def small(domains, monkeypatch):
    """Small batches; the phases that a test keeps."""
    monkeypatch.setattr(run, "read_domains", lambda *_: domains)
    monkeypatch.setattr(traffic, "REQUESTS", 8)
    monkeypatch.setattr(run, "make_phases", lambda *args: traffic.make_phases(*args)[:1])


class Scraper(threading.Thread):
    """Reads a metrics page again and again, from when it is there until it is gone."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.url, self.pages, self.is_over = f"http://127.0.0.1:{port}/metrics", [], threading.Event()
        self.start()

    def run(self):
        while not self.is_over.wait(0.1):
            try:
                with urllib.request.urlopen(self.url, timeout=5) as answer:
                    self.pages.append(answer.read().decode())
            except OSError:
                if self.pages:
                    return

    def last(self):
        """The samples of the last page: by name, or by name and the value of a label."""
        self.is_over.set()
        self.join()
        samples = {}
        for family in text_string_to_metric_families(self.pages[-1]):
            for sample in family.samples:
                assert sample.labels["ep_rank"] == "0"
                key = [sample.labels[label] for label in ("reason", "phase", "scope") if label in sample.labels]
                samples[(sample.name, *key)] = sample.value
        return samples


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_small_run_keeps_its_promises_and_can_be_watched(tmp_path, small, monkeypatch):
    monkeypatch.setattr(run, "make_phases", traffic.make_phases)
    file, port = tmp_path / "result.json", free_port()
    scraper = Scraper(port)
    shown = CliRunner().invoke(app, [*SMALL, "--json", str(file), "--metrics-port", str(port)])
    assert shown.exit_code == 0, shown.output
    result = json.loads(file.read_text())
    check_result(result, shown.output)
    assert f"Metrics of rank 0: {scraper.url}\n" in shown.output
    metrics = scraper.last()
    assert len(scraper.pages) > 5
    assert 1 <= metrics["eplb_decisions_total", "rebalance"] <= result["decisions"]["rebalance"]
    assert metrics["eplb_epoch",] >= 1
    assert 0 < metrics["eplb_moved_experts_total",] <= result["moved_experts"]
    assert 0 < metrics["eplb_moved_bytes_total", "within_node"] <= result["bytes_moved"]
    assert 0 < metrics["eplb_balancedness_ratio",] <= 1
    assert 0 < metrics["eplb_predicted_balancedness_ratio",] <= 1
    for phase in ("planning", "prepare", "commit"):
        assert metrics["eplb_phase_seconds_count", phase] >= 1


def check_result(result, output):
    assert (result["ep_size"], result["use_async"], result["problems"]) == (2, True, [])
    assert 0 < result["balancedness_before"] < result["balancedness_after"] <= 1
    assert result["max_abs_logit_difference"] < 1e-4
    assert [phase["traffic"] for phase in result["phases"]] == ["prose", "code", "mix"]
    for name in ("moved_experts", "bytes_moved", "stall_ms", "steps", "steps_during_moves"):
        assert result[name] == pytest.approx(sum(phase[name] for phase in result["phases"]))
        assert result[name] > 0
    # Three matrices of 64 x 32 float64 make an expert.
    assert result["bytes_moved"] == result["moved_experts"] * 3 * 64 * 32 * 8
    # A part of a rearrangement is committed at the second boundary at the earliest, so one batch at least goes between.
    assert result["steps_during_moves"] >= result["decisions"]["rebalance"]
    assert result["stall_ms"] < result["steps"] * max(result["step_ms"].values())
    for phase in result["phases"]:
        assert phase["balancedness_after"] >= 0.85
        assert phase["steps"] >= 2 * 8
        assert sum(phase["decisions"].values()) >= 2
        for load in (phase["rank_load_before"], phase["rank_load_after"]):
            np.testing.assert_allclose(np.sum(load, axis=1), 4 * phase["tokens"])
        assert f"{phase['balancedness_before']:.3f} → {phase['balancedness_after']:.3f}" in output
        assert f"{phase['traffic']:5} batch   8  balancedness" in output


def test_in_sync_mode_serving_waits_for_moves(tmp_path, small):
    file = tmp_path / "result.json"
    shown = CliRunner().invoke(app, [*SMALL, "--sync", "--interval", "20", "--metrics-port", "0", "--json", str(file)])
    assert shown.exit_code == 0, shown.output
    (phase,) = json.loads(file.read_text())["phases"]
    assert phase["moved_experts"] > 0
    assert phase["steps_during_moves"] == 0
    assert phase["step_ms"]["moving"] is None
    # Decisions at steps 5 and 25, of which the second knows this traffic alone; then 8 fresh batches.
    assert sum(phase["decisions"].values()) == 2
    assert phase["steps"] == 25 + 8
    assert phase["stall_ms"] > phase["moving_ms"] > 0
    assert re.search(r"Metrics of rank 0: http://127.0.0.1:[1-9]\d+/metrics\n", shown.output)


def serve_with_experts_in_wrong_slots(rank, send, store, job):
    genuine = server.expert_parallel

    def confused(*args, **options):
        experts = genuine(*args, **options)
        for tensor in experts.weights.layers[1].values():
            tensor.copy_(tensor.roll(rank, dims=0))
        return experts

    server.expert_parallel = confused
    serving.serve_phases(rank, send, store, job)


def serve_badly_while_weights_move(rank, send, store, job):
    genuine = server.Server._forward

    def slipping(self, share):
        logits = genuine(self, share)
        logits[-1, -1, 7] += 2e-4 * (self._moving and rank == 1)
        return logits

    server.Server._forward = slipping
    serving.serve_phases(rank, send, store, job)


def serve_on_rank_0_alone_from_step(step, end):
    """A worker whose rank 1 comes to an end before a step."""
    genuine, served = server.Server.step, []

    def mortal(self, requests):
        if self.elastic.members.rank == 1 and len(served) == step:
            end()
        served.append(requests)
        return genuine(self, requests)

    server.Server.step = mortal


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def serve_until_a_rank_dies(rank, send, store, job):
    serve_on_rank_0_alone_from_step(5, die)
    serving.serve_phases(rank, send, store, job)


def serve_until_a_rank_hangs(rank, send, store, job):
    serve_on_rank_0_alone_from_step(5, signal.pause)
    serving.serve_phases(rank, send, store, job)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (serve_with_experts_in_wrong_slots, "logits differ from the unmodified model's by"),
        (serve_badly_while_weights_move, "logits differ from the unmodified model's by 2.0e-04"),
        (serve_until_a_rank_dies, "rank 1 died with exit code -9"),
        (serve_until_a_rank_hangs, "ranks [1] had not finished and were stopped"),
    ],
)
def test_the_demo_fails_when_a_rank_errs_dies_or_hangs(worker, message, small, monkeypatch):
    monkeypatch.setattr(run, "GROUP_TIMEOUT", 12.0)
    monkeypatch.setattr(run, "BALANCER_TIMEOUT", 6.0)
    monkeypatch.setattr(run, "serve_phases", worker)
    start = time.monotonic()
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code == 1
    assert message in result.stderr
    assert time.monotonic() - start < 90
    assert not multiprocessing.active_children()


KILL = ["demo", "--ranks", "3", "--steps", "8", "--kill-rank"]


@pytest.mark.parametrize(("rank", "options"), [(1, []), (0, ["--sync", "--metrics-port", "0"])])
def test_a_rank_is_killed_under_traffic_and_the_others_go_on(rank, options, tmp_path, small, monkeypatch):
    monkeypatch.setattr(run, "make_phases", lambda *args: traffic.make_phases(*args)[:2])
    file, left = tmp_path / "result.json", [i for i in range(3) if i != rank]
    shown = CliRunner().invoke(app, [*KILL, str(rank), *options, "--json", str(file)])
    assert shown.exit_code == 0, shown.output
    result = json.loads(file.read_text())
    loss, (prose, code) = result["loss"], result["phases"]
    assert (result["slots_per_rank"], result["problems"]) == (20, [])
    assert result["max_abs_logit_difference"] < 1e-9
    # Whether of a rank that is left or of the one that was killed: what was served was compared.
    for phase in (prose, code):
        assert phase["requests"] == phase["requests_compared"] == 8 * phase["steps"]
        assert phase["balancedness_after"] >= 0.85
    assert None not in np.ravel(prose["rank_load_after"]).tolist() + np.ravel(code["rank_load_before"]).tolist()
    for loads in code["rank_load_after"]:
        assert [i for i in range(3) if loads[i] is None] == [rank]
        assert sum(filter(None, loads)) == pytest.approx(4 * code["tokens"])
    check_loss(loss, rank, left)
    if "--sync" in options:
        assert not loss["during_moves"]
        assert f"Metrics of rank {left[0]}: http://127.0.0.1:" in shown.output
    seconds = loss["total_ms"] / 1e3
    assert (
        f"Rank {rank} was killed; batch {loss['batch']} of code was served without it {seconds:.1f} s" in shown.output
    )
    assert "That leaves 40 slots per layer for 32 experts." in shown.output
    assert f"{seconds:.3f} s in all, {loss['recovery_ms'] / 1e3:.3f} s of them after detection" in shown.output
    assert re.search(rf"rank {rank} .*lost *\n", shown.output)


def check_loss(loss, rank, left):
    assert (loss["rank"], loss["traffic"], loss["attempts"]) == (rank, "code", 1)
    assert 2 <= loss["batch"] <= 40
    parts = [loss[f"{name}_ms"] for name in ("noticed", "silence", "agreeing", "connecting", "moving", "first_batch")]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(loss["total_ms"])
    assert loss["total_ms"] - loss["noticed_ms"] - loss["silence_ms"] == pytest.approx(loss["recovery_ms"])
    assert loss["silence_ms"] <= 2000
    assert loss["total_ms"] < 30_000
    assert sorted(loss["ranks"]) == [str(i) for i in left]
    assert {told["slots"] for told in loss["ranks"].values()} == {20}
    assert loss["from_checkpoint"] >= loss["lost_copies"] > 0
    for name in ("from_copies", "from_checkpoint"):
        assert loss[name] == sum(told[name] for told in loss["ranks"].values())
    for name in ("before", "after", "in_the_end"):
        assert 0.3 < loss[f"balancedness_{name}"] <= 1


def serve_with_wrong_rows_after_a_loss(rank, send, store, job):
    genuine = ElasticGroup.recover

    def careless(self, *args, **options):
        change = genuine(self, *args, **options)
        (layer, slot, _), *_ = change.plans["main"].reload_slots().tolist()
        host, local = divmod(slot, 20)
        if host == self.members.rank:
            for tensor in self.models["main"].weights.layers[layer].values():
                tensor[local].mul_(1.5)
        return change

    ElasticGroup.recover = careless
    serving.serve_phases(rank, send, store, job)


def serve_while_another_rank_dies(rank, send, store, job):
    if rank == 2:
        genuine, served = server.Server._forward, []

        def mortal(self, share):
            if self.elastic.members.size == 2:
                served.append(share)
            return genuine(self, share) if len(served) < 3 else die()

        server.Server._forward = mortal
    serving.serve_phases(rank, send, store, job)


def serve_while_another_rank_dies_in_recovery(rank, send, store, job):
    if rank == 2:
        ElasticGroup.recover = lambda *args, **options: die()
    serving.serve_phases(rank, send, store, job)


def serve_and_drop_an_output(rank, send, store, job):
    genuine = server.Server._forward

    def forgetful(self, share):
        logits = genuine(self, share)
        return None if self.elastic.members.size == 2 and rank == 2 else logits

    server.Server._forward = forgetful
    serving.serve_phases(rank, send, store, job)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (serve_with_wrong_rows_after_a_loss, "prose: logits differ from the unmodified model's by"),
        (serve_and_drop_an_output, "requests were compared with the unmodified model"),
        (serve_while_another_rank_dies, "rank 2 died with exit code -9"),
        (serve_while_another_rank_dies_in_recovery, "rank 2 died with exit code -9"),
    ],
)
def test_a_loss_that_is_not_lived_through_is_a_failure(worker, message, small, monkeypatch):
    monkeypatch.setattr(run, "GROUP_TIMEOUT", 20.0)
    monkeypatch.setattr(run, "BALANCER_TIMEOUT", 10.0)
    monkeypatch.setattr(run, "serve_phases", worker)
    start = time.monotonic()
    result = CliRunner().invoke(app, [*KILL, "1"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert time.monotonic() - start < 90
    assert not multiprocessing.active_children()


def serve_where_ranks_end_a_step_differently(rank, send, store, job):
    """All have served batch 5, and rank 0 knows; rank 1 then hangs until it is killed, and rank 2 never hears of it."""
    genuine, joined = server.Server._join, []

    def torn(self, *args):
        step = genuine(self, *args)
        joined.append(step)
        if len(joined) == 5 and rank == 1:
            signal.pause()
        if len(joined) == 5 and rank == 2:
            raise RuntimeError("[gloo] Connection closed by peer")
        return step

    server.Server._join = torn
    serving.serve_phases(rank, send, store, job)


def kill_rank_1_after_batch_5(message):
    return 1 if isinstance(message, Progress) and message.step == 5 and len(message.rank_share) == 3 else None


def test_a_batch_that_all_have_served_is_not_served_again(tmp_path):
    save_model(new_model(seed=1), tmp_path)
    batches = torch.randint(0, VOCAB_SIZE, (8, 3, 16), generator=torch.Generator().manual_seed(0))
    phases = (traffic.Phase("prose", batches, batches, batches),)
    config = BalancerConfig(window_size=8, step_interval=40, use_async=False, timeout=10.0)
    job = server.Job(tmp_path, Topology(3, 18), config, phases, None, 30.0, silence=1.5, kill_rank=1)
    worker = serve_where_ranks_end_a_step_differently
    *messages, result = run_ranks(worker, 3, job, timeout=100, kill=kill_rank_1_after_batch_5)
    progress = [message for message in messages if isinstance(message, Progress)]
    assert [message.step for message in progress] == list(range(1, len(result.step_ms) + 1))
    assert result.requests == result.requests_compared == 3 * len(progress)
    # What the broken forward had counted already is not counted twice.
    np.testing.assert_array_equal(result.rank_load_before.sum(axis=1), 4 * result.tokens)
    (recovered,) = [message for message in messages if isinstance(message, Recovered)]
    assert (recovered.traffic, recovered.batch) == ("prose", 6)
    assert [np.isnan(message.rank_share).tolist() for message in progress[4:6]] == [[False] * 3, [False, True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "4", "--kill-rank", "4"], "must be one of its ranks, 0 to 3; got 4"),
        (["--ranks", "4", "--kill-rank", "-1"], "must be one of its ranks, 0 to 3; got -1"),
        (
            ["--ranks", "1", "--kill-rank", "0"],
            "must leave a rank that serves; got 0 of 1 ranks. Use --ranks 2 or more",
        ),
        (["--kill-rank", "2", "--redundant", "8"], "10 slots on each of 3 ranks. Use --redundant 12 or more"),
    ],
)
def test_a_loss_that_cannot_be_lived_through_is_refused(options, message):
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_of_redundant_slots_there_are_as_many_after_the_loss():
    for size, slots in ((2, 40), (4, 14), (6, 8)):
        topology = run._choose_slots(run.DemoOptions(ranks=size, kill_rank=0))
        assert (topology.ep_size, topology.slots_per_rank) == (size, slots)
    assert run._choose_slots(run.DemoOptions(kill_rank=0, redundant=12)).slots_per_rank == 11


def test_a_rank_is_killed_once_while_weights_move_or_after_a_window():
    phases = [traffic.Phase(name, *(torch.zeros(1, 1, 1),) * 3) for name in ("prose", "code", "mix")]

    def killed_after(messages, rank=2, phases=phases):
        killing = run.Killing(rank, phases)
        asked = [killing(message) for message in messages]
        return [i for i in range(len(asked)) if asked[i] is not None], killing.during_moves

    def told(name, moving_from):
        return [a_progress(traffic=name, step=i, during_moves=i >= moving_from) for i in range(1, 12)]

    assert killed_after(told("prose", 1) + told("code", 3) + told("mix", 1)) == ([11 + 2], True)
    assert killed_after([*told("prose", 1), Recovered, *told("code", 99)]) == ([12 + 7], False)
    assert killed_after(told("prose", 4), phases=phases[:1]) == ([3], True)
    assert killed_after(told("prose", 4), rank=None, phases=phases[:1]) == ([], False)


def test_single_experts_are_read_as_the_model_was_loaded(tmp_path):
    save_model(new_model(seed=4), tmp_path)
    model, read = load_model(tmp_path), expert_rows(tmp_path)
    for layer in range(4):
        experts = model.model.layers[layer].mlp.experts
        for name, tensor in experts.named_parameters():
            assert torch.equal(read(layer, name, 7 * layer), tensor[7 * layer])


def test_ranks_without_requests_serve_the_others(tmp_path):
    save_model(new_model(seed=1), tmp_path)
    batches = torch.randint(0, VOCAB_SIZE, (8, 1, 16), generator=torch.Generator().manual_seed(0))
    phases = tuple(traffic.Phase(name, batches, batches, batches) for name in ("prose", "code"))
    config = BalancerConfig(window_size=8, step_interval=3, use_async=False, timeout=10.0)
    job = server.Job(tmp_path, Topology(2, 18), config, phases, None, 30.0)
    messages = list(run_ranks(serving.serve_phases, 2, job, timeout=100))
    progress = [message for message in messages if isinstance(message, Progress)]
    # Loads of three windows make a decision, so of those at steps 1, 4, 7 and 10 the last knows this traffic alone.
    assert [message.step for message in progress] == 2 * list(range(1, 10 + 8 + 1))
    assert progress[0].moved_experts > 0
    assert progress[0].now == progress[0].found  # the first batch was served before these moves
    for result in (messages[18], messages[-1]):
        assert sum(result.decisions.values()) == 6
        assert result.max_abs_logit_difference < 1e-4
        assert result.tokens == 8 * 16
        assert result.requests_compared == result.requests == 10 + 8
        assert result.rank_load_before.sum() == result.rank_load_after.sum() == 4 * 4 * 8 * 16


def say_and_end(rank, send, store, word):
    send((rank, word, store.add("came", 1)))


def test_ranks_share_a_store_and_pass_messages_to_the_parent():
    messages = list(run_ranks(say_and_end, 3, "hello", timeout=60))
    assert sorted(message[:2] for message in messages) == [(rank, "hello") for rank in range(3)]
    assert sorted(message[2] for message in messages) == [1, 2, 3]


def wait_for_all(rank, store, timeout):
    store.set(f"came {rank}", "")
    store.wait(["came 0", "came 1"], timedelta(seconds=timeout))


def raise_on_rank_1(rank, send, store):
    if rank == 1:
        raise ValueError("no such expert")
    wait_for_all(rank, store, 60)


def die_on_rank_1(rank, send, store):
    if rank == 1:
        os._exit(7)
    wait_for_all(rank, store, 60)


def stop_on_rank_1(rank, send, store):
    if rank == 1:
        signal.pause()
    wait_for_all(rank, store, 4)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (raise_on_rank_1, "ValueError: no such expert"),
        (die_on_rank_1, "rank 1 died with exit code 7"),
        (stop_on_rank_1, r"ranks \[1\] had not finished and were stopped"),
    ],
)
def test_a_lost_rank_is_named_and_ends_the_others(worker, message):
    start = time.monotonic()
    with pytest.raises(RankFailure, match=message):
        list(run_ranks(worker, 2, timeout=100))
    assert time.monotonic() - start < 50
    assert not multiprocessing.active_children()


def pause(rank, send, store):
    send("ready")
    signal.pause()


def test_ranks_end_with_their_time_and_with_the_interest_of_the_parent():
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] had not finished"):
        list(run_ranks(pause, 2, timeout=5))
    messages = run_ranks(pause, 2, timeout=60)
    assert next(messages) == "ready"
    messages.close()
    assert not multiprocessing.active_children()


def talk_until_killed(rank, send, store, second_dies):
    if rank == 1:
        send("kill me")
        while True:
            send(b" " * 2**20)  # more than a pipe takes: it is killed in the middle of a message
    time.sleep(2)
    if second_dies:
        die()
    send("still here")


def kill_who_asks(message):
    if message != "kill me":
        return None
    time.sleep(0.5)
    return 1


def test_the_parent_may_kill_a_rank_but_no_other_may_die():
    start = time.monotonic()
    messages = list(run_ranks(talk_until_killed, 2, False, timeout=60, kill=kill_who_asks))
    told = [message for message in messages if not isinstance(message, bytes)]
    (killed,) = [message for message in told if isinstance(message, Killed)]
    assert told == ["kill me", killed, "still here"]
    assert killed.rank == 1
    assert start < killed.at < time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 died with exit code -9"):
        list(run_ranks(talk_until_killed, 2, True, timeout=60, kill=kill_who_asks))
    assert not multiprocessing.active_children()


def test_no_text_is_served_twice_though_the_library_repeats_itself(domains):
    twice = {name: domain._replace(held_out=domain.held_out[: 64 * 1400].repeat(2)) for name, domain in domains.items()}
    phases = run.make_phases(twice, seed=0)
    assert [phase.traffic for phase in phases] == ["prose", "code", "mix"]
    requests = [part.flatten(0, 1) for phase in phases for part in (phase.first, phase.between, phase.fresh)]
    assert len(torch.cat(requests).unique(dim=0)) == len(torch.cat(requests))
    for phase in phases:
        assert phase.first.shape == phase.fresh.shape == (8, traffic.REQUESTS, traffic.REQUEST_LENGTH)
    again, other = run.make_phases(twice, seed=0), run.make_phases(twice, seed=1)
    assert torch.equal(phases[2].fresh, again[2].fresh)
    assert not torch.equal(phases[2].fresh, other[2].fresh)


def test_each_batch_of_mixed_traffic_has_both_kinds(domains):
    kinds = [{tuple(x) for x in d.held_out.unfold(0, 64, 64).tolist()} for d in domains.values()]
    for batch in run.make_phases(domains, seed=0)[2].first.tolist():
        assert [sum(tuple(request) in kind for request in batch) for kind in kinds] == [8, 8]


def test_text_between_lasts_as_long_as_the_balancer_takes():
    phase = traffic.Phase("prose", *(torch.arange(3).reshape(3, 1, 1),) * 3)
    more = phase.batches_between()
    assert [int(next(more)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_corpus_depends_on_the_seed_alone(domains):
    again, other = read_domains(VOCAB_SIZE, seed=3), read_domains(VOCAB_SIZE, seed=4)
    for name in domains:
        assert all(map(np.array_equal, domains[name], again[name]))
        assert not np.array_equal(domains[name].held_out, other[name].held_out)
        assert max(int(part.max()) for part in domains[name]) < VOCAB_SIZE


TOPOLOGY = Topology(2, 2)
FOUND = np.asarray([[0, 1, 2, 0]], dtype=np.int32)


def step(rank_load, load=(4, 2, 2), **changes):
    fields = {
        "tokens": 4,
        "requests": 2,
        "compared": 2,
        "ranks": tuple(np.flatnonzero(~np.isnan(rank_load)).tolist()),
        "load": np.asarray([load]),
        "rank_load": np.asarray([rank_load], dtype=float),
        "seconds": 0.01,
        "stall_seconds": 0.001,
        "planning_seconds": 0.5,
        "moving_seconds": 0.25,
        "during_moves": False,
        "settled": False,
        "difference": 0.0,
        "switched_layers": 0,
        "moved_experts": 0,
        "bytes_moved": 0,
    }
    return Step(**fields | changes)


def record_of(*steps):
    record = Record("prose", Hosts(FOUND, TOPOLOGY, (0, 1), 2))
    record.steps += steps
    return record


def test_progress_shows_what_the_phase_found_and_its_last_batches():
    slow = step([4, 4], seconds=0.05, during_moves=True, switched_layers=1, moved_experts=2, difference=3e-9)
    progress = record_of(*[step([2, 6])] * 8, *[slow] * 7, step([2, 6])).progress(0.9, 3)
    # Slots 0 and 1 of the placement found, half of expert 0 and expert 1, get 4 of 8 tokens.
    assert progress.found == 1.0
    assert progress.now == pytest.approx(8 * 4 / (7 * 4 + 6))
    assert (progress.step, progress.steps_during_moves, progress.during_moves) == (16, 7, False)
    assert (progress.moved_experts, progress.switched_layers, progress.decisions) == (14, 7, 3)
    assert (progress.idle_ms, progress.moving_ms) == (pytest.approx(10), pytest.approx(50))
    assert progress.stall_ms == pytest.approx(16)
    assert (progress.difference, progress.predicted) == (3e-9, 0.9)
    np.testing.assert_allclose(progress.rank_share, np.asarray([30, 34]) / 32)


def test_a_phase_is_measured_before_and_after_apart_from_what_lies_between():
    first = [step([3, 5], load=(2, 6, 0))] * 8
    after = [step([4, 4], moved_experts=1, bytes_moved=10)] * 8
    between = [step([0, 8], difference=1e-3)] * 5
    result = record_of(*first, *between, *after, *between).result(after, {"balanced": 2})
    assert result.tokens == 32
    np.testing.assert_array_equal(result.rank_load_before, [[8 * 7, 8 * 1]])
    np.testing.assert_array_equal(result.rank_load_after, [[32, 32]])
    assert (result.balancedness_before, result.balancedness_after) == (pytest.approx(4 / 7), 1.0)
    assert (result.moved_experts, result.bytes_moved, result.max_abs_logit_difference) == (8, 80, 1e-3)
    assert (result.planning_ms, result.moving_ms, result.decisions) == (500, 250, {"balanced": 2})
    assert len(result.step_ms) == 26


def test_the_figures_of_a_phase_in_which_a_rank_is_lost_are_of_those_who_are_left():
    steps = [step([4, 4, 4], seconds=0.02)] * 10 + [step([9, np.nan, 3])] * 2 + [step([6, np.nan, 6])] * 8
    record = Record("code", Hosts(np.asarray([[0, 1, 2, 0, 1, 2]]), Topology(3, 2), (0, 1, 2), 3))
    record.steps += steps
    progress, result = record.progress(None, 1), record.result(steps[-8:], {})
    np.testing.assert_array_equal(progress.rank_share, [1, np.nan, 1])
    assert progress.now == result.balancedness_after == 1.0
    # Of the eight batches after the loss two were served with twelve tokens at nine to three.
    assert result.around_loss == (1.0, pytest.approx(8 * 6 / (2 * 9 + 6 * 6)))
    np.testing.assert_array_equal(result.rank_load_after, [[48, np.nan, 48]])
    assert result.to_json()["rank_load_after"] == [[48, None, 48]]
    assert not np.isnan(result.rank_load_before).any()
    json.dumps(result.to_json(), allow_nan=False)
    found = Record("mix", Hosts(np.asarray([[0, 1, 2, 0]]), Topology(2, 2), (0, 2), 3))
    found.steps.append(step([6, np.nan, 2], load=(4, 4, 0)))
    assert found.progress(None, 0).found == pytest.approx(4 / 6)  # half of expert 0 on each, and 1 beside it
    assert found.result(found.steps, {}).around_loss is None


def test_a_difference_that_is_no_number_is_not_lost():
    assert record_of(step([4, 4], difference=np.inf), step([4, 4])).progress(None, 0).difference == np.inf


def a_progress(**changes):
    fields = record_of(step([2, 6])).progress(0.93, 1)._asdict()
    return Progress(**fields | changes)


def test_lines_tell_where_moves_begin_and_end():
    console = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    assert isinstance(make_view(console), LineView)
    with make_view(console) as view:
        for number in range(1, 18):
            view.show(a_progress(step=number, during_moves=4 <= number <= 9))
    lines = console.export_text().splitlines()
    assert [int(line.split()[2]) for line in lines] == [4, 8, 10, 16]
    assert ["predicted 0.930" in line for line in lines] == [True, True, False, False]
    console.file.close()


def test_the_live_table_fits_a_narrow_terminal():
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=80, file=nowhere, force_terminal=True)
        view = make_view(console)
        assert isinstance(view, LiveView)
        for name in ("prose", "code"):
            for number in range(1, 100):
                view.show(a_progress(traffic=name, step=number, during_moves=number == 99, now=0.4 + number / 165))
        console.print(view.render())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for name in ("prose", "code "):
        assert re.search(f"{name} +99  1.000 → 1.000 +0.930 +0 +0 +0 +10 / - ", text)
    assert "batches, batch by batch (yellow: weights move)" in text
    assert re.search("▃▃▄.*▇█+ *\n", text)
    assert "code now: load of each rank / mean in layer 0" in text
    assert re.search(r"rank 0 +█{6} +0\.50 *\n rank 1 +█{18} +1\.50", text)


def a_loss(**changes):
    recovered = Recovered(
        traffic="code",
        batch=9,
        noticed_at=100.25,
        agreeing=2.5,
        connecting=0.125,
        moving=0.5,
        attempts=1,
        served_at=104.0,
        ranks={0: Rehosted(14, 3, 1), 2: Rehosted(14, 0, 8)},
        lost_copies=9,
    )
    return describe_loss(Killed(1, 100.0), recovered._replace(**changes), 2.0, True)


def test_the_time_of_a_loss_is_split_without_a_gap():
    loss = a_loss()
    assert (loss.noticed_ms, loss.silence_ms, loss.agreeing_ms) == (250, 2000, 500)
    assert (loss.connecting_ms, loss.moving_ms, loss.first_batch_ms) == (125, 500, 625)
    assert (loss.total_ms, loss.recovery_ms) == (4000, 1750)
    assert (loss.from_copies, loss.from_checkpoint, loss.lost_copies) == (3, 9, 9)
    sooner = a_loss(agreeing=0.5)
    assert (sooner.silence_ms, sooner.agreeing_ms, sooner.total_ms) == (500, 0, 4000)


def test_what_ranks_receive_is_what_the_plan_moves():
    held, load = np.asarray([[0, 1, 2, 3, 0, 5], [0, 1, 2, 3, 4, 5]]), np.ones((2, 6))
    plan = grow(held, load, Topology(3, 2), Topology(4, 2), joining_ranks=[3])
    told = rehosted(plan, (0, 1, 4, 7))
    assert list(told) == [0, 1, 4, 7]
    assert plan.reload == ((0, 4),)
    assert sum(rank.from_checkpoint for rank in told.values()) == 1
    assert sum(rank.from_copies for rank in told.values()) == plan.num_moves - 1 > 1


def test_a_loss_fits_a_narrow_terminal():
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=80, file=nowhere, force_terminal=True)
        view, loss = make_view(console), a_loss()
        for number in range(1, 12):
            share = np.asarray([1.5, 1.0 if number < 9 else np.nan, 0.5])
            view.show(a_progress(traffic="code", step=number, now=1.0, rank_share=share))
        console.print(view.render())
        assert "slots" not in console.export_text(clear=False)
        view.show_loss(loss)
        console.print(view.render())
        show_result(console, demo_result(phase(around_loss=(0.8, 0.7)), kill_rank=1, loss=loss))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "Rank 1 was killed; batch 9 of code was served without it 4.0 s later." in text
    assert "code    ████████✕██" in text
    assert re.search(r"rank 0 +█{18} +1\.50 *\n rank 1 +lost *\n rank 2 +█{6} +0\.50", text)
    assert text.count("experts    from the") == 2
    assert re.search(r"rank 0 +14 +3 +1 *\n rank 1 +lost *\n rank 2 +14 +0 +8", text)
    assert "   2.000 s for a sign of life, the time-out of detection\n" in text
    assert "   0.500 s filling slots: 3 from copies, 9 from the checkpoint\n" in text
    assert "   4.000 s in all, 1.750 s of them after detection\n" in text
    assert "Balancedness 0.800 before, 0.700 right after, 0.900 at the end of the phase.\n" in text
    assert "It had the last copy of 9 experts" in text


def test_lines_tell_of_a_loss():
    console = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    make_view(console).show_loss(a_loss())
    assert console.export_text().startswith("Rank 1 was killed;")
    console.file.close()


def test_of_very_many_ranks_the_busiest_are_drawn():
    share = np.ones(40)
    share[[3, 39]] = 0.5, 3.0
    table = rank_bars({"": share})
    assert list(table.columns[0].cells)[-1] == "rank 39"
    assert table.row_count == 16
    assert "rank 3" not in table.columns[0].cells


def phase(**changes):
    fields = {
        "traffic": "prose",
        "tokens": 6,
        "requests": 9,
        "requests_compared": 9,
        "balancedness_before": 0.5,
        "balancedness_after": 0.9,
        "rank_load_before": np.asarray([[6.0, 2.0], [3.0, 5.0]]),
        "rank_load_after": np.asarray([[4.0, 4.0], [4.0, 4.0]]),
        "moved_experts": 3,
        "bytes_moved": 100,
        "planning_ms": 1.0,
        "moving_ms": 2.0,
        "max_abs_logit_difference": 0.0,
        "stall_ms": 3.0,
        "decisions": {"rebalance": 1, "balanced": 1},
        "step_ms": np.asarray([10.0, 20.0, 60.0]),
        "during_moves": np.asarray([False, True, True]),
    }
    return PhaseResult(**fields | changes)


def demo_result(*phases, use_async=True, **options):
    config = BalancerConfig(policy="greedy", use_async=use_async)
    return DemoResult(Topology(2, 20), config, 0, TrainingResult(1, 1.0, 7.0, 6.0), phases, 1.0, **options)


def test_the_loss_is_told_in_json():
    result = demo_result(phase(), phase(around_loss=(0.8, 0.7)), kill_rank=1, loss=a_loss())
    told = json.loads(json.dumps(result.to_json()))["loss"]
    assert (told["rank"], told["ranks"]["2"]) == (1, {"slots": 14, "from_copies": 0, "from_checkpoint": 8})
    assert (told["balancedness_before"], told["balancedness_after"], told["balancedness_in_the_end"]) == (0.8, 0.7, 0.9)
    assert told["recovery_ms"] == 1750
    assert demo_result(phase()).to_json()["loss"] is None


def test_a_loss_that_nobody_noticed_is_a_problem():
    assert demo_result(phase(), kill_rank=1, loss=a_loss()).problems() == []
    (problem,) = demo_result(phase(), kill_rank=1).problems()
    assert problem.startswith("no rank went on without rank 1")


def test_figures_over_all_phases():
    result = demo_result(phase(), phase(moved_experts=4, max_abs_logit_difference=1e-9)).to_json()
    assert (result["moved_experts"], result["bytes_moved"]) == (7, 200)
    assert result["max_abs_logit_difference"] == 1e-9
    assert result["balancedness_before"] == pytest.approx(8 / 11)
    assert result["balancedness_after"] == 1.0
    assert (result["policy"], result["slots_per_rank"], result["step_interval"]) == ("greedy", 20, 3000)
    assert (result["steps"], result["steps_during_moves"], result["stall_ms"]) == (6, 4, 6.0)
    assert result["step_ms"] == {"idle": 10.0, "moving": 40.0}
    assert result["decisions"] == {"rebalance": 2, "balanced": 2}
    assert result["phases"][0]["step_ms"] == {"idle": 10.0, "moving": 40.0}
    json.dumps(result)


def test_a_dash_sends_the_json_to_standard_output_alone(monkeypatch):
    def show(_, console):
        show_result(console, demo_result(phase()))
        return demo_result(phase())

    monkeypatch.setattr(run, "run_demo", show)
    shown = CliRunner().invoke(app, ["demo", "--json", "-"])
    assert json.loads(shown.stdout)["moved_experts"] == 3
    assert "0.500 → 0.900" in shown.stderr


def test_a_run_in_which_nothing_was_served_beside_moves_shows_nothing():
    still = phase(during_moves=np.zeros(3, dtype=bool))
    assert demo_result(still, phase()).problems() == []
    (problem,) = demo_result(still, still).problems()
    assert problem.startswith("no batch was served while weights moved")
    assert demo_result(still, use_async=False).problems() == []


def test_a_port_in_use_is_refused_before_the_training():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = CliRunner().invoke(app, [*SMALL, "--metrics-port", str(other.getsockname()[1])])
    assert result.exit_code == 2
    assert "`--metrics-port` must be free" in result.stderr


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"balancedness_after": 0.849}, "prose: balancedness after balancing is 0.849"),
        ({"balancedness_after": float("nan")}, "prose: balancedness"),
        ({"max_abs_logit_difference": 1e-4}, "prose: logits differ"),
        ({"max_abs_logit_difference": float("inf")}, "prose: logits differ"),
        ({"requests_compared": 8}, "prose: 8 of 9 requests were compared"),
    ],
)
def test_broken_promises_are_found_in_any_phase(changes, problem):
    problems = demo_result(phase(traffic="code"), phase(**changes)).problems()
    assert [problem is not None and text.startswith(problem) for text in problems] == [True] * (problem is not None)
