"""Rearrangement while ranks serve in lock-step: real processes on Gloo, and threads where a case must be exact."""

import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import Topology, plan_moves
from eplb_torch import (
    ExpertWeights,
    InProcessWorld,
    ProcessGroupTransport,
    RearrangeError,
    Rearrangement,
)
from tests.expert_rows import expert_layers, wrong_rows
from tests.multiprocess import run_ranks
from tests.test_execute import random_placement

TOPOLOGY = Topology(ep_size=3, slots_per_rank=5)
LAYERS, LOGICAL = 6, 11


def start(transport, **options):
    """A rearrangement between two random placements, its weights and the placements."""
    rng = np.random.default_rng(5)
    topology = Topology(transport.size, TOPOLOGY.slots_per_rank)
    old, new = (random_placement(rng, LAYERS, min(LOGICAL, topology.num_slots), topology) for _ in range(2))
    weights = ExpertWeights(expert_layers(old, topology, transport.rank))
    options = {"timeout": 10.0, "max_staging_bytes": 6 * weights.row_bytes(0)} | options
    moving = Rearrangement(weights, plan_moves(old, new, topology), topology, transport, **options)
    return moving, weights, topology, old, new


def serve(rank: int, mode: str):
    """Serve in lock-step; return the boundary of each commit and what was wrong, at any boundary."""
    model = dist.new_group([0, 1, 2])
    moving, weights, topology, old, new = start(ProcessGroupTransport(), lead=0.0 if mode == "short lead" else 0.05)
    commits, wrong, idle = [], [], []
    for boundary in range(1, 3000):
        # The forward: no rank ends it before all have begun it.
        dist.all_reduce(torch.zeros(1), group=model)
        if mode == "uneven" and boundary % 7 == rank:
            time.sleep(0.003)
        begin = time.perf_counter()
        layers = moving.step()
        if layers:
            commits.append((boundary, layers))
            wrong += wrong_rows(list(weights.layers), moving.placement(old, new), topology, rank)
        elif not moving.waited_seconds:
            idle.append(time.perf_counter() - begin)
        done = torch.tensor([moving.done])
        dist.all_reduce(done, dist.ReduceOp.MIN, group=model)
        if done:
            break
        if mode == "wait" and boundary == 3:
            moving.wait()
            break
    wrong += wrong_rows(list(weights.layers), new, topology, rank)
    return commits, wrong, sorted(idle)[len(idle) // 2], moving.waited_seconds, moving.committed_layers


def serve_all(rank: int):
    return {mode: serve(rank, mode) for mode in ("plain", "uneven", "short lead", "wait")}


def test_all_ranks_switch_each_layer_at_the_same_boundary():
    results = run_ranks(serve_all, 3, timeout=120)
    for mode in results[0]:
        commits, wrong, idle, _, layers = zip(*(result[mode] for result in results), strict=True)
        assert wrong == ([], [], []), mode
        assert commits[0] == commits[1] == commits[2], mode
        assert set(layers) == {tuple(range(LAYERS))}
        # A flag is looked at: far below what any message takes. Bounded loosely, for machines under load.
        assert max(idle) < 1e-3
    assert len(results[0]["plain"][0]) >= 3


def on_threads(function, size=3):
    results = InProcessWorld(size).run(function)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def step_until_done(moving, limit=10.0):
    deadline = time.monotonic() + limit
    while not moving.done:
        assert time.monotonic() < deadline
        moving.step()
        time.sleep(0.001)


def test_a_worker_failure_surfaces_at_a_step_and_weights_are_whole():
    def run(transport):
        if transport.rank == 1:
            transport.exchange = fail
        moving, weights, topology, old, new = start(transport, timeout=2.0)
        with pytest.raises(RearrangeError, match="voted against") as caught:
            step_until_done(moving)
        assert moving.done
        assert moving.step() == ()
        assert caught.value.lost_ranks == ()
        return wrong_rows(list(weights.layers), caught.value.placement(old, new), topology, transport.rank)

    def fail(*_):
        raise MemoryError("told to")

    assert on_threads(run) == [[], [], []]


def test_abort_by_one_rank_stops_all_with_whole_layers():
    def run(transport):
        moving, weights, topology, old, new = start(transport, lead=0.2)
        if transport.rank == 2:
            moving.abort()
        with pytest.raises(RearrangeError) as caught:
            step_until_done(moving)
        wrong = wrong_rows(list(weights.layers), caught.value.placement(old, new), topology, transport.rank)
        return caught.value.committed_layers, wrong

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    assert results[0][1] == []


def test_drain_ends_the_worker_and_leaves_a_placement_to_serve():
    def run(transport):
        moving, weights, topology, old, new = start(transport)
        layers = moving.drain()
        assert moving.done
        assert not any(t.name == "eplb-rearrangement" and t is moving._worker for t in threading.enumerate())
        return layers, wrong_rows(list(weights.layers), moving.placement(old, new), topology, transport.rank)

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    assert results[0][1] == []


def test_a_lost_rank_ends_the_rearrangement_of_the_others():
    def run(transport):
        moving, weights, topology, old, new = start(transport, timeout=1.0)
        if transport.rank == 0:
            transport.world.kill(0)
        with pytest.raises(RearrangeError) as caught:
            step_until_done(moving)
        if transport.rank:
            assert caught.value.lost_ranks == (0,)
            assert caught.value.agreed
        wrong = wrong_rows(list(weights.layers), caught.value.placement(old, new), topology, transport.rank)
        return caught.value.committed_layers, wrong

    results = on_threads(run)
    assert results[1] == results[2]
    assert [wrong for _, wrong in results] == [[], [], []]


def test_boundaries_hold_when_messages_are_slower_than_steps():
    """Every first choice of a boundary is too early; ranks refuse it, or wait, but never part."""
    barrier = threading.Barrier(3, timeout=10)

    def run(transport):
        gather = transport.gather

        def slow(payload, timeout):
            time.sleep(0.004 * (1 + transport.rank))
            return gather(payload, timeout)

        transport.gather = slow
        moving, weights, topology, old, new = start(transport, lead=0.0, timeout=5.0)
        commits = []
        for boundary in range(2000):
            barrier.wait()
            time.sleep(0.0003)
            if layers := moving.step():
                commits.append((boundary, layers))
            assert wrong_rows(list(weights.layers), moving.placement(old, new), topology, transport.rank) == []
            done[transport.rank] = moving.done
            barrier.wait()
            if all(done):
                break
        return commits, moving.committed_layers

    done = [False] * 3
    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    assert results[0][1] == tuple(range(LAYERS))


def test_weights_are_untouched_between_boundaries():
    """Whatever the worker does meanwhile, only `step` writes."""

    def run(transport):
        moving, weights, topology, old, new = start(transport)
        for _ in range(300):
            held = moving.placement(old, new)
            time.sleep(0.001)
            assert wrong_rows(list(weights.layers), held, topology, transport.rank) == []
            moving.step()
            if moving.done:
                break
        moving.wait()

    on_threads(run)


def test_derived_tensors_are_refreshed_at_the_commit():
    def run(transport):
        moving, weights, topology, old, new = start(transport)
        derived = [layer["up.weight"].double().sum((1, 2)) for layer in weights.layers]

        def refresh(layer, slots):
            for slot in slots:
                derived[layer][slot] = weights.layers[layer]["up.weight"][slot].double().sum()

        weights.add_refresh(refresh)
        moving.wait()
        for layer, sums in zip(weights.layers, derived, strict=True):
            assert torch.equal(layer["up.weight"].double().sum((1, 2)), sums)

    on_threads(run)


@pytest.mark.parametrize("moment", ["before the offer", "after the vote"])
def test_a_veto_while_a_boundary_is_chosen_stops_all_ranks_together(moment):
    def run(transport):
        moving, weights, topology, old, new = start(transport, timeout=4.0)
        offer, vote = moving._offer, moving._transaction.vote

        def offer_and(boundary, prepared):
            if transport.rank == 0 and moment == "before the offer":
                moving.abort()
            if transport.rank == 1 and moment == "after the vote":
                return RuntimeError("passed, it says")
            return offer(boundary, prepared)

        def vote_and(*args):
            verdict = vote(*args)
            if transport.rank == 0 and moment == "after the vote":
                moving.abort()
            return verdict

        moving._offer, moving._transaction.vote = offer_and, vote_and
        begun = time.monotonic()
        with pytest.raises(RearrangeError) as caught:
            step_until_done(moving)
        assert time.monotonic() - begun < 4.0
        return caught.value.lost_ranks, caught.value.agreed

    assert on_threads(run) == [((), True)] * 3
