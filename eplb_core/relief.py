"""Relieve the busiest senders of messages that others can send."""

from typing import Any

from jaxtyping import Bool, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.topology import Topology


def relieve(
    holders: Int[Any, " all_slots"],
    jobs: Any,
    chosen: Int[Any, "layers jobs"],
    forced: Int[Any, "layers ep_size"],
    unavoidable: Int[Any, " layers"],
    topology: Topology,
) -> Int[Any, "layers jobs"]:
    """Shift messages along augmenting paths until no layer's busiest sender is far from the best possible.

    A layer is done when its busiest sender has at most one message more than `unavoidable`, or when no path leads
    from its busiest senders to one with at least two messages less, in which case no choice of senders is better.
    One shift costs `O(jobs * ep_size^2)` and is rarely needed.

    Args:
        holders: flat `[layers * slots]` slots sorted by expert within each layer.
        jobs: `senders.Jobs`, `[layers, jobs]` each.
        chosen: `[layers, jobs]` the slot that each job is sent from.
        forced: `[layers, ep_size]` messages that each rank sends besides these jobs.
        unavoidable: `[layers]` a number of messages that some sender has in every choice.
        topology: sizes.

    Returns:
        `[layers, jobs]` int32 the slot that each job is sent from.

    References:
        Berge, 1957, on augmenting paths; the same argument for unit jobs on restricted machines is textbook.
    """
    xp = _ops.namespace(chosen)
    ranks = xp.arange(topology.ep_size, dtype=xp.int32)
    active = jobs.stop > jobs.start
    sender = xp.where(active, chosen // topology.slots_per_rank, xp.asarray(EMPTY, dtype=xp.int32))
    sent = forced + xp.sum(xp.astype(sender[:, :, None] == ranks, xp.int32), axis=1, dtype=xp.int32)
    late = xp.max(sent, axis=1) > unavoidable + 1
    layers = xp.arange(late.shape[0]) if _ops.is_traced(late) else xp.nonzero(late)[0]
    if layers.shape[0] == 0:
        return chosen
    active, sender, sent, most = (xp.take(x, layers, axis=0) for x in (active, sender, sent, unavoidable + 1))
    slot_of = _slot_on_rank(holders, jobs, layers, topology)
    possible = (slot_of != EMPTY) & active[:, :, None]
    can_take = xp.astype(possible, xp.float32)

    def shift_one(state):
        sender, sent, late = state
        mine = xp.astype(sender[:, :, None] == ranks, xp.float32)
        passes = xp.matmul(xp.matrix_transpose(mine), can_take) > 0
        busiest = xp.max(sent, axis=1, keepdims=True)
        parent, reached = _search(passes, sent == busiest)
        end = xp.argmin(xp.where(reached, sent, xp.iinfo(xp.int32).max), axis=1, keepdims=True)
        shift = late[:, None] & (xp.take_along_axis(sent, end, axis=1) <= busiest - 2)
        sender, start = _shift_along(sender, possible, parent, xp.astype(end, xp.int32), shift)
        step = xp.astype(ranks == end, xp.int32) - xp.astype(ranks == start, xp.int32)
        sent = xp.where(shift, sent + step, sent)
        return sender, sent, shift[:, 0] & (xp.max(sent, axis=1) > most)

    state = sender, sent, xp.max(sent, axis=1) > most
    sender, _, _ = _ops.while_loop(lambda state: xp.any(state[2]), shift_one, state)
    found = xp.take_along_axis(slot_of, xp.maximum(sender, 0)[:, :, None], axis=2)[:, :, 0]
    row = xp.cumulative_sum(xp.astype(late, xp.int32)) - 1 if not _ops.is_traced(late) else layers
    return xp.where(late[:, None], xp.take(found, xp.maximum(row, 0), axis=0), chosen)


def relieve_together(
    holders: Int[Any, " all_slots"],
    jobs: Any,
    chosen: Int[Any, "layers jobs"],
    forced: Int[Any, "layers ep_size"],
    most: Int[Any, " layers"],
    topology: Topology,
) -> Int[Any, "layers jobs"]:
    """Shift messages until the rank that sends most in all layers together is near the best possible.

    Done when that rank has at most one message more than the mean or than some forced sender, or when no path
    relieves it. No sender of a layer gets more than `most` in it. One shift costs `O(layers * jobs * ep_size^2)`.

    Args, Returns: as `relieve`, with `most` `[layers]` that a sender may have in each layer.
    """
    xp = _ops.namespace(chosen)
    (num_layers, num_jobs), ep_size = chosen.shape, topology.ep_size
    ranks = xp.arange(ep_size, dtype=xp.int32)
    active = jobs.stop > jobs.start
    sender = xp.where(active, chosen // topology.slots_per_rank, xp.asarray(EMPTY, dtype=xp.int32))
    slot_of = _slot_on_rank(holders, jobs, xp.arange(num_layers), topology)
    possible = (slot_of != EMPTY) & active[:, :, None]

    def in_layers(sender):
        by_layer = xp.reshape(sender, (num_layers, num_jobs, 1)) == ranks
        return forced + xp.sum(xp.astype(by_layer, xp.int32), axis=1, dtype=xp.int32)

    def in_all(sender):
        return xp.sum(in_layers(sender), axis=0, dtype=xp.int32)[None, :]

    total = in_all(sender)
    mean = -(-xp.sum(total, dtype=xp.int32) // ep_size)
    enough = xp.maximum(mean, xp.max(xp.sum(forced, axis=0, dtype=xp.int32))) + 1

    def shift_one(state):
        sender, _ = state
        room = in_layers(sender) < most[:, None]
        can_take = xp.reshape(possible & room[:, None, :], (1, num_layers * num_jobs, ep_size))
        mine = xp.astype(sender[:, :, None] == ranks, xp.float32)
        passes = xp.matmul(xp.matrix_transpose(mine), xp.astype(can_take, xp.float32)) > 0
        total = in_all(sender)
        busiest = xp.max(total, axis=1, keepdims=True)
        parent, reached = _search(passes, total == busiest)
        end = xp.argmin(xp.where(reached, total, xp.iinfo(xp.int32).max), axis=1, keepdims=True)
        shift = (busiest > enough) & (xp.take_along_axis(total, end, axis=1) <= busiest - 2)
        sender, _ = _shift_along(sender, can_take, parent, xp.astype(end, xp.int32), shift)
        return sender, shift[:, 0]

    state = xp.reshape(sender, (1, -1)), xp.max(total, axis=1) > enough
    sender, _ = _ops.while_loop(lambda state: xp.any(state[1]), shift_one, state)
    sender = xp.reshape(sender, chosen.shape)
    found = xp.take_along_axis(slot_of, xp.maximum(sender, 0)[:, :, None], axis=2)[:, :, 0]
    return xp.where(active, found, chosen)


def _slot_on_rank(holders, jobs, layers, topology: Topology) -> Int[Any, "late jobs ep_size"]:
    """The lowest candidate slot of each job on each rank, or `EMPTY`, in the given layers."""
    xp = _ops.namespace(holders)
    num_slots = topology.num_slots
    start, stop = (xp.take(x, layers, axis=0) for x in (jobs.start, jobs.stop))
    by_expert = xp.take(xp.reshape(holders, (-1, num_slots)), layers, axis=0)
    # Where each slot stands among the holders, which are sorted by expert.
    position = xp.astype(xp.argsort(by_expert, axis=1, stable=True), start.dtype)
    position = (position + xp.astype(layers, start.dtype)[:, None] * num_slots)[:, None, :]
    candidate = (position >= start[:, :, None]) & (position < stop[:, :, None])
    by_rank = xp.reshape(candidate, (*start.shape, topology.ep_size, topology.slots_per_rank))
    first = xp.astype(xp.argmax(xp.astype(by_rank, xp.int8), axis=3), xp.int32)
    first = first + xp.arange(topology.ep_size, dtype=xp.int32) * topology.slots_per_rank
    return xp.where(xp.any(by_rank, axis=3), first, xp.asarray(EMPTY, dtype=xp.int32))


def _search(passes: Bool[Any, "layers ep_size ep_size"], start: Bool[Any, "layers ep_size"]):
    """Breadth-first: the rank from which each rank is first reached (`EMPTY` at the start), and who is reached."""
    xp = _ops.namespace(start)

    def grow(state):
        frontier, reached, parent = state
        enter = frontier[:, :, None] & passes
        found = xp.any(enter, axis=1) & ~reached
        via = xp.astype(xp.argmax(xp.astype(enter, xp.int8), axis=1), xp.int32)
        return found, reached | found, xp.where(found, via, parent)

    nobody = xp.full(start.shape, EMPTY, dtype=xp.int32)
    _, reached, parent = _ops.while_loop(lambda state: xp.any(state[0]), grow, (start, start, nobody))
    return parent, reached


def _shift_along(sender, possible, parent, end, shift):
    """Along the path to `end`, give one message of each rank to the next rank. Returns the senders and the start."""
    xp = _ops.namespace(sender)
    columns = xp.arange(sender.shape[1], dtype=xp.int32)

    def step_back(state):
        sender, rank, _ = state
        giver = xp.take_along_axis(parent, rank, axis=1)
        go = shift & (giver != EMPTY)
        takes = xp.take_along_axis(possible, xp.broadcast_to(rank[:, :, None], (*sender.shape, 1)), axis=2)[:, :, 0]
        job = xp.argmax(xp.astype((sender == giver) & takes, xp.int8), axis=1, keepdims=True)
        sender = xp.where(go & (columns == job), rank, sender)
        return sender, xp.where(go, giver, rank), go

    going = xp.ones(end.shape, dtype=xp.bool)
    sender, start, _ = _ops.while_loop(lambda state: xp.any(state[2]), step_back, (sender, end, going))
    return sender, start
