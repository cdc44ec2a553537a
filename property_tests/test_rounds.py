"""Rounds: as few as possible, no rank twice on one side, all transfers once."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import plan_moves, schedule_rounds, verify_plan
from eplb_core.rounds import colour_edges
from eplb_core.testing import placement_pairs
from property_tests.skewed import SEEDS, large_pairs


@st.composite
def pair_graphs(draw):
    """A number of ranks and distinct (source, destination) pairs of them."""
    size = draw(st.integers(2, 12))
    ranks = st.integers(0, size - 1)
    edges = draw(st.lists(st.tuples(ranks, ranks), unique=True, min_size=1, max_size=size * size))
    return size, np.asarray(edges)


@given(pair_graphs())
def test_colours_are_as_many_as_the_largest_degree_and_never_meet(graph):
    size, edges = graph
    colour = colour_edges(edges[:, 0], edges[:, 1], size)
    degree = max(max(Counter(side.tolist()).values()) for side in edges.T)
    assert colour.min() >= 0
    assert colour.max() + 1 <= degree
    for side in edges.T:
        assert len(set(zip(side.tolist(), colour.tolist(), strict=True))) == len(edges)


def test_a_complete_graph_is_coloured_as_a_tournament():
    src, dst = np.nonzero(~np.eye(7, dtype=bool))
    assert colour_edges(src, dst, 7).tolist() == ((dst - src) % 7 % 6).tolist()


@given(st.one_of(placement_pairs(empty=True), large_pairs()), st.sampled_from(["direct", "node"]))
def test_rows_are_sorted_by_round_ranks_layer_and_slot(pair, fan_out):
    topology, _, old, new = pair
    schedule = schedule_rounds(plan_moves(old, new, topology, fan_out=fan_out), topology)
    columns = schedule.round, schedule.src_rank, schedule.dst_rank, schedule.layer, schedule.dst_slot
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert rows == sorted(rows)
    assert {column.dtype for column in schedule} == {np.dtype(np.int32), np.dtype(bool)}


@given(st.data(), placement_pairs(empty=True), st.sampled_from(["direct", "node"]))
def test_a_schedule_has_the_fewest_rounds_and_breaks_no_rule(data, pair, fan_out):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    schedule = schedule_rounds(plan, topology)
    assert verify_plan(old, new, plan, topology, schedule) == ()
    fewest = 0
    for relayed in (False, True):
        rows = schedule.relayed == relayed
        pairs = set(zip(schedule.src_rank[rows].tolist(), schedule.dst_rank[rows].tolist(), strict=True))
        partners = Counter(src for src, _ in pairs), Counter(dst for _, dst in pairs)
        fewest += max((max(side.values()) for side in partners if side), default=0)
    assert schedule.num_rounds == fewest


@given(st.data(), placement_pairs(empty=True))
def test_a_group_of_layers_is_scheduled_alone(data, pair):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology)
    layers = data.draw(st.lists(st.integers(0, len(old) - 1), unique=True))
    part = schedule_rounds(plan, topology, layers=layers)
    whole = schedule_rounds(plan, topology)

    def rows(schedule):
        columns = (schedule.layer, schedule.src_slot, schedule.dst_slot)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    assert rows(part) == [row for row in rows(whole) if row[0] in layers]


@given(st.integers(2, 40), st.integers(1, 12), SEEDS)
def test_colours_where_most_edges_do_not_get_their_first_choice(size, degree, seed):
    """The edges of some random permutations, in random order: every vertex has nearly the largest degree."""
    rng = np.random.default_rng(seed)
    edges = np.unique([(v, w) for _ in range(degree) for v, w in enumerate(rng.permutation(size))], axis=0)
    src, dst = rng.permutation(edges).T
    colour = colour_edges(src, dst, size)
    largest = max(np.bincount(src).max(), np.bincount(dst).max())
    assert np.isin(colour, np.arange(largest)).all()
    for side in (src, dst):
        assert len(np.unique(np.stack([side, colour]), axis=1).T) == len(src)


def test_no_edges_have_no_colours():
    nothing = np.zeros(0, dtype=np.int64)
    assert colour_edges(nothing, nothing, 3).tolist() == []
    assert colour_edges(nothing, nothing, 3).dtype == np.int64
