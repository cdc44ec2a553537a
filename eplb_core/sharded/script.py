"""What every rank does in every round of a rearrangement: a plan as tables of row numbers, ready for a device."""

import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from eplb_core._checks import EMPTY
from eplb_core.moves import MovePlan
from eplb_core.rounds import Schedule, schedule_rounds
from eplb_core.sharded.shifts import ShiftRounds, schedule_shifts
from eplb_core.topology import Topology


class Script(NamedTuple):
    """Instructions for every rank. Row `layer * slots_per_rank + local_slot` is a rank's own; places are staging's.

    In round `i`, every rank sends the rows `send[:split]` of its weights and the places `send[split:num_sent]` of its
    staging to rank `r + shift[i]`; puts what arrives into the places `keep[:num_kept]`; then carries out the steps up
    to `stepped[i + 1]`. Steps up to `stepped[0]` come before the first round.

    shift: int32 `[rounds]`.
    send: int32 `[ep_size, rounds, width]`.
    split, num_sent: int32 `[ep_size, rounds]`.
    keep: int32 `[ep_size, rounds, width]`.
    num_kept: int32 `[ep_size, rounds]`.
    copies: int32 `[ep_size, copies, 2]` pairs of a row of the weights and a place in staging.
    steps: int32 `[ep_size, steps, 2]`. Of the copies of a step, those up to `steps[j, 0]` go into staging, then those
        up to `steps[j, 1]` go back into the weights; the next step goes on from there.
    stepped: int32 `[ep_size, rounds + 1]`.
    num_rounds: int32 scalar; tables may be longer.
    """

    shift: np.ndarray
    send: np.ndarray
    split: np.ndarray
    num_sent: np.ndarray
    keep: np.ndarray
    num_kept: np.ndarray
    copies: np.ndarray
    steps: np.ndarray
    stepped: np.ndarray
    num_rounds: np.ndarray

    @property
    def num_places(self) -> int:
        """Places that the rank with most of them needs: rows that staging holds."""
        kept = self.keep[np.arange(self.keep.shape[2]) < self.num_kept[:, :, None]]
        moved = [self.copies[rank, : steps.max(initial=0), 1] for rank, steps in enumerate(self.steps)]
        return int(np.concatenate([kept, *moved]).max(initial=-1)) + 1


def write_script(
    plan: MovePlan,
    topology: Topology,
    *,
    width: int = 1,
    layers: Any = None,
    max_places: int | None = None,
) -> Script:
    """Write down what every rank does to carry out a plan.

    Every row that arrives waits in staging until the slot that takes it has been read for the last time. Layers go
    roughly one after the other, so little waits at a time. `O(rows)` Python steps on the host, the same on every rank.

    Args:
        plan: the moves. A slot with an `EMPTY` source keeps what it holds.
        topology: sizes.
        width: rows that one rank sends in a round, >= 1.
        layers: ids of the layers to take part; all by default.
        max_places: split the layers into groups that are carried out one after the other, so that no rank needs more
            places; a single layer takes what it needs. No limit by default: small groups make for more rounds.

    Returns:
        `Script`.

    Raises:
        EplbError: if the plan does not fit the topology or a layer does not exist.

    >>> script = write_script(MovePlan(np.asarray([[2, 1, 0, 3]])), Topology(ep_size=2, slots_per_rank=2))
    >>> script.shift.tolist(), script.send.tolist(), script.num_places
    ([1], [[[0]], [[0]]], 1)
    """
    source = np.asarray(plan.source_slot)
    messages = schedule_rounds(plan, topology, layers=layers)
    messages = Schedule(*(column[np.argsort(messages.layer, kind="stable")] for column in messages))
    chosen = np.arange(len(source)) if layers is None else np.unique(np.asarray(layers, dtype=np.int64))
    groups = [chosen]
    draft = _Draft(source, messages, groups, topology, width)
    if max_places is not None and draft.num_places > max_places:
        groups = _split(chosen, lambda group: _Draft(source, messages, [group], topology, width).num_places, max_places)
        draft = _Draft(source, messages, groups, topology, width)
    return draft.pack(width)


def _split(layers: np.ndarray, num_places: Callable[[np.ndarray], int], most: int) -> list[np.ndarray]:
    """Halve the layers until each part needs at most so many places or is one layer."""
    if len(layers) <= 1 or num_places(layers) <= most:
        return [layers]
    return [part for half in np.array_split(layers, 2) for part in _split(half, num_places, most)]


class _Draft:
    """A script as lists, written once, by `__init__`. Stage `i + 1` is what follows round `i`; stage 0 comes first."""

    def __init__(
        self, source: np.ndarray, messages: Schedule, groups: list[np.ndarray], topology: Topology, width: int
    ):
        messages = Schedule(*(column[np.isin(messages.layer, np.concatenate(groups))] for column in messages))
        self.topology, self.messages = topology, messages
        self.sent: list[tuple[int, int, int, bool]] = []  # round, rank, row or place, whether from staging
        self.kept: list[tuple[int, int, int]] = []  # round, rank, place
        self.copies: list[list[tuple[int, int]]] = [[] for _ in range(topology.ep_size)]
        self.steps: list[list[tuple[int, int]]] = [[] for _ in range(topology.ep_size)]
        self.stepped: list[list[int]] = []  # by stage, then rank
        self._free: list[list[int]] = [[] for _ in range(topology.ep_size)]
        self._used = [0] * topology.ep_size
        self._place: dict[int, int] = {}  # of messages in staging
        self._takers = _takers(source, messages, topology)
        rounds = _rounds(messages, groups, topology, width)
        last_read = np.full(source.shape, -1)
        fresh = ~rounds.second & ~messages.relayed[rounds.message]
        sent = rounds.message[fresh]
        np.maximum.at(last_read, (messages.layer[sent], messages.src_slot[sent]), rounds.round[fresh])
        self._local = _local_moves(source, np.concatenate(groups), last_read, topology)
        self.shift = rounds.shift
        self._write(rounds, last_read)

    @property
    def num_places(self) -> int:
        """Places that the rank with most of them needs."""
        return max(self._used)

    def _write(self, rounds: ShiftRounds, last_read: np.ndarray) -> None:
        due: dict[int, list[tuple[int, int]]] = defaultdict(list)
        legs = list(zip(*(column.tolist() for column in rounds[1:]), strict=True))
        final = {message: now for message, now, _, _ in legs}
        self._copy(0, due)
        at = 0
        for now, shift in enumerate(rounds.shift.tolist()):
            begin = at
            while at < len(legs) and legs[at][1] == now:
                self._send(*legs[at])
                at += 1
            for message, _, rank, _ in legs[begin:at]:
                rank = (rank + shift) % self.topology.ep_size
                self._place[message] = self._take(rank)
                self.kept.append((now, rank, self._place[message]))
                if final[message] == now:
                    for slot in self._takers[message]:
                        last = int(last_read[self.messages.layer[message], slot])
                        due[max(now, last) + 1].append((message, slot))
            self._copy(now + 1, due)

    def _send(self, message: int, now: int, rank: int, second: bool) -> None:
        if second:
            place = self._place.pop(message)
            self._release(rank, place)
            self.sent.append((now, rank, place, True))
        else:
            row = self._row(int(self.messages.layer[message]), int(self.messages.src_slot[message]))
            self.sent.append((now, rank, row, False))

    def _copy(self, stage: int, due: dict[int, list[tuple[int, int]]]) -> None:
        """Moves within ranks, which may read what messages will overwrite; then messages into slots read by no one."""
        for layer, moves in self._local.pop(stage, ()):
            self._copy_within(layer, moves)
        arrived: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for message, slot in due.pop(stage, ()):
            rank = slot // self.topology.slots_per_rank
            arrived[rank].append((self._row(int(self.messages.layer[message]), slot), self._place[message]))
            self._takers[message].remove(slot)
            if not self._takers[message]:
                self._release(rank, self._place.pop(message))
        for rank, restored in arrived.items():
            self._step(rank, [], restored)
        self.stepped.append([len(steps) for steps in self.steps])

    def _copy_within(self, layer: int, moves: list[tuple[int, int]]) -> None:
        """Carry out `(source, slot)` moves of one layer within one rank; all at once if one reads another's slot."""
        rank = moves[0][1] // self.topology.slots_per_rank
        targets: dict[int, list[int]] = defaultdict(list)
        for source, slot in moves:
            targets[source].append(slot)
        tangled = not targets.keys().isdisjoint(slot for _, slot in moves)
        for sources in [list(targets)] if tangled else [[source] for source in targets]:
            places = [self._take(rank) for _ in sources]
            saved = [(self._row(layer, source), place) for source, place in zip(sources, places, strict=True)]
            restored = [
                (self._row(layer, slot), place)
                for source, place in zip(sources, places, strict=True)
                for slot in targets[source]
            ]
            self._step(rank, saved, restored)
            for place in places:
                self._release(rank, place)

    def _step(self, rank: int, saved: list[tuple[int, int]], restored: list[tuple[int, int]]) -> None:
        self.copies[rank] += saved
        middle = len(self.copies[rank])
        self.copies[rank] += restored
        self.steps[rank].append((middle, len(self.copies[rank])))

    def _row(self, layer: int, slot: int) -> int:
        return layer * self.topology.slots_per_rank + slot % self.topology.slots_per_rank

    def _take(self, rank: int) -> int:
        """The lowest free place in the rank's staging."""
        if self._free[rank]:
            return heapq.heappop(self._free[rank])
        self._used[rank] += 1
        return self._used[rank] - 1

    def _release(self, rank: int, place: int) -> None:
        heapq.heappush(self._free[rank], place)

    def pack(self, width: int) -> Script:
        """The lists as arrays."""
        shape = self.topology.ep_size, len(self.shift)
        send, keep = (np.zeros((*shape, width), dtype=np.int32) for _ in range(2))
        split, num_sent, num_kept = (np.zeros(shape, dtype=np.int32) for _ in range(3))
        for now, rank, row, staged in self.sent:
            send[rank, now, num_sent[rank, now]] = row
            num_sent[rank, now] += 1
            split[rank, now] += not staged
        for now, rank, place in self.kept:
            keep[rank, now, num_kept[rank, now]] = place
            num_kept[rank, now] += 1
        copies, steps = _padded(self.copies), _padded(self.steps)
        stepped, num_rounds = np.asarray(self.stepped, dtype=np.int32).T, np.asarray(shape[1], dtype=np.int32)
        return Script(self.shift, send, split, num_sent, keep, num_kept, copies, steps, stepped, num_rounds)


def _padded(rows: list[list[tuple[int, int]]]) -> np.ndarray:
    """`[ep_size, most rows, 2]`, zeros after the last row of a rank."""
    table = np.zeros((len(rows), max(map(len, rows)), 2), dtype=np.int32)
    for rank, own in enumerate(rows):
        table[rank, : len(own)] = np.asarray(own, dtype=np.int32).reshape(-1, 2)
    return table


def _rounds(messages: Schedule, groups: list[np.ndarray], topology: Topology, width: int) -> ShiftRounds:
    """Rounds of all messages, group by group; relayed ones after all others of their group have arrived."""
    parts, first = [], 0
    for group in groups:
        for relayed in (False, True):
            index = np.flatnonzero(np.isin(messages.layer, group) & (messages.relayed == relayed))
            src_rank, dst_rank = messages.src_rank[index], messages.dst_rank[index]
            part = schedule_shifts(src_rank, dst_rank, topology.ep_size, width=width)
            parts.append(part._replace(message=index[part.message], round=part.round + first))
            first += len(part.shift)
    return ShiftRounds(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _takers(source: np.ndarray, messages: Schedule, topology: Topology) -> list[list[int]]:
    """The slots that take each message: those of its rank that have its first slot's source."""
    first_slot = messages.dst_rank[:, None] * topology.slots_per_rank
    slots = first_slot + np.arange(topology.slots_per_rank, dtype=np.int32)
    same = source[messages.layer[:, None], slots] == source[messages.layer, messages.dst_slot][:, None]
    return [row[mask].tolist() for row, mask in zip(slots, same, strict=True)]


def _local_moves(
    source: np.ndarray, layers: np.ndarray, last_read: np.ndarray, topology: Topology
) -> dict[int, list[tuple[int, list[tuple[int, int]]]]]:
    """By stage: for each layer and rank the moves within the rank, once their targets are not sent any more.

    `last_read` is raised for the slots that they read.
    """
    slots = np.arange(source.shape[1])
    same_rank = source // topology.slots_per_rank == slots // topology.slots_per_rank
    local = (source != EMPTY) & (source != slots) & same_rank
    moves: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for index, slot in np.argwhere(local[layers]).tolist():
        layer = int(layers[index])
        moves[layer, slot // topology.slots_per_rank].append((int(source[layer, slot]), slot))
    stages: dict[int, list[tuple[int, list[tuple[int, int]]]]] = defaultdict(list)
    for (layer, _), group in moves.items():
        read, written = (list(column) for column in zip(*group, strict=True))
        when = int(last_read[layer, written].max())
        last_read[layer, read] = np.maximum(last_read[layer, read], when)
        stages[when + 1].append((layer, group))
    return stages
