"""Keep what is in place: change the number of copies only where it pays, then swap only what is out of tolerance."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.maps import count_replicas
from eplb_core.policies.copies import exchange_copies, place_copies
from eplb_core.policies.search import copy_share, swap_copies
from eplb_core.topology import Topology

TOLERANCE = 0.01  # imbalance that is never worth a transfer
CAUTION = 0.55  # share of the usual deviation of a rank that is left as it is
MEMORY = 0.5  # share of a transient deviation that is expected not to return


class Aim(NamedTuple):
    """What one rebalance tries to reach, per row.

    slack: `[rows]` imbalance over the mean that is accepted.
    target: `[rows]` rank load at which the row is done.
    offset: `[rows, ep_size]` correction of today's rank loads towards those expected next.
    """

    slack: Any
    target: Any
    offset: Any


def incremental(
    load: Float[Any, "rows logical"],
    previous: Int[Any, "rows slots"],
    topology: Topology,
    *,
    tolerance: float | None,
    max_moves: Int[Any, " rows"],
    cross_node_cost: float,
) -> Int[Any, "rows slots"]:
    """Improve a placement with few transfers.

    A row whose busiest rank is within the slack of a lower bound is returned as it is. In others, first the copies
    change: one more for the hottest expert, one less for the expert that misses it least, as long as the difference
    is large; surplus copies leave the busiest ranks and missing ones go to the lightest. Then copies are swapped
    (`search.swap_copies`). Second copies of an expert on a rank are free slots. An expert that has no copy gets
    one, whatever the budget.

    Args:
        load: `[rows, logical]` finite, >= 0.
        previous: `[rows, slots]` expert ids or `EMPTY`.
        topology: sizes of a row.
        tolerance: accepted imbalance over the bound; None to learn it from how far the load has moved (`aim`).
        max_moves: `[rows]` transfers that each row may spend.
        cross_node_cost: cost of a swap between nodes, that within a node being 1.

    Returns:
        `[rows, slots]` int32. `EMPTY` where no expert has use for a further copy.
    """
    xp = _ops.namespace(load)
    previous = xp.astype(previous, xp.int32)
    single = without_doubles(previous, topology)
    copies = count_replicas(single, load.shape[1])
    goal = aim(load, single, copies, topology, tolerance)
    share = load / xp.astype(xp.maximum(copies, _one(xp)), load.dtype)
    rank_load = _rank_load(single, share, topology)
    settled = (xp.max(rank_load, axis=1) <= goal.target) & xp.all(copies > 0, axis=1)
    floor = TOLERANCE if tolerance is None else tolerance

    wanted = exchange_copies(load, copies, topology, floor=floor, max_moves=max_moves, active=~settled)
    placed, moves = place_copies(single, load, wanted, topology, max_moves=max_moves, active=~settled)
    share = load / xp.astype(xp.maximum(count_replicas(placed, load.shape[1]), _one(xp)), load.dtype)
    worth = goal.slack * _mean(load, topology)
    swapped = swap_copies(
        placed,
        share,
        topology,
        target=xp.where(settled, xp.inf, goal.target),
        worth=worth * worth,
        offset=goal.offset,
        max_moves=max_moves - moves,
        cross_node_cost=cross_node_cost,
    )
    # A second copy whose slot the budget could not fill stays: it costs nothing.
    swapped = xp.where((swapped == EMPTY) & (single != previous), previous, swapped)
    return xp.where(settled[:, None], previous, swapped)


def aim(load, held, copies, topology: Topology, tolerance: float | None) -> Aim:
    """Decide how much imbalance to accept and which rank loads to expect.

    The ranks' deviations under the placement in force show how far the load moved since it was made: the next
    window will deviate as much again, so that smaller imbalances than a part of it are left alone. If the
    deviations are what a random placement would have, the placement tells nothing, and the slack is `TOLERANCE`.
    Part of a deviation is noise that is expected not to return; that part is not corrected. With a given tolerance
    the slack is that and nothing is expected: the placement is made for this load.
    """
    xp = _ops.namespace(load)
    (num_rows, num_slots), depth = held.shape, topology.slots_per_rank
    mean = _mean(load, topology)
    most_copies = min(topology.ep_size, num_slots - load.shape[1] + 1)
    bound = xp.maximum(mean, _ops.divide(xp.max(load, axis=1), most_copies))
    if tolerance is not None:
        slack = xp.full((num_rows,), tolerance, dtype=load.dtype)
        return Aim(slack, bound * (1 + slack), xp.zeros((num_rows, topology.ep_size), dtype=load.dtype))
    each = copy_share(held, load / xp.astype(xp.maximum(copies, _one(xp)), load.dtype))
    on_rank = _ops.tree_sum(xp.reshape(each, (num_rows, topology.ep_size, depth)))
    deviation = on_rank - _ops.divide(_ops.tree_sum(on_rank), topology.ep_size)[:, None]
    spread_sq = _mean_square(deviation)
    # A rank's sum of `depth` copies drawn without replacement varies this much.
    by_chance = _mean_square(each - _ops.divide(_ops.tree_sum(each), num_slots)[:, None]) * (
        depth * (num_slots - depth)
    )
    by_chance = _ops.divide(by_chance, max(num_slots - 1, 1))
    unknown = xp.where(by_chance > 0, xp.minimum(spread_sq / xp.where(by_chance > 0, by_chance, 1.0), 1.0), 1.0)
    spread = xp.sqrt(spread_sq * (1.0 - unknown)) / xp.where(mean > 0, mean, 1.0)
    slack = xp.maximum(CAUTION * spread, TOLERANCE)
    known = xp.sqrt(unknown)
    transient = _ops.rounded(MEMORY * known * (1.0 - known))
    return Aim(slack, bound * (1 + slack), -_ops.rounded(transient[:, None] * deviation))


def without_doubles(held: Int[Any, "rows slots"], topology: Topology) -> Int[Any, "rows slots"]:
    """Empty the slots of a second copy on the same rank, which relieves nobody."""
    xp = _ops.namespace(held)
    by_rank = xp.reshape(held, (-1, topology.slots_per_rank))
    same = by_rank[:, :, None] == by_rank[:, None, :]
    doubled = xp.any(same & _ops.before(topology.slots_per_rank, xp), axis=2)
    return xp.reshape(xp.where(doubled, xp.asarray(EMPTY, dtype=held.dtype), by_rank), held.shape)


def _mean(load, topology: Topology):
    return _ops.divide(_ops.tree_sum(load), topology.ep_size)


def _mean_square(x):
    return _ops.divide(_ops.tree_sum(_ops.rounded(x * x)), x.shape[-1])


def _rank_load(held, share, topology: Topology):
    xp = _ops.namespace(held)
    each = xp.reshape(copy_share(held, share), (-1, topology.ep_size, topology.slots_per_rank))
    return _ops.tree_sum(each)


def _one(xp):
    return xp.asarray(1, dtype=xp.int32)
