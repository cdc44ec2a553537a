"""Give every expert a slot and every new slot an expert, while all else stays where it is. On the host, in NumPy."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from eplb_core._checks import EMPTY

PASSES = 2  # rounds of second thoughts about what a layer receives; more gain little
_SURE = 1e-9  # relative gain below which two costs are the same, so that rounding cannot make cycles


class Carried(NamedTuple):
    """What the ranks of one layer carry. The last expert of each axis stands for `EMPTY`, which is index -1.

    count: `[ep_size, logical + 1]` copies on each rank.
    copies: `[logical + 1]` copies.
    share: `[logical + 1]` tokens of one copy, or of the expert if it has none.
    rank_load: `[ep_size]` tokens.
    """

    count: Any
    copies: Any
    share: Any
    rank_load: Any


def rehost(
    kept: Int[np.ndarray, "ep_size slots_per_rank"],
    load: Float[np.ndarray, " logical"],
    fill: Bool[np.ndarray, " ep_size"],
) -> Int[np.ndarray, "ep_size slots_per_rank"]:
    """Place the experts of one layer that have no copy, and fill free slots, without moving anything else.

    Each expert without a copy, heaviest first, takes a free slot, or where there is none that of an expert which
    has further copies: the slot that leaves the busiest rank lightest; then the one with the least sum of squares of
    rank loads, with most copies of what it held, with the lowest number. Free slots of ranks in `fill` take what
    lowers the busiest rank most, or stay free where every expert would raise it. At last each received expert is
    taken out and put back where it is best, or changed for another, up to `PASSES` times over.

    If there are more experts than slots, those with the fewest tokens get none.

    Args:
        kept: what is in place; `EMPTY` slots are free.
        load: tokens of each expert, >= 0.
        fill: ranks whose free slots shall be filled.

    Returns:
        A new array like `kept`. Slots that differ hold an expert that had no copy, or fill a free slot of a rank in
        `fill`, or are `EMPTY` for an expert that is no longer hosted.

    >>> kept = np.asarray([[0, 1], [2, 1], [EMPTY, EMPTY]])
    >>> rehost(kept, np.asarray([5.0, 4.0, 9.0, 1.0]), np.asarray([False, False, True])).tolist()
    [[0, 1], [2, 1], [3, 2]]
    """
    present = np.isin(np.arange(load.shape[0]), kept)
    hosted = _hosted(load, present, kept.size)
    home = np.where(np.isin(kept, np.flatnonzero(hosted)), kept, EMPTY)
    orphans = np.flatnonzero(hosted & ~present)
    padded = np.append(load, 0.0)
    held = _place_orphans(home, padded, orphans[np.argsort(-load[orphans], kind="stable")].tolist())
    return _fill(held, padded, fill)


def _hosted(load, present, num_slots: int):
    """`[logical]` bool: the experts with the most tokens; among equals those with a copy, then the lowest ids."""
    chosen = np.lexsort((~present, -load))[:num_slots]
    return np.isin(np.arange(load.shape[0]), chosen)


def carried(held, load) -> Carried:
    """Count the copies and add up the tokens of one layer; `load` has a last entry 0 for `EMPTY`."""
    ranks = np.arange(held.shape[0])[:, None]
    keys = ranks * load.shape[0] + held + np.where(held == EMPTY, load.shape[0], 0)
    count = np.bincount(keys.ravel(), minlength=held.shape[0] * load.shape[0]).reshape(held.shape[0], -1)
    copies = count.sum(axis=0)
    share = load / np.maximum(copies, 1)
    # Plain sums: those of a matrix product differ between machines.
    return Carried(count, copies, share, share[held].sum(axis=1))


def _choose(rank_load, *ties):
    """The option `[ep_size, options]` with the lightest busiest rank, then the least squares, then `ties`; its cost."""
    busiest, squares = rank_load.max(axis=0), (rank_load * rank_load).sum(axis=0)
    best = int(np.lexsort((*ties[::-1], squares, busiest))[0])
    return best, (float(busiest[best]), float(squares[best]))


def _best_slot(held, load, expert: int):
    """The slot in which an expert without a copy is best: a free one, else one of an expert with others. Its cost."""
    now = carried(held, load)
    free = held.ravel() == EMPTY
    slot = np.flatnonzero(free if free.any() else now.copies[held.ravel()] > 1)
    rank, out = slot // held.shape[1], held.ravel()[slot]
    taken_over = load[out] / np.maximum(now.copies[out] - 1, 1)
    rank_load = now.rank_load[:, None] + now.count[:, out] * (taken_over - now.share[out])
    rank_load[rank, np.arange(slot.size)] += load[expert] - taken_over
    best, cost = _choose(rank_load, -now.copies[out])
    return int(slot[best]), cost


def _best_expert(held, load, ranks):
    """The expert, and the one of `ranks` with a free slot, for which a further copy is best; and the cost."""
    now = carried(held, load)
    open_ = ranks & (held == EMPTY).any(axis=1)
    further = load / (now.copies + 1)
    rank_load = now.rank_load[:, None] - now.count * (now.share - further)
    can = (now.count[:, :-1] == 0) & open_[:, None]
    expert = np.flatnonzero(can.any(axis=0))
    if expert.size == 0:
        return None
    rank = np.where(can, rank_load[:, :-1], np.inf).argmin(axis=0)[expert]
    rank_load = rank_load[:, expert]
    rank_load[rank, np.arange(expert.size)] += further[expert]
    best, cost = _choose(rank_load, now.copies[expert])
    return int(expert[best]), int(rank[best]), cost


def _cost(held, load) -> tuple[float, float]:
    return _choose(carried(held, load).rank_load[:, None])[1]


def _better(new, old) -> bool:
    lighter = new[0] < old[0] * (1 - _SURE)
    return lighter or (new[0] <= old[0] * (1 + _SURE) and new[1] < old[1] * (1 - _SURE))


def _place_orphans(home, load, orphans: list[int]):
    """Give each orphan a slot, in order; then move and exchange them as long as that helps."""
    held, slot_of = home.copy(), {}
    for expert in orphans:
        slot_of[expert], _ = _best_slot(held, load, expert)
        held.flat[slot_of[expert]] = expert
    for _ in range(PASSES):
        before = _cost(held, load)
        for expert in orphans:
            held.flat[slot_of[expert]] = home.flat[slot_of[expert]]
            slot_of[expert], _ = _best_slot(held, load, expert)
            held.flat[slot_of[expert]] = expert
            _swap_orphan(held, load, slot_of, expert)
        if not _better(_cost(held, load), before):
            break
    return held


def _swap_orphan(held, load, slot_of, expert: int) -> None:
    """Exchange one orphan with the best of the others, if that helps; in place. Each of them has one copy."""
    others = [other for other in slot_of if other != expert]
    if not others:
        return
    mine, theirs = slot_of[expert] // held.shape[1], np.asarray([slot_of[x] // held.shape[1] for x in others])
    gain = load[others] - load[expert]
    before = carried(held, load).rank_load
    rank_load = np.tile(before[:, None], (1, len(others)))
    rank_load[mine] += gain
    rank_load[theirs, np.arange(len(others))] -= gain
    best, cost = _choose(rank_load)
    if _better(cost, _choose(before[:, None])[1]):
        other = others[best]
        slot_of[expert], slot_of[other] = slot_of[other], slot_of[expert]
        held.flat[slot_of[expert]], held.flat[slot_of[other]] = expert, other


def _fill(held, load, ranks):
    """Fill the free slots of `ranks`; then change what they got as long as that helps."""
    held, free = held.copy(), np.flatnonzero(held == EMPTY)
    for _ in range(PASSES + 1):
        before = _cost(held, load)
        for slot in free[held.flat[free] != EMPTY].tolist():
            _exchange(held, load, slot)
        added = _add(held, load, ranks)
        if not added and not _better(_cost(held, load), before):
            break
    return held


def _add(held, load, ranks) -> bool:
    """Fill free slots of `ranks` until every expert would raise the busiest rank; in place. Whether any was filled."""
    added = False
    while (found := _best_expert(held, load, ranks)) is not None:
        expert, rank, cost = found
        if cost[0] > _cost(held, load)[0] * (1 + _SURE):
            break
        held[rank, np.argmax(held[rank] == EMPTY)] = expert
        added = True
    return added


def _exchange(held, load, slot: int) -> None:
    """Replace the expert that fills `slot` by a better one for its rank, if there is one; in place."""
    cost, expert = _cost(held, load), held.flat[slot]
    held.flat[slot] = EMPTY
    found = _best_expert(held, load, np.arange(held.shape[0]) == slot // held.shape[1])
    held.flat[slot] = found[0] if found is not None and _better(found[2], cost) else expert
