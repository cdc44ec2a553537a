"""Which holder of an expert sends it to a rank that needs it."""

from typing import Any

from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.moves.candidates import Jobs, Requests, find_candidates
from eplb_core.moves.least_busy import least_busy
from eplb_core.moves.relief import relieve, relieve_together
from eplb_core.topology import Topology

_TOGETHER = 2**19  # layers * slots * ranks up to which the layers are balanced together; beyond, their sum evens out


def choose_senders(held: Int[Any, "layers slots"], requests: Requests, topology: Topology) -> Int[Any, "layers slots"]:
    """Choose the slot that every requested expert is sent from.

    Holders on the node of the receiver come before others. Jobs with one possible rank are settled first. Each
    other job, those with fewest candidates first and then in slot order, goes to the candidate rank that has least
    to send in its layer so far, then in all layers, then the lowest. Where the busiest sender of a layer then has two
    or more messages over the least conceivable, messages are shifted along augmenting paths, until it has not or
    there is no path. Hence, within the sets of candidates, the busiest sender of a layer has at most one message more
    than in the best choice.

    Up to `layers * slots * ranks = 2^19` the same is then done for all layers together, so far as no layer gets worse
    by it than that: the rank with most to send in all has at most one message more than it must.

    Args:
        held: `[layers, slots]` expert ids that can be read; `EMPTY` where nothing can.
        requests: what must arrive where.
        topology: sizes.

    Returns:
        `[layers, slots]` int32: for every wanted slot the lowest slot of the chosen rank that holds the expert, or
        `EMPTY` if there is none; `EMPTY` elsewhere.
    """
    xp = _ops.namespace(held)
    order = _ops.stable_order(held)
    holders = xp.reshape(xp.astype(order, xp.int32), (-1,))
    jobs = find_candidates(held, order, requests, topology)
    sender = _settle_forced(holders, jobs, topology)
    sent = _ops.count_ids(sender, topology.ep_size)
    undecided = (sender == EMPTY) & (jobs.stop > jobs.start)
    # Jobs with few candidates first: the others can still go around them.
    columns, places = _pack_left(undecided, jobs.stop - jobs.start)
    if columns.shape[1] > 0:
        start, stop = (_ops.pick(field, columns) for field in jobs)
        open_jobs = Jobs(start, xp.where(_ops.pick(undecided, columns), stop, start))
        chosen, most_needed = least_busy(holders, open_jobs, sent, topology)
        chosen = relieve(holders, open_jobs, chosen, sent, most_needed, topology)
        if held.shape[0] * held.shape[1] * topology.ep_size <= _TOGETHER:
            busiest = xp.max(sent + _ops.count_ids(chosen, topology.ep_size), axis=1)
            chosen = relieve_together(holders, open_jobs, chosen, sent, xp.maximum(most_needed + 1, busiest), topology)
        last = xp.asarray(columns.shape[1] - 1, dtype=places.dtype)
        sender = xp.where(undecided, _ops.pick(chosen, xp.minimum(places, last)), sender)
    return _lowest_slot(held, requests.expert, sender, topology)


def _lowest_slot(held, expert, sender, topology: Topology):
    """The lowest slot of each `sender [layers, slots]` that holds the expert; `EMPTY` where there is no sender."""
    xp = _ops.namespace(held)
    first = xp.maximum(sender, 0) * topology.slots_per_rank
    layer = xp.arange(held.shape[0], dtype=xp.int32)[:, None] * topology.ep_size
    by_rank = xp.reshape(held, (-1, topology.slots_per_rank))
    rows = xp.take(by_rank, xp.reshape(layer + xp.maximum(sender, 0), (-1,)), axis=0)
    local = xp.reshape(_ops.index_in(rows, xp.reshape(expert, (-1, 1))), sender.shape)
    return xp.where(sender == EMPTY, sender, first + local)


def _pack_left(mask, rank):
    """Columns in which the true entries of `mask` come first, by `rank`, then in order; and where each entry went.

    There are as many columns as any row has true entries where that can be looked at, else all.
    """
    xp = _ops.namespace(mask)
    last = xp.asarray(2**15 - 1, dtype=xp.int32)
    columns = _ops.stable_order(xp.where(mask, xp.astype(xp.minimum(rank, last - 1), xp.int32), last))
    places = _ops.inverse(columns)
    if not _ops.is_traced(mask):
        columns = columns[:, : int(xp.max(xp.sum(xp.astype(mask, xp.int32), axis=1)))]
    return columns, places


def _settle_forced(holders, jobs: Jobs, topology: Topology):
    """`[layers, jobs]` the rank of jobs all of whose candidates are on one rank, else `EMPTY`."""
    xp = _ops.namespace(holders)
    zero, last = (xp.asarray(end, dtype=jobs.start.dtype) for end in (0, holders.shape[0] - 1))
    first_rank, last_rank = (
        xp.reshape(xp.take(holders, xp.reshape(end, (-1,))) // topology.slots_per_rank, end.shape)
        for end in (xp.minimum(jobs.start, last), xp.maximum(jobs.stop - 1, zero))
    )
    forced = (jobs.stop > jobs.start) & (first_rank == last_rank)
    return xp.where(forced, first_rank, xp.asarray(EMPTY, dtype=xp.int32))
