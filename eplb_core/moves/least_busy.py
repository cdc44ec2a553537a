"""Senders chosen one message after another, each the least busy one."""

from collections.abc import Callable

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.moves.candidates import Jobs
from eplb_core.topology import Topology


def least_busy(holders, jobs: Jobs, sent, topology: Topology):
    """Give the jobs in turn to the least busy candidate; in layers where that ends badly, once more.

    Args:
        holders: flat `[layers * slots]` slots sorted by expert within each layer.
        jobs: `[layers, jobs]`, at least one with candidates.
        sent: `[layers, ep_size]` int32 messages that each rank sends besides these jobs.
        topology: sizes.

    Returns:
        `[layers, jobs]` int32 the chosen ranks, `EMPTY` where there is no job; `[layers]` int32 messages that some
        sender has in every choice: those of the busiest sender in `sent`, or the mean, rounded up.
    """
    xp = _ops.namespace(holders)
    give = (_turns_numpy if _ops.is_numpy(xp) else _turns)(holders, jobs, topology)
    total, chosen = give(sent, xp.full(jobs.start.shape, EMPTY, dtype=xp.int32))
    mean = -(-xp.sum(total, axis=1, dtype=xp.int32) // topology.ep_size)
    least = xp.maximum(mean, xp.max(sent, axis=1))
    late = xp.max(total, axis=1) > least + 1
    if _ops.is_traced(late) or bool(xp.any(late)):
        # Choosing again, when all others have chosen, spares most of the search for paths.
        _, again = give(total, chosen)
        chosen = xp.where(late[:, None], again, chosen)
    return chosen, least


def _turns(holders, jobs: Jobs, topology: Topology) -> Callable:
    """`(sent, current) -> (sent, chosen)`: every job in turn leaves its current rank for the least busy candidate."""
    xp = _ops.namespace(holders)
    ep_size, num_layers = topology.ep_size, jobs.start.shape[0]
    ranks = xp.arange(ep_size, dtype=xp.int32)
    traced = _ops.is_traced(jobs.start)
    width = holders.shape[0] // num_layers if traced else max(int(xp.max(jobs.stop - jobs.start)), 1)
    offset, last = xp.arange(width, dtype=jobs.start.dtype), holders.shape[0] - 1

    def give_next(sent, job):
        start, stop, current = (field[:, None] for field in job)
        sent = sent - xp.astype(ranks == current, xp.int32)
        position = start + offset
        candidate = xp.take(holders, xp.reshape(xp.minimum(position, last), (-1,))) // topology.slots_per_rank
        candidate = xp.reshape(candidate, position.shape)
        busy = xp.argsort(xp.argsort(xp.sum(sent, axis=0), stable=True), stable=True)
        busy = xp.astype(xp.reshape(xp.take(busy, xp.reshape(candidate, (-1,))), candidate.shape), xp.int32)
        cost = _ops.pick(sent, candidate) * ep_size + busy
        best = xp.argmin(xp.where(position < stop, cost, xp.iinfo(xp.int32).max), axis=1, keepdims=True)
        chosen = xp.where(stop > start, _ops.pick(candidate, best), xp.asarray(EMPTY, dtype=xp.int32))
        return sent + xp.astype(ranks == chosen, xp.int32), (chosen[:, 0],)

    def give(sent, current):
        sent, (chosen,) = _ops.scan(give_next, sent, tuple(xp.permute_dims(x, (1, 0)) for x in (*jobs, current)))
        return sent, xp.permute_dims(chosen, (1, 0))

    return give


def _turns_numpy(holders: np.ndarray, jobs: Jobs, topology: Topology) -> Callable:
    """`_turns` on flat lists of the candidates that there are, with all that a choice hangs on in one integer.

    The cost of a rank is (messages in the layer, messages in all layers, rank), most significant first: the least
    cost names its rank.
    """
    num_layers, ep_size = jobs.start.shape[0], topology.ep_size
    turn, layer = np.nonzero((jobs.stop > jobs.start).T)
    start, stop = (field[layer, turn].astype(np.intp) for field in jobs)
    until = np.cumsum(stop - start)
    # Candidates are numbered on within a job, and jump from the last of one job to the first of the next.
    position = np.ones(until[-1], dtype=np.intp)
    position[0] = start[0]
    position[until[:-1]] = start[1:] - stop[:-1] + 1
    np.cumsum(position, out=position)
    rank_of = holders.astype(np.intp) // topology.slots_per_rank
    in_layer = rank_of.reshape(num_layers, -1) + np.arange(num_layers)[:, None] * ep_size
    first, base = until - (stop - start), layer * ep_size
    job_turns = np.searchsorted(turn, np.arange(jobs.start.shape[1] + 1))
    candidate_turns = np.append(first, position.size)[job_turns]
    within = first - candidate_turns[turn]

    def by_turn(flat, ends):
        return [flat[begin:end] for begin, end in zip(ends.tolist(), ends[1:].tolist(), strict=False)]

    turns = [by_turn(table.take(position), candidate_turns) for table in (rank_of, in_layer)]
    turns += [by_turn(flat, job_turns) for flat in (within, base)]
    message = 1 << (ep_size - 1).bit_length()
    in_a_layer = message * (holders.size + 1)

    def give(sent, current):
        layer_cost = sent.ravel().astype(np.int64) * in_a_layer
        total_cost = sent.sum(axis=0, dtype=np.int64) * message + np.arange(ep_size)
        current = current[layer, turn].astype(np.intp)
        leaves = bool((current != EMPTY).any())
        chosen = np.empty_like(current)
        of_job = (by_turn(flat, job_turns) for flat in (current, chosen))
        for rank, in_layer, within, base, leaving, best in zip(*turns, *of_job, strict=True):
            if leaves:
                np.subtract.at(layer_cost, base + leaving, in_a_layer)
                np.subtract.at(total_cost, leaving, message)
            cost = layer_cost.take(in_layer)
            cost += total_cost.take(rank)
            np.bitwise_and(np.minimum.reduceat(cost, within), message - 1, out=best)
            np.add.at(layer_cost, base + best, in_a_layer)
            np.add.at(total_cost, best, message)
        placed = np.full(jobs.start.shape, EMPTY, dtype=np.int32)
        placed[layer, turn] = chosen
        return (layer_cost // in_a_layer).reshape(sent.shape).astype(np.int32), placed

    return give
