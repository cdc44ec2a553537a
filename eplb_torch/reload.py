"""Load new weights into a model whose experts have moved: after a checkpoint, or while it is trained elsewhere.

A checkpoint names logical experts. Once experts have moved, a loader that goes by the placement it started with writes
each into a slot of another, while the router follows the live one: every shape fits and the model is wrong. And rows
that a rearrangement has under way are of the old weights, and would be committed over the new ones.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core import EMPTY, Topology, check_placement
from eplb_core._checks import check_count, check_kind, host_array, listing, require, shown
from eplb_torch.weights import ExpertWeights

ReadRow = Callable[[int, str, int], Tensor]
"""`(layer, name of a registered tensor, logical expert) -> [...]`: the new row of that expert."""

Rows = Iterable[tuple[int, str, int, Tensor]]
"""`(layer, name of a registered tensor, logical expert, row)`, of any experts, in any order."""


def held_experts(
    physical_to_logical: Int[Any, "layers slots"], topology: Topology, ep_rank: int
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """Tell which slots of a rank hold which expert, for each layer, for loaders that write rows themselves.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force.
        topology: sizes of the placement.
        ep_rank: the rank.

    Returns:
        Per layer the local slots, `0..slots_per_rank-1`, of every expert that the rank holds.

    Raises:
        EplbError: if the placement does not fit the topology, or `ep_rank` is not of it.

    >>> import numpy as np
    >>> held_experts(np.asarray([[0, 2, 1, 1], [2, 1, 1, 0]]), Topology(ep_size=2, slots_per_rank=2), ep_rank=1)
    ({1: (0, 1)}, {1: (0,), 0: (1,)})
    """
    ids = host_array(physical_to_logical)
    check_placement(ids, topology, allow_lost=True)
    ep_rank = check_count(ep_rank, "held_experts(ep_rank=...)", 0, topology.ep_size - 1, "Count ranks from 0.")
    first = ep_rank * topology.slots_per_rank
    found = []
    for row in ids[:, first : first + topology.slots_per_rank].tolist():
        slots: dict[int, tuple[int, ...]] = {}
        for slot, expert in enumerate(row):
            if expert != EMPTY:
                slots[expert] = (*slots.get(expert, ()), slot)
        found.append(slots)
    return tuple(found)


class ExpertReload:
    """New weights for the experts of one rank, row by row as they arrive, into the slots that hold them now.

        with ExpertReload(weights, placement, topology, ep_rank, in_flight=lambda: balancer.in_flight) as reload:
            for layer, name, expert, row in checkpoint:
                reload.write(layer, name, expert, row)

    The end of the context checks that every registered tensor of every held expert has come, then has derived tensors
    refreshed. Rows are written at once and in place, so stop serving before: until the end, old and new ones mix, and
    after an error they still do. Then write what is missing and call `finish`, or reload from the start.

    Writes are ordered by the current stream, as the forwards are.

    Args:
        weights: this rank's slots.
        physical_to_logical: `[layers, slots]` the placement in force, on all ranks.
        topology: sizes of the placement.
        ep_rank: this rank.
        names: tensors that the reload brings; by default all that are registered. Those left out must not depend on
            the new ones, or be refreshed.
        in_flight: says whether a rearrangement is under way; asked at the start, at every row and at the end. Drain
            it first, and take the placement afterwards.

    Raises:
        EplbError: if a rearrangement is under way, weights, placement and topology do not fit each other, or a name
            is not registered in any layer.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        physical_to_logical: Int[Any, "layers slots"],
        topology: Topology,
        ep_rank: int,
        *,
        names: Collection[str] | None = None,
        in_flight: Callable[[], bool] | None = None,
    ):
        check_kind(weights, ExpertWeights, "ExpertReload(weights=...)")
        check_kind(in_flight, (Callable, type(None)), "ExpertReload(in_flight=...)")
        self._weights, self._in_flight = weights, in_flight
        self._check_still()
        self._slots = held_experts(physical_to_logical, topology, ep_rank)
        require(
            (weights.num_layers, weights.slots_per_rank) == (len(self._slots), topology.slots_per_rank),
            "`ExpertReload` needs weights of the placement's layers and slots",
            f"{weights.num_layers} layers of {weights.slots_per_rank} slots for {len(self._slots)} of "
            f"{topology.slots_per_rank}",
            "Pass the placement in force, and the topology that it is for.",
        )
        registered = {name for layer in weights.layers for name in layer}
        check_kind(names, (set, frozenset, list, tuple, Mapping, type(None)), "ExpertReload(names=...)")
        for name in names or ():
            check_kind(name, str, "ExpertReload(names=[name])")
        self._names = registered if names is None else set(names)
        require(
            self._names <= registered,
            "`ExpertReload(names=...)` must be registered tensors",
            f"{listing(self._names - registered)}",
            f"Choose from {listing(sorted(registered))}.",
        )
        self._missing = {
            (layer, field.name, expert)
            for layer, slots in enumerate(self._slots)
            for field in weights.fields(layer)
            if field.name in self._names
            for expert in slots
        }
        self._written: set[tuple[int, str, int]] = set()

    def __enter__(self) -> "ExpertReload":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.finish()

    @property
    def missing(self) -> list[tuple[int, str, int]]:
        """What has not come yet, as sorted `(layer, name, expert)`."""
        return sorted(self._missing)

    def write(self, layer: int, name: str, expert: int, row: Tensor) -> tuple[int, ...]:
        """Write the new row of an expert into every slot of this rank that holds it.

        Args:
            layer: of the placement.
            name: of a registered tensor.
            expert: logical expert; those that this rank does not hold are passed over.
            row: of the shape and dtype of the tensor's rows, on any device.

        Returns:
            The local slots written to; none if this rank does not hold the expert.

        Raises:
            EplbError: if there is no such tensor, the row does not fit, the expert has come already, or a
                rearrangement is under way. Nothing is written then.
        """
        self._check_still()
        check_kind(row, Tensor, "ExpertReload.write(row=...)")
        expert = check_count(expert, "ExpertReload.write(expert=...)", 0, advice="Count experts from 0.")
        key, tensor = (layer, name, expert), self._tensor(layer, name)
        require(
            (row.shape, row.dtype) == (tensor.shape[1:], tensor.dtype) and expert >= 0,
            "`ExpertReload.write(row=...)` must have the shape and dtype of the tensor's rows, and expert be >= 0",
            f"{tuple(row.shape)} {row.dtype} for {key}, where rows are {tuple(tensor.shape[1:])} {tensor.dtype}",
            "Convert and slice the row as when the model was first loaded.",
        )
        slots = self._slots[layer].get(expert, ())
        require(
            key not in self._written,
            "`ExpertReload.write` takes every row once",
            f"(layer, name, expert) {key} again",
            "Make a new ExpertReload for the next weights.",
        )
        with torch.no_grad():
            for slot in slots:
                tensor[slot].copy_(row)
        if slots:
            self._written.add(key)
            self._missing.discard(key)
        return slots

    def finish(self) -> None:
        """Check that nothing is missing, and have derived tensors refreshed.

        Raises:
            EplbError: listing what has not come, or if a rearrangement is under way.
        """
        self._check_still()
        require(
            not self._missing,
            "a reload must bring every tensor of every expert that the rank holds",
            f"no (layer, name, expert) {listing(self.missing)}",
            "Write them and call `finish`; the model holds old and new weights until then.",
        )
        for layer, slots in enumerate(self._slots):
            held = tuple(sorted(slot for local in slots.values() for slot in local))
            if held:
                self._weights.refresh(layer, held)

    def _tensor(self, layer: int, name: str) -> Tensor:
        known = layer in range(self._weights.num_layers) and name in self._weights.layers[layer]
        require(
            known and name in self._names,
            "`ExpertReload.write` takes tensors that are registered, and named if names were given",
            f"(layer, name) {(layer, name)}",
            f"There are {self._weights.num_layers} layers, with {listing(sorted(self._names))}.",
        )
        return self._weights.layers[layer][name]

    def _check_still(self) -> None:
        require(
            self._in_flight is None or not self._in_flight(),
            "weights must not be reloaded while a rearrangement is under way",
            "one that is",
            "Drain it first on all ranks, and reload into the placement that is in force then.",
        )


def reload_experts(
    weights: ExpertWeights,
    physical_to_logical: Int[Any, "layers slots"],
    topology: Topology,
    ep_rank: int,
    source: ReadRow | Rows,
    *,
    names: Collection[str] | None = None,
    in_flight: Callable[[], bool] | None = None,
) -> None:
    """Load new weights for all experts of a rank into the slots that hold them now; see `ExpertReload`.

    Args:
        weights, physical_to_logical, topology, ep_rank, names, in_flight: as for `ExpertReload`.
        source: a function `(layer, name, expert) -> row`, called once for each tensor of each held expert; or an
            iterable of `(layer, name, expert, row)`, such as a stream that all ranks get.

    Raises:
        EplbError: as `ExpertReload`. Old and new weights are mixed then, unless it was refused at the start.
    """
    with ExpertReload(weights, physical_to_logical, topology, ep_rank, names=names, in_flight=in_flight) as reload:
        if callable(source):
            for layer, name, expert in reload.missing:
                reload.write(layer, name, expert, source(layer, name, expert))
        else:
            check_kind(source, Iterable, "reload_experts(source=...)")
            for row in source:
                require(
                    isinstance(row, tuple | list) and len(row) == 4,
                    "`reload_experts(source=...)` must give (layer, name, expert, row)",
                    f"{type(row).__name__} {shown(row)}",
                    "Or pass a function that reads a row.",
                )
                reload.write(*row)
