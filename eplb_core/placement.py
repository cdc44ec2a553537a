"""Placements: which expert each slot holds. Initial ones, checks, and keeping slots in place."""

from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import (
    MOST_EXPERTS,
    at,
    check_count,
    check_ids,
    check_room,
    check_same_layers,
    positions,
    require,
)
from eplb_core.topology import Topology, check_topology


def round_robin(num_layers: int, num_logical: int, topology: Topology) -> Int[np.ndarray, "layers slots"]:
    """Place expert `p % num_logical` in slot `p` of every layer: the placement that engines start from.

    Args:
        num_layers: MoE layers, >= 1.
        num_logical: experts the router knows, at most `topology.num_slots`.
        topology: sizes of the expert-parallel group.

    Returns:
        `[layers, slots]` int32.

    Raises:
        EplbError: if there are more experts than slots, or a size is out of range.

    >>> round_robin(1, 5, Topology(ep_size=2, slots_per_rank=4)).tolist()
    [[0, 1, 2, 3, 4, 0, 1, 2]]
    """
    check_sizes(num_logical, topology, "round_robin(num_logical=...)")
    num_layers = check_count(num_layers, "round_robin(num_layers=...)", 1, advice="Count the model's MoE layers.")
    check_room("round_robin", num_layers, topology.num_slots)
    return np.tile(np.arange(topology.num_slots, dtype=np.int32) % num_logical, (num_layers, 1))


def check_sizes(num_logical: int, topology: Topology, name: str) -> None:
    """Refuse a number of experts that the slots cannot hold.

    Raises:
        EplbError: naming the fewest slots per rank that would do.
    """
    check_topology(topology, name.partition("(")[0])
    num_logical = check_count(num_logical, name, 1, MOST_EXPERTS, "Count the experts that the router knows.")
    needed = -(-num_logical // topology.ep_size)
    require(
        num_logical <= topology.num_slots,
        f"`{name}` must be at least 1 and at most the number of slots",
        f"num_logical={num_logical}, num_slots={topology.num_slots}",
        f"Every expert needs one slot: use slots_per_rank >= {needed} or more ranks.",
    )


def check_placement(
    physical_to_logical: Int[Any, "layers slots"],
    topology: Topology,
    num_logical: int | None = None,
    *,
    allow_lost: bool = False,
) -> None:
    """Refuse a placement that is malformed or in which an expert has no copy.

    Looks at values, so it runs on the host; call it outside `jax.jit`.

    Args:
        physical_to_logical: `[layers, slots]` expert ids or `EMPTY`.
        topology: sizes it must fit.
        num_logical: experts the router knows; by default the largest id of all layers plus one.
        allow_lost: accept experts without a copy, as after the loss of a rank.

    Raises:
        EplbError: naming every bad position, or every lost (layer, expert).

    >>> check_placement(np.asarray([[0, 1, 1, 2]]), Topology(ep_size=2, slots_per_rank=2))
    >>> check_placement(np.asarray([[0, 1, 1, 3]]), Topology(ep_size=2, slots_per_rank=2))
    Traceback (most recent call last):
    ...
    eplb_core._checks.EplbError: `check_placement` needs a slot for every expert; got ... pairs [(0, 2)]. Place ...
    """
    check_topology(topology, "check_placement")
    ids = np.asarray(_ops.as_array(physical_to_logical))
    check_ids(ids, topology.num_slots, "check_placement(physical_to_logical=...)")
    most = int(ids.max())
    if num_logical is None:
        num_logical = max(most + 1, 1)
    num_logical = check_count(num_logical, "check_placement(num_logical=...)", 1, MOST_EXPERTS)
    if most >= num_logical:
        bad = ids >= num_logical
        require(
            False,
            f"`check_placement` allows expert ids 0..{num_logical - 1} and EMPTY = -1",
            f"ids {sorted({int(ids[place]) for place in positions(bad)})} at (layer, slot) {at(bad)}",
            "Check which model this placement was made for.",
        )
    if allow_lost:
        return
    check_room("check_placement", ids.shape[0], num_logical)
    held = np.zeros((ids.shape[0], num_logical + 1), dtype=bool)
    held[np.arange(ids.shape[0])[:, None], ids] = True  # EMPTY = -1 marks the spare last column
    lost = ~held[:, :num_logical]
    require(
        not lost.any(),
        "`check_placement` needs a slot for every expert",
        f"no copy of (layer, expert) pairs {at(lost)}",
        "Place them, or pass allow_lost=True after a rank was lost.",
    )


def preserve_slots(
    new: Int[Any, "layers slots"], old: Int[Any, "layers slots"], topology: Topology
) -> Int[Any, "layers slots"]:
    """Reorder the slots within each rank of `new` so that experts that stay on a rank keep their slot.

    The experts of each rank do not change, so load and transfers do not either; local copies do. The k-th copy of
    an expert on a rank stays where the k-th copy was; what is left fills the free slots in order.
    `O(layers * slots * slots_per_rank)`.

    Args:
        new: `[layers, slots]` the placement to reorder.
        old: `[layers, slots]` the placement in force.
        topology: sizes of both.

    Returns:
        `[layers, slots]` int32.

    Raises:
        EplbError: if the shapes do not fit the topology.

    References:
        vLLM, https://github.com/vllm-project/vllm/pull/29499 (`preserve_intragpu_slots`).

    >>> topology = Topology(ep_size=2, slots_per_rank=2)
    >>> preserve_slots(np.asarray([[3, 0, 1, 2]]), np.asarray([[0, 1, 2, 3]]), topology).tolist()
    [[0, 3, 2, 1]]
    """
    check_topology(topology, "preserve_slots")
    new, old = _ops.as_array(new), _ops.as_array(old)
    xp = _ops.namespace(new)
    check_ids(new, topology.num_slots, "preserve_slots(new=...)")
    check_ids(old, topology.num_slots, "preserve_slots(old=...)")
    check_same_layers(new, old, "preserve_slots(new=..., old=...)")
    by_rank = (-1, topology.slots_per_rank)
    source, target = (xp.astype(xp.reshape(x, by_rank), xp.int32) for x in (new, old))
    reorder = _reorder_numpy if _ops.is_numpy(xp) else _reorder
    return xp.reshape(reorder(source, target), new.shape)


def _reorder(source, target):
    """The entries of each row of `source`, those that are in the row of `target` in their places there."""
    xp = _ops.namespace(source)
    stays = (source[:, None, :] == target[:, :, None]) & (
        _occurrence(source)[:, None, :] == _occurrence(target)[:, :, None]
    )
    free, left = ~xp.any(stays, axis=2), ~xp.any(stays, axis=1)
    fills = (
        free[:, :, None]
        & left[:, None, :]
        & (xp.cumulative_sum(_int(free), axis=1)[:, :, None] == xp.cumulative_sum(_int(left), axis=1)[:, None, :])
    )
    return _ops.pick(source, xp.argmax(_int(stays | fills), axis=2))


def _reorder_numpy(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`_reorder` place by place, for all rows at once; what stays is already where it shall be."""
    arrives, stands = _tell_apart(source), _tell_apart(target)
    stays, stayed = np.zeros((2, *arrives.shape), dtype=bool)
    for place, entry in enumerate(arrives):
        same = stands == entry
        stays |= same
        stayed[place] = same.any(axis=0)
    reordered = target.copy()
    reordered[~stays.T] = source[~stayed.T]
    return reordered


def _tell_apart(ids: np.ndarray) -> np.ndarray:
    """`[n, rows]` numbers for `ids [rows, n]`: equal for the k-th entries of one id in different arrays."""
    columns = np.ascontiguousarray(ids.T)
    nth = np.zeros_like(columns)
    for apart in range(1, len(columns)):
        nth[apart:] += columns[apart:] == columns[:-apart]
    return columns * len(columns) + nth


def _int(mask):
    xp = _ops.namespace(mask)
    return xp.astype(mask, xp.int32)


def _occurrence(ids):
    """`[rows, n]` how many entries before each one in its row are equal to it."""
    xp = _ops.namespace(ids)
    earlier = (ids[:, :, None] == ids[:, None, :]) & _ops.before(ids.shape[1], xp)
    return xp.sum(_int(earlier), axis=2, dtype=xp.int32)
