"""Validation at the boundary: what a caller may ask for, and how a refusal reads."""

import math
import operator
import reprlib
from collections.abc import Iterable, Sized
from itertools import islice
from typing import Any

import numpy as np

from eplb_core import _ops

EMPTY = -1
"""The id of no expert: an unused slot, or padding in `logical_to_physical`."""

MOST_EXPERTS = 2**20
"""Ids of experts and slots, and numbers of them, from here on are taken for damage: maps are as large as they are."""

MOST_ENTRIES = 2**28
"""Entries of the largest array that small arguments may ask for."""

_LONGEST = 400  # characters of what was given
_CHUNK = 2**16
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class EplbError(ValueError):
    """A request that cannot be met. The message says what was given, what is allowed and what to change."""


class LostExpertsError(EplbError):
    """Experts that the new placement needs and no live slot of the old one holds.

    Attributes:
        lost: the `(layer, expert)` pairs, sorted.
    """

    def __init__(
        self,
        lost: list[tuple[int, int]],
        rule: str = "`plan_moves(new=...)` needs experts that no live slot holds",
        advice: str = "Reload them from a checkpoint and pass `allow_lost=True` to plan the other moves.",
    ):
        self.lost = lost
        super().__init__(f"{rule}; got lost (layer, expert) pairs {listing(lost)}. {advice}")


def require(condition: bool, rule: str, got: str, advice: str) -> None:
    """Raise `EplbError` with the one wording this library uses, unless `condition` holds."""
    if not condition:
        got = got if len(got) <= _LONGEST else f"{got[:_LONGEST]}..."
        raise EplbError(f"{rule}; got {got}. {advice}")


def shown(value: Any) -> str:
    """Format a value for a message: short, whatever it is, also where its own `repr` fails."""
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        return _REPR.repr(value)[:_LONGEST]
    except Exception:
        return f"<{type(value).__name__}>"


def listing(items: Iterable[Any], limit: int = 8) -> str:
    """Format a list for a message, cut after `limit` items with the count of the rest."""
    count = len(items) if isinstance(items, Sized) else None
    rest = iter(items)
    parts = [item if isinstance(item, str) else shown(item) for item in islice(rest, limit)]
    more = sum(1 for _ in rest) if count is None else count - len(parts)
    text = ", ".join(part[:160] for part in parts)
    return f"[{text}]" if not more else f"[{text}, and {more} more]"


def positions(bad: Any, limit: int = 8) -> list[tuple[int, ...]]:
    """Return the first places where the boolean array `bad` is true; it is looked at piece by piece."""
    bad = np.asarray(bad)
    found: list[int] = []
    for start in range(0, bad.size, _CHUNK):
        found += (np.flatnonzero(bad.flat[start : start + _CHUNK])[: limit - len(found)] + start).tolist()
        if len(found) >= limit:
            break
    return [tuple(int(i) for i in np.unravel_index(index, bad.shape)) for index in found]


def at(bad: Any) -> str:
    """Format the places where the boolean array `bad` is true, in memory that does not grow with their number."""
    bad = np.asarray(bad)
    count = int(np.count_nonzero(bad))
    found = positions(bad) if count else []
    more = f", and {count - len(found)} more" if count > len(found) else ""
    return f"[{', '.join(map(str, found))}{more}]"


def host_array(x: Any) -> np.ndarray:
    """Give `x` as a NumPy array; of objects, which every check of a dtype refuses, if it cannot be one."""
    return np.asarray(_ops.as_array(x))


def is_integer(x) -> bool:
    """Whether the dtype of `x` is a signed or unsigned integer."""
    return _ops.namespace(x).isdtype(x.dtype, "integral")


def check_kind(value: Any, kind: Any, name: str) -> None:
    """Refuse what is not an instance of `kind`, before it fails somewhere deep."""
    if isinstance(value, kind):
        return  # formatting a value that holds arrays takes milliseconds
    kinds = kind if isinstance(kind, tuple) else (kind,)
    require(
        False,
        f"`{name}` must be of type {' or '.join(k.__name__ for k in kinds)}",
        f"{type(value).__name__} {shown(value)}",
        "See its description.",
    )


def check_choice(value: Any, choices: tuple, name: str, advice: str = "Check the spelling.") -> None:
    """Refuse what is not one of some words."""
    require(
        isinstance(value, str | None) and value in choices,
        f"`{name}` must be {' or '.join(map(repr, choices))}",
        f"{_last(name)}={shown(value)}",
        advice,
    )


def check_count(
    value: Any, name: str, least: int = 0, most: int = 2**63 - 1, advice: str = "Give an integer in that range."
) -> int:
    """Give an integer as an `int`, or refuse what is none, a boolean, or out of range."""
    # An array of one integer, or a traced one, is no size.
    good = hasattr(type(value), "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0
    try:
        number = operator.index(value) if good else None
    except TypeError:
        number = None
    if number is not None and least <= number <= most:
        return number
    rule = f"`{name}` must be an integer " + (f"{least}..{most}" if most < 2**63 - 1 else f">= {least}")
    raise EplbError(f"{rule}; got {_last(name)}={shown(value)}. {advice}")


def check_number(
    value: Any, name: str, least: int | float, most: int | float = math.inf, advice: str = "See its description."
) -> None:
    """Refuse what is not a finite real number in `least..most`."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if real and least <= value <= most and value < math.inf:
        return
    rule = f"`{name}` must be a finite number " + (f"{least:g}..{most:g}" if most < math.inf else f">= {least:g}")
    raise EplbError(f"{rule}; got {_last(name)}={shown(value)}. {advice}")


def check_indices(values: Any, size: int, name: str, what: str, advice: str) -> np.ndarray:
    """Give a list of integers `0..size-1` as int64 `[n]`, or refuse it."""
    found = np.asarray(_ops.as_array(values))
    integers = found.ndim == 1 and (found.size == 0 or found.dtype.kind in "iu")
    require(
        integers and (found.size == 0 or bool(found.min() >= 0 and found.max() < size)),
        f"`{name}` must be {what} 0..{size - 1}",
        f"{_last(name)}={shown(values)}",
        advice,
    )
    return found.astype(np.int64)


def check_room(name: str, *sizes: int) -> None:
    """Refuse to begin what would need an array of absurdly many entries."""
    entries = math.prod(sizes)
    require(
        entries <= MOST_ENTRIES,
        f"`{name}` must need at most {MOST_ENTRIES} entries of memory at once",
        " x ".join(map(str, sizes)),
        "Check the sizes; work on fewer layers or windows at a time if they are right.",
    )


def check_load(load, name: str = "rebalance(load=...)") -> None:
    """Refuse a load that is not `[layers, logical]` or `[windows, layers, logical]`, finite and >= 0.

    Values are looked at where they are concrete; under a `jax.jit` trace only shape and dtype are.

    Raises:
        EplbError: naming every position of a NaN, infinite or negative entry, or if a layer's tokens add up to 2**63.
    """
    shape = tuple(load.shape)
    require(
        _ops.namespace(load).isdtype(load.dtype, ("integral", "real floating")),
        f"`{name}` must hold real numbers, `[layers, logical]` or `[windows, layers, logical]`",
        f"dtype={load.dtype}, shape={shape}",
        "Convert token counts to integers, rows of equal lengths.",
    )
    require(
        len(shape) in (2, 3),
        f"`{name}` must be `[layers, logical]` or `[windows, layers, logical]`",
        f"shape={shape}",
        "Add a leading axis of one layer if there is only one.",
    )
    require(
        all(size >= 1 for size in shape),
        f"`{name}` must not be empty",
        f"shape={shape}",
        "Record at least one window of one layer and one expert.",
    )
    if not _ops.is_traced(load):
        _check_tokens(np.asarray(load), name)


def _check_tokens(values: np.ndarray, name: str) -> None:
    least, most = values.min(), values.max()  # NaN, if there is one
    per_layer = values.size // values.shape[-2]
    if least >= 0 and most < 2**63 / per_layer:
        return
    bad = ~np.isfinite(values)
    require(
        not bad.any(),
        f"`{name}` must be finite",
        f"NaN or infinity at {at(bad)}",
        "Replace them by 0 or drop that window.",
    )
    bad = values < 0
    require(
        not bad.any(),
        f"`{name}` must be >= 0",
        f"negative entries at {at(bad)}",
        "Check the token counter for overflow (int32 sums wrap).",
    )
    total = values.sum(axis=(0, 2) if values.ndim == 3 else 1, dtype=np.float64).max()
    require(
        bool(total < 2**63),
        f"`{name}` must have fewer than 2**63 tokens per layer",
        f"about {total:.3g}",
        "Check the token counter: these are not tokens.",
    )


def check_same_layers(first, second, name: str) -> None:
    """Refuse two placements of different shapes."""
    require(
        first.shape == second.shape,
        f"`{name}` must have the same layers",
        f"shapes {tuple(first.shape)} and {tuple(second.shape)}",
        "Pass two placements of the same model.",
    )


def check_ids(ids, num_slots: int, name: str) -> None:
    """Refuse an array that is not an integer `[layers, num_slots]` of ids >= `EMPTY` and < `MOST_EXPERTS`."""
    shape = tuple(ids.shape)
    require(
        is_integer(ids),
        f"`{name}` must hold integers, `[layers, slots]`",
        f"dtype={ids.dtype}, shape={shape}",
        "Convert it with `.astype('int32')`, rows of equal lengths.",
    )
    require(
        len(shape) == 2 and shape[0] >= 1 and shape[1] == num_slots and num_slots >= 1,
        f"`{name}` must be `[layers, slots]` with at least one layer and {num_slots} slots",
        f"shape={shape}",
        "Build the Topology for this placement, or the placement for this Topology.",
    )
    if _ops.is_traced(ids):
        return
    values = np.asarray(ids)
    if values.min() >= EMPTY and values.max() < MOST_EXPERTS:
        return
    bad = values < EMPTY
    require(
        not bad.any(),
        f"`{name}` must hold expert ids >= 0, or EMPTY = -1",
        f"smaller ids at (layer, slot) {at(bad)}",
        "Use -1 alone for an unused slot.",
    )
    require(
        False,
        f"`{name}` must hold ids < {MOST_EXPERTS}",
        f"larger ids at (layer, slot) {at(values >= MOST_EXPERTS)}",
        "Check that these are logical experts, and not damaged.",
    )


def _last(name: str) -> str:
    """`num_layers` of `round_robin(num_layers=...)`."""
    return name.rpartition("(")[2].partition("=")[0]
