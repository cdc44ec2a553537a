"""SGLang's own manager, updater and metadata on real processes, with our policies."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import peers
from eplb_core import Topology, derive_maps, round_robin
from eplb_torch.integrations import sglang as plug
from tests.engines import SGLang, fetched, recorded, same_weights, weights_of
from tests.multiprocess import run_ranks


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.sglang_deepseek)


LOADS = [recorded(5, 12, seed) for seed in range(4)]
TOPOLOGY = Topology(4, 4, 2)


def serve(rank, options, engine_options):
    """Real rebalances of SGLang's `EPLBManager` in chunks of two layers. Returns the placements after each."""
    seen = []
    with SGLang(5, 12, TOPOLOGY, rank, **engine_options) as engine, plug.install(**options):
        start = engine.start().physical_to_logical_map.numpy().copy()
        weights = weights_of(start, TOPOLOGY, rank)
        manager = engine.manager(weights)
        manager.on_forward_pass_end()
        for load in LOADS:
            engine.counts = load.to(torch.int32)
            for _ in range(2 + 3):  # two iterations, then one per chunk of layers
                manager.on_forward_pass_end()
                assert same_weights(weights, weights_of(engine.metadata.physical_to_logical_map_cpu, TOPOLOGY, rank))
            metadata = engine.metadata
            placed = metadata.physical_to_logical_map.numpy().copy()
            maps = derive_maps(placed, 12, max_replicas=16)
            np.testing.assert_array_equal(metadata.logical_to_all_physical_map, maps.logical_to_physical)
            table = metadata.logical_to_rank_dispatch_physical_map
            if table is not None:
                assert (np.take_along_axis(placed, table.numpy(), axis=1) == np.arange(12)).all()
            seen.append(placed)
    return np.stack(seen)


@pytest.mark.parametrize(
    ("options", "engine_options"),
    [
        ({}, {}),
        ({"policy": "refined"}, {"dispatch": "static"}),
        ({"max_moves": 1}, {"num_groups": 4, "dispatch": "static"}),
    ],
    ids=str,
)
def test_sglangs_manager_serves_with_our_policy(options, engine_options):
    """Four ranks, four rebalances in a row: weights and metadata agree after every forward pass, on all ranks."""
    ranks = run_ranks(serve, 4, options, engine_options)
    held = round_robin(5, 12, TOPOLOGY)
    groups = engine_options.get("num_groups")
    name = "deepseek_hierarchical" if groups else "deepseek"  # what `auto` means
    for step, load in enumerate(LOADS):
        plan = plug.make_planner(placement=partial(torch.as_tensor, held), **options)
        held = plan(load, 16, 4, groups, 2, SimpleNamespace(name=name))[0]
        for placed in ranks:
            np.testing.assert_array_equal(placed[step], held)
    assert (ranks[0][-1] != round_robin(5, 12, TOPOLOGY)).any()


ELASTIC = Topology(4, 6)


def survive(rank):
    """Rank 3 is dead; the others rebalance without it. Returns what was reloaded and the placement."""
    options = {"alive": [1, 1, 1, 0], "algorithm": "elasticity_aware"}
    with SGLang(3, 12, ELASTIC, rank, **options) as engine, plug.install():
        start = engine.start().physical_to_logical_map.numpy().copy()
        if rank == 3:
            return None
        weights = weights_of(start, ELASTIC, rank)
        manager = engine.manager(weights)
        manager.on_forward_pass_end()
        for seed in range(2):
            engine.counts = recorded(3, 12, seed)
            for _ in range(2 + 2):
                manager.on_forward_pass_end()
            assert same_weights(weights, weights_of(engine.metadata.physical_to_logical_map_cpu, ELASTIC, rank))
        return engine.reloaded, engine.metadata.physical_to_logical_map.numpy(), start


def test_sglangs_manager_survives_the_loss_of_a_rank():
    results = run_ranks(survive, 4, may_die=[3])[:3]
    _, placed, start = results[0]
    assert any(reloaded for reloaded, _, _ in results), "SGLang may have picked the dead rank as a source"
    for _, other, _ in results:
        np.testing.assert_array_equal(other, placed)
    assert (placed[:, 18:] == 0).all()
    assert all(set(row) == set(range(12)) for row in placed[:, :18].tolist())
    assert (placed[:, :18] == start[:, :18]).mean() > 0.3
