"""The routing maps, derived from the one stored map."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY, MOST_EXPERTS, at, check_count, check_ids, check_room, is_integer, require


class ExpertMaps(NamedTuple):
    """One placement seen from both sides. Never edited: build a new one with `derive_maps`.

    physical_to_logical: int32 `[layers, slots]` the expert held by each slot, or `EMPTY`.
    logical_to_physical: int32 `[layers, logical, max_replicas]` ascending slots, padded with `EMPTY`.
    replica_count: int32 `[layers, logical]` live entries of `logical_to_physical`; 0 for a lost expert.
    """

    physical_to_logical: Any
    logical_to_physical: Any
    replica_count: Any


def derive_maps(
    physical_to_logical: Int[Any, "*layers slots"], num_logical: int, *, max_replicas: int | None = None
) -> ExpertMaps:
    """Derive the slots and the number of copies of every expert.

    Slots ascend within an expert; `EMPTY` slots are skipped. `O(layers * slots * log slots)`.

    Args:
        physical_to_logical: `[layers, slots]`, or `[slots]` for a single layer.
        num_logical: experts the router knows. Static under `jax.jit`.
        max_replicas: width of `logical_to_physical`; by default the largest number of copies. Must be given under
            `jax.jit`, where it is static; copies beyond it cannot be seen there and are left out.

    Returns:
        `ExpertMaps`, without the layer axis if the input had none.

    Raises:
        EplbError: if ids or sizes are out of range, or an expert has more copies than `max_replicas`.

    >>> import numpy as np
    >>> maps = derive_maps(np.asarray([0, 2, 1, 2, EMPTY]), num_logical=3)
    >>> maps.logical_to_physical.tolist(), maps.replica_count.tolist()
    ([[0, -1], [2, -1], [1, 3]], [1, 1, 2])
    """
    ids = _ops.as_array(physical_to_logical)
    xp = _ops.namespace(ids)
    if ids.ndim == 1:
        maps = derive_maps(ids[None, :], num_logical, max_replicas=max_replicas)
        return ExpertMaps(*(field[0, ...] for field in maps))
    require(
        ids.ndim == 2 and is_integer(ids),
        "`derive_maps(physical_to_logical=...)` must be integers `[layers, slots]` or `[slots]`",
        f"dtype={ids.dtype}, shape={tuple(ids.shape)}",
        "Pass one placement.",
    )
    check_ids(ids, ids.shape[-1], "derive_maps(physical_to_logical=...)")
    check_range(ids, num_logical)
    counts = _ops.count_ids(ids, num_logical)
    max_replicas = _checked_width(counts, max_replicas)
    check_room("derive_maps", *counts.shape, max_replicas)
    list_slots = _list_slots_numpy if _ops.is_numpy(xp) else _list_slots
    return ExpertMaps(
        physical_to_logical=xp.astype(ids, xp.int32),
        logical_to_physical=list_slots(ids, counts, max_replicas),
        replica_count=counts,
    )


def _list_slots(ids, counts, width: int):
    """`[layers, logical, width]` int32: each expert's slots, gathered from the slots in order of their expert."""
    xp = _ops.namespace(ids)
    starts = xp.cumulative_sum(counts, axis=1, dtype=xp.int32) - counts
    starts = starts + (ids.shape[1] - xp.sum(counts, axis=1, keepdims=True, dtype=xp.int32))
    replica = xp.arange(width, dtype=xp.int32)
    position = xp.minimum(starts[:, :, None] + replica, xp.asarray(ids.shape[1] - 1, dtype=xp.int32))
    slots = _ops.pick(_ops.stable_order(ids), xp.reshape(position, (ids.shape[0], -1)))
    slots = xp.reshape(xp.astype(slots, xp.int32), position.shape)
    return xp.where(replica < counts[:, :, None], slots, xp.asarray(EMPTY, dtype=xp.int32))


def _list_slots_numpy(ids, counts, width: int):
    """`_list_slots` as one scatter: nothing is computed for places that stay `EMPTY`, which are most."""
    order, of_expert = _ops.stable_order(ids), counts.ravel()
    table = np.full((*counts.shape, width), EMPTY, dtype=np.int32)
    first_place = np.arange(of_expert.size) * width
    place = np.repeat(first_place - (np.cumsum(of_expert) - of_expert), of_expert)
    place += np.arange(place.size)
    if place.size < order.size:
        order = order[np.arange(order.shape[1]) >= order.shape[1] - counts.sum(axis=1)[:, None]]
    table.reshape(-1)[place] = order.ravel()
    return table


def count_replicas(physical_to_logical: Int[Any, "layers slots"], num_logical: int) -> Int[Any, "layers logical"]:
    """Count the copies of every expert: int32 `[layers, logical]`, 0 where there is none.

    Raises:
        EplbError: if an id is not smaller than `num_logical`.
    """
    check_range(physical_to_logical, num_logical)
    return _ops.count_ids(physical_to_logical, num_logical)


def check_range(ids, num_logical: int) -> None:
    """Refuse ids that are not smaller than `num_logical`; under a `jax.jit` trace they cannot be looked at."""
    advice = "Pass the number of experts the router knows."
    num_logical = check_count(num_logical, "num_logical", 1, MOST_EXPERTS, advice)
    check_room("num_logical", ids.shape[0], num_logical)
    if _ops.is_traced(ids) or int(_ops.namespace(ids).max(ids)) < num_logical:
        return
    require(
        False,
        f"a placement for num_logical={num_logical} holds ids 0..{num_logical - 1} and EMPTY = -1",
        f"larger ids at (layer, slot) {at(ids >= num_logical)}",
        "Check which model this placement was made for.",
    )


def _checked_width(counts, max_replicas: int | None) -> int:
    if _ops.is_traced(counts):
        require(
            max_replicas is not None,
            "`derive_maps(max_replicas=...)` must be given under jax.jit",
            "max_replicas=None",
            "Use ep_size, or 1 + the number of redundant slots.",
        )
        return check_count(max_replicas, "derive_maps(max_replicas=...)", 1)
    most = int(_ops.namespace(counts).max(counts))
    width = max(most, 1) if max_replicas is None else check_count(max_replicas, "derive_maps(max_replicas=...)")
    require(
        width >= max(most, 1),
        "`derive_maps(max_replicas=...)` must hold all copies of every expert",
        f"max_replicas={max_replicas}, most copies={most}",
        f"Use max_replicas >= {max(most, 1)}.",
    )
    return width
