"""What a serving engine's planning call needs around `rebalance`: its tensors, its sizes, and no empty slots."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, Real
from torch import Tensor

from eplb_core import EMPTY, Topology, preserve_slots, rebalance
from eplb_core._checks import require


def plan(
    load: Real[Tensor, "*windows layers logical"],
    previous: Real[Tensor, "layers old_slots"] | None,
    *,
    num_slots: int,
    num_ranks: int,
    num_nodes: int,
    num_groups: int | None,
    options: Mapping[str, Any],
) -> Int64[np.ndarray, "layers slots"]:
    """Plan for an engine that knows no empty slots and may have changed its number of ranks.

    Integer loads stay integers, however large. Nodes that do not divide the ranks count as one node, as in vLLM.

    Args:
        load: tokens per expert, on any device.
        previous: the placement in force, with -1 for an empty slot. If the group grew or shrank, the first ranks
            are those that were there before.
        num_slots: slots of a layer after the change.
        num_ranks: ranks after the change.
        num_nodes: hosts of these ranks.
        num_groups: groups of experts that the router limits to few nodes; None for none.
        options: of `rebalance`.

    Returns:
        `[layers, slots]` with an expert in every slot.

    Raises:
        EplbError: if the slots do not split over the ranks, or `rebalance` refuses the input.
    """
    counts = to_numpy(load)
    topology = engine_topology(counts.shape[-1], num_slots, num_ranks, num_nodes)
    held = None if previous is None else fit(to_numpy(previous), topology)
    placed = rebalance(counts, topology, num_groups=num_groups or 1, previous=held, **options)
    if (placed == EMPTY).any():
        placed = fill_empty(placed, counts if counts.ndim == 2 else counts.sum(axis=0), topology)
        placed = placed if held is None else preserve_slots(placed, held, topology)
    return placed.astype(np.int64)


def to_numpy(values: Tensor) -> np.ndarray:
    """Copy to the host as int64 or float64, which hold every count exactly that an engine can record."""
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values.long()).numpy()


def engine_topology(num_logical: int, num_slots: int, num_ranks: int, num_nodes: int) -> Topology:
    """Build the topology of an engine's numbers.

    Raises:
        EplbError: naming the number of redundant experts that would split evenly.
    """
    nodes = num_nodes if num_nodes >= 1 and num_ranks % num_nodes == 0 else 1
    return Topology.from_experts(num_logical, num_ranks, num_redundant=num_slots - num_logical, num_nodes=nodes)


def fit(previous: Int64[np.ndarray, "layers old_slots"], topology: Topology) -> Int64[np.ndarray, "layers slots"]:
    """Cut a placement to the ranks that stay, or add empty slots for those that join.

    Raises:
        EplbError: if `previous` is not made of whole ranks.
    """
    require(
        previous.ndim == 2 and previous.shape[1] % topology.slots_per_rank == 0,
        "the placement in force must be `[layers, slots]` with as many slots per rank as the new one",
        f"shape={previous.shape}, slots_per_rank={topology.slots_per_rank}",
        "Change the number of ranks, but not the slots of each.",
    )
    missing = topology.num_slots - previous.shape[1]
    return np.pad(previous[:, : topology.num_slots], ((0, 0), (0, max(missing, 0))), constant_values=EMPTY)


def fill_empty(
    placed: Int[np.ndarray, "layers slots"], load: Real[np.ndarray, "layers logical"], topology: Topology
) -> Int[np.ndarray, "layers slots"]:
    """Put into every empty slot the copy that adds least to its rank's load.

    An expert that the rank holds anyway is taken, so that filling costs no transfer; if all its copies are on this
    rank, no rank's load changes. Only a rank without any expert receives one. Ties go to the lowest expert.

    Args:
        placed: expert ids or `EMPTY`.
        load: tokens per expert.
        topology: sizes of `placed`.
    """
    placed = placed.copy()
    for layer, slot in np.argwhere(placed == EMPTY):
        first = slot - slot % topology.slots_per_rank
        on_rank = placed[layer, first : first + topology.slots_per_rank]
        copies, local = (_copies(slots, load.shape[1]) for slots in (placed[layer], on_rank))
        added = load[layer] * ((local + 1) / (copies + 1) - local / np.maximum(copies, 1))
        candidates = np.flatnonzero(local if local.any() else copies)
        placed[layer, slot] = candidates[np.argmin(added[candidates])]
    return placed


def _copies(slots: np.ndarray, num_logical: int) -> np.ndarray:
    return np.bincount(slots[slots != EMPTY], minlength=num_logical)


def check_options(caller: str, allowed: tuple[str, ...], options: Mapping[str, Any]) -> None:
    """Refuse options that no plan could be made with, before the engine has loaded a model.

    Raises:
        EplbError: if a name is not in `allowed`, or `rebalance` refuses a value.
    """
    unknown = sorted(set(options) - set(allowed))
    require(not unknown, f"`{caller}` takes the options {', '.join(allowed)}", f"{unknown}", "Check the spelling.")
    rebalance(np.ones((1, 1), dtype=np.int64), Topology(1, 1), previous=np.zeros((1, 1), dtype=np.int32), **options)
