"""Routing maps in which the copies of an expert take turns by their shares."""

from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core._checks import EMPTY, at, check_count, check_room, host_array, require
from eplb_core.maps import ExpertMaps, derive_maps
from eplb_core.shares import check_shares, even_shares, sum_by_expert


def derive_turns(
    physical_to_logical: Int[Any, "layers slots"],
    shares: Int[Any, "layers slots"],
    num_logical: int,
    *,
    max_turns: int | None = None,
) -> ExpertMaps:
    """Maps in which a slot appears as often as its share, so that a router which picks evenly picks by shares.

    A router that sends an expert's n-th token to entry `n % replica_count` keeps every copy within one token of its
    share at every n; one that picks an entry at random meets the shares on average. With shares of 1 the maps are
    those of `derive_maps`.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        shares: `[layers, slots]` integers >= 0.
        num_logical: experts the router knows.
        max_turns: width of `logical_to_physical`; by default the largest sum of shares of an expert.

    Returns:
        `ExpertMaps` whose `logical_to_physical` holds an expert's turns and `replica_count` counts them.

    Raises:
        EplbError: if shares do not fit the placement, or those of an expert add up to more than `max_turns`.

    >>> maps = derive_turns(np.asarray([[0, 1, 0]]), np.asarray([[3, 1, 1]]), num_logical=2)
    >>> maps.logical_to_physical.tolist(), maps.replica_count.tolist()
    ([[[0, 0, 0, 2], [1, -1, -1, -1]]], [[4, 1]])
    """
    ids, shares = host_array(physical_to_logical), host_array(shares)
    check_shares(ids, shares, num_logical)
    even = derive_maps(ids, num_logical)
    sums = sum_by_expert(shares, ids, num_logical).astype(np.int32)
    width = max(int(sums.max()), 1) if max_turns is None else max_turns
    width = check_count(width, "derive_turns(max_turns=...)", 1)
    check_room("derive_turns", *sums.shape, width)
    bad = sums > width
    require(
        not bad.any(),
        "`derive_turns(max_turns=...)` must be at least the sum of the shares of every expert",
        f"max_turns={width}, larger sums at (layer, expert) {at(bad)}",
        f"Use {int(sums.max())} or more, or shares of a smaller resolution.",
    )
    turns = np.full((*sums.shape, width), EMPTY, dtype=np.int32)
    copies = min(even.logical_to_physical.shape[2], width)
    turns[:, :, :copies] = even.logical_to_physical[:, :, :copies]
    uneven = np.nonzero(sum_by_expert(shares != even_shares(ids), ids, num_logical))
    turns[uneven] = _take_turns(shares, even.logical_to_physical[uneven], uneven[0], sums[uneven], width)
    return ExpertMaps(even.physical_to_logical, turns, sums)


def _take_turns(shares: np.ndarray, slots: np.ndarray, layer: np.ndarray, sums: np.ndarray, width: int) -> np.ndarray:
    """`[rows, width]`: at each turn, of the copies still below their share of the turns so far, the earliest due.

    The quota method (Balinski and Young, 1975): after every turn each copy has its exact share rounded up or down.
    """
    share = np.where(slots == EMPTY, 0, shares[layer[:, None], slots])
    given = np.zeros_like(share)
    turns = np.full((len(slots), width), EMPTY, dtype=np.int32)
    row = np.arange(len(slots))
    for turn in range(int(sums.max(initial=0))):
        open_ = given * sums[:, None] < share * (turn + 1)
        due = np.where(open_, (given + 1) / np.maximum(share, 1), np.inf)
        next_ = due.argmin(axis=1)
        alive = turn < sums
        turns[alive, turn] = slots[row, next_][alive]
        given[row, next_] += alive
    return turns
