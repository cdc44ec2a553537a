"""Check an executor, which carries out a change of placement on rows of weights."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from eplb_core._checks import EMPTY
from eplb_core.testing._report import holds, not_written, own
from eplb_core.testing.cases import MoveCase


def check_executor(
    execute: Callable[..., Any],
    case: MoveCase,
    *,
    untouched: bool = True,
    failures: type[BaseException] | tuple[type[BaseException], ...] = (),
    committed: Callable[[Any], Collection[int]] | None = None,
) -> np.ndarray:
    """Check the rows after an executor has carried out one case.

    Each slot must hold a row of its expert, bit for bit, and a slot that keeps its expert the very row it had. Slots
    that are `EMPTY` in the new placement may hold anything. The placements are not written to. If the executor
    raises one of `failures`, each layer must be wholly as before or wholly as wanted.

    Args:
        execute: called as `execute(old, new, topology, rows)`; changes `rows` in place and returns None, or returns
            the new rows.
        case: what it is asked.
        untouched: False lets a slot that keeps its expert receive the row of another copy.
        failures: exceptions that are no bug: let `execute` break its own transport, say, and raise one. Others pass
            through.
        committed: takes such an exception, and returns the layers which it says hold the new placement; the others
            must hold the old one.

    Returns:
        The rows.

    Raises:
        AssertionError: naming the property and the (layer, slot) for which it does not hold.

    >>> from eplb_core import Topology
    >>> case = MoveCase(*np.asarray([[[0, 1]], [[1, 0]]]), Topology(2, 1), np.asarray([[[7], [8]]]))
    >>> def in_place(old, new, topology, rows):
    ...     rows[:, 0] = rows[:, 1]
    ...     rows[:, 1] = rows[:, 0]
    >>> check_executor(in_place, case)
    Traceback (most recent call last):
    ...
    AssertionError: executor leaves slots without their expert's row, as (layer, slot, expert): [(0, 1, 0)]
    """
    placements = {"old": own(case.old), "new": own(case.new)}
    rows, error = own(case.rows), None
    try:
        result = execute(placements["old"], placements["new"], case.topology, rows)
    except failures as raised:
        result, error = None, raised
    not_written({"old": case.old, "new": case.new}, placements, "executor")
    if result is not None:
        rows = np.asarray(result)
    same = (rows.shape, rows.dtype) == (case.rows.shape, case.rows.dtype)
    wanted = f"{case.rows.dtype} {case.rows.shape}"
    holds(same, f"executor must leave rows {wanted}, not {rows.dtype} {rows.shape}")
    before, after = ([[row.tobytes() for row in layer] for layer in x] for x in (case.rows, rows))
    if error is None:
        _check_rows(_wrong(case, before, after, untouched), "executor")
    else:
        _check_failed(case, before, after, untouched, None if committed is None else committed(error))
    return rows


def _wrong(case: MoveCase, before, after, untouched: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """The slots that do not hold what `case.new` says, each with what is wrong with it."""
    found = []
    for layer, (old, new) in enumerate(zip(case.old.tolist(), case.new.tolist(), strict=True)):
        for slot, expert in enumerate(new):
            own_rows = {before[layer][other] for other, held in enumerate(old) if held == expert}
            row = after[layer][slot]
            if expert == EMPTY or not own_rows:
                continue
            if row not in own_rows:
                found.append(("leaves slots without their expert's row", (layer, slot, expert)))
            elif untouched and old[slot] == expert and row != before[layer][slot]:
                found.append(("writes to slots that keep their expert (see untouched)", (layer, slot, expert)))
    return found


def _check_rows(wrong, who: str) -> None:
    for kind in sorted({kind for kind, _ in wrong}):
        holds(False, f"{who} {kind}, as (layer, slot, expert):", [place for what, place in wrong if what == kind])


def _check_failed(case: MoveCase, before, after, untouched: bool, claimed: Collection[int] | None) -> None:
    wrong = _wrong(case, before, after, untouched)
    new = set(range(len(case.old))) - {layer for _, (layer, _, _) in wrong}
    old = {layer for layer in range(len(case.old)) if before[layer] == after[layer]}
    half = set(range(len(case.old))) - new - old
    holds(not half, "executor that failed leaves layers neither old nor new:", sorted(half))
    if claimed is not None:
        outside = set(claimed) - set(range(len(case.old)))
        holds(not outside, "executor that failed names layers that there are not:", sorted(outside))
        lie = (set(claimed) - new) | (set(range(len(case.old))) - set(claimed) - old)
        holds(not lie, "executor that failed says old for new, or new for old, of layers:", sorted(lie))
