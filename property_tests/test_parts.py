"""Parts of a plan: complete, in an order in which no expert is missing in between, and within the memory limit."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, MovePlan, apply_moves, plan_moves
from eplb_core.testing import placement_pairs
from eplb_torch import ExpertWeights
from eplb_torch.transaction.parts import plan_parts


def parts_of(pair, fan_out, rows):
    topology, _, old, new = pair
    weights = ExpertWeights([{"w": torch.zeros(topology.slots_per_rank, 4)} for _ in old])
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    return plan, plan_parts(weights, plan, topology, rows * weights.row_bytes(0))


PAIRS = st.one_of(placement_pairs(empty=True), placement_pairs(similar=True), placement_pairs())


@given(PAIRS, st.sampled_from(["direct", "node"]), st.sampled_from([1, 2, 5, 1000]))
def test_parts_one_after_another_are_the_plan_and_lose_no_expert(pair, fan_out, rows):
    _, num_logical, old, new = pair
    _, parts = parts_of(pair, fan_out, rows)
    held, covered = old.copy(), np.zeros(old.shape, dtype=bool)
    for part in parts:
        layers = list(part.layers)
        moved = apply_moves(held, MovePlan(part.plan.source_slot))
        held[layers] = np.where(part.covers, moved[layers], held[layers])
        assert not (covered[layers] & part.covers).any()
        covered[layers] |= part.covers
        np.testing.assert_array_equal(held, np.where(covered, new, old))
        for before, now, after in zip(old, held, new, strict=True):
            assert set(before) & set(after) - {EMPTY} <= set(now)
    assert covered.all()


@given(PAIRS, st.sampled_from(["direct", "node"]))
def test_a_layer_is_split_only_if_it_does_not_fit(pair, fan_out):
    _, parts = parts_of(pair, fan_out, 10**6)
    assert len(parts) == 1
    assert parts[0].covers.all()
    assert not parts[0].in_place
