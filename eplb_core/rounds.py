"""The order of messages: rounds in which every rank sends at most one message and receives at most one."""

from typing import Any, NamedTuple

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY, check_ids, require
from eplb_core.moves import MovePlan
from eplb_core.topology import Topology


class Schedule(NamedTuple):
    """Rows that travel between ranks, in the order in which both sides handle them. Columns of equal length `[rows]`.

    All rows of one rank pair in one round are one message. Rows are sorted by round, then source rank, then
    destination rank, then layer, then destination slot.

    src_rank, dst_rank: int32 the rank pair.
    layer: int32.
    src_slot: int32 the slot whose old contents are sent; for a relayed row the slot that received it earlier.
    dst_slot: int32 the slot that takes the row.
    round: int32, from 0.
    relayed: bool, the row is passed on by a rank that has itself just received it.
    """

    src_rank: np.ndarray
    dst_rank: np.ndarray
    layer: np.ndarray
    src_slot: np.ndarray
    dst_slot: np.ndarray
    round: np.ndarray
    relayed: np.ndarray

    @property
    def num_rounds(self) -> int:
        """Rounds needed: 0 without transfers."""
        return int(self.round[-1]) + 1 if len(self.round) else 0


def schedule_rounds(plan: MovePlan, topology: Topology, *, layers: Any = None) -> Schedule:
    """Arrange a plan's transfers in the fewest rounds.

    All rows between two ranks travel together, as one message. The fewest rounds in which no rank sends twice or
    receives twice are as many as the most partners that a rank has on one side (König's theorem). Relayed rows come
    after all others, in the fewest rounds of their own. Runs on the host, the same on every rank.
    `O(pairs * ep_size)` at worst, about `O(pairs)` in practice.

    Args:
        plan: the moves.
        topology: sizes.
        layers: ids of the layers to take part, such as one group of an executor; all by default.

    Returns:
        `Schedule`.

    Raises:
        EplbError: if the plan does not fit the topology or a layer does not exist.

    References:
        König, 1916: the chromatic index of a bipartite graph is its largest degree.

    >>> plan = MovePlan(np.asarray([[2, 1, 1, 3]]))
    >>> schedule = schedule_rounds(plan, Topology(ep_size=2, slots_per_rank=2))
    >>> schedule.src_slot.tolist(), schedule.dst_slot.tolist(), schedule.num_rounds
    ([1, 2], [2, 0], 1)
    """
    source = np.asarray(_ops.as_array(plan.source_slot))
    check_ids(source, topology.num_slots, "schedule_rounds(plan=...)")
    relay = np.full_like(source, EMPTY) if plan.relay_slot is None else np.asarray(plan.relay_slot)
    chosen = _chosen_layers(layers, source.shape[0])
    layer, dst_slot, src_slot, relayed = _rows(source[chosen], relay[chosen], topology)
    src_rank, dst_rank = src_slot // topology.slots_per_rank, dst_slot // topology.slots_per_rank
    when = np.zeros(len(layer), dtype=np.int32)
    first = 0
    for phase in (~relayed, relayed):
        pair = src_rank[phase] * topology.ep_size + dst_rank[phase]
        pairs, pair_of_row = np.unique(pair, return_inverse=True)
        colour = colour_edges(*np.divmod(pairs, topology.ep_size), topology.ep_size)
        when[phase] = first + colour[pair_of_row]
        first += int(colour.max(initial=-1)) + 1
    order = np.lexsort((dst_slot, layer, dst_rank, src_rank, when))
    columns = src_rank, dst_rank, chosen[layer], src_slot, dst_slot, when
    return Schedule(*(np.asarray(column[order], dtype=np.int32) for column in columns), relayed=relayed[order])


def _chosen_layers(layers, num_layers: int) -> np.ndarray:
    if layers is None:
        return np.arange(num_layers)
    chosen = np.unique(np.asarray(layers, dtype=np.int64))
    require(
        chosen.size == 0 or bool(chosen[0] >= 0 and chosen[-1] < num_layers),
        f"`schedule_rounds(layers=...)` must be layer ids 0..{num_layers - 1}",
        f"layers={layers}",
        "Count layers as the plan does.",
    )
    return chosen


def _rows(source: np.ndarray, relay: np.ndarray, topology: Topology):
    """One row per (destination rank, expert) that comes from another rank: the lowest slot of the rank takes it."""
    slots = np.arange(topology.num_slots)
    rank = slots // topology.slots_per_rank
    crosses = (source != EMPTY) & (source // topology.slots_per_rank != rank)
    layer, dst_slot = np.nonzero(crosses)
    origin = source[layer, dst_slot]
    _, lowest = np.unique((layer * topology.ep_size + rank[dst_slot]) * topology.num_slots + origin, return_index=True)
    layer, dst_slot, origin = layer[lowest], dst_slot[lowest], origin[lowest]
    via = relay[layer, dst_slot]
    return layer, dst_slot, np.where(via == EMPTY, origin, via), via != EMPTY


def colour_edges(src: np.ndarray, dst: np.ndarray, num_nodes: int) -> np.ndarray:
    """Colour the edges of a bipartite graph with as many colours as its largest degree.

    Edges of one vertex differ in colour. Each edge first tries the colour that a round-robin tournament would give
    it, then the lowest that is free on both sides, and else makes one free by swapping two colours along a path.

    Args:
        src: `[edges]` left vertices; no edge twice.
        dst: `[edges]` right vertices.
        num_nodes: vertices on each side.

    Returns:
        `[edges]` colours from 0.
    """
    if len(src) == 0:
        return np.zeros(0, dtype=np.int64)
    degree = int(max(np.bincount(src).max(), np.bincount(dst).max()))
    every = (1 << degree) - 1
    # Bit c of free[v] is set while no edge of vertex v has colour c; edge[v][c] is the edge that has it.
    free = [every] * (2 * num_nodes)
    edge: list[list[int]] = [[-1] * degree for _ in range(2 * num_nodes)]
    ends = list(zip(src.tolist(), (dst + num_nodes).tolist(), strict=True))
    colour = [0] * len(ends)

    def paint(index: int, shade: int) -> None:
        colour[index] = shade
        for vertex in ends[index]:
            free[vertex] &= ~(1 << shade)
            edge[vertex][shade] = index

    for index, (left, right) in enumerate(ends):
        common = free[left] & free[right]
        turn = (right - left) % num_nodes % degree
        if common >> turn & 1:
            paint(index, turn)
        elif common:
            paint(index, _lowest(common))
        else:
            wanted, other = _lowest(free[left]), _lowest(free[right])
            path = _alternating_path(right, wanted, other, edge, ends)
            for step in path:
                for vertex in ends[step]:
                    free[vertex] |= 1 << colour[step]
                    edge[vertex][colour[step]] = -1
            for step in path:
                paint(step, other if colour[step] == wanted else wanted)
            paint(index, wanted)
    return np.asarray(colour)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _alternating_path(vertex: int, first: int, second: int, edge: list, ends: list) -> list[int]:
    """Edges from `vertex` that have the colours `first`, `second`, `first`, ... in turn."""
    path, shade = [], first
    while (step := edge[vertex][shade]) >= 0:
        path.append(step)
        left, right = ends[step]
        vertex = right if vertex == left else left
        shade = second if shade == first else first
    return path
