"""Change how many copies each expert has, and where, with few transfers."""

from typing import Any

from jaxtyping import Bool, Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.maps import count_replicas
from eplb_core.policies.search import copy_share
from eplb_core.topology import Topology

MARGIN = 0.5  # by how much a gaining copy must outweigh a losing one, so that counts do not flap


def exchange_copies(
    load: Float[Any, "rows logical"],
    copies: Int[Any, "rows logical"],
    topology: Topology,
    *,
    floor: float,
    max_moves: Int[Any, " rows"],
    active: Bool[Any, " rows"],
) -> Int[Any, "rows logical"]:
    """Choose new numbers of copies, starting from those in place.

    Free slots go to the expert with the most load per copy. Then a copy passes from the expert that would miss it
    least to that one, while its load per copy is larger by `MARGIN` than what the other's would become; by `floor`
    alone if a copy is so hot that no rank can hold it within `floor` of the mean. At most one copy per rank.

    Args:
        load: `[rows, logical]`.
        copies: `[rows, logical]` in place; 0 for an expert that must get one.
        topology: sizes.
        floor: imbalance that is never worth a transfer.
        max_moves: `[rows]` copies that may be added, beyond those of experts without any.
        active: `[rows]` rows to work on.

    Returns:
        `[rows, logical]` int32.
    """
    xp = _ops.namespace(load)
    mean = _ops.divide(_ops.tree_sum(load), topology.ep_size)
    lightest = xp.min(load / xp.astype(xp.maximum(copies, xp.asarray(1, dtype=xp.int32)), load.dtype), axis=1)
    too_hot = _ops.rounded(mean * (1 + floor)) - _ops.rounded(lightest * (topology.slots_per_rank - 1))
    spare = topology.num_slots - xp.sum(copies, axis=1, dtype=xp.int32)

    def step(state, fixed):
        (copies, share, after, spare, used), (load, too_hot, max_moves) = state, fixed
        gains = xp.astype(xp.argmax(share, axis=1), xp.int32)[:, None]
        loses = xp.astype(xp.argmin(after, axis=1), xp.int32)[:, None]
        hottest, missed = _ops.pick(share, gains)[:, 0], _ops.pick(after, loses)[:, 0]
        free, lost = spare > 0, xp.isinf(hottest)
        factor = xp.where(hottest > too_hot, xp.asarray(1 + floor, dtype=load.dtype), 1 + MARGIN)
        go = (hottest >= 0) & (free | (hottest > factor * missed)) & (lost | (used < max_moves))
        taken = xp.where(free, xp.asarray(0, dtype=xp.int32), xp.asarray(1, dtype=xp.int32))
        for expert, change in ((gains, xp.ones_like(gains)), (loses, -taken[:, None])):
            count = _ops.pick(copies, expert) + change
            copies = _ops.put(copies, expert, count)
            gain, loss = _values(_ops.pick(load, expert), count, topology.ep_size)
            share, after = _ops.put(share, expert, gain), _ops.put(after, expert, loss)
        return (copies, share, after, spare - (1 - taken), used + xp.astype(~lost, xp.int32)), go

    state = copies, *_values(load, copies, topology.ep_size), spare, xp.zeros_like(max_moves)
    return _ops.while_rows(step, state, (load, too_hot, max_moves), active)[0]


def _values(load, copies, most: int):
    """Load that one more copy would share in, or -1 if none is allowed; and load per copy after one less."""
    xp = _ops.namespace(load)
    count = xp.astype(copies, load.dtype)
    share = xp.where(copies < most, load / xp.maximum(count, 1.0), -1.0)
    after = xp.where(copies > 1, load / xp.maximum(count - 1.0, 1.0), xp.inf)
    return xp.where(copies == 0, xp.inf, share), after


def place_copies(
    held: Int[Any, "rows slots"],
    load: Float[Any, "rows logical"],
    wanted: Int[Any, "rows logical"],
    topology: Topology,
    *,
    max_moves: Int[Any, " rows"],
    active: Bool[Any, " rows"],
) -> tuple[Int[Any, "rows slots"], Int[Any, " rows"]]:
    """Drop surplus copies from the busiest ranks and put missing ones, heaviest first, on the lightest.

    A missing copy goes to the lightest rank that has a free slot and not yet the expert. If none has both, slots
    that stay free take the hottest expert that their rank lacks.

    Args:
        held: `[rows, slots]` without two copies of an expert on a rank.
        load: `[rows, logical]`.
        wanted: `[rows, logical]` copies of each expert, summing to at most the slots.
        topology: sizes.
        max_moves: `[rows]` copies that may be added, beyond those of experts without any.
        active: `[rows]` rows to work on.

    Returns:
        `[rows, slots]` int32 and `[rows]` copies added.
    """
    xp = _ops.namespace(held)
    count = xp.astype(xp.maximum(wanted, xp.asarray(1, dtype=xp.int32)), load.dtype)
    share = load / count
    kept = xp.where(active[:, None], _drop(held, share, wanted, topology), held)
    missing = wanted - count_replicas(kept, load.shape[1])
    by_rank = xp.reshape(kept, (-1, topology.ep_size, topology.slots_per_rank))
    rank_load = _ops.tree_sum(copy_share(by_rank, share))
    moves, todo = xp.zeros_like(max_moves), active & xp.any(missing > 0, axis=1)
    # A rank without room weighs infinity.
    room = xp.sum(xp.astype(by_rank == EMPTY, xp.int32), axis=2, dtype=xp.int32)
    state = by_rank, xp.where(room > 0, rank_load, xp.inf), room, missing, moves
    by_rank, *_, moves = _ops.while_rows(_add_step, state, (share,), todo)
    todo = active & xp.any(by_rank == EMPTY, axis=(1, 2)) & (moves < max_moves)
    state = by_rank, xp.zeros(by_rank.shape, dtype=xp.bool), moves
    by_rank, _, moves = _ops.while_rows(_fill_step, state, (load, max_moves), todo)
    return xp.reshape(by_rank, held.shape), moves


def _drop(held, share, wanted, topology: Topology):
    """Empty the slots of surplus copies: of each expert those on the busiest ranks, ties to the lowest slot.

    Ranks that hold the hottest expert that gets a further copy come last: it could not take the slot.
    """
    xp = _ops.namespace(held)
    num_rows, num_slots = held.shape
    by_rank = xp.reshape(held, (num_rows, topology.ep_size, -1))
    rank = xp.arange(num_slots, dtype=xp.int32) // topology.slots_per_rank
    rank_load = _ops.tree_sum(copy_share(by_rank, share))
    gains = wanted > count_replicas(held, share.shape[1])
    hottest = xp.astype(xp.argmax(xp.where(gains, share, -1.0), axis=1, keepdims=True), xp.int32)
    useless = _ops.holds(by_rank, hottest) & xp.any(gains, axis=1, keepdims=True)
    rank_load = xp.where(useless, -1.0, rank_load)
    busy_rank = xp.argsort(xp.argsort(-rank_load, axis=1, stable=True), axis=1, stable=True)
    busy_first = _ops.stable_order(xp.take(busy_rank, rank, axis=1))
    order = _ops.pick(busy_first, _ops.stable_order(_ops.pick(held, busy_first)))
    sorted_ids = _ops.pick(held, order)
    have = count_replicas(held, share.shape[1])
    empty = num_slots - xp.sum(have, axis=1, keepdims=True, dtype=xp.int32)
    start = xp.cumulative_sum(have, axis=1, dtype=xp.int32) - have + empty
    id_or_0 = xp.maximum(sorted_ids, 0)
    nth = xp.arange(num_slots, dtype=xp.int32) - _ops.pick(start, id_or_0)
    surplus = nth < _ops.pick(have - wanted, id_or_0)
    dropped = _ops.pick(surplus & (sorted_ids != EMPTY), _ops.stable_order(order))
    return xp.where(dropped, xp.asarray(EMPTY, dtype=held.dtype), held)


def _add_step(state, fixed):
    """Place the heaviest missing copy of each row, or give it up."""
    (held, rank_load, room, missing, moves), (share,) = state, fixed
    xp = _ops.namespace(held)
    expert = xp.astype(xp.argmax(xp.where(missing > 0, share, -1.0), axis=1, keepdims=True), xp.int32)
    cost = xp.where(_ops.holds(held, expert), xp.inf, rank_load)
    rank = xp.astype(xp.argmin(cost, axis=1, keepdims=True), xp.int32)
    fits = xp.isfinite(_ops.pick(cost, rank))
    on_rank = _ops.pick(held, rank)[:, 0, :]
    place = xp.astype(xp.argmax(xp.astype(on_rank == EMPTY, xp.int8), axis=1, keepdims=True), xp.int32)
    at, flat = rank * held.shape[2] + place, xp.reshape(held, (held.shape[0], -1))
    new_held = xp.reshape(_ops.put(flat, at, xp.where(fits, expert, _ops.pick(flat, at))), held.shape)
    used = xp.astype(fits, xp.int32)
    left = _ops.pick(room, rank) - used
    heavier = _ops.pick(rank_load, rank) + xp.where(fits, _ops.pick(share, expert), 0.0)
    rank_load = _ops.put(rank_load, rank, xp.where(left > 0, heavier, xp.inf))
    still = xp.where(fits, _ops.pick(missing, expert) - 1, xp.zeros_like(expert))
    new_missing = _ops.put(missing, expert, still)
    go = xp.any(missing > 0, axis=1)
    return (new_held, rank_load, _ops.put(room, rank, left), new_missing, moves + used[:, 0]), go


def _fill_step(state, fixed):
    """Give the first free slot that was not tried the hottest expert its rank lacks."""
    (held, tried, moves), (load, max_moves) = state, fixed
    xp = _ops.namespace(held)
    num_rows, size, depth = held.shape
    open_ = xp.reshape((held == EMPTY) & ~tried, (num_rows, -1))
    slot = xp.astype(xp.argmax(xp.astype(open_, xp.int8), axis=1, keepdims=True), xp.int32)
    on_rank = _ops.pick(held, slot // depth)
    expert = xp.arange(load.shape[1], dtype=xp.int32)
    has = xp.any(on_rank[:, 0, :, None] == expert, axis=1)
    copies = count_replicas(xp.reshape(held, (num_rows, -1)), load.shape[1])
    share = load / xp.maximum(xp.astype(copies, load.dtype), 1.0)
    share = xp.where(has, -1.0, share)
    hottest = xp.astype(xp.argmax(share, axis=1, keepdims=True), xp.int32)
    useful = xp.max(share, axis=1, keepdims=True) >= 0
    there = xp.reshape(xp.arange(size * depth, dtype=xp.int32) == slot, held.shape)
    new_held = xp.where(there & useful[:, :, None], hottest[:, :, None], held)
    go = xp.any(open_, axis=1) & (moves < max_moves)
    return (new_held, tried | there, moves + xp.astype(useful[:, 0], xp.int32)), go
