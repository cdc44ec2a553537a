"""Moving rows of sharded arrays: the script against a plain player of it, and compiled on eight devices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import EMPTY, MovePlan, Topology, plan_moves, schedule_rounds
from eplb_core.sharded import choose_width, rearrange
from eplb_core.sharded.script import Script, write_script
from eplb_core.testing import model_apply, placement_pairs, placements
from tests.devices import assert_same_rows, host_rows, make_mesh, shard


@st.composite
def plans(draw):
    """A topology and a plan for it, direct or through relays, with `EMPTY` sources or not."""
    topology, _, old, new = draw(placement_pairs(empty=draw(st.booleans()), max_slots_per_rank=5))
    return topology, plan_moves(old, new, topology, fan_out=draw(st.sampled_from(["direct", "node"])))


def expected(rows: np.ndarray, plan: MovePlan, layers=None) -> np.ndarray:
    """What the slots hold afterwards: those without a source what they held."""
    moved = []
    for row, sources in zip(rows.tolist(), plan.source_slot.tolist(), strict=True):
        taken = model_apply(row, sources)
        moved.append([kept if src == EMPTY else new for kept, new, src in zip(row, taken, sources, strict=True)])
    chosen = range(len(rows)) if layers is None else layers
    return np.asarray([moved[i] if i in chosen else rows[i] for i in range(len(rows))])


def play(rows: np.ndarray, script: Script, topology: Topology) -> np.ndarray:
    """Carry out a script with lists, one rank after the other; staging starts with values that nobody may use."""
    depth = topology.slots_per_rank
    weights = [rows[:, r * depth : (r + 1) * depth].ravel().tolist() for r in range(topology.ep_size)]
    staging = [["garbage"] * script.num_places for _ in range(topology.ep_size)]

    def take_steps(rank, start, stop):
        for step in range(start, stop):
            first = script.steps[rank, step - 1, 1] if step else 0
            middle, last = script.steps[rank, step]
            for row, place in script.copies[rank, first:middle]:
                staging[rank][place] = weights[rank][row]
            for row, place in script.copies[rank, middle:last]:
                weights[rank][row] = staging[rank][place]

    for rank in range(topology.ep_size):
        take_steps(rank, 0, script.stepped[rank, 0])
    for now in range(int(script.num_rounds)):
        flight = []
        for rank in range(topology.ep_size):
            split, num_sent = script.split[rank, now], script.num_sent[rank, now]
            sent = [weights[rank][row] for row in script.send[rank, now, :split]]
            flight.append(sent + [staging[rank][place] for place in script.send[rank, now, split:num_sent]])
        for rank in range(topology.ep_size):
            arrived = flight[(rank - script.shift[now]) % topology.ep_size]
            assert len(arrived) == script.num_kept[rank, now]
            for row, place in zip(arrived, script.keep[rank, now], strict=False):
                staging[rank][place] = row
            take_steps(rank, script.stepped[rank, now], script.stepped[rank, now + 1])
    return np.concatenate([np.asarray(own).reshape(len(rows), depth) for own in weights], axis=1)


def numbered(plan: MovePlan) -> np.ndarray:
    return np.arange(plan.source_slot.size).reshape(plan.source_slot.shape)


@given(plans(), st.integers(1, 3), st.sampled_from([None, 1, 2, 4]))
@settings(max_examples=200)
def test_a_script_carries_out_its_plan(problem, width, max_places):
    topology, plan = problem
    script = write_script(plan, topology, width=width, max_places=max_places)
    np.testing.assert_array_equal(play(numbered(plan), script, topology), expected(numbered(plan), plan))


@given(plans(), st.data())
def test_layers_that_do_not_take_part_stay(problem, data):
    topology, plan = problem
    layers = data.draw(st.lists(st.integers(0, len(plan.source_slot) - 1), unique=True))
    script = write_script(plan, topology, layers=layers)
    np.testing.assert_array_equal(play(numbered(plan), script, topology), expected(numbered(plan), plan, layers))


@given(plans(), st.integers(1, 6))
def test_staging_is_within_the_limit_or_what_one_layer_needs(problem, max_places):
    topology, plan = problem
    num_layers = len(plan.source_slot)
    alone = max(write_script(plan, topology, layers=[layer]).num_places for layer in range(num_layers))
    script = write_script(plan, topology, max_places=max_places)
    assert script.num_places <= max(max_places, alone)
    assert alone <= topology.num_slots


def reads_and_writes(script: Script, rank: int):
    """Events of one rank, as (stage, kind, row of the weights, place); stage `i + 1` begins with round `i`."""
    events = []

    def take_steps(stage, start, stop):
        for step in range(start, stop):
            first = script.steps[rank, step - 1, 1] if step else 0
            middle, last = script.steps[rank, step]
            events.extend((stage, "save", row, place) for row, place in script.copies[rank, first:middle].tolist())
            events.extend((stage, "restore", row, place) for row, place in script.copies[rank, middle:last].tolist())

    take_steps(0, 0, script.stepped[rank, 0])
    for now in range(int(script.num_rounds)):
        split, num_sent = script.split[rank, now], script.num_sent[rank, now]
        events.extend((now + 1, "send", row, None) for row in script.send[rank, now, :split].tolist())
        events.extend((now + 1, "pass on", None, place) for place in script.send[rank, now, split:num_sent].tolist())
        kept = script.keep[rank, now, : script.num_kept[rank, now]].tolist()
        events.extend((now + 1, "keep", None, place) for place in kept)
        take_steps(now + 1, script.stepped[rank, now], script.stepped[rank, now + 1])
    return events


@given(plans(), st.integers(1, 3))
def test_staging_has_as_many_places_as_rows_wait_at_a_time(problem, width):
    topology, plan = problem
    script = write_script(plan, topology, width=width)
    most = 0
    for rank in range(topology.ep_size):
        events = reads_and_writes(script, rank)
        begun: dict[int, int] = {}
        last_use: dict[tuple[int, int], int] = {}
        for i, (_, kind, _, place) in enumerate(events):
            if kind in ("save", "keep"):
                begun[place] = i
            if place is not None:
                last_use[place, begun[place]] = i
        ends = {end: place for (place, _), end in last_use.items()}
        waiting: set[int] = set()
        for i, (_, kind, _, place) in enumerate(events):
            if kind in ("save", "keep"):
                assert place not in waiting
                waiting.add(place)
                most = max(most, len(waiting))
            if i in ends:
                waiting.discard(ends[i])
    assert script.num_places == most


@given(plans(), st.integers(1, 3))
def test_a_row_that_arrived_waits_only_for_its_slot_to_be_read(problem, width):
    topology, plan = problem
    script = write_script(plan._replace(relay_slot=None), topology, width=width)
    for rank in range(topology.ep_size):
        arrived, last_read = {}, {}
        for stage, kind, row, place in reads_and_writes(script, rank):
            if kind == "keep":
                arrived[place] = stage
            elif kind == "save":
                arrived.pop(place, None)
                last_read[row] = stage
            elif kind == "send":
                last_read[row] = stage
            elif kind == "restore" and place in arrived:
                assert stage == max(arrived[place], last_read.get(row, 0))


@given(plans(), st.integers(1, 3))
def test_as_many_rows_cross_as_the_plan_has_transfers_and_detours(problem, width):
    """Rows never go to the rank they are on, and a rank sends at most `width` in a round."""
    topology, plan = problem
    script = write_script(plan, topology, width=width)
    transfers = len(schedule_rounds(plan, topology).layer)
    assert transfers <= script.num_sent.sum() <= 2 * transfers
    assert script.num_sent.max(initial=0) <= width
    assert script.num_sent.sum() == script.num_kept.sum()
    assert (script.shift % topology.ep_size != 0).all()
    most = 2 * len(plan.source_slot) * topology.slots_per_rank
    assert max(script.copies.shape[1], script.steps.shape[1]) <= most


@given(placement_pairs())
def test_the_same_plan_gives_the_same_script(problem):
    topology, _, old, new = problem
    scripts = [write_script(plan_moves(old, new, topology), topology, width=2) for _ in range(2)]
    for a, b in zip(*scripts, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(1, 100), st.integers(1, 64), st.integers(1, 64))
def test_the_width_of_rounds_depends_on_sizes_and_leaves_eight_rounds_per_pair(num_layers, ep_size, slots_per_rank):
    width = choose_width(num_layers, Topology(ep_size, slots_per_rank))
    assert width >= 1
    assert width & (width - 1) == 0
    changed = num_layers * slots_per_rank / 10
    assert width == 1 or changed / max(ep_size - 1, 1) >= 8 * width


# Compiling takes a second per shape, so sizes are few and values many.
SIZES = [(Topology(4, 3, num_nodes=2), {"tp": 2, "ep": 4}), (Topology(8, 2), {"tp": 1, "ep": 8})]
NUM_LAYERS = 3


@pytest.mark.parametrize(("topology", "axes"), SIZES)
@given(data=st.data())
@settings(max_examples=12)
def test_sharded_rows_move_as_the_plan_says(topology, axes, data):
    mesh = make_mesh(**axes)
    old, new = (data.draw(placements(topology, topology.num_slots - 2, NUM_LAYERS)) for _ in range(2))
    plan = plan_moves(old, new, topology, fan_out=data.draw(st.sampled_from(["direct", "node"])))
    rows = host_rows(NUM_LAYERS, topology.num_slots, seed=data.draw(st.integers(0, 99)))
    weights = shard(rows, mesh)
    shardings = {name: array.sharding for name, array in weights.items()}
    moved = jax.block_until_ready(rearrange(weights, plan, topology, mesh=mesh))
    layer = np.arange(NUM_LAYERS)[:, None]
    assert_same_rows(moved, {name: array[layer, plan.source_slot] for name, array in rows.items()})
    assert all(array.sharding.is_equivalent_to(shardings[name], array.ndim) for name, array in moved.items())
    assert all(array.is_deleted() for array in weights.values() if array.size)
