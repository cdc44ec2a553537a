"""From what a file holds to a load or a placement: the same rules for every format."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from eplb_core import _ops
from eplb_core._checks import EMPTY, MOST_EXPERTS, EplbError, positions, require, shown
from eplb_core._files import PathLike

MOST_ENTRIES = 2**26
"""Nested lists of more numbers are refused; as arrays they may be larger."""

_LARGEST_ROUNDING = 0.01
_TOKENS = "Record tokens per logical expert; replace what is missing by 0."


def load_of(values: Any, path: PathLike) -> np.ndarray:
    """Return int64 tokens `[windows, layers, experts]` from an array or nested lists.

    `[layers, experts]` is one window. Fractions are rounded to the nearest integer, half to even, unless that changes
    a window by more than 1% of its tokens: then they are shares, not counts.

    Raises:
        EplbError: naming the file and what in it is not a load.
    """
    load = array_of(values, path)
    require(
        load.ndim in (2, 3) and load.size > 0,
        f"`{path}` must hold a load `[windows, layers, experts]` or `[layers, experts]` without empty axes",
        f"shape {load.shape}",
        "Record at least one window of one layer.",
    )
    load = load.reshape(-1, *load.shape[-2:])
    if load.dtype.kind == "f":
        _refuse(~np.isfinite(load), f"`{path}` must hold finite counts", "NaN or infinity", _TOKENS)
    _refuse(load < 0, f"`{path}` must hold counts >= 0", "negative counts", "Check the counter: int32 sums wrap.")
    per_layer = load.sum(axis=(0, 2), dtype=np.float64)
    require(
        bool(per_layer.max() < 2**63),
        f"`{path}` must hold fewer than 2**63 tokens per layer",
        f"about {per_layer.max():.3g}",
        "Check the counter: these are not tokens.",
    )
    return _rounded(load, path) if load.dtype.kind == "f" else load.astype(np.int64, copy=False)


def placement_of(values: Any, path: PathLike) -> np.ndarray:
    """Return an int32 placement `[layers, slots]` from an array or nested lists.

    Raises:
        EplbError: naming the file and what in it is not a placement.
    """
    ids = array_of(values, path)
    require(
        ids.ndim == 2 and ids.size > 0 and ids.dtype.kind in "iu",
        f"`{path}` must hold a placement: expert ids `[layers, slots]`",
        f"{ids.dtype} of shape {ids.shape}",
        "If these are loads, make a placement with `eplb plan`.",
    )
    outside = (ids >= MOST_EXPERTS) | ((ids < EMPTY) if ids.dtype.kind == "i" else False)
    _refuse(
        outside,
        f"`{path}` must hold expert ids >= 0 and < {MOST_EXPERTS}, or EMPTY = -1",
        "other ids",
        "Check that these are logical experts.",
    )
    return ids.astype(np.int32, copy=False)


@contextmanager
def blaming(path: PathLike) -> Iterator[None]:
    """Whatever fails in the context is the file's fault, such as an object where a number should be."""
    try:
        yield
    except EplbError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise EplbError(f"`{path}` cannot be read; got {reason}. Check that it is whole and of this format.") from error


def array_of(values: Any, path: PathLike) -> np.ndarray:
    """Return numbers as an array: an array as it is, nested lists of equal lengths converted.

    Lists are looked at before they are converted, as NumPy would make room for the longest text in them.
    """
    values = _ops.as_array(values) if not isinstance(values, list) else _from_lists(values, path)
    require(
        values.dtype.kind in "iuf" and values.dtype.itemsize <= 8,
        f"`{path}` must hold numbers of at most 64 bits",
        f"{values.dtype}",
        "Convert counts and ids to integers.",
    )
    return values


def metadata_of(value: Any, path: PathLike) -> dict[str, Any]:
    """Return a copy of metadata that survives JSON.

    Raises:
        EplbError: if it is not a dict of JSON values with text as keys.
    """
    value = {} if value is None else value
    copy: Any = None
    try:
        text = json.dumps(value, allow_nan=False)
        copy = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        text = str(error)
    require(
        isinstance(copy, dict) and copy == value,
        f"`{path}` must have a dict of JSON values as metadata",
        text[:80],
        "Use dicts with text as keys, lists, text, finite numbers, booleans and None.",
    )
    return copy


def layer_ids_of(ids: Iterable[Any], path: PathLike) -> list[int]:
    """Return the model's layer numbers of the rows; each is an integer and occurs once."""
    found = list(ids)
    good = all(type(i) is int and 0 <= i < 2**31 for i in found) and len(set(found)) == len(found)
    require(good, f"`{path}` must number its layers with different integers", shown(found), "Number them.")
    return found


def _from_lists(values: Any, path: PathLike) -> np.ndarray:
    level, depth = [values], 0
    while level and all(type(item) is list for item in level):
        lengths = {len(item) for item in level}
        require(
            len(lengths) == 1 and depth < 3 and len(level) * max(lengths) <= MOST_ENTRIES,
            f"`{path}` must hold nested lists of numbers, two or three deep, of equal lengths, at most {MOST_ENTRIES}",
            f"{len(level)} lists of lengths {sorted(lengths)[:8]} at depth {depth + 1}",
            "Check that the file is whole.",
        )
        level, depth = [entry for item in level for entry in item], depth + 1
        if {type(entry) for entry in level} <= {int, float}:
            break
    kinds = sorted({type(entry).__name__ for entry in level})
    require(
        set(kinds) <= {"int", "float"},
        f"`{path}` must hold nested lists of numbers",
        f"{' and '.join(kinds)} at depth {depth}",
        "Check that the file is whole and of this format.",
    )
    return np.array(values)


def _refuse(bad: np.ndarray, rule: str, what: str, advice: str) -> None:
    """Refuse an array in which `bad` holds anywhere, with the first positions."""
    count = int(np.count_nonzero(bad))
    if count:
        require(False, rule, f"{what} at {count} positions, first at {positions(bad, 4)}", advice)


def _rounded(load: np.ndarray, path: PathLike) -> np.ndarray:
    rounded = np.rint(load)
    change = np.abs(rounded - load).sum(axis=(1, 2), dtype=np.float64)
    total = load.sum(axis=(1, 2), dtype=np.float64)
    _refuse(
        change > _LARGEST_ROUNDING * total,
        f"`{path}` must hold counts of tokens; fractions are rounded",
        "windows that rounding would change by more than 1%",
        "Multiply shares by the number of tokens first.",
    )
    return rounded.astype(np.int64)
