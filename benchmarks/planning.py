"""Planning time against vLLM 0.32's default policy, one run, interleaved; medians and their ratio.

python -m benchmarks.planning [--repeats N]
"""

import argparse
import statistics
import time

import numpy as np

from benchmarks import peers
from benchmarks.traces import drift
from eplb_core import Topology, derive_maps, plan_moves, rebalance, round_robin, schedule_rounds

# layers, experts, slots, ranks, nodes, groups
SHAPES = [
    (58, 256, 288, 32, 4, 8),
    (58, 256, 320, 64, 16, 8),
    (94, 128, 160, 32, 1, 1),
    (61, 384, 512, 128, 1, 1),
    (94, 512, 1024, 256, 1, 1),
]


def medians(work: dict, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that noise hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def jobs(num_layers, num_logical, num_slots, ep_size, num_nodes, num_groups) -> dict:
    """Ours and vLLM's work for one shape, on drifting loads."""
    topology = Topology(ep_size, num_slots // ep_size, num_nodes)
    first, now = drift(num_layers, num_logical, 2)
    start = round_robin(num_layers, num_logical, topology)
    # vLLM is hierarchical where groups split over nodes; `incremental` is timed in the same mode.
    held = rebalance(first, topology, previous=start, num_groups=num_groups)
    new = rebalance(now, topology, policy="greedy", num_groups=num_groups, previous=held)
    plan = plan_moves(held, new, topology)
    sizes = {"num_groups": num_groups, "num_nodes": num_nodes}
    batches = peers.vllm_schedule_migration_batches_for_layers()

    def vllm_maps():
        import torch

        peers.vllm_compute_logical_maps()(torch.from_numpy(new).long(), num_logical)

    def vllm_moves_of_one_rank():
        for layer in range(num_layers):
            peers.vllm_plan_rank(held[layer], new[layer], topology.slots_per_rank, 0)

    return {
        "vLLM policy": lambda: peers.vllm_plan(now, num_slots, ep_size, previous=held, **sizes),
        "greedy": lambda: rebalance(now, topology, policy="greedy", num_groups=num_groups, previous=held),
        "incremental, first plan": lambda: rebalance(first, topology, previous=start, num_groups=num_groups),
        "incremental, later plans": lambda: rebalance(now, topology, previous=held, num_groups=num_groups),
        "incremental, global": lambda: rebalance(now, topology, previous=held, hierarchy="global"),
        "vLLM maps": vllm_maps,
        "derive_maps": lambda: derive_maps(new, num_logical),
        "vLLM moves, one rank": vllm_moves_of_one_rank,
        "plan_moves, all ranks": lambda: plan_moves(held, new, topology),
        "vLLM batches": lambda: batches(topology.slots_per_rank, held, new),
        "schedule_rounds, layer by layer": lambda: [
            schedule_rounds(plan, topology, layers=[layer]) for layer in range(num_layers)
        ],
    }


REFERENCES = ("vLLM policy", "vLLM maps", "vLLM moves, one rank", "vLLM batches")


def main() -> None:
    """Print one Markdown table for all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print("| layers x experts / slots / ranks | what | ms | against | times faster |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        taken = medians(jobs(*shape), repeats)
        label = "{}x{} / {} / {}".format(*shape)
        reference = ""
        for name, milliseconds in taken.items():
            if name in REFERENCES:
                reference = name
            ratio = taken[reference] / milliseconds
            print(f"| {label} | {name} | {milliseconds:.1f} | {reference} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
