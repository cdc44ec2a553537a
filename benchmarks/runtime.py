"""The runtime: what a step costs on which nothing happens, and what rebalancing costs over a recorded trace.

    python -m benchmarks.runtime

**Total cost** is the time that serving would lose if all of it stood still for rebalancing: planning the placement and
the moves (measured here, in turn with the peer's), and moving (priced by `migration_cost` at the bandwidth below, for
both sides alike). vLLM rebalances after every window with its default policy; its time is that of its released
`rebalance_experts`, `compute_logical_maps` and, for one rank, `move_to_buffer` without tensors. Ours decides after
every second window with the gate of `ExpertBalancer(seconds_per_token=...)`, on an estimate with a half-life of half a
window. Both start from the round-robin placement and are judged on every next window. A window of the trace stands for
3000 steps of 64 tokens on each rank.
"""

import time
from statistics import median

import numpy as np
import torch

from benchmarks import peers
from benchmarks.page import printed
from benchmarks.traces import FOLDER, cases
from eplb_core import Topology, balancedness, control, derive_maps, moved_experts, round_robin
from eplb_core.control import ControlConfig, ModelConfig, Reason
from eplb_core.costs import Costs, Links, migration_cost
from eplb_core.load import exponential_decay
from eplb_torch import DeviceMaps, ExpertBalancer, ExpertWeights, InProcessWorld, LiveModel

STEPS, TOKENS_PER_STEP = 3000, 64
LINKS = Links(within_node=40e9, across_nodes=40e9, latency=50e-6)
# Bytes of an expert in one layer, and FLOPs for one token in it.
MODELS = {
    "ESFT, DeepSeek-V2-Lite": (3 * 2048 * 1408 * 2, 6 * 2048 * 1408, 6),
    "gpt-oss-20b by subject": (13_219_200, 6 * 2880**2, 4),
}
FLOPS = 440e12
HEADER = "| trace, ranks | | balancedness | rebalances | moved experts | planning s | moving s | total s | ratio |"


def idle_step(layers: int = 58, logical: int = 256, repeats: int = 2000) -> tuple[float, float, float]:
    """Median microseconds of `step` with nothing to do: without load, with load, and of the bare addition."""
    topology = Topology.from_experts(logical, 1)
    placement = round_robin(layers, logical, topology)
    weights = ExpertWeights([{"w": torch.zeros(logical, 1)} for _ in range(layers)])
    model = LiveModel(weights, DeviceMaps(placement, logical), topology, placement)
    config = {"step_interval": 10**9, "window_size": 10**9}
    balancer = ExpertBalancer(model, InProcessWorld(1).transport(0), config)
    load, total = (torch.ones(layers, logical, dtype=torch.int64) for _ in range(2))
    calls = (lambda: balancer.step(None), lambda: balancer.step(load), lambda: total.add_(load))
    times = [[], [], []]
    for _ in range(repeats):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    without, with_load, bare = (median(spent) * 1e6 for spent in times)
    return without, with_load, bare


class Side:
    """One of the two, as it goes through a trace."""

    def __init__(self, placement: np.ndarray):
        self.held = placement
        self.planning = self.moving = 0.0
        self.moved = self.rebalances = 0
        self.balance: list[float] = []

    def take(self, new: np.ndarray, planning: float, topology: Topology, costs: Costs) -> None:
        """Move to a placement, at its price."""
        self.planning += planning
        self.moving += migration_cost(self.held, new, topology, costs).seconds
        self.moved += int(moved_experts(self.held, new, topology).sum())
        self.rebalances += 1
        self.held = new

    @property
    def seconds(self) -> float:
        """Total cost."""
        return self.planning + self.moving


def replay(case, topology: Topology, costs: Costs) -> tuple[Side, Side]:
    """vLLM's cadence and ours, window by window."""
    start = round_robin(*case.load.shape[1:], topology)
    theirs, ours = Side(start), Side(start)
    model = ModelConfig(topology, case.load.shape[2], estimator=exponential_decay(0.5), costs=costs)
    config = ControlConfig({"main": model}, interval=2, first=1, window=1)
    state = control.init(config, {"main": start})
    for now, then in zip(case.load[:-1], case.load[1:], strict=True):
        _vllm(theirs, now, topology, costs)
        state = _controlled(ours, config, control.observe(config, state, {"main": now}), topology, costs)
        for side in (theirs, ours):
            side.balance.append(float(balancedness(side.held, then, topology).mean()))
    return theirs, ours


def _vllm(side: Side, load: np.ndarray, topology: Topology, costs: Costs) -> None:
    begun = time.perf_counter()
    new = peers.vllm_plan(load, topology.num_slots, topology.ep_size, previous=side.held)
    for old_row, new_row in zip(side.held.astype(np.int64), new, strict=True):
        peers.vllm_plan_rank(old_row, new_row, topology.slots_per_rank, 0)
    peers.vllm_compute_logical_maps()(torch.from_numpy(new), load.shape[1])
    side.take(new.astype(np.int32), time.perf_counter() - begun, topology, costs)


def _controlled(side: Side, config: ControlConfig, state, topology: Topology, costs: Costs):
    begun = time.perf_counter()
    decisions = control.decide(config, state)
    decision = decisions["main"]
    if decision.reason is Reason.REBALANCE:
        derive_maps(decision.placement, config.models["main"].num_logical)
    spent = time.perf_counter() - begun
    state = control.adopt(config, state, decisions)
    if decision.reason is not Reason.REBALANCE:
        side.planning += spent
        return state
    side.take(decision.placement, spent, topology, costs)
    return control.commit(config, state, "main")


def main() -> None:
    """Print both tables."""
    without, with_load, bare = idle_step()
    print(
        f"A step on which nothing happens, 58 layers x 256 experts: {without:.1f} us without load, {with_load:.1f} us"
    )
    print(f"with one, of which adding it up takes {bare:.1f} us.\n")
    if not FOLDER.exists():
        print(f"Recorded traces are not in {FOLDER} (set EPLB_TRACES).")
        return
    print(HEADER + "\n" + "|---" * HEADER.count(" | ") + "|---|")
    for case in (case for case in cases() if case.name in MODELS):
        row_bytes, flops, topk = MODELS[case.name]
        topology = Topology.from_experts(case.load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        tokens = case.load.sum(axis=2).mean() / topk
        scale = STEPS * TOKENS_PER_STEP * case.ep_size / tokens
        theirs, ours = replay(case, topology, Costs(row_bytes, flops / FLOPS, scale, LINKS))
        for name, side in (("vLLM 0.32, every window", theirs), ("gate", ours)):
            counts = f"{np.mean(side.balance):.4f} | {side.rebalances} | {side.moved}"
            seconds = f"{side.planning:.3f} | {side.moving:.3f} | {side.seconds:.3f}"
            ratio = f"{theirs.seconds / side.seconds:.1f}x"
            print(f"| {case.name}, {case.ep_size} | {name} | {counts} | {seconds} | {ratio} |", flush=True)


READING = """
Moving is priced, not measured, and planning is measured once per window, so that a busy machine disturbs it: in one run
of two, planning for the last trace took nine times as long, and its ratio was 0.7.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
