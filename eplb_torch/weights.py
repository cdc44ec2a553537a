"""The complete set of per-expert tensors that must move together."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eplb_core._checks import check_kind, listing, require
from eplb_torch.registration import find_slot_tensors

ALIGNMENT = 16  # bytes; a piece of a packed buffer can then be viewed as any dtype

Refresh = Callable[[int, tuple[int, ...]], None]
"""Called as `refresh(layer, local_slots)` after these slots took other experts, to bring derived tensors up to date."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of an expert, and how its rows travel.

    name: as registered.
    dtype, shape: of one row.
    num_bytes: of one row.
    flat: rows are contiguous: they travel as they lie in memory. Others are copied to a contiguous buffer first.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    flat: bool


class ExpertWeights:
    """Per layer, every tensor that belongs to the experts of this rank, row by slot.

    A slot's expert is its row of *all* the tensors: a scale or a bias that is not registered stays behind when the
    expert moves, which corrupts the model without an error. Tensors are used in place; nothing is copied here. A
    parameter whose `.data` is replaced later must be registered anew.

    Args:
        layers: per layer a mapping of names to tensors `[slots_per_rank, ...]` of any dtype. Names, dtypes and
            shapes may differ between layers, but not between ranks. Rows may be laid out in any order (transposed,
            sliced), as long as no two elements share memory.

    Raises:
        EplbError: if a layer is empty, a tensor has no slot dimension or another number of slots than the first,
            tensors are on several devices, or elements share memory.

    >>> weights = ExpertWeights([{"up": torch.zeros(3, 4, 2), "scale": torch.zeros(3)}])
    >>> weights.num_layers, weights.slots_per_rank, weights.row_bytes(0)
    (1, 3, 48)
    """

    def __init__(self, layers: Sequence[Mapping[str, Tensor]]):
        check_kind(layers, (list, tuple), "ExpertWeights(layers=...)")
        for layer in layers:
            check_kind(layer, Mapping, "ExpertWeights(layers=[layer])")
            for name, tensor in layer.items():
                check_kind(name, str, "ExpertWeights(layers=[{name: ...}])")
                check_kind(tensor, Tensor, "ExpertWeights(layers=[{...: tensor}])")
        self.layers: tuple[dict[str, Tensor], ...] = tuple(dict(layer) for layer in layers)
        require(
            len(self.layers) > 0 and all(self.layers),
            "`ExpertWeights(layers=...)` needs at least one tensor in every layer",
            f"tensors per layer {listing(len(layer) for layer in self.layers)}",
            "List MoE layers only, and register all per-expert tensors of each.",
        )
        self.slots_per_rank = _common_slots(self.layers)
        self.device = _common_device(self.layers)
        _refuse_shared_memory(self.layers)
        self._fields = tuple(_describe(layer) for layer in self.layers)
        self._rows: dict[int, tuple[tuple[Tensor, ...], ...]] = {}
        self._refreshes: list[Refresh] = []

    @classmethod
    def from_module(
        cls, module: nn.Module, layers: Sequence[str], *, slots_per_rank: int, exclude: Collection[str] = ()
    ) -> "ExpertWeights":
        """Register every tensor of the experts modules of a model, or refuse if it is not clear what one is.

        A tensor is a parameter, a buffer, or a plain attribute of the module or of a module in it, also inside
        lists, tuples and dicts: quantised weights tend to leave the registered parameters. Each must have
        `slots_per_rank` as its first dimension, or be excluded.

        Args:
            module: the model, or the part of it that has the layers.
            layers: path in `module` of the experts module of each MoE layer, in the order of the placement's rows.
            slots_per_rank: experts that this rank holds in each.
            exclude: names, within an experts module, of tensors that all experts share; may hold `*` and `?`.

        Returns:
            `ExpertWeights` whose names are the paths within each experts module.

        Raises:
            EplbError: listing tensors that are neither per slot nor excluded, modules that do not exist, and names
                in `exclude` that match nothing.

        >>> experts = nn.Module()
        >>> experts.up = nn.Parameter(torch.zeros(2, 4))
        >>> experts.register_buffer("scale", torch.ones(2))
        >>> weights = ExpertWeights.from_module(nn.ModuleDict({"moe": experts}), ["moe"], slots_per_rank=2)
        >>> sorted(weights.layers[0])
        ['scale', 'up']
        """
        return cls(find_slot_tensors(module, layers, slots_per_rank, exclude))

    def replaced(self, layers: Sequence[Mapping[str, Tensor]]) -> "ExpertWeights":
        """Register other tensors instead of these, such as larger ones; what `add_refresh` registered stays so.

        Raises:
            EplbError: as the constructor, or if names, dtypes or shapes of rows differ from these.
        """
        weights = ExpertWeights(layers)
        require(
            weights.layout() == self.layout(),
            "`ExpertWeights.replaced(layers=...)` must have the same tensors, but for their number of slots",
            "others",
            "Build new ExpertWeights where the tensors of an expert change.",
        )
        weights._refreshes = self._refreshes
        return weights

    @property
    def num_layers(self) -> int:
        """MoE layers registered."""
        return len(self.layers)

    def fields(self, layer: int) -> tuple[Field, ...]:
        """The tensors of one layer that have any bytes, in the order in which they travel: by name."""
        return self._fields[layer]

    def row_bytes(self, layer: int) -> int:
        """Bytes that one expert of a layer takes in a buffer, at most: each tensor is padded to 16."""
        return sum(aligned(field.num_bytes) for field in self._fields[layer])

    def layout(self) -> str:
        """Names, dtypes, row shapes and ways of travel of all layers: equal on all ranks, or rows would be misread."""
        return repr([[(f.name, str(f.dtype), f.shape, f.flat) for f in layer] for layer in self._fields])

    def rows(self, layer: int) -> tuple[tuple[Tensor, ...], ...]:
        """Views of one layer's rows, `[fields][slots]`: uint8 `[num_bytes]` of flat fields, else the row itself."""
        if layer not in self._rows:
            tensors = self.layers[layer]
            self._rows[layer] = tuple(_row_views(tensors[field.name], field) for field in self._fields[layer])
        return self._rows[layer]

    def add_refresh(self, refresh: Refresh) -> None:
        """Have `refresh(layer, local_slots)` called after every commit, on the thread and stream of the commit.

        For tensors that are computed from registered ones, such as fused or cached scales, and need not travel.
        What it raises reaches the caller of the commit, after all rows of the group are in place.
        """
        self._refreshes.append(refresh)

    def refresh(self, layer: int, local_slots: tuple[int, ...]) -> None:
        """Call what `add_refresh` registered."""
        for refresh in self._refreshes:
            refresh(layer, local_slots)


def aligned(num_bytes: int) -> int:
    """Round up to a multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _describe(layer: Mapping[str, Tensor]) -> tuple[Field, ...]:
    fields = []
    for name in sorted(layer):
        tensor = layer[name]
        shape = tuple(tensor.shape[1:])
        num_bytes = math.prod(shape) * tensor.element_size()
        if num_bytes:
            fields.append(Field(name, tensor.dtype, shape, num_bytes, tensor[0].is_contiguous()))
    return tuple(fields)


def _row_views(tensor: Tensor, field: Field) -> tuple[Tensor, ...]:
    rows = tensor.detach().unbind(0)
    return tuple(row.reshape(-1).view(torch.uint8) for row in rows) if field.flat else rows


def _common_slots(layers: Sequence[Mapping[str, Tensor]]) -> int:
    shapes = {(i, name): tuple(tensor.shape) for i, layer in enumerate(layers) for name, tensor in layer.items()}
    scalars = [key for key, shape in shapes.items() if not shape]
    require(
        not scalars,
        "`ExpertWeights(layers=...)` takes tensors whose first dimension is the slot",
        f"tensors without dimensions at (layer, name) {listing(scalars)}",
        "Leave out tensors that all experts share.",
    )
    slots_per_rank = next(iter(shapes.values()))[0]
    odd = [(*key, shape) for key, shape in shapes.items() if shape[0] != slots_per_rank]
    require(
        not odd and slots_per_rank >= 1,
        "`ExpertWeights(layers=...)` needs the same number of slots >= 1 in the first dimension of every tensor",
        f"slots_per_rank={slots_per_rank} in the first tensor and (layer, name, shape) {listing(odd)}",
        "Leave out tensors that are not per expert; transpose those whose expert dimension is not the first.",
    )
    return slots_per_rank


def _common_device(layers: Sequence[Mapping[str, Tensor]]) -> torch.device:
    devices = {tensor.device for layer in layers for tensor in layer.values()}
    require(
        len(devices) == 1 and not any(device.type == "meta" for device in devices),
        "`ExpertWeights(layers=...)` needs all tensors on one real device",
        f"devices {listing(sorted(map(str, devices)))}",
        "Move the layers to this rank's device first.",
    )
    return devices.pop()


def _refuse_shared_memory(layers: Sequence[Mapping[str, Tensor]]) -> None:
    seen: dict[int, tuple] = {}
    for index, layer in enumerate(layers):
        for name, tensor in layer.items():
            if tensor.numel() == 0:
                continue
            require(
                not any(stride == 0 < size - 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)),
                "`ExpertWeights(layers=...)` needs tensors in which every element has its own memory",
                f"(layer, name) {(index, name)} with shape {tuple(tensor.shape)} and strides {tensor.stride()}",
                "Call `.contiguous()` on expanded tensors before the model uses them.",
            )
            first = seen.setdefault(tensor.data_ptr(), (index, name))
            require(
                first == (index, name),
                "`ExpertWeights(layers=...)` needs tensors that do not share memory",
                f"(layer, name) {first} and {(index, name)} start at the same address",
                "Register each tensor once: moving its rows twice would undo the move.",
            )
