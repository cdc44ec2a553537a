"""Any history of loads, dummy batches, failures, drains and step times keeps weights, maps and ranks together."""

import threading
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import Topology, derive_maps, round_robin
from eplb_torch import DeviceMaps, ExpertBalancer, ExpertWeights, InProcessWorld, LiveModel, RearrangeError
from eplb_torch.in_process import InProcessTransport
from tests.expert_rows import expert_layers, wrong_rows

STEPS = 40


class History(NamedTuple):
    """What happens to one group.

    topology, layers, logical: sizes.
    config: of the balancer.
    seed: of the loads.
    failures: exchanges, counted over all of a rank's, that fail on that rank: `(rank, number)`.
    drains: steps after which all ranks drain.
    pause: seconds of a forward.
    """

    topology: Topology
    layers: int
    logical: int
    config: dict
    seed: int
    failures: frozenset
    drains: frozenset
    pause: float


@st.composite
def histories(draw) -> History:
    topology = Topology(draw(st.integers(1, 3)), draw(st.integers(2, 3)))
    config = {
        "step_interval": draw(st.integers(1, 9)),
        "window_size": draw(st.integers(1, 9)),
        "use_async": draw(st.booleans()),
        "policy": draw(st.sampled_from(["greedy", "incremental"])),
        "max_staging_bytes": draw(st.sampled_from([1, 600, 10**6])),
        "timeout": 5.0,
    }
    ranks = st.integers(0, topology.ep_size - 1)
    return History(
        topology,
        draw(st.integers(1, 3)),
        draw(st.integers(1, topology.num_slots)),
        config,
        draw(st.integers(0, 2**16)),
        draw(st.frozensets(st.tuples(ranks, st.integers(0, 6)), max_size=2)),
        draw(st.frozensets(st.integers(0, STEPS), max_size=2)),
        draw(st.sampled_from([0.0, 0.001])),
    )


class Failing(InProcessTransport):
    """Raises at the end of some exchanges: peers have their rows, and need not time out."""

    failures: frozenset = frozenset()
    count = -1

    def exchange(self, sends, recvs, timeout):
        super().exchange(sends, recvs, timeout)
        self.count += 1
        if (self.rank, self.count) in self.failures:
            raise OSError("told to")


def serve(transport, history: History, barrier: threading.Barrier):
    """One rank; its placement after every step."""
    rank, topology = transport.rank, history.topology
    placement = round_robin(history.layers, history.logical, topology)
    weights = ExpertWeights(expert_layers(placement, topology, rank))
    model = LiveModel(weights, DeviceMaps(placement, history.logical), topology, placement)
    balancer = ExpertBalancer(model, transport, history.config)
    rng = np.random.default_rng([history.seed, rank])
    seen = []
    for step in range(STEPS):
        barrier.wait(30.0)
        time.sleep(history.pause)
        hot = np.random.default_rng([history.seed, step // 8]).integers(1, 200, (history.layers, history.logical))
        load = torch.from_numpy(rng.poisson(hot)) if rng.random() < 0.7 else None
        try:
            balancer.step(load)
            if step in history.drains:
                balancer.drain()
                assert not balancer.in_flight
        except RearrangeError:
            pass  # the next decision starts from what has been committed
        check(model, balancer, rank)
        seen.append(model.placement.tolist())
    with suppress(RearrangeError):
        balancer.close()
    check(model, balancer, rank)
    return seen, model.placement.tolist(), balancer.failure


def check(model: LiveModel, balancer: ExpertBalancer, rank: int) -> None:
    """Weights, maps and the controller are in one placement."""
    assert wrong_rows(list(model.weights.layers), model.placement, model.topology, rank) == []
    maps = derive_maps(model.placement, model.num_logical, max_replicas=model.maps.max_replicas)
    np.testing.assert_array_equal(model.maps.logical_to_physical, maps.logical_to_physical)
    np.testing.assert_array_equal(model.maps.replica_count, maps.replica_count)
    np.testing.assert_array_equal(balancer.state.models["main"].placement, model.placement)


@settings(max_examples=40)
@given(histories())
def test_ranks_serve_by_one_placement_at_every_step(history):
    world = InProcessWorld(history.topology.ep_size)
    barrier = threading.Barrier(world.size)

    def run(transport):
        own = Failing(world, transport.rank)
        own.failures = history.failures
        try:
            return serve(own, history, barrier)
        except BaseException:
            barrier.abort()
            raise

    results = world.run(run, timeout=60.0)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    assert all(result[2] is None for result in results)
    assert all(result[:2] == results[0][:2] for result in results)
