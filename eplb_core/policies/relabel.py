"""Which rank takes over which rank's role: an assignment problem."""

from typing import Any

from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY


def keep_in_place(new: Int[Any, "rows slots"], old: Int[Any, "rows slots"], num_groups: int) -> Int[Any, "rows slots"]:
    """Permute the groups of consecutive slots of `new` so that most entries stay in the group where they were.

    Load does not depend on which rank carries it, so this costs no balance. Exact, by `assign`.

    Args:
        new: `[rows, slots]` ids or `EMPTY`.
        old: `[rows, slots]` ids or `EMPTY`.
        num_groups: ranks, or nodes: a divisor of the slots. Static under `jax.jit`.

    Returns:
        `[rows, slots]`: `new` with its groups permuted.
    """
    xp = _ops.namespace(new)
    by_group = (new.shape[0], num_groups, new.shape[1] // num_groups)
    new_groups, old_groups = xp.reshape(new, by_group), xp.reshape(old, by_group)
    kept = []
    for group in range(num_groups):
        here = old_groups[:, None, group, None, :]
        same = xp.any((new_groups[:, :, :, None] == here) & (here != EMPTY), axis=3)
        kept.append(xp.sum(xp.astype(same, xp.int32), axis=2, dtype=xp.int32))
    chosen = assign(xp.stack(kept, axis=1))
    return xp.reshape(_ops.pick(new_groups, chosen), new.shape)


def assign(score: Int[Any, "rows n n"]) -> Int[Any, "rows n"]:
    """Give each of n places one of n items so that the sum of scores is largest.

    Shortest augmenting paths, `O(n^3)` per row at worst; all rows step together.

    Args:
        score: `[rows, places, items]` int32.

    Returns:
        `[rows, n]` int32 the item of each place, a permutation.

    References:
        Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
        problems", Computing 38, 1987.

    >>> import numpy as np
    >>> assign(np.asarray([[[3, 2], [3, 0]]], dtype=np.int32)).tolist()
    [[1, 0]]
    """
    xp = _ops.namespace(score)
    num_rows, size = score.shape[:2]
    # Column 0 stands for "no place yet"; the potential of an item is stored with the place that has it.
    cost = -xp.permute_dims(score, (0, 2, 1))
    item_of = xp.full((num_rows, size + 1), EMPTY, dtype=xp.int32)
    potential = xp.zeros((num_rows, size + 1), dtype=xp.int32)
    price = xp.zeros((num_rows, size + 1), dtype=xp.int32)
    columns = xp.arange(size + 1, dtype=xp.int32)

    def add_item(carry, item):
        (item_of, potential, price), (index,) = carry, item
        first = columns == 0
        item_of = xp.where(first, index, item_of)
        potential = xp.where(first, xp.asarray(0, dtype=xp.int32), potential)
        everyone = xp.ones(num_rows, dtype=xp.bool)
        far = xp.where(first, 0, xp.asarray(xp.iinfo(xp.int32).max // 2, dtype=xp.int32))
        far = xp.astype(xp.broadcast_to(far, item_of.shape), xp.int32)
        here = xp.zeros((num_rows, 1), dtype=xp.int32)
        state = here, far, xp.zeros_like(item_of), xp.zeros(item_of.shape, dtype=xp.bool), potential, price
        here, _, came_from, _, potential, price = _ops.while_rows(_reach, state, (item_of, cost), everyone)
        moved = _ops.while_rows(_pull, (here, item_of, potential), (came_from,), everyone)
        return (moved[1], moved[2], price), (index,)

    (item_of, _, _), _ = _ops.scan(add_item, (item_of, potential, price), (xp.arange(size, dtype=xp.int32),))
    return item_of[:, 1:]


def _reach(state, fixed):
    """Settle the nearest column; stop at one without an item."""
    (here, distance, came_from, settled, potential, price), (item_of, cost) = state, fixed
    xp = _ops.namespace(here)
    columns = xp.arange(item_of.shape[1], dtype=xp.int32)
    settled = settled | (columns == here)
    item = _ops.pick(item_of, here)
    reduced = _ops.pick(cost, xp.maximum(item, 0))[:, 0, :]
    reduced = reduced - _ops.pick(potential, here) - price[:, 1:]
    closer = ~settled[:, 1:] & (reduced < distance[:, 1:])
    distance = xp.concat([distance[:, :1], xp.where(closer, reduced, distance[:, 1:])], axis=1)
    came_from = xp.concat([came_from[:, :1], xp.where(closer, here, came_from[:, 1:])], axis=1)
    open_distance = xp.where(settled, xp.asarray(xp.iinfo(xp.int32).max, dtype=xp.int32), distance)
    nearest = xp.astype(xp.argmin(open_distance, axis=1, keepdims=True), xp.int32)
    step = _ops.pick(open_distance, nearest)
    go = _ops.pick(item_of, here)[:, 0] != EMPTY
    potential = xp.where(settled, potential + step, potential)
    price = xp.where(settled, price - step, price)
    distance = xp.where(settled, distance, distance - step)
    return (nearest, distance, came_from, settled, potential, price), go


def _pull(state, fixed):
    """Move items one column along the path towards the free one."""
    (here, item_of, potential), (came_from,) = state, fixed
    xp = _ops.namespace(here)
    columns = xp.arange(item_of.shape[1], dtype=xp.int32)
    before = _ops.pick(came_from, here)
    item_of, potential = (xp.where(columns == here, _ops.pick(x, before), x) for x in (item_of, potential))
    return (before, item_of, potential), here[:, 0] != 0
