"""Load estimators: what the next window will ask of each expert, from the windows seen so far.

An estimator is three pure functions. Its state is a value of arrays and tuples, so it can be saved, compared between
ranks, and carried through `jax.jit`:

>>> estimator = sliding_window(2)
>>> state = estimator.init(num_layers=1, num_logical=3)
>>> for window in ([[9, 0, 0]], [[1, 2, 3]], [[4, 4, 4]]):
...     state = estimator.update(state, np.asarray(window))
>>> estimator.estimate(state).tolist()
[[5, 6, 7]]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import check_count, check_ids, check_load, check_number, check_room, is_integer, require
from eplb_core.maps import check_range


class Estimator(NamedTuple):
    """A way to foresee load, as pure functions. Windows are `[layers, logical]` integer tokens, oldest first.

    init: `(num_layers, num_logical) -> state` before the first window.
    update: `(state, load) -> state` after one more window.
    estimate: `(state) -> [layers, logical]` the load to plan for; zeros before the first window. Only ratios matter to
        `rebalance`; divided by `windows(state)` it is tokens per window.
    windows: `(state) -> scalar` how many windows' tokens the estimate adds up; 0 before the first.
    """

    init: Callable[[int, int], Any]
    update: Callable[[Any, Any], Any]
    estimate: Callable[[Any], Any]
    windows: Callable[[Any], Any]


class Windows(NamedTuple):
    """The last windows, and how many there have been.

    rows: tuple of integer `[layers, logical]`, the newest first; zeros where there has been none.
    seen: integer scalar, at most the length of `rows`.
    """

    rows: tuple[Any, ...]
    seen: Any


class Decayed(NamedTuple):
    """A sum in which each window counts less than the one after it.

    total: floating `[layers, logical]`.
    weight: floating scalar, what `total` would be had each window held one token.
    """

    total: Any
    weight: Any


def last_value() -> Estimator:
    """Expect the next window to be like the last one: what engines that clear their counters do."""
    return sliding_window(1)


def sliding_window(size: int) -> Estimator:
    """Add up the last `size` windows, as integers: what an engine with a ring buffer does.

    Args:
        size: windows, 1..2**16. State and update cost `O(size)` references, and no copies of rows.

    Raises:
        EplbError: if `size` is out of range; from `update`, if the load is malformed or not integer.
    """
    size = check_count(size, "sliding_window(size=...)", 1, 2**16, "Count windows.")

    def estimate(state: Windows):
        xp = _ops.namespace(state.rows[0])
        total = xp.zeros_like(state.rows[0])
        for row in state.rows:
            total = total + row
        return total

    return Estimator(_init_windows(size), _push, estimate, lambda state: state.seen)


def exponential_decay(half_life: float) -> Estimator:
    """Let the weight of a window halve every `half_life` windows.

    Args:
        half_life: windows, 0.001 to 1e9.

    Returns:
        An estimator with estimates of the library's default float type.

    Raises:
        EplbError: if `half_life` is out of range; from `update`, if the load is malformed or not integer.

    >>> estimator = exponential_decay(1.0)
    >>> state = estimator.init(1, 2)
    >>> for window in ([[8, 0]], [[0, 4]]):
    ...     state = estimator.update(state, np.asarray(window))
    >>> estimator.estimate(state).tolist(), float(estimator.windows(state))
    ([[4.0, 4.0]], 1.5)
    """
    advice = "Use 1 to 4 where windows hold many tokens."
    check_number(half_life, "exponential_decay(half_life=...)", 1e-3, 1e9, advice)
    keep = 0.5 ** (1 / half_life)

    def init(num_layers: int, num_logical: int) -> Decayed:
        return Decayed(np.zeros(_checked_sizes(num_layers, num_logical)), np.zeros(()))

    def update(state: Decayed, load: Int[Any, "layers logical"]) -> Decayed:
        load = _checked(load, state.total.shape)
        xp = _ops.namespace(load)
        total, weight = (xp.asarray(x, dtype=_ops.float_dtype(xp)) for x in state)
        # A product that were fused into the sum would round differently on other backends.
        return Decayed(
            _ops.rounded(total * keep) + xp.astype(load, total.dtype),
            _ops.rounded(weight * keep) + xp.asarray(1, dtype=total.dtype),
        )

    return Estimator(init, update, lambda state: state.total, lambda state: state.weight)


def trend_forecast(size: int, *, horizon: int = 1) -> Estimator:
    """Continue each expert's straight line through the last `size` windows, by least squares.

    Follows a drift instead of trailing it, and takes noise for drift: back-test before use. Computed in integers up
    to one division.

    Args:
        size: windows of the line, 2..64. With fewer seen, the line goes through these; with one, it is level.
        horizon: windows ahead of the last one, 1..64.

    Returns:
        An estimator with estimates >= 0 of the library's default float type, in tokens per window.

    Raises:
        EplbError: if an argument is out of range; from `update`, if the load is malformed or not integer.

    >>> estimator = trend_forecast(3)
    >>> state = estimator.init(1, 3)
    >>> for window in ([[1, 9, 5]], [[2, 5, 5]], [[3, 1, 5]]):
    ...     state = estimator.update(state, np.asarray(window))
    >>> estimator.estimate(state).tolist()
    [[4.0, 0.0, 5.0]]
    """
    size = check_count(size, "trend_forecast(size=...)", 2, 64, "Count windows.")
    horizon = check_count(horizon, "trend_forecast(horizon=...)", 1, 64, "Count windows.")

    def estimate(state: Windows):
        xp = _ops.namespace(state.rows[0])
        floating = _ops.float_dtype(xp)
        # With n points at the odd or even steps u = 1-n, 3-n, ..., n-1 the slope is sum(u y) / sum(u u) per half step.
        n = xp.asarray(state.seen)
        squares, ahead = xp.where(n > 1, n * (n * n - 1) // 3, 1), n - 1 + 2 * horizon
        total, tilt = _sums(state, xp)
        level = _ops.divide(total, xp.astype(xp.where(n > 0, n, 1), floating))
        rise = _ops.rounded(tilt * (xp.astype(ahead, floating) / xp.astype(squares, floating)))
        return xp.where(level + rise > 0, level + rise, 0.0)

    def windows(state: Windows):
        xp = _ops.namespace(state.rows[0])
        return xp.astype(xp.asarray(state.seen) > 0, _ops.int_dtype(xp))

    return Estimator(_init_windows(size), _push, estimate, windows)


def logical_load(
    slot_counts: Int[Any, "layers slots"], physical_to_logical: Int[Any, "layers slots"], num_logical: int
) -> Int[Any, "layers logical"]:
    """Add up the tokens that each expert's copies have served.

    Give it the placement that was in force while the tokens were counted; with any later one, tokens are credited to
    experts that never saw them. `control.observe` keeps the placements of past epochs for this.

    Args:
        slot_counts: integer `[layers, slots]` tokens that each slot has served.
        physical_to_logical: `[layers, slots]` the placement of that time; what `EMPTY` slots counted is left out.
        num_logical: experts of each layer.

    Returns:
        `[layers, logical]` integers of the library's default type.

    Raises:
        EplbError: if shapes differ, a count is negative or not integer, or an id is out of range.

    >>> logical_load(np.asarray([[5, 1, 2, 7]]), np.asarray([[1, 0, 1, -1]]), num_logical=3).tolist()
    [[1, 7, 0]]
    """
    counts, ids = _ops.as_array(slot_counts), _ops.as_array(physical_to_logical)
    require(
        counts.shape == ids.shape,
        "`logical_load(slot_counts=...)` must have the placement's shape",
        f"shapes {tuple(counts.shape)} and {tuple(ids.shape)}",
        "Pass the placement under which the tokens were counted.",
    )
    counts = _checked(counts, counts.shape, "logical_load(slot_counts=...)")
    check_ids(ids, ids.shape[-1], "logical_load(physical_to_logical=...)")
    check_range(ids, num_logical)
    return _ops.sum_by_id(counts, ids, num_logical)


def _init_windows(size: int):
    def init(num_layers: int, num_logical: int) -> Windows:
        zeros = np.zeros(_checked_sizes(num_layers, num_logical), dtype=np.int64)
        return Windows((zeros,) * size, np.zeros((), dtype=np.int64))

    return init


def _push(state: Windows, load: Int[Any, "layers logical"]) -> Windows:
    newest = _checked(load, state.rows[0].shape)
    xp = _ops.namespace(newest)
    rows = tuple(xp.asarray(row, dtype=newest.dtype) for row in state.rows[:-1])
    seen = xp.asarray(state.seen, dtype=newest.dtype) + 1
    return Windows((newest, *rows), xp.where(seen > len(state.rows), len(state.rows), seen))


def _sums(state: Windows, xp):
    """Sums of the rows, plain and by position `u`, which is newest first: n-1, n-3, ..."""
    seen = xp.asarray(state.seen)
    total = tilt = xp.zeros_like(state.rows[0])
    for age, row in enumerate(state.rows):
        total = total + row
        tilt = tilt + row * (seen - 1 - 2 * age)
    floating = _ops.float_dtype(xp)
    return xp.astype(total, floating), xp.astype(tilt, floating)


def _checked(load, shape: tuple[int, ...], name: str = "update(load=...)"):
    load = _ops.as_array(load)
    require(
        tuple(load.shape) == tuple(shape),
        f"`{name}` must have the shape {tuple(shape)}",
        f"shape={tuple(load.shape)}",
        "Sum over ranks and steps first.",
    )
    check_load(load, name)
    require(is_integer(load), f"`{name}` must hold integers", f"dtype={load.dtype}", "Count tokens as integers.")
    return _ops.namespace(load).astype(load, _ops.int_dtype(_ops.namespace(load)))


def _checked_sizes(num_layers: int, num_logical: int) -> tuple[int, int]:
    sizes = check_count(num_layers, "init(num_layers=...)", 1), check_count(num_logical, "init(num_logical=...)", 1)
    check_room("init", *sizes)
    return sizes
