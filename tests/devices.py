"""Eight CPU devices in one process, for tests of sharded arrays. Import it before JAX has started a backend."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

NUM_DEVICES = 8
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

# name: shape of a row, dtype, how the mesh shards the array. Some rows are larger than `perform.SMALL`.
FIELDS: dict[str, tuple[tuple[int, ...], Any, PartitionSpec]] = {
    "up": ((6, 4), ml_dtypes.bfloat16, PartitionSpec(None, "ep", None, "tp")),
    "down": ((4, 6), np.float32, PartitionSpec(None, "ep", "tp")),
    "large": ((2, 20000), np.int32, PartitionSpec(None, "ep", "tp")),
    "scale": ((2, 4), ml_dtypes.float8_e4m3fn, PartitionSpec(None, ("ep",))),
    "packed": ((8,), ml_dtypes.int4, PartitionSpec(None, "ep", "tp")),
    "mask": ((5,), np.bool_, PartitionSpec(None, "ep")),
    "phase": ((3,), np.complex64, PartitionSpec(None, "ep")),
    "gate": ((), np.float32, PartitionSpec(None, "ep")),
    "nothing": ((0, 3), np.float32, PartitionSpec(None, "ep")),
}

_compiled = [0]


def _count(event: str, _seconds: float, **_: object) -> None:
    _compiled[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def enable_x64(on: bool) -> AbstractContextManager:
    """`jax.enable_x64`, also where JAX has it elsewhere."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax import experimental

    return experimental.enable_x64(on)


def num_compiled() -> int:
    """How many programs JAX has compiled in this process, since this module was imported."""
    return _compiled[0]


def make_mesh(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """A mesh of the first CPU devices, with the given axes."""
    devices = np.asarray(jax.devices("cpu")[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes), axis_types=(axis_type,) * len(sizes))


def host_rows(num_layers: int, num_slots: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows `[layers, slots, ...]` of each field; no two of `large` are alike."""
    rng = np.random.default_rng(seed)
    rows = {}
    for name, (shape, dtype, _) in FIELDS.items():
        values = rng.integers(0, 2 if dtype is np.bool_ else 7, (num_layers, num_slots, *shape))
        rows[name] = values.astype(dtype)
    rows["large"] += np.arange(num_layers * num_slots, dtype=np.int32).reshape(num_layers, num_slots, 1, 1) * 10
    return rows


def shard(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows on a mesh with the axes `tp` and `ep`, as `FIELDS` says."""
    return {name: jax.device_put(array, NamedSharding(mesh, FIELDS[name][2])) for name, array in rows.items()}


def assert_same_rows(got: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    """Fail unless both hold the same bytes."""
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert array.dtype == expected[name].dtype
        assert np.asarray(array).tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name
