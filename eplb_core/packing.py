"""Which pack each item goes to: groups onto nodes, copies onto ranks."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eplb_core import _ops
from eplb_core._checks import EMPTY, require


def pack(load: Float[Any, "rows items"], num_packs: int) -> Int[Any, "rows items"]:
    """Pack items into equally many places per pack, heaviest first, each into the lightest pack with room.

    Ties go to the lowest item and the lowest pack. One item per pack keeps its own index. `items` steps, each over
    all rows at once.

    Args:
        load: `[rows, items]` >= 0, finite.
        num_packs: packs, a divisor of `items`. Static under `jax.jit`.

    Returns:
        `[rows, items]` int32: the item in each place, pack by pack, in the order in which they came.

    Raises:
        EplbError: if the items do not split evenly.

    References:
        DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB (`balanced_packing`).

    >>> pack(np.asarray([[5.0, 4.0, 3.0, 2.0]]), num_packs=2).tolist()
    [[0, 3, 1, 2]]
    """
    xp = _ops.namespace(load)
    num_rows, num_items = load.shape
    require(
        num_packs >= 1 and num_items % num_packs == 0,
        "`pack(num_packs=...)` must divide the number of items",
        f"num_packs={num_packs}, items={num_items}",
        "Add or drop redundant experts until the slots split evenly.",
    )
    if num_packs in (1, num_items):
        order = xp.arange(num_items, dtype=xp.int32)[None, :]
        if num_packs == num_items:
            return xp.tile(order, (num_rows, 1))
        return xp.astype(_ops.descending(load)[1], xp.int32)
    fill = _fill_numpy if _ops.is_numpy(xp) else _fill
    return fill(load, num_packs)


def _fill(load, num_packs: int):
    xp = _ops.namespace(load)
    num_rows, num_items = load.shape
    room = num_items // num_packs
    heaviest_first, order = _ops.descending(load)
    pack_ids = xp.arange(num_packs, dtype=xp.int32)

    def place_next(carry, item):
        (pack_load, filled), (item_load,) = carry, item
        lightest = xp.argmin(xp.where(filled < room, pack_load, xp.inf), axis=1, keepdims=True)
        chosen = pack_ids == lightest
        place = lightest * room + xp.take_along_axis(filled, lightest, axis=1)
        pack_load = xp.where(chosen, pack_load + item_load[:, None], pack_load)
        return (pack_load, filled + xp.astype(chosen, xp.int32)), (xp.astype(place[:, 0], xp.int32),)

    empty = xp.zeros((num_rows, num_packs), dtype=load.dtype), xp.zeros((num_rows, num_packs), dtype=xp.int32)
    _, (place,) = _ops.scan(place_next, empty, (xp.permute_dims(heaviest_first, (1, 0)),))
    arrival = xp.argsort(xp.permute_dims(place, (1, 0)), axis=1, stable=True)
    return xp.astype(xp.take_along_axis(order, arrival, axis=1), xp.int32)


def _fill_numpy(load, num_packs: int):
    """`_fill` with indexed additions to its own arrays; a full pack weighs infinity."""
    num_rows, num_items = load.shape
    room = num_items // num_packs
    heaviest_first, order = _ops.descending(load)
    item_load = np.ascontiguousarray(heaviest_first.T)
    first_pack = np.arange(num_rows) * num_packs
    next_place = np.arange(num_rows * num_packs) * room
    last_place = next_place + room - 1
    place = np.empty((num_items, num_rows), dtype=np.intp)
    pack_load, num_packed = np.zeros((num_rows, num_packs), dtype=load.dtype), 0
    if item_load[num_packs - 1].min() > 0:
        # Every item that weighs anything goes to a pack of its own, while there are any.
        place[:num_packs] = next_place.reshape(num_rows, num_packs).T
        next_place += 1
        pack_load, num_packed = heaviest_first[:, :num_packs].copy(), num_packs
    flat_load = pack_load.reshape(-1)
    for step in range(num_packed, num_items):
        chosen = pack_load.argmin(axis=1)
        chosen += first_pack
        next_place.take(chosen, out=place[step], mode="clip")
        np.add.at(next_place, chosen, 1)
        np.add.at(flat_load, chosen, item_load[step])
        full = place[step] == last_place.take(chosen)
        if full.any():
            flat_load[chosen[full]] = np.inf
    packed = np.empty(num_rows * num_items, dtype=np.int32)
    packed[place.T] = order
    return packed.reshape(num_rows, num_items)


def pack_apart(
    expert: Int[Any, "rows items"], load: Float[Any, "rows items"], num_packs: int
) -> Int[Any, "rows items"]:
    """Pack copies of experts like `pack`, but copies of one expert into different packs while that is possible.

    Args:
        expert: `[rows, items]` int32 the expert of each copy.
        load: `[rows, items]` >= 0, finite.
        num_packs: packs, a divisor of `items`. Static under `jax.jit`.

    Returns:
        `[rows, items]` int32: the expert in each place, pack by pack.

    >>> pack_apart(np.asarray([[0, 0, 1, 2]], dtype=np.int32), np.asarray([[9.0, 9.0, 1.0, 1.0]]), 2).tolist()
    [[0, 1, 0, 2]]
    """
    xp = _ops.namespace(load)
    num_rows, num_items = load.shape
    sorted_load, order = _ops.descending(load)
    sorted_expert = xp.take_along_axis(expert, order, axis=1)
    packs, places = (xp.arange(n, dtype=xp.int32) for n in (num_packs, num_items // num_packs))

    def place_next(carry, item):
        (held, pack_load, filled), (item_expert, item_load) = carry, item
        full = xp.where(filled < places.shape[0], pack_load, xp.inf)
        apart = xp.where(xp.any(held == item_expert[:, None, None], axis=2), xp.inf, full)
        cost = xp.where(xp.any(xp.isfinite(apart), axis=1, keepdims=True), apart, full)
        chosen = packs == xp.argmin(cost, axis=1, keepdims=True)
        there = chosen[:, :, None] & (filled[:, :, None] == places)
        held = xp.where(there, item_expert[:, None, None], held)
        pack_load = xp.where(chosen, pack_load + item_load[:, None], pack_load)
        return (held, pack_load, filled + xp.astype(chosen, xp.int32)), (item_expert,)

    start = (
        xp.full((num_rows, num_packs, places.shape[0]), EMPTY, dtype=xp.int32),
        xp.zeros((num_rows, num_packs), dtype=load.dtype),
        xp.zeros((num_rows, num_packs), dtype=xp.int32),
    )
    (held, _, _), _ = _ops.scan(
        place_next, start, tuple(xp.permute_dims(x, (1, 0)) for x in (sorted_expert, sorted_load))
    )
    return xp.reshape(held, load.shape)
