"""Which holder of an expert sends it to a rank that needs it."""

from typing import Any, NamedTuple

from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY, require
from eplb_core.maps import count_replicas
from eplb_core.relief import relieve, relieve_together
from eplb_core.topology import Topology

_TOGETHER = 2**19  # layers * slots * ranks up to which the layers are balanced together; beyond, their sum evens out


class Requests(NamedTuple):
    """Messages that must arrive: one per slot where `wanted` is true.

    expert: int32 `[layers, slots]` the expert each slot asks for.
    wanted: bool `[layers, slots]`.
    """

    expert: Any
    wanted: Any


class Jobs(NamedTuple):
    """Requests packed to the left of each layer's row, with their candidates.

    The candidates of a job are the slots `holders[start:stop]`, ascending, of the flat `holders [layers * slots]`.

    slot: `[layers, jobs]` the slot that asks.
    start, stop: `[layers, jobs]` bounds of the candidates; equal where there is no job or no holder.
    """

    slot: Any
    start: Any
    stop: Any


def choose_senders(held: Int[Any, "layers slots"], requests: Requests, topology: Topology) -> Int[Any, "layers slots"]:
    """Choose the slot that every requested expert is sent from.

    Holders on the node of the receiver come before others. Jobs with one possible rank are settled first. Each
    other job, those with fewest candidates first and then in slot order, goes to the candidate rank that has least
    to send in its layer so far, then in all layers, then is nearest after the receiver, counting on by layer. Where
    the busiest sender of a layer then has two or more messages over the least conceivable, messages are shifted along
    augmenting paths, until it has not or there is no path. Hence, within the sets of candidates, the busiest sender
    of a layer has at most one message more than in the best choice.

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
    jobs = _find_candidates(held, order, requests, topology)
    holders = xp.reshape(xp.astype(order, xp.int32), (-1,))
    sent_from, sent = _settle_forced(holders, jobs, topology)
    undecided = (sent_from == EMPTY) & (jobs.stop > jobs.start)
    # Jobs with few candidates first: the others can still go around them.
    columns, places = _pack_left(undecided, jobs.stop - jobs.start)
    if columns.shape[1] > 0:
        open_ = _ops.pick(undecided, columns)
        slot, start, stop = (_ops.pick(field, columns) for field in jobs)
        open_jobs = Jobs(slot, start, xp.where(open_, stop, start))
        chosen, most_needed = _least_busy(holders, open_jobs, sent, topology)
        chosen = relieve(holders, open_jobs, chosen, sent, most_needed, topology)
        if held.shape[0] * held.shape[1] * topology.ep_size <= _TOGETHER:
            most = xp.maximum(most_needed + 1, _busiest(chosen, open_jobs, sent, topology))
            chosen = relieve_together(holders, open_jobs, chosen, sent, most, topology)
        sent_from = xp.where(undecided, _unpack(chosen, places), sent_from)
    _, places = _pack_left(requests.wanted)
    return xp.where(requests.wanted, _unpack(sent_from, places), xp.asarray(EMPTY, dtype=xp.int32))


def _busiest(chosen, jobs: Jobs, sent, topology: Topology):
    """`[layers]` messages of the busiest sender."""
    xp = _ops.namespace(chosen)
    rank = xp.where(jobs.stop > jobs.start, chosen // topology.slots_per_rank, xp.asarray(EMPTY, dtype=xp.int32))
    return xp.max(sent + count_replicas(rank, topology.ep_size), axis=1)


def _pack_left(mask, rank=None):
    """Columns in which the true entries of `mask` come first, by `rank`, then in order; and where each entry went.

    There are as many columns as any row has true entries where that can be looked at, else all.
    """
    xp = _ops.namespace(mask)
    last = xp.asarray(2**15 - 1, dtype=xp.int32)
    rank = 0 if rank is None else xp.astype(xp.minimum(rank, last - 1), xp.int32)
    columns = _ops.stable_order(xp.where(mask, rank, last))
    places = _ops.stable_order(columns)
    if not _ops.is_traced(mask):
        columns = columns[:, : int(xp.max(xp.sum(xp.astype(mask, xp.int32), axis=1)))]
    return columns, places


def _unpack(packed, places):
    """Undo `_pack_left` for entries that were true; elsewhere anything."""
    xp = _ops.namespace(places)
    if packed.shape[1] == 0:
        return xp.full(places.shape, EMPTY, dtype=xp.int32)
    return _ops.pick(packed, xp.minimum(places, xp.asarray(packed.shape[1] - 1, dtype=places.dtype)))


def _find_candidates(held, order, requests: Requests, topology: Topology) -> Jobs:
    xp = _ops.namespace(held)
    integer = _ops.int_dtype(xp)
    (num_layers, num_slots), largest = held.shape, xp.iinfo(integer).max
    require(
        num_layers * num_slots * num_slots <= largest,
        "`plan_moves` with 32-bit integers needs layers * slots^2 below 2^31",
        f"layers={num_layers}, slots={num_slots}",
        "Enable jax_enable_x64, or plan some layers at a time.",
    )
    slot, _ = _pack_left(requests.wanted)
    wanted = _ops.pick(requests.wanted, slot)
    # One search serves all layers: the layer is the leading digit of the key.
    layer_key = xp.arange(num_layers, dtype=integer)[:, None] * (largest // num_layers)
    keys = xp.reshape(layer_key + xp.astype(_ops.pick(held, order), integer) + 1, (-1,))
    expert = _ops.pick(xp.astype(requests.expert, integer), slot)
    asked = xp.reshape(layer_key + expert + 1, (-1,))
    start, stop = xp.searchsorted(keys, asked), xp.searchsorted(keys, asked, side="right")
    if topology.num_nodes > 1:
        # Within one expert's run slots ascend, so a node is a part of the run: (run, slot) is sorted as well.
        run = xp.searchsorted(keys, keys)
        position = run * num_slots + xp.reshape(xp.astype(order, integer), (-1,))
        node_first = xp.astype(slot, integer) // topology.slots_per_node * topology.slots_per_node
        bound = start * num_slots + xp.reshape(node_first, (-1,))
        near_start = xp.searchsorted(position, bound)
        near_stop = xp.searchsorted(position, bound + topology.slots_per_node)
        near = (near_stop > near_start) & (stop > start)
        start, stop = xp.where(near, near_start, start), xp.where(near, near_stop, stop)
    start, stop = xp.reshape(start, slot.shape), xp.reshape(stop, slot.shape)
    return Jobs(slot=slot, start=start, stop=xp.where(wanted, stop, start))


def _settle_forced(holders, jobs: Jobs, topology: Topology):
    """Jobs all of whose candidates are on one rank, and what these give each rank to send."""
    xp = _ops.namespace(holders)
    last = holders.shape[0] - 1
    first_slot = xp.take(holders, xp.reshape(xp.clip(jobs.start, 0, last), (-1,)))
    last_slot = xp.take(holders, xp.reshape(xp.clip(jobs.stop - 1, 0, last), (-1,)))
    first_slot, last_slot = xp.reshape(first_slot, jobs.slot.shape), xp.reshape(last_slot, jobs.slot.shape)
    sender = first_slot // topology.slots_per_rank
    forced = (jobs.stop > jobs.start) & (sender == last_slot // topology.slots_per_rank)
    empty = xp.asarray(EMPTY, dtype=xp.int32)
    sent = count_replicas(xp.where(forced, sender, empty), topology.ep_size)
    return xp.where(forced, first_slot, empty), sent


def _least_busy(holders, jobs: Jobs, sent, topology: Topology):
    """Give the open jobs in turn to the least busy candidate; in layers where that ends badly, once more.

    Returns the chosen slots `[layers, jobs]` and `[layers]` a number of messages that some sender must have anyway:
    those of the busiest forced sender, or the mean, rounded up.
    """
    xp = _ops.namespace(holders)
    num_layers, ep_size = sent.shape
    ranks, layers = xp.arange(ep_size, dtype=xp.int32), xp.arange(num_layers, dtype=xp.int32)[:, None]
    traced = _ops.is_traced(jobs.start)
    width = holders.shape[0] // num_layers if traced else max(int(xp.max(jobs.stop - jobs.start)), 1)
    offset, last = xp.arange(width, dtype=jobs.start.dtype), holders.shape[0] - 1

    def give_next(sent, job):
        slot, start, stop, current = (field[:, None] for field in job)
        sent = sent - xp.astype((ranks == current // topology.slots_per_rank) & (stop > start), xp.int32)
        position = start + offset
        inside = position < stop
        candidate = xp.reshape(xp.take(holders, xp.reshape(xp.minimum(position, last), (-1,))), position.shape)
        sender = candidate // topology.slots_per_rank
        distance = (sender - xp.astype(slot, xp.int32) // topology.slots_per_rank - layers) % ep_size
        busy = xp.argsort(xp.argsort(xp.sum(sent, axis=0), stable=True), stable=True)
        busy = xp.astype(xp.reshape(xp.take(busy, xp.reshape(sender, (-1,))), sender.shape), xp.int32)
        cost = (_ops.pick(sent, sender) * ep_size + busy) * ep_size + distance
        best = xp.argmin(xp.where(inside, cost, xp.iinfo(xp.int32).max), axis=1, keepdims=True)
        chosen = _ops.pick(candidate, best)
        busier = (ranks == chosen // topology.slots_per_rank) & (stop > start)
        return sent + xp.astype(busier, xp.int32), (chosen[:, 0],)

    by_job = tuple(xp.permute_dims(field, (1, 0)) for field in jobs)
    nobody = xp.full(by_job[0].shape, EMPTY, dtype=xp.int32)
    total, (chosen,) = _ops.scan(give_next, sent, (*by_job, nobody))
    mean = -(-xp.sum(total, axis=1, dtype=xp.int32) // ep_size)
    least = xp.maximum(mean, xp.max(sent, axis=1))
    late = xp.max(total, axis=1) > least + 1
    if traced or bool(xp.any(late)):
        # Choosing again, when all others have chosen, spares most of the search for paths.
        _, (again,) = _ops.scan(give_next, total, (*by_job, chosen))
        chosen = xp.where(late, again, chosen)
    return xp.permute_dims(chosen, (1, 0)), least
