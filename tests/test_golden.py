"""Published and hand-made cases whose answers are written down."""

import numpy as np
import pytest

from eplb_core import (
    EMPTY,
    Topology,
    balancedness,
    derive_maps,
    model_balancedness,
    plan_moves,
    rebalance,
    round_robin,
    schedule_rounds,
    verify_plan,
)


def test_deepseeks_published_example():
    """Two layers, 12 experts in 4 groups, 16 slots on 2 nodes of 4 ranks: the example of DeepSeek's README."""
    load = np.asarray(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    placed = rebalance(load, Topology(ep_size=8, slots_per_rank=2, num_nodes=2), policy="greedy", num_groups=4)
    assert placed.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@pytest.mark.parametrize("topology", [Topology(1, 7), Topology(3, 4), Topology(7, 1)])
def test_no_load_at_all(topology):
    """Ties go to the lowest index: expert 0 takes every further copy, and every layer counts as balanced."""
    load = np.zeros((2, 7), dtype=np.int64)
    placed = rebalance(load, topology, policy="greedy")
    copies = derive_maps(placed, 7).replica_count
    assert copies.tolist() == [[topology.num_slots - 6, 1, 1, 1, 1, 1, 1]] * 2
    assert balancedness(placed, load, topology).tolist() == [1.0, 1.0]
    assert float(model_balancedness(placed, load, topology)) == 1.0


def test_one_rank_holds_everything():
    topology = Topology(1, 5)
    placed = rebalance(np.asarray([[5, 1, 3]]), topology, policy="greedy")
    assert sorted(placed[0].tolist()) == [0, 0, 1, 2, 2]
    assert balancedness(placed, np.asarray([[5, 1, 3]]), topology).tolist() == [1.0]


def test_no_redundancy_only_packs():
    placed = rebalance(np.asarray([[8, 7, 2, 1]]), Topology(2, 2), policy="greedy")
    assert placed.tolist() == [[0, 3, 1, 2]]


def test_one_very_hot_expert_takes_all_spare_slots():
    load = np.asarray([[10**12, 1, 1, 1]])
    placed = rebalance(load, Topology(4, 2), policy="greedy")
    assert derive_maps(placed, 4).replica_count.tolist() == [[5, 1, 1, 1]]


def test_layers_with_unequal_totals_do_not_influence_each_other():
    load = np.asarray([[8, 7, 2, 1], [0, 0, 0, 0], [800, 700, 200, 100]])
    placed = rebalance(load, Topology(2, 2), policy="greedy")
    assert placed[0].tolist() == placed[2].tolist()


def test_a_plan_with_every_kind_of_source():
    """Node 0 is ranks 0 and 1, node 1 is ranks 2 and 3, two slots each."""
    topology = Topology(4, 2, num_nodes=2)
    old = np.asarray([[0, 1, 2, 3, 4, 5, 0, 6]])
    #                 stays, from own rank; near rank 0, none; near rank 3 not far rank 0, across; own rank, own rank
    new = np.asarray([[0, 0, 1, EMPTY, 0, 2, 6, 0]])
    plan = plan_moves(old, new, topology)
    assert plan.source_slot.tolist() == [[0, 0, 1, EMPTY, 6, 2, 7, 6]]
    schedule = schedule_rounds(plan, topology)
    pairs = zip(schedule.src_rank.tolist(), schedule.dst_rank.tolist(), schedule.round.tolist(), strict=True)
    assert sorted(pairs) == [(0, 1, 0), (1, 2, 1), (3, 2, 0)] or schedule.num_rounds == 2


def test_fan_out_over_nodes_pulls_once_and_passes_on():
    topology = Topology(4, 1, num_nodes=2)
    old, new = np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 1, 0, 0]])
    assert plan_moves(old, new, topology).relay_slot is None
    plan = plan_moves(old, new, topology, fan_out="node")
    assert plan.source_slot.tolist() == [[0, 1, 0, 0]]
    assert plan.relay_slot.tolist() == [[EMPTY, EMPTY, EMPTY, 2]]
    schedule = schedule_rounds(plan, topology)
    assert schedule.src_slot.tolist() == [0, 2]
    assert schedule.dst_slot.tolist() == [2, 3]
    assert schedule.round.tolist() == [0, 1]
    assert schedule.relayed.tolist() == [False, True]
    too_early = schedule._replace(round=np.asarray([0, 0], dtype=np.int32))
    assert "overwrite" in {found.kind for found in verify_plan(old, new, plan, topology, too_early)}


def test_hundreds_of_ranks():
    topology = Topology(ep_size=512, slots_per_rank=2, num_nodes=64)
    rng = np.random.default_rng(0)
    old = round_robin(3, 900, topology)
    load = rng.integers(1, 10**6, (3, 900))
    new = rebalance(load, topology, policy="greedy", previous=old)
    plan = plan_moves(old, new, topology)
    assert (np.take_along_axis(old, plan.source_slot, axis=1) == new).all()
    assert balancedness(new, load, topology).mean() > balancedness(old, load, topology).mean()


def test_an_unchanged_placement_moves_nothing():
    topology = Topology(3, 2)
    old = round_robin(2, 5, topology)
    plan = plan_moves(old, old, topology)
    assert plan.source_slot.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert schedule_rounds(plan, topology).num_rounds == 0
