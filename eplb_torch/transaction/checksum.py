"""Checksums of rows, computed where the rows are."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHECKSUM_BYTES = 16

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def checksum_rows(rows: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Two sums over the 64-bit words of each row, the second weighted by position, modulo `2**64`.

    The first differs if any single word does, the second if words have changed places. Guards against broken
    links, not against an adversary.

    Args:
        rows: tensors of each row, in the same order on both sides; any dtype and layout.
        device: of the result.

    Returns:
        int64 `[rows, 2]`.
    """
    sums = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)
    for total, row in zip(sums.unbind(0), rows, strict=True):
        for tensor in row:
            words = _words(tensor)
            places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
            total[0] += words.sum()
            # An odd factor between tensors, so that equal tensors that change places are noticed.
            total[1] = total[1] * 1000003 + (words * places).sum()
    return sums


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int64 `[words]`, of the widest words that divide them."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    size = next(s for s in _WORDS if flat.numel() % s == 0 and flat.storage_offset() % s == 0 or s == 1)
    return flat.view(_WORDS[size]).to(torch.int64)
