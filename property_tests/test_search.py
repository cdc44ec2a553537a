"""The steps of the searching policies against plain loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology
from eplb_core.maps import count_replicas
from eplb_core.policies.copies import MARGIN, _drop, exchange_copies, place_copies
from eplb_core.policies.incremental import CAUTION, MEMORY, TOLERANCE, aim, without_doubles
from eplb_core.policies.search import NEAR, NOTHING, swap_copies
from eplb_core.testing import loads, model_rank_load, placements, topologies

PLENTY = np.asarray([2**20])


@st.composite
def rows(draw, **sizes):
    """A topology, loads whose sums are exact, and a placement without two copies of an expert on a rank."""
    topology = draw(topologies(max_nodes=2, **sizes))
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical, num_layers=1)).astype(np.float64) * 5040.0  # divisible by up to ten copies
    held = without_doubles(draw(placements(topology, num_logical, 1)), topology)
    return topology, load, held


def plain_swaps(held, share, topology, target, worth, offset, budget, price):
    """`swap_copies` for one row, from its description."""
    depth, size = topology.slots_per_rank, topology.ep_size
    ranks = [held[r * depth : (r + 1) * depth] for r in range(size)]

    def weight(expert):
        return 0.0 if expert == EMPTY else share[expert]

    total = [sum(weight(e) for e in rank) + extra for rank, extra in zip(ranks, offset, strict=True)]
    used = 0
    for partners in sorted({min(NEAR, size - 1), size - 1} - {0}):
        while True:
            a = max(range(size), key=lambda r: (total[r], -r))
            others = [(a + 1 + i) % size for i in range(size - 1)]
            if partners < size - 1:
                others = sorted(range(size), key=lambda r: (total[r], r))[:partners]
            best, chosen = -np.inf, None
            for i, x in enumerate(ranks[a]):
                for b in others:
                    for j, y in enumerate(ranks[b]):
                        if (x != EMPTY and x in ranks[b]) or (y != EMPTY and y in ranks[a]):
                            continue
                        less = weight(x) - weight(y)
                        cost = price if a // topology.ranks_per_node != b // topology.ranks_per_node else 1.0
                        gain = less * (total[a] - total[b] - less) / cost
                        if gain > best:
                            best, chosen = gain, (i, b, j)
            if total[a] <= target or used + 2 > budget or best <= max(worth, NOTHING * total[a] ** 2) or not chosen:
                break
            i, b, j = chosen
            x, y = ranks[a][i], ranks[b][j]
            ranks[a][i], ranks[b][j] = y, x
            total[a], total[b] = total[a] - (weight(x) - weight(y)), total[b] + (weight(x) - weight(y))
            used += 2
    return [expert for rank in ranks for expert in rank]


@given(
    rows(max_ranks_per_node=6),
    st.sampled_from([0.0, 0.1, None]),
    st.sampled_from([0.0, 1e4]),
    st.sampled_from([0, 3, 2**20]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([0.0, 5040.0]),
)
def test_swaps_are_the_ones_described(problem, slack, worth, budget, price, offset):
    topology, load, held = problem
    share = load / np.maximum(count_replicas(held, load.shape[1]), 1)
    offsets = offset * (np.arange(topology.ep_size) % 3 - 1.0)[None]
    target = load.sum(axis=1) / topology.ep_size * (1 + (slack or 0.0))
    if slack is None:  # the busiest rank is just there
        target = (model_rank_load(held[0].tolist(), load[0].tolist(), topology) + offsets).max(axis=1)
    got = swap_copies(
        held,
        share,
        topology,
        target=target,
        worth=np.asarray([worth]),
        offset=offsets,
        max_moves=np.asarray([budget]),
        cross_node_cost=price,
    )
    expected = plain_swaps(
        held[0].tolist(), share[0].tolist(), topology, target[0], worth, offsets[0].tolist(), budget, price
    )
    assert got[0].tolist() == expected


@given(st.data(), rows(), st.sampled_from([0, 1, 2**20]), st.sampled_from([0.01, 0.3]))
def test_copies_pass_from_who_misses_them_least_to_the_hottest(data, problem, budget, floor):
    topology, load, held = problem
    copies = count_replicas(held, load.shape[1])
    active = np.asarray([True])
    got = exchange_copies(load, copies, topology, floor=floor, max_moves=np.asarray([budget]), active=active)
    weights, counts = load[0].tolist(), copies[0].tolist()
    lightest = min(w / max(c, 1) for w, c in zip(weights, counts, strict=True))
    too_hot = sum(weights) / topology.ep_size * (1 + floor) - lightest * (topology.slots_per_rank - 1)
    spare, used, experts = topology.num_slots - sum(counts), 0, range(len(weights))
    while True:

        def share(e):
            if counts[e] == 0:
                return np.inf
            return weights[e] / counts[e] if counts[e] < topology.ep_size else -1.0

        def after(e):
            return weights[e] / (counts[e] - 1) if counts[e] > 1 else np.inf

        gains, loses = max(experts, key=lambda e: (share(e), -e)), min(experts, key=lambda e: (after(e), e))
        factor = 1 + floor if share(gains) > too_hot else 1 + MARGIN
        worth_it = share(gains) >= 0 and (spare > 0 or share(gains) > factor * after(loses))
        if not worth_it or (counts[gains] > 0 and used >= budget):
            break
        used += counts[gains] > 0
        counts[gains] += 1
        counts[loses] -= spare == 0
        spare -= spare > 0
    assert got[0].tolist() == counts


@given(st.data(), rows())
def test_surplus_copies_leave_the_busiest_ranks(data, problem):
    topology, load, held = problem
    copies = count_replicas(held, load.shape[1])
    fewer = np.asarray([[data.draw(st.integers(min(c, 1), c)) for c in copies[0].tolist()]], dtype=np.int32)
    share = load / np.maximum(fewer, 1)
    got = _drop(held, share, fewer, topology)
    assert count_replicas(got, load.shape[1]).tolist() == fewer.tolist()
    rank = np.arange(topology.num_slots) // topology.slots_per_rank
    total = [sum(share[0, e] for e in held[0, rank == r] if e != EMPTY) for r in range(topology.ep_size)]
    for expert in range(load.shape[1]):
        slots = np.flatnonzero(held[0] == expert)
        kept = slots[got[0, slots] == expert]
        gone = slots[got[0, slots] == EMPTY]
        assert len(kept) + len(gone) == len(slots)
        assert all(total[rank[a]] >= total[rank[b]] * (1 - 1e-12) for a in gone for b in kept)


@given(rows())
def test_placing_copies_changes_only_what_must_change(problem):
    topology, load, held = problem
    copies = count_replicas(held, load.shape[1])
    wanted = exchange_copies(load, copies, topology, floor=0.01, max_moves=PLENTY, active=np.asarray([True]))
    placed, added = place_copies(held, load, wanted, topology, max_moves=PLENTY, active=np.asarray([True]))
    assert (without_doubles(placed, topology) == placed).all()
    before, after = held[0].tolist(), placed[0].tolist()
    for slot, (was, now) in enumerate(zip(before, after, strict=True)):
        if was != now and was != EMPTY:
            assert wanted[0, was] < copies[0, was], slot
    assert added[0] >= sum(was != now and now != EMPTY for was, now in zip(before, after, strict=True))
    kept = count_replicas(placed, load.shape[1])[0]
    assert (kept[wanted[0] >= copies[0]] >= copies[0][wanted[0] >= copies[0]]).all()


@given(rows())
def test_an_idle_row_is_left_alone(problem):
    topology, load, held = problem
    copies, idle = count_replicas(held, load.shape[1]), np.asarray([False])
    assert (
        exchange_copies(load, copies, topology, floor=0.01, max_moves=PLENTY, active=idle).tolist() == copies.tolist()
    )
    placed, added = place_copies(held, load, copies, topology, max_moves=PLENTY, active=idle)
    assert placed.tolist() == held.tolist()
    assert added.tolist() == [0]


@given(rows())
def test_the_aim_is_what_the_documentation_says(problem):
    topology, load, held = problem
    copies = count_replicas(held, load.shape[1])
    goal = aim(load, held, copies, topology, None)
    ranks = np.asarray(model_rank_load(held[0].tolist(), load[0].tolist(), topology))
    each = np.asarray([load[0, e] / held[0].tolist().count(e) if e >= 0 else 0.0 for e in held[0].tolist()])
    mean, depth, slots = load[0].sum() / topology.ep_size, topology.slots_per_rank, topology.num_slots
    by_chance = each.var() * depth * (slots - depth) / max(slots - 1, 1)
    unknown = min(ranks.var() / by_chance, 1.0) if by_chance > 0 else 1.0
    slack = max(TOLERANCE, CAUTION * np.sqrt(ranks.var() * (1 - unknown)) / mean if mean else 0.0)
    bound = max(mean, load[0].max() / min(topology.ep_size, slots - load.shape[1] + 1))
    np.testing.assert_allclose(goal.slack, [slack], rtol=1e-6)
    np.testing.assert_allclose(goal.target, [bound * (1 + slack)], rtol=1e-6)
    transient = MEMORY * np.sqrt(unknown) * (1 - np.sqrt(unknown))
    np.testing.assert_allclose(goal.offset[0], -transient * (ranks - ranks.mean()), rtol=1e-5, atol=1e-6 * (mean + 1))
    fixed = aim(load, held, copies, topology, 0.25)
    np.testing.assert_allclose(fixed.target, [bound * 1.25])
    assert (fixed.offset == 0).all()


def test_a_topology_of_one_rank_has_nothing_to_swap():
    held = np.asarray([[0, 1, 2]])
    zeros = np.zeros(1)
    got = swap_copies(
        held, np.ones((1, 3)), Topology(1, 3), target=zeros, worth=zeros, offset=zeros[None], max_moves=PLENTY
    )
    assert got.tolist() == held.tolist()


def test_only_swaps_between_nodes_cost_more():
    """A swap on the node gains 9, one with the other node 16, at twice the price."""
    held, share = np.arange(8)[None], np.asarray([[6.0, 4, 1, 3, 2, 0, 4.5, 4.5]])
    zeros = np.zeros(1)
    options = {"target": zeros, "worth": zeros, "offset": np.zeros((1, 4)), "max_moves": np.asarray([2])}
    dear = swap_copies(held, share, Topology(4, 2, num_nodes=2), cross_node_cost=2.0, **options)
    assert dear.tolist() == [[3, 1, 2, 0, 4, 5, 6, 7]]
    cheap = swap_copies(held, share, Topology(4, 2, num_nodes=2), cross_node_cost=1.5, **options)
    assert cheap.tolist() == [[4, 1, 2, 3, 0, 5, 6, 7]]
