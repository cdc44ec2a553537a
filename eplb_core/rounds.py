"""The order of messages: rounds in which every rank sends at most one message and receives at most one."""

from typing import Any, NamedTuple

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY, check_indices
from eplb_core.moves import MovePlan, check_plan
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
    source, relay = (None if x is None else np.asarray(x) for x in check_plan(plan, topology, "schedule_rounds"))
    assert source is not None
    chosen = _chosen_layers(layers, source.shape[0])
    relay = None if relay is None else relay[chosen]
    layer, dst_slot, src_slot, relayed = _rows(source[chosen], relay, topology)
    src_rank, dst_rank = src_slot // topology.slots_per_rank, dst_slot // topology.slots_per_rank
    pair = src_rank * topology.ep_size + dst_rank
    when, message = np.zeros((2, len(pair)), dtype=np.int32)
    num_rounds = num_messages = 0
    for phase in (~relayed, relayed):
        if not phase.any():
            continue
        pairs, pair_of_row = _distinct(pair[phase], topology.ep_size**2)
        colour = colour_edges(*np.divmod(pairs, topology.ep_size), topology.ep_size)
        place = np.empty(len(pairs), dtype=np.int32)
        place[_ops.stable_order(colour)] = np.arange(num_messages, num_messages + len(pairs))
        when[phase], message[phase] = num_rounds + colour[pair_of_row], place[pair_of_row]
        num_rounds, num_messages = num_rounds + int(colour.max()) + 1, num_messages + len(pairs)
    order = _ops.stable_order(message)
    columns = src_rank, dst_rank, chosen[layer], src_slot, dst_slot, when
    return Schedule(*(column[order].astype(np.int32) for column in columns), relayed=relayed[order])


def _chosen_layers(layers, num_layers: int) -> np.ndarray:
    if layers is None:
        return np.arange(num_layers)
    advice = "Count layers as the plan does."
    return np.unique(check_indices(layers, num_layers, "schedule_rounds(layers=...)", "layer ids", advice))


def _rows(source: np.ndarray, relay: np.ndarray | None, topology: Topology):
    """One row per (destination rank, expert) that comes from another rank: the lowest slot of the rank takes it."""
    by_rank = np.ascontiguousarray(source.reshape(-1, topology.slots_per_rank).T)
    again = np.zeros(by_rank.shape, dtype=bool)
    for apart in range(1, topology.slots_per_rank):
        again[apart:] |= by_rank[apart:] == by_rank[:-apart]
    rank = np.arange(topology.num_slots) // topology.slots_per_rank
    crosses = (source != EMPTY) & (source // topology.slots_per_rank != rank)
    layer, dst_slot = np.nonzero(crosses & ~again.T.reshape(source.shape))
    src_slot = source[layer, dst_slot]
    if relay is None:
        return layer, dst_slot, src_slot, np.zeros(len(layer), dtype=bool)
    via = relay[layer, dst_slot]
    return layer, dst_slot, np.where(via == EMPTY, src_slot, via), via != EMPTY


def _distinct(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `np.unique(values, return_inverse=True)`, without sorting, for values `0..limit-1`."""
    seen = np.zeros(limit, dtype=bool)
    seen[values] = True
    distinct = np.flatnonzero(seen)
    position = np.empty(limit, dtype=np.intp)
    position[distinct] = np.arange(len(distinct))
    return distinct, position[values]


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
    bits = [1 << shade for shade in range(degree)]
    # Bit c of free[v] is set while vertex v has no edge of colour c; partner[v][c] is the other end of the edge it has.
    free = [(1 << degree) - 1] * (2 * num_nodes)
    partner = [[-1] * degree for _ in free]
    turns = (dst - src) % num_nodes % degree
    for left, right, shade in zip(src.tolist(), (dst + num_nodes).tolist(), turns.tolist(), strict=True):
        common = free[left] & free[right]
        bit = bits[shade]
        if not common & bit:
            if not common:
                common = _make_room(left, right, free, partner)
            bit = common & -common
            shade = bit.bit_length() - 1
        free[left] ^= bit
        free[right] ^= bit
        partner[left][shade] = right
        partner[right][shade] = left
    right_of = np.asarray(partner[:num_nodes])
    left, shade = np.nonzero(right_of >= 0)
    colour = np.empty((num_nodes, num_nodes), dtype=np.int64)
    colour[left, right_of[left, shade] - num_nodes] = shade
    return colour[src, dst]


def _make_room(left: int, right: int, free: list[int], partner: list[list[int]]) -> int:
    """Free the lowest colour that `left` has free at `right` as well, and return its bit.

    Two colours change places along the path from `right` on which they alternate. It cannot end at `left`.
    """
    wanted, other = free[left] & -free[left], free[right] & -free[right]
    shade, next_shade = wanted.bit_length() - 1, other.bit_length() - 1
    last = vertex = right
    free[right] ^= wanted | other
    while vertex >= 0:
        last, ends = vertex, partner[vertex]
        vertex = ends[shade]
        ends[shade], ends[next_shade] = ends[next_shade], vertex
        shade, next_shade = next_shade, shade
    free[last] ^= wanted | other
    return wanted
