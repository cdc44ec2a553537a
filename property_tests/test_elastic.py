"""What lose_ranks, shrink and grow promise."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology, apply_moves, check_placement, plan_moves, rank_load, rebalance, verify_plan
from eplb_core.elastic import grow, lose_ranks, shrink
from eplb_core.elastic.lighten import lighten
from eplb_core.elastic.rehost import rehost
from eplb_core.testing import loads, model_moved, model_rank_load, placements, topologies

LEAVE = pytest.mark.parametrize("leave", [lose_ranks, shrink])


@st.composite
def departures(draw, *, empty: bool = False, **sizes):
    """A topology, a load, a placement, and ranks that go: at least one, not all."""
    topology = draw(topologies(**sizes).filter(lambda t: t.ep_size > 1))
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    held = draw(placements(topology, num_logical, len(load), empty=empty))
    ranks = st.integers(0, topology.ep_size - 1)
    gone = draw(st.lists(ranks, unique=True, min_size=1, max_size=topology.ep_size - 1))
    return topology, load, held, gone


@st.composite
def growths(draw, *, empty: bool = False):
    """A topology, a load, a placement, a topology that is no smaller, and the ranks of it that join."""
    topology = draw(topologies(max_nodes=2))
    after = Topology(topology.ep_size + draw(st.integers(0, 3)), topology.slots_per_rank + draw(st.integers(0, 1)))
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    held = draw(placements(topology, num_logical, len(load), empty=empty))
    joins = draw(st.permutations(range(after.ep_size)))[: after.ep_size - topology.ep_size]
    return topology, load, held, after, joins


def kept_by_layer(held, topology: Topology, gone) -> list[list[int]]:
    """What each layer still holds, slot after slot of the ranks that stay."""
    depth = topology.slots_per_rank
    slots = [slot for slot in range(topology.num_slots) if slot // depth not in gone]
    return [[int(row[slot]) for slot in slots] for row in held]


def fewest_tokens(load, present, num_slots: int) -> set[int]:
    """The experts that get no slot: fewest tokens; among equals those without a copy, then the highest ids."""
    order = sorted(range(len(load)), key=lambda e: (-load[e], e not in present, e))
    return set(order[num_slots:])


@LEAVE
@given(departures(empty=True))
def test_every_expert_is_hosted_or_named_and_none_is_in_vain(leave, problem):
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone)
    named = set(plan.unhosted)
    for layer, kept in enumerate(kept_by_layer(held, topology, gone)):
        missing = fewest_tokens(load[layer].tolist(), kept, plan.topology.num_slots)
        assert {e for lay, e in named if lay == layer} == missing
        assert set(plan.placement[layer].tolist()) - {EMPTY} == set(range(load.shape[1])) - missing
    assert plan.complete == (load.shape[1] <= plan.topology.num_slots) == (not named)
    assert plan.placement.dtype == np.int32
    assert plan.unhosted == tuple(sorted(named))


@LEAVE
@given(departures(empty=True))
def test_the_fewest_slots_that_would_do(leave, problem):
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone)
    fewest = plan.min_slots_per_rank
    assert plan.topology.ep_size * (fewest - 1) < load.shape[1] <= plan.topology.ep_size * fewest
    again = leave(held, load, topology, gone, slots_per_rank=max(fewest, topology.slots_per_rank))
    assert again.complete
    check_placement(again.placement, again.topology, load.shape[1])


@LEAVE
@given(departures(empty=True))
def test_only_orphans_take_slots(leave, problem):
    """Without extra moves a slot keeps its expert, or takes one without a copy; each such expert takes one slot."""
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone, max_extra_moves=0)
    for layer, kept in enumerate(kept_by_layer(held, topology, gone)):
        taken = [(old, new) for old, new in zip(kept, plan.placement[layer].tolist(), strict=True) if old != new]
        orphans = set(range(load.shape[1])) - set(kept) - {e for lay, e in plan.unhosted if lay == layer}
        assert sorted(new for _, new in taken if new != EMPTY) == sorted(orphans)
        assert all((layer, old) in plan.unhosted for old, new in taken if new == EMPTY)
        free = kept.count(EMPTY)
        assert sum(old == EMPTY for old, _ in taken) == min(free, len(orphans))


@LEAVE
@given(departures(empty=True), st.integers(0, 5))
def test_extra_moves_are_limited(leave, problem, extra):
    topology, load, held, gone = problem
    least = leave(held, load, topology, gone, max_extra_moves=0)
    more = leave(held, load, topology, gone, max_extra_moves=extra, tolerance=0.0)
    assert least.num_moves <= more.num_moves <= least.num_moves + extra
    assert leave(held, load, topology, gone, tolerance=0.0).num_moves <= int(least.num_moves * 1.1)
    busiest = [rank_load(plan.placement, load, plan.topology).max(axis=1) for plan in (least, more)]
    assert (busiest[1] <= busiest[0] * (1 + 1e-6)).all()


def all_placements(num_slots: int, num_logical: int):
    return product(range(EMPTY, num_logical), repeat=num_slots)


TINY = {"max_ranks_per_node": 3, "max_nodes": 1, "max_slots_per_rank": 2}


@LEAVE
@given(departures(empty=True, **TINY))
def test_no_placement_needs_fewer_moves(leave, problem):
    """By brute force over all placements of the same experts, with ranks moving among the survivors."""
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone, max_extra_moves=0)
    total = 0
    for layer, kept in enumerate(kept_by_layer(held, topology, gone)):
        hosted = set(range(load.shape[1])) - {e for lay, e in plan.unhosted if lay == layer}
        total += min(
            len(model_moved(kept, new, plan.topology))
            for new in all_placements(plan.topology.num_slots, load.shape[1])
            if set(new) - {EMPTY} == hosted
        )
    assert plan.num_moves == total


@given(departures(**TINY))
def test_one_orphan_goes_where_the_busiest_rank_is_lightest(problem):
    """By brute force over all slots that it may take."""
    topology, load, held, gone = problem
    plan = lose_ranks(held, load, topology, gone, max_extra_moves=0)
    for layer, kept in enumerate(kept_by_layer(held, topology, gone)):
        orphans = set(range(load.shape[1])) - set(kept)
        if len(orphans) != 1 or not plan.complete:
            continue
        options = [kept[:i] + [*orphans] + kept[i + 1 :] for i, e in enumerate(kept) if kept.count(e) > 1]
        best = min(max(model_rank_load(option, load[layer].tolist(), plan.topology)) for option in options)
        got = max(model_rank_load(plan.placement[layer].tolist(), load[layer].tolist(), plan.topology))
        assert got == pytest.approx(best)


@LEAVE
@given(departures(empty=True))
def test_ranks_are_renumbered_without_gaps(leave, problem):
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone)
    assert plan.new_rank.dtype == np.int32
    stay = [rank for rank in range(topology.ep_size) if rank not in gone]
    assert [stay[new] for new in plan.new_rank if new != EMPTY] == stay
    assert [rank for rank, new in enumerate(plan.new_rank) if new == EMPTY] == sorted(gone)
    left = [
        sum(rank not in gone for rank in node) for node in np.arange(topology.ep_size).reshape(topology.num_nodes, -1)
    ]
    left = [count for count in left if count]
    assert plan.topology.ep_size == len(stay)
    assert plan.topology.num_nodes == (len(left) if len(set(left)) == 1 else 1)


@LEAVE
@given(departures(empty=True), st.integers(0, 2))
def test_old_and_new_say_what_the_group_holds(leave, problem, more):
    topology, load, held, gone = problem
    depth = topology.slots_per_rank + more
    plan = leave(held, load, topology, gone, slots_per_rank=depth)
    assert plan.group == (
        plan.topology if leave is lose_ranks else Topology(topology.ep_size, depth, topology.num_nodes)
    )
    old, new = (x.reshape(len(held), plan.group.ep_size, depth) for x in (plan.old, plan.new))
    placed = plan.placement.reshape(len(held), plan.topology.ep_size, depth)
    for rank, before in enumerate(held.reshape(len(held), topology.ep_size, -1).swapaxes(0, 1)):
        padded = np.pad(before, ((0, 0), (0, more)), constant_values=EMPTY).tolist()
        there = int(plan.new_rank[rank])
        if leave is shrink:
            assert old[:, rank].tolist() == padded
            expected = placed[:, there] if there != EMPTY else np.full_like(old[:, rank], EMPTY)
            assert new[:, rank].tolist() == expected.tolist()
        elif there != EMPTY:
            assert old[:, there].tolist() == padded
            assert new[:, there].tolist() == placed[:, there].tolist()


@LEAVE
@given(departures(empty=True), st.sampled_from(["direct", "node"]))
def test_moves_are_sound_and_the_rest_is_named_for_reload(leave, problem, fan_out):
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone, max_extra_moves=3)
    moves = plan.moves(fan_out=fan_out)
    assert verify_plan(plan.old, plan.new, moves, plan.group, allow_lost=True) == ()
    held_by_group = [set(row) for row in plan.old.tolist()]
    expected = [
        [layer, slot, expert]
        for layer, row in enumerate(plan.new.tolist())
        for slot, expert in enumerate(row)
        if expert != EMPTY and expert not in held_by_group[layer]
    ]
    assert plan.reload_slots().tolist() == expected
    assert plan.reload == tuple(sorted({(layer, expert) for layer, _, expert in expected}))
    result = apply_moves(plan.old, moves)
    for layer, slot, expert in expected:
        result[layer, slot] = expert
    assert result.tolist() == plan.new.tolist()
    assert len(plan.problems()) == bool(plan.reload) + bool(plan.unhosted)


@given(departures())
def test_who_can_be_drained_is_not_reloaded(problem):
    """And a shrunk group ends as one that lost the same ranks: only the sources differ."""
    topology, load, held, gone = problem
    drained, lost = (leave(held, load, topology, gone) for leave in (shrink, lose_ranks))
    assert drained.reload == ()
    assert drained.placement.tolist() == lost.placement.tolist()
    assert drained.num_moves == lost.num_moves
    plan_moves(drained.old, drained.new, drained.group)


@given(departures(empty=True))
def test_same_input_same_plan_in_whatever_order_ranks_are_named(problem):
    topology, load, held, gone = problem
    plan = lose_ranks(held, load, topology, gone)
    again = lose_ranks(held.astype(np.int64), load.astype(float), topology, np.asarray(gone[::-1]))
    assert plan.placement.tolist() == again.placement.tolist()
    assert plan[6:] == again[6:]


@given(departures(), st.data())
def test_windows_count_by_their_sum(problem, data):
    topology, load, held, gone = problem
    windows = data.draw(loads(load.shape[1], len(load), num_windows=3))
    expected = lose_ranks(held, windows.sum(axis=0), topology, gone)
    assert lose_ranks(held, windows, topology, gone).placement.tolist() == expected.placement.tolist()


@LEAVE
@given(departures(empty=True), st.integers(0, 5))
def test_what_stays_on_a_rank_stays_in_its_slot(leave, problem, extra):
    """Unless a rank holds an expert twice, nothing is copied within a rank."""
    topology, load, held, gone = problem
    plan = leave(held, load, topology, gone, max_extra_moves=extra, tolerance=0.0)
    rank = np.arange(plan.group.num_slots) // plan.group.slots_per_rank
    for source, old in zip(plan.moves().source_slot, plan.old, strict=True):
        for slot in np.flatnonzero(source != EMPTY):
            mine = old[rank == rank[slot]].tolist()
            if rank[source[slot]] == rank[slot] and mine.count(old[source[slot]]) == 1:
                assert source[slot] == slot


@given(growths(empty=True), st.integers(0, 4))
def test_grown_groups_host_everything_and_stay_within_the_limit(problem, extra):
    topology, load, held, after, joins = problem
    plan = grow(held, load, topology, after, joining_ranks=joins, max_extra_moves=0)
    check_placement(plan.placement, after, load.shape[1])
    old = plan.old.reshape(len(held), after.ep_size, -1)
    stay = [rank for rank in range(after.ep_size) if rank not in joins]
    assert plan.new_rank.tolist() == stay
    assert old[:, stay, : topology.slots_per_rank].tolist() == held.reshape(len(held), topology.ep_size, -1).tolist()
    assert (old[:, joins] == EMPTY).all()
    assert (old[:, :, topology.slots_per_rank :] == EMPTY).all()
    assert (plan.group, plan.topology, plan.new.tolist()) == (after, after, plan.placement.tolist())
    changed = plan.new != plan.old
    for layer, row in enumerate(plan.old.tolist()):
        orphans = set(range(load.shape[1])) - set(row)
        displaced = changed[layer] & (plan.old[layer] != EMPTY)
        assert set(plan.new[layer][displaced].tolist()) <= orphans
        assert not displaced.any() or displaced.sum() == len(orphans) - row.count(EMPTY)
    must = plan.num_moves
    assert must <= changed.sum()
    wider = grow(held, load, topology, after, joining_ranks=joins, max_extra_moves=extra, tolerance=0.0)
    assert wider.num_moves <= must + extra


@given(growths())
def test_growth_raises_no_rank_above_the_busiest(problem):
    topology, load, held, after, joins = problem
    plan = grow(held, load, topology, after, joining_ranks=joins)
    old, new = (rank_load(x, load, after).max(axis=1) for x in (plan.old, plan.new))
    assert (new <= old * (1 + 1e-6)).all()
    assert doubles(plan.new.reshape(len(held), after.ep_size, -1)[:, joins]) == 0


@given(growths())
def test_a_slot_stays_free_only_where_every_expert_would_raise_the_busiest_rank(problem):
    """Or is on its rank already."""
    topology, load, held, after, joins = problem
    old = grow(held, load, topology, after, joining_ranks=joins).old.reshape(len(held), after.ep_size, -1)
    fill = np.isin(np.arange(after.ep_size), joins)
    for tokens, kept in zip(load, old, strict=True):
        row = rehost(kept, tokens.astype(float), fill).ravel().tolist()
        busiest = max(model_rank_load(row, tokens.tolist(), after))
        for rank in joins:
            mine = row[rank * after.slots_per_rank : (rank + 1) * after.slots_per_rank]
            if EMPTY in mine:
                slot = rank * after.slots_per_rank + mine.index(EMPTY)
                for expert in set(range(len(tokens))) - set(mine):
                    more = [*row[:slot], expert, *row[slot + 1 :]]
                    assert max(model_rank_load(more, tokens.tolist(), after)) > busiest


@given(growths())
def test_one_new_slot_lowers_the_busiest_rank_most(problem):
    """By brute force over all experts."""
    _, load, _, _, _ = problem
    depth = 1
    num_logical = load.shape[1]
    before, after = Topology(num_logical, depth), Topology(num_logical + 1, depth)
    held = np.tile(np.arange(num_logical, dtype=np.int32), (len(load), 1))
    plan = grow(held, load, before, after, max_extra_moves=0)
    for tokens, row in zip(load.tolist(), plan.placement.tolist(), strict=True):
        options = [[*range(num_logical), expert] for expert in range(num_logical)]
        best = min(max(model_rank_load(option, tokens, after)) for option in options)
        assert max(model_rank_load(row, tokens, after)) == pytest.approx(best)


@given(departures())
def test_ranks_that_come_back_take_their_old_numbers(problem):
    topology, load, held, gone = problem
    lost = lose_ranks(held, load, topology, gone)
    back = grow(lost.placement, load, lost.topology, topology, joining_ranks=gone)
    assert [int(back.new_rank[new]) for new in lost.new_rank if new != EMPTY] == [
        rank for rank in range(topology.ep_size) if rank not in gone
    ]
    check_placement(back.placement, topology, load.shape[1])


@given(st.data())
def test_no_expert_is_forgotten_over_a_history_of_changes(data):
    """Lose, drain, grow and rebalance in any order; what is unhosted comes back as soon as there is room."""
    topology, load, held, _ = data.draw(departures())
    num_logical = load.shape[1]
    for step in data.draw(st.lists(st.sampled_from(["lose", "shrink", "grow", "rebalance"]), max_size=4)):
        some = st.lists(st.integers(0, topology.ep_size - 1), unique=True, max_size=topology.ep_size - 1)
        if step in ("lose", "shrink"):
            plan = {"lose": lose_ranks, "shrink": shrink}[step](held, load, topology, data.draw(some))
        elif step == "grow":
            after = Topology(topology.ep_size + data.draw(st.integers(0, 2)), topology.slots_per_rank)
            plan = grow(held, load, topology, after)
        else:
            if num_logical <= topology.num_slots:
                held = rebalance(load, topology, previous=held)
                check_placement(held, topology, num_logical)
            continue
        held, topology = plan.placement, plan.topology
        check_placement(held, topology, num_logical, allow_lost=not plan.complete)
        assert plan.complete == (num_logical <= topology.num_slots)


@st.composite
def beginnings(draw):
    """A topology, a load, and a placement of every expert beside one that may hold others."""
    topology = draw(topologies())
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    shape = (len(load), topology.ep_size, -1)
    held, home = (draw(placements(topology, num_logical, len(load), empty=empty)) for empty in (False, True))
    home = draw(st.sampled_from([held, home]))
    return topology, load, held.reshape(shape), home.reshape(shape)


def received(home, placed, topology: Topology) -> int:
    return sum(
        len(model_moved(a.ravel().tolist(), b.ravel().tolist(), topology)) for a, b in zip(home, placed, strict=True)
    )


def doubles(placed) -> int:
    ranks = [[e for e in rank if e != EMPTY] for rank in placed.reshape(-1, placed.shape[2]).tolist()]
    return sum(len(rank) - len(set(rank)) for rank in ranks)


@given(beginnings(), st.integers(0, 6))
def test_lighten_spends_no_more_than_allowed_and_never_burdens_the_busiest(problem, max_moves):
    topology, load, held, home = problem
    placed = lighten(held, home, load.astype(float), max_moves=max_moves, tolerance=0.0)
    check_placement(placed.reshape(len(load), -1), topology, load.shape[1])
    assert received(home, placed, topology) <= received(home, held, topology) + max_moves
    assert doubles(placed) <= doubles(held)
    for tokens, before, after in zip(load.tolist(), held, placed, strict=True):
        old, new = (max(model_rank_load(x.ravel().tolist(), tokens, topology)) for x in (before, after))
        assert new < old or before.tolist() == after.tolist()


@given(beginnings())
def test_lighten_leaves_no_free_change_of_the_busiest_rank_that_helps(problem):
    """By brute force over its swaps with other ranks and further copies of its experts."""
    topology, load, held, home = problem
    placed = lighten(held, home, load.astype(float), max_moves=0, tolerance=0.0)
    cost = received(home, placed, topology)
    for layer, tokens in enumerate(load.tolist()):
        row = placed[layer].ravel().tolist()
        ranks = model_rank_load(row, tokens, topology)
        for other in single_changes(row, ranks.index(max(ranks)), topology.slots_per_rank):
            rows = placed.reshape(len(load), -1).copy()
            rows[layer] = other
            if received(home, rows.reshape(placed.shape), topology) <= cost:
                assert max(model_rank_load(other, tokens, topology)) >= max(ranks) * (1 - 1e-6)


def single_changes(row: list[int], rank: int, depth: int):
    """Swaps of what a rank holds, and copies of it elsewhere, that put no expert on a rank which holds it already."""

    def lacks(slot: int, expert: int) -> bool:
        first = slot // depth * depth
        return expert == EMPTY or expert not in row[first : first + depth]

    for a, b in product(range(rank * depth, rank * depth + depth), range(len(row))):
        if row[a] != EMPTY and lacks(b, row[a]):
            if lacks(a, row[b]):
                swapped = list(row)
                swapped[a], swapped[b] = row[b], row[a]
                yield swapped
            if row[b] == EMPTY or row.count(row[b]) > 1:
                yield [*row[:b], row[a], *row[b + 1 :]]


@given(beginnings(), st.sampled_from([0.0, 0.3, 2.0]))
def test_lighten_leaves_layers_within_tolerance_alone(problem, tolerance):
    topology, load, held, home = problem
    placed = lighten(held, home, load.astype(float), max_moves=50, tolerance=tolerance)
    ranks = rank_load(held.reshape(len(load), -1), load, topology)
    within = ranks.max(axis=1) <= ranks.mean(axis=1) * (1 + tolerance) * (1 - 1e-9)
    assert placed[within].tolist() == held[within].tolist()
