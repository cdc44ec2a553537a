"""Which groups of experts each node hosts, so that each node can be planned for itself."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY
from eplb_core.packing import pack
from eplb_core.policies.relabel import keep_in_place
from eplb_core.policies.search import swap_copies
from eplb_core.topology import Topology

NODE_TOLERANCE = 0.05  # moving a group moves all its experts, so a node may be this much above the mean


def groups_by_node(
    load: Float[Any, "layers logical"],
    previous: Int[Any, "layers slots"] | None,
    topology: Topology,
    num_groups: int,
    max_moves: Int[Any, " layers"] | None = None,
) -> tuple[Int[Any, "layers groups"], Int[Any, " layers"]]:
    """Assign groups to nodes: those of the placement in force, swapped until no node is out of tolerance.

    Without a previous placement, or where that does not keep each group on one node, groups are packed afresh,
    whatever the budget.

    Args:
        load: `[layers, logical]` finite, >= 0.
        previous: `[layers, slots]` the placement in force, or None.
        topology: ranks and nodes.
        num_groups: groups of consecutive experts, a multiple of the nodes.
        max_moves: `[layers]` experts that may change nodes; unlimited if None.

    Returns:
        `[layers, groups]` int32 the groups, node by node; `[layers]` int32 experts that change nodes.
    """
    xp = _ops.namespace(load)
    num_layers, num_nodes = load.shape[0], topology.num_nodes
    size = load.shape[1] // num_groups
    group_load = _ops.tree_sum(xp.reshape(load, (num_layers, num_groups, size)))
    hosted = pack(group_load, num_nodes)
    tolerance, node = 0.0, None
    if previous is not None:
        node, valid = _current(previous, topology, num_groups, size)
        current = xp.astype(xp.argsort(node, axis=1, stable=True), xp.int32)
        hosted = xp.where(valid[:, None], current, keep_in_place(hosted, current, num_nodes))
        tolerance = NODE_TOLERANCE
    mean = _ops.divide(_ops.tree_sum(group_load), num_nodes)
    unlimited = xp.full((num_layers,), 2**30, dtype=xp.int32)
    hosted = swap_copies(
        hosted,
        group_load,
        Topology(num_nodes, num_groups // num_nodes),
        target=mean * (1 + tolerance),
        worth=xp.zeros_like(mean),
        offset=xp.zeros((num_layers, num_nodes), dtype=load.dtype),
        max_moves=unlimited if max_moves is None else max_moves // size,
    )
    if node is None:
        return hosted, xp.zeros_like(unlimited)
    new_node = xp.argsort(hosted, axis=1, stable=True) // (num_groups // num_nodes)
    return hosted, xp.sum(xp.astype(new_node != node, xp.int32), axis=1, dtype=xp.int32) * size


def _current(previous, topology: Topology, num_groups: int, size: int):
    """The node that holds most copies of each group, and whether it holds them all."""
    xp = _ops.namespace(previous)
    by_node = xp.reshape(previous, (previous.shape[0], topology.num_nodes, -1))
    group = xp.where(by_node == EMPTY, EMPTY, by_node // size)
    copies = xp.stack(
        [xp.sum(xp.astype(group == g, xp.int32), axis=2, dtype=xp.int32) for g in range(num_groups)], axis=2
    )
    node = xp.astype(xp.argmax(copies, axis=1), xp.int32)
    alone = xp.all(xp.sum(xp.astype(copies > 0, xp.int32), axis=1) == 1, axis=1)
    return node, alone
