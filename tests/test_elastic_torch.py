"""Groups that lose ranks, take others in and let some go, as real processes on Gloo."""

import copy
import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import EMPTY, EplbError, LostExpertsError, Topology, round_robin
from eplb_core.checkpoint import CheckpointRows
from eplb_torch import ExpertBalancer
from eplb_torch.elastic import ElasticGroup, is_loss
from eplb_torch.elastic.membership import Evicted, Membership
from eplb_torch.integrations.huggingface import expert_parallel, joining_experts
from tests.elastic_soak import World, examine, run_events
from tests.elastic_worker import SoakModel
from tests.expert_rows import expert_row, wrong_rows
from tests.multiprocess import run_ranks
from tests.tiny_moe import tiny_model

SILENCE = 1.5
LAYERS, LOGICAL = 3, 20


@pytest.fixture
def port():
    """Of a store that outlives the ranks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    yield server.port
    del server


def membership(port, name, **options):
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    return Membership(dist.PrefixStore("test", store), name=name, silence=SILENCE, **{"timeout": 20.0} | options)


def elastic_group(port, name, **options):
    times = {"timeout": 8.0, "group_timeout": 12.0}
    return ElasticGroup(membership(port, name), **times | options)


def read_row(layer, name, expert):
    return expert_row(layer, expert, name)


def founded(port, rank, size, slots, **options):
    """A group of `size` whose models hold `slots` experts per rank."""
    elastic, topology = elastic_group(port, f"r{rank}", **options), Topology(size, slots)
    elastic.found(rank, size)
    model = SoakModel(round_robin(LAYERS, LOGICAL, topology), topology, rank)
    elastic.serve(model)
    return elastic, model


def check_rows(elastic, model):
    assert wrong_rows(list(model.weights.layers), model.placement, model.topology, elastic.members.rank) == []


def notice(elastic):
    """The error with which a collective of the group ends when a member has died."""

    def serve():
        while True:
            dist.all_reduce(torch.zeros(1), group=elastic.group)
            time.sleep(0.01)

    with pytest.raises((RuntimeError, ValueError)) as caught:
        serve()
    assert is_loss(caught.value)
    return caught.value


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# Random events


def test_members_come_and_go_and_nothing_is_computed_wrongly(tmp_path):
    world = World(str(tmp_path), seed=5, silence=SILENCE)
    try:
        run_events(world, 8, 5)
    finally:
        world.close()
    report = examine(world)
    assert sum(report.events.values()) >= 8
    assert report.served > 30
    assert (report.wrong_tokens, report.wrong_rows, report.lost_in_vain, report.evicted) == (0, 0, 0, 0), report
    assert report.threads < 20


# A real model


@torch.no_grad()
def lose_join_and_leave(rank, port, checkpoint):
    """Four serve, one dies, one joins, one leaves: after each, logits are those of the unmodified model."""
    model: Any = tiny_model("qwen3_moe")
    reference = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
    rows = CheckpointRows(checkpoint, lambda la, name, e: (f"{names[la]}.{name}", e), framework="torch")
    elastic = elastic_group(port, f"r{rank}", read_row=rows)
    seen, errors = [], []

    def compare():
        ids = torch.randint(0, 61, (1, 3 + rank), generator=torch.Generator().manual_seed(rank + 10 * len(errors)))
        errors.append((model(ids).logits - reference(ids).logits).abs().max().item())

    def note(change):
        plan = change.plans["main"]
        seen.append((change.members.names, change.lost, change.joined, plan.reload, plan.topology.ep_size))

    if rank < 4:
        elastic.found(rank, 4)
        experts = expert_parallel(model, Topology(4, 3), group=elastic.group)
        elastic.serve(experts)
        compare()
        addresses = [t.data_ptr() for layer in experts.weights.layers for t in layer.values()]
        if rank == 1:
            die()
        error = notice(elastic)
        note(elastic.recover(error, loads={"main": experts.load().numpy()}))
        assert addresses == [t.data_ptr() for layer in experts.weights.layers for t in layer.values()]
        compare()
        while True:
            waiting = elastic.waiting()
            flag = torch.tensor([elastic.members.rank == 0 and len(waiting) == 1], dtype=torch.int32)
            dist.all_reduce(flag, group=elastic.group)
            if flag:
                break
            time.sleep(0.1)
        note(elastic.admit(["r4"]))
    else:
        experts = joining_experts(model, 3)
        with pytest.raises(EplbError, match="copy of every expert"):
            model(torch.zeros(1, 1, dtype=torch.int64))
        note(elastic.join(experts, 40.0))
    compare()
    balancer = ExpertBalancer(experts, elastic.transport, {"use_async": False, "step_interval": 4, "timeout": 8.0})
    for _ in range(3):
        compare()
        balancer.step(experts.take_load())
    change = elastic.release(["r2"], balancer=balancer)
    if change is None:
        with pytest.raises(RuntimeError):
            compare()
        return seen, errors
    note(change)
    balancer = balancer.renewed(elastic.transport)
    compare()
    balancer.step(experts.take_load())
    assert not balancer.failure
    rows.close()
    elastic.close()
    return seen, errors


def test_logits_stay_those_of_the_unmodified_model(port, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(tiny_model("qwen3_moe").state_dict(), tmp_path / "model.safetensors")
    results = run_ranks(lose_join_and_leave, 5, port, str(tmp_path), timeout=120, may_die=[1])
    assert results[1] is None
    for rank in (0, 2, 3, 4):
        seen, errors = results[rank]
        assert max(errors) < 1e-4
        assert len(errors) == {0: 7, 2: 6, 3: 7, 4: 5}[rank]
        if rank != 4:
            names, lost, joined, reload, size = seen[0]
            assert (names, lost, joined, size) == (("r0", "r2", "r3"), ("r1",), (), 3)
            assert set(reload) == {(layer, expert) for layer in range(2) for expert in (4, 5)}
        joined = [change for change in seen if change[2]]
        assert joined == [(("r0", "r2", "r3", "r4"), (), ("r4",), (), 4)]
        if rank != 2:
            assert seen[-1][:3] == (("r0", "r3", "r4"), ("r2",), ())


@torch.no_grad()
def serve_as_the_page_says(rank, port, checkpoint):
    """The code of docs/elastic.md. One of three dies between two batches."""
    page = (Path(__file__).parents[1] / "docs" / "elastic.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ElasticGroup" in code)
    names: dict[str, Any] = {}
    exec(compile(code.replace("path/to/model", checkpoint), "docs/elastic.md", "exec"), names)
    model: Any = tiny_model("qwen3_moe")
    reference = copy.deepcopy(model)
    layers = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]

    def batches():
        for number in range(8):
            if rank == 1 and number == 4:
                die()
            yield {"input_ids": torch.randint(0, 61, (1, 4 + rank), generator=torch.Generator().manual_seed(number))}

    answers = names["serve"](model, layers, ("127.0.0.1", port), rank, 3, batches())
    return [
        (ours.logits - reference(**batch).logits).abs().max().item()
        for ours, batch in zip(answers, batches(), strict=True)
    ]


def test_the_code_of_the_page_survives_a_loss(port, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(tiny_model("qwen3_moe").state_dict(), tmp_path / "model.safetensors")
    results = run_ranks(serve_as_the_page_says, 3, port, str(tmp_path), timeout=120, may_die=[1])
    assert results[1] is None
    for errors in (results[0], results[2]):
        assert len(errors) == 8
        assert max(errors) < 1e-4


# What cannot be cured is said


def lose_the_last_copy(rank, port):
    elastic, model = founded(port, rank, 3, 10)
    lost = sorted(
        (layer, e)
        for layer in range(LAYERS)
        for e in range(LOGICAL)
        if (model.placement[layer] == e).sum() == 1 and e in model.placement[layer, 10:20]
    )
    if rank == 1:
        die()
    error = notice(elastic)
    before = model.placement
    with pytest.raises(LostExpertsError, match="copy of every expert, or a checkpoint") as caught:
        elastic.recover(error)
    assert caught.value.lost == lost
    np.testing.assert_array_equal(model.placement, before)
    assert wrong_rows(list(model.weights.layers), before, model.topology, rank) == []
    elastic.read_row = read_row
    change = elastic.recover()
    assert change.members.generation == 2
    check_rows(elastic, model)
    return change.plans["main"].reload, (model.placement >= 0).all()


def test_the_loss_of_a_last_copy_is_an_error_that_lists_it_until_there_is_a_checkpoint(port):
    results = run_ranks(lose_the_last_copy, 3, port, timeout=60, may_die=[1])
    assert results[0] == results[2]
    reload, is_full = results[0]
    assert len(reload) > 10
    assert is_full


class Stiff(SoakModel):
    """Cannot get more slots."""

    def resize(self, slots_per_rank):
        raise EplbError("no memory")


def run_out_of_slots(rank, port, resize):
    elastic, model = founded(port, rank, 4, 6, read_row=read_row, resize=resize)
    if rank == 3:
        die()
    error = notice(elastic)
    if resize:
        elastic.recover(error)
    else:
        with pytest.raises(EplbError, match="use slots_per_rank >= 7, or more ranks"):
            elastic.recover(error)
    check = elastic.members.rank if resize else rank
    assert wrong_rows(list(model.weights.layers), model.placement, model.topology, check) == []
    return model.topology, model.weights.slots_per_rank


@pytest.mark.parametrize("resize", [False, True])
def test_too_few_slots_are_refused_or_cured_by_more_per_rank(port, resize):
    results = run_ranks(run_out_of_slots, 4, port, resize, timeout=60, may_die=[3])
    expected = (Topology(3, 7), 7) if resize else (Topology(4, 6), 6)
    assert results[:3] == [expected] * 3


def fail_to_read(rank, port):
    """One rank cannot read the checkpoint: it leaves with its error, and the others go on without it."""

    def torn(layer, name, expert):
        if rank == 0:
            raise OSError("disk on fire")
        return read_row(layer, name, expert)

    elastic, model = founded(port, rank, 4, 20, read_row=torn)
    keep = round_robin(LAYERS, LOGICAL, Topology(4, 20))
    keep[:, 0:40] = np.where(keep[:, 0:40] >= 10, EMPTY, keep[:, 0:40])  # ranks 0 and 1 hold the lower half only
    keep[:, 40:60] = np.where(keep[:, 40:60] < 10, EMPTY, keep[:, 40:60])
    keep[:, 60:80] = np.where(keep[:, 60:80] == 3, 3, EMPTY)
    model.regroup(keep, model.topology)
    if rank == 2:
        die()
    error = notice(elastic)
    if rank == 0:
        with pytest.raises(OSError, match="disk on fire"):
            elastic.recover(error)
        return None
    change = elastic.recover(error)
    check_rows(elastic, model)
    return change.members.names, change.attempts, (model.placement >= 0).any()


def test_a_rank_that_cannot_reload_leaves_and_the_others_go_on(port):
    results = run_ranks(fail_to_read, 4, port, timeout=90, may_die=[2])
    for rank in (1, 3):
        assert results[rank][:2] == (("r1", "r3"), 2)


# Ranks that hang


def hang(rank, port):
    elastic, model = founded(port, rank, 3, 10, read_row=read_row, group_timeout=3.0)
    if rank == 2:
        subprocess.Popen(["sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(Evicted, match="r2 is not in generation 1"):
            elastic.recover(notice(elastic))
        return "evicted"
    elastic.membership.check()
    # The connections to a process that is stopped stay open: only the timeout of the group tells.
    start = time.monotonic()
    error = notice(elastic)
    noticed = time.monotonic()
    assert 2.0 < noticed - start < 5.0
    change = elastic.recover(error)
    assert time.monotonic() - noticed < SILENCE + 3.0
    check_rows(elastic, model)
    dist.all_reduce(torch.zeros(1), group=elastic.group)
    return change.members.names


def test_a_rank_that_hangs_is_left_behind_and_learns_it(port):
    assert run_ranks(hang, 3, port, timeout=60) == [("r0", "r1"), ("r0", "r1"), "evicted"]


# Who joins


def refuse_another_model(rank, port):
    if rank < 2:
        elastic, model = founded(port, rank, 2, 12)
        deadline, time_left = time.monotonic() + 6.0, torch.ones(1)
        while time_left:  # until both have none: who ends first breaks the group for the other
            assert elastic.waiting() == ()
            time_left = torch.tensor([float(time.monotonic() < deadline)])
            dist.all_reduce(time_left, group=elastic.group)
            time.sleep(0.1)
        elastic.membership.meet("the end", 10.0)
        return elastic.members.generation
    other = Stiff(np.full((LAYERS, 10), EMPTY), Topology(1, 10), 0)
    with pytest.raises(EplbError, match="no memory"):
        elastic_group(port, "s").join(other, 10.0)
    other = SoakModel(np.full((LAYERS, 13), EMPTY), Topology(1, 13), 0)
    with pytest.raises(EplbError, match=r"'slots_per_rank': 13.* where the group has .*'slots_per_rank': 12"):
        elastic_group(port, "t").join(other, 10.0)
    other = SoakModel(np.full((LAYERS - 1, 12), EMPTY), Topology(1, 12), 0)
    with pytest.raises(EplbError, match=r"'layers': 2.* where the group has .*'layers': 3"):
        elastic_group(port, "u").join(other, 10.0)
    time.sleep(1.0)
    return None


def test_other_models_are_refused_before_they_disturb_the_group(port):
    assert run_ranks(refuse_another_model, 3, port, timeout=60) == [0, 0, None]


def die_while_joining(rank, port):
    if rank == 2:
        m = membership(port, "r2")
        m.join(40.0)
        die()
    elastic, model = founded(port, rank, 2, 12)
    while True:
        flag = torch.tensor([rank == 0 and elastic.waiting() == ("r2",)], dtype=torch.int32)
        dist.all_reduce(flag, group=elastic.group)
        if flag:
            break
        time.sleep(0.1)
    before = model.placement
    start = time.monotonic()
    change = elastic.admit(["r2"])
    assert time.monotonic() - start < 2 * SILENCE + 4.0
    check_rows(elastic, model)
    dist.all_reduce(torch.zeros(1), group=elastic.group)
    return change.members, change.lost, change.joined, change.attempts, (model.placement == before).all()


def test_a_newcomer_that_dies_does_not_wedge_the_group(port):
    results = run_ranks(die_while_joining, 3, port, timeout=60, may_die=[2])
    for rank in range(2):
        members, *rest = results[rank]
        assert members.names == ("r0", "r1")
        assert rest == [(), (), 2, True]


# Several models


def lose_with_two_models(rank, port):
    elastic, topology = elastic_group(port, f"r{rank}", read_row={"main": read_row, "draft": read_row}), Topology(3, 10)
    elastic.found(rank, 3)
    models = {
        "main": SoakModel(round_robin(LAYERS, LOGICAL, topology), topology, rank),
        "draft": SoakModel(round_robin(1, LOGICAL, topology), topology, rank),
    }
    elastic.serve(models)
    if rank == 1:
        die()
    change = elastic.recover(notice(elastic))
    for model in models.values():
        check_rows(elastic, model)
    return {name: len(plan.reload) for name, plan in change.plans.items()}


def test_several_models_go_along(port):
    results = run_ranks(lose_with_two_models, 3, port, timeout=60, may_die=[1])
    assert results[0] == results[2] == {"main": 30, "draft": 10}


def test_bad_arguments_are_refused(port):
    with pytest.raises(EplbError, match="group_timeout=0"):
        elastic_group(port, "a", group_timeout=0)
    elastic = elastic_group(port, "b")
    with pytest.raises(EplbError, match="Call found or join"):
        elastic.group  # noqa: B018
    elastic.found(0, 1)
    with pytest.raises(EplbError, match="ep_size=2 of 'main', members=1"):
        elastic.serve(SoakModel(round_robin(LAYERS, LOGICAL, Topology(2, 10)), Topology(2, 10), 0))
    elastic.serve(SoakModel(round_robin(LAYERS, LOGICAL, Topology(1, 20)), Topology(1, 20), 0))
    for names in (["b"], ["c"]):
        with pytest.raises(EplbError, match="must be members, and not all"):
            elastic.release(names)
    with pytest.raises(EplbError, match="`loads` must be"):
        elastic.recover(loads={"main": np.zeros((2, 2))})
    elastic.close()


# A second loss


def lose_another_while_rows_move(rank, port):
    """Rank 3 dies where it should send rows; rank 0 takes none from it, and need not wait for those who do."""
    elastic, model = founded(port, rank, 5, 8, read_row=read_row)
    if rank == 4:
        die()
    error = notice(elastic)
    if rank == 3:
        elastic._connections.break_all()
        elastic.membership.renew()
        elastic._connections.connect()
        elastic.transport.exchange = lambda *_: die()
        elastic._hosting.plan = lambda *args, plan=elastic._hosting.plan, **options: plan(*args, **options)
        plans = elastic._hosting.plan(
            elastic._hosting.loads(None, None), elastic.transport, elastic.members, read_row, lambda h, s: scattered(h)
        )
        elastic._carry_out(plans)
    elastic._hosting.plan = lambda *args, plan=elastic._hosting.plan, seen=[]: plan(
        *args[:4], (lambda h, s: scattered(h)) if not seen.append(1) and len(seen) == 1 else args[4], *args[5:]
    )
    start = time.monotonic()
    change = elastic.recover(error)
    seconds = time.monotonic() - start
    check_rows(elastic, model)
    return change.members.names, change.attempts, seconds


def scattered(holdings):
    """A plan in which every rank takes rows from the next one."""
    plan = holdings.plan(max_extra_moves=0)
    return plan._replace(new=np.roll(plan.placement, 8, axis=1), placement=np.roll(plan.placement, 8, axis=1))


def test_a_second_loss_while_rows_move_costs_another_generation_and_no_timeout(port):
    results = run_ranks(lose_another_while_rows_move, 5, port, timeout=60, may_die=[3, 4])
    for rank in range(3):
        names, attempts, seconds = results[rank]
        assert (names, attempts) == (("r0", "r1", "r2"), 2)
        assert seconds < 2 * SILENCE + 3.0
