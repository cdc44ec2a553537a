"""The move plan: where the contents of every slot come from."""

from numbers import Number
from typing import Any, NamedTuple

from jaxtyping import Int, Shaped

from eplb_core import _ops
from eplb_core._checks import (
    EMPTY,
    LostExpertsError,
    at,
    check_choice,
    check_ids,
    check_indices,
    check_kind,
    check_same_layers,
    require,
)
from eplb_core.moves.candidates import Requests
from eplb_core.moves.senders import choose_senders
from eplb_core.topology import Topology, check_topology

_RANKS = "List each live rank by its ep_rank."


class MovePlan(NamedTuple):
    """Where each slot of a new placement takes its contents from. A value: build it with `plan_moves`.

    source_slot: int32 `[layers, slots]`. Slot `p` takes what slot `source_slot[l, p]` held in the old placement;
        `p` itself if it does not change; `EMPTY` if nothing is put there.
    relay_slot: None, or int32 `[layers, slots]` with `fan_out="node"`: the slot on the same node that receives the
        same contents first and passes them on; `EMPTY` where the message comes straight from `source_slot`.
    """

    source_slot: Any
    relay_slot: Any = None


def plan_moves(
    old: Int[Any, "layers slots"],
    new: Int[Any, "layers slots"],
    topology: Topology,
    *,
    live_ranks: Any = None,
    fan_out: str = "direct",
    allow_lost: bool = False,
) -> MovePlan:
    """Plan the moves that turn one placement into another.

    For every slot: a slot that does not change sources itself. Else a rank that holds the expert copies it within
    the rank, from its lowest slot. Else the expert comes from a rank of the same node if one holds it, else from
    any; all slots of the rank share that one message. Among holders, senders are chosen so that the rank with the
    most messages to send in a layer has as few as possible (`senders.choose_senders`). Sources are live.

    Args:
        old: `[layers, slots]` the placement in force; `EMPTY` slots hold nothing.
        new: `[layers, slots]` the placement to come.
        topology: sizes of both. Static under `jax.jit`.
        live_ranks: the ranks that can send, as ids or as a boolean `[ep_size]` mask; all by default. A slot that
            does not change sources itself on a dead rank as well.
        fan_out: `"direct"` sends every message from an old holder; `"node"` lets only one rank of a node pull an
            expert across nodes, and that rank passes it on to the others (`MovePlan.relay_slot`).
        allow_lost: leave `EMPTY` sources for experts that no live slot holds, instead of raising.

    Returns:
        `MovePlan`, in the library of `old`.

    Raises:
        LostExpertsError: listing the (layer, expert) pairs that no live slot holds. Under `jax.jit`, where values
            cannot be looked at, such slots get `EMPTY` sources as with `allow_lost=True`.
        EplbError: if shapes do not fit the topology or an argument is out of range.

    >>> import numpy as np
    >>> topology = Topology(ep_size=2, slots_per_rank=2)
    >>> plan_moves(np.asarray([[0, 1, 2, 3]]), np.asarray([[1, 0, 2, 0]]), topology).source_slot.tolist()
    [[1, 0, 2, 0]]
    """
    check_topology(topology, "plan_moves")
    old, new = _ops.as_array(old), _ops.as_array(new)
    _check(old, new, topology, fan_out)
    xp = _ops.namespace(old)
    old, new = xp.astype(old, xp.int32), xp.astype(new, xp.int32)
    slots = xp.arange(topology.num_slots, dtype=xp.int32)
    live = _live_slots(live_ranks, topology, xp)
    held = xp.where(live, old, xp.asarray(EMPTY, dtype=xp.int32))

    local, local_slot = _first_on_rank(new, held, topology)
    unchanged = new == old
    wanted = ~unchanged & (new != EMPTY)
    remote = wanted & ~local
    # Of the slots of a rank that need one expert from afar, the first gets it; on a dead rank others may hold it.
    _, primary_slot = _first_on_rank(new, xp.where(remote, new, xp.asarray(EMPTY, dtype=xp.int32)), topology)
    requests = Requests(expert=new, wanted=remote & (primary_slot == slots))
    relay = None
    if fan_out == "node":
        requests, relay = _one_per_node(requests, held, topology)
    sent_from = choose_senders(held, requests, topology)
    if relay is not None:
        relayed = _ops.pick(sent_from, xp.maximum(relay, 0))
        sent_from = xp.where(relay == EMPTY, sent_from, relayed)
        relay = xp.where(sent_from == EMPTY, sent_from, relay)
    shared = _ops.pick(sent_from, primary_slot)
    source = xp.where(remote, shared, xp.where(wanted, local_slot, EMPTY))
    source = xp.astype(xp.where(unchanged, slots, source), xp.int32)
    if not allow_lost and not _ops.is_traced(source):
        _refuse_lost(new, wanted & (source == EMPTY))
    return MovePlan(source_slot=source, relay_slot=relay)


def apply_moves(
    values: Shaped[Any, "layers slots *row"], plan: MovePlan, *, fill: int = EMPTY
) -> Shaped[Any, "layers slots *row"]:
    """Carry out a plan on an array of rows: a gather, and the meaning against which every executor is tested.

    Args:
        values: `[layers, slots, ...]` what every slot holds: expert ids, weights, checksums.
        plan: the moves.
        fill: what slots without a source get, converted to the dtype of `values`.

    Returns:
        Array like `values`.

    Raises:
        EplbError: if `values` does not have the plan's layers and slots, the plan takes from slots that do not exist,
            or `fill` is no number.

    >>> import numpy as np
    >>> apply_moves(np.asarray([[5, 6, 7]]), MovePlan(np.asarray([[2, EMPTY, 2]]))).tolist()
    [[7, -1, 7]]
    """
    check_kind(plan, MovePlan, "apply_moves(plan=...)")
    values, source = _ops.as_array(values), _ops.as_array(plan.source_slot)
    check_ids(source, source.shape[-1] if source.ndim else 0, "apply_moves(plan=...)")
    _check_slots(source, "apply_moves")
    check_kind(fill, Number, "apply_moves(fill=...)")
    require(
        tuple(values.shape[:2]) == tuple(source.shape),
        "`apply_moves(values=...)` must be `[layers, slots, ...]` like the plan",
        f"values.shape={tuple(values.shape)}, source_slot.shape={tuple(source.shape)}",
        "Stack the rows of all ranks in slot order.",
    )
    xp = _ops.namespace(values)
    source = xp.asarray(source)
    num_layers, num_slots = source.shape
    first_row = xp.arange(num_layers, dtype=source.dtype)[:, None] * num_slots
    rows = xp.reshape(values, (num_layers * num_slots, *values.shape[2:]))
    moved = xp.take(rows, xp.reshape(first_row + xp.maximum(source, 0), (-1,)), axis=0)
    empty = xp.reshape(source == EMPTY, (num_layers, num_slots, *[1] * (values.ndim - 2)))
    return xp.where(empty, xp.astype(xp.asarray(fill), values.dtype), xp.reshape(moved, values.shape))


def _first_on_rank(wanted, held, topology: Topology):
    """Whether the rank of each slot holds the slot's expert in `held`, and the lowest slot that does."""
    xp = _ops.namespace(held)
    by_rank = (-1, topology.slots_per_rank)
    first = xp.reshape(_ops.index_in(xp.reshape(held, by_rank), xp.reshape(wanted, by_rank)), held.shape)
    found = first < topology.slots_per_rank
    slots = xp.arange(topology.num_slots, dtype=xp.int32)
    first_slot = slots // topology.slots_per_rank * topology.slots_per_rank
    return found, xp.where(found, first, 0) + first_slot


def _one_per_node(requests: Requests, held, topology: Topology):
    """Keep one request per (node, expert) that must cross nodes; the slots of the others become relays of it."""
    xp = _ops.namespace(held)
    expert, wanted = requests.expert, requests.wanted
    by_node = (-1, topology.slots_per_node)
    wanted_n, expert_n, held_n = (xp.reshape(x, by_node) for x in (wanted, expert, held))
    on_node = xp.any(expert_n[:, :, None] == held_n[:, None, :], axis=2)
    crossing = wanted_n & ~on_node
    twin = crossing[:, None, :] & (expert_n[:, :, None] == expert_n[:, None, :])
    puller = xp.astype(xp.argmax(xp.astype(twin, xp.int8), axis=2), xp.int32)
    relayed = crossing & (puller != xp.arange(topology.slots_per_node, dtype=xp.int32))
    first_slot = xp.arange(topology.num_nodes, dtype=xp.int32)[None, :, None] * topology.slots_per_node
    puller = xp.reshape(xp.reshape(puller, (held.shape[0], topology.num_nodes, -1)) + first_slot, held.shape)
    relayed = xp.reshape(relayed, held.shape)
    relay = xp.where(relayed, puller, xp.asarray(EMPTY, dtype=xp.int32))
    return Requests(expert=expert, wanted=wanted & ~relayed), relay


def _live_slots(live_ranks, topology: Topology, xp):
    """Boolean `[slots]`."""
    if live_ranks is None:
        return xp.ones(topology.num_slots, dtype=xp.bool)
    ranks = xp.asarray(_ops.as_array(live_ranks))
    if xp.isdtype(ranks.dtype, "bool"):
        require(
            tuple(ranks.shape) == (topology.ep_size,),
            "`plan_moves(live_ranks=...)` as a mask must be `[ep_size]`",
            f"shape={tuple(ranks.shape)}, ep_size={topology.ep_size}",
            "Give one boolean per rank, or the ids of the live ranks.",
        )
        live = ranks
    else:
        if not _ops.is_traced(ranks):
            check_indices(ranks, topology.ep_size, "plan_moves(live_ranks=...)", "rank ids", _RANKS)
        live = xp.any(xp.arange(topology.ep_size)[:, None] == ranks[None, :], axis=1)
    return xp.take(live, xp.arange(topology.num_slots) // topology.slots_per_rank)


def _check(old, new, topology: Topology, fan_out: str) -> None:
    check_ids(old, topology.num_slots, "plan_moves(old=...)")
    check_ids(new, topology.num_slots, "plan_moves(new=...)")
    check_same_layers(old, new, "plan_moves(old=..., new=...)")
    advice = "Use 'node' where links between nodes are the bottleneck."
    check_choice(fan_out, ("direct", "node"), "plan_moves(fan_out=...)", advice)


def check_plan(plan: Any, topology: Topology, name: str) -> tuple[Any, Any]:
    """The arrays `source_slot` and `relay_slot` of a plan that fits the topology; the latter may be None."""
    check_topology(topology, name)
    check_kind(plan, MovePlan, f"{name}(plan=...)")
    arrays = [None if array is None else _ops.as_array(array) for array in plan]
    for array in arrays:
        if array is not None:
            check_ids(array, topology.num_slots, f"{name}(plan=...)")
            _check_slots(array, name)
    source, relay = arrays
    require(
        source is not None and (relay is None or relay.shape == source.shape),
        f"`{name}(plan=...)` must have sources, and relays of as many layers or none",
        f"shapes {[None if array is None else tuple(array.shape) for array in arrays]}",
        "Make it with plan_moves.",
    )
    return source, relay


def _check_slots(slots, name: str) -> None:
    if _ops.is_traced(slots) or int(_ops.namespace(slots).max(slots)) < slots.shape[1]:
        return
    require(
        False,
        f"`{name}(plan=...)` must name slots 0..{slots.shape[1] - 1}, or EMPTY = -1",
        f"larger slots at (layer, slot) {at(slots >= slots.shape[1])}",
        "Make it with plan_moves.",
    )


def _refuse_lost(new, lost) -> None:
    xp = _ops.namespace(lost)
    if bool(xp.any(lost)):
        layers, slots = (index.tolist() for index in xp.nonzero(lost))
        raise LostExpertsError(sorted({(layer, int(new[layer, p])) for layer, p in zip(layers, slots, strict=True)}))
