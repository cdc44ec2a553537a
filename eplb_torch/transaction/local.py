"""The order of copies within a rank, so that nothing is overwritten before it is read."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Copy:
    """One step: copy slot `src` to slot `dst`. `saves` puts `src` aside; `restores` takes `dst` from there."""

    src: int
    dst: int
    saves: bool = False
    restores: bool = False


def order_copies(sources: Mapping[int, int]) -> list[Copy]:
    """Order copies between slots so that every slot is read before it is overwritten.

    Each row is copied once; each cycle needs one row on the side, put aside and restored before the next cycle.

    Args:
        sources: for each slot to overwrite the slot whose old contents it takes; no slot takes its own.

    Returns:
        Steps in order.

    >>> [(copy.src, copy.dst) for copy in order_copies({0: 1, 1: 2})]
    [(1, 0), (2, 1)]
    """
    pending = dict(sources)
    readers: dict[int, int] = {}
    for src in pending.values():
        readers[src] = readers.get(src, 0) + 1
    steps: list[Copy] = []
    ready = [slot for slot in pending if not readers.get(slot)]
    while ready:
        slot = ready.pop()
        src = pending.pop(slot)
        steps.append(Copy(src, slot))
        readers[src] -= 1
        if not readers[src] and src in pending:
            ready.append(src)
    while pending:
        # Only cycles are left, in which every slot has one reader.
        first = next(iter(pending))
        steps.append(Copy(first, first, saves=True))
        slot = first
        while pending[slot] != first:
            src = pending.pop(slot)
            steps.append(Copy(src, slot))
            slot = src
        del pending[slot]
        steps.append(Copy(first, slot, restores=True))
    return steps
