"""DeepSeek's greedy placement: replicate the hottest, pack the heaviest first. It does not look at what is in place."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core.packing import pack
from eplb_core.replicate import replicate
from eplb_core.topology import Topology


def greedy(
    load: Float[Any, "layers logical"], topology: Topology, *, num_groups: int, num_nodes: int
) -> Int[Any, "layers slots"]:
    """Place groups on nodes, replicate within each node, place copies on the ranks of the node.

    With one group and one node this is the global algorithm. Ties go to the lowest index at every step.

    Args:
        load: `[layers, logical]` finite, >= 0.
        topology: sizes; its nodes are not used.
        num_groups: groups of consecutive experts that stay together on a node, a multiple of `num_nodes`.
        num_nodes: nodes to place groups on.

    Returns:
        `[layers, slots]` int32.

    References:
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 3.4, https://arxiv.org/abs/2412.19437, and
        https://github.com/deepseek-ai/EPLB.
    """
    xp = _ops.namespace(load)
    num_layers, num_logical = load.shape
    node_expert = _experts_by_node(load, num_groups, num_nodes)
    node_load = xp.reshape(xp.take_along_axis(load, node_expert, axis=1), (num_layers * num_nodes, -1))
    copy_expert, copies = replicate(node_load, topology.num_slots // num_nodes)
    share = xp.take_along_axis(node_load / xp.astype(copies, load.dtype), copy_expert, axis=1)
    packed = pack(share, topology.ep_size // num_nodes)
    # From an index within the node, over the index within the layer, to the expert.
    local_expert = xp.reshape(xp.take_along_axis(copy_expert, packed, axis=1), (num_layers, num_nodes, -1))
    node = xp.arange(num_nodes, dtype=xp.int32)[:, None]
    position = xp.reshape(local_expert + node * (num_logical // num_nodes), (num_layers, -1))
    return xp.take_along_axis(node_expert, position, axis=1)


def _experts_by_node(load, num_groups: int, num_nodes: int):
    """`[layers, logical]` int32: experts in the order of the nodes that their groups are packed onto."""
    xp = _ops.namespace(load)
    num_layers, num_logical = load.shape
    group_size = num_logical // num_groups
    group_load = _ops.tree_sum(xp.reshape(load, (num_layers, num_groups, group_size)))
    group = pack(group_load, num_nodes)
    member = xp.arange(group_size, dtype=xp.int32)
    return xp.reshape(group[:, :, None] * group_size + member, (num_layers, num_logical))
