"""Check a move plan, and its schedule, slot by slot. Shares no code with the planner or the scheduler."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY, check_indices
from eplb_core.topology import Topology, check_topology


class Violation(NamedTuple):
    """One broken rule. An empty tuple of violations means that a plan is sound.

    kind: `"shape"`, `"range"`, `"coverage"` (the slot would not hold its expert), `"needless"` (a slot that does not
        change is moved), `"liveness"` (a dead source), `"local"` (sent although the rank holds it), `"nearest"` (sent
        across nodes although the node holds it), `"shared"` (two messages of one expert to one rank), `"relay"`,
        `"pairing"` (a message missing, twice, unplanned, or between other ranks than its slots), `"round"` (a rank
        sends or receives twice in a round), `"order"` (rows not in the order both sides use) or `"overwrite"` (a
        relayed row is read before it has arrived).
        What is no plan, or holds no integers, is a `"shape"`.
    layer, slot: where, or -1 if the rule is about the whole plan.
    detail: what was found.
    """

    kind: str
    layer: int
    slot: int
    detail: str


def verify_plan(
    old: Any,
    new: Any,
    plan: Any,
    topology: Topology,
    schedule: Any = None,
    *,
    live_ranks: Any = None,
    allow_lost: bool = False,
) -> tuple[Violation, ...]:
    """Return every rule that a plan breaks.

    Plain loops over plain integers: about a microsecond per slot, on the host.

    Args:
        old: `[layers, slots]` the placement in force.
        new: `[layers, slots]` the placement to come.
        plan: `MovePlan`.
        topology: sizes.
        schedule: `Schedule` of all layers of the plan, or None to check the plan alone.
        live_ranks: ids of the ranks that can send, or a boolean `[ep_size]` mask; all by default.
        allow_lost: accept `EMPTY` sources for experts that no live slot holds.

    Returns:
        Violations in order of layer and slot, then those of the schedule; empty if the plan is sound.

    Raises:
        EplbError: if `topology` or `live_ranks` make no sense; whatever is wrong with the rest is a violation.

    >>> from eplb_core import MovePlan
    >>> old, new, topology = [[0, 1, 2, 3]], [[0, 2, 2, 3]], Topology(ep_size=2, slots_per_rank=2)
    >>> verify_plan(old, new, MovePlan(np.asarray([[0, 2, 2, 3]])), topology)
    ()
    >>> verify_plan(old, new, MovePlan(np.asarray([[0, 3, 2, 3]])), topology)[0].detail
    'slot 1 shall hold expert 2 and would get expert 3 from slot 3'
    """
    check_topology(topology, "verify_plan")
    live = _live(live_ranks, topology)
    given = (old, new, getattr(plan, "source_slot", None), getattr(plan, "relay_slot", None))
    old, new, source, relay = (np.asarray(_ops.as_array(x)) for x in given)
    relay = np.full(source.shape, EMPTY) if given[3] is None else relay
    arrays = (old, new, source, relay)
    shapes = {x.shape for x in arrays}
    if (
        len(shapes) > 1
        or old.ndim != 2
        or old.shape[1] != topology.num_slots
        or {x.dtype.kind for x in arrays} - {*"iu"}
    ):
        detail = f"old, new, plan must be integers [layers, {topology.num_slots}]; got {shapes}"
        return (Violation("shape", -1, -1, detail),)
    found: list[Violation] = []
    messages: dict[tuple[int, int, int], tuple[int, set[int], bool]] = {}
    for layer, rows in enumerate(zip(old.tolist(), new.tolist(), source.tolist(), relay.tolist(), strict=True)):
        _check_layer(layer, *rows, topology, live, allow_lost, found, messages)
    if schedule is not None:
        columns = _columns(schedule)
        if columns is None:
            found.append(Violation("shape", -1, -1, "a schedule must have seven columns of integers, of equal lengths"))
        else:
            found.extend(_check_schedule(columns, messages, topology))
    return tuple(found)


def _live(live_ranks: Any, topology: Topology) -> set[int]:
    if live_ranks is None:
        return set(range(topology.ep_size))
    ranks = np.asarray(_ops.as_array(live_ranks))
    if ranks.dtype == bool and ranks.shape == (topology.ep_size,):
        return set(np.flatnonzero(ranks).tolist())
    advice = "List each live rank by its ep_rank, or give one boolean per rank."
    return set(check_indices(ranks, topology.ep_size, "verify_plan(live_ranks=...)", "rank ids", advice).tolist())


def _columns(schedule: Any) -> list[np.ndarray] | None:
    """The columns of a schedule as arrays; None if it has not the form of one."""
    if not isinstance(schedule, tuple | list) or len(schedule) != 7:
        return None
    columns = [np.asarray(_ops.as_array(column)) for column in schedule]
    good = all(column.ndim == 1 and (column.dtype.kind in "iub" or not column.size) for column in columns)
    return columns if good and len({len(column) for column in columns}) == 1 else None


def _check_layer(layer, old, new, source, relay, topology, live, allow_lost, found, messages) -> None:
    """Check one layer's slots; record in `messages` what must travel."""

    def report(kind: str, slot: int, detail: str) -> None:
        found.append(Violation(kind, layer, slot, detail))

    rank = [slot // topology.slots_per_rank for slot in range(len(old))]
    node = [r // topology.ranks_per_node for r in rank]
    holders = defaultdict(list)
    for slot, expert in enumerate(old):
        if expert != EMPTY and rank[slot] in live:
            holders[expert].append(slot)
    origin: dict[tuple[int, int], int] = {}
    for slot, (was, expert, src, via) in enumerate(zip(old, new, source, relay, strict=True)):
        if not -1 <= src < len(old) or not -1 <= via < len(old):
            report("range", slot, f"source {src} or relay {via} is not a slot")
            continue
        if was == expert:
            if src != slot:
                report("needless", slot, f"holds expert {expert} already and would get it from slot {src}")
            if via != EMPTY:
                report("relay", slot, f"does not change and has relay {via}")
            continue
        if expert == EMPTY or src == EMPTY:
            lost = src == EMPTY and expert != EMPTY and not (allow_lost and not holders[expert])
            if lost or src != EMPTY or via != EMPTY:
                report("coverage", slot, f"shall hold expert {expert} and has source {src}, relay {via}")
            continue
        if old[src] != expert:
            report(
                "coverage",
                slot,
                f"slot {slot} shall hold expert {expert} and would get expert {old[src]} from slot {src}",
            )
            continue
        if rank[src] not in live:
            report("liveness", slot, f"source {src} is on dead rank {rank[src]}")
            continue
        where = {rank[holder] for holder in holders[expert]}
        if rank[src] == rank[slot]:
            if via != EMPTY:
                report("relay", slot, f"is copied on its rank and has relay {via}")
            continue
        if rank[slot] in where:
            report(
                "local",
                slot,
                f"rank {rank[slot]} holds expert {expert} and would get it from rank {rank[src]}",
            )
        if node[src] != node[slot] and any(r // topology.ranks_per_node == node[slot] for r in where):
            report(
                "nearest",
                slot,
                f"node {node[slot]} holds expert {expert} and would get it from node {node[src]}",
            )
        if origin.setdefault((rank[slot], expert), src) != src:
            report(
                "shared",
                slot,
                f"rank {rank[slot]} would get expert {expert} from slots {origin[rank[slot], expert]} and {src}",
            )
        key = (layer, rank[slot], expert)
        sent_from, slots, relayed = messages.get(key, (src, set(), False))
        if via != EMPTY:
            fits = node[via] == node[slot] and rank[via] != rank[slot] and node[src] != node[slot]
            if not fits or new[via] != expert or source[via] != src or relay[via] != EMPTY or old[via] == expert:
                report("relay", slot, f"relay {via} does not receive expert {expert} for node {node[slot]}")
            sent_from, relayed = via, True
        messages[key] = (sent_from, slots | {slot}, relayed)
    if any(via != EMPTY for via in relay):
        pulls: dict[tuple[int, int], list[int]] = defaultdict(list)
        for (row, to_rank, expert), (src, _, relayed) in messages.items():
            to_node = to_rank // topology.ranks_per_node
            if row == layer and not relayed and node[src] != to_node:
                pulls[to_node, expert].append(to_rank)
        for (to_node, expert), ranks in pulls.items():
            if len(ranks) > 1:
                report("relay", -1, f"ranks {ranks} of node {to_node} all pull expert {expert} across nodes")


def _check_schedule(schedule, messages, topology: Topology) -> list[Violation]:
    found = []
    rows = [tuple(int(x) for x in row) for row in zip(*schedule, strict=True)]
    expected = {}
    for (layer, dst_rank, _), (src_slot, dst_slots, relayed) in messages.items():
        for slot in dst_slots:
            expected[layer, src_slot, slot, relayed] = (layer, dst_rank, src_slot, relayed)
    delivered = Counter()
    arrival, sends, receives = {}, defaultdict(set), defaultdict(set)
    for src_rank, dst_rank, layer, src_slot, dst_slot, turn, relayed in rows:
        if (src_rank, dst_rank) != (src_slot // topology.slots_per_rank, dst_slot // topology.slots_per_rank):
            detail = f"slots {src_slot} -> {dst_slot} are not on ranks {src_rank} -> {dst_rank}"
            found.append(Violation("pairing", layer, dst_slot, detail))
        message = expected.get((layer, src_slot, dst_slot, bool(relayed)))
        if message is None:
            found.append(Violation("pairing", layer, dst_slot, f"slot {src_slot} -> {dst_slot} is not in the plan"))
        delivered[message] += 1
        arrival[layer, dst_slot] = turn
        sends[turn, src_rank].add(dst_rank)
        receives[turn, dst_rank].add(src_rank)
    for message in set(expected.values()):
        if delivered[message] != 1:
            layer, dst_rank, src_slot, _ = message
            detail = f"slot {src_slot} -> rank {dst_rank} is scheduled {delivered[message]} times"
            found.append(Violation("pairing", layer, -1, detail))
    for verb, partners in (("sends to", sends), ("receives from", receives)):
        for (turn, rank), others in partners.items():
            if len(others) > 1:
                found.append(Violation("round", -1, -1, f"rank {rank} {verb} {sorted(others)} in round {turn}"))
    for _, _, layer, src_slot, dst_slot, turn, relayed in rows:
        if relayed and arrival.get((layer, src_slot), turn) >= turn:
            detail = f"slot {src_slot} is passed on in round {turn} before it has arrived"
            found.append(Violation("overwrite", layer, dst_slot, detail))
    if rows != sorted(rows, key=lambda row: (row[5], row[0], row[1], row[2], row[4])):
        found.append(Violation("order", -1, -1, "rows must be sorted by round, ranks, layer and destination slot"))
    return found
