"""A lower bound on the busiest rank's load, so that a placement can say how far from the best it may be."""

from typing import Any

from jaxtyping import Bool, Float, Real

from eplb_core import _ops
from eplb_core._checks import check_load
from eplb_core.placement import check_sizes
from eplb_core.topology import Topology, check_topology

_DEPTH = 8  # copies per rank up to which the packing argument is made
_MARGIN, _ROUNDINGS = 1e-9, 64  # counts are rounded down by more than floats err, so that the bound stays valid


def load_bound(load: Real[Any, "*windows layers logical"], topology: Topology) -> Float[Any, "*windows layers"]:
    """Bound the busiest rank's load from below, for any placement in these slots.

    Let `B` be the busiest rank's load of some placement in which expert `e` with load `w` has `c` copies. Then

    1. `B` is at least the mean rank load;
    2. every copy weighs `w / c <= B`, so `c >= ceil(w / B)`, and all `c` together are at most the slots;
    3. for every `k`, a rank holds at most `k - 1` copies heavier than `B / k`, hence all ranks at most
       `(k - 1) * ep_size`; an expert without such heavy copies has `c >= ceil(k * w / B)`.

    The bound is the largest `B` below which some `k` leaves no choice: each expert is either light, at the price of
    more slots, or heavy, and the cheapest conversions, even fractional ones, need more slots than there are. Larger
    `B` only make it easier, so bisection finds it. Its lower end is returned. It holds with several copies of an
    expert on a rank as well. Nodes and groups are not used: a hierarchical placement may be farther from it.

    Args:
        load: `[layers, logical]` or `[windows, layers, logical]` tokens.
        topology: ranks and slots. Static under `jax.jit`.

    Returns:
        `[layers]` or `[windows, layers]` tokens, of the library's default float type.

    Raises:
        EplbError: if the load is negative or not finite, or there are more experts than slots.

    >>> import numpy as np
    >>> load_bound(np.asarray([[90, 10, 10, 10]]), Topology(ep_size=2, slots_per_rank=3)).round(6).tolist()
    [60.0]
    >>> load_bound(np.asarray([[90, 10, 10, 10]]), Topology(ep_size=4, slots_per_rank=1)).round(6).tolist()
    [90.0]
    """
    check_topology(topology, "load_bound")
    load = _ops.as_array(load)
    check_load(load, "load_bound(load=...)")
    check_sizes(load.shape[-1], topology, "load_bound(load=...)")
    xp = _ops.namespace(load)
    rows = xp.reshape(xp.astype(load, _ops.float_dtype(xp)), (-1, load.shape[-1]))
    low = _ops.divide(_ops.tree_sum(rows), topology.ep_size)
    high = xp.max(rows, axis=1) * topology.slots_per_rank + low

    def halve(state, fixed):
        (low, high), (rows,) = state, fixed
        middle = low + (high - low) / 2
        can = _feasible(rows, middle, topology)
        wide = (high - low) > _ops.margin(high, _MARGIN, _ROUNDINGS) * high
        return (xp.where(can, low, middle), xp.where(can, middle, high)), wide

    low, _ = _ops.while_rows(halve, (low, high), (rows,), ~_feasible(rows, low, topology))
    return xp.reshape(low, load.shape[:-1])


def _feasible(load: Float[Any, "rows logical"], bound: Float[Any, " rows"], topology: Topology) -> Bool[Any, " rows"]:
    """Whether the arguments leave room for a placement whose busiest rank has load `bound`."""
    xp = _ops.namespace(load)
    sure = 1 - _ops.margin(load, _MARGIN, _ROUNDINGS)
    ratio = load / xp.where(bound > 0, bound, 1.0)[:, None]
    heavy_count = xp.maximum(xp.ceil(ratio * sure), 1.0)
    possible = xp.sum(heavy_count, axis=1) <= topology.num_slots
    for k in range(2, min(topology.slots_per_rank, _DEPTH) + 1):
        light_count = xp.maximum(xp.ceil(ratio * (k * sure)), 1.0)
        extra = light_count - heavy_count
        # Convert those first that get rid of most heavy copies per further slot.
        price = extra / heavy_count
        order = xp.argsort(price, axis=1, stable=True)
        frees = _ops.pick(xp.where(extra > 0, heavy_count, 0.0), order)
        must_free = xp.sum(frees, axis=1, keepdims=True) - (k - 1) * topology.ep_size
        taken = xp.clip(must_free - (xp.cumulative_sum(frees, axis=1) - frees), 0.0, frees)
        slots = xp.sum(heavy_count, axis=1) + xp.sum(taken * _ops.pick(price, order), axis=1)
        possible = possible & (slots <= topology.num_slots * (2 - sure))
    return possible
