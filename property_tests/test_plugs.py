"""What the plugs for serving engines add to a plan: no empty slots, at no transfer and at the least load."""

from collections import Counter

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from eplb_core import EMPTY, check_placement, moved_experts, rebalance
from eplb_core.testing import loads, model_rank_load, placements, topologies
from eplb_torch.integrations._plan import fill_empty
from eplb_torch.integrations.vllm import make_policy


@st.composite
def problems(draw):
    """A topology, a load, and a placement of its experts with some slots empty."""
    topology = draw(topologies())
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    return topology, load, draw(placements(topology, num_logical, len(load), empty=True))


def by_rank(placement, topology) -> np.ndarray:
    """`[layers * ranks, slots_per_rank]`."""
    return placement.reshape(-1, topology.slots_per_rank)


@given(problems())
def test_filling_changes_no_set_of_experts_unless_a_rank_has_none(problem):
    topology, load, placed = problem
    assume((placed != EMPTY).any(axis=1).all())  # a plan places every expert
    filled = fill_empty(placed, load, topology)
    assert (filled >= 0).all()
    assert (filled[placed != EMPTY] == placed[placed != EMPTY]).all()
    for before, after in zip(by_rank(placed, topology), by_rank(filled, topology), strict=True):
        held = set(before[before != EMPTY].tolist())
        assert set(after.tolist()) == held or not held


@given(problems(), st.data())
def test_one_empty_slot_takes_the_copy_that_adds_least_to_its_rank(problem, data):
    topology, load, placed = problem
    assume((placed != EMPTY).any(axis=1).all())
    placed = fill_empty(placed, load, topology)
    slot = data.draw(st.integers(0, topology.num_slots - 1))
    rank = slot // topology.slots_per_rank
    placed[:, slot] = EMPTY
    for layer, row in enumerate(placed):
        on_rank = row[rank * topology.slots_per_rank : (rank + 1) * topology.slots_per_rank]
        candidates = set(on_rank[on_rank != EMPTY].tolist()) or set(row[row != EMPTY].tolist())
        if not candidates:
            continue
        reached = {}
        for expert in candidates:
            tried = row.copy()
            tried[slot] = expert
            reached[expert] = model_rank_load(tried.tolist(), load[layer].tolist(), topology)[rank]
        [taken] = fill_empty(row[None], load[layer : layer + 1], topology)[:, slot]
        assert reached[taken] <= min(reached.values()) + 1e-9 * (1 + sum(map(int, load[layer])))


@given(problems(), st.sampled_from(["greedy", "refined", "incremental"]))
def test_a_plan_for_an_engine_is_complete_and_keeps_slots(problem, policy):
    topology, load, previous = problem
    placed = make_policy(policy).rebalance_experts(
        torch.from_numpy(np.array(load)).long(),
        topology.num_slots,
        1,
        topology.num_nodes,
        topology.ep_size,
        torch.from_numpy(np.array(previous)).long(),
    )
    check_placement(placed.numpy(), topology, load.shape[1])
    assert (placed >= 0).all()
    for new, old in zip(by_rank(placed.numpy(), topology), by_rank(previous, topology), strict=True):
        could_stay = (Counter(new.tolist()) & Counter(old.tolist())).total()
        assert (new == old).sum() == could_stay
    planned = rebalance(load, topology, policy=policy, previous=previous)
    assert (moved_experts(previous, placed.numpy(), topology) == moved_experts(previous, planned, topology)).all()
    assert (planned == EMPTY).any() or (placed.numpy() == planned).all()
