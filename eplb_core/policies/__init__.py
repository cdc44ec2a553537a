"""Placement policies behind one function."""

from functools import partial
from typing import Any

from jaxtyping import Int, Real

from eplb_core import _ops
from eplb_core._checks import EMPTY, check_choice, check_count, check_ids, check_load, check_number, is_integer, require
from eplb_core.maps import check_range
from eplb_core.metrics import moved_experts, rank_load
from eplb_core.placement import check_sizes, preserve_slots
from eplb_core.policies.budget import share_out
from eplb_core.policies.greedy import greedy
from eplb_core.policies.groups import groups_by_node
from eplb_core.policies.incremental import incremental
from eplb_core.policies.refined import refined
from eplb_core.policies.spread import spread_copies
from eplb_core.topology import Topology

POLICIES = ("greedy", "refined", "incremental")
_UNLIMITED = 2**30


def rebalance(
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    *,
    policy: str = "incremental",
    num_groups: int = 1,
    hierarchy: str = "auto",
    previous: Int[Any, "layers slots"] | None = None,
    tolerance: float | None = None,
    max_moves: int | None = None,
    max_total_moves: int | None = None,
    cross_node_cost: float = 1.0,
    risk: float = 0.0,
    spread: str | None = None,
) -> Int[Any, "layers slots"]:
    """Compute a placement for the load.

    The same input gives the same placement on every rank; ties go to the lowest index. With `previous`, experts
    that stay on a rank keep their slot.

    Args:
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used.
        topology: ranks, slots and nodes. Static under `jax.jit`, like all arguments but `load` and `previous`.
        policy: `"greedy"` is DeepSeek's algorithm, exactly. `"refined"` balances better, by local search, with no
            copy that helps nobody, and with the ranks relabelled to keep most in place. `"incremental"` improves
            `previous` with few moves; without `previous` it is `"refined"`.
        num_groups: groups of consecutive experts that the router limits to few nodes; 1 for most models.
        hierarchy: `"hierarchical"` keeps each group of experts, with all its copies, on one node; `"global"`
            ignores groups and nodes; `"auto"` is hierarchical where `num_groups` is a multiple of
            `topology.num_nodes`.
        previous: `[layers, slots]` the placement in force.
        tolerance: (incremental) a layer is left as it is once its busiest rank is within this share of a lower
            bound. By default the policy accepts what the next window's change would undo anyway.
        max_moves: (incremental) experts that may be moved per layer. Experts without any copy get one regardless;
            so do those whose group is not on one node in `previous`, if groups are respected.
        max_total_moves: (incremental) experts that may be moved in all layers together, spent in the layers where
            a move takes most off the busiest rank. The exceptions of `max_moves` hold here too, and may exceed it.
        cross_node_cost: (incremental) cost of a swap between nodes, that within a node being 1.
        risk: standard deviations between windows by which each expert counts as hotter than its mean.
        spread: `"node"` puts the copies of every expert that has several on at least two nodes, so that it survives
            the loss of one: always if moves are not limited, else with the moves that balancing leaves. Layers
            within tolerance are changed for it too.

    Returns:
        `[layers, slots]` int32, in the library of `load`. `EMPTY` only where every expert has a copy on every rank,
        or where a limit of moves leaves a slot unfilled (never with `"greedy"`).

    Raises:
        EplbError: if the load is negative or not finite, the experts do not fit the slots, the shapes disagree,
            the hierarchy or the spread cannot be had, or an option is out of range.

    >>> import numpy as np
    >>> topology = Topology(ep_size=2, slots_per_rank=3)
    >>> rebalance(np.asarray([[90, 10, 10, 10]]), topology, policy="greedy").tolist()
    [[0, 0, 3, 0, 1, 2]]
    >>> before = np.asarray([[0, 1, 2, 3, 1, 2]])
    >>> rebalance(np.asarray([[90, 10, 10, 10]]), topology, previous=before).tolist()
    [[0, 1, 2, 3, 0, 2]]
    """
    load = _ops.as_array(load)
    check_load(load)
    check_sizes(load.shape[-1], topology, "rebalance(load=...)")
    _check_options(policy, tolerance, max_moves, max_total_moves, cross_node_cost, risk)
    num_groups, num_nodes = _resolve(hierarchy, num_groups, topology.num_nodes, load.shape[-1])
    _check_spread(spread, num_nodes, topology)
    total = _total(load, risk)
    if previous is not None:
        previous = _checked_previous(previous, load, topology)
    if policy == "greedy":
        placed = _spread(greedy(total, topology, num_groups=num_groups, num_nodes=num_nodes), total, topology, spread)
        return placed if previous is None else preserve_slots(placed, previous, topology)
    groups = num_groups if num_nodes > 1 else 1
    if policy == "refined" or previous is None:
        placed = _spread(_by_node(refined, total, previous, topology, groups), total, topology, spread)
        return placed if previous is None else preserve_slots(placed, previous, topology)

    def improve(max_moves):
        plan = partial(incremental, tolerance=tolerance, cross_node_cost=cross_node_cost)
        placed = _by_node(plan, total, previous, topology, groups, max_moves=max_moves)
        placed = _spread(placed, total, topology, spread, previous, max_moves)
        return preserve_slots(placed, previous, topology)

    xp = _ops.namespace(total)
    budget = xp.full((total.shape[0],), _UNLIMITED if max_moves is None else max_moves, dtype=xp.int32)
    placed = improve(budget)
    if max_total_moves is None:
        return placed
    asked = moved_experts(previous, placed, topology)
    busiest = [xp.max(rank_load(p, total, topology), axis=1) for p in (previous, placed)]
    granted = share_out(asked, busiest[0] - busiest[1], max_total_moves)
    return xp.where((granted == asked)[:, None], placed, improve(xp.minimum(granted, budget)))


def _by_node(plan, load, previous, topology: Topology, num_groups: int, max_moves=None):
    """Call `plan(load, previous, topology)` for whole layers, or for each node and the groups it hosts."""
    xp = _ops.namespace(load)
    options = {} if max_moves is None else {"max_moves": max_moves}
    if num_groups == 1:
        return plan(load, previous, topology, **options)
    num_layers, num_logical = load.shape
    hosted, spent = groups_by_node(load, previous, topology, num_groups, max_moves)
    size, per_node = num_logical // num_groups, num_logical // topology.num_nodes
    expert = xp.reshape(hosted[:, :, None] * size + xp.arange(size, dtype=xp.int32), (num_layers, num_logical))
    rows = (num_layers * topology.num_nodes, -1)
    node = Topology(topology.ranks_per_node, topology.slots_per_rank)
    local = None
    if previous is not None:
        position = xp.astype(xp.argsort(expert, axis=1, stable=True), xp.int32)
        at = xp.take_along_axis(position, xp.maximum(previous, 0), axis=1)
        slot_node = xp.arange(topology.num_slots, dtype=xp.int32) // topology.slots_per_node
        stays = (at // per_node == slot_node) & (previous != EMPTY)
        local = xp.reshape(xp.where(stays, at % per_node, xp.asarray(EMPTY, dtype=xp.int32)), rows)
    if max_moves is not None:
        options = {"max_moves": _split(xp.maximum(max_moves - spent, xp.zeros_like(spent)), topology.num_nodes)}
    placed = plan(xp.reshape(xp.take_along_axis(load, expert, axis=1), rows), local, node, **options)
    placed = xp.reshape(placed, (num_layers, topology.num_nodes, -1))
    first = xp.arange(topology.num_nodes, dtype=xp.int32)[:, None] * per_node
    at = xp.reshape(xp.where(placed == EMPTY, EMPTY, placed + first), (num_layers, -1))
    found = xp.take_along_axis(expert, xp.maximum(at, 0), axis=1)
    return xp.where(at == EMPTY, xp.asarray(EMPTY, dtype=xp.int32), found)


def _spread(placed, load, topology: Topology, spread: str | None, previous=None, max_moves=None):
    """Spread copies over nodes if asked to, with the moves that are left of `max_moves` per layer."""
    if spread is None:
        return placed
    xp = _ops.namespace(load)
    left = xp.full((load.shape[0],), _UNLIMITED, dtype=xp.int32)
    if max_moves is not None:
        left = xp.maximum(max_moves - moved_experts(previous, placed, topology), xp.zeros_like(left))
    return spread_copies(placed, load, topology, max_moves=left)


def _split(max_moves, num_nodes: int):
    """Each node's part of a layer's budget: equal, the remainder to the first nodes."""
    xp = _ops.namespace(max_moves)
    node = xp.arange(num_nodes, dtype=xp.int32)
    return xp.reshape((max_moves[:, None] + num_nodes - 1 - node) // num_nodes, (-1,))


def _total(load, risk: float):
    """Sum windows and convert to floats. Integers are summed as integers, floats in one order on every library."""
    xp = _ops.namespace(load)
    floating = _ops.float_dtype(xp)
    if load.ndim == 2:
        return xp.astype(load, floating)
    windows = xp.astype(xp.permute_dims(load, (1, 2, 0)), floating)
    total = xp.astype(xp.sum(load, axis=0), floating) if is_integer(load) else _ops.tree_sum(windows)
    if risk == 0:
        return total
    off = windows - _ops.divide(total, load.shape[0])[:, :, None]
    variance = _ops.divide(_ops.tree_sum(_ops.rounded(off * off)), load.shape[0])
    return total + _ops.rounded(xp.sqrt(variance) * (risk * load.shape[0]))


def _checked_previous(previous, load, topology: Topology):
    previous = _ops.as_array(previous)
    check_ids(previous, topology.num_slots, "rebalance(previous=...)")
    require(
        previous.shape[0] == load.shape[-2],
        "`rebalance(previous=...)` must have the layers of load",
        f"shapes {tuple(previous.shape)} and {tuple(load.shape)}",
        "Pass the placement in force for the same model.",
    )
    check_range(previous, load.shape[-1])
    xp = _ops.namespace(load)
    return xp.astype(xp.asarray(previous), xp.int32)


def _check_options(policy, tolerance, max_moves, max_total_moves, cross_node_cost, risk) -> None:
    check_choice(policy, POLICIES, "rebalance(policy=...)")
    for name, value in (("max_moves", max_moves), ("max_total_moves", max_total_moves)):
        if value is not None:
            check_count(value, f"rebalance({name}=...)", 0, _UNLIMITED, "Use None for no limit.")
    if tolerance is not None:
        check_number(tolerance, "rebalance(tolerance=...)", 0)
    check_number(cross_node_cost, "rebalance(cross_node_cost=...)", 1, 1e9)
    check_number(risk, "rebalance(risk=...)", 0, 1e9)


def _check_spread(spread: str | None, num_nodes: int, topology: Topology) -> None:
    check_choice(spread, (None, "node"), "rebalance(spread=...)")
    require(
        spread is None or topology.num_nodes > 1,
        "`rebalance(spread='node')` needs at least two nodes",
        f"num_nodes={topology.num_nodes}",
        "Set num_nodes in the Topology, or use spread=None.",
    )
    require(
        spread is None or num_nodes == 1,
        "`rebalance(spread='node')` contradicts hierarchical balancing, which keeps an expert's copies on one node",
        f"num_nodes={num_nodes} for the groups",
        "Use hierarchy='global', or spread=None.",
    )


def _resolve(hierarchy: str, num_groups: int, num_nodes: int, num_logical: int) -> tuple[int, int]:
    """The numbers of groups and nodes that the policy shall respect: (1, 1) for global."""
    check_choice(hierarchy, ("auto", "hierarchical", "global"), "rebalance(hierarchy=...)")
    num_groups = check_count(
        num_groups, "rebalance(num_groups=...)", 1, 2**31 - 1, "Use 1 for a router without groups."
    )
    if hierarchy == "global" or (hierarchy == "auto" and num_groups % num_nodes):
        return 1, 1
    require(
        num_groups % num_nodes == 0,
        "`rebalance(hierarchy='hierarchical')` needs num_groups to be a multiple of num_nodes",
        f"num_groups={num_groups}, num_nodes={num_nodes}",
        "Use hierarchy='auto' or 'global' to ignore groups.",
    )
    require(
        num_logical % num_groups == 0,
        "`rebalance(num_groups=...)` must divide the number of experts",
        f"num_groups={num_groups}, num_logical={num_logical}",
        "Take num_groups from the model's configuration (n_group), or use hierarchy='global'.",
    )
    return num_groups, num_nodes
