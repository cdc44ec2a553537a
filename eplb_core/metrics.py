"""What a placement and a change of placement cost: load per rank, balancedness, experts that must be received."""

from typing import Any

from jaxtyping import Float, Int, Real

from eplb_core import _ops
from eplb_core._checks import EMPTY, check_ids, check_load, check_room, check_same_layers, require
from eplb_core.maps import count_replicas
from eplb_core.moves import MovePlan, check_plan
from eplb_core.topology import Topology, check_topology


def rank_load(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
) -> Float[Any, "*windows layers ep_size"]:
    """Tokens that each rank serves when the copies of an expert share its load equally.

    Two copies on one rank count twice, as the router sends to slots and does not know ranks. Load of an expert
    without any copy is on no rank.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        load: `[layers, logical]` or `[windows, layers, logical]` tokens.
        topology: sizes of the placement.

    Returns:
        `[layers, ep_size]` or `[windows, layers, ep_size]` tokens, of the library's default float type.

    Raises:
        EplbError: if shapes do not fit, an id is out of range or a load is negative or not finite.

    >>> import numpy as np
    >>> rank_load(np.asarray([[0, 1, 0, 2]]), np.asarray([[8, 1, 3]]), Topology(2, 2)).tolist()
    [[5.0, 7.0]]
    """
    check_topology(topology, "rank_load")
    physical_to_logical, load = _ops.as_array(physical_to_logical), _ops.as_array(load)
    check_ids(physical_to_logical, topology.num_slots, "rank_load(physical_to_logical=...)")
    check_load(load, "rank_load(load=...)")
    require(
        load.shape[-2] == physical_to_logical.shape[0],
        "`rank_load(load=...)` must have the placement's layers",
        f"load.shape={tuple(load.shape)}, physical_to_logical.shape={tuple(physical_to_logical.shape)}",
        "Record load for the layers that are placed.",
    )
    xp = _ops.namespace(physical_to_logical)
    num_layers, num_logical = load.shape[-2:]
    check_room("rank_load", *load.shape[:-1], topology.num_slots)
    copies, one = count_replicas(physical_to_logical, num_logical), xp.asarray(1, dtype=xp.int32)
    share = xp.astype(load, _ops.float_dtype(xp)) / xp.astype(xp.maximum(copies, one), _ops.float_dtype(xp))
    table = xp.reshape(share, (-1, num_layers * num_logical))
    slot = xp.arange(num_layers, dtype=xp.int32)[:, None] * num_logical + xp.where(
        physical_to_logical == EMPTY, 0, xp.astype(physical_to_logical, xp.int32)
    )
    slot_load = xp.take(table, xp.reshape(slot, (-1,)), axis=1)
    slot_load = xp.where(xp.reshape(physical_to_logical == EMPTY, (1, -1)), 0.0, slot_load)
    by_rank = xp.reshape(slot_load, (*load.shape[:-1], topology.ep_size, topology.slots_per_rank))
    return _ops.tree_sum(by_rank)


def balancedness(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
) -> Float[Any, "*windows layers"]:
    """Mean rank load over the busiest rank's load, per layer: in (0, 1], 1 is best; 1 for a layer without load.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        load: `[layers, logical]` or `[windows, layers, logical]` tokens.
        topology: sizes of the placement.

    Returns:
        `[layers]` or `[windows, layers]`, of the library's default float type.

    Raises:
        EplbError: as `rank_load`.

    >>> import numpy as np
    >>> balancedness(np.asarray([[0, 1, 0, 2]]), np.asarray([[8, 1, 3]]), Topology(2, 2)).round(3).tolist()
    [0.857]
    """
    on_rank = rank_load(physical_to_logical, load, topology)
    xp = _ops.namespace(on_rank)
    busiest = xp.max(on_rank, axis=-1)
    mean = _ops.divide(_ops.tree_sum(on_rank), topology.ep_size)
    return xp.where(busiest > 0, mean / xp.where(busiest > 0, busiest, 1.0), 1.0)


def model_balancedness(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
) -> Float[Any, "*windows"]:
    """One figure for all layers: the sum of the layers' mean rank loads over the sum of their maxima.

    Layers weigh by their tokens, as they do in the time of a forward pass.

    Args, Returns, Raises: as `balancedness`, without the axis of layers.
    """
    on_rank = rank_load(physical_to_logical, load, topology)
    xp = _ops.namespace(on_rank)
    busiest = _ops.tree_sum(xp.max(on_rank, axis=-1))
    mean = _ops.tree_sum(_ops.divide(_ops.tree_sum(on_rank), topology.ep_size))
    return xp.where(busiest > 0, mean / xp.where(busiest > 0, busiest, 1.0), 1.0)


def moved_experts(
    old: Int[Any, "layers slots"], new: Int[Any, "layers slots"], topology: Topology
) -> Int[Any, " layers"]:
    """Count the (rank, expert) pairs that a rank must receive, per layer.

    An expert that changes its slot within a rank is not moved; one that a rank takes into two slots is moved once.
    `O(layers * slots * slots_per_rank)`.

    Args:
        old: `[layers, slots]` the placement in force.
        new: `[layers, slots]` the placement to come.
        topology: sizes of both.

    Returns:
        `[layers]` int32.

    Raises:
        EplbError: if the shapes do not fit.

    >>> import numpy as np
    >>> moved_experts(np.asarray([[0, 1, 2, 3]]), np.asarray([[1, 0, 1, 1]]), Topology(2, 2)).tolist()
    [1]
    """
    check_topology(topology, "moved_experts")
    old, new = _ops.as_array(old), _ops.as_array(new)
    check_ids(old, topology.num_slots, "moved_experts(old=...)")
    check_ids(new, topology.num_slots, "moved_experts(new=...)")
    check_same_layers(old, new, "moved_experts(old=..., new=...)")
    xp = _ops.namespace(new)
    check_room("moved_experts", *old.shape, topology.slots_per_rank)
    by_rank = (old.shape[0], topology.ep_size, topology.slots_per_rank)
    before, after = xp.reshape(old, by_rank), xp.reshape(new, by_rank)
    held = xp.any(after[..., :, None] == before[..., None, :], axis=-1)
    twin = xp.argmax(xp.astype(after[..., :, None] == after[..., None, :], xp.int32), axis=-1)
    first = twin == xp.arange(topology.slots_per_rank, dtype=twin.dtype)
    return xp.sum(xp.astype(first & ~held & (after != EMPTY), xp.int32), axis=(1, 2), dtype=xp.int32)


def received_experts(plan: MovePlan, topology: Topology) -> tuple[Int[Any, " layers"], Int[Any, " layers"]]:
    """Count the experts that ranks receive by a plan, from ranks of their own node and from other nodes.

    An expert that a rank puts into two slots is received once. A relayed one comes from the relay.

    Args:
        plan: from `plan_moves`.
        topology: sizes of the plan.

    Returns:
        Two `[layers]` int32: within nodes, and across them.

    Raises:
        EplbError: if the shapes do not fit.

    >>> import numpy as np
    >>> from eplb_core import plan_moves
    >>> topology = Topology(ep_size=4, slots_per_rank=1, num_nodes=2)
    >>> plan = plan_moves(np.asarray([[0, 0, 1, 2]]), np.asarray([[0, 2, 1, 1]]), topology)
    >>> [count.tolist() for count in received_experts(plan, topology)]
    [[1], [1]]
    """
    source, relay = check_plan(plan, topology, "received_experts")
    xp = _ops.namespace(source)
    via = source
    if relay is not None:
        via = xp.where(relay == EMPTY, source, relay)
    split = (source.shape[0], topology.ep_size, topology.slots_per_rank)
    by_rank, via = (xp.reshape(xp.astype(x, xp.int32), split) for x in (source, via))
    origin = xp.where(via == EMPTY, EMPTY, via // topology.slots_per_rank)
    rank = xp.arange(topology.ep_size, dtype=xp.int32)[:, None]
    twin = xp.argmax(xp.astype(by_rank[..., :, None] == by_rank[..., None, :], xp.int32), axis=-1)
    first = twin == xp.arange(topology.slots_per_rank, dtype=twin.dtype)
    remote = first & (by_rank != EMPTY) & (by_rank // topology.slots_per_rank != rank)
    crosses = remote & (origin // topology.ranks_per_node != rank // topology.ranks_per_node)
    across = xp.sum(xp.astype(crosses, xp.int32), axis=(1, 2), dtype=xp.int32)
    return xp.sum(xp.astype(remote, xp.int32), axis=(1, 2), dtype=xp.int32) - across, across
