"""Rows that one rank sends to another at one time: where their bytes lie, and which messages they make."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_torch.staging import Staging
from eplb_torch.transaction.checksum import CHECKSUM_BYTES, checksum_rows
from eplb_torch.weights import ExpertWeights, Field, aligned

Row = Sequence[Tensor]
"""One expert: for each field uint8 `[num_bytes]` if it is flat, else a tensor of the field's dtype and shape."""


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How rows become messages; equal on all ranks.

    direct_bytes: flat fields of at least so many bytes are sent from and received where they lie, each row a message
        of its own. All other bytes of a parcel are packed into one message.
    checksum: send a checksum along with each row.
    """

    direct_bytes: int
    checksum: bool

    def is_direct(self, field: Field) -> bool:
        """Whether rows of a field are messages of their own."""
        return field.flat and field.num_bytes >= self.direct_bytes


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive rows of one field of one layer, `[num_rows, field.num_bytes]` from `start` in the buffer."""

    index: int
    field: Field
    first_row: int
    num_rows: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows * self.field.num_bytes

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        rows = buffer[self.start : self.end].view(self.num_rows, self.field.num_bytes)
        if not self.field.flat:
            rows = rows.view(-1).view(self.field.dtype).view(self.num_rows, *self.field.shape)
        return rows.unbind(0)


class Parcel:
    """The rows of one pair of ranks in one batch. Both sides lay it out alike.

    The buffer holds, layer by layer and field by field, the rows of all packed fields, then the checksums; these are
    one message. The rows of direct fields follow, and only the receiver has memory for them.

    Args:
        weights: for the fields of each layer.
        layers: the layer of each row, ascending.
        wire: the format.
    """

    def __init__(self, weights: ExpertWeights, layers: Sequence[int], wire: WireFormat):
        self.wire, self.num_rows, self.device = wire, len(layers), weights.device
        self._num_fields = [len(weights.fields(layer)) for layer in layers]
        self._packed, end = _lay_out(weights, layers, wire, False, 0)
        self._checksums = slice(end, end + CHECKSUM_BYTES * self.num_rows if wire.checksum else end)
        self.packed_bytes = self._checksums.stop
        self._direct, self.num_bytes = _lay_out(weights, layers, wire, True, aligned(self.packed_bytes))

    def send_from(self, rows: Sequence[Row], staging: Staging) -> list[Tensor]:
        """The messages, in order. Packs what is packed; direct rows are the given tensors themselves."""
        messages = []
        if self.packed_bytes:
            packed = staging.take(self.packed_bytes)
            checksums = [checksum_rows(rows, self.device).view(-1).view(torch.uint8)] if self.wire.checksum else []
            torch.cat(self._pieces(rows) + checksums, out=packed)
            messages.append(packed)
        for block in self._direct:
            messages += [row[block.index] for row in rows[block.first_row : block.first_row + block.num_rows]]
        return messages

    def receive_into(self, staging: Staging) -> tuple[list[Tensor], "Arrival"]:
        """The buffers of the messages, in order, and what to read from them once they are filled."""
        buffer = staging.take(self.num_bytes)
        messages = [buffer[: self.packed_bytes]] if self.packed_bytes else []
        rows: list[list] = [[None] * count for count in self._num_fields]
        for block in (*self._packed, *self._direct):
            for row, view in zip(rows[block.first_row :], block.views(buffer), strict=False):
                row[block.index] = view
        for block in self._direct:
            messages += [row[block.index] for row in rows[block.first_row : block.first_row + block.num_rows]]
        checksums = buffer[self._checksums].view(torch.int64).view(-1, 2) if self.wire.checksum else None
        return messages, Arrival(rows, checksums)

    def _pieces(self, rows: Sequence[Row]) -> list[Tensor]:
        pieces, end = [], 0
        for block in self._packed:
            if block.start > end:
                pieces.append(torch.zeros(block.start - end, dtype=torch.uint8, device=self.device))
            views = [row[block.index] for row in rows[block.first_row : block.first_row + block.num_rows]]
            pieces += views if block.field.flat else [_bytes_of(view) for view in views]
            end = block.end
        if self._checksums.start > end:
            pieces.append(torch.zeros(self._checksums.start - end, dtype=torch.uint8, device=self.device))
        return pieces


@dataclass(frozen=True, slots=True)
class Arrival:
    """Rows of one parcel in staging memory, and the checksums that came with them, int64 `[rows, 2]`, or None."""

    rows: Sequence[Row]
    checksums: Tensor | None

    def damaged(self) -> list[int]:
        """Positions of the rows whose bytes are not those that were sent."""
        if self.checksums is None:
            return []
        wrong = (checksum_rows(self.rows, self.checksums.device) != self.checksums).any(dim=1)
        return wrong.nonzero().view(-1).tolist()


def copy_rows(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, of the same dtype and shape; no target is also a source."""
    if not targets:
        return
    with torch.no_grad():
        if targets[0].device.type == "cpu":
            # Torch copies bytes one element at a time on the CPU; NumPy moves blocks.
            for target, source in zip(targets, sources, strict=True):
                if target.dtype == torch.uint8:
                    target.numpy()[...] = source.numpy()
                else:
                    target.copy_(source)
        else:
            torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def _bytes_of(row: Tensor) -> Tensor:
    return row.contiguous().view(-1).view(torch.uint8)


def _lay_out(
    weights: ExpertWeights, layers: Sequence[int], wire: WireFormat, direct: bool, start: int
) -> tuple[list[_Block], int]:
    blocks, first = [], 0
    while first < len(layers):
        layer = layers[first]
        num_rows = sum(1 for other in layers[first:] if other == layer)
        for index, field in enumerate(weights.fields(layer)):
            if wire.is_direct(field) == direct:
                blocks.append(_Block(index, field, first, num_rows, start))
                start = aligned(blocks[-1].end)
        first += num_rows
    return blocks, start


def row_views(buffer: Tensor, weights: ExpertWeights, layer: int) -> list[Tensor]:
    """Memory for one expert of a layer, at the start of a buffer of its `row_bytes` or more."""
    row, start = [], 0
    for field in weights.fields(layer):
        piece = buffer[start : start + field.num_bytes]
        row.append(piece if field.flat else piece.view(field.dtype).view(field.shape))
        start += aligned(field.num_bytes)
    return row
