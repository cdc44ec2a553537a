"""What `rebalance(spread="node")` promises."""

from functools import partial

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology, check_placement, derive_maps, moved_experts, rebalance
from eplb_core.policies.spread import spread_copies
from eplb_core.testing import loads, placements, topologies
from tests.devices import enable_x64

POLICIES = st.sampled_from(["greedy", "refined", "incremental"])


@st.composite
def problems(draw, **kinds):
    """A topology of two nodes or more, a load and a placement in force."""
    topology = draw(topologies(max_nodes=4).filter(lambda t: t.num_nodes > 1))
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    return topology, load, draw(placements(topology, num_logical, len(load), **kinds))


def on_one_node(placement, topology: Topology) -> list[tuple[int, int]]:
    """(layer, expert) with two copies or more, all on the same node."""
    found = []
    for layer, row in enumerate(placement.tolist()):
        for expert in set(row) - {EMPTY}:
            slots = [slot for slot, held in enumerate(row) if held == expert]
            if len(slots) > 1 and len({slot // topology.slots_per_node for slot in slots}) == 1:
                found.append((layer, expert))
    return found


def doubles(placement, topology: Topology) -> int:
    """Slots with an expert that an earlier slot of their rank holds."""
    ranks = [[e for e in rank.tolist() if e != EMPTY] for rank in placement.reshape(-1, topology.slots_per_rank)]
    return sum(len(rank) - len(set(rank)) for rank in ranks)


@given(problems(empty=True), POLICIES, st.booleans())
def test_replicated_experts_are_on_two_nodes(problem, policy, with_previous):
    topology, load, held = problem
    placed = rebalance(load, topology, policy=policy, previous=held if with_previous else None, spread="node")
    check_placement(placed, topology, load.shape[1])
    assert on_one_node(placed, topology) == []


@given(problems(), st.booleans())
def test_any_placement_can_be_spread(problem, empty):
    """Nothing but the copies of an expert on one node is wrong with it, and nothing else becomes wrong."""
    topology, load, held = problem
    plenty = np.full(len(held), 2**30, dtype=np.int32)
    spread = spread_copies(held, load.astype(float), topology, max_moves=plenty)
    check_placement(spread, topology, load.shape[1])
    assert on_one_node(spread, topology) == []
    assert doubles(spread, topology) <= doubles(held, topology)
    for layer in set(range(len(held))) - {layer for layer, _ in on_one_node(held, topology)}:
        assert spread[layer].tolist() == held[layer].tolist()


def test_a_copy_more_where_no_exchange_helps():
    """All that node 1 holds is on the ranks of expert 0 already: it gets a third copy instead of an exchange."""
    topology = Topology(4, 4, num_nodes=2)
    held = np.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 2, 1, 2, 3, 3]], dtype=np.int32)
    load = np.asarray([[9.0, 1.0, 1.0, 1.0]])
    spread = spread_copies(held, load, topology, max_moves=np.asarray([1], dtype=np.int32))
    assert on_one_node(held, topology) == [(0, 0)]
    assert on_one_node(spread, topology) == []
    assert derive_maps(spread, 4).replica_count[0, 0] == 3
    assert moved_experts(held, spread, topology).tolist() == [1]


def test_what_the_copy_replaces_stays_on_two_nodes():
    """Expert 1 has copies to spare on node 1; expert 2, though lighter, would be left with node 0 alone."""
    topology = Topology(4, 3, num_nodes=2)
    held = np.asarray([[0, 1, 2, 0, 2, 3, 2, 1, 1, 1, 1, 1]], dtype=np.int32)
    load = np.asarray([[10.0, 6.0, 0.0, 0.0]])
    spread = spread_copies(held, load, topology, max_moves=np.asarray([9], dtype=np.int32))
    assert spread.tolist() == [[0, 1, 2, 0, 2, 3, 2, 0, 1, 1, 1, 1]]


def test_an_exchange_takes_the_partner_that_burdens_least():
    """Expert 0 (5 per copy) leaves the busier of its ranks; of 6, 1, 5 and 3 tokens on node 1, 5 changes nothing."""
    topology = Topology(4, 2, num_nodes=2)
    held = np.asarray([[0, 1, 0, 2, 3, 4, 5, 6]], dtype=np.int32)
    load = np.asarray([[10.0, 3.0, 2.0, 6.0, 1.0, 5.0, 3.0]])
    spread = spread_copies(held, load, topology, max_moves=np.asarray([2], dtype=np.int32))
    assert spread.tolist() == [[5, 1, 0, 2, 3, 4, 0, 6]]


@given(problems(), st.integers(0, 6))
def test_limits_of_moves_come_first(problem, limit):
    topology, load, held = problem
    for option, total in (("max_moves", np.max), ("max_total_moves", np.sum)):
        placed = rebalance(load, topology, previous=held, spread="node", **{option: limit})
        check_placement(placed, topology, load.shape[1])
        assert total(moved_experts(held, placed, topology)) <= limit


@given(problems(), POLICIES)
def test_none_is_the_default(problem, policy):
    topology, load, held = problem
    plain = rebalance(load, topology, policy=policy, previous=held)
    assert rebalance(load, topology, policy=policy, previous=held, spread=None).tolist() == plain.tolist()


@given(problems())
def test_what_is_spread_and_within_tolerance_is_not_touched(problem):
    topology, load, held = problem
    first = rebalance(load, topology, policy="refined", previous=held, spread="node")
    again = rebalance(load, topology, previous=first, spread="node", tolerance=1e6)
    assert again.tolist() == first.tolist()


@pytest.mark.parametrize("policy", ["greedy", "refined", "incremental"])
def test_jit_gives_numpys_integers(policy):
    topology, num_logical = Topology(6, 3, num_nodes=3), 7
    place = partial(rebalance, topology=topology, policy=policy, spread="node")
    rng = np.random.default_rng(5)
    with enable_x64(True):
        traced = jax.jit(lambda load, held: place(load, previous=held))
        for turn in range(25):
            load = rng.integers(0, 4, (2, num_logical)) if turn % 2 else rng.poisson(1000, (2, num_logical))
            spare = rng.integers(0, num_logical, (2, topology.num_slots - num_logical))
            experts = np.broadcast_to(np.arange(num_logical), (2, num_logical))
            held = rng.permuted(np.concatenate([experts, spare], axis=1), axis=1).astype(np.int32)
            got = traced(jnp.asarray(load), jnp.asarray(held))
            expected = place(load, previous=held)
            assert got.dtype == expected.dtype == np.int32
            assert np.asarray(got).tolist() == expected.tolist()


@given(problems(empty=True), POLICIES)
@settings(max_examples=20)
def test_on_a_strict_library(problem, policy):
    topology, load, held = problem
    load_s, held_s = (array_api_strict.asarray(x.copy()) for x in (load, held))
    placed = rebalance(load_s, topology, policy=policy, previous=held_s, spread="node")
    assert (
        np.asarray(placed).tolist() == rebalance(load, topology, policy=policy, previous=held, spread="node").tolist()
    )
