"""Layers do not look at each other: what comes out for many is what comes out for each alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import (
    Topology,
    balancedness,
    derive_maps,
    elastic,
    load_bound,
    moved_experts,
    plan_moves,
    preserve_slots,
    rank_load,
    rebalance,
    verify_plan,
)
from eplb_core.testing import read_only
from property_tests.skewed import SEEDS, large_pairs

PAIRS = large_pairs()


def assert_layer_by_layer(transform, *arrays) -> None:
    """`transform` of all layers together is the stack of what it makes of one layer at a time."""
    whole = transform(*arrays)
    for layer in range(len(arrays[0])):
        alone = transform(*(x[layer : layer + 1] for x in arrays))
        np.testing.assert_array_equal(whole[layer : layer + 1], alone)


@st.composite
def loaded_pairs(draw):
    """Two placements and a load whose layers differ in size and in skew, by orders of magnitude."""
    topology, num_logical, old, new = draw(PAIRS)
    rng = np.random.default_rng(draw(SEEDS))
    size = 10.0 ** rng.integers(0, 6, (len(old), 1))
    skew = rng.random((len(old), num_logical)) ** rng.integers(0, 6, (len(old), 1))
    return topology, read_only(np.floor(size * skew).astype(np.int64)), old, new


@given(loaded_pairs())
def test_metrics_and_maps(drawn):
    topology, load, old, new = drawn
    num_logical, most = load.shape[1], topology.num_slots
    assert_layer_by_layer(lambda x: load_bound(x, topology), load)
    for metric in (rank_load, balancedness):
        assert_layer_by_layer(lambda placed, x, metric=metric: metric(placed, x, topology), new, load)
    for count in (moved_experts, preserve_slots):
        assert_layer_by_layer(lambda a, b, count=count: count(a, b, topology), old, new)
    assert_layer_by_layer(lambda x: derive_maps(x, num_logical, max_replicas=most).logical_to_physical, new)


@given(loaded_pairs(), st.sampled_from(["greedy", "refined", "incremental"]), st.none() | st.integers(0, 9))
def test_policies(drawn, policy, max_moves):
    topology, load, old, _ = drawn
    groups = topology.num_nodes if load.shape[1] % topology.num_nodes == 0 else 1
    spread = {"spread": "node", "hierarchy": "global"} if topology.num_nodes > 1 else {}
    for options in ({}, {"num_groups": groups}, spread):

        def place(load, old, options=options):
            return rebalance(load, topology, policy=policy, previous=old, max_moves=max_moves, **options)

        assert_layer_by_layer(place, load, old)


@given(st.data(), loaded_pairs())
def test_losses(data, drawn):
    topology, load, old, _ = drawn
    if topology.ep_size == 1:
        topology = Topology(topology.slots_per_rank * 2, 1)
        old = np.concatenate([old, old], axis=1)
    dead = data.draw(st.lists(st.integers(0, topology.ep_size - 1), unique=True, max_size=topology.ep_size - 1))

    def lose(old, load):
        return elastic.lose_ranks(old, load, topology, dead, max_extra_moves=0).placement

    assert_layer_by_layer(lose, old, load)


@pytest.mark.parametrize("fan_out", ["direct", "node"])
@given(pair=PAIRS)
def test_the_verifier(fan_out, pair):
    """A fault is reported with its layer, whatever the other layers are like."""
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    source = np.roll(plan.source_slot, 1, axis=1)
    relay = plan.relay_slot

    def verify(layers):
        part = plan._replace(source_slot=source[layers], relay_slot=None if relay is None else relay[layers])
        return verify_plan(old[layers], new[layers], part, topology)

    together = [found._replace(layer=0) for found in verify(slice(None))]
    alone = [found for layer in range(len(old)) for found in verify(slice(layer, layer + 1))]
    assert together == alone
