"""Relieve the busiest senders of messages that others can send."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.moves.candidates import Jobs
from eplb_core.moves.together import shift_together
from eplb_core.topology import Topology


def relieve(
    holders: Int[Any, " all_slots"],
    jobs: Jobs,
    sender: Int[Any, "layers jobs"],
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
        jobs: `[layers, jobs]`.
        sender: `[layers, jobs]` int32 the rank that sends each job; `EMPTY` where there is no job.
        forced: `[layers, ep_size]` messages that each rank sends besides these jobs.
        unavoidable: `[layers]` a number of messages that some sender has in every choice.
        topology: sizes.

    Returns:
        `[layers, jobs]` int32 the rank that sends each job.

    References:
        Berge, 1957, on augmenting paths; the same argument for unit jobs on restricted machines is textbook.
    """
    xp = _ops.namespace(sender)
    late = xp.max(forced + _ops.count_ids(sender, topology.ep_size), axis=1) > unavoidable + 1
    layers = xp.arange(late.shape[0]) if _ops.is_traced(late) else xp.nonzero(late)[0]
    if layers.shape[0] == 0:
        return sender
    possible = _possible(holders, jobs, layers, topology)
    besides, most, rows = (xp.take(x, layers, axis=0) for x in (forced, unavoidable + 1, sender))

    def count(rows):
        return besides + _ops.count_ids(rows, topology.ep_size)

    shifted = _shift_until(most, rows, count, lambda _: possible)
    row = layers if _ops.is_traced(late) else xp.cumulative_sum(xp.astype(late, xp.int32)) - 1
    return xp.where(late[:, None], xp.take(shifted, xp.maximum(row, 0), axis=0), sender)


def relieve_together(
    holders: Int[Any, " all_slots"],
    jobs: Jobs,
    sender: Int[Any, "layers jobs"],
    forced: Int[Any, "layers ep_size"],
    most: Int[Any, " layers"],
    topology: Topology,
) -> Int[Any, "layers jobs"]:
    """Shift messages until the rank that sends most in all layers together is near the best possible.

    Done when that rank has at most one message more than the mean or than some forced sender, or when no path
    relieves it. No sender of a layer gets more than `most` in it. One shift costs `O(layers * jobs * ep_size^2)`.

    Args, Returns: as `relieve`, with `most` `[layers]` that a sender may have in each layer.
    """
    xp = _ops.namespace(sender)
    ep_size = topology.ep_size

    def in_layers(row):
        return forced + _ops.count_ids(xp.reshape(row, sender.shape), ep_size)

    def in_all(row):
        return xp.sum(in_layers(row), axis=0, dtype=xp.int32)[None, :]

    def can_take(row):
        room = in_layers(row) < most[:, None]
        return xp.reshape(possible & room[:, None, :], (1, -1, ep_size))

    row = xp.reshape(sender, (1, -1))
    total = in_all(row)
    mean = -(-xp.sum(total, dtype=xp.int32) // ep_size)
    enough = xp.maximum(mean, xp.max(xp.sum(forced, axis=0, dtype=xp.int32))) + 1
    if not _ops.is_traced(total) and not bool(xp.any(total > enough)):
        return sender
    possible = _possible(holders, jobs, xp.arange(sender.shape[0]), topology)
    if _ops.is_numpy(xp):
        return shift_together(sender, possible, in_layers(row), most, int(enough))
    return xp.reshape(_shift_until(enough, row, in_all, can_take), sender.shape)


def _shift_until(
    most: Int[Any, "*rows"], sender: Int[Any, "rows jobs"], count: Callable, can_take: Callable
) -> Int[Any, "rows jobs"]:
    """Relieve the busiest senders of each row, one shift at a time, until none has above `most` or no path is left.

    Args:
        most: messages that are few enough, for each row or for all.
        sender: the rank that sends each job; `EMPTY` where there is no job.
        count: from senders to `[rows, ep_size]` messages of each rank.
        can_take: from senders to bool `[rows, jobs, ep_size]`, whether a rank can take over a job.
    """
    xp = _ops.namespace(sender)

    def shift_one(state):
        sender, late = state
        sent, takes = count(sender), can_take(sender)
        busiest = xp.max(sent, axis=1, keepdims=True)
        parent, reached = _search(_passes(sender, takes), sent == busiest)
        end = xp.argmin(xp.where(reached, sent, xp.iinfo(xp.int32).max), axis=1, keepdims=True)
        shift = late[:, None] & (xp.take_along_axis(sent, end, axis=1) <= busiest - 2)
        sender = _shift_along(sender, takes, parent, xp.astype(end, xp.int32), shift)
        return sender, shift[:, 0] & (xp.max(count(sender), axis=1) > most)

    state = sender, xp.max(count(sender), axis=1) > most
    return _ops.while_loop(lambda state: xp.any(state[1]), shift_one, state)[0]


def _possible(holders, jobs, layers, topology: Topology) -> Bool[Any, "late jobs ep_size"]:
    """Whether each rank is a candidate of each job, in the given layers."""
    xp = _ops.namespace(holders)
    num_slots = topology.num_slots
    start, stop = (xp.take(x, layers, axis=0) for x in (jobs.start, jobs.stop))
    if _ops.is_numpy(xp):
        return _possible_numpy(holders, start.ravel(), stop.ravel(), topology).reshape(*start.shape, -1)
    by_expert = xp.take(xp.reshape(holders, (-1, num_slots)), layers, axis=0)
    # Where each slot stands among the holders, which are sorted by expert.
    position = xp.astype(xp.argsort(by_expert, axis=1, stable=True), start.dtype)
    position = (position + xp.astype(layers, start.dtype)[:, None] * num_slots)[:, None, :]
    candidate = (position >= start[:, :, None]) & (position < stop[:, :, None])
    return xp.any(xp.reshape(candidate, (*start.shape, topology.ep_size, topology.slots_per_rank)), axis=3)


def _possible_numpy(holders, start, stop, topology: Topology) -> np.ndarray:
    """Go over the candidates instead of all slots: `[jobs, ep_size]` for flat jobs."""
    width = stop - start
    position = np.repeat(start - (np.cumsum(width) - width), width)
    position += np.arange(position.size)
    possible = np.zeros((start.size, topology.ep_size), dtype=bool)
    possible[np.repeat(np.arange(start.size), width), holders[position] // topology.slots_per_rank] = True
    return possible


def _passes(sender, takes) -> Bool[Any, "rows ep_size ep_size"]:
    """Whether the first rank sends a job that the second can take."""
    xp = _ops.namespace(sender)
    num_rows, _, ep_size = takes.shape
    if _ops.is_numpy(xp):
        passes = np.zeros((num_rows, ep_size, ep_size), dtype=bool)
        row, job, rank = np.nonzero(takes)
        passes[row, sender[row, job], rank] = True
        return passes
    mine = xp.astype(sender[:, :, None] == xp.arange(ep_size, dtype=sender.dtype), xp.float32)
    return xp.matmul(xp.matrix_transpose(mine), xp.astype(takes, xp.float32)) > 0


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
    """Along the path to `end`, give one message of each rank to the next rank."""
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
    return _ops.while_loop(lambda state: xp.any(state[2]), step_back, (sender, end, going))[0]
