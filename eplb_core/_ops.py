"""The seam between the transforms and the array library: the only file that knows which one is in use.

Transforms take the namespace of their arguments, use the functions of the array API standard, and loop with
`scan` or `while_loop`. Given NumPy arrays nothing here imports JAX.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def as_array(x) -> Any:
    """`x` itself if it is an array of some library that follows the array API standard, else as a NumPy array.

    What cannot be one becomes an array of objects, which every check of a dtype refuses. So does an array with masked
    entries, whose values nobody vouches for.
    """
    if type(x) is np.ndarray or (hasattr(type(x), "__array_namespace__") and not isinstance(x, np.ndarray)):
        return x
    try:
        array = np.asarray(x)
        masked = "numpy.ma" in sys.modules and np.ma.is_masked(x)
        return array.astype(object) if masked else array
    except Exception:  # ragged lists, tensors with gradients or on other devices, whatever `__array__` may raise
        array = np.empty((), dtype=object)
        array[()] = x
        return array


def namespace(x) -> Any:
    """The array API namespace of `x`: `numpy`, `jax.numpy`, `array_api_strict`, ..."""
    return x.__array_namespace__()


def is_jax(xp) -> bool:
    """Whether the namespace `xp` is JAX's."""
    return xp.__name__ == "jax.numpy"


def is_numpy(xp) -> bool:
    """Whether the namespace `xp` is NumPy's, so that a tuned kernel may take over."""
    return xp is np


def is_traced(x) -> bool:
    """Whether `x` has no values yet, because `jax.jit` or `jax.vmap` is tracing."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def float_dtype(xp) -> Any:
    """The library's default float: float64, or float32 in JAX without x64."""
    return xp.asarray(0.0).dtype


def int_dtype(xp) -> Any:
    """The library's default integer: int64, or int32 in JAX without x64."""
    return xp.asarray(0).dtype


def scan(step: Callable, init: Any, xs: tuple) -> tuple[Any, tuple]:
    """`jax.lax.scan` for JAX arrays, the same loop in Python otherwise. `step` must not write to its inputs."""
    xp = namespace(xs[0])
    if is_jax(xp):
        from jax import lax

        return lax.scan(step, init, xs)
    carry, outputs = init, []
    for i in range(xs[0].shape[0]):
        carry, out = step(carry, tuple(x[i, ...] for x in xs))
        outputs.append(out)
    return carry, tuple(xp.stack(column) for column in zip(*outputs, strict=True))


def while_loop(condition: Callable, body: Callable, state: tuple) -> tuple:
    """`jax.lax.while_loop` for JAX arrays, the same loop in Python otherwise."""
    if is_jax(namespace(state[0])):
        from jax import lax

        return lax.while_loop(condition, body, state)
    while bool(condition(state)):
        state = body(state)
    return state


def while_rows(step: Callable, state: tuple, fixed: tuple, active: Any) -> tuple:
    """Repeat `step` on every active row until it says stop. Rows are independent.

    NumPy works on the rows that are still active only; other libraries on all rows, and keep the result where a
    row is active.

    Args:
        step: `(state, fixed) -> (new state, go)`; a row where `go` is false keeps its old state and is done.
        state: arrays `[rows, ...]` that change.
        fixed: arrays `[rows, ...]` that do not.
        active: bool `[rows]` the rows to begin with.

    Returns:
        The final state.
    """
    xp = namespace(active)
    if is_numpy(xp):
        return _while_rows_numpy(step, state, fixed, active)

    def masked_step(carry):
        state, active = carry[:-1], carry[-1]
        new, go = step(state, fixed)
        go = go & active
        mix = [xp.where(_expand(go, old), after, old) for after, old in zip(new, state, strict=True)]
        return (*mix, go)

    return while_loop(lambda carry: xp.any(carry[-1]), masked_step, (*state, active))[:-1]


def _while_rows_numpy(step: Callable, state: tuple, fixed: tuple, active: np.ndarray) -> tuple:
    result = tuple(np.array(x) for x in state)
    rows = np.flatnonzero(active)
    state, fixed = tuple(x[rows] for x in state), tuple(x[rows] for x in fixed)
    while rows.size:
        new, go = step(state, fixed)
        if not go.all():
            for whole, part in zip(result, state, strict=True):
                whole[rows[~go]] = part[~go]
            rows, new, fixed = rows[go], tuple(x[go] for x in new), tuple(x[go] for x in fixed)
        state = new
    return result


def _expand(mask, like):
    return namespace(mask).reshape(mask, (*mask.shape, *[1] * (like.ndim - mask.ndim)))


def pick(x, index) -> Any:
    """`take_along_axis` along axis 1, without its overhead on NumPy. `index` is `[rows, picked]`, from 0."""
    xp = namespace(x)
    if is_numpy(xp):
        row = np.arange(x.shape[0])[:, None]
        return x.reshape(-1).take(index + row * x.shape[1]) if x.ndim == 2 else x[row, index]
    if x.ndim > 2:
        index = xp.broadcast_to(xp.reshape(index, (*index.shape, *[1] * (x.ndim - 2))), (*index.shape, *x.shape[2:]))
    return xp.take_along_axis(x, index, axis=1)


def put(x, index, value) -> Any:
    """`x [rows, n]` with `value [rows, 1]` at `index [rows, 1]` of each row."""
    xp = namespace(x)
    if is_numpy(xp):
        x = x.copy()
        x[np.arange(x.shape[0])[:, None], index] = value
        return x
    return xp.where(xp.arange(x.shape[1], dtype=index.dtype) == index, value, x)


def holds(held, wanted) -> Any:
    """Whether the last axis of `held` contains `wanted`, which broadcasts against its other axes."""
    xp = namespace(held)
    same = held == wanted[..., None]
    if not is_numpy(xp) or same.shape[-1] > 127:
        return xp.any(same, axis=-1)
    # NumPy reduces a short last axis slowly: read it as one integer, or add it up.
    if same.shape[-1] in (1, 2, 4, 8):
        return np.ascontiguousarray(same).view(f"u{same.shape[-1]}")[..., 0] != 0
    return np.einsum("...k->...", same.view(np.int8)) > 0


def index_in(held, wanted) -> Any:
    """`[rows, n]` int32: the first place in its row of `held [rows, m]` of each of `wanted [rows, n]`; `m` if none."""
    xp = namespace(held)
    size = held.shape[1]
    if is_numpy(xp):
        # NumPy reduces a short last axis slowly: go over it, for all rows at once.
        columns, wanted = np.ascontiguousarray(held.T), np.ascontiguousarray(wanted.T)
        found = np.full(wanted.shape, size, dtype=np.int32)
        for place in range(size - 1, -1, -1):
            np.copyto(found, place, where=wanted == columns[place])
        return np.ascontiguousarray(found.T)
    same = held[:, None, :] == wanted[:, :, None]
    first = xp.astype(xp.argmax(xp.astype(same, xp.int8), axis=2), xp.int32)
    return xp.where(xp.any(same, axis=2), first, xp.asarray(size, dtype=xp.int32))


def count_ids(ids, num_ids: int) -> Any:
    """`[rows, num_ids]` int32: how often each id occurs in its row of `ids [rows, n]`; -1 is not counted."""
    xp = namespace(ids)
    rows = ids.shape[0]
    if is_numpy(xp):
        keys = ids.astype(np.int64, copy=False) + (np.arange(rows)[:, None] * (num_ids + 1) + 1)
        return np.bincount(keys.ravel(), minlength=rows * (num_ids + 1)).reshape(rows, -1)[:, 1:].astype(np.int32)
    # One search serves all rows: the row is the leading digit of a key in which -1 comes first.
    row = xp.arange(rows, dtype=int_dtype(xp))[:, None] * (num_ids + 1)
    keys = xp.reshape(row + xp.sort(xp.astype(ids, int_dtype(xp)), axis=1) + 1, (-1,))
    wanted = row + xp.arange(1, num_ids + 2, dtype=int_dtype(xp))
    edges = xp.astype(xp.reshape(xp.searchsorted(keys, xp.reshape(wanted, (-1,))), wanted.shape), xp.int32)
    return edges[:, 1:] - edges[:, :-1]


def inverse(order) -> Any:
    """`[rows, n]`: where each index stands in `order [rows, n]`, of which every row is a permutation."""
    xp = namespace(order)
    if not is_numpy(xp):
        return xp.argsort(order, axis=1, stable=True)
    rows, size = order.shape
    found = np.empty(order.size, dtype=order.dtype)
    found[(order + np.arange(rows)[:, None] * size).ravel()] = np.tile(np.arange(size), rows)
    return found.reshape(order.shape)


def sum_by_id(values, ids, num_ids: int) -> Any:
    """`[rows, num_ids]`: the integer `values [rows, n]` added up by their `ids [rows, n]`; -1 is left out.

    Exact for any integers: one sort, and differences of running sums.
    """
    xp = namespace(values)
    order = xp.argsort(ids, axis=1, stable=True)
    running = xp.cumulative_sum(pick(values, order), axis=1, dtype=values.dtype, include_initial=True)
    last = xp.cumulative_sum(count_ids(ids, num_ids), axis=1, dtype=xp.int32)
    last = last + xp.sum(xp.astype(ids < 0, xp.int32), axis=1, dtype=xp.int32)[:, None]
    upto = pick(running, last)
    before_any = pick(running, last[:, :1] - count_ids(ids, num_ids)[:, :1])
    return upto - xp.concat([before_any, upto[:, :-1]], axis=1)


def before(size: int, xp) -> Any:
    """`[size, size]` bool: whether column `j` comes before row `i`."""
    index = xp.arange(size, dtype=xp.int32)
    return index[None, :] < index[:, None]


def tree_sum(x) -> Any:
    """Sum the last axis in one order on every library: halves are added until one element is left."""
    xp = namespace(x)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = xp.concat([x[..., :half] + x[..., half : 2 * half], rest], axis=-1)
    return x[..., 0]


def divide(x, count) -> Any:
    """`x / count`, rounded once, for a scalar `count`: XLA would multiply by the reciprocal of a broadcast scalar."""
    xp = namespace(x)
    return x / rounded(xp.broadcast_to(xp.asarray(count, dtype=x.dtype), x.shape))


def margin(x, wanted: float, roundings: int) -> float:
    """A relative margin: `wanted`, but at least so many roundings of the dtype of `x`, so that searches end in any."""
    return max(wanted, roundings * float(namespace(x).finfo(x.dtype).eps))


def rounded(x) -> Any:
    """`x`, kept from being fused into a following addition, which would skip the rounding of a product.

    XLA drops its barriers before LLVM contracts products and sums; a comparison in between stays.
    """
    xp = namespace(x)
    if is_jax(xp):
        from jax import lax

        return xp.maximum(lax.optimization_barrier(x), xp.finfo(x.dtype).min)
    return x


def descending(x) -> tuple[Any, Any]:
    """The entries of each row of `x [rows, n]`, largest first, and where they come from; equal ones in order."""
    xp = namespace(x)
    if is_numpy(xp) and x.shape[1] <= 2**15:
        return _descending_numpy(x)
    order = xp.argsort(-x, axis=1, stable=True)
    return xp.take_along_axis(x, order, axis=1), order


def _descending_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NumPy sorts fastest where it need not be stable: then runs of equal entries are put in order."""
    order = np.argsort(-x, axis=1)
    value = pick(x, order)
    starts_run = np.ones(x.shape, dtype=bool)
    np.not_equal(value[:, 1:], value[:, :-1], out=starts_run[:, 1:])
    bits = (x.shape[1] - 1).bit_length()
    key = np.cumsum(starts_run, axis=1, dtype=np.int32) - 1
    key <<= bits
    key |= order.astype(np.int32)
    key.sort(axis=1)
    key &= (1 << bits) - 1
    return value, key


def stable_order(ids) -> Any:
    """Stable ascending argsort of small integers along the last axis.

    NumPy sorts integers of up to 16 bits by radix, several times faster than wider ones.
    """
    xp = namespace(ids)
    if is_numpy(xp) and ids.size:
        least, most = ids.min(), ids.max()
        for narrow in (np.int8, np.int16, np.uint16):
            if np.iinfo(narrow).min <= least and most <= np.iinfo(narrow).max:
                return np.argsort(ids.astype(narrow), axis=-1, kind="stable")
    return xp.argsort(ids, axis=-1, stable=True)
