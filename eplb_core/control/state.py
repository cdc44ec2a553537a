"""What a controller remembers: values, never changed in place."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core._checks import check_count, check_kind, require

HISTORY = 1024
"""Switched layers that are remembered, to credit counts that arrive late."""


class Change(NamedTuple):
    """One commit, as far as it must be undone to know the placement before it.

    epoch: the epoch that it began.
    layers: the layers that switched.
    rows: `[len(layers), slots]` what they held before.
    """

    epoch: int
    layers: tuple[int, ...]
    rows: np.ndarray


class ModelState(NamedTuple):
    """What is known of one model.

    placement: int32 `[layers, slots]` in force.
    target: int32 `[layers, slots]` that is being moved to; None if nothing is under way.
    epoch: commits so far; the number of the placement in force.
    changes: the last commits, oldest first.
    load: the estimator's state.
    acting: whether balancedness has fallen below the threshold by the hysteresis and not yet come back.
    slowness: measured seconds of moves / predicted ones, smoothed.
    expected_seconds: what the last moves were expected to take; None if that is not known, or was measured.
    """

    placement: np.ndarray
    target: np.ndarray | None
    epoch: int
    changes: tuple[Change, ...]
    load: Any
    acting: bool
    slowness: float
    expected_seconds: float | None


class ControlState(NamedTuple):
    """All that the controller remembers. A value: the same inputs lead to the same state on every rank.

    step: steps so far, dummy ones included.
    next_step: the step from which on the next decision is due.
    models: state of each model, by name.
    """

    step: int
    next_step: int
    models: dict[str, ModelState]


def placement_at(state: ModelState, epoch: int) -> Int[np.ndarray, "layers slots"]:
    """Look up the placement that was in force in a past epoch.

    Raises:
        EplbError: if the epoch has not begun, or lies more than `HISTORY` switched layers back.
    """
    check_kind(state, ModelState, "placement_at(state=...)")
    epoch = check_count(epoch, "placement_at(epoch=...)")
    first = state.changes[0].epoch - 1 if state.changes else state.epoch
    require(
        first <= epoch <= state.epoch,
        f"`placement_at(epoch=...)` must be one of {first}..{state.epoch}",
        f"epoch={epoch}",
        "Observe counts soon after they were taken, tagged with the epoch of that time.",
    )
    placement = state.placement.copy()
    for change in reversed(state.changes):
        if change.epoch <= epoch:
            break
        placement[list(change.layers)] = change.rows
    return placement


def frozen(array: np.ndarray) -> np.ndarray:
    """The array itself, read-only from now on."""
    array.setflags(write=False)
    return array


def differing(state: ModelState) -> tuple[int, ...]:
    """The layers that the target would change; none without a target."""
    if state.target is None:
        return ()
    return tuple(np.flatnonzero((state.target != state.placement).any(axis=1)).tolist())


def switch(state: ModelState, layers: tuple[int, ...], rows: Int[np.ndarray, "changed slots"]) -> ModelState:
    """Put rows of some layers in force, in a new epoch."""
    placement = state.placement.copy()
    change = Change(state.epoch + 1, layers, frozen(placement[list(layers)]))
    placement[list(layers)] = rows
    changes = (*state.changes, change)
    while len(changes) > 1 and sum(len(old.layers) for old in changes) > HISTORY:
        changes = changes[1:]
    return state._replace(placement=frozen(placement), epoch=state.epoch + 1, changes=changes)
