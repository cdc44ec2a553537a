"""Perform a script on JAX arrays that are sharded over a mesh axis: the compiled side of `sharded.rearrange`."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from eplb_core.sharded.script import Script

SMALL = 2**16  # bytes of a row of one array up to which it shares a message with others of its dtype


class Layout(NamedTuple):
    """What a compiled program depends on, besides the shapes of its arguments. Hashable.

    mesh, axis: devices, and the name of the axis whose coordinate is the ep_rank.
    specs: the `PartitionSpec` of each array.
    parcels: groups of indices of arrays that share a message; rows of a single one keep their shape.
    num_places: rows that staging holds.
    """

    mesh: Any
    axis: str
    specs: tuple[Any, ...]
    parcels: tuple[tuple[int, ...], ...]
    num_places: int


def group_parcels(dtypes: list[Any], row_bytes: list[int]) -> tuple[tuple[int, ...], ...]:
    """Group arrays whose rows travel as one message: small ones by dtype, large ones alone."""
    groups: dict[Any, list[int]] = {}
    for index, (dtype, size) in enumerate(zip(dtypes, row_bytes, strict=True)):
        groups.setdefault(dtype if size <= SMALL else index, []).append(index)
    return tuple(tuple(group) for group in groups.values())


@lru_cache(maxsize=64)
def compile_program(layout: Layout) -> Any:
    """The jitted `(arrays, tables) -> arrays` for a layout; arrays are donated, tables are those of `share_tables`.

    Per round one `ppermute` per parcel. What a rank does between rounds needs no other rank, so its loops are as long
    as it has rows; only the number of rounds and their shifts are the same everywhere.
    """
    import jax
    from jax.sharding import PartitionSpec

    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    by_rank, everywhere = PartitionSpec(layout.axis), PartitionSpec()
    tables = Script._make([everywhere, *[by_rank] * 8, everywhere])

    def on_rank(arrays, script: Script):
        script = Script._make([script.shift, *(table[0] for table in script[1:9]), script.num_rounds])
        if not on_cpu:
            return _perform(arrays, script, layout)
        moved = _perform(tuple(_as_bits(array) for array in arrays), script, layout)
        return tuple(_from_bits(bits, array.dtype) for bits, array in zip(moved, arrays, strict=True))

    mapped = map_shards(on_rank, layout.mesh, (layout.specs, tables), layout.specs)
    return jax.jit(mapped, donate_argnums=0)


def _as_bits(array):
    """The array in a type that XLA's CPU backend moves as it is.

    It widens whole arrays of small floats and of types below a byte in every round; here they are copied once.
    """
    import jax.numpy as jnp
    from jax import lax

    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16 and dtype != jnp.float16:
        array = lax.bitcast_convert_type(array, f"uint{jnp.finfo(dtype).bits}")
    below_byte = jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8
    return array.astype(jnp.int8) if below_byte else array


def _from_bits(bits, dtype):
    """Undo `_as_bits`."""
    import jax.numpy as jnp
    from jax import lax

    if bits.dtype == dtype:
        return bits
    if jnp.issubdtype(dtype, jnp.floating):
        return lax.bitcast_convert_type(bits.astype(f"uint{jnp.finfo(dtype).bits}"), dtype)
    return bits.astype(dtype)


def map_shards(function, mesh, in_specs, out_specs):
    """`jax.shard_map`; varying values are not checked."""
    import jax

    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def share_tables(script: Script, layout: Layout, num_rounds: int, num_copies: int) -> Script:
    """A script as device arrays, each rank's part on its devices, padded to so many rounds and copies."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def share(table: np.ndarray, spec, axis: int = 0, size: int = 0) -> Any:
        shape = [max(size, have) if i == axis else have for i, have in enumerate(table.shape)]
        padded = np.zeros(shape, dtype=np.int32)
        padded[tuple(slice(have) for have in table.shape)] = table
        sharding = NamedSharding(layout.mesh, spec)
        return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])

    by_rank, everywhere = PartitionSpec(layout.axis), PartitionSpec()
    sizes = [num_rounds] * 5 + [num_copies] * 2 + [num_rounds + 1]
    by_rank_tables = [share(table, by_rank, 1, size) for table, size in zip(script[1:9], sizes, strict=True)]
    shift = share(script.shift, everywhere, 0, num_rounds)
    return Script._make([shift, *by_rank_tables, share(script.num_rounds, everywhere)])


def _perform(arrays: tuple[Any, ...], script: Script, layout: Layout) -> tuple[Any, ...]:
    """The program of one rank, on its shards `[layers, slots_per_rank, ...]`."""
    from jax import lax

    width = script.send.shape[1]
    staging = _empty(arrays, layout, layout.num_places)
    arrays, staging = _copy(arrays, staging, script, 0, script.stepped[0], layout)

    def do_round(now, state):
        arrays, staging = state
        outgoing = _empty(arrays, layout, width)
        split, num_sent = script.split[now], script.num_sent[now]

        def from_weights(i, outgoing):
            return _put(outgoing, i, _read(arrays, script.send[now, i], layout))

        def from_staging(i, outgoing):
            return _put(outgoing, i, _get(staging, script.send[now, i]))

        outgoing = lax.fori_loop(0, split, from_weights, outgoing)
        outgoing = lax.fori_loop(split, num_sent, from_staging, outgoing)
        incoming = _shift(outgoing, script.shift[now], layout)

        def keep(i, staging):
            return _put(staging, script.keep[now, i], _get(incoming, i))

        staging = lax.fori_loop(0, script.num_kept[now], keep, staging)
        return _copy(arrays, staging, script, script.stepped[now], script.stepped[now + 1], layout)

    return lax.fori_loop(0, script.num_rounds, do_round, (arrays, staging))[0]


def _shift(outgoing, shift, layout: Layout):
    """Send to the rank `shift` further on. All ranks take the same branch."""
    from jax import lax

    size = layout.mesh.shape[layout.axis]
    if size == 1:
        return outgoing

    def by(step: int):
        pairs = [(rank, (rank + step) % size) for rank in range(size)]
        return lambda rows: tuple(lax.ppermute(row, layout.axis, pairs) for row in rows)

    return lax.switch(shift - 1, [by(step) for step in range(1, size)], outgoing)


def _copy(arrays, staging, script: Script, start, stop, layout: Layout):
    """Copies between the weights and staging: in each step some into staging, then some back."""
    import jax.numpy as jnp
    from jax import lax

    def do_step(step, state):
        arrays, staging = state
        first = jnp.where(step > 0, script.steps[jnp.maximum(step - 1, 0), 1], 0)
        middle, last = script.steps[step]

        def save(i, staging):
            row, place = script.copies[i]
            return _put(staging, place, _read(arrays, row, layout))

        staging = lax.fori_loop(first, middle, save, staging)

        def restore(i, arrays):
            row, place = script.copies[i]
            return _write(arrays, row, _get(staging, place), layout)

        return lax.fori_loop(middle, last, restore, arrays), staging

    return lax.fori_loop(start, stop, do_step, (arrays, staging))


def _empty(arrays, layout: Layout, num_rows: int):
    """Memory for rows of all parcels."""
    import jax.numpy as jnp

    return tuple(jnp.zeros((num_rows, *shape), arrays[parcel[0]].dtype) for parcel, shape in _shapes(arrays, layout))


def _shapes(arrays, layout: Layout):
    for parcel in layout.parcels:
        alone = arrays[parcel[0]].shape[2:]
        yield parcel, alone if len(parcel) == 1 else (sum(int(np.prod(arrays[i].shape[2:])) for i in parcel),)


def _read(arrays, row, layout: Layout):
    """One row of the weights, as parcels."""
    import jax.numpy as jnp
    from jax import lax

    def read(array):
        layer, slot = row // array.shape[1], row % array.shape[1]
        start = (layer, slot, *[0] * (array.ndim - 2))
        return lax.dynamic_slice(array, start, (1, 1, *array.shape[2:]))[0, 0]

    rows = []
    for parcel in layout.parcels:
        parts = [read(arrays[i]) for i in parcel]
        rows.append(parts[0] if len(parts) == 1 else jnp.concatenate([part.reshape(-1) for part in parts]))
    return tuple(rows)


def _write(arrays, row, parcels, layout: Layout):
    """The weights with one row replaced."""
    from jax import lax

    arrays = list(arrays)
    for parcel, packed in zip(layout.parcels, parcels, strict=True):
        first = 0
        for i in parcel:
            shape = arrays[i].shape[2:]
            size = int(np.prod(shape))
            part = packed if len(parcel) == 1 else packed[first : first + size].reshape(shape)
            first += size
            layer, slot = row // arrays[i].shape[1], row % arrays[i].shape[1]
            arrays[i] = lax.dynamic_update_slice(arrays[i], part[None, None], (layer, slot, *[0] * len(shape)))
    return tuple(arrays)


def _get(rows, i):
    from jax import lax

    return tuple(lax.dynamic_index_in_dim(row, i, keepdims=False) for row in rows)


def _put(rows, i, new):
    from jax import lax

    return tuple(lax.dynamic_update_index_in_dim(row, part, i, 0) for row, part in zip(rows, new, strict=True))
