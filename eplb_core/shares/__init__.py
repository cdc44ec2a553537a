"""How much of an expert's tokens each of its copies takes, as small integers per slot.

A slot takes `share / (sum of the shares of its expert)`; `derive_turns` makes routing maps of them.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from eplb_core._checks import EMPTY, at, check_count, check_ids, check_load, host_array, require
from eplb_core.maps import check_range
from eplb_core.shares.split import checked, split_load
from eplb_core.topology import Topology

RESOLUTION = 64
"""The largest sum of shares of one expert, unless told otherwise."""

_MOST_SHARES = 2**16


def even_shares(physical_to_logical: Int[Any, "*layers slots"]) -> Int[np.ndarray, "*layers slots"]:
    """Give every copy the share 1, and `EMPTY` slots 0: int32 of the placement's shape.

    >>> even_shares(np.asarray([[0, 1, EMPTY, 0]])).tolist()
    [[1, 1, 0, 1]]
    """
    ids = host_array(physical_to_logical)
    rows = ids[None] if ids.ndim == 1 else ids
    check_ids(rows, rows.shape[-1] if rows.ndim else 0, "even_shares(physical_to_logical=...)")
    return (ids != EMPTY).astype(np.int32)


def balanced_shares(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    *,
    resolution: int = RESOLUTION,
) -> Int[np.ndarray, "layers slots"]:
    """Give copies on busy ranks less, so that the busiest rank has as little as the placement allows.

    `split_load`, rounded: a copy gets its part to within `load / resolution`. A layer whose busiest rank would gain
    nothing keeps even shares, so for the given load no layer is worse off. New shares move no weights, so they can
    follow the load much more often than a placement can. They fit the noise of a window too: give several.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        load: `[layers, logical]` predicted tokens; windows `[windows, layers, logical]` are added up.
        topology: sizes of the placement.
        resolution: most that the shares of one expert add up to; at least its number of copies.

    Returns:
        `[layers, slots]` int32.

    Raises:
        EplbError: as `split_load`, or if an expert has more copies than `resolution`.

    >>> balanced_shares(np.asarray([[0, 1, 0, 2]]), np.asarray([[80, 10, 30]]), Topology(2, 2)).tolist()
    [[5, 1, 3, 1]]
    """
    ids, load = checked(physical_to_logical, load, topology, "balanced_shares")
    even = even_shares(ids)
    balanced = round_shares(split_load(ids, load, topology), ids, load.shape[1], resolution)

    def busiest(shares):
        return slot_load(ids, load, shares).reshape(len(ids), topology.ep_size, -1).sum(axis=2).max(axis=1)

    gains = busiest(balanced) < busiest(even) * (1 - 1e-9)
    return np.where(gains[:, None], balanced, even)


def slot_load(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "layers logical"],
    shares: Int[Any, "layers slots"],
) -> Float[np.ndarray, "layers slots"]:
    """Tokens per slot when the copies of every expert take their shares of its load.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        load: `[layers, logical]` tokens.
        shares: `[layers, slots]` integers >= 0.

    Returns:
        `[layers, slots]` tokens. Load of an expert without any copy is in no slot.

    Raises:
        EplbError: if the shares do not fit the placement; see `check_shares`.

    >>> slot_load(np.asarray([[0, 1, 0]]), np.asarray([[8, 5]]), np.asarray([[3, 2, 1]])).tolist()
    [[6.0, 5.0, 2.0]]
    """
    ids, load = host_array(physical_to_logical), host_array(load)
    check_load(load, "slot_load(load=...)")
    require(
        load.ndim == 2 and ids.ndim == 2 and len(load) == len(ids),
        "`slot_load(load=...)` must be `[layers, logical]` for the placement's layers",
        f"load.shape={load.shape}, physical_to_logical.shape={ids.shape}",
        "Add windows up first.",
    )
    parts = share_parts(ids, host_array(shares), load.shape[1])
    return parts * np.take_along_axis(load, np.maximum(ids, 0), axis=1)


def check_shares(
    physical_to_logical: Int[Any, "layers slots"], shares: Int[Any, "layers slots"], num_logical: int
) -> None:
    """Refuse shares that do not say where the tokens of every expert with a copy go.

    Raises:
        EplbError: if shapes differ, or naming every share that is negative, above 2**16 or in an `EMPTY` slot, and
            every expert whose copies all have the share 0.
    """
    ids, shares = host_array(physical_to_logical), host_array(shares)
    check_ids(ids, ids.shape[-1] if ids.ndim else 0, "check_shares(physical_to_logical=...)")
    check_range(ids, num_logical)
    advice = "Make them with even_shares, balanced_shares or local_shares, from this placement."
    require(
        shares.shape == ids.shape and shares.dtype.kind in "iu",
        "`shares` must be integers of the placement's shape",
        f"shape={shares.shape} of {shares.dtype} for a placement {ids.shape}",
        advice,
    )
    bad = (shares < 0) | (shares > _MOST_SHARES) | ((shares != 0) & (ids == EMPTY))
    require(
        not bad.any(),
        f"`shares` must be 0..{_MOST_SHARES}, and 0 in EMPTY slots",
        f"others at (layer, slot) {at(bad)}",
        advice,
    )
    idle = (sum_by_expert(even_shares(ids), ids, num_logical) > 0) & (sum_by_expert(shares, ids, num_logical) == 0)
    require(
        not idle.any(),
        "`shares` must give every expert's tokens to some copy",
        f"only 0 at (layer, expert) {at(idle)}",
        advice,
    )


def share_parts(ids: np.ndarray, shares: np.ndarray, num_logical: int) -> np.ndarray:
    """`[layers, slots]` the part of its expert's tokens that each slot takes; parts of an expert add up to 1."""
    check_shares(ids, shares, num_logical)
    totals = np.take_along_axis(sum_by_expert(shares, ids, num_logical), np.maximum(ids, 0), axis=1)
    return np.divide(shares, totals, out=np.zeros(ids.shape), where=ids != EMPTY)


def round_shares(
    tokens: Float[np.ndarray, "layers slots"], ids: Int[np.ndarray, "layers slots"], num_logical: int, resolution: int
) -> Int[np.ndarray, "layers slots"]:
    """Integer shares in proportion to `tokens`, with the smallest sum per expert that is exact, or `resolution`.

    What cannot be exact is rounded to the largest remainders, ties to the lowest slots. Copies of an expert without
    tokens share evenly.

    Raises:
        EplbError: if an expert has more copies than `resolution`.
    """
    resolution = check_count(resolution, "resolution", 1, _MOST_SHARES, "It is about the width of the maps.")
    copies = sum_by_expert(even_shares(ids), ids, num_logical)
    require(
        resolution >= int(copies.max()),
        "`resolution` must be at least the number of copies of every expert",
        f"resolution={resolution}, most copies={int(copies.max())}",
        "Raise it, and the width of the maps with it.",
    )
    total = sum_by_expert(tokens, ids, num_logical)
    expert = np.maximum(ids, 0)
    weight = np.where(np.take_along_axis(total, expert, axis=1) > 0, tokens, even_shares(ids))
    total = np.where(total > 0, total, np.maximum(copies, 1))
    exact = weight / np.take_along_axis(total, expert, axis=1)
    sums = np.take_along_axis(_smallest_sums(exact, ids, num_logical, resolution), expert, axis=1)
    return _round_up_largest(exact * sums, sums, ids)


def sum_by_expert(values: np.ndarray, ids: np.ndarray, num_logical: int) -> np.ndarray:
    """`[layers, logical]` float64: `values [layers, slots]` added up over the slots of each expert."""
    keys = ids + (np.arange(len(ids))[:, None] * (num_logical + 1) + 1)
    sums = np.bincount(keys.ravel(), weights=values.ravel(), minlength=len(ids) * (num_logical + 1))
    return sums.reshape(len(ids), -1)[:, 1:]


def _smallest_sums(exact: np.ndarray, ids: np.ndarray, num_logical: int, resolution: int) -> np.ndarray:
    """`[layers, logical]` the smallest sum with which all shares of an expert are integers; `resolution` if none is."""
    sums = np.full((len(ids), num_logical), resolution)
    for candidate in range(resolution - 1, 0, -1):
        off = np.abs(exact * candidate - np.rint(exact * candidate)) > 1e-9
        sums[sum_by_expert(off, ids, num_logical) == 0] = candidate
    return sums


def _round_up_largest(exact: np.ndarray, sums: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Round down, then up at the largest remainders of each expert until its shares add up to `sums`."""
    down = np.floor(exact + 1e-9)
    num_layers, num_slots = ids.shape
    layer = np.repeat(np.arange(num_layers), num_slots)
    remainder = np.round(exact - down, 9)
    order = np.lexsort((-remainder.ravel(), ids.ravel(), layer))  # stable: ties stay in the order of slots
    group = layer[order] * (num_slots + 1) + ids.ravel()[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    size = np.diff(np.r_[starts, len(group)])
    missing = sums.ravel()[order][starts] - np.add.reduceat(down.ravel()[order], starts)
    place = np.arange(len(group)) - np.repeat(starts, size)
    shares = np.empty(len(group), dtype=np.int32)
    shares[order] = down.ravel()[order] + (place < np.repeat(missing, size) - 0.5)
    return np.where(ids == EMPTY, 0, shares.reshape(ids.shape)).astype(np.int32)
