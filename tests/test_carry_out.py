"""What is told after a failure, what is planned from it, and how one model follows: ranks that are threads."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, EplbError, LostExpertsError, Topology, check_placement
from eplb_core.elastic import grow
from eplb_torch import (
    DeviceMaps,
    ExpertBalancer,
    ExpertWeights,
    InProcessWorld,
    LiveModel,
    PlanningError,
    ProcessGroupTransport,
    RearrangeError,
    TransportError,
)
from eplb_torch.elastic.carry_out import MoveOptions, carry_out, check_plan
from eplb_torch.elastic.groups import break_group, form_group
from eplb_torch.elastic.holdings import Holdings, Told, choose_slots, gather_holdings
from eplb_torch.elastic.losses import is_loss
from eplb_torch.elastic.membership import Evicted, MembershipError, MembersLost
from tests.expert_rows import FIELDS, expert_layers, expert_row, wrong_rows
from tests.test_balancer import FAST, LOGICAL, TOPOLOGY, check_rows, live_model, on_threads, skewed

OPTIONS = MoveOptions(5.0, 2**20, False)


# What is told


def told(*columns, held_back=None, load=(1, 1, 1)):
    held = np.asarray([columns], dtype=np.int32)
    later = held if held_back is None else np.asarray([held_back], dtype=np.int32)
    return {"main": Told(held, later, np.asarray([load], dtype=np.float64))}


def gather(*by_rank):
    results = on_threads(lambda transport: gather_holdings(by_rank[transport.rank], transport, 1, 5.0), len(by_rank))
    assert all(repr(holdings) == repr(results[0][0]) for holdings, _ in results)
    return results


def test_every_rank_speaks_for_its_own_slots_and_loads_add_up():
    holdings, chosen = gather(told(0, 1), told(2, 0, load=(5, 0, 2)), told(EMPTY, EMPTY))[0]
    assert holdings["main"].placement.tolist() == [[0, 1, 2, 0, EMPTY, EMPTY]]
    assert holdings["main"].load.tolist() == [[7, 2, 4]]
    assert holdings["main"].topology == Topology(3, 2)
    assert chosen["main"].tolist() == [[False, False]]


def test_ranks_with_fewer_slots_count_as_having_empty_ones():
    results = gather(told(0), told(1, 2, 0))
    assert results[0][0]["main"].placement.tolist() == [[0, EMPTY, EMPTY, 1, 2, 0]]
    assert results[0][0]["main"].topology == Topology(2, 3)
    assert [chosen["main"].shape for _, chosen in results] == [(1, 1), (1, 3)]


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        # Rank 1 was to hand 2 over to a rank that died: it keeps it.
        ([told(0, 1), told(2, 0, held_back=[0, 0])], [[0, 0], [0, 0]]),
        # Rank 0 has committed already and holds 2 no more; rank 1 has received it.
        ([told(0, 1), told(1, 0, held_back=[2, 0])], [[0, 0], [1, 0]]),
        # Nothing is lost either way: nothing is risked.
        ([told(0, 1), told(2, 0, held_back=[1, 2])], [[0, 0], [0, 0]]),
        # 2 can only come back over the last copy of 1, which has waited in no other place.
        ([told(0, 0), told(1, 0, held_back=[2, 0])], [[0, 0], [0, 0]]),
        # Two ranks have received 2, and one commits.
        ([told(0, 1, held_back=[2, 1]), told(0, 1, held_back=[0, 2])], [[1, 0], [0, 0]]),
        # Both 1 and 2 come back, one into an empty slot; 0 stays, though both would take its place.
        ([told(0, EMPTY, held_back=[2, 1]), told(EMPTY, 0, held_back=[0, 2])], [[1, 1], [0, 0]]),
    ],
)
def test_what_was_held_back_is_committed_where_it_brings_an_expert_back_and_loses_none(ranks, chosen):
    results = gather(*ranks)
    assert [own["main"].astype(int).tolist()[0] for _, own in results] == chosen
    columns = [
        (rank["main"].held_back if take else rank["main"].held)[0, slot]
        for rank, takes in zip(ranks, chosen, strict=True)
        for slot, take in enumerate(takes)
    ]
    assert results[0][0]["main"].placement.tolist() == [columns]


@given(st.data())
def test_choosing_slots_loses_nothing_that_is_held_and_leaves_nothing_that_could_come_back(data):
    layers, slots, num_logical = (data.draw(st.integers(1, most)) for most in (2, 8, 6))
    ids = st.lists(st.integers(EMPTY, num_logical - 1), min_size=layers * slots, max_size=layers * slots)
    held, held_back = (np.asarray(data.draw(ids)).reshape(layers, slots) for _ in range(2))
    take = choose_slots(held, held_back, num_logical)
    after = np.where(take, held_back, held)
    for layer in range(layers):
        assert set(held[layer].tolist()) - {EMPTY} <= set(after[layer].tolist())
        for slot in range(slots):
            back = held_back[layer, slot]
            spare = after[layer, slot] == EMPTY or (after[layer] == after[layer, slot]).sum() > 1
            assert back == EMPTY or back in after[layer] or not spare
    assert not take[held == held_back].any()


def test_a_rank_that_is_silent_is_a_transport_error():
    world = InProcessWorld(2)
    world.kill(1)
    with pytest.raises(TransportError, match=r"ranks \[1\] did not answer"):
        gather_holdings(told(0), world.transport(0), 1, 0.5)


# What is planned


def holdings(*slots, load=(9, 5, 3, 1), ep_size=3, num_nodes=1):
    placement = np.asarray([slots], dtype=np.int32)
    return Holdings(placement, np.asarray([load]), Topology(ep_size, len(slots) // ep_size, num_nodes))


def test_ranks_that_hold_nothing_are_filled_whichever_they_are():
    plan = holdings(0, 1, EMPTY, EMPTY, 2, 3).plan(max_extra_moves=0)
    assert plan.placement[0, [0, 1, 4, 5]].tolist() == [0, 1, 2, 3]
    assert 0 in plan.placement[0, 2:4]
    assert plan.old.tolist() == [[0, 1, EMPTY, EMPTY, 2, 3]]


def test_survivors_keep_what_they_hold_and_take_what_is_lost():
    plan = holdings(0, 1, 0, 2, ep_size=2).plan(max_extra_moves=0)
    assert plan.reload == ((0, 3),)
    assert sorted(plan.placement[0].tolist()) == [0, 1, 2, 3]


def test_more_slots_are_given_to_all_ranks_behind_those_that_there_are():
    few = holdings(0, 1, ep_size=2)
    assert few.plan().unhosted == ((0, 2), (0, 3))
    plan = few.plan(2, max_extra_moves=0)
    assert plan.complete
    assert plan.placement[0, ::2].tolist() == [0, 1]
    assert plan.topology == Topology(2, 2)


def test_where_nobody_holds_anything_all_is_loaded():
    plan = holdings(EMPTY, EMPTY, EMPTY, EMPTY, ep_size=2, num_nodes=2).plan()
    assert len(plan.reload) == 4
    assert plan.topology == Topology(2, 2, 2)


def test_plans_that_cannot_be_carried_out_are_refused():
    check_plan(holdings(0, 1, 2, 3, ep_size=2).plan(), None)
    lost = holdings(0, 1, 2, EMPTY, ep_size=2).plan()
    check_plan(lost, expert_row)
    with pytest.raises(LostExpertsError, match=r"or a checkpoint; got lost \(layer, expert\) pairs \[\(0, 3\)\]"):
        check_plan(lost, None)
    with pytest.raises(EplbError, match="There is no slot .* Nothing was moved"):
        check_plan(holdings(0, 1, ep_size=2).plan(), expert_row)


# How a model follows

HELD = np.asarray([[0, 1, 2, EMPTY], [3, 2, 1, 1]], dtype=np.int32)
LOAD = np.asarray([[9, 1, 4, 2], [3, 3, 1, 8]])


def a_model(rank):
    """Of a rank that held its part of `HELD` as one of three; its other slots are what a dead rank had."""
    before, topology = np.concatenate([HELD, [[3, 3], [0, 0]]], axis=1), Topology(3, 2)
    weights = ExpertWeights(expert_layers(before, topology, rank))
    return LiveModel(weights, DeviceMaps(before, 4), topology, before)


def follow(read_row, transports=None):
    plan = grow(HELD, LOAD, Topology(2, 2), Topology(2, 2), max_extra_moves=0)
    assert plan.reload == ((0, 3), (1, 0))

    def run(transport):
        model, refreshed = a_model(transport.rank), []
        model.weights.add_refresh(lambda layer, slots: refreshed.append((layer, slots)))
        try:
            carry_out(plan, model, None, transport, OPTIONS, epoch=3, read_row=read_row)
        except Exception as error:
            return error, model, refreshed
        return None, model, refreshed

    return plan, InProcessWorld(2).run(run) if transports is None else [run(transport) for transport in transports]


def test_lost_rows_are_read_into_their_slots_and_derived_tensors_refreshed():
    reads = []

    def read_row(layer, name, expert):
        reads.append((layer, name, expert))
        row = expert_row(layer, expert, name)
        return row.numpy() if row.dtype in (torch.float32, torch.uint8) else row

    plan, results = follow(read_row)
    for rank, (error, model, _) in enumerate(results):
        assert error is None
        assert wrong_rows(list(model.weights.layers), plan.new, model.topology, rank) == []
        np.testing.assert_array_equal(model.placement, plan.new)
        assert model.topology == Topology(2, 2)
    names = {name for name in FIELDS if name != "empty"}
    assert sorted(reads) == sorted((layer, name, e) for layer, e in plan.reload for name in names)
    slots = [(layer, slot // 2, slot % 2) for layer, slot, _ in plan.reload_slots().tolist()]
    for layer, rank, local in slots:
        assert (layer, (local,)) in results[rank][2]


@pytest.mark.parametrize("fault", ["shape", "dtype", "error"])
def test_a_row_that_does_not_fit_leaves_a_model_that_says_what_it_holds(fault):
    def read_row(layer, name, expert):
        row = expert_row(layer, expert, name)
        if fault == "error":
            raise OSError("gone")
        return row[None] if fault == "shape" else row.to(torch.float64)

    plan, results = follow(read_row)
    for rank, (error, model, _) in enumerate(results):
        own = [(layer, slot) for layer, slot, _ in plan.reload_slots().tolist() if slot // 2 == rank]
        assert (error is None) == (not own)
        if own:
            assert isinstance(error, OSError) or "shape and dtype" in str(error)
            assert all(model.placement[layer, slot] == EMPTY for layer, slot in own)
        assert wrong_rows(list(model.weights.layers), model.placement, model.topology, rank) == []


def test_a_failed_move_leaves_a_model_that_says_what_it_holds():
    world = InProcessWorld(2)
    world.kill(1)
    plan, [(error, model, _)] = follow(lambda *_: 1 / 0, [world.transport(0)])
    assert isinstance(error, RearrangeError)
    assert error.lost_ranks == (1,)
    np.testing.assert_array_equal(model.placement, plan.old)
    assert model.topology == plan.group


# A balancer that halts


@pytest.mark.parametrize("seed", range(12))
def test_survivors_that_halt_know_their_slots_and_agree_what_was_confirmed(seed):
    """One of three dies at a random moment of a rearrangement; the others stop at different boundaries."""
    world, rng = InProcessWorld(3), np.random.default_rng(seed)
    die_at, extra = int(rng.integers(3, 30)), int(rng.integers(0, 3))
    barrier = threading.Barrier(3)
    killed = threading.Event()

    def run(transport):
        rank = transport.rank
        model = live_model(rank)
        row = model.weights.row_bytes(0)
        config = FAST | {"timeout": 1.0, "max_staging_bytes": 2 * row, "step_interval": 20}
        balancer = ExpertBalancer(model, transport, config)
        for step in range(1, die_at):
            barrier.wait(20.0)
            time.sleep(0.002)
            balancer.step(skewed(rank, step))
        if rank == 2:
            world.kill(2)
            killed.set()
            return None
        killed.wait(10.0)
        try:
            for _ in range(extra if rank == 1 else 0):
                balancer.step(None)
        except (TransportError, RearrangeError):
            pass
        start = time.monotonic()
        balancer.halt()
        assert time.monotonic() - start < 2.5
        assert balancer.failure is not None
        assert balancer.step(None) == {}
        check_rows(model, rank)
        before, held_back = model.placement, balancer.held_back()
        # All, none or some of the slots: each by itself, in any combination.
        chosen = np.random.default_rng(seed).random(before.shape) < (seed % 3) / 2
        balancer.settle(chosen)
        assert balancer.held_back() is None
        expected = before if held_back is None else np.where(chosen, held_back, before)
        assert wrong_rows(list(model.weights.layers), expected, TOPOLOGY, rank) == []
        np.testing.assert_array_equal(model.placement, before)
        balancer.settle(np.ones_like(chosen))
        assert wrong_rows(list(model.weights.layers), expected, TOPOLOGY, rank) == []
        balancer.close()
        return (before if held_back is None else held_back).tolist()

    results = world.run(run, timeout=60.0)
    assert results[2] is None
    for result in results[:2]:
        assert not isinstance(result, Exception), result
        check_placement(np.asarray(result), TOPOLOGY, LOGICAL)
    assert results[0] == results[1]


def test_a_renewed_balancer_starts_afresh_and_forecasts_what_it_saw():
    def run(transport):
        model = live_model(transport.rank)
        balancer = ExpertBalancer(model, transport, FAST | {"use_async": False})
        assert not balancer.forecast().any()
        for step in range(1, 4):
            balancer.step(skewed(transport.rank, step))
        total = sum(skewed(rank, 1) for rank in range(3)).numpy() * 2
        np.testing.assert_array_equal(balancer.forecast(), total)
        renewed = balancer.renewed(transport)
        assert renewed.config is balancer.config
        assert renewed.models == balancer.models
        assert (renewed.state.step, renewed.failure) == (0, None)
        np.testing.assert_array_equal(renewed.state.models["main"].placement, model.placement)

    on_threads(run)


# Groups


def in_a_group(rank, port, folder, how):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    groups = [form_group(dist.PrefixStore(name, store), rank, 3, 20.0) for name in ("one", "two")]
    if how == "registered":
        dist.init_process_group("gloo", store=dist.PrefixStore("default", store), rank=rank, world_size=3)
    first, second = groups
    for group in groups:
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total, group=group)
        assert total.item() == 6.0
    transport = ProcessGroupTransport(second)
    assert transport.gather(bytes([rank]), 5.0) == [b"\0", b"\1", b"\2"]
    start, error = time.monotonic(), None
    if rank == 0:
        time.sleep(0.5)
        break_group(first)
        break_group(first)
    try:
        dist.all_reduce(torch.zeros(1), group=first)
    except Exception as caught:
        error = caught
    # The other group works on.
    heard = transport.gather(bytes([rank]), 5.0) == [b"\0", b"\1", b"\2"]
    seconds = time.monotonic() - start
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(f"{error is not None and is_loss(error)} {heard} {seconds < 5.0} {type(error).__name__}")
    os._exit(0)


@pytest.mark.parametrize("how", ["alone", "registered"])
def test_breaking_a_group_ends_the_waits_of_all_its_ranks_and_of_no_other_group(tmp_path, how):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    jobs = [context.Process(target=in_a_group, args=(rank, server.port, str(tmp_path), how)) for rank in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        job.kill()
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text().startswith("True True True"), (tmp_path / str(rank)).read_text()


def test_groups_of_other_devices_are_refused_and_none_can_be_broken():
    with pytest.raises(EplbError, match="must be 'cpu', or 'cuda'"):
        form_group(dist.HashStore(), 0, 1, 1.0, device="meta")
    break_group(None)
    alone = form_group(dist.HashStore(), 0, 1, 1.0)
    break_group(alone)
    dist.all_reduce(torch.zeros(1), group=alone)


# Which errors are losses


def test_losses_are_told_from_errors_of_the_program():
    losses = [
        TransportError("x"),
        MembersLost("x"),
        TimeoutError("x"),
        RearrangeError((), (0,), lost_ranks=(1,)),
        RearrangeError((), (0,), agreed=False),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("[/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10ms for recv operation"),
        dist.DistBackendError("NCCL error"),
    ]
    others = [
        RearrangeError((), (0,)),
        PlanningError("x"),
        EplbError("x"),
        ValueError("x"),
        Evicted("Connection reset by peer"),
        MembershipError("the store failed: Connection reset by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyboardInterrupt(),
    ]
    assert [error for error in losses if not is_loss(error)] == []
    assert [error for error in others if is_loss(error)] == []
    hidden = ValueError("Process group is not initialized in the world group map")
    hidden.__context__ = losses[0]
    assert is_loss(hidden)
