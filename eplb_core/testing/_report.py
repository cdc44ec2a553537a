"""How a broken property is reported, and what all checks do with input."""

from typing import Any

import numpy as np

from eplb_core._checks import listing


def holds(condition: bool, broken: str, where=()) -> None:
    """Raise `AssertionError` with what is broken, and where if that is known, unless `condition` holds."""
    if not condition:
        found = listing(where)
        raise AssertionError(broken if found == "[]" else f"{broken} {found}")


def own(array: Any) -> np.ndarray:
    """Copy an array, so that it can be written to, and compared afterwards."""
    return np.array(array)


def not_written(before: dict[str, Any], after: dict[str, Any], who: str) -> None:
    """Raise if an input differs from what was handed in."""
    for name, array in before.items():
        same = np.asarray(array).tobytes() == np.asarray(after[name]).tobytes()
        holds(same, f"{who} writes to its input `{name}`")


def as_array(result: Any, shape: tuple[int, ...], who: str, axes: str) -> np.ndarray:
    """Return the result as an integer array of this shape; raise if it is none."""
    found = np.asarray(result)
    described = f"{found.dtype} {found.shape}"
    holds(found.shape == shape, f"{who} must return {axes} = {shape}, not {described}")
    holds(found.dtype.kind in "iu", f"{who} must return integers, not {described}")
    return found
