"""The executor for JAX: rows of arrays sharded over a mesh axis move as a plan says.

JAX is imported by the first call, not with the module: `pip install 'eplb[jax]'`.
"""

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY, at, check_ids, listing, require
from eplb_core._extras import import_extra
from eplb_core.moves import MovePlan
from eplb_core.sharded.perform import Layout, compile_program, group_parcels, map_shards, share_tables
from eplb_core.sharded.script import write_script
from eplb_core.topology import Topology


def rearrange(
    weights: Any,
    plan: MovePlan,
    topology: Topology,
    *,
    mesh: Any,
    axis: str = "ep",
    new: Int[Any, "layers slots"] | None = None,
    layers: Any = None,
    max_staging_bytes: int | None = None,
) -> Any:
    """Move the rows of sharded arrays as a plan says.

    Only rows that change their rank cross devices, with `lax.ppermute` under `shard_map`, in rounds in which every
    rank sends to one rank and receives from one (`schedule_shifts`). A row that arrives waits in staging until the
    slot that takes it has been read for the last time; layers go roughly one after the other, so staging is commonly
    less than a rank's share of one layer. The plan is data of the compiled program: plans for arrays of the same
    shapes share one, or a few where staging differs by more than a half. A plan that changes nothing compiles
    it and moves nothing.

    The arrays are donated: after the call only those returned exist, in the same memory. The call returns before the
    device is done, as any jitted function, except where a mesh spans processes: then all processes first agree that
    they have the same plan.

    Args:
        weights: pytree of `[layers, slots, ...]` arrays of any dtype. The slots, and nothing else, are sharded over
            `axis` of `mesh` alone; further axes of the mesh may shard what follows, and keep doing so.
        plan: from `plan_moves`, the same on all processes. `relay_slot` is followed.
        topology: sizes; `ep_size` is the size of the mesh axis, rank `r` its coordinate `r`.
        mesh: the `jax.sharding.Mesh` of the arrays; it may span processes.
        axis: name of the mesh axis over which the slots are sharded.
        new: the placement to come, needed where the plan has `EMPTY` sources: slots that are `EMPTY` in `new` keep
            the rows they have, and nobody may rely on them. Others would lose their expert and are refused.
        layers: ids of the layers to rearrange, such as a few between two forwards; all by default.
        max_staging_bytes: most that a device holds in staging, besides the rows of one round. Layers are carried out
            in groups that fit; a single layer takes what it needs. No limit by default: groups make for more rounds.

    Returns:
        The pytree with the rows moved; shardings as given.

    Raises:
        EplbError: if plan, topology, mesh and arrays do not fit, a slot would lose its expert, this is traced by
            `jax.jit`, or processes disagree about the plan. Nothing has moved, and the arrays are still there.
    """
    jax = import_extra("jax", "jax", "sharded.rearrange")
    leaves, structure = jax.tree.flatten(weights)
    moving, program, arguments = _prepare(weights, plan, topology, mesh, axis, new, layers, max_staging_bytes)
    if moving:
        for i, array in zip(moving, program(*arguments), strict=True):
            leaves[i] = array
    return jax.tree.unflatten(structure, leaves)


def lower(
    weights: Any,
    plan: MovePlan,
    topology: Topology,
    *,
    mesh: Any,
    axis: str = "ep",
    new: Int[Any, "layers slots"] | None = None,
    layers: Any = None,
    max_staging_bytes: int | None = None,
) -> Any:
    """Lower the program that `rearrange` would run, to look at it, without running it.

    Args, Raises: as `rearrange`. Nothing is donated.

    Returns:
        `jax.stages.Lowered`; its `compile()` has `memory_analysis()` and `as_text()`.
    """
    _, program, arguments = _prepare(weights, plan, topology, mesh, axis, new, layers, max_staging_bytes)
    return program.lower(*arguments)


def _prepare(weights, plan: MovePlan, topology: Topology, mesh, axis: str, new, layers, max_staging_bytes):
    """Indices of the leaves that have rows, the program for them, and its arguments."""
    jax = import_extra("jax", "jax", "sharded")
    paths, _ = jax.tree_util.tree_flatten_with_path(weights)
    source = _checked_plan(plan, topology, new)
    _check_mesh(mesh, axis, topology)
    _check_arrays(paths, source.shape, mesh, axis)
    moving = [i for i, (_, array) in enumerate(paths) if array.size]
    arrays = tuple(paths[i][1] for i in moving)
    row_bytes = [_row_bytes(array) for array in arrays]
    plan = MovePlan(source, None if plan.relay_slot is None else np.asarray(plan.relay_slot))
    most = None if max_staging_bytes is None else max(int(max_staging_bytes // max(sum(row_bytes), 1)), 1)
    width = choose_width(len(source), topology)
    script = write_script(plan, topology, width=width, layers=layers, max_places=most)
    parcels = group_parcels([array.dtype for array in arrays], row_bytes)
    num_places = _bucket(max(script.num_places, topology.num_slots // 10, 4))
    if most is not None:
        num_places = min(num_places, max(most, script.num_places))
    layout = Layout(mesh, axis, tuple(array.sharding.spec for array in arrays), parcels, num_places)
    if _num_processes(mesh) > 1:
        _agree(layout, arrays, script)
    rows = len(source) * topology.slots_per_rank
    tables = share_tables(script, layout, _bucket(max(len(script.shift), 2 * rows)), 2 * rows)
    return moving, compile_program(layout), (arrays, tables)


def choose_width(num_layers: int, topology: Topology) -> int:
    """How many rows a rank sends in a round: a power of two that depends on sizes alone.

    When a tenth of all slots change, each pair of ranks has about 8 rounds: enough to waste little on half-empty ones.
    """
    rows = num_layers * topology.slots_per_rank // (80 * max(topology.ep_size - 1, 1))
    return 1 << max(rows.bit_length() - 1, 0)


def _bucket(size: int) -> int:
    """Round up to 2, 3, 4, 6, 8, 12, 16, ..., so that few sizes are compiled for."""
    power = 1 << max(size - 1, 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def _row_bytes(array) -> int:
    """Bytes of one slot of one layer on a device."""
    shape = array.sharding.shard_shape(array.shape)[2:]
    return int(np.prod(shape)) * array.dtype.itemsize


def _num_processes(mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def _checked_plan(plan: MovePlan, topology: Topology, new) -> np.ndarray:
    require(
        not _ops.is_traced(plan.source_slot),
        "`rearrange` decides on the host which rows travel when, and must be called outside `jax.jit`",
        "a plan without values",
        "Return the plan from the jitted function first.",
    )
    source = np.asarray(_ops.as_array(plan.source_slot))
    check_ids(source, topology.num_slots, "rearrange(plan=...)")
    bad = source >= topology.num_slots
    require(
        not bad.any(),
        f"`rearrange(plan=...)` must have sources 0..{topology.num_slots - 1}, or EMPTY = -1",
        f"larger ones at (layer, slot) {at(bad)}",
        "Plan with the topology given here.",
    )
    empty = source == EMPTY
    if empty.any():
        require(
            new is not None,
            "`rearrange(new=...)` must be given where the plan has EMPTY sources",
            f"EMPTY at (layer, slot) {at(empty)}",
            "Pass the placement that the plan leads to, so that lost experts are not taken for unused slots.",
        )
        placed = np.asarray(_ops.as_array(new))
        check_ids(placed, topology.num_slots, "rearrange(new=...)")
        lost = empty & (placed != EMPTY)
        require(
            not lost.any(),
            "`rearrange(plan=...)` must have a source for every slot that holds an expert in `new`",
            f"none at (layer, slot) {at(lost)}",
            "Reload these experts from a checkpoint afterwards, and pass `new` with EMPTY in their place.",
        )
    return source


def _check_mesh(mesh, axis: str, topology: Topology) -> None:
    sizes = dict(mesh.shape)
    require(
        sizes.get(axis) == topology.ep_size,
        "`rearrange(axis=...)` must be an axis of the mesh with as many devices as the topology has ranks",
        f"axis={axis!r}, mesh={sizes}, ep_size={topology.ep_size}",
        "Make a Topology for the mesh axis that shards the experts.",
    )


def _check_arrays(paths, shape: tuple[int, ...], mesh, axis: str) -> None:
    """Refuse all arrays that do not fit, in one message."""
    import jax

    complaints = [(path, _complaint(array, shape, mesh, axis)) for path, array in paths]
    bad = [f"{jax.tree_util.keystr(path) or 'weights'}: {text}" for path, text in complaints if text]
    require(
        not bad,
        f"`rearrange(weights=...)` must be arrays [{shape[0]}, {shape[1]}, ...] whose slots are sharded over {axis!r}",
        listing(bad),
        f"Put each one there: jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, {axis!r}))).",
    )


def _complaint(array, shape: tuple[int, ...], mesh, axis: str) -> str | None:
    import jax

    if not isinstance(array, jax.Array):
        return f"a {type(array).__name__}"
    if _ops.is_traced(array):
        return "traced by jax.jit"
    if tuple(array.shape[:2]) != shape:
        return f"shape={tuple(array.shape)}"
    if array.is_deleted():
        return "deleted, as it was donated before"
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return f"sharding={sharding}"
    if sharding.mesh != mesh:
        return f"on another mesh, {sharding.mesh}"
    parts = [part if isinstance(part, tuple) else (part,) for part in (*sharding.spec, None, None)]
    names = [tuple(name for name in part if name is not None) for part in parts]
    if names[0] or names[1] != (axis,) or any(axis in part for part in names[2:]):
        return f"spec={sharding.spec}"
    return None


def _agree(layout: Layout, arrays, script) -> None:
    """Compare on all processes what they are about to run. A collective over the whole mesh, before any row moves."""
    import jax
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    digest = hashlib.sha256(repr([(x.shape, str(x.dtype), str(x.sharding.spec)) for x in arrays]).encode())
    digest.update(repr((layout.axis, layout.parcels, layout.num_places)).encode())
    for table in script:
        digest.update(repr(table.shape).encode() + table.tobytes())
    words = np.frombuffer(digest.digest(), dtype=np.int32)
    names = layout.mesh.axis_names
    sharding = NamedSharding(layout.mesh, PartitionSpec(names))
    mine = jax.make_array_from_callback(
        (layout.mesh.size, len(words)), sharding, lambda index: np.broadcast_to(words, (1, len(words)))
    )
    differs = map_shards(
        lambda x: lax.pmax(x, names) != lax.pmin(x, names), layout.mesh, PartitionSpec(names), PartitionSpec()
    )
    unequal = jax.jit(differs)(mine).addressable_data(0)
    require(
        not np.asarray(unequal).any(),
        "`rearrange` must be called with the same plan and like arrays on all processes",
        "different digests",
        "Plan on one process and broadcast, or from identical loads; nothing has moved.",
    )
