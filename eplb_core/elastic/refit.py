"""A placement for a group of another size, from the one that was in force: for a restart."""

from typing import Any

import numpy as np
from jaxtyping import Int, Real

from eplb_core import _ops
from eplb_core._checks import EplbError
from eplb_core.elastic import grow, lose_ranks
from eplb_core.topology import Topology


def refit(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    new_topology: Topology,
) -> Int[np.ndarray, "layers slots"]:
    """Fit a placement, such as that of a `Snapshot`, to a group of another size.

    For processes that all start anew and load their experts from a checkpoint: what was learnt about the traffic
    stays. Ranks that are in both groups keep what they held; experts of the last ranks are taken over where there are
    fewer, as `lose_ranks` does, and slots of new ranks are filled as `grow` does.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force before; experts may be lost.
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used; ones if
            nothing is known.
        topology: the group before.
        new_topology: the group now, with at least as many slots per rank.

    Returns:
        `[layers, slots]` int32 for the new group, with a copy of every expert.

    Raises:
        EplbError: if there are too few slots for all experts, fewer slots per rank than before, or the shapes
            disagree.

    >>> before = np.asarray([[0, 1, 2, 0, 3, 1]])
    >>> refit(before, np.asarray([[4, 4, 2, 2]]), Topology(3, 2), Topology(2, 2)).tolist()
    [[3, 1, 2, 0]]
    """
    held, ranks = np.asarray(_ops.as_array(physical_to_logical)), topology.ep_size
    if new_topology.ep_size < topology.ep_size:
        gone = range(new_topology.ep_size, ranks)
        held = lose_ranks(held, load, topology, gone, max_extra_moves=0).old
        ranks = new_topology.ep_size
    kept = Topology(ranks, topology.slots_per_rank)
    plan = grow(held, load, kept, new_topology)
    if plan.unhosted:
        raise EplbError(f"`refit(new_topology=...)` must have a slot for every expert. {plan.problems()[-1]}")
    return plan.placement
