"""The guarantees of a move plan, each as the design words it; the seventh, on senders, is in `test_senders`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import (
    EMPTY,
    EplbError,
    LostExpertsError,
    MovePlan,
    Topology,
    apply_moves,
    plan_moves,
    schedule_rounds,
    verify_plan,
)
from eplb_core.testing import model_apply, placement_pairs, read_only

FAN_OUTS = st.sampled_from(["direct", "node"])
PAIRS = st.one_of(placement_pairs(empty=True), placement_pairs(similar=True))


def rank_of(slot, topology):
    return slot // topology.slots_per_rank


def node_of(slot, topology):
    return slot // topology.slots_per_node


@given(PAIRS, FAN_OUTS)
def test_1_applying_the_plan_to_old_gives_new(pair, fan_out):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    assert plan.source_slot.dtype == np.int32
    assert apply_moves(old, plan).tolist() == new.tolist()


@given(PAIRS, FAN_OUTS)
def test_2_an_unchanged_slot_sources_itself(pair, fan_out):
    topology, _, old, new = pair
    source = plan_moves(old, new, topology, fan_out=fan_out).source_slot
    slots = np.broadcast_to(np.arange(topology.num_slots), old.shape)
    assert (source[old == new] == slots[old == new]).all()


@given(PAIRS, FAN_OUTS)
def test_3_a_rank_that_holds_the_expert_copies_locally_from_its_lowest_slot(pair, fan_out):
    topology, _, old, new = pair
    source = plan_moves(old, new, topology, fan_out=fan_out).source_slot
    for layer, slot in np.argwhere((old != new) & (new != EMPTY)):
        first = rank_of(slot, topology) * topology.slots_per_rank
        local = [p for p in range(first, first + topology.slots_per_rank) if old[layer, p] == new[layer, slot]]
        assert not local or source[layer, slot] == local[0]


@given(PAIRS, FAN_OUTS)
def test_4_all_slots_of_a_rank_share_one_source(pair, fan_out):
    topology, _, old, new = pair
    source = plan_moves(old, new, topology, fan_out=fan_out).source_slot
    seen = {}
    for layer, slot in np.argwhere((old != new) & (new != EMPTY)):
        key = (layer, rank_of(slot, topology), new[layer, slot])
        assert seen.setdefault(key, source[layer, slot]) == source[layer, slot]


@given(PAIRS, FAN_OUTS)
def test_5_a_holder_on_the_same_node_is_used_whenever_there_is_one(pair, fan_out):
    topology, _, old, new = pair
    source = plan_moves(old, new, topology, fan_out=fan_out).source_slot
    for layer, slot in np.argwhere((old != new) & (new != EMPTY)):
        nodes = {node_of(p, topology) for p in np.flatnonzero(old[layer] == new[layer, slot])}
        if node_of(slot, topology) in nodes:
            assert node_of(source[layer, slot], topology) == node_of(slot, topology)


@given(PAIRS)
def test_5_only_one_rank_of_a_node_pulls_an_expert_across_nodes(pair):
    topology, _, old, new = pair
    source, relay = plan_moves(old, new, topology, fan_out="node")
    pulls: dict = {}
    for layer, slot in np.argwhere((old != new) & (new != EMPTY)):
        src, via = source[layer, slot], relay[layer, slot]
        first_of_rank = [
            p
            for p in range(topology.num_slots)
            if rank_of(p, topology) == rank_of(slot, topology) and new[layer, p] == new[layer, slot]
        ][0]
        if slot != first_of_rank or node_of(src, topology) == node_of(slot, topology):
            assert via == EMPTY
        elif via == EMPTY:
            assert pulls.setdefault((layer, node_of(slot, topology), new[layer, slot]), slot) == slot
    for layer, slot in np.argwhere(relay != EMPTY):
        via = relay[layer, slot]
        assert pulls[layer, node_of(slot, topology), new[layer, slot]] == via
        assert source[layer, slot] == source[layer, via]


@given(st.data(), PAIRS, FAN_OUTS, st.booleans())
def test_6_sources_are_live_and_8_lost_experts_are_reported(data, pair, fan_out, as_mask):
    topology, _, old, new = pair
    live = data.draw(st.sets(st.integers(0, topology.ep_size - 1)))
    given_as = np.isin(np.arange(topology.ep_size), list(live)) if as_mask else np.asarray(sorted(live), dtype=int)
    changed = (old != new) & (new != EMPTY)
    slot_live = np.isin(np.arange(topology.num_slots) // topology.slots_per_rank, list(live))
    lost = sorted(
        {
            (int(layer), int(new[layer, slot]))
            for layer, slot in np.argwhere(changed)
            if not ((old[layer] == new[layer, slot]) & slot_live).any()
        }
    )
    if lost:
        with pytest.raises(LostExpertsError) as caught:
            plan_moves(old, new, topology, live_ranks=given_as, fan_out=fan_out)
        assert caught.value.lost == lost
    plan = plan_moves(old, new, topology, live_ranks=given_as, fan_out=fan_out, allow_lost=True)
    for layer, slot in np.argwhere(changed):
        src = plan.source_slot[layer, slot]
        if (layer, new[layer, slot]) in lost:
            assert src == EMPTY
        else:
            assert rank_of(src, topology) in live
    assert verify_plan(old, new, plan, topology, live_ranks=given_as, allow_lost=True) == ()


def test_6_a_slot_on_a_dead_rank_is_filled_from_a_live_one_though_the_rank_keeps_another_copy():
    topology = Topology(2, slots_per_rank=2)
    old, new = np.asarray([[0, 1, 0, 2]]), np.asarray([[0, 1, 0, 0]])
    assert plan_moves(old, new, topology, live_ranks=[0]).source_slot.tolist() == [[0, 1, 2, 0]]


@given(placement_pairs(empty=True), st.sampled_from([(), (2,), (3, 2)]), st.sampled_from(["f4", "u1", "i8"]))
def test_apply_moves_gathers_rows_of_any_shape_and_dtype(pair, shape, dtype):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology)
    size = int(np.prod((*old.shape, *shape)))
    values = read_only((np.arange(size) % 100).astype(dtype).reshape(*old.shape, *shape))
    got = apply_moves(values, plan, fill=7)
    assert got.dtype == values.dtype
    for layer in range(len(old)):
        expected = model_apply(list(values[layer]), plan.source_slot[layer].tolist(), np.full(shape, 7, dtype))
        np.testing.assert_array_equal(got[layer], np.stack(expected))


@given(PAIRS)
def test_the_same_input_gives_the_same_plan(pair):
    topology, _, old, new = pair
    first, second = plan_moves(old, new, topology), plan_moves(old.copy(), new.copy(), topology)
    assert first.source_slot.tolist() == second.source_slot.tolist()
    assert isinstance(first, MovePlan)


@pytest.mark.parametrize("slot", [4, 9])
def test_a_plan_of_more_slots_than_there_are_is_refused(slot):
    plan, topology = MovePlan(np.asarray([[0, 1, slot, 3]])), Topology(2, 2)
    for use in (lambda: apply_moves(np.zeros((1, 4)), plan), lambda: schedule_rounds(plan, topology)):
        with pytest.raises(EplbError, match=r"larger slots at \(layer, slot\) \[\(0, 2\)\]"):
            use()
