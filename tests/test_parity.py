"""The greedy policy equals the peers' released code on inputs without ties; skipped where it cannot be fetched."""

import numpy as np
import pytest

from benchmarks import peers
from eplb_core import Topology, derive_maps, rebalance, round_robin


@pytest.fixture(scope="module")
def problems():
    """Two hundred random shapes with loads in which no two experts, and no two of their shares, are equal."""
    rng = np.random.default_rng(20)
    found = []
    while len(found) < 200:
        num_nodes = int(rng.choice([1, 2, 4]))
        ep_size = num_nodes * int(rng.integers(1, 9))
        num_groups = num_nodes * int(rng.integers(1, 4)) + int(rng.random() < 0.2)
        num_logical = num_groups * int(rng.integers(1, 17))
        slots_per_rank = -(-num_logical // ep_size) + int(rng.integers(0, 4))
        topology = Topology(ep_size, slots_per_rank, num_nodes)
        load = np.exp(rng.normal(0, rng.uniform(0.1, 2), (int(rng.integers(1, 6)), num_logical))) * 10_000
        load = load.astype(np.float32).astype(np.float64)  # vLLM rounds the load to float32 before it plans
        if len(np.unique(load)) == load.size:
            found.append((topology, num_groups, load))
    return found


def fetched(function):
    """A peer's function, or a skip that says why there is none."""
    try:
        return function()
    except peers.PeerUnavailable as reason:
        pytest.skip(str(reason))


def test_vllm_with_slot_preservation(problems):
    pytest.importorskip("torch")
    fetched(peers.vllm_policy)
    for topology, num_groups, load in problems:
        previous = round_robin(*load.shape, topology)
        expected = peers.vllm_plan(
            load,
            topology.num_slots,
            topology.ep_size,
            previous=previous,
            num_groups=num_groups,
            num_nodes=topology.num_nodes,
        )
        got = rebalance(load, topology, policy="greedy", num_groups=num_groups, previous=previous)
        np.testing.assert_array_equal(got, expected, err_msg=f"{topology}, {num_groups=}, {load.shape=}")


def test_sglang_which_is_deepseeks_reference(problems):
    torch = pytest.importorskip("torch")
    plan = fetched(peers.sglang_deepseek)
    for topology, num_groups, load in problems:
        hierarchical = num_groups % topology.num_nodes == 0
        expected = plan(
            torch.from_numpy(load),
            topology.num_slots,
            num_groups,
            topology.num_nodes,
            topology.ep_size,
            enable_hierarchical=hierarchical,
        )[0].numpy()
        got = rebalance(load, topology, policy="greedy", num_groups=num_groups)
        np.testing.assert_array_equal(got, expected, err_msg=f"{topology}, {num_groups=}, {load.shape=}")


def test_vllms_maps(problems):
    torch = pytest.importorskip("torch")
    compute = fetched(peers.vllm_compute_logical_maps)
    for topology, num_groups, load in problems[:50]:
        placed = rebalance(load, topology, policy="greedy", num_groups=num_groups)
        placed = np.where(np.random.default_rng(1).random(placed.shape) < 0.1, -1, placed)
        slots, count = compute(torch.from_numpy(placed).long(), load.shape[1])
        maps = derive_maps(placed, load.shape[1])
        np.testing.assert_array_equal(maps.logical_to_physical, slots.numpy())
        np.testing.assert_array_equal(maps.replica_count, count.numpy())
