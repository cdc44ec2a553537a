"""Logical top-k ids to slot ids, spread evenly over the entries of each expert's maps, and token counts."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core import EMPTY, ExpertMaps
from eplb_core._checks import MOST_EXPERTS, check_kind, require, shown
from eplb_torch.device_maps import DeviceMaps, LayerMaps

_INTEGERS = (torch.int32, torch.int64)

__all__ = ("DeviceMaps", "LayerMaps", "count_tokens", "mask_padding", "select_slots")


def select_slots(
    topk_ids: Int[Tensor, "*tokens"],
    maps: LayerMaps | ExpertMaps,
    *,
    offset: int | Int[Tensor, "*logical"] = 0,
    unpadded: int | Tensor | None = None,
) -> Int[Tensor, "*tokens"]:
    """Choose a slot for every (token, expert) pair, such that the copies of an expert share its tokens evenly.

    The n-th occurrence of an expert in the flattened ids goes to its copy `(offset + n) % replica_count`, so the
    tokens that any two copies get from one call differ by at most one, for any number of tokens and any k. Where
    maps were made with shares, each copy gets its share, to within two tokens, or one with offset 0.
    One stable sort, `O(n log n)`; no host synchronisation, no data-dependent shape, no randomness.

    Args:
        topk_ids: int32 or int64, any shape; ids outside `0..logical-1` are padding.
        maps: the maps of this layer. `ExpertMaps` of one layer from `derive_maps` do too, but are copied to the
            device at every call.
        offset: the copy that takes an expert's first token, counted modulo its copies: an integer, or an integer
            tensor of shape `[]` or `[logical]`. Ranks that pass their ep_rank do not all begin with the same copy;
            adding the tokens counted so far, `[logical]`, evens out the copies over many calls too.
        unpadded: the tokens that are not padding, as for `mask_padding`; by default all.

    Returns:
        Slot ids with the shape and dtype of `topk_ids`; `EMPTY` for padding and for experts without a copy. Where
        padding is makes no difference to the other tokens.

    >>> maps = LayerMaps(torch.tensor([[0, 2], [1, -1]]), torch.tensor([2, 1]))
    >>> select_slots(torch.tensor([[0, 1], [0, -1], [0, 1]]), maps).tolist()
    [[0, 1], [2, -1], [0, 1]]
    """
    return select_and_count(mask_padding(topk_ids, unpadded), maps, offset)[0]


def select_and_count(
    topk_ids: Int[Tensor, "*tokens"], maps: LayerMaps | ExpertMaps, offset: int | Int[Tensor, "*logical"]
) -> tuple[Int[Tensor, "*tokens"], Int[Tensor, " logical"]]:
    """As `select_slots`, and what `count_tokens` says of the ids, which it has counted anyway."""
    _check_ids(topk_ids, "topk_ids")
    _check_maps(maps, offset)
    slots_of = _tensor(maps.logical_to_physical, topk_ids.device)
    replica_count = _tensor(maps.replica_count, topk_ids.device)
    num_logical = replica_count.shape[0]
    ids = topk_ids.reshape(-1).long()
    padding = _is_padding(ids, num_logical)
    expert = torch.where(padding, 0, ids)
    if isinstance(offset, Tensor) and offset.ndim == 1:
        offset = offset[expert]
    # An expert without copies has only EMPTY entries, so any replica will do.
    count = replica_count[expert].clamp(min=1)
    occurrence, counts = _occurrence(torch.where(padding, num_logical, ids), num_logical)
    slots = torch.where(padding, EMPTY, slots_of[expert, (occurrence + offset) % count])
    return slots.to(topk_ids.dtype).reshape(topk_ids.shape), counts[:num_logical]


def mask_padding(topk_ids: Int[Tensor, "*tokens"], unpadded: int | Tensor | None) -> Int[Tensor, "*tokens"]:
    """Replace the ids of padding tokens by `EMPTY`, which is sent nowhere and not counted.

    Args:
        topk_ids: int32 or int64 `[tokens, ...]`.
        unpadded: how many leading tokens are real, as an integer or an integer tensor of one element; or a bool
            mask of the real ones, of the leading dimensions of `topk_ids`. None masks nothing. A tensor may be
            filled anew between replays of a captured graph.

    Returns:
        Ids of the same shape and dtype.

    Raises:
        EplbError: if the shape of `unpadded` does not fit, or it is neither bool nor integer.

    >>> mask_padding(torch.tensor([[0, 1], [2, 0]]), 1).tolist()
    [[0, 1], [-1, -1]]
    """
    _check_ids(topk_ids, "topk_ids")
    if unpadded is None:
        return topk_ids
    real = unpadded
    if _is_count(unpadded) and topk_ids.ndim:
        real = torch.arange(topk_ids.shape[0], device=topk_ids.device) < unpadded
    require(
        isinstance(real, Tensor) and real.dtype == torch.bool and topk_ids.shape[: real.ndim] == real.shape,
        "`unpadded` must be a number of leading tokens, or a bool mask of leading dimensions of `topk_ids`",
        f"{_describe(unpadded)} for ids of shape {tuple(topk_ids.shape)}",
        "Count or mask tokens, in the shape in which the ids are passed.",
    )
    assert isinstance(real, Tensor)
    return torch.where(real.reshape(*real.shape, *[1] * (topk_ids.ndim - real.ndim)), topk_ids, EMPTY)


def count_tokens(ids: Int[Tensor, "*tokens"], num_ids: int) -> Int[Tensor, " num_ids"]:
    """Count how often each of `0..num_ids-1` occurs: the load of experts or, given slot ids, of slots.

    Exact and without host synchronisation. Ids out of range, `EMPTY` among them, are padding and not counted.

    Returns:
        `[num_ids]` int64.

    >>> count_tokens(torch.tensor([[0, 2], [2, -1]]), num_ids=3).tolist()
    [1, 0, 2]
    """
    _check_ids(ids, "ids")
    if not isinstance(num_ids, (int, np.integer)) or isinstance(num_ids, bool) or not 0 <= num_ids <= MOST_EXPERTS:
        require(False, f"`num_ids` must be an integer 0..{MOST_EXPERTS}", shown(num_ids), "Count experts, or slots.")
    flat = ids.reshape(-1).long()
    return _counts(torch.where(_is_padding(flat, num_ids), num_ids, flat), num_ids)[:num_ids]


def _tensor(x: Any, device: torch.device) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)).to(device)


def _check_ids(ids: Any, name: str) -> None:
    # Nothing is formatted unless it is refused: this runs for every layer of every forward.
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        what = str(ids.dtype) if isinstance(ids, Tensor) else shown(ids)
        require(False, f"`{name}` must be a tensor of integers", what, "Pass the ids that the router chose.")


def _check_maps(maps: Any, offset: Any) -> None:
    check_kind(maps, (LayerMaps, ExpertMaps), "select_slots(maps=...)")
    if maps.logical_to_physical.ndim != 2 or maps.replica_count.ndim != 1:
        shape = tuple(maps.logical_to_physical.shape)
        require(False, "`select_slots(maps=...)` must be of one layer", f"shape={shape}", "Pass those of this layer.")
    if isinstance(offset, Tensor):
        good = offset.dtype in _INTEGERS and offset.ndim <= 1
    else:
        good = isinstance(offset, (int, np.integer)) and not isinstance(offset, bool) and -(2**62) < offset < 2**62
    if not good:
        advice = "Give one for all experts, or one for each."
        require(False, "`select_slots(offset=...)` must be integer, of shape [] or [logical]", shown(offset), advice)


def _is_count(unpadded: int | Tensor) -> bool:
    if not isinstance(unpadded, Tensor):
        return isinstance(unpadded, int) and not isinstance(unpadded, bool) and 0 <= unpadded < 2**31
    return unpadded.numel() == 1 and unpadded.dtype in (torch.int32, torch.int64)


def _describe(unpadded: int | Tensor) -> str:
    return f"{unpadded.dtype} {tuple(unpadded.shape)}" if isinstance(unpadded, Tensor) else shown(unpadded)


def _is_padding(ids: Tensor, num_ids: int) -> Tensor:
    return (ids < 0) | (ids >= num_ids)


def _counts(keys: Tensor, last: int) -> Tensor:
    """`[last + 1]` how often each of `0..last` occurs in `keys`."""
    return keys.new_zeros(last + 1).scatter_add_(0, keys, torch.ones_like(keys))


def _occurrence(keys: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """How many entries before each one are equal to it, for keys `0..last`; and the counts of the keys."""
    ordered, order = torch.sort(keys, stable=True)
    counts = _counts(keys, last)
    first = counts.cumsum(0) - counts
    position = torch.arange(keys.shape[0], device=keys.device) - first[ordered]
    return torch.empty_like(position).scatter_(0, order, position), counts
