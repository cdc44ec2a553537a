"""Logical top-k ids to slot ids, spread evenly over the copies of each expert, and token counts."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core import EMPTY, ExpertMaps, derive_maps
from eplb_core._checks import require


class LayerMaps(NamedTuple):
    """Where the copies of each expert of one layer are, as tensors on the device of the tokens.

    logical_to_physical: int32 `[logical, max_replicas]` ascending slots, padded with `EMPTY`.
    replica_count: int32 `[logical]` live entries of `logical_to_physical`; 0 for a lost expert.
    """

    logical_to_physical: Tensor
    replica_count: Tensor


def select_slots(
    topk_ids: Int[Tensor, "*tokens"], maps: LayerMaps | ExpertMaps, *, offset: int | Int[Tensor, "*logical"] = 0
) -> Int[Tensor, "*tokens"]:
    """Choose a slot for every (token, expert) pair, such that the copies of an expert share its tokens evenly.

    The n-th occurrence of an expert in the flattened ids goes to its copy `(offset + n) % replica_count`, so the
    tokens that any two copies get from one call differ by at most one, for any number of tokens and any k.
    One stable sort, `O(n log n)`; no host synchronisation, no data-dependent shape, no randomness.

    Args:
        topk_ids: int32 or int64, any shape; ids outside `0..logical-1` are padding.
        maps: the maps of this layer. `ExpertMaps` of one layer from `derive_maps` do too, but are copied to the
            device at every call.
        offset: the copy that takes an expert's first token, counted modulo its copies: an integer, or an integer
            tensor of shape `[]` or `[logical]`. Ranks that pass their ep_rank do not all begin with the same copy;
            adding the tokens counted so far, `[logical]`, evens out the copies over many calls too.

    Returns:
        Slot ids with the shape and dtype of `topk_ids`; `EMPTY` for padding and for experts without a copy.

    >>> maps = LayerMaps(torch.tensor([[0, 2], [1, -1]]), torch.tensor([2, 1]))
    >>> select_slots(torch.tensor([[0, 1], [0, -1], [0, 1]]), maps).tolist()
    [[0, 1], [2, -1], [0, 1]]
    """
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
    replica = (_occurrence(torch.where(padding, num_logical, ids), num_logical) + offset) % count
    slots = torch.where(padding, EMPTY, slots_of[expert, replica])
    return slots.to(topk_ids.dtype).reshape(topk_ids.shape)


def _tensor(x: Any, device: torch.device) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)).to(device)


def count_tokens(ids: Int[Tensor, "*tokens"], num_ids: int) -> Int[Tensor, " num_ids"]:
    """Count how often each of `0..num_ids-1` occurs: the load of experts or, given slot ids, of slots.

    Exact and without host synchronisation. Ids out of range, `EMPTY` among them, are padding and not counted.

    Returns:
        `[num_ids]` int64.

    >>> count_tokens(torch.tensor([[0, 2], [2, -1]]), num_ids=3).tolist()
    [1, 0, 2]
    """
    flat = ids.reshape(-1).long()
    return _counts(torch.where(_is_padding(flat, num_ids), num_ids, flat), num_ids)[:num_ids]


class DeviceMaps:
    """The dispatch maps of all layers, in tensors that keep their addresses for as long as this object lives.

    A layer's maps are views, so a captured CUDA graph or a compiled function that holds them sees every update.
    Updates are copies on the current stream: make them on the stream that runs the model.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force.
        num_logical: experts the router knows.
        max_replicas: most copies that an expert of any later placement has; by default as many as there can be
            while every expert keeps one.
        device: of the tokens.

    Raises:
        EplbError: if the placement is malformed or an expert has more than `max_replicas` copies.
    """

    def __init__(
        self,
        physical_to_logical: Int[Any, "layers slots"],
        num_logical: int,
        *,
        max_replicas: int | None = None,
        device: torch.device | str | None = None,
    ):
        placement = np.asarray(physical_to_logical)
        require(
            placement.ndim == 2,
            "`DeviceMaps(physical_to_logical=...)` must be `[layers, slots]`",
            f"shape={placement.shape}",
            "Add a leading axis of one layer if there is only one.",
        )
        num_layers, self._num_slots = placement.shape
        self.num_logical = num_logical
        self.max_replicas = max(self._num_slots - num_logical + 1, 1) if max_replicas is None else max_replicas
        shape = (num_layers, num_logical, self.max_replicas)
        self.logical_to_physical = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
        self.replica_count = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.update(placement)

    @property
    def num_layers(self) -> int:
        """Layers these maps hold."""
        return self.replica_count.shape[0]

    def layer(self, index: int) -> LayerMaps:
        """The maps of one layer, as views that later updates change."""
        return LayerMaps(self.logical_to_physical[index], self.replica_count[index])

    def update(self, physical_to_logical: Int[Any, "*layers slots"], *, layer: int | None = None) -> None:
        """Switch all layers to the placement `[layers, slots]`, or one `layer` to `[slots]`, in place.

        Raises:
            EplbError: if it is malformed, has another shape, or more than `max_replicas` copies of an expert; the
                maps are unchanged then.
        """
        placement = np.asarray(physical_to_logical)
        expected = (self._num_slots,) if layer is not None else (self.num_layers, self._num_slots)
        require(
            placement.shape == expected,
            f"`DeviceMaps.update(physical_to_logical=..., layer={layer})` must have the shape {expected}",
            f"shape={placement.shape}",
            "Build new DeviceMaps where the number of layers or slots changes.",
        )
        maps = derive_maps(placement, self.num_logical, max_replicas=self.max_replicas)
        where = slice(None) if layer is None else layer
        self.logical_to_physical[where].copy_(torch.tensor(maps.logical_to_physical))
        self.replica_count[where].copy_(torch.tensor(maps.replica_count))


def _is_padding(ids: Tensor, num_ids: int) -> Tensor:
    return (ids < 0) | (ids >= num_ids)


def _counts(keys: Tensor, last: int) -> Tensor:
    """`[last + 1]` how often each of `0..last` occurs in `keys`."""
    return keys.new_zeros(last + 1).scatter_add_(0, keys, torch.ones_like(keys))


def _occurrence(keys: Tensor, last: int) -> Tensor:
    """How many entries before each one are equal to it, for keys `0..last`."""
    ordered, order = torch.sort(keys, stable=True)
    counts = _counts(keys, last)
    first = counts.cumsum(0) - counts
    position = torch.arange(keys.shape[0], device=keys.device) - first[ordered]
    return torch.empty_like(position).scatter_(0, order, position)
