"""Plain-Python models to compare with, written for reading: lists, loops and no code of the library."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from eplb_core._checks import EMPTY
from eplb_core.topology import Topology


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
