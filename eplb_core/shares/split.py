"""Divide the load of every expert among its copies so that ranks are as equal as they can be."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from eplb_core._checks import EMPTY, check_ids, check_load, host_array, require
from eplb_core.maps import check_range
from eplb_core.topology import Topology, check_topology

_UNITS = 2**40  # of load per layer: integers make the search exact and its end certain

Tokens = dict[int, dict[int, int]]
"""For each replicated expert the units of its load on each rank that holds it."""


def split_load(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
) -> Float[np.ndarray, "layers slots"]:
    """Tokens per slot when the copies of each expert divide its load so that ranks are as equal as they can be.

    No division gives the busiest rank less nor, given that, the second busiest, and so on: the optimum of a linear
    program and of the ones after it, found as flows between ranks. Copies on one rank divide equally. Exact to about
    `1e-11` of the layer's load. Plain Python over the copies of replicated experts: milliseconds per layer.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        load: `[layers, logical]` tokens; windows `[windows, layers, logical]` are added up.
        topology: sizes of the placement.

    Returns:
        `[layers, slots]` tokens. Load of an expert without any copy is in no slot.

    Raises:
        EplbError: if shapes do not fit, an id is out of range or a load is negative or not finite.

    References:
        DeepSeek's LPLB, https://github.com/deepseek-ai/LPLB, poses the program; the recursion is the decomposition
        algorithm for lexicographically optimal bases (Fujishige, Math. Oper. Res. 5, 1980).

    >>> split_load(np.asarray([[0, 1, 0, 2]]), np.asarray([[80, 10, 30]]), Topology(2, 2)).round(6).tolist()
    [[50.0, 10.0, 30.0, 30.0]]
    """
    ids, load = checked(physical_to_logical, load, topology, "split_load")
    return np.stack([_split_layer(*layer, topology.slots_per_rank) for layer in zip(ids, load, strict=True)])


def checked(physical_to_logical, load, topology: Topology, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The placement and the load `[layers, logical]` as NumPy arrays that fit each other.

    Raises:
        EplbError: as `split_load`.
    """
    check_topology(topology, name)
    ids, load = host_array(physical_to_logical), host_array(load)
    check_ids(ids, topology.num_slots, f"{name}(physical_to_logical=...)")
    check_load(load, f"{name}(load=...)")
    check_range(ids, load.shape[-1])
    require(
        load.shape[-2] == len(ids),
        f"`{name}(load=...)` must have the placement's layers",
        f"load.shape={load.shape}, physical_to_logical.shape={ids.shape}",
        "Record load for the layers that are placed.",
    )
    return ids, load.sum(axis=0) if load.ndim == 3 else load


def _split_layer(slots: np.ndarray, load: np.ndarray, slots_per_rank: int) -> np.ndarray:
    total = float(load.sum())
    if total == 0:
        return np.zeros(len(slots))
    units = np.rint(load * (_UNITS / total)).astype(np.int64).tolist()
    held = [(expert, slot // slots_per_rank) for slot, expert in enumerate(slots.tolist())]
    ranks_of: dict[int, list[int]] = {}
    for expert, rank in held:
        if expert != EMPTY:
            ranks_of.setdefault(expert, []).append(rank)
    tokens = {expert: _deal(units[expert], ranks) for expert, ranks in ranks_of.items()}
    on_rank = [0] * (len(slots) // slots_per_rank)
    for parts in tokens.values():
        for rank, part in parts.items():
            on_rank[rank] += part
    _level({expert: parts for expert, parts in tokens.items() if len(parts) > 1}, on_rank)
    return np.asarray(
        [
            0.0 if expert == EMPTY else tokens[expert][rank] / ranks_of[expert].count(rank) * (total / _UNITS)
            for expert, rank in held
        ]
    )


def _deal(units: int, ranks: list[int]) -> dict[int, int]:
    """Deal units out to ranks as evenly as integers go, to a rank as often as it is named."""
    share, extra = divmod(units, len(ranks))
    dealt = dict.fromkeys(ranks, 0)
    for i, rank in enumerate(ranks):
        dealt[rank] += share + (i < extra)
    return dealt


def _level(tokens: Tokens, on_rank: list[int]) -> None:
    """Level ranks, in place: bring them to their mean; where that fails, level those above and the rest apart."""
    holds: list[list[int]] = [[] for _ in on_rank]
    for expert, parts in tokens.items():
        for rank in parts:
            holds[rank].append(expert)
    todo = [set(range(len(on_rank)))]
    while todo:
        ranks = todo.pop()
        above = _bring_to_mean(ranks, holds, tokens, on_rank)
        if above:
            todo += [above, ranks - above]


def _bring_to_mean(ranks: set[int], holds: list[list[int]], tokens: Tokens, on_rank: list[int]) -> set[int]:
    """Pass load on until no rank above the mean can reach one below it.

    Returns:
        The ranks that what is above the mean can be passed to, all of them at the mean or above: no division gives
        them less together.
    """
    mean = -(-sum(on_rank[rank] for rank in ranks) // len(ranks))
    while True:
        start = [rank for rank in ranks if on_rank[rank] > mean]
        path, seen = _find_path(start, ranks, holds, tokens, on_rank, mean)
        if not path:
            return seen
        (first, _, _), (_, _, last) = path[0], path[-1]
        amount = min(on_rank[first] - mean, mean - on_rank[last], *(tokens[e][rank] for rank, e, _ in path))
        for rank, expert, other in path:
            tokens[expert][rank] -= amount
            tokens[expert][other] += amount
        on_rank[first] -= amount
        on_rank[last] += amount


def _find_path(
    start: Iterable[int], ranks: set[int], holds: list[list[int]], tokens: Tokens, on_rank: list[int], mean: int
) -> tuple[list[tuple[int, int, int]], set[int]]:
    """A shortest chain of `(rank, expert, other rank)` from `start` to a rank below the mean; and all ranks seen."""
    came: dict[int, tuple[int, int, int] | None] = dict.fromkeys(start)
    passed: set[int] = set()
    todo = deque(came)
    while todo:
        rank = todo.popleft()
        for expert in holds[rank]:
            if expert in passed or not tokens[expert][rank]:
                continue
            passed.add(expert)
            for other in tokens[expert]:
                if other in came or other not in ranks:
                    continue
                came[other] = (rank, expert, other)
                if on_rank[other] < mean:
                    return _trace(came, other), set()
                todo.append(other)
    return [], set(came)


def _trace(came: dict[int, tuple[int, int, int] | None], rank: int) -> list[tuple[int, int, int]]:
    path = []
    while (step := came[rank]) is not None:
        path.append(step)
        rank = step[0]
    return path[::-1]
