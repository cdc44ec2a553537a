"""The complete set of per-expert tensors that must move together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_core._checks import listing, require

_ALIGNMENT = 16  # bytes; a row's piece of a packed buffer can then be viewed as any dtype


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of an expert, as it lies in a packed row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class ExpertWeights:
    """Per layer, every tensor that belongs to the experts of this rank, row by slot.

    A slot's expert is its row of *all* the tensors: a scale or a bias that is not registered stays behind when the
    expert moves, which corrupts the model without an error. Tensors are used in place; nothing is copied here.

    Args:
        layers: per layer a mapping of names to tensors `[slots_per_rank, ...]` of any dtype. Names, dtypes and
            shapes may differ between layers, but not between ranks.

    Raises:
        EplbError: if a layer is empty, a tensor has no slot dimension or another number of slots than the first,
            or two of the tensors share memory.

    >>> weights = ExpertWeights([{"up": torch.zeros(3, 4, 2), "scale": torch.zeros(3)}])
    >>> weights.num_layers, weights.slots_per_rank, weights.row_bytes(0)
    (1, 3, 48)
    """

    def __init__(self, layers: Sequence[Mapping[str, Tensor]]):
        self.layers: tuple[dict[str, Tensor], ...] = tuple(dict(layer) for layer in layers)
        require(
            len(self.layers) > 0 and all(self.layers),
            "`ExpertWeights(layers=...)` needs at least one tensor in every layer",
            f"tensors per layer {listing(len(layer) for layer in self.layers)}",
            "List MoE layers only, and register all per-expert tensors of each.",
        )
        self.slots_per_rank = _common_slots(self.layers)
        _refuse_shared_memory(self.layers)
        self._fields = tuple(_lay_out(layer) for layer in self.layers)

    @property
    def num_layers(self) -> int:
        """MoE layers registered."""
        return len(self.layers)

    def fields(self, layer: int) -> tuple[Field, ...]:
        """The tensors of one layer in the order in which they are packed: by name."""
        return self._fields[layer]

    def row_bytes(self, layer: int) -> int:
        """Bytes of one packed expert of a layer, with the padding between its tensors."""
        last = self._fields[layer][-1]
        return _aligned(last.start + last.num_bytes)

    def layout(self) -> str:
        """Names, dtypes and row shapes of all layers: equal on all ranks, or rows would be misread."""
        return repr(
            [[(field.name, str(field.dtype), field.shape) for field in layer] for layer in self._fields]
        )

    def pack_row(self, layer: int, slot: int, out: Tensor) -> None:
        """Copy one slot's expert into `out`, uint8 `[row_bytes]`."""
        for field in self._fields[layer]:
            row = self.layers[layer][field.name][slot]
            _piece(out, field).copy_(row)

    def unpack_row(self, layer: int, slot: int, packed: Tensor) -> None:
        """Overwrite one slot's expert with `packed`, uint8 `[row_bytes]`."""
        with torch.no_grad():
            for field in self._fields[layer]:
                self.layers[layer][field.name][slot].copy_(_piece(packed, field))

    def copy_row(self, layer: int, src_slot: int, dst_slot: int) -> None:
        """Overwrite one local slot's expert with another's."""
        with torch.no_grad():
            for tensor in self.layers[layer].values():
                tensor[dst_slot].copy_(tensor[src_slot])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _lay_out(layer: Mapping[str, Tensor]) -> tuple[Field, ...]:
    fields, start = [], 0
    for name in sorted(layer):
        tensor = layer[name]
        shape = tuple(tensor.shape[1:])
        num_bytes = shape_size(shape) * tensor.element_size()
        fields.append(Field(name, tensor.dtype, shape, start, num_bytes))
        start = _aligned(start + num_bytes)
    return tuple(fields)


def shape_size(shape: Sequence[int]) -> int:
    """Elements of an array of this shape."""
    size = 1
    for extent in shape:
        size *= extent
    return size


def _piece(packed: Tensor, field: Field) -> Tensor:
    """The part of a packed row that belongs to one tensor, in that tensor's dtype and shape."""
    return packed[field.start : field.start + field.num_bytes].view(field.dtype).view(field.shape)


def _common_slots(layers: Sequence[Mapping[str, Tensor]]) -> int:
    shapes = {
        (i, name): tuple(tensor.shape) for i, layer in enumerate(layers) for name, tensor in layer.items()
    }
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


def _refuse_shared_memory(layers: Sequence[Mapping[str, Tensor]]) -> None:
    seen: dict[tuple, tuple] = {}
    for index, layer in enumerate(layers):
        for name, tensor in layer.items():
            if tensor.numel() == 0:
                continue
            key = (str(tensor.device), tensor.data_ptr())
            require(
                key not in seen,
                "`ExpertWeights(layers=...)` needs tensors that do not share memory",
                f"(layer, name) {seen.get(key)} and {(index, name)} start at the same address",
                "Register each tensor once: moving its rows twice would undo the move.",
            )
            seen[key] = (index, name)
