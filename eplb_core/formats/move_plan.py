"""Move plans, `.npz`: both placements, where each slot's contents come from, and the messages in their order."""

import json
from typing import Any, NamedTuple

import numpy as np

from eplb_core import _npz, _ops
from eplb_core._checks import EplbError, check_indices, check_kind, require
from eplb_core._files import PathLike
from eplb_core.formats.arrays import meta_of
from eplb_core.formats.values import blaming, placement_of
from eplb_core.moves import MovePlan
from eplb_core.rounds import Schedule
from eplb_core.topology import Topology, check_topology


class StoredPlan(NamedTuple):
    """A move plan from a file. Nothing in it has been checked but its form; `verify_plan` does that.

    old, new: `[layers, slots]` int32 placements.
    plan: `MovePlan`.
    topology: sizes.
    schedule: `Schedule` of all layers, or None.
    """

    old: np.ndarray
    new: np.ndarray
    plan: MovePlan
    topology: Topology
    schedule: Schedule | None


def write_plan(
    path: PathLike, old: Any, new: Any, plan: MovePlan, topology: Topology, schedule: Schedule | None = None
) -> None:
    """Write a move plan to an `.npz` that takes the place of `path` at once.

    Args:
        path: the file to write.
        old: `[layers, slots]` the placement in force.
        new: `[layers, slots]` the placement to come.
        plan: the moves.
        topology: sizes.
        schedule: the order of messages.

    Raises:
        EplbError: if a placement or the plan is not `[layers, slots]` of integers.
        OSError: if the file cannot be written.
    """
    check_topology(topology, "write_plan")
    check_kind(plan, MovePlan, "write_plan(plan=...)")
    check_kind(schedule, (Schedule, type(None)), "write_plan(schedule=...)")
    arrays = {"old": old, "new": new, "source_slot": plan.source_slot}
    if plan.relay_slot is not None:
        arrays["relay_slot"] = plan.relay_slot
    arrays = {name: placement_of(_ops.as_array(array), f"{path}: {name}") for name, array in arrays.items()}
    if schedule is not None:
        arrays["schedule"] = np.stack([_column(column, path) for column in schedule])
    sizes = {"ep_size": topology.ep_size, "slots_per_rank": topology.slots_per_rank, "num_nodes": topology.num_nodes}
    _npz.write_npz(path, **arrays, meta=np.asarray(json.dumps(sizes)))


def read_plan(path: PathLike, *, limit_bytes: int = _npz.LIMIT_BYTES) -> StoredPlan:
    """Read a move plan that `write_plan` wrote.

    Raises:
        EplbError: naming the file, if it is missing, damaged, too large or not a move plan.
    """
    with blaming(path):
        arrays = _npz.read_npz(path, limit_bytes=limit_bytes)
        needed = ("old", "new", "source_slot")
        require(
            set(needed) <= set(arrays),
            f"`{path}` must have the arrays {', '.join(needed)}",
            f"arrays {sorted(arrays)[:8]}",
            "A placement is not a move plan; write one with `eplb plan --moves`.",
        )
        ids = {name: placement_of(arrays[name], path) for name in (*needed, "relay_slot") if name in arrays}
        meta = meta_of(arrays, path)
        topology = Topology(*(meta.get(key, 0) for key in ("ep_size", "slots_per_rank", "num_nodes")))
        shapes = {array.shape for array in ids.values()}
        if shapes != {(len(ids["old"]), topology.num_slots)}:
            raise EplbError(f"`{path}` must have arrays [layers, {topology.num_slots}]; got {shapes}. Write it again.")
        plan = MovePlan(ids["source_slot"], ids.get("relay_slot"))
        return StoredPlan(ids["old"], ids["new"], plan, topology, _schedule(arrays.get("schedule"), path))


def _column(column: Any, path: PathLike) -> np.ndarray:
    values = np.asarray(_ops.as_array(column))
    values = values.astype(np.int32) if values.dtype == bool else values
    return check_indices(values, 2**31, f"{path}: schedule", "integers", "Make it with schedule_rounds.").astype(
        np.int32
    )


def _schedule(columns: np.ndarray | None, path: PathLike) -> Schedule | None:
    if columns is None:
        return None
    good = columns.ndim == 2 and len(columns) == len(Schedule._fields) and columns.dtype == np.int32
    require(
        good,
        f"`{path}` must have an int32 schedule of {len(Schedule._fields)} columns",
        f"{columns.dtype} of shape {columns.shape}",
        "Write it again.",
    )
    return Schedule._make([*columns[:-1], columns[-1].astype(bool)])
