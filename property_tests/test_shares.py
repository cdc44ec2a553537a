import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from eplb_core import EMPTY, Topology, derive_maps
from eplb_core.shares import RESOLUTION, balanced_shares, check_shares, even_shares, slot_load
from eplb_core.shares.locality import local_shares
from eplb_core.shares.split import split_load
from eplb_core.shares.turns import derive_turns
from eplb_core.testing import loads, placements, read_only, topologies


@st.composite
def cases(draw, empty=True):
    """A topology, a placement in which experts may be lost, and a load."""
    topology = draw(topologies(max_ranks_per_node=3, max_nodes=2))
    num_logical = draw(st.integers(1, topology.num_slots))
    placement = draw(placements(topology, num_logical, empty=empty and draw(st.booleans())))
    return topology, placement, draw(loads(num_logical, len(placement)))


@st.composite
def shares_of(draw, placement):
    """Read-only shares of a placement: zeros among them, but some copy of every expert has one."""
    shares = np.zeros(placement.shape, dtype=np.int32)
    for layer, slots in enumerate(placement):
        for expert in set(slots.tolist()) - {EMPTY}:
            copies = np.flatnonzero(slots == expert)
            values = st.lists(st.integers(0, 9), min_size=len(copies), max_size=len(copies))
            shares[layer, copies] = draw(values.filter(any))
    return read_only(shares)


def on_ranks(tokens, topology: Topology):
    return tokens.reshape(len(tokens), topology.ep_size, topology.slots_per_rank).sum(axis=2)


def least_busiest(slots, load, topology: Topology) -> float:
    """The linear program: the busiest rank's load, minimised over all divisions of every expert's load."""
    experts = [expert for expert in range(len(load)) if expert in slots]
    if not experts:
        return 0.0
    belongs = np.asarray([[*(slots == expert), 0] for expert in experts], dtype=float)
    ranks = np.arange(topology.num_slots) // topology.slots_per_rank
    over = np.asarray([[*((ranks == rank) & (slots != EMPTY)), -1] for rank in range(topology.ep_size)], dtype=float)
    goal = np.eye(topology.num_slots + 1)[-1]
    scale = max(load.max(), 1)
    result = linprog(goal, over, np.zeros(topology.ep_size), belongs, load[experts] / scale)
    return result.fun * scale


@given(cases())
def test_no_division_gives_the_busiest_rank_less(case):
    topology, placement, load = case
    busiest = on_ranks(split_load(placement, load, topology), topology).max(axis=1)
    for layer, slots in enumerate(placement):
        least = least_busiest(slots, load[layer], topology)
        assert busiest[layer] == pytest.approx(least, rel=1e-6, abs=1e-6 * load[layer].sum())


@given(cases())
def test_nor_any_other_rank_as_tokens_go_where_least_is(case):
    """The condition of optimality: all that an expert's copies take is on ranks that no other copy's rank is below."""
    topology, placement, load = case
    tokens = split_load(placement, load, topology)
    on_rank = np.repeat(on_ranks(tokens, topology), topology.slots_per_rank, axis=1)
    for layer, slots in enumerate(placement):
        small = 1e-9 * max(load[layer].sum(), 1)
        for slot in np.flatnonzero(tokens[layer] > small):
            assert on_rank[layer, slot] <= on_rank[layer, slots == slots[slot]].min() + small


@given(cases())
def test_all_load_is_split_and_copies_on_one_rank_are_alike(case):
    topology, placement, load = case
    tokens = split_load(placement, load, topology)
    assert (tokens >= 0).all()
    assert (tokens[placement == EMPTY] == 0).all()
    for layer, slots in enumerate(placement):
        for expert in set(slots.tolist()) - {EMPTY}:
            copies = np.flatnonzero(slots == expert)
            assert tokens[layer, copies].sum() == pytest.approx(load[layer, expert], rel=1e-9, abs=1e-3)
            for rank in set((copies // topology.slots_per_rank).tolist()):
                here = tokens[layer, copies[copies // topology.slots_per_rank == rank]]
                assert np.ptp(here) == 0


@given(cases(), st.integers(24, 90))
def test_balanced_shares_are_never_worse_than_even_and_close_to_the_best(case, resolution):
    topology, placement, load = case
    shares = balanced_shares(placement, load, topology, resolution=resolution)
    check_shares(placement, shares, load.shape[1])
    even = on_ranks(slot_load(placement, load, even_shares(placement)), topology).max(axis=1)
    balanced = slot_load(placement, load, shares)
    best = split_load(placement, load, topology)
    assert (on_ranks(balanced, topology).max(axis=1) <= even * (1 + 1e-9)).all()
    for layer, slots in enumerate(placement):
        if (shares[layer] == even_shares(slots)).all():
            continue
        for expert in set(slots.tolist()) - {EMPTY}:
            copies = slots == expert
            assert shares[layer, copies].sum() <= resolution
            off = np.abs(balanced[layer, copies] - best[layer, copies]).max()
            assert off <= load[layer, expert] / resolution + 1e-6


@given(cases(), st.data())
def test_windows_are_added_up(case, data):
    topology, placement, load = case
    other = data.draw(loads(load.shape[1], len(load)))
    windows = read_only(np.stack([load, other]))
    together = balanced_shares(placement, load + other, topology)
    np.testing.assert_array_equal(balanced_shares(placement, windows, topology), together)


def all_local(placement, topology, num_logical, **options):
    """`[ranks, layers, slots]` the part of its tokens for the slot's expert that each rank sends to the slot."""
    ones = np.ones((len(placement), num_logical))
    return np.stack(
        [
            slot_load(placement, ones, local_shares(placement, topology, rank, num_logical, **options))
            for rank in range(topology.ep_size)
        ]
    )


@given(cases(), st.data(), st.sampled_from([0.0, 0.0, 0.3, 2.0]))
def test_local_shares_meet_the_shares_together_within_slack(case, data, slack):
    topology, placement, load = case
    shares = data.draw(shares_of(placement))
    due = slot_load(placement, np.ones(load.shape), shares)
    got = all_local(placement, topology, load.shape[1], shares=shares, slack=slack).mean(axis=0)
    assert (
        on_ranks(got, topology) <= on_ranks(due, topology) * (1 + slack) + topology.slots_per_rank / RESOLUTION
    ).all()
    if slack == 0:
        assert np.abs(got - due).max() <= 1 / RESOLUTION


@given(cases(), st.data())
def test_no_way_to_meet_the_shares_keeps_more_tokens_near(case, data):
    topology, placement, load = case
    shares = data.draw(shares_of(placement))
    due = slot_load(placement, np.ones(load.shape), shares)
    sent = all_local(placement, topology, load.shape[1], shares=shares) / topology.ep_size
    slot_rank = np.arange(topology.num_slots) // topology.slots_per_rank
    # One group of ranks keeps what it sends and what it is due, whichever is less.
    for size in (1, topology.ranks_per_node):
        for layer, slots in enumerate(placement):
            for expert in set(slots.tolist()) - {EMPTY}:
                copies = np.flatnonzero(slots == expert)
                kept = most = 0.0
                for group in range(topology.ep_size // size):
                    here = copies[slot_rank[copies] // size == group]
                    kept += sent[group * size : (group + 1) * size, layer, here].sum()
                    most += min(size / topology.ep_size, due[layer, here].sum())
                assert kept == pytest.approx(most, abs=len(copies) / RESOLUTION)


@given(cases(), st.data())
def test_with_much_slack_every_token_goes_to_a_nearest_copy(case, data):
    topology, placement, load = case
    shares = data.draw(shares_of(placement))
    sent = all_local(placement, topology, load.shape[1], shares=shares, slack=RESOLUTION)
    slot_rank = np.arange(topology.num_slots) // topology.slots_per_rank
    for rank in range(topology.ep_size):
        distance = (slot_rank != rank) * 1 + (slot_rank // topology.ranks_per_node != rank // topology.ranks_per_node)
        for layer, slots in enumerate(placement):
            for slot in np.flatnonzero(sent[rank, layer] > 0):
                open_copies = (slots == slots[slot]) & (shares[layer] > 0)
                assert distance[slot] == distance[open_copies].min()


@given(cases(), st.data())
def test_after_every_turn_each_copy_has_its_share_rounded_up_or_down(case, data):
    _, placement, load = case
    shares = data.draw(shares_of(placement))
    maps = derive_turns(placement, shares, load.shape[1], max_turns=99)
    for layer, slots in enumerate(placement):
        for expert in range(load.shape[1]):
            copies = np.flatnonzero(slots == expert)
            total = int(maps.replica_count[layer, expert])
            assert total == shares[layer, copies].sum()
            turns = maps.logical_to_physical[layer, expert].tolist()
            assert turns[total:] == [EMPTY] * (99 - total)
            for turn in range(total + 1):
                for slot in copies:
                    exact, given_ = shares[layer, slot] * turn / total, turns[:turn].count(slot)
                    assert np.floor(exact) <= given_ <= np.ceil(exact)


@given(cases())
def test_turns_of_even_shares_are_the_maps(case):
    _, placement, load = case
    turns, maps = derive_turns(placement, even_shares(placement), load.shape[1]), derive_maps(placement, load.shape[1])
    for ours, theirs in zip(turns, maps, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
