"""Which ranks can send an expert to a rank that needs it."""

from typing import Any, NamedTuple

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY, require
from eplb_core.topology import Topology

_TABLE = 2**22  # entries of a table over layers, experts and nodes, up to which it beats a search on NumPy


class Requests(NamedTuple):
    """Messages that must arrive: one per slot where `wanted` is true.

    expert: int32 `[layers, slots]` the expert each slot asks for.
    wanted: bool `[layers, slots]`.
    """

    expert: Any
    wanted: Any


class Jobs(NamedTuple):
    """Messages and who can send them: the ranks of the slots `holders[start:stop]`, which ascend.

    `holders` are the flat `[layers * slots]` slots in order of layer, expert and slot.

    start, stop: `[layers, jobs]`; equal where there is no message, or nobody to send it.
    """

    start: Any
    stop: Any


def find_candidates(held, order, requests: Requests, topology: Topology) -> Jobs:
    """Find who can send what each slot asks for: the holders on its node, or all if there are none.

    Args:
        held: `[layers, slots]` expert ids that can be read.
        order: `[layers, slots]` the slots of each layer in order of their expert.
        requests: what must arrive where.
        topology: sizes.

    Returns:
        One job per slot, `[layers, slots]`.
    """
    small = held.shape[0] * topology.num_nodes
    if _ops.is_numpy(_ops.namespace(held)) and small * (int(held.max()) + 2) <= _TABLE:
        return _look_up(held, requests, topology)
    return _search(held, order, requests, topology)


def _search(held, order, requests: Requests, topology: Topology) -> Jobs:
    xp = _ops.namespace(held)
    integer = _ops.int_dtype(xp)
    (num_layers, num_slots), largest = held.shape, xp.iinfo(integer).max
    require(
        num_layers * num_slots * num_slots <= largest,
        "`plan_moves` with 32-bit integers needs layers * slots^2 below 2^31",
        f"layers={num_layers}, slots={num_slots}",
        "Enable jax_enable_x64, or plan some layers at a time.",
    )
    # One search serves all layers: the layer is the leading digit of the key.
    layer_key = xp.arange(num_layers, dtype=integer)[:, None] * (largest // num_layers)
    keys = xp.reshape(layer_key + xp.astype(_ops.pick(held, order), integer) + 1, (-1,))
    asked = xp.reshape(layer_key + xp.astype(requests.expert, integer) + 1, (-1,))
    start, stop = (xp.reshape(xp.searchsorted(keys, asked, side=side), held.shape) for side in ("left", "right"))
    if topology.num_nodes > 1:
        # Within one expert's run slots ascend, so a node is a part of the run: (run, slot) is sorted as well.
        run = xp.searchsorted(keys, keys)
        position = run * num_slots + xp.reshape(xp.astype(order, integer), (-1,))
        slots = xp.arange(num_slots, dtype=integer)
        bound = xp.reshape(start * num_slots + slots // topology.slots_per_node * topology.slots_per_node, (-1,))
        near_start, near_stop = (
            xp.reshape(xp.searchsorted(position, limit), held.shape)
            for limit in (bound, bound + topology.slots_per_node)
        )
        near = (near_stop > near_start) & (stop > start)
        start, stop = xp.where(near, near_start, start), xp.where(near, near_stop, stop)
    return Jobs(start=start, stop=xp.where(requests.wanted, stop, start))


def _look_up(held: np.ndarray, requests: Requests, topology: Topology) -> Jobs:
    """`_search` for NumPy: a table says where the holders of each (layer, expert, node) begin."""
    num_layers, num_nodes = held.shape[0], topology.num_nodes
    num_runs = int(held.max()) + 2
    layer_run = np.arange(num_layers)[:, None] * num_runs + 1
    node = np.arange(topology.num_slots) // topology.slots_per_node
    begins = np.zeros(num_layers * num_runs * num_nodes + 1, dtype=np.int32)
    holding = ((held + layer_run) * num_nodes + node).ravel()
    np.cumsum(np.bincount(holding, minlength=begins.size - 1), out=begins[1:])
    wanted = requests.wanted & (requests.expert < num_runs - 1)
    run = (np.where(wanted, requests.expert, EMPTY) + layer_run) * num_nodes
    near = run + node
    start, stop = begins.take(near), begins.take(near + 1)
    if num_nodes > 1:
        far = start == stop
        start, stop = np.where(far, begins.take(run), start), np.where(far, begins.take(run + num_nodes), stop)
    return Jobs(start=start, stop=np.where(wanted, stop, start))
