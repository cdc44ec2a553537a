"""Placement policies behind one function."""

from typing import Any

from jaxtyping import Int, Real

from eplb_core import _ops
from eplb_core._checks import check_ids, check_load, require
from eplb_core.placement import check_sizes, preserve_slots
from eplb_core.policies.greedy import greedy
from eplb_core.topology import Topology

POLICIES = ("greedy",)


def rebalance(
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    *,
    policy: str = "greedy",
    num_groups: int = 1,
    hierarchy: str = "auto",
    previous: Int[Any, "layers slots"] | None = None,
) -> Int[Any, "layers slots"]:
    """Compute a placement for the load.

    The same input gives the same placement on every rank; ties go to the lowest index.

    Args:
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used.
        topology: ranks, slots and nodes. Static under `jax.jit`, like all arguments but `load` and `previous`.
        policy: `"greedy"` is DeepSeek's algorithm.
        num_groups: groups of consecutive experts that the router limits to few nodes; 1 for most models.
        hierarchy: `"hierarchical"` keeps each group of experts, with all its copies, on one node; `"global"`
            ignores groups and nodes; `"auto"` is hierarchical where `num_groups` is a multiple of
            `topology.num_nodes`.
        previous: `[layers, slots]` the placement in force. Experts that stay on a rank keep their slot.

    Returns:
        `[layers, slots]` int32, in the library of `load`.

    Raises:
        EplbError: if the load is negative or not finite, the experts do not fit the slots, the shapes disagree or
            the hierarchy cannot be had.

    >>> import numpy as np
    >>> rebalance(np.asarray([[90, 10, 10, 10]]), Topology(ep_size=2, slots_per_rank=3), policy="greedy").tolist()
    [[0, 0, 1, 0, 2, 3]]
    """
    load = _ops.as_array(load)
    check_load(load)
    check_sizes(load.shape[-1], topology, "rebalance(load=...)")
    require(
        policy in POLICIES,
        f"`rebalance(policy=...)` must be one of {POLICIES}",
        f"policy={policy!r}",
        "Check the spelling.",
    )
    num_groups, num_nodes = _resolve(hierarchy, num_groups, topology.num_nodes, load.shape[-1])
    placed = greedy(_total(load), topology, num_groups=num_groups, num_nodes=num_nodes)
    if previous is None:
        return placed
    previous = _ops.as_array(previous)
    check_ids(previous, topology.num_slots, "rebalance(previous=...)")
    require(
        previous.shape[0] == placed.shape[0],
        "`rebalance(previous=...)` must have the layers of load",
        f"shapes {tuple(previous.shape)} and {tuple(load.shape)}",
        "Pass the placement in force for the same model.",
    )
    return preserve_slots(placed, previous, topology)


def _total(load):
    """Sum windows and convert to floats. Integers are summed as integers, so that no order of summing matters."""
    xp = _ops.namespace(load)
    return xp.astype(load if load.ndim == 2 else xp.sum(load, axis=0), _ops.float_dtype(xp))


def _resolve(hierarchy: str, num_groups: int, num_nodes: int, num_logical: int) -> tuple[int, int]:
    """The numbers of groups and nodes that the policy shall respect: (1, 1) for global."""
    require(
        hierarchy in ("auto", "hierarchical", "global"),
        "`rebalance(hierarchy=...)` must be 'auto', 'hierarchical' or 'global'",
        f"hierarchy={hierarchy!r}",
        "Check the spelling.",
    )
    require(
        num_groups >= 1,
        "`rebalance(num_groups=...)` must be >= 1",
        f"num_groups={num_groups}",
        "Use 1 for a router without groups.",
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
