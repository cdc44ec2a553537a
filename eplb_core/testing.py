"""Hypothesis strategies for valid input, and plain-Python models to compare with.

Our own property tests use them; so can anyone who fuzzes an engine, a policy or an executor of theirs. The models
are written for reading: lists, loops and no code of the library.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from eplb_core._checks import EMPTY
from eplb_core.topology import Topology

# Strategies


@st.composite
def topologies(draw, max_ranks_per_node: int = 4, max_nodes: int = 3, max_slots_per_rank: int = 4) -> Topology:
    """Topologies of one rank and up; few ranks per node, few nodes, few slots."""
    num_nodes = draw(st.integers(1, max_nodes))
    ranks_per_node = draw(st.integers(1, max_ranks_per_node))
    return Topology(num_nodes * ranks_per_node, draw(st.integers(1, max_slots_per_rank)), num_nodes)


def token_counts() -> st.SearchStrategy[int]:
    """Tokens of one expert: often zero or small, so that ties are common; sometimes millions."""
    return st.one_of(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 10**7))


@st.composite
def loads(draw, num_logical: int, num_layers: int | None = None, num_windows: int | None = None) -> np.ndarray:
    """Read-only int64 loads `[layers, logical]`, or `[windows, layers, logical]`, with ties and zeros."""
    layers = draw(st.integers(1, 3)) if num_layers is None else num_layers
    shape = (layers, num_logical) if num_windows is None else (num_windows, layers, num_logical)
    size = int(np.prod(shape))
    counts = draw(st.lists(token_counts(), min_size=size, max_size=size))
    return read_only(np.asarray(counts, dtype=np.int64).reshape(shape))


@st.composite
def distinct_loads(draw, num_logical: int, num_layers: int) -> np.ndarray:
    """Read-only loads `[layers, logical]` of distinct primes, so that no two shares of different experts are equal."""
    primes = _primes(num_logical * num_layers)
    order = draw(st.permutations(range(len(primes))))
    return read_only(np.asarray([primes[i] for i in order], dtype=np.int64).reshape(num_layers, num_logical))


@st.composite
def placements(
    draw, topology: Topology, num_logical: int, num_layers: int | None = None, *, empty: bool = False
) -> np.ndarray:
    """Read-only int32 placements `[layers, slots]`.

    Every expert has a copy, unless `empty`: then some slots are `EMPTY` and experts may have none.
    """
    layers = draw(st.integers(1, 3)) if num_layers is None else num_layers
    spare = topology.num_slots - num_logical
    rows = []
    for _ in range(layers):
        extra = draw(st.lists(st.integers(0, num_logical - 1), min_size=spare, max_size=spare))
        row = draw(st.permutations([*range(num_logical), *extra]))
        if empty:
            gone = draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
            row = [EMPTY if lost else expert for expert, lost in zip(row, gone, strict=True)]
        rows.append(row)
    return read_only(np.asarray(rows, dtype=np.int32))


@st.composite
def placement_pairs(
    draw, *, empty: bool = False, similar: bool = False, **sizes: int
) -> tuple[Topology, int, np.ndarray, np.ndarray]:
    """A topology, a number of experts, and an old and a new placement of them.

    Args:
        empty: the new placement may have `EMPTY` slots (the old one holds every expert).
        similar: the new placement differs from the old one in a few swaps only.
        sizes: bounds for `topologies`.
    """
    topology = draw(topologies(**sizes))
    num_logical = draw(st.integers(1, topology.num_slots))
    old = draw(placements(topology, num_logical))
    if not similar:
        return topology, num_logical, old, draw(placements(topology, num_logical, len(old), empty=empty))
    new = old.copy()
    slots = st.integers(0, topology.num_slots - 1)
    for layer, a, b in draw(st.lists(st.tuples(st.integers(0, len(old) - 1), slots, slots), max_size=4)):
        new[layer, [a, b]] = new[layer, [b, a]]
    return topology, num_logical, old, read_only(new)


def read_only(array: np.ndarray) -> np.ndarray:
    """Forbid writes, so that a function that is not pure fails."""
    array.setflags(write=False)
    return array


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 1009
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            found.append(candidate)
        candidate += 1
    return found


# Models


def model_replicate(load: Sequence[int | float], num_slots: int) -> list[int]:
    """The expert of each copy: all experts once, then again and again the one with the most load per copy."""
    copies = [1] * len(load)
    experts = list(range(len(load)))
    while len(experts) < num_slots:
        hottest = max(range(len(load)), key=lambda e: (load[e] / copies[e], -e))
        copies[hottest] += 1
        experts.append(hottest)
    return experts


def model_pack(load: Sequence[int | float], num_packs: int) -> list[list[int]]:
    """Items of each pack: heaviest first, into the lightest pack with room; one item per pack keeps its index."""
    room = len(load) // num_packs
    if room == 1:
        return [[item] for item in range(len(load))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weight = [0.0] * num_packs
    for item in sorted(range(len(load)), key=lambda i: (-load[i], i)):
        lightest = min((p for p in range(num_packs) if len(packs[p]) < room), key=lambda p: (weight[p], p))
        packs[lightest].append(item)
        weight[lightest] += load[item]
    return packs


def model_greedy(load: Sequence[int | float], topology: Topology, num_groups: int, num_nodes: int) -> list[int]:
    """One layer of the greedy policy."""
    group_size = len(load) // num_groups
    group_load = [float(sum(load[g * group_size : (g + 1) * group_size])) for g in range(num_groups)]
    slots: list[int] = []
    for groups in model_pack(group_load, num_nodes):
        experts = [g * group_size + i for g in groups for i in range(group_size)]
        copies = model_replicate([load[e] for e in experts], topology.num_slots // num_nodes)
        share = [load[experts[i]] / copies.count(i) for i in copies]
        for rank in model_pack(share, topology.ep_size // num_nodes):
            slots.extend(experts[copies[item]] for item in rank)
    return slots


def model_slots(placement: Sequence[int], num_logical: int) -> list[list[int]]:
    """Ascending slots of every expert."""
    return [[slot for slot, held in enumerate(placement) if held == expert] for expert in range(num_logical)]


def model_rank_load(placement: Sequence[int], load: Sequence[int | float], topology: Topology) -> list[float]:
    """Tokens per rank when copies share equally."""
    ranks = [0.0] * topology.ep_size
    for slot, expert in enumerate(placement):
        if expert != EMPTY:
            ranks[slot // topology.slots_per_rank] += load[expert] / list(placement).count(expert)
    return ranks


def model_moved(old: Sequence[int], new: Sequence[int], topology: Topology) -> set[tuple[int, int]]:
    """The (rank, expert) pairs that a rank must receive."""
    before = {(slot // topology.slots_per_rank, expert) for slot, expert in enumerate(old)}
    after = {(slot // topology.slots_per_rank, expert) for slot, expert in enumerate(new) if expert != EMPTY}
    return after - before


def model_candidates(
    old: Sequence[int], new: Sequence[int], topology: Topology, live: set[int] | None = None
) -> dict[tuple[int, int], set[int]]:
    """For each (rank, expert) that must be received the ranks that may send it: of the same node if there are any."""
    live = set(range(topology.ep_size)) if live is None else live
    held: dict[int, set[int]] = {}
    for slot, expert in enumerate(old):
        if expert != EMPTY and slot // topology.slots_per_rank in live:
            held.setdefault(expert, set()).add(slot // topology.slots_per_rank)
    wanted = {
        (slot // topology.slots_per_rank, expert)
        for slot, expert in enumerate(new)
        if expert not in (EMPTY, old[slot]) and slot // topology.slots_per_rank not in held.get(expert, ())
    }
    candidates = {}
    for rank, expert in wanted:
        holders = held.get(expert, set())
        near = {r for r in holders if r // topology.ranks_per_node == rank // topology.ranks_per_node}
        candidates[rank, expert] = near or holders
    return candidates


def model_fewest_busiest(candidates: Sequence[set[int]]) -> int:
    """The fewest messages that the busiest sender can have, each message going to one of its candidates.

    Bipartite b-matching for growing capacities, with augmenting paths.
    """
    capacity = 0
    while True:
        sends: dict[int, list[int]] = {}
        if all(_assign(job, candidates, sends, capacity) for job in range(len(candidates))):
            return capacity
        capacity += 1


def _assign(job: int, candidates: Sequence[set[int]], sends: dict[int, list[int]], capacity: int) -> bool:
    """Give a job to a candidate below capacity, moving others along a shortest path of exchanges."""
    taken_from: dict[int, tuple[int, int | None]] = {rank: (job, None) for rank in sorted(candidates[job])}
    todo = deque(taken_from)
    while todo:
        rank = todo.popleft()
        if len(sends.setdefault(rank, [])) < capacity:
            while True:
                moved, origin = taken_from[rank]
                sends[rank].append(moved)
                if origin is None:
                    return True
                sends[origin].remove(moved)
                rank = origin
        for other in sends[rank]:
            for next_rank in sorted(candidates[other]):
                if next_rank not in taken_from:
                    taken_from[next_rank] = (other, rank)
                    todo.append(next_rank)
    return False


def model_apply(values: Sequence[Any], source: Sequence[int], fill: Any = EMPTY) -> list[Any]:
    """What each slot holds after a plan."""
    return [fill if src == EMPTY else values[src] for src in source]
