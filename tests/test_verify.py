"""Every rule of `verify_plan`, broken alone: the violation names the rule, the layer and the slot, and nothing else."""

import numpy as np
import pytest

from eplb_core import EMPTY, MovePlan, Schedule, Topology, plan_moves, schedule_rounds, verify_plan

TOPOLOGY = Topology(ep_size=4, slots_per_rank=2, num_nodes=2)
IDENTITY = list(range(8))
NO_RELAY = [EMPTY] * 8


def changed(**slots) -> list[int]:
    """`IDENTITY` with other entries, `p3=0` for slot 3."""
    return [slots.get(f"p{slot}", slot) for slot in range(8)]


def relays(**slots) -> list[int]:
    """No relays but these."""
    return [slots.get(f"p{slot}", EMPTY) for slot in range(8)]


def places(old, new, source, relay=None, **options) -> list[tuple[str, int, int]]:
    """The violations of a second layer after a sound one, but for one in its last slot, which must be among them."""
    source = [*source[:7], 6]
    layers = [[IDENTITY, row] for row in (old, new, source)]
    plan = MovePlan(np.asarray(layers[2]), None if relay is None else np.asarray([NO_RELAY, relay]))
    found = verify_plan(layers[0], layers[1], plan, TOPOLOGY, **options)
    assert all(isinstance(violation.detail, str) for violation in found)
    kinds = [violation[:3] for violation in found]
    kinds.remove(("needless", 1, 7))
    return kinds


TAKES_0 = changed(p3=0)  # slot 3, of rank 1, shall hold expert 0 of rank 0
TWICE = changed(p2=0, p3=0)
PULLS = changed(p4=0, p6=0)  # a slot on each rank of node 1
RULES = {
    "a source beyond the slots": (IDENTITY, TAKES_0, changed(p3=8), None, ["range"]),
    "a source below EMPTY": (IDENTITY, TAKES_0, changed(p3=-2), None, ["range"]),
    "a relay beyond the slots": (IDENTITY, TAKES_0, TAKES_0, relays(p3=8), ["range"]),
    "a relay below EMPTY": (IDENTITY, TAKES_0, TAKES_0, relays(p3=-2), ["range"]),
    "an unchanged slot is moved": (IDENTITY, IDENTITY, changed(p3=2), None, ["needless"]),
    "an unchanged slot has no source": (IDENTITY, IDENTITY, changed(p3=EMPTY), None, ["needless"]),
    "an unchanged slot has a relay": (IDENTITY, IDENTITY, IDENTITY, relays(p3=2), ["relay"]),
    "an emptied slot has a source": (IDENTITY, changed(p3=EMPTY), changed(p3=0), None, ["coverage"]),
    "an emptied slot has a relay": (IDENTITY, changed(p3=EMPTY), changed(p3=EMPTY), relays(p3=0), ["coverage"]),
    "an emptied slot": (IDENTITY, changed(p3=EMPTY), changed(p3=EMPTY), None, []),
    "no source though a slot holds the expert": (IDENTITY, TAKES_0, changed(p3=EMPTY), None, ["coverage"]),
    "no source as no slot holds the expert": (IDENTITY, changed(p3=9), changed(p3=EMPTY), None, ["coverage"]),
    "another expert's slot": (IDENTITY, TAKES_0, changed(p3=1), None, ["coverage"]),
    "an empty slot as source": (changed(p1=EMPTY), TAKES_0, changed(p3=1), None, ["coverage", "coverage"]),
    "a local copy": (IDENTITY, changed(p3=2), changed(p3=2), None, []),
    "a local copy with a relay": (IDENTITY, changed(p3=2), changed(p3=2), relays(p3=4), ["relay"]),
    "from afar though the rank holds it": (changed(p0=2), changed(p0=2, p3=2), changed(p3=0), None, ["local"]),
    "from another node though the node holds it": (
        changed(p4=0),
        changed(p3=0, p4=0),
        changed(p3=4),
        None,
        ["nearest"],
    ),
    "from another node though the rank holds it": (
        changed(p4=2),
        changed(p3=2, p4=2),
        changed(p3=4),
        None,
        ["local", "nearest"],
    ),
    "one message to two slots": (IDENTITY, TWICE, TWICE, None, []),
    "two messages to one rank": (changed(p1=0), changed(p1=0, p2=0, p3=0), changed(p2=0, p3=1), None, ["shared"]),
    "both ranks of a node pull, none relays": (IDENTITY, PULLS, PULLS, None, []),
    "the second rank gets it from the first": (IDENTITY, PULLS, PULLS, relays(p6=4), []),
    "the first rank gets it from the second": (IDENTITY, PULLS, PULLS, relays(p4=6), []),
    "a relay that receives another expert": (
        IDENTITY,
        changed(p4=0, p5=1, p6=0),
        changed(p4=0, p5=1, p6=0),
        relays(p6=5),
        ["relay"],
    ),
    "a relay on the source's node": (IDENTITY, changed(p2=0, p6=0), changed(p2=0, p6=0), relays(p6=2), ["relay"]),
    "a relay within the node of the source": (IDENTITY, TWICE, TWICE, relays(p3=2), ["relay"]),
    "relays of each other": (IDENTITY, PULLS, PULLS, relays(p4=6, p6=4), ["relay", "relay"]),
    "a relay that holds it already": (
        changed(p4=0),
        changed(p4=0, p6=0),
        changed(p6=0),
        relays(p6=4),
        ["nearest", "relay"],
    ),
    "a relay that is served from elsewhere": (
        changed(p1=0),
        changed(p1=0, p4=0, p6=0),
        changed(p4=0, p6=1),
        relays(p6=4),
        ["relay"],
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_of_plans(case):
    old, new, source, relay, kinds = RULES[case]
    slot = 6 if relay is not None and relay[6] != EMPTY else 3
    found = places(old, new, source, relay)
    assert [kind for kind, _, _ in found] == kinds
    if len(kinds) == 1:
        assert found == [(kinds[0], 1, slot)]


def test_two_ranks_of_a_node_pull_one_expert_while_another_is_relayed():
    new = changed(p4=0, p5=1, p6=0, p7=1)
    plan = MovePlan(np.asarray([IDENTITY, new]), np.asarray([NO_RELAY, relays(p7=5)]))
    [found] = verify_plan([IDENTITY] * 2, [IDENTITY, new], plan, TOPOLOGY)
    assert found == ("relay", 1, -1, "ranks [2, 3] of node 1 all pull expert 0 across nodes")


def test_sources_must_be_live_and_what_is_lost_must_be_allowed():
    assert places(IDENTITY, TAKES_0, TAKES_0, live_ranks=[0, 1]) == []
    assert places(IDENTITY, TAKES_0, TAKES_0, live_ranks=[1, 2, 3]) == [("liveness", 1, 3)]
    assert places(IDENTITY, TAKES_0, TAKES_0, live_ranks=np.arange(4) > 0) == [("liveness", 1, 3)]
    nothing = changed(p3=EMPTY)
    assert places(IDENTITY, TAKES_0, nothing, live_ranks=[1, 2, 3]) == [("coverage", 1, 3)]
    assert places(IDENTITY, TAKES_0, nothing, live_ranks=[1, 2, 3], allow_lost=True) == []
    assert places(IDENTITY, TAKES_0, nothing, live_ranks=[0], allow_lost=True) == [("coverage", 1, 3)]
    assert places(IDENTITY, changed(p3=9), nothing, allow_lost=True) == []
    # What a dead rank holds is not near.
    assert places(changed(p4=0), changed(p3=0, p4=0), changed(p3=4), live_ranks=[1, 2, 3]) == []


@pytest.mark.parametrize(
    "plan",
    [
        MovePlan(np.asarray([[0, 1, 2]])),
        MovePlan(np.asarray([[0, 1, 2, 3]] * 2)),
        MovePlan(np.asarray([[0, 1, 2, 3]]), np.asarray([[-1, -1, -1]])),
        MovePlan(np.asarray([0, 1, 2, 3])),
        MovePlan(np.asarray([[0.0, 1.0, 2.0, 3.0]])),
    ],
)
def test_a_plan_of_another_shape_is_one_violation(plan):
    [found] = verify_plan([[0, 1, 2, 3]], [[0, 1, 2, 3]], plan, Topology(2, 2))
    assert found[:3] == ("shape", -1, -1)


def test_all_of_one_wrong_shape_are_refused_as_well():
    for wrong in ([[0, 1]], [0, 1, 2, 3]):
        [found] = verify_plan(wrong, wrong, MovePlan(np.asarray(wrong)), Topology(2, 2))
        assert found[:3] == ("shape", -1, -1)


OLD, NEW = np.asarray([[0, 1, 2, 3]] * 2), np.asarray([[0, 1, 2, 3], [0, 2, 2, 0]])
PAIR = Topology(2, 2)
PLAN = plan_moves(OLD, NEW, PAIR)


def scheduled(**columns) -> list[tuple]:
    """The violations of a schedule of `PLAN` in which the row from rank 0 to rank 1 has other entries."""
    rows = {name: column.copy() for name, column in schedule_rounds(PLAN, PAIR)._asdict().items()}
    for name, entry in columns.items():
        rows[name][0] = entry
    return [violation[:3] for violation in verify_plan(OLD, NEW, PLAN, PAIR, Schedule(**rows))]


def test_the_rules_of_schedules():
    assert scheduled() == []
    assert scheduled(src_rank=1) == [("pairing", 1, 3), ("round", -1, -1), ("order", -1, -1)]
    assert scheduled(dst_rank=0) == [("pairing", 1, 3), ("round", -1, -1)]
    assert scheduled(src_slot=1) == [("pairing", 1, 3), ("pairing", 1, -1)]
    assert scheduled(dst_slot=2) == [("pairing", 1, 2), ("pairing", 1, -1)]
    assert scheduled(layer=0) == [("pairing", 0, 3), ("pairing", 1, -1)]
    assert scheduled(relayed=True) == [("pairing", 1, 3), ("pairing", 1, -1), ("overwrite", 1, 3)]
    assert scheduled(round=1) == [("order", -1, -1)]


def test_a_schedule_must_have_the_form_of_one():
    good = schedule_rounds(PLAN, PAIR)
    wrong = good._replace(src_rank=good.src_rank[:1]), good._replace(round=good.round * 1.5), tuple(good)[:6], None
    for schedule in wrong[:3]:
        [found] = verify_plan(OLD, NEW, PLAN, PAIR, schedule)
        assert found[:3] == ("shape", -1, -1)
    assert verify_plan(OLD, NEW, PLAN, PAIR, wrong[3]) == ()


def test_a_rank_sends_and_receives_once_in_a_round():
    topology = Topology(3, 1)
    old = np.asarray([[0, 1, 2]] * 2)
    for new, broken in (
        ([[0, 0, 0], [0, 1, 2]], "rank 0 sends to [1, 2] in round 0"),
        ([[0, 1, 0], [0, 1, 1]], "rank 2 receives from [0, 1] in round 0"),
    ):
        plan = plan_moves(old, np.asarray(new), topology)
        schedule = schedule_rounds(plan, topology)
        assert sorted(schedule.round.tolist()) == [0, 1]
        order = np.lexsort((schedule.dst_rank, schedule.src_rank))
        together = Schedule(*(column[order] for column in schedule))._replace(round=np.zeros_like(schedule.round))
        [found] = verify_plan(old, new, plan, topology, together)
        assert found == ("round", -1, -1, broken)


def test_what_is_passed_on_must_have_arrived_in_an_earlier_round():
    old, new = np.asarray([IDENTITY]), np.asarray([PULLS])
    plan = plan_moves(old, new, TOPOLOGY, fan_out="node")
    schedule = schedule_rounds(plan, TOPOLOGY)
    assert schedule.round.tolist() == [0, 1]
    early = schedule._replace(round=np.zeros_like(schedule.round))
    assert [found[:3] for found in verify_plan(old, new, plan, TOPOLOGY, early)] == [("overwrite", 0, 6)]
