"""Check a dispatch, which sends each token of an expert to one of the slots that hold it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from eplb_core._checks import EMPTY
from eplb_core.maps import ExpertMaps
from eplb_core.testing._report import as_array, holds, not_written, own
from eplb_core.testing.cases import DispatchCase


def check_dispatch(dispatch: Callable[..., Any], case: DispatchCase, *, max_spread: int | None = None) -> np.ndarray:
    """Check the slots that a dispatch chooses for one case.

    Each (token, expert) pair goes to a slot that holds the expert, padding to `EMPTY`; neither the ids nor the maps
    are written to. Which of the copies is free, also at random, unless `max_spread` is given.

    Args:
        dispatch: called as `dispatch(topk_ids, maps)`; returns slots of the shape of `topk_ids`.
        case: what it is asked.
        max_spread: the most by which the tokens of two copies of an expert may differ within the call; 1 if copies
            take turns.

    Returns:
        The slots.

    Raises:
        AssertionError: naming the property and the (token, k), slots or experts for which it does not hold.

    >>> maps = ExpertMaps(np.asarray([0, 1, 0]), np.asarray([[0, 2], [1, -1]]), np.asarray([2, 1]))
    >>> case = DispatchCase(np.asarray([[0, 1], [0, 1]]), maps)
    >>> check_dispatch(lambda ids, maps: maps.logical_to_physical[ids, 0], case, max_spread=1)
    Traceback (most recent call last):
    ...
    AssertionError: dispatch gives copies tokens that differ by more than 1, as (expert, tokens): [(0, [2, 0])]
    """
    given = {"topk_ids": case.topk_ids, **case.maps._asdict()}
    arrays = {name: own(array) for name, array in given.items()}
    result = dispatch(arrays["topk_ids"], ExpertMaps(**{name: arrays[name] for name in ExpertMaps._fields}))
    slots = own(as_array(result, case.topk_ids.shape, "dispatch", "[tokens, k]"))
    not_written(given, arrays, "dispatch")
    _check_slots(slots, case)
    if max_spread is not None:
        uneven = _uneven(slots, case, max_spread)
        broken = f"dispatch gives copies tokens that differ by more than {max_spread}, as (expert, tokens):"
        holds(not uneven, broken, uneven)
    return slots


def _check_slots(slots, case: DispatchCase) -> None:
    held = case.maps.physical_to_logical.tolist()
    lost, wrong, padding = [], [], []
    for (token, k), expert in np.ndenumerate(case.topk_ids):
        slot = int(slots[token, k])
        if expert < 0:
            padding += [] if slot == EMPTY else [(token, k, slot)]
        elif not 0 <= slot < len(held):
            lost.append((token, k, int(expert), slot))
        elif held[slot] != expert:
            wrong.append((token, k, int(expert), slot))
    holds(not lost, f"dispatch sends tokens outside slots 0..{len(held) - 1}, as (token, k, expert, slot):", lost)
    holds(not wrong, "dispatch sends tokens to slots of other experts, as (token, k, expert, slot):", wrong)
    holds(not padding, "dispatch sends padding to a slot, as (token, k, slot):", padding)


def _uneven(slots, case: DispatchCase, max_spread: int) -> list[tuple[int, list[int]]]:
    held, chosen = case.maps.physical_to_logical.tolist(), slots.ravel().tolist()
    found = []
    for expert in sorted(set(held) - {EMPTY}):
        tokens = [chosen.count(slot) for slot, other in enumerate(held) if other == expert]
        if max(tokens) - min(tokens) > max_spread:
            found.append((expert, tokens))
    return found
