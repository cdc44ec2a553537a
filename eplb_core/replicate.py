"""How many copies each expert gets."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eplb_core import _ops


def replicate(
    load: Float[Any, "rows logical"], num_slots: int, *, max_copies: int | None = None
) -> tuple[Int[Any, "rows num_slots"], Int[Any, "rows logical"]]:
    """Give every expert one copy and each further slot to the expert with the most load per copy.

    This minimises the largest load per copy. Ties go to the lowest expert. In an apportionment's words it is the
    D'Hondt rule. `num_slots - logical` steps, each over all rows at once.

    Args:
        load: `[rows, logical]` >= 0, finite.
        num_slots: slots to fill, >= logical. Static under `jax.jit`.
        max_copies: copies that an expert has use for; unlimited by default. Slots that no expert has use for go
            to expert 0.

    Returns:
        `[rows, num_slots]` int32 the expert of each copy, first `0..logical-1` and then in the order of the steps;
        `[rows, logical]` int32 copies of each expert, rows summing to `num_slots`.

    References:
        DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB (`replicate_experts`).

    >>> expert, copies = replicate(np.asarray([[9.0, 1.0, 2.0]]), num_slots=5)
    >>> expert.tolist(), copies.tolist()
    ([[0, 1, 2, 0, 0]], [[3, 1, 1]])
    """
    xp = _ops.namespace(load)
    num_rows, num_logical = load.shape
    first = xp.tile(xp.arange(num_logical, dtype=xp.int32)[None, :], (num_rows, 1))
    if num_slots == num_logical:
        return first, xp.ones((num_rows, num_logical), dtype=xp.int32)
    grow = _grow_numpy if _ops.is_numpy(xp) else _grow
    expert, copies = grow(load, num_slots - num_logical, num_slots if max_copies is None else max_copies)
    return xp.concat([first, expert], axis=1), copies


def _grow(load, num_steps: int, max_copies: int):
    xp = _ops.namespace(load)
    expert, full = xp.arange(load.shape[1], dtype=xp.int32), xp.asarray(-1.0, dtype=load.dtype)

    def give_next(copies, _):
        share = xp.where(copies < max_copies, load / xp.astype(copies, load.dtype), full)
        chosen = xp.astype(xp.argmax(share, axis=1), xp.int32)
        return copies + xp.astype(chosen[:, None] == expert, xp.int32), (chosen,)

    steps = xp.arange(num_steps, dtype=xp.int32)
    copies, (chosen,) = _ops.scan(give_next, xp.ones(load.shape, dtype=xp.int32), (steps,))
    return xp.permute_dims(chosen, (1, 0)), copies


def _grow_numpy(load, num_steps: int, max_copies: int):
    """`_grow` in place: only the share of the chosen expert is divided again."""
    rows = np.arange(load.shape[0])
    share = load.copy() if max_copies > 1 else np.full(load.shape, -1.0)
    copies = np.ones(load.shape, dtype=np.int32)
    expert = np.empty((load.shape[0], num_steps), dtype=np.int32)
    for step in range(num_steps):
        chosen = share.argmax(axis=1)
        expert[:, step] = chosen
        count = copies[rows, chosen] + 1
        copies[rows, chosen] = count
        share[rows, chosen] = np.where(count < max_copies, load[rows, chosen] / count, -1.0)
    return expert, copies
