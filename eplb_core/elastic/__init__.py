"""Plans for an expert-parallel group that changes its size: ranks are lost, leave, or join.

What survives stays where it is. Only experts without a copy must be received, and what balance demands on top is
bounded. A change of size is rare and its answer holds lists, so all of this runs on the host, in NumPy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Real

from eplb_core import _ops
from eplb_core._checks import (
    EMPTY,
    check_count,
    check_ids,
    check_indices,
    check_kind,
    check_load,
    check_number,
    check_room,
    listing,
    require,
)
from eplb_core.elastic.lighten import lighten
from eplb_core.elastic.plan import ElasticPlan
from eplb_core.elastic.rehost import rehost
from eplb_core.maps import check_range
from eplb_core.metrics import moved_experts
from eplb_core.placement import preserve_slots
from eplb_core.topology import Topology, check_topology

EXTRA = 0.1  # transfers for balance, as a share of those that must be made anyway
TOLERANCE = 0.01  # imbalance that is never worth a transfer


def lose_ranks(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    dead_ranks: Sequence[int] | Int[Any, " ranks"],
    *,
    slots_per_rank: int | None = None,
    max_extra_moves: int | None = None,
    tolerance: float = TOLERANCE,
) -> ElasticPlan:
    """Plan for a group in which ranks are dead and cannot send.

    Survivors keep what they hold. An expert whose last copy is gone takes a free slot, or the slot of an expert that
    has further copies, such that the busiest rank stays lightest. Nothing else must be received: lost copies of
    experts that have others left are made up for only as balance demands, within `max_extra_moves`.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force, dead ranks included.
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used.
        topology: the group before the loss.
        dead_ranks: the ep_ranks that are gone.
        slots_per_rank: slots of each rank from now on, where there is memory for more; the present ones come first.
            As many as now by default.
        max_extra_moves: transfers for balance beyond those that must be made, in all layers together, spent where
            they take most off the busiest rank; a tenth of the latter by default.
        tolerance: a layer whose busiest rank is within this share of the mean gets no extra moves.

    Returns:
        `ElasticPlan`, with `group` the survivors, numbered without gaps. It has as many nodes as are left, if each of
        them lost equally many ranks, else one, as ranks per node must be equal.

    Raises:
        EplbError: if ranks are out of range or named twice, none is left, the shapes disagree or an option is out
            of range. Too few slots are not an error: see `ElasticPlan.unhosted`.

    >>> before = np.asarray([[0, 1, 2, 0, 3, 1]])
    >>> plan = lose_ranks(before, np.asarray([[4, 4, 2, 2]]), Topology(3, 2), [1])
    >>> plan.placement.tolist(), plan.reload, plan.new_rank.tolist()
    ([[0, 2, 3, 1]], ((0, 2),), [0, -1, 1])
    """
    _check_options(max_extra_moves, tolerance)
    held, load = _checked(physical_to_logical, load, topology, "lose_ranks")
    gone = _checked_ranks(dead_ranks, topology, "lose_ranks(dead_ranks=...)")
    after = _survivors(topology, gone, _checked_slots(slots_per_rank, topology, "lose_ranks"))
    kept = _pad(held, topology, after.slots_per_rank)[:, ~gone]
    placed, unhosted = _place(kept, load, after, np.zeros(after.ep_size, dtype=bool), max_extra_moves, tolerance)
    return ElasticPlan(after, placed, _new_rank(~gone), after, _flat(kept), placed, unhosted, load.shape[1])


def shrink(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    leaving_ranks: Sequence[int] | Int[Any, " ranks"],
    *,
    slots_per_rank: int | None = None,
    max_extra_moves: int | None = None,
    tolerance: float = TOLERANCE,
) -> ElasticPlan:
    """Plan for a group that ranks are about to leave: first they are drained, then they go.

    As `lose_ranks`, but the leaving ranks can send. So `group` is the group before the change: carry out
    `ElasticPlan.moves` in it, and then let the ranks go and use `placement` in `topology`.

    Args, Returns, Raises: as `lose_ranks`, with `leaving_ranks` the ep_ranks that leave, and `group` the old group.

    >>> plan = shrink(np.asarray([[0, 1, 2, 0, 3, 1]]), np.asarray([[4, 4, 2, 2]]), Topology(3, 2), [1])
    >>> plan.new.tolist(), plan.placement.tolist(), plan.reload
    ([[0, 2, -1, -1, 3, 1]], [[0, 2, 3, 1]], ())
    """
    _check_options(max_extra_moves, tolerance)
    held, load = _checked(physical_to_logical, load, topology, "shrink")
    gone = _checked_ranks(leaving_ranks, topology, "shrink(leaving_ranks=...)")
    after = _survivors(topology, gone, _checked_slots(slots_per_rank, topology, "shrink"))
    group = Topology(topology.ep_size, after.slots_per_rank, topology.num_nodes)
    old = _pad(held, topology, after.slots_per_rank)
    kept = old[:, ~gone]
    placed, unhosted = _place(kept, load, after, np.zeros(after.ep_size, dtype=bool), max_extra_moves, tolerance)
    new = np.full_like(old, EMPTY)
    new[:, ~gone] = placed.reshape(kept.shape)
    return ElasticPlan(after, placed, _new_rank(~gone), group, _flat(old), _flat(new), unhosted, load.shape[1])


def grow(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    new_topology: Topology,
    *,
    joining_ranks: Sequence[int] | Int[Any, " ranks"] | None = None,
    max_extra_moves: int | None = None,
    tolerance: float = TOLERANCE,
) -> ElasticPlan:
    """Plan for a group that ranks have joined.

    The ranks that were there keep what they hold. Experts without a copy get one; then the slots of the new ranks
    are filled, each with the expert whose further copy lowers the busiest rank most. A slot stays `EMPTY` if every
    expert would raise the busiest rank when its turn comes.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force.
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used.
        topology: the group before the growth.
        new_topology: the group after it: at least as many ranks, and at least as many slots on each. A rank's
            present slots are its first.
        joining_ranks: which ranks of the new group are new; by default its last. The others are the ranks that were
            there, in their order: a rank that comes back can have its old number and node.
        max_extra_moves: transfers for balance beyond the above, in all layers together, spent where they take most
            off the busiest rank; a tenth of them by default.
        tolerance: a layer whose busiest rank is within this share of the mean gets no extra moves.

    Returns:
        `ElasticPlan`, with `group` the new group.

    Raises:
        EplbError: if the new group is smaller in any way, `joining_ranks` are not the right number of different
            ranks of it, the shapes disagree or an option is out of range.

    >>> plan = grow(np.asarray([[0, 1, 2, 3]]), np.asarray([[9, 1, 1, 5]]), Topology(2, 2), Topology(3, 2))
    >>> plan.placement.tolist(), plan.old.tolist(), plan.num_moves
    ([[0, 1, 2, 3, 0, 2]], [[0, 1, 2, 3, -1, -1]], 2)
    """
    _check_options(max_extra_moves, tolerance)
    held, load = _checked(physical_to_logical, load, topology, "grow")
    joins = _checked_growth(topology, new_topology, joining_ranks)
    old = np.full((len(held), new_topology.ep_size, new_topology.slots_per_rank), EMPTY, dtype=np.int32)
    old[:, ~joins] = _pad(held, topology, new_topology.slots_per_rank)
    placed, unhosted = _place(old, load, new_topology, joins, max_extra_moves, tolerance)
    new_rank = np.flatnonzero(~joins).astype(np.int32)
    return ElasticPlan(new_topology, placed, new_rank, new_topology, _flat(old), placed, unhosted, load.shape[1])


def _place(kept, load, topology: Topology, fill, max_extra_moves, tolerance: float):
    """`[layers, slots]` of `topology` with what is kept in place, and the experts without a slot."""
    check_room("elastic", *load.shape, topology.ep_size)
    load, old = load.astype(float), _flat(kept)
    placed = np.stack([rehost(*layer, fill) for layer in zip(kept, load, strict=True)])
    if max_extra_moves is None:
        max_extra_moves = int(moved_experts(old, _flat(placed), topology).sum() * EXTRA)
    placed = _flat(lighten(placed, kept, load, max_moves=max_extra_moves, tolerance=tolerance))
    hosted = np.stack([np.isin(np.arange(load.shape[1]), row) for row in placed])
    unhosted = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(~hosted))
    return preserve_slots(placed, old, topology), unhosted


def _new_rank(stays):
    """`[ep_size]` int32: ranks that stay are counted in order, the others are `EMPTY`."""
    return np.where(stays, np.cumsum(stays) - 1, EMPTY).astype(np.int32)


def _survivors(topology: Topology, gone, slots_per_rank: int) -> Topology:
    """The group without the ranks that are gone; of one node where nodes are left with different numbers of ranks."""
    left = (~gone).reshape(topology.num_nodes, -1).sum(axis=1)
    left = left[left > 0]
    return Topology(int(left.sum()), slots_per_rank, len(left) if len(set(left.tolist())) == 1 else 1)


def _pad(held, topology: Topology, slots_per_rank: int):
    """`[layers, ep_size, slots_per_rank]` with `EMPTY` in a rank's further slots."""
    by_rank = held.reshape(len(held), topology.ep_size, -1)
    more = slots_per_rank - topology.slots_per_rank
    return np.pad(by_rank, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY)


def _flat(by_rank):
    return by_rank.reshape(len(by_rank), -1)


def _checked(physical_to_logical, load, topology: Topology, name: str):
    """The placement as int32, and the load summed over windows."""
    check_topology(topology, name)
    held, load = np.asarray(_ops.as_array(physical_to_logical)), np.asarray(_ops.as_array(load))
    check_ids(held, topology.num_slots, f"{name}(physical_to_logical=...)")
    check_load(load, f"{name}(load=...)")
    load = load.sum(axis=0) if load.ndim == 3 else load
    require(
        load.shape[0] == held.shape[0],
        f"`{name}(load=...)` must have the placement's layers",
        f"layers {load.shape[0]} and {held.shape[0]}",
        "Record load for the layers that are placed.",
    )
    check_range(held, load.shape[1])
    return held.astype(np.int32), load


def _checked_ranks(ranks, topology: Topology, name: str):
    """`[ep_size]` bool: the ranks named."""
    advice = "List each rank once, by its ep_rank."
    ids = check_indices(ranks, topology.ep_size, name, "different ranks,", advice)
    twice = np.flatnonzero(np.bincount(ids, minlength=1) > 1).tolist()
    require(not twice, f"`{name}` must be different ranks", f"ranks {listing(twice)} twice", advice)
    require(
        ids.size < topology.ep_size,
        f"`{name}` must leave a rank",
        f"all {topology.ep_size} ranks",
        "Start a new group and load the model.",
    )
    return np.isin(np.arange(topology.ep_size), ids)


def _checked_slots(slots_per_rank: int | None, topology: Topology, name: str) -> int:
    if slots_per_rank is None:
        return topology.slots_per_rank
    slots_per_rank = check_count(slots_per_rank, f"{name}(slots_per_rank=...)", 1, 2**16)
    require(
        slots_per_rank >= topology.slots_per_rank,
        f"`{name}(slots_per_rank=...)` must be at least the present number",
        f"slots_per_rank={slots_per_rank}, present={topology.slots_per_rank}",
        "Ranks keep what they hold: give them as many slots or more.",
    )
    return slots_per_rank


def _checked_growth(topology: Topology, new_topology: Topology, joining_ranks):
    """`[new ep_size]` bool: the ranks that join."""
    check_kind(new_topology, Topology, "grow(new_topology=...)")
    require(
        new_topology.ep_size >= topology.ep_size and new_topology.slots_per_rank >= topology.slots_per_rank,
        "`grow(new_topology=...)` must have at least the ranks, and the slots per rank, of topology",
        f"{new_topology} after {topology}",
        "Use `shrink` where ranks leave.",
    )
    more = new_topology.ep_size - topology.ep_size
    ranks = range(topology.ep_size, new_topology.ep_size) if joining_ranks is None else joining_ranks
    joins = _checked_ranks(ranks, new_topology, "grow(joining_ranks=...)")
    require(
        int(joins.sum()) == more,
        "`grow(joining_ranks=...)` must name as many ranks as join",
        f"{int(joins.sum())} ranks, while {new_topology.ep_size} - {topology.ep_size} join",
        "Name the ranks of the new group that were not in the old one.",
    )
    return joins


def _check_options(max_extra_moves: int | None, tolerance: float) -> None:
    if max_extra_moves is not None:
        advice = "Use 0 for none, None for a tenth of the moves that must be made."
        check_count(max_extra_moves, "max_extra_moves", 0, 2**30, advice)
    check_number(tolerance, "tolerance", 0, advice="Use 0.01 for one percent.")
