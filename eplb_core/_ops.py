"""The seam between the transforms and the array library: the only file that knows which one is in use.

Transforms take the namespace of their arguments, use the functions of the array API standard, and loop with
`scan` or `while_loop`. Given NumPy arrays nothing here imports JAX.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def as_array(x) -> Any:
    """`x` itself if it is an array of some library that follows the array API standard, else a NumPy copy."""
    return x if hasattr(x, "__array_namespace__") else np.asarray(x)


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


def stable_order(ids) -> Any:
    """Stable ascending argsort of small integers along the last axis.

    NumPy sorts 16-bit integers by radix, several times faster than wider ones.
    """
    xp = namespace(ids)
    if is_numpy(xp) and ids.size and ids.min() >= -(2**15) and ids.max() < 2**15:
        return np.argsort(ids.astype(np.int16), axis=-1, kind="stable")
    return xp.argsort(ids, axis=-1, stable=True)
