"""Check a placement policy against what every policy must keep, and what this one claims on top."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from eplb_core._checks import EMPTY
from eplb_core.testing._report import as_array, holds, not_written, own
from eplb_core.testing.cases import PolicyCase
from eplb_core.testing.models import model_moved, model_rank_load
from eplb_core.topology import Topology

_ROUNDING = 1e-5  # policies may compute in float32


def check_policy(
    policy: Callable[..., Any],
    case: PolicyCase,
    *,
    allow_empty: bool = False,
    distinct: bool = False,
    fair_copies: bool = False,
    keeps_slots: bool = False,
    never_worse: bool = False,
    max_moves: int | None = None,
    max_total_moves: int | None = None,
) -> np.ndarray:
    """Check the placement that a policy gives for one case.

    Always: the result is integers `[layers, slots]`; ids are in range; every expert has a copy in every layer; two
    calls give the same, as every rank plans alone; no input is written to. The options are what only some policies
    claim.

    Args:
        policy: called as `policy(load, topology)`, and with `previous=` where the case has one; returns
            `physical_to_logical`.
        case: what it is asked.
        allow_empty: slots may be `EMPTY`.
        distinct: no rank holds an expert twice while another expert of the layer is missing from it.
        fair_copies: no expert could be relieved by a copy that another needs less: a copy's tokens are at most those
            that the copies of any other expert would have with one copy fewer. The copies of the greedy policy are so.
        keeps_slots: an expert that `previous` has on a rank, once, and that stays there, stays in its slot.
        never_worse: the busiest rank of a layer has at most the tokens that it has under `previous`.
        max_moves: experts that ranks may have to receive per layer, where there is `previous`.
        max_total_moves: likewise in all layers together.

    Returns:
        The placement, for checks of your own.

    Raises:
        AssertionError: naming the property and the layers, slots, ranks or experts for which it does not hold.

    >>> case = PolicyCase(np.asarray([[5, 1, 2]]), Topology(2, 2))
    >>> check_policy(lambda load, topology: np.asarray([[0, 1, 0, 1]]), case)
    Traceback (most recent call last):
    ...
    AssertionError: policy leaves experts without a copy, as (layer, expert): [(0, 2)]
    """
    placed = _called_twice(policy, case)
    num_logical = case.load.shape[1]
    holds(*_outside(placed, num_logical))
    holds(*_missing(placed, num_logical))
    if not allow_empty:
        empty = np.argwhere(placed == EMPTY).tolist()
        holds(not empty, "policy leaves slots EMPTY (see allow_empty), as (layer, slot):", map(tuple, empty))
    if distinct:
        holds(*_doubles(placed, num_logical, case.topology))
    if fair_copies:
        holds(*_unfair(placed, case.load))
    if case.previous is not None:
        if keeps_slots:
            holds(*_needless(case.previous, placed, case.topology))
        if never_worse:
            holds(*_worse(placed, case))
        _check_moves(placed, case, max_moves, max_total_moves)
    return placed


def _called_twice(policy, case: PolicyCase) -> np.ndarray:
    results = []
    given = {"load": case.load} if case.previous is None else {"load": case.load, "previous": case.previous}
    for _ in range(2):
        arrays = {name: own(array) for name, array in given.items()}
        options = {name: array for name, array in arrays.items() if name != "load"}
        result = policy(arrays["load"], case.topology, **options)
        shape = (len(case.load), case.topology.num_slots)
        results.append(own(as_array(result, shape, "policy", "[layers, slots]")))
        not_written(given, arrays, "policy")
    differ = np.argwhere(results[0] != results[1]).tolist()
    holds(not differ, "policy gives another placement when called again, at (layer, slot):", map(tuple, differ))
    return results[0]


def _outside(placed, num_logical: int):
    bad = np.argwhere((placed < EMPTY) | (placed >= num_logical)).tolist()
    found = [(layer, slot, int(placed[layer, slot])) for layer, slot in bad]
    return not bad, f"policy places ids outside 0..{num_logical - 1}, as (layer, slot, id):", found


def _missing(placed, num_logical: int):
    everyone = set(range(num_logical))
    found = [(layer, e) for layer, row in enumerate(placed.tolist()) for e in sorted(everyone - set(row))]
    return not found, "policy leaves experts without a copy, as (layer, expert):", found


def _doubles(placed, num_logical: int, topology: Topology):
    found = []
    for (layer, row), rank in product(enumerate(placed.tolist()), range(topology.ep_size)):
        mine = [e for e in row[rank * topology.slots_per_rank : (rank + 1) * topology.slots_per_rank] if e != EMPTY]
        if len(set(mine)) < num_logical:
            found += [(layer, rank, expert) for expert in sorted(set(mine)) if mine.count(expert) > 1]
    return not found, "policy puts two copies of an expert on a rank, as (layer, rank, expert):", found


def _unfair(placed, load):
    """Whether the hottest copy would have less if the expert that can spare a copy gave it up."""
    found = []
    for layer, (row, tokens) in enumerate(zip(placed.tolist(), load.tolist(), strict=True)):
        copies = [row.count(expert) for expert in range(len(tokens))]
        hottest = max(range(len(tokens)), key=lambda e: tokens[e] / copies[e])
        for other, count in enumerate(copies):
            if count > 1 and tokens[other] / (count - 1) < tokens[hottest] / copies[hottest] * (1 - _ROUNDING):
                found.append((layer, other, hottest))
    return not found, "policy gives a copy to an expert that needs it less, as (layer, has, needs):", found


def _needless(old, placed, topology: Topology):
    found, depth = [], topology.slots_per_rank
    for layer, rank in product(range(len(placed)), range(topology.ep_size)):
        before, after = (x[layer, rank * depth : (rank + 1) * depth].tolist() for x in (old, placed))
        for local, expert in enumerate(before):
            stays = expert != EMPTY and before.count(expert) == 1 and expert in after
            if stays and after[local] != expert:
                found.append((layer, rank * depth + local))
    return not found, "policy moves experts that stay on their rank to another slot, from (layer, slot):", found


def _worse(placed, case: PolicyCase):
    found = []
    for layer, tokens in enumerate(case.load.tolist()):
        old, new = (max(model_rank_load(x[layer].tolist(), tokens, case.topology)) for x in (case.previous, placed))
        if new > old * (1 + _ROUNDING):
            found.append((layer, old, new))
    return not found, "policy burdens the busiest rank more than `previous`, as (layer, before, after):", found


def _check_moves(placed, case: PolicyCase, max_moves: int | None, max_total_moves: int | None) -> None:
    moved = [
        len(model_moved(old, new, case.topology))
        for old, new in zip(case.previous.tolist(), placed.tolist(), strict=True)
    ]
    above = [(layer, count) for layer, count in enumerate(moved) if max_moves is not None and count > max_moves]
    holds(not above, f"policy moves more than {max_moves} experts in a layer, as (layer, moved):", above)
    within = max_total_moves is None or sum(moved) <= max_total_moves
    holds(within, f"policy moves {sum(moved)} experts in all layers, more than {max_total_moves}")
