"""Shares that keep a rank's tokens near it."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eplb_core._checks import check_count, check_ids, check_number, check_room, host_array
from eplb_core.maps import check_range
from eplb_core.shares import RESOLUTION, even_shares, round_shares, share_parts
from eplb_core.topology import Topology, check_topology


def local_shares(
    physical_to_logical: Int[Any, "layers slots"],
    topology: Topology,
    ep_rank: int,
    num_logical: int,
    *,
    shares: Int[Any, "layers slots"] | None = None,
    slack: float | int = 0.0,
    resolution: int = RESOLUTION,
) -> Int[np.ndarray, "layers slots"]:
    """The shares of one rank's own tokens: as near as can be, while all ranks together meet `shares`.

    A rank serves itself as far as its copies are due to serve anyone; what is left is matched within nodes, and the
    rest across them. If ranks send equally many tokens to an expert, every copy gets its share, and no other way to
    arrange that keeps more tokens on their rank, nor more on their node; all to within rounding.

    Always taking the nearest copy would send less still, but a copy that is alone on its node then serves the whole
    node, however many copies the others have. `slack` buys that at a stated price.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        topology: sizes of the placement.
        ep_rank: the rank whose tokens are dispatched.
        num_logical: experts the router knows.
        shares: `[layers, slots]` what all ranks together meet; by default `even_shares`.
        slack: how much more than its part a copy may get for the sake of being near, relative to that part. With 0
            the balance is that of `shares`; with 0.1 a rank gets at most 10% more than by them; from the `resolution`
            on, every token goes to a nearest copy.
        resolution: most that the shares of one expert add up to; at least its number of copies.

    Returns:
        `[layers, slots]` int32, for the tokens of `ep_rank`.

    Raises:
        EplbError: if shapes or shares do not fit the placement, an id or `ep_rank` is out of range, `slack` is
            negative or not finite, or an expert has more copies than `resolution`.

    >>> placement = np.asarray([[0, 1, 2, 0]])  # on two nodes of two ranks
    >>> topology = Topology(ep_size=4, slots_per_rank=1, num_nodes=2)
    >>> [local_shares(placement, topology, ep_rank, num_logical=3).tolist() for ep_rank in (0, 1, 3)]
    [[[1, 1, 1, 0]], [[1, 1, 1, 0]], [[0, 1, 1, 1]]]
    """
    check_topology(topology, "local_shares")
    ids = host_array(physical_to_logical)
    check_ids(ids, topology.num_slots, "local_shares(physical_to_logical=...)")
    check_range(ids, num_logical)
    check_room("local_shares", len(ids), num_logical, topology.ep_size)
    ep_rank = check_count(ep_rank, "local_shares(ep_rank=...)", 0, topology.ep_size - 1, "Count ranks from 0.")
    check_number(slack, "local_shares(slack=...)", 0, advice="Use slack=resolution to always take the nearest copy.")
    part = share_parts(ids, even_shares(ids) if shares is None else host_array(shares), num_logical)
    layer, expert = np.arange(len(ids))[:, None], np.maximum(ids, 0)
    rank = np.arange(topology.num_slots) // topology.slots_per_rank
    due = np.zeros((len(ids), num_logical, topology.ep_size))
    np.add.at(due, (layer, expert, rank), part)
    sent = _send_nearest_first(due, topology, ep_rank, slack)
    on_rank = due[layer, expert, rank]
    within = np.divide(part, on_rank, out=np.zeros_like(part), where=on_rank > 0)
    return round_shares(sent[layer, expert, rank] * within, ids, num_logical, resolution)


def _send_nearest_first(
    due: Float[np.ndarray, "layers logical ep_size"], topology: Topology, ep_rank: int, slack: float | int
) -> Float[np.ndarray, "layers logical ep_size"]:
    """What `ep_rank` sends to each rank, when every rank has `1 / ep_size` to send and is due to receive `due`."""
    to_itself = np.minimum(1 / topology.ep_size, due * (1 + slack))
    supply, room = 1 / topology.ep_size - to_itself, due * (1 + slack) - to_itself
    by_node = (*due.shape[:2], topology.num_nodes, topology.ranks_per_node)
    node_supply, node_room = (x.reshape(by_node).sum(axis=3, keepdims=True) for x in (supply, room))
    in_node = np.minimum(node_supply, node_room)
    leaves = _ratio(in_node, node_supply)  # of each rank's supply, for a copy on its node
    arrives = room.reshape(by_node) * _ratio(in_node, node_room)
    left = np.maximum(due - to_itself - arrives.reshape(due.shape), 0)
    node = ep_rank // topology.ranks_per_node
    own = supply[:, :, ep_rank, None]
    sent = own * (1 - leaves[:, :, node]) * _ratio(left, left.sum(axis=2, keepdims=True))
    first = node * topology.ranks_per_node
    sent[:, :, first : first + topology.ranks_per_node] += (
        own * leaves[:, :, node] * _ratio(arrives[:, :, node], in_node[:, :, node])
    )
    sent[:, :, ep_rank] += to_itself[:, :, ep_rank]
    return sent


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 1e-12)
