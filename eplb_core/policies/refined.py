"""Greedy without useless copies, then local search until no swap helps; ranks are relabelled to keep most in place."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core.maps import count_replicas
from eplb_core.packing import pack_apart
from eplb_core.policies.copies import place_copies
from eplb_core.policies.incremental import without_doubles
from eplb_core.policies.relabel import keep_in_place
from eplb_core.policies.search import swap_copies
from eplb_core.replicate import replicate
from eplb_core.topology import Topology


def refined(
    load: Float[Any, "rows logical"], previous: Int[Any, "rows slots"] | None, topology: Topology
) -> Int[Any, "rows slots"]:
    """Balance one load as well as local search can.

    Args:
        load: `[rows, logical]` finite, >= 0.
        previous: `[rows, slots]` the placement to stay near to, or None.
        topology: sizes of a row.

    Returns:
        `[rows, slots]` int32. `EMPTY` where no expert has use for a further copy.
    """
    xp = _ops.namespace(load)
    expert, copies = replicate(load, topology.num_slots, max_copies=topology.ep_size)
    share = load / xp.astype(copies, load.dtype)
    placed = pack_apart(expert, xp.take_along_axis(share, expert, axis=1), topology.ep_size)
    placed = without_doubles(placed, topology)
    copies = count_replicas(placed, load.shape[1])
    plenty = xp.full((load.shape[0],), 2**30, dtype=xp.int32)
    everyone = xp.ones(load.shape[0], dtype=xp.bool)
    placed, _ = place_copies(placed, load, copies, topology, max_moves=plenty, active=everyone)
    share = load / xp.astype(count_replicas(placed, load.shape[1]), load.dtype)
    mean = _ops.divide(_ops.tree_sum(load), topology.ep_size)
    placed = swap_copies(
        placed,
        share,
        topology,
        target=mean,
        worth=xp.zeros_like(mean),
        offset=xp.zeros((load.shape[0], topology.ep_size), dtype=load.dtype),
        max_moves=plenty,
    )
    return placed if previous is None else keep_in_place(placed, previous, topology.ep_size)
