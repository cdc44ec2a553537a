"""Put the copies of each replicated expert on different nodes, so that it survives the loss of one."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.policies.search import copy_share
from eplb_core.topology import Topology


def spread_copies(
    held: Int[Any, "rows slots"],
    load: Float[Any, "rows logical"],
    topology: Topology,
    *,
    max_moves: Int[Any, " rows"],
) -> Int[Any, "rows slots"]:
    """Change a placement until every expert with two or more copies has them on at least two nodes.

    One expert after the other, that with the heaviest copies first, gives its copy on its busiest rank to another
    node, in exchange for whatever raises the sum of squared rank loads least. The exchange leaves no other expert
    on a single node and puts no second copy on a rank. Where no exchange does, the expert gets one copy more in
    place of one that another node can spare. One of the two is always possible: a node has too few slots to hold
    two copies of every expert of another node besides. Ties go to the lowest index. A step costs `O(rows * slots)`.

    Args:
        held: `[rows, slots]` expert ids or `EMPTY`.
        load: `[rows, logical]` finite, >= 0.
        topology: ranks and at least two nodes.
        max_moves: `[rows]` transfers that a row may spend; an exchange takes two.

    Returns:
        `[rows, slots]` int32.
    """
    xp = _ops.namespace(held)
    state = held, xp.zeros_like(max_moves)
    everyone = xp.ones(held.shape[0], dtype=xp.bool)
    return _ops.while_rows(_step(topology), state, (load, max_moves), everyone)[0]


def _step(topology: Topology):
    """One expert per row."""

    def step(state, fixed):
        (held, moves), (load, max_moves) = state, fixed
        xp = _ops.namespace(held)
        slots = xp.arange(topology.num_slots, dtype=xp.int32)
        on_node, copies, nodes = _count(held, load.shape[1], topology)
        alone = (copies > 1) & (nodes == 1)
        share = load / xp.astype(xp.maximum(copies, xp.asarray(1, dtype=xp.int32)), load.dtype)
        expert = xp.astype(xp.argmax(xp.where(alone, share, -1.0), axis=1, keepdims=True), xp.int32)
        each = copy_share(held, share)
        by_rank = xp.reshape(each, (-1, topology.ep_size, topology.slots_per_rank))
        rank_load = xp.take(_ops.tree_sum(by_rank), slots // topology.slots_per_rank, axis=1)
        here = xp.astype(xp.argmax(xp.where(held == expert, rank_load, -1.0), axis=1, keepdims=True), xp.int32)

        away = slots // topology.slots_per_node != here // topology.slots_per_node
        swap = away & _can_come(held, here, on_node, copies, topology)
        take = away & _can_go(held, on_node, copies, nodes, topology)
        shift = _ops.pick(share, expert) - each
        squares = shift * (rank_load - _ops.pick(rank_load, here) + shift)
        swaps = xp.any(swap, axis=1, keepdims=True)
        price = xp.where(swap, squares, xp.where(swaps | ~take, xp.inf, rank_load))
        there = xp.astype(xp.argmin(price, axis=1, keepdims=True), xp.int32)
        back = xp.where(swaps, _ops.pick(held, there), expert)
        moves = moves + xp.where(swaps[:, 0], 2, xp.asarray(1, dtype=xp.int32))
        go = xp.any(alone, axis=1) & xp.any(swap | take, axis=1) & (moves <= max_moves)
        return (_ops.put(_ops.put(held, there, expert), here, back), moves), go

    return step


def _count(held, num_logical: int, topology: Topology):
    """Copies of each expert: `[rows, nodes, logical]` on each node, `[rows, logical]` in all; and on how many nodes."""
    xp = _ops.namespace(held)
    by_node = xp.reshape(held, (-1, topology.slots_per_node))
    on_node = xp.reshape(_ops.count_ids(by_node, num_logical), (-1, topology.num_nodes, num_logical))
    nodes = xp.sum(xp.astype(on_node > 0, xp.int32), axis=1, dtype=xp.int32)
    return on_node, xp.sum(on_node, axis=1, dtype=xp.int32), nodes


def _can_come(held, here, on_node, copies, topology: Topology):
    """Whether what each slot of another node holds may move to slot `here`."""
    xp = _ops.namespace(held)
    expert = xp.maximum(held, xp.zeros_like(held))
    on_this = _ops.pick(_ops.pick(on_node, here // topology.slots_per_node)[:, 0, :], expert)
    count = _ops.pick(copies, expert)
    by_rank = xp.reshape(held, (-1, topology.ep_size, topology.slots_per_rank))
    there = _ops.holds(_ops.pick(by_rank, here // topology.slots_per_rank), held)
    return (held == EMPTY) | (~there & ((count == 1) | (count - on_this > 1)))


def _can_go(held, on_node, copies, nodes, topology: Topology):
    """Whether the copy in each slot can be spared: its expert keeps one copy, or copies on two nodes."""
    xp = _ops.namespace(held)
    expert = xp.maximum(held, xp.zeros_like(held))
    num_logical = copies.shape[1]
    node = xp.arange(topology.num_slots, dtype=xp.int32) // topology.slots_per_node
    here = _ops.pick(xp.reshape(on_node, (held.shape[0], -1)), node * num_logical + expert)
    left = _ops.pick(nodes, expert) - xp.astype(here == 1, xp.int32)
    count = _ops.pick(copies, expert)
    return (held != EMPTY) & ((count == 2) | ((count > 2) & (left > 1)))
