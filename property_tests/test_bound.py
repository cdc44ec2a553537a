"""No placement beats the lower bound, by brute force on small cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import EplbError, Topology, load_bound, rank_load, rebalance
from eplb_core.testing import loads, topologies

SMALL = st.sampled_from(
    [Topology(2, 2), Topology(2, 3), Topology(3, 2), Topology(4, 1), Topology(1, 3), Topology(5, 1)]
)


def best_by_brute_force(load: list[int], topology: Topology) -> float:
    """The busiest rank's load of the best of all placements, with two copies on a rank allowed."""
    best = float("inf")
    rank_contents = list(itertools.combinations_with_replacement(range(len(load)), topology.slots_per_rank))
    for ranks in itertools.combinations_with_replacement(rank_contents, topology.ep_size):
        slots = [expert for rank in ranks for expert in rank]
        copies = [slots.count(expert) for expert in range(len(load))]
        if min(copies) == 0:
            continue
        best = min(best, max(sum(load[e] / copies[e] for e in rank) for rank in ranks))
    return best


@given(st.data(), SMALL)
@settings(max_examples=60)
def test_no_placement_beats_the_bound(data, topology):
    num_logical = data.draw(st.integers(1, min(topology.num_slots, 4)))
    load = data.draw(loads(num_logical, num_layers=1))
    bound = load_bound(load, topology)[0]
    assert bound <= best_by_brute_force(load[0].tolist(), topology) * (1 + 1e-9)


@given(st.data(), topologies())
def test_the_bound_is_at_least_the_mean_and_below_every_policy(data, topology):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    load = data.draw(loads(num_logical))
    bound = load_bound(load, topology)
    assert (bound >= load.sum(axis=1) / topology.ep_size * (1 - 1e-9)).all()
    for policy in ("greedy", "refined"):
        busiest = rank_load(rebalance(load, topology, policy=policy), load, topology).max(axis=1)
        assert (bound <= busiest * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("load", "topology", "bound"),
    [
        ([90, 10, 10, 10], Topology(4, 1), 90),  # no slot left for a second copy
        ([90, 10, 10, 10], Topology(3, 2), 40),  # the mean
        ([100, 100, 100, 1, 1, 1], Topology(2, 3), 200),  # two of three hot experts share a rank
        ([0, 0, 0], Topology(2, 2), 0),
    ],
)
def test_known_bounds(load, topology, bound):
    assert load_bound(np.asarray([load]), topology) == pytest.approx([bound])


@given(st.data(), topologies())
def test_windows_are_bounded_one_by_one(data, topology):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    windows = data.draw(loads(num_logical, num_windows=3))
    assert load_bound(windows, topology).tolist() == [load_bound(load, topology).tolist() for load in windows]


def test_there_is_no_bound_where_experts_do_not_fit():
    assert load_bound(np.ones((5, 1)), Topology(2, 2)).tolist() == [0.5] * 5
    for shape in ((1, 5), (2, 1, 5)):
        with pytest.raises(EplbError, match="num_logical=5"):
            load_bound(np.ones(shape), Topology(2, 2))
