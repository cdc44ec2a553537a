"""Initial placements, and slots that stay where they are."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, check_placement, moved_experts, preserve_slots, round_robin
from eplb_core.testing import placement_pairs, topologies


@given(topologies(), st.integers(1, 4), st.data())
def test_round_robin_repeats_the_experts_in_order(topology, num_layers, data):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    got = round_robin(num_layers, num_logical, topology)
    assert got.dtype == np.int32
    assert got.tolist() == [[p % num_logical for p in range(topology.num_slots)]] * num_layers
    check_placement(got, topology, num_logical)


@given(placement_pairs(empty=True))
def test_preserve_slots_changes_no_ranks_experts(pair):
    topology, _, old, new = pair
    kept = preserve_slots(new, old, topology)
    assert kept.dtype == np.int32
    by_rank = (-1, topology.slots_per_rank)
    assert np.sort(kept.reshape(by_rank)).tolist() == np.sort(new.reshape(by_rank)).tolist()
    assert moved_experts(new, kept, topology).sum() == 0


@given(placement_pairs(empty=True))
def test_preserve_slots_keeps_as_many_slots_as_any_order_can(pair):
    topology, _, old, new = pair
    kept = preserve_slots(new, old, topology)
    by_rank = (-1, topology.slots_per_rank)
    for was, will, got in zip(old.reshape(by_rank), new.reshape(by_rank), kept.reshape(by_rank), strict=True):
        best = sum((Counter(was.tolist()) & Counter(will.tolist())).values())
        assert (was == got).sum() == best


@given(placement_pairs(empty=True))
def test_preserve_slots_fills_free_slots_in_order(pair):
    topology, _, old, new = pair
    kept = preserve_slots(new, old, topology)
    by_rank = (-1, topology.slots_per_rank)
    for was, will, got in zip(old.reshape(by_rank), new.reshape(by_rank), kept.reshape(by_rank), strict=True):
        stays = Counter(was.tolist()) & Counter(will.tolist())
        left = []
        for expert in will.tolist():
            if stays[expert]:
                stays[expert] -= 1
            else:
                left.append(expert)
        assert got[was != got].tolist() == left


@given(placement_pairs(empty=True))
def test_preserve_slots_of_itself_is_itself(pair):
    topology, _, _, new = pair
    assert preserve_slots(new, new, topology).tolist() == new.tolist()
    assert (new >= EMPTY).all()
