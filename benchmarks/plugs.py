"""What the plugs change inside vLLM 0.32 and SGLang 0.5.23: their own planners against ours, window by window.

Every planner starts from the placement its engine starts from, and plans each window from its own last placement.
The first plan is left out of all figures.

python -m benchmarks.plugs
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import peers
from benchmarks.page import printed
from benchmarks.traces import cases
from eplb_core import Topology, model_balancedness, moved_experts, round_robin
from eplb_torch.integrations import sglang, vllm

Plan = Callable[[torch.Tensor, torch.Tensor, Topology], torch.Tensor]


def planners() -> dict[str, Plan]:
    """Each planner as `(load, placement, topology) -> placement`, called as its engine calls it."""

    def by_vllm(policy) -> Plan:
        def plan(load, held, topology):
            return policy.rebalance_experts(load, topology.num_slots, 1, 1, topology.ep_size, held)

        return plan

    def by_sglang(function) -> Plan:
        def plan(load, held, topology):
            algorithm = SimpleNamespace(name="deepseek")
            return function(held, load[None], topology.num_slots, topology.slots_per_rank, 1, 1, algorithm)[0]

        return plan

    deepseek = peers.sglang_deepseek()
    return {
        "vLLM default": by_vllm(peers.vllm_policy()),
        "vLLM + plug": by_vllm(vllm.make_policy()),
        "SGLang deepseek": by_sglang(
            lambda held, load, slots, per_rank, *_: deepseek(load.sum(0), slots, 1, 1, slots // per_rank, False)
        ),
        "SGLang + plug": by_sglang(lambda held, *rest: sglang.make_planner(placement=lambda: held)(*rest)),
    }


def replay(load: np.ndarray, topology: Topology, plans: dict[str, Plan]) -> dict[str, np.ndarray]:
    """Per planner: milliseconds, slots changed and experts received per layer, balancedness on the next window."""
    start = torch.from_numpy(round_robin(load.shape[1], load.shape[2], topology)).long()
    held, figures = dict.fromkeys(plans, start), {name: [] for name in plans}
    for now, following in zip(load, load[1:], strict=False):
        for name, plan in plans.items():
            begin = time.perf_counter()
            new = plan(torch.from_numpy(now), held[name], topology)
            taken = (time.perf_counter() - begin) * 1e3
            changed = (new != held[name]).sum().item() / len(new)
            moved = moved_experts(held[name].numpy(), new.numpy(), topology).mean()
            balance = float(model_balancedness(new.numpy(), following, topology))
            figures[name].append((taken, changed, moved, balance))
            held[name] = new
    return {
        name: np.asarray([statistics.median(row[0] for row in rows[1:]), *np.mean(rows[1:], axis=0)[1:]])
        for name, rows in figures.items()
    }


def main() -> None:
    """Print one table per engine."""
    plans = planners()
    print("| trace | ranks, redundant | planner | ms | slots changed | experts received | balancedness |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        topology = Topology.from_experts(case.load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        for name, (taken, changed, moved, balance) in replay(case.load, topology, plans).items():
            where = f"{case.name} | {case.ep_size}, {case.num_redundant}"
            print(f"| {where} | {name} | {taken:.0f} | {changed:.1f} | {moved:.1f} | {balance:.3f} |", flush=True)


READING = """
Lost: for few experts and ranks SGLang's own planner is faster than the plug, which searches for few moves. Without
noise the plug balances the next window a little less well, by the moves that it saves.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
