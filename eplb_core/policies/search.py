"""Local search: swap copies between the busiest rank and others until no swap is worth it."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.topology import Topology

NEAR = 4  # lightest ranks that are tried before all are
NOTHING = 1e-12  # relative gain below which two sums of squares are the same, so that rounding makes no cycles
_ROUNDINGS = 8  # at least, in coarser floats: three in a gain, two in each of two rank loads


def swap_copies(
    held: Int[Any, "rows slots"],
    share: Float[Any, "rows logical"],
    topology: Topology,
    *,
    target: Float[Any, " rows"],
    worth: Float[Any, " rows"],
    offset: Float[Any, "rows ep_size"],
    max_moves: Int[Any, " rows"],
    cross_node_cost: float = 1.0,
) -> Int[Any, "rows slots"]:
    """Swap copies until the busiest rank of each row is at its target, or no swap is worth it, or moves run out.

    Each step takes the busiest rank and, over its copies and those of the lightest ranks, the swap that lowers the
    sum of squared rank loads most per transfer cost; ties go to the lowest index. Rows that get stuck go on with
    all ranks as partners. No swap puts two copies of an expert on a rank. A step costs
    `O(rows * slots_per_rank^2 * partners)`.

    Args:
        held: `[rows, slots]` expert ids or `EMPTY`; no rank holds two copies of one.
        share: `[rows, logical]` load of one copy of each expert.
        topology: ranks and nodes of a row.
        target: `[rows]` rank load at which a row is done.
        worth: `[rows]` a swap must lower the sum of squares by more than twice this; 0 for any real gain.
        offset: `[rows, ep_size]` added to the load that each rank has from its copies.
        max_moves: `[rows]` transfers that a row may spend; a swap takes two.
        cross_node_cost: cost of a swap between nodes, that within a node being 1.

    Returns:
        `[rows, slots]` int32.
    """
    if topology.ep_size == 1:
        return held
    xp = _ops.namespace(held)
    by_rank = xp.reshape(held, (-1, topology.ep_size, topology.slots_per_rank))
    rank_load = _ops.tree_sum(copy_share(by_rank, share)) + offset
    state = by_rank, rank_load, xp.zeros_like(max_moves)
    fixed = share, target, worth, max_moves
    active = xp.max(rank_load, axis=1) > target
    for partners in sorted({min(NEAR, topology.ep_size - 1), topology.ep_size - 1}):
        state = _ops.while_rows(_swap_step(topology, partners, cross_node_cost), state, fixed, active)
    return xp.reshape(state[0], held.shape)


def copy_share(held: Int[Any, " rows *places"], share: Float[Any, "rows logical"]) -> Float[Any, " rows *places"]:
    """Load of the copy in each place; 0 for `EMPTY`."""
    xp = _ops.namespace(held)
    flat = xp.reshape(held, (held.shape[0], -1))
    found = _ops.pick(share, xp.maximum(flat, 0))
    return xp.reshape(xp.where(flat == EMPTY, 0.0, found), held.shape)


def _swap_step(topology: Topology, partners: int, cross_node_cost: float):
    """One swap per row."""
    depth, near = topology.slots_per_rank, topology.ranks_per_node

    def step(state, fixed):
        (held, rank_load, moves), (share, target, worth, max_moves) = state, fixed
        xp = _ops.namespace(held)
        busiest = xp.astype(xp.argmax(rank_load, axis=1, keepdims=True), xp.int32)
        light = _lightest(rank_load, busiest, partners)
        mine, theirs = _ops.pick(held, busiest)[:, 0, :], _ops.pick(held, light)
        gain = _gains(mine, theirs, share, _ops.pick(rank_load, busiest), _ops.pick(rank_load, light))
        if cross_node_cost != 1.0:
            price = xp.asarray(cross_node_cost, dtype=gain.dtype)
            gain = gain / xp.where(busiest // near != light // near, price, 1.0)[:, None, :, None]
        gain = xp.reshape(gain, (held.shape[0], -1))
        best = xp.astype(xp.argmax(gain, axis=1, keepdims=True), xp.int32)
        most = _ops.pick(rank_load, busiest)[:, 0]
        least_gain = xp.maximum(worth, _ops.margin(most, NOTHING, _ROUNDINGS) * most * most)
        go = (_ops.pick(gain, best)[:, 0] > least_gain) & (moves + 2 <= max_moves) & (most > target)

        place, pair = best // (partners * depth), best % (partners * depth)
        partner = _ops.pick(light, pair // depth)
        gives, takes = _ops.pick(mine, place), _ops.pick(xp.reshape(theirs, (held.shape[0], -1)), pair)
        at_mine, at_theirs = busiest * depth + place, partner * depth + pair % depth
        flat = _ops.put(_ops.put(xp.reshape(held, (held.shape[0], -1)), at_mine, takes), at_theirs, gives)
        shift = copy_share(gives, share) - copy_share(takes, share)
        rank_load = _ops.put(rank_load, busiest, most[:, None] - shift)
        rank_load = _ops.put(rank_load, partner, _ops.pick(rank_load, partner) + shift)
        return (xp.reshape(flat, held.shape), rank_load, moves + 2), go

    return step


def _gains(mine, theirs, share, mine_load, their_load):
    """`[rows, mine, partners, theirs]` half of what each swap takes off the sum of squares; -inf where forbidden."""
    xp = _ops.namespace(mine)
    less = copy_share(mine, share)[:, :, None, None] - copy_share(theirs, share)[:, None, :, :]
    gain = less * ((mine_load - their_load)[:, None, :, None] - less)
    keeps_out = _ops.holds(theirs[:, None, :, :], mine[:, :, None]) & (mine != EMPTY)[:, :, None]
    stays_out = _ops.holds(mine[:, None, None, :], theirs) & (theirs != EMPTY)
    return xp.where(keeps_out[:, :, :, None] | stays_out[:, None, :, :], -xp.inf, gain)


def _lightest(rank_load, busiest, partners: int):
    """`[rows, partners]` the lightest ranks in order, or all but the busiest where that many are asked for."""
    xp = _ops.namespace(rank_load)
    size = rank_load.shape[1]
    if partners == size - 1:
        return (busiest + xp.arange(1, size, dtype=xp.int32)) % size
    found = []
    for _ in range(partners):
        found.append(xp.astype(xp.argmin(rank_load, axis=1, keepdims=True), xp.int32))
        rank_load = _ops.put(rank_load, found[-1], xp.inf)
    return xp.concat(found, axis=1)
