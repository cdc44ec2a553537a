"""The greedy placement as one compiled sequential pass: how fast the same decisions could be made on one core.

It needs numba. Expert by expert and copy by copy, with a heap of the lightest packs and one of the hottest experts.
"""

import heapq
from collections.abc import Callable
from functools import cache

import numpy as np


def available() -> bool:
    """Whether numba is installed."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def compiled() -> Callable:
    """`(load float64 [layers, logical], num_slots, ep_size, num_groups, num_nodes) -> int32 [layers, slots]`."""
    from numba import njit

    pack, replicate = njit(_pack), njit(_replicate)

    @njit
    def place(load, num_slots, ep_size, num_groups, num_nodes):
        num_layers, num_logical = load.shape
        group_size, node_experts = num_logical // num_groups, num_logical // num_nodes
        node_slots = num_slots // num_nodes
        placed = np.empty((num_layers, num_slots), dtype=np.int32)
        for layer in range(num_layers):
            group_load = np.zeros(num_groups)
            for expert in range(num_logical):
                group_load[expert // group_size] += load[layer, expert]
            groups = pack(group_load, num_nodes)
            for node in range(num_nodes):
                experts = np.empty(node_experts, dtype=np.int32)
                for place in range(node_experts):
                    group = groups[node * (num_groups // num_nodes) + place // group_size]
                    experts[place] = group * group_size + place % group_size
                node_load = load[layer][experts]
                copy_expert, copies = replicate(node_load, node_slots)
                share = np.empty(node_slots)
                for copy in range(node_slots):
                    share[copy] = node_load[copy_expert[copy]] / copies[copy_expert[copy]]
                packed = pack(share, ep_size // num_nodes)
                for slot in range(node_slots):
                    placed[layer, node * node_slots + slot] = experts[copy_expert[packed[slot]]]
        return placed

    return place


def _pack(load, num_packs):
    """The item in each place; heaviest first into the lightest pack with room, ties to the lowest."""
    room = load.size // num_packs
    packed = np.arange(load.size)
    if room == 1:
        return packed
    filled = np.zeros(num_packs, dtype=np.int64)
    lightest = [(0.0, pack) for pack in range(num_packs)]
    for item in np.argsort(-load, kind="mergesort"):
        pack_load, pack = heapq.heappop(lightest)
        packed[pack * room + filled[pack]] = item
        filled[pack] += 1
        if filled[pack] < room:
            heapq.heappush(lightest, (pack_load + load[item], pack))
    return packed


def _replicate(load, num_slots):
    """The expert of each copy, and how many copies each has; the next copy to the largest load per copy."""
    copies = np.ones(load.size, dtype=np.int64)
    expert = np.arange(num_slots)
    hottest = [(-load[one], one) for one in range(load.size)]
    heapq.heapify(hottest)
    for copy in range(load.size, num_slots):
        one = hottest[0][1]
        expert[copy] = one
        copies[one] += 1
        heapq.heapreplace(hottest, (-load[one] / copies[one], one))
    return expert, copies
