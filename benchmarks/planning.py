"""Planning beside the peers' own code, and beside a compiled sequential pass: medians of calls in turn, and ratios.

    python -m benchmarks.planning [--repeats N]

Loads are the synthetic drift of `benchmarks.traces`, without ties, which peers break arbitrarily. vLLM's times are
those of `DefaultEplbPolicy.rebalance_experts`, `compute_logical_maps`, `move_to_buffer` without tensors for one rank
and all layers, and `schedule_migration_batches_for_layers`, which chooses senders as well. SGLang's functions return
maps besides the placement; `deepseek_vec` spreads copies by another rule. The compiled pass is the same greedy as loops
with heaps, compiled by numba, on one core (`benchmarks/sequential.py`). Ours is NumPy only.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

from benchmarks import peers, sequential
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


class Goal(NamedTuple):
    """A ratio that is wanted: the peer's time over ours."""

    ours: str
    theirs: str
    at_least: float | None


GOALS = (
    Goal("greedy", "vLLM policy", 8),
    Goal("greedy", "SGLang deepseek", None),
    Goal("greedy", "SGLang deepseek_vec", None),
    Goal("derive_maps", "vLLM maps", 10),
    Goal("plan_moves, all ranks", "vLLM moves, one rank", 1),
    Goal("schedule_rounds, all layers", "vLLM batches", 10),
    Goal("schedule_rounds, layer by layer", "vLLM batches", 10),
    Goal("greedy, no previous", "compiled pass", None),
)


def medians(work: dict, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that noise hits all alike; one call each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if turn:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def distinct(load: np.ndarray) -> np.ndarray:
    """Loads without ties within a layer, in the same proportions: peers break ties by the whim of an unstable sort."""
    num_logical = load.shape[-1]
    last_digit = np.argsort(np.random.default_rng(0).random(load.shape), axis=-1)
    return load * num_logical + last_digit


class Problem:
    """One shape: two placements, and the work of both sides on them."""

    def __init__(self, num_layers, num_logical, num_slots, ep_size, num_nodes, num_groups):
        self.num_layers, self.num_logical = num_layers, num_logical
        self.topology = Topology(ep_size, num_slots // ep_size, num_nodes)
        self.first, self.now = distinct(drift(num_layers, num_logical, 2))
        self.start = round_robin(num_layers, num_logical, self.topology)
        # vLLM is hierarchical where groups split over nodes, so these sizes are the same for all.
        self.num_groups, self.num_nodes = num_groups, num_nodes
        self.held = rebalance(self.first, self.topology, previous=self.start, num_groups=num_groups)
        self.new = self.greedy(previous=self.held)
        self.plan = plan_moves(self.held, self.new, self.topology)

    def greedy(self, previous=None) -> np.ndarray:
        return rebalance(self.now, self.topology, policy="greedy", num_groups=self.num_groups, previous=previous)

    def ours(self) -> dict:
        """Our calls by name."""
        topology, groups = self.topology, self.num_groups
        return {
            "greedy": lambda: self.greedy(self.held),
            "greedy, no previous": self.greedy,
            "incremental, first plan": lambda: rebalance(self.first, topology, previous=self.start, num_groups=groups),
            "incremental, later plans": lambda: rebalance(self.now, topology, previous=self.held, num_groups=groups),
            "derive_maps": lambda: derive_maps(self.new, self.num_logical),
            "plan_moves, all ranks": lambda: plan_moves(self.held, self.new, topology),
            "schedule_rounds, all layers": lambda: schedule_rounds(self.plan, topology),
            "schedule_rounds, layer by layer": self.rounds_by_layer,
        }

    def rounds_by_layer(self) -> list[int]:
        """Rounds of each layer, when every layer is scheduled on its own."""
        layers = range(self.num_layers)
        return [schedule_rounds(self.plan, self.topology, layers=[layer]).num_rounds for layer in layers]

    def theirs(self) -> dict:
        """The peers' calls by name, and the compiled pass where numba is installed."""
        import torch

        slots, ep_size, per_rank = self.topology.num_slots, self.topology.ep_size, self.topology.slots_per_rank
        sizes, now = (self.num_groups, self.num_nodes), torch.from_numpy(self.now)
        hierarchical = self.num_groups % self.num_nodes == 0 and self.num_nodes > 1
        new = torch.from_numpy(self.new).long()
        batches = peers.vllm_schedule_migration_batches_for_layers()
        vllm = {"num_groups": self.num_groups, "num_nodes": self.num_nodes}
        calls = {
            "vLLM policy": lambda: peers.vllm_plan(self.now, slots, ep_size, previous=self.held, **vllm),
            "SGLang deepseek": lambda: peers.sglang_deepseek()(now, slots, *sizes, ep_size, hierarchical),
            "SGLang deepseek_vec": lambda: peers.sglang_deepseek_vec()(
                now[None], slots, per_rank, *sizes, hierarchical
            ),
            "vLLM maps": lambda: peers.vllm_compute_logical_maps()(new, self.num_logical),
            "vLLM moves, one rank": lambda: [
                peers.vllm_plan_rank(*rows, per_rank, 0) for rows in zip(self.held, self.new, strict=True)
            ],
            "vLLM batches": lambda: batches(per_rank, self.held, self.new),
        }
        if sequential.available():
            place, load = sequential.compiled(), self.now.astype(np.float64)
            node_sizes = sizes if hierarchical else (1, 1)
            calls["compiled pass"] = lambda: place(load, slots, ep_size, *node_sizes)
        return calls

    def placed_alike(self, theirs: dict) -> dict[str, str]:
        """In how many layers each peer's placement is ours, slot for slot."""
        alone = self.greedy()
        pairs = {"vLLM policy": (theirs["vLLM policy"](), self.new)}
        pairs["SGLang deepseek"] = (theirs["SGLang deepseek"]()[0].numpy(), alone)
        if "compiled pass" in theirs:
            pairs["compiled pass"] = (theirs["compiled pass"](), alone)
        return {name: f"{(a == b).all(axis=1).sum()} of {len(a)}" for name, (a, b) in pairs.items()}


def label(shape) -> str:
    """A shape as it is written in tables."""
    return "{}x{} / {} / {}".format(*shape)


def measure(shape, repeats: int) -> tuple[dict[str, float], list[int], dict[str, str]]:
    """Milliseconds of every call; rounds: ours for all layers, ours by layer added up, vLLM's; layers placed alike."""
    problem = Problem(*shape)
    theirs = problem.theirs()
    own, batches = problem.rounds_by_layer(), [len(layer) for layer in theirs["vLLM batches"]()]
    if any(ours > peer for ours, peer in zip(own, batches, strict=True)):
        raise SystemExit("vLLM needs fewer rounds")
    rounds = [schedule_rounds(problem.plan, problem.topology).num_rounds, sum(own), sum(batches)]
    return medians(theirs | problem.ours(), repeats), rounds, problem.placed_alike(theirs)


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdict(taken: dict[str, dict[str, float]]) -> str:
    """Which goals are met, and by how much others are missed."""
    lines = []
    for ours, theirs, at_least in GOALS:
        if at_least is None:
            continue
        ratios = {shape: times[theirs] / times[ours] for shape, times in taken.items()}
        missed = [f"{ratio:.1f} at {shape}" for shape, ratio in ratios.items() if ratio < at_least]
        found = f"missed: {', '.join(missed)}" if missed else f"met, at least {min(ratios.values()):.1f}"
        lines.append(f"* `{ours}` at least {at_least}x as fast as {theirs}: {found}.")
    return "\n".join(lines)


def report(repeats: int = 9) -> str:
    """Ratios, goals, rounds and milliseconds of all shapes."""
    taken, rounds, alike = {}, [], {}
    for shape in SHAPES:
        taken[label(shape)], counts, alike[label(shape)] = measure(shape, repeats)
        rounds.append([label(shape), *counts])
    shown = [goal for goal in GOALS if all(goal.theirs in times for times in taken.values())]
    shapes = list(taken)
    head = "layers x experts / slots / ranks"
    ratios = table(
        ["ours", "against", *shapes],
        [
            [ours, theirs, *(f"{times[theirs] / times[ours]:.2f}" for times in taken.values())]
            for ours, theirs, _ in shown
        ],
    )
    names = next(iter(taken.values()))
    milliseconds = table(["ms", *shapes], [[name, *(f"{t[name]:.2f}" for t in taken.values())] for name in names])
    texts = [
        f"How many times as fast as the peer ours is, by {head}. Where the number is below 1, ours is slower.",
        ratios,
        "" if sequential.available() else "numba is not installed, so there is no compiled pass.",
        "Layers that are placed like the peer, slot for slot. Peers compute in float32, where loads that differ in "
        "float64 may be equal.",
        table(["", *shapes], [[peer, *(found[peer] for found in alike.values())] for peer in alike[shapes[0]]]),
        "Goals:",
        verdict(taken),
        "Rounds. One schedule for all layers joins what two ranks exchange in any of them; layer by layer is vLLM's "
        "way, and never takes more rounds than vLLM in any layer.",
        table([head, "ours, all layers", "ours, layer by layer", "vLLM, layer by layer"], rounds),
        milliseconds,
    ]
    return "\n\n".join(text for text in texts if text)


READING = """
`schedule_rounds` for single layers is a call per layer, with checks of its own and a colouring loop in Python, which
misses the goal; whoever schedules the layers of a rebalance together, as the executor does within its staging memory,
gets the other figure. `incremental` takes longer than `greedy` as it searches, and for the first plan of a placement
about as long as vLLM's policy. Where the compiled pass is faster than ours, that is the price of NumPy: it is the lower
limit for the same decisions made one after another.
"""


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    print(report(parser.parse_args().repeats))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
