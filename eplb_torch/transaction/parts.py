"""What is committed at once: groups of layers that fill the staging memory, or parts of a layer that does not fit."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from eplb_core import EMPTY, MovePlan, Topology, schedule_rounds
from eplb_torch.weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class Part:
    """Slots that all ranks commit together.

    layers: ascending ids of the layers it touches.
    plan: the moves of the part; slots of its layers that belong to other parts source themselves.
    covers: bool `[len(layers), slots]` the slots that hold the new placement after the commit of this part. All of
        them, unless the layer is split.
    in_place: rows are sent from where they lie, so that sending needs no memory; costs a message per tensor.
    changes: whether anything is written or sent.
    """

    layers: tuple[int, ...]
    plan: MovePlan
    covers: Bool[np.ndarray, "part_layers slots"]
    in_place: bool
    changes: bool


@dataclass(slots=True)
class _Need:
    """Rows, or bytes, that each rank must hold outside its weights."""

    recv: Int[np.ndarray, " ranks"]
    send: Int[np.ndarray, " ranks"]
    spare: Int[np.ndarray, " ranks"]

    def most(self) -> int:
        """Buffers of sent rows are free again when a cycle at the commit needs its spare row."""
        return int((self.recv + np.maximum(self.send, self.spare)).max())

    def plus(self, other: "_Need") -> "_Need":
        return _Need(self.recv + other.recv, self.send + other.send, np.maximum(self.spare, other.spare))


def plan_parts(
    weights: ExpertWeights, plan: MovePlan, topology: Topology, max_staging_bytes: int, *, row_overhead: int = 0
) -> list[Part]:
    """Cut a plan into parts such that no rank needs more than `max_staging_bytes` outside its weights at a time.

    Consecutive layers share a part as long as they fit. A layer that does not fit alone is split into parts that are
    closed under overwriting: a slot whose old contents others still need is overwritten in the same part or later.
    So every part is a transaction, and between parts the layer is in a placement that can be served, with a copy of
    every expert of which the old and the new one have a copy. Slots that form a cycle cannot be separated: where
    even one cycle needs more memory than allowed, that part takes what it needs.

    The same on every rank, as it depends only on what all ranks know. `row_overhead` is bytes beside each row that
    travels.
    """
    needs = _layer_needs(weights, plan, topology, row_overhead)
    parts: list[Part] = []
    group: list[int] = []
    total = _nothing(topology)
    for layer, need in enumerate(needs):
        if group and total.plus(need).most() > max_staging_bytes:
            parts.append(_whole_layers(plan, group))
            group, total = [], _nothing(topology)
        if need.most() > max_staging_bytes:
            parts.extend(_split(weights, plan, topology, layer, max_staging_bytes))
        else:
            group.append(layer)
            total = total.plus(need)
    if group:
        parts.append(_whole_layers(plan, group))
    return parts


def _nothing(topology: Topology) -> _Need:
    return _Need(*(np.zeros(topology.ep_size, dtype=np.int64) for _ in range(3)))


def _layer_needs(weights: ExpertWeights, plan: MovePlan, topology: Topology, overhead: int) -> list[_Need]:
    schedule = schedule_rounds(plan, topology)
    shape = (weights.num_layers, topology.ep_size)
    recv, send = (
        np.bincount(schedule.layer * topology.ep_size + side, minlength=shape[0] * shape[1]).reshape(shape)
        for side in (schedule.dst_rank, schedule.src_rank)
    )
    source = np.asarray(plan.source_slot)
    slots = np.arange(topology.num_slots)
    rank = slots // topology.slots_per_rank
    local = (source != EMPTY) & (source != slots) & (source // topology.slots_per_rank == rank)
    spare = local.reshape(*shape, topology.slots_per_rank).any(axis=2)
    kept = np.asarray([weights.row_bytes(layer) for layer in range(shape[0])])[:, None]
    sent = kept + overhead
    return [_Need(*rows) for rows in zip(recv * sent, send * sent, spare * kept, strict=True)]


def _whole_layers(plan: MovePlan, layers: list[int]) -> Part:
    source = np.asarray(plan.source_slot)[layers]
    covers = np.ones(source.shape, dtype=bool)
    return Part(tuple(layers), plan, covers, False, bool((source != np.arange(source.shape[1])).any()))


@dataclass(slots=True)
class _Unit:
    """Slots that cannot be told apart: they share a message, or form a cycle."""

    slots: list[int]
    source: int
    need: _Need = field(repr=False)


def _split(weights: ExpertWeights, plan: MovePlan, topology: Topology, layer: int, limit: int) -> list[Part]:
    """Fill parts of one layer with its units, in an order in which readers come before what they read."""
    row_bytes = weights.row_bytes(layer)
    copied = sum(f.num_bytes for f in weights.fields(layer) if not f.flat) > 0
    parts: list[Part] = []
    slots: list[int] = []
    total = _nothing(topology)
    for unit in _ordered_units(plan, topology, layer):
        # Rows are sent in place, but those that are not contiguous in memory pass through a buffer.
        need = _Need(unit.need.recv * row_bytes, unit.need.send * row_bytes * copied, unit.need.spare * row_bytes)
        if slots and total.plus(need).most() > limit:
            parts.append(_some_slots(plan, layer, slots))
            slots, total = [], _nothing(topology)
        slots.extend(unit.slots)
        total = total.plus(need)
    parts.append(_some_slots(plan, layer, slots))
    # Slots that do not change count as committed with the last part.
    changed = np.any([part.covers for part in parts], axis=0)
    last = parts[-1]
    parts[-1] = Part(last.layers, last.plan, last.covers | ~changed, last.in_place, last.changes)
    return parts


def _some_slots(plan: MovePlan, layer: int, slots: list[int]) -> Part:
    """The part of a plan that fills some slots of one layer."""
    source = np.asarray(plan.source_slot)
    unchanged = np.arange(source.shape[1], dtype=source.dtype)
    own = np.zeros(source.shape[1], dtype=bool)
    own[slots] = True
    masked = source.copy()
    masked[layer] = np.where(own, source[layer], unchanged)
    relay = None
    if plan.relay_slot is not None:
        relay = np.asarray(plan.relay_slot).copy()
        relay[layer] = np.where(own, relay[layer], EMPTY)
    return Part((layer,), MovePlan(masked, relay), own[None], True, True)


def _ordered_units(plan: MovePlan, topology: Topology, layer: int) -> list[_Unit]:
    """Units such that none overwrites what a later one reads. All slots of a unit read the same slot, or form a cycle.

    Every unit reads one slot, hence depends on at most one other unit: what is left when all units without readers
    are taken away, again and again, is cycles.
    """
    units = _units(plan, topology, layer)
    owner = {slot: i for i, unit in enumerate(units) for slot in unit.slots}
    target = [owner.get(unit.source) for unit in units]
    readers = [0] * len(units)
    for i in target:
        if i is not None:
            readers[i] += 1
    ordered: list[_Unit] = []
    ready = [i for i, count in enumerate(readers) if not count]
    left = dict.fromkeys(range(len(units)))
    while ready:
        i = ready.pop()
        del left[i]
        ordered.append(units[i])
        read = target[i]
        if read is not None:
            readers[read] -= 1
            if not readers[read]:
                ready.append(read)
    while left:
        i = next(iter(left))
        cycle = []
        while i in left:
            del left[i]
            cycle.append(units[i])
            i = target[i]
        ordered.append(_join_cycle(cycle, topology))
    return ordered


def _units(plan: MovePlan, topology: Topology, layer: int) -> list[_Unit]:
    """Slots by what they read and where: those of a rank share a message, and those of a node may share a relay."""
    source = np.asarray(plan.source_slot)[layer].tolist()
    together = topology.slots_per_rank if plan.relay_slot is None else topology.slots_per_node
    by_source: dict[tuple[int, int], list[int]] = defaultdict(list)
    for slot, src in enumerate(source):
        if src != slot:
            by_source[(slot if src == EMPTY else slot // together), src].append(slot)
    units = []
    for (_, src), slots in by_source.items():
        need = _nothing(topology)
        if src != EMPTY:
            ranks = {slot // topology.slots_per_rank for slot in slots} - {src // topology.slots_per_rank}
            need.recv[list(ranks)] = 1
            need.send[src // topology.slots_per_rank] = len(ranks)
            if plan.relay_slot is not None:
                need.send[list(ranks)] = len(ranks)
        units.append(_Unit(slots, src, need))
    return units


def _join_cycle(cycle: list[_Unit], topology: Topology) -> _Unit:
    """Only a cycle within one rank needs a spare row: in any other a row that arrives is aside already."""
    recv, send = (np.sum([getattr(unit.need, side) for unit in cycle], axis=0) for side in ("recv", "send"))
    slots = [slot for unit in cycle for slot in unit.slots]
    spare = np.zeros(topology.ep_size, dtype=np.int64)
    spare[[slot // topology.slots_per_rank for slot in slots]] = int(not recv.any())
    return _Unit(slots, cycle[0].source, _Need(recv, send, spare))
