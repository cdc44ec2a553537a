"""What the commit of a part writes into this rank's weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eplb_core import EMPTY, Topology
from eplb_torch.transaction.local import Copy, order_copies
from eplb_torch.transaction.parcel import Row, copy_rows, row_views
from eplb_torch.transaction.parts import Part
from eplb_torch.weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class LayerWrites:
    """New contents of this rank's slots of one layer.

    copies: between slots, in order; before all else, as they read old contents.
    sources: for each slot that takes a row from another rank, the slot (of all) that the row comes from.
    """

    layer: int
    copies: list[Copy]
    sources: Mapping[int, int]

    @property
    def needs_spare(self) -> bool:
        """Whether a row must be put aside."""
        return any(copy.saves for copy in self.copies)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots that are overwritten."""
        return tuple(sorted({copy.dst for copy in self.copies if not copy.saves} | set(self.sources)))


def plan_writes(part: Part, topology: Topology, rank: int) -> list[LayerWrites]:
    """What one rank writes, layer by layer; nothing for layers in which none of its slots changes."""
    first, writes = rank * topology.slots_per_rank, []
    inside = range(topology.slots_per_rank)
    for layer in part.layers:
        sources = np.asarray(part.plan.source_slot)[layer, first : first + topology.slots_per_rank].tolist()
        moved = {slot: src for slot, src in enumerate(sources) if src not in (EMPTY, first + slot)}
        local = {slot: src - first for slot, src in moved.items() if src - first in inside}
        remote = {slot: src for slot, src in moved.items() if slot not in local}
        if moved:
            writes.append(LayerWrites(layer, order_copies(local), remote))
    return writes


def apply_writes(
    weights: ExpertWeights,
    writes: Sequence[LayerWrites],
    arrived: Mapping[tuple[int, int], Row],
    first_slot: int,
    spare: Tensor | None,
) -> None:
    """Overwrite slots: allocates nothing, waits for nobody.

    Args:
        weights: written.
        writes: of all layers of a part.
        arrived: for (layer, slot of all) the row for it; slots that take the same row share one entry.
        first_slot: the first of this rank's slots.
        spare: uint8 memory for the largest row of the layers that need some.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for layer_writes in writes:
        layer = layer_writes.layer
        _copy_locally(weights, layer, layer_writes.copies, spare)
        row_of = {
            src: arrived[layer, first_slot + slot]
            for slot, src in layer_writes.sources.items()
            if (layer, first_slot + slot) in arrived
        }
        rows = weights.rows(layer)
        for slot, src in layer_writes.sources.items():
            targets += [views[slot] for views in rows]
            sources += row_of[src]
    copy_rows(targets, sources)


def _copy_locally(weights: ExpertWeights, layer: int, copies: Sequence[Copy], spare: Tensor | None) -> None:
    rows = weights.rows(layer)
    aside = row_views(spare, weights, layer) if spare is not None else []
    for copy in copies:
        target = aside if copy.saves else [views[copy.dst] for views in rows]
        source = aside if copy.restores else [views[copy.src] for views in rows]
        copy_rows(target, source)
