"""Spend a budget of moves for all layers where it lowers the bottleneck most."""

from typing import Any

from jaxtyping import Float, Int

from eplb_core import _ops


def share_out(moves: Int[Any, " layers"], gain: Float[Any, " layers"], max_total_moves: int) -> Int[Any, " layers"]:
    """Grant layers the moves they ask for, in the order of gain per move, until the budget is used up.

    The first layer that does not get all gets what is left. Ties go to the lowest layer.

    Args:
        moves: `[layers]` moves that each layer would make.
        gain: `[layers]` what these take off the layer's busiest rank, in tokens.
        max_total_moves: the budget.

    Returns:
        `[layers]` int32 moves that each layer may make.

    >>> import numpy as np
    >>> share_out(np.asarray([4, 2, 3]), np.asarray([4.0, 9.0, 6.0]), 4).tolist()
    [0, 2, 2]
    """
    xp = _ops.namespace(gain)
    value = gain / xp.maximum(xp.astype(moves, gain.dtype), 1.0)
    order = xp.argsort(-value, stable=True)
    asked = xp.take(moves, order)
    before = xp.cumulative_sum(asked) - asked
    granted = xp.clip(max_total_moves - before, 0, asked)
    return xp.astype(xp.take(granted, xp.argsort(order, stable=True)), xp.int32)
