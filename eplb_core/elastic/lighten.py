"""Spend a few transfers where they take most off the busiest ranks. On the host, in NumPy."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eplb_core._checks import EMPTY
from eplb_core.elastic.rehost import Carried, carried

_SURE = 1e-9  # share of the busiest rank's load below which a gain may be rounding


class Step(NamedTuple):
    """One change of a layer.

    gain: tokens that it takes off the busiest rank, per transfer; infinite if it adds none.
    moves: transfers that it adds: 2, 1, or none or fewer where experts get back to where they were.
    puts: (slot, expert) pairs.
    """

    gain: float
    moves: int
    puts: tuple[tuple[int, int], ...]


_STAY = Step(0.0, 0, ())


class _Options(NamedTuple):
    """Changes to choose from.

    busiest: `[options]` tokens of the busiest rank after each.
    moves: `[options]` transfers that each adds.
    puts: pairs of `[options]` slots and `[options]` experts.
    """

    busiest: Any
    moves: Any
    puts: Any


def lighten(
    held: Int[np.ndarray, "layers ep_size slots_per_rank"],
    home: Int[np.ndarray, "layers ep_size slots_per_rank"],
    load: Float[np.ndarray, "layers logical"],
    *,
    max_moves: int,
    tolerance: float,
) -> Int[np.ndarray, "layers ep_size slots_per_rank"]:
    """Improve placements by single changes, each of which makes the busiest rank of its layer lighter.

    A change copies an expert of the busiest rank into a free slot of another rank, or into the slot of an expert
    that has further copies; or it swaps an expert of the busiest rank with one of another rank. Of all layers, the
    change that takes most off the busiest rank per transfer is made, until moves run out or nothing helps. No change
    puts a second copy on a rank. One costs `O(slots_per_rank * slots * ep_size)`.

    Args:
        held: what is to be improved; every expert has a copy.
        home: what is in place: what a rank holds there it need not receive.
        load: tokens of each expert, >= 0.
        max_moves: transfers that may be added to those from `home` to `held`, in all layers together.
        tolerance: a layer whose busiest rank is within this share of the mean is done.

    Returns:
        A new array like `held`.

    >>> held = np.asarray([[[0, 1], [2, 3]]])
    >>> lighten(held, held, np.asarray([[9.0, 5.0, 4.0, 3.0]]), max_moves=2, tolerance=0.0).tolist()
    [[[2, 1], [0, 3]]]
    """
    held, left = held.copy(), max_moves
    padded = np.concatenate([load, np.zeros((len(load), 1))], axis=1)
    at_home = np.stack([carried(*layer).count > 0 for layer in zip(home, padded, strict=True)])
    at_home[:, :, EMPTY] = True

    def look(layer: int) -> Step:
        return _best_step(held[layer], at_home[layer], padded[layer], left, tolerance)

    steps = [look(layer) for layer in range(len(held))]
    while True:
        layer = max(range(len(held)), key=lambda i: steps[i].gain)
        step = steps[layer]
        if not step.puts:
            return held
        for slot, expert in step.puts:
            held[layer].flat[slot] = expert
        left -= step.moves
        steps[layer] = look(layer)
        # With fewer moves left, what takes more must be looked for again.
        steps = [look(i) if step.moves > left else step for i, step in enumerate(steps)]


def _best_step(held, at_home, load, max_moves: int, tolerance: float) -> Step:
    """The change with the largest gain that adds at most `max_moves`, the first of equals; `_STAY` if none helps."""
    now = carried(held, load)
    here = int(now.rank_load.argmax())
    busiest = now.rank_load[here]
    best = _STAY
    if busiest <= now.rank_load.mean() * (1 + tolerance):
        return best
    for options in (_copies(held, at_home, load, now, here), _swaps(held, at_home, now, here)):
        gain = busiest - options.busiest
        value = np.where(options.moves > 0, gain / np.maximum(options.moves, 1), np.inf)
        value[(gain <= _SURE * busiest) | (options.moves > max_moves)] = -1.0
        i = int(value.argmax()) if value.size else 0
        if value.size and value[i] > best.gain:
            puts = tuple((int(slots[i]), int(experts[i])) for slots, experts in options.puts)
            best = Step(float(value[i]), int(options.moves[i]), puts)
    return best


def _copies(held, at_home, load, now: Carried, here: int) -> _Options:
    """A further copy of each expert of rank `here`, in each slot of another rank that can be had."""
    flat = held.ravel()
    mine = np.flatnonzero(now.count[here, :-1])
    slot = np.flatnonzero((flat == EMPTY) | (now.copies[flat] > 1))
    which, chosen = np.nonzero(now.count[slot // held.shape[1]][:, mine] == 0)
    slot, expert = slot[which], mine[chosen]
    rank, out = slot // held.shape[1], flat[slot]
    taken_over = load[out] / np.maximum(now.copies[out] - 1, 1)
    further = load[expert] / (now.copies[expert] + 1)
    rank_load = now.rank_load[:, None] + now.count[:, out] * (taken_over - now.share[out])
    rank_load -= now.count[:, expert] * (now.share[expert] - further)
    rank_load[rank, np.arange(slot.size)] += further - taken_over
    moves = _receives(at_home, rank, expert) - _spares(at_home, now, rank, out)
    return _Options(rank_load.max(axis=0), moves, ((slot, expert),))


def _swaps(held, at_home, now: Carried, here: int) -> _Options:
    """A swap of each expert of rank `here` with what each slot of the other ranks holds."""
    flat, depth = held.ravel(), held.shape[1]
    mine, theirs = np.divmod(np.arange(depth * flat.size), flat.size)
    mine = mine + here * depth
    gives, takes, there = flat[mine], flat[theirs], theirs // depth
    fits = (gives != EMPTY) & (there != here) & (now.count[there, gives] == 0)
    fits &= (takes == EMPTY) | (now.count[here, takes] == 0)
    mine, theirs, gives, takes, there = (x[fits] for x in (mine, theirs, gives, takes, there))
    shift = now.share[gives] - now.share[takes]
    others = np.append(np.delete(now.rank_load, here), 0.0)
    heaviest = np.argsort(-others, kind="stable")[:2]
    rest = np.where(others[heaviest[0]] == now.rank_load[there], others[heaviest[-1]], others[heaviest[0]])
    both = np.maximum(now.rank_load[here] - shift, now.rank_load[there] + shift)
    moves = _receives(at_home, there, gives) - _spares(at_home, now, here, gives)
    moves += _receives(at_home, here, takes) - _spares(at_home, now, there, takes)
    return _Options(np.maximum(both, rest), moves, ((mine, takes), (theirs, gives)))


def _receives(at_home, rank, expert):
    """1 where the rank must receive the expert, of which it has no copy now, in order to hold it; else 0."""
    return np.where(at_home[rank, expert], 0, 1)


def _spares(at_home, now: Carried, rank, expert):
    """1 where a copy that leaves the rank need not be received any more, else 0."""
    return np.where(at_home[rank, expert] | (now.count[rank, expert] > 1), 0, 1)
