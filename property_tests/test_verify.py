"""The verifier accepts every plan we make and finds every planted fault."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from eplb_core import EMPTY, plan_moves, schedule_rounds, verify_plan
from eplb_core.testing import placement_pairs

FAN_OUTS = st.sampled_from(["direct", "node"])


@st.composite
def planned(draw):
    topology, _, old, new = draw(placement_pairs(empty=True))
    plan = plan_moves(old, new, topology, fan_out=draw(FAN_OUTS))
    return topology, old, new, plan, schedule_rounds(plan, topology)


@given(planned())
def test_no_false_alarm(case):
    topology, old, new, plan, schedule = case
    assert verify_plan(old, new, plan, topology, schedule) == ()


@given(st.data(), planned())
def test_any_other_source_is_a_violation_unless_it_is_as_good(data, case):
    topology, old, new, plan, schedule = case
    layer = data.draw(st.integers(0, len(old) - 1))
    slot = data.draw(st.integers(0, topology.num_slots - 1))
    other = data.draw(st.integers(-3, topology.num_slots + 2))
    source = plan.source_slot.copy()
    assume(source[layer, slot] != other)
    source[layer, slot] = other
    found = verify_plan(old, new, plan._replace(source_slot=source), topology)
    same_rank = other // topology.slots_per_rank == plan.source_slot[layer, slot] // topology.slots_per_rank
    delivers = 0 <= other < topology.num_slots and old[layer, other] == new[layer, slot] != EMPTY
    if not delivers or new[layer, slot] == old[layer, slot]:
        assert found
    elif not same_rank:
        # A different holder is allowed only if this slot alone takes the expert and the holder is as near.
        again = verify_plan(old, new, plan._replace(source_slot=source), topology, schedule)
        assert again, "the schedule still carries the message of the old plan"


def as_good(slot, other, layer, plan, topology):
    """Whether both slots are on one rank and take the same row, so that a message to either serves both."""
    same_rank = slot // topology.slots_per_rank == other // topology.slots_per_rank
    return same_rank and plan.source_slot[layer, slot] == plan.source_slot[layer, other]


@given(st.data(), planned(), st.sampled_from(["drop", "duplicate", "misroute", "round", "reorder", "early"]))
def test_every_damage_to_a_schedule_is_found(data, case, damage):
    topology, old, new, plan, schedule = case
    assume(len(schedule.round) > 0)
    row = data.draw(st.integers(0, len(schedule.round) - 1))
    columns = [column.copy() for column in schedule]
    if damage == "drop":
        columns = [np.delete(column, row) for column in columns]
    elif damage == "duplicate":
        columns = [np.insert(column, row, column[row]) for column in columns]
    elif damage == "misroute":
        column = data.draw(st.sampled_from([0, 1, 3, 4]))
        columns[column][row] = (columns[column][row] + 1) % (topology.ep_size if column < 2 else topology.num_slots)
        assume(columns[column][row] != schedule[column][row])
        assume(column != 4 or not as_good(columns[4][row], schedule.dst_slot[row], schedule.layer[row], plan, topology))
    elif damage == "round":
        # Put a message into a round in which its sender is busy with another receiver.
        busy = (schedule.src_rank == schedule.src_rank[row]) & (schedule.dst_rank != schedule.dst_rank[row])
        assume(busy.any())
        columns[5][row] = schedule.round[busy][0]
        order = np.lexsort((columns[4], columns[2], columns[1], columns[0], columns[5]))
        columns = [column[order] for column in columns]
    elif damage == "reorder":
        assume(len(schedule.round) > 1 and row > 0)
        for column in columns:
            column[[row - 1, row]] = column[[row, row - 1]]
    else:
        assume(schedule.relayed[row])
        columns[5][row] = 0
        order = np.lexsort((columns[4], columns[2], columns[1], columns[0], columns[5]))
        columns = [column[order] for column in columns]
    damaged = schedule._replace(**dict(zip(schedule._fields, columns, strict=True)))
    kinds = {found.kind for found in verify_plan(old, new, plan, topology, damaged)}
    expected = {"round": "round", "reorder": "order", "early": "overwrite"}.get(damage, "pairing")
    assert expected in kinds


@given(st.data(), planned())
def test_a_dead_source_is_found(data, case):
    topology, old, new, plan, _ = case
    moved = np.argwhere((old != new) & (plan.source_slot != EMPTY))
    assume(len(moved) > 0)
    layer, slot = moved[data.draw(st.integers(0, len(moved) - 1))]
    dead = plan.source_slot[layer, slot] // topology.slots_per_rank
    live = [rank for rank in range(topology.ep_size) if rank != dead]
    assert "liveness" in {found.kind for found in verify_plan(old, new, plan, topology, live_ranks=live)}
