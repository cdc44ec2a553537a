"""What the refined and the incremental policy promise."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from eplb_core import (
    EMPTY,
    Topology,
    balancedness,
    check_placement,
    derive_maps,
    moved_experts,
    plan_moves,
    preserve_slots,
    rank_load,
    rebalance,
    verify_plan,
)
from eplb_core.policies.budget import share_out
from eplb_core.policies.groups import groups_by_node
from eplb_core.policies.relabel import assign, keep_in_place
from eplb_core.testing import loads, placements, topologies

SEARCHING = st.sampled_from(["refined", "incremental"])


@st.composite
def problems(draw, min_experts: int = 1, **kinds):
    """A topology, a load and a placement in force."""
    topology = draw(topologies())
    num_logical = draw(st.integers(min(min_experts, topology.num_slots), topology.num_slots))
    load = draw(loads(num_logical))
    return topology, load, draw(placements(topology, num_logical, len(load), **kinds))


def doubles(placement, topology) -> np.ndarray:
    """`[layers]` how many slots hold an expert that an earlier slot of their rank holds."""
    ranks = placement.reshape(len(placement), topology.ep_size, -1)
    return np.asarray(
        [sum(len(row[row != EMPTY]) - len(set(row[row != EMPTY].tolist())) for row in layer) for layer in ranks]
    )


@given(problems(empty=True), SEARCHING, st.booleans())
def test_every_expert_is_placed_even_if_it_was_lost(problem, policy, with_previous):
    topology, load, previous = problem
    placed = rebalance(load, topology, policy=policy, previous=previous if with_previous else None)
    assert placed.dtype == np.int32
    check_placement(placed, topology, load.shape[1])


@given(problems(), SEARCHING)
def test_no_useless_copies(problem, policy):
    """No two copies on a rank, hence no more copies than ranks; empty slots only where a rank has everything."""
    topology, load, _ = problem
    placed = rebalance(load, topology, policy=policy)
    assert (doubles(placed, topology) == 0).all()
    assert (derive_maps(placed, load.shape[1]).replica_count <= topology.ep_size).all()
    assert load.shape[1] < topology.slots_per_rank or (placed != EMPTY).all()


@given(problems(empty=True))
def test_incremental_adds_no_second_copy_on_a_rank(problem):
    topology, load, previous = problem
    placed = rebalance(load, topology, previous=previous)
    assert (doubles(placed, topology) <= doubles(previous, topology)).all()


@given(problems())
def test_refined_moves_no_more_than_any_naming_of_the_ranks(problem):
    topology, load, previous = problem
    free = rebalance(load, topology, policy="refined")
    kept = rebalance(load, topology, policy="refined", previous=previous)
    by_rank = (len(load), topology.ep_size, topology.slots_per_rank)
    for layer, (new, old, got) in enumerate(zip(*(x.reshape(by_rank) for x in (free, previous, kept)), strict=True)):
        common = [[len(set(a[a >= 0]) & set(b[b >= 0])) for a in new.tolist() for a in [np.asarray(a)]] for b in old]
        rows, columns = linear_sum_assignment(-np.asarray(common))
        best = np.asarray(common)[rows, columns].sum()
        placed = sum(len(set(row[row >= 0].tolist())) for row in got)
        assert moved_experts(previous, kept, topology)[layer] == placed - best
    assert (
        np.sort(rank_load(kept, load, topology)).round(6).tolist()
        == np.sort(rank_load(free, load, topology)).round(6).tolist()
    )


@given(problems(), st.sampled_from([0.0, 0.1, 0.5]))
def test_layers_within_tolerance_are_not_touched(problem, tolerance):
    topology, load, previous = problem
    placed = rebalance(load, topology, previous=previous, tolerance=tolerance)
    busiest = rank_load(previous, load, topology).max(axis=1)
    within = busiest <= load.sum(axis=1) / topology.ep_size * (1 + tolerance) * (1 - 1e-9)
    within &= doubles(previous, topology) == 0
    assert placed[within].tolist() == previous[within].tolist()


@given(problems(), st.integers(0, 6))
def test_max_moves_is_a_limit_per_layer(problem, max_moves):
    topology, load, previous = problem
    placed = rebalance(load, topology, previous=previous, max_moves=max_moves)
    check_placement(placed, topology, load.shape[1])
    assert (moved_experts(previous, placed, topology) <= max_moves).all()


@given(problems())
def test_without_a_budget_nothing_changes(problem):
    topology, load, previous = problem
    for options in ({"max_moves": 0}, {"max_total_moves": 0}):
        assert rebalance(load, topology, previous=previous, **options).tolist() == previous.tolist()


@given(problems(empty=True), st.sampled_from([None, 0.0, 10.0]))
def test_lost_experts_get_a_copy_whatever_the_budget_and_the_tolerance(problem, tolerance):
    topology, load, previous = problem
    for tokens in (load, load * 0):
        placed = rebalance(tokens, topology, previous=previous, max_moves=0, tolerance=tolerance)
        check_placement(placed, topology, load.shape[1])


@given(problems(), st.integers(0, 12))
def test_max_total_moves_is_a_limit_for_all_layers(problem, max_total_moves):
    topology, load, previous = problem
    placed = rebalance(load, topology, previous=previous, max_total_moves=max_total_moves)
    assert moved_experts(previous, placed, topology).sum() <= max_total_moves
    unlimited = rebalance(load, topology, previous=previous)
    if moved_experts(previous, unlimited, topology).sum() <= max_total_moves:
        assert placed.tolist() == unlimited.tolist()


@given(st.data(), st.integers(1, 6), st.integers(0, 30))
def test_a_budget_goes_to_the_layers_that_gain_most_per_move(data, num_layers, budget):
    numbers = st.lists(st.integers(0, 9), min_size=num_layers, max_size=num_layers)
    moves, gain = np.asarray(data.draw(numbers)), np.asarray(data.draw(numbers), dtype=float)
    granted = share_out(moves, gain, budget)
    assert granted.sum() == min(budget, moves.sum())
    value = gain / np.maximum(moves, 1)
    for a in range(num_layers):
        for b in range(num_layers):
            assert not (value[a] > value[b] and granted[a] < moves[a] and granted[b] > 0)


@given(problems())
def test_a_lighter_busiest_rank_or_no_move(problem):
    """With a tolerance the placement is for this load: a layer that changes gets better, or was invalid."""
    topology, load, previous = problem
    if doubles(previous, topology).any():
        return
    placed = rebalance(load, topology, previous=previous, tolerance=0.0)
    before, after = (np.square(rank_load(p, load, topology)).sum(axis=1) for p in (previous, placed))
    same_counts = (
        derive_maps(previous, load.shape[1]).replica_count == derive_maps(placed, load.shape[1]).replica_count
    ).all(axis=1)
    assert (after[same_counts] <= before[same_counts] * (1 + 1e-9)).all()


@given(problems(), st.sampled_from([1.0, 4.0]))
def test_the_plan_to_get_there_is_sound(problem, cross_node_cost):
    topology, load, previous = problem
    placed = rebalance(load, topology, previous=previous, cross_node_cost=cross_node_cost)
    assert verify_plan(previous, placed, plan_moves(previous, placed, topology), topology) == ()


@given(st.data(), st.sampled_from([Topology(4, 3, num_nodes=2), Topology(6, 2, num_nodes=3)]), SEARCHING)
def test_hierarchical_keeps_all_copies_of_a_group_on_one_node(data, topology, policy):
    num_groups = topology.num_nodes * data.draw(st.integers(1, 2))
    num_logical = num_groups * data.draw(st.integers(1, topology.num_slots // num_groups))
    load = data.draw(loads(num_logical, num_layers=2))
    previous = None
    for _ in range(2):
        options = {"policy": policy, "num_groups": num_groups, "hierarchy": "hierarchical"}
        placed = rebalance(load, topology, previous=previous, **options)
        check_placement(placed, topology, num_logical)
        group = np.where(placed == EMPTY, EMPTY, placed // (num_logical // num_groups))
        node = np.arange(topology.num_slots) // topology.slots_per_node
        for layer in range(2):
            for g in range(num_groups):
                assert len(set(node[group[layer] == g].tolist())) == 1
        load, previous = load + 1, placed


@given(st.data(), topologies())
def test_risk_zero_is_the_sum_and_more_counts_what_varies(data, topology):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    windows = data.draw(loads(num_logical, num_windows=3))
    plain = rebalance(windows, topology, policy="refined")
    assert plain.tolist() == rebalance(windows.sum(axis=0), topology, policy="refined").tolist()
    mean, deviation = windows.mean(axis=0), windows.std(axis=0)
    careful = rebalance(windows, topology, policy="refined", risk=2.0)
    expected = rebalance(3 * (mean + 2 * deviation), topology, policy="refined")
    loads_of = [rank_load(p, mean + 2 * deviation, topology).max(axis=1) for p in (careful, expected)]
    np.testing.assert_allclose(*loads_of, rtol=1e-6, atol=1e-6)


@given(st.data(), st.integers(1, 7))
def test_assign_is_optimal(data, size):
    entries = st.lists(st.integers(0, 5), min_size=size * size, max_size=size * size)
    score = np.asarray([data.draw(entries), data.draw(entries)], dtype=np.int32).reshape(2, size, size)
    for row, chosen in zip(score, assign(score), strict=True):
        assert sorted(chosen.tolist()) == list(range(size))
        assert row[np.arange(size), chosen].sum() == row[linear_sum_assignment(-row)].sum()


@given(problems())
def test_keep_in_place_of_a_permutation_undoes_it(problem):
    topology, _, previous = problem
    by_rank = previous.reshape(len(previous), topology.ep_size, -1)
    shuffled = by_rank[:, ::-1].reshape(previous.shape)
    back = keep_in_place(shuffled, previous, topology.ep_size)
    assert (moved_experts(previous, back, topology) == 0).all()


def test_incremental_moves_little_when_the_load_moves_little():
    """1 % of noise moves 85 % of the slots under greedy."""
    rng = np.random.default_rng(0)
    topology = Topology(32, 9)
    load = np.exp(rng.normal(size=(8, 256))) * 10_000
    first = rebalance(load, topology)
    noisy = load * rng.normal(1, 0.01, load.shape)
    moved = moved_experts(first, rebalance(noisy, topology, previous=first), topology).sum()
    greedy = rebalance(load, topology, policy="greedy")
    moved_by_greedy = moved_experts(
        greedy, rebalance(noisy, topology, policy="greedy", previous=greedy), topology
    ).sum()
    assert moved <= 0.1 * moved_by_greedy
    assert balancedness(first, noisy, topology).mean() > 0.97


def test_groups_change_nodes_only_when_a_node_is_out_of_tolerance():
    """Two nodes of two groups: a few percent above the mean is left alone, a hot pair of groups is separated."""
    topology = Topology(4, 4, num_nodes=2)
    even = np.full((1, 16), 100)
    first = rebalance(even, topology, num_groups=4)
    node_of_group = {g: int(np.flatnonzero(first[0] // 4 == g)[0] // topology.slots_per_node) for g in range(4)}
    together = [g for g in range(4) if node_of_group[g] == node_of_group[0]]

    def nodes_after(factor):
        load = even.copy()
        for g in together:
            load[0, 4 * g : 4 * g + 4] = int(100 * factor)
        placed = rebalance(load, topology, num_groups=4, previous=first)
        return {g: int(np.flatnonzero(placed[0] // 4 == g)[0] // topology.slots_per_node) for g in range(4)}

    assert nodes_after(1.04) == node_of_group
    separated = nodes_after(3.0)
    assert separated[together[0]] != separated[together[1]]
    assert sum(separated[g] != node_of_group[g] for g in range(4)) == 2


@given(st.data(), st.integers(0, 12))
def test_the_limits_hold_when_groups_change_nodes(data, limit):
    topology = Topology(4, 3, num_nodes=2)
    size = data.draw(st.integers(1, 3))
    before, now = (data.draw(loads(4 * size, num_layers=2)) for _ in range(2))
    first = rebalance(before, topology, num_groups=4)
    for option, total in (("max_moves", np.max), ("max_total_moves", np.sum)):
        placed = rebalance(now, topology, num_groups=4, previous=first, **{option: limit})
        check_placement(placed, topology, 4 * size)
        assert total(moved_experts(first, placed, topology)) <= limit


def test_ties_of_gain_go_to_the_lowest_layer():
    moves, gain = np.full(60, 2), np.where(np.arange(60) % 3 == 0, 9.0, 5.0)
    assert np.flatnonzero(share_out(moves, gain, 50)).tolist() == sorted([*range(0, 60, 3), 1, 2, 4, 5, 7])


@given(problems(empty=True), st.sampled_from(["greedy", "refined", "incremental"]))
def test_experts_that_stay_on_a_rank_keep_their_slot(problem, policy):
    topology, load, previous = problem
    placed = rebalance(load, topology, policy=policy, previous=previous)
    assert (placed == previous).sum() == (preserve_slots(placed, previous, topology) == previous).sum()


def test_groups_that_change_nodes_count_against_the_budget_and_others_do_not():
    topology, num_groups = Topology(4, 3, num_nodes=2), 4
    load = np.asarray([[8.0, 8, 4, 4, 1, 1, 1, 1], [3.0, 3, 3, 3, 3, 3, 3, 3]])
    previous = np.asarray([[0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 6, 7]] * 2)
    hosted, spent = groups_by_node(load, previous, topology, num_groups)
    assert [sorted(nodes) for nodes in hosted.reshape(2, 2, 2)[0].tolist()] != [[0, 1], [2, 3]]
    assert spent.tolist() == [4, 0]
    assert spent.dtype == np.int32
    assert hosted[1].tolist() == [0, 1, 2, 3]
    kept, nothing = groups_by_node(load, previous, topology, num_groups, max_moves=np.asarray([3, 3]))
    assert (kept.tolist(), nothing.tolist()) == ([[0, 1, 2, 3]] * 2, [0, 0])
