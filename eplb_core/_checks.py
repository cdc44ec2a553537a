"""Validation at the boundary: what a caller may ask for, and how a refusal reads."""

import numpy as np

from eplb_core import _ops

EMPTY = -1
"""The id of no expert: an unused slot, or padding in `logical_to_physical`."""


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
        raise EplbError(f"{rule}; got {got}. {advice}")


def listing(items, limit: int = 8) -> str:
    """Format a list for a message, cut after `limit` items with the count of the rest."""
    items = list(items)
    shown = ", ".join(str(item) for item in items[:limit])
    return f"[{shown}]" if len(items) <= limit else f"[{shown}, and {len(items) - limit} more]"


def at(bad) -> str:
    """Format the positions where the boolean array `bad` is true."""
    bad = np.asarray(bad)
    where = np.unravel_index(np.flatnonzero(bad), bad.shape)  # unlike argwhere, quick where there is nothing to find
    return listing(zip(*(axis.tolist() for axis in where), strict=True))


def is_integer(x) -> bool:
    """Whether the dtype of `x` is a signed or unsigned integer."""
    return _ops.namespace(x).isdtype(x.dtype, "integral")


def check_load(load, name: str = "rebalance(load=...)") -> None:
    """Refuse a load that is not `[layers, logical]` or `[windows, layers, logical]`, finite and >= 0.

    Values are looked at where they are concrete; under a `jax.jit` trace only shape and dtype are.

    Raises:
        EplbError: naming every position of a NaN, infinite or negative entry.
    """
    shape = tuple(load.shape)
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
    real = _ops.namespace(load).isdtype(load.dtype, ("integral", "real floating"))
    require(real, f"`{name}` must hold real numbers", f"dtype={load.dtype}", "Convert token counts to integers.")
    if _ops.is_traced(load):
        return
    values = np.asarray(load)
    if values.dtype.kind == "f":
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


def check_ids(ids, num_slots: int, name: str) -> None:
    """Refuse an array that is not an integer `[layers, num_slots]` of ids >= `EMPTY`."""
    shape = tuple(ids.shape)
    require(
        len(shape) == 2 and shape[0] >= 1 and shape[1] == num_slots,
        f"`{name}` must be `[layers, slots]` with at least one layer and {num_slots} slots",
        f"shape={shape}",
        "Build the Topology for this placement, or the placement for this Topology.",
    )
    require(
        is_integer(ids),
        f"`{name}` must hold integers",
        f"dtype={ids.dtype}",
        "Convert it with `.astype('int32')`.",
    )
    if not _ops.is_traced(ids):
        bad = np.asarray(ids) < EMPTY
        require(
            not bad.any(),
            f"`{name}` must hold expert ids >= 0, or EMPTY = -1",
            f"smaller ids at (layer, slot) {at(bad)}",
            "Use -1 alone for an unused slot.",
        )
