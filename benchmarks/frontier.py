"""Balance against moves: replay loads window by window, plan on one and judge on the next.

    python -m benchmarks.frontier [--plot FILE.png] [--all]

Every planner starts from the round-robin placement; the first plan counts. Moved experts are (layer, rank, expert)
that a rank must receive. `--all` adds SwiftBalancer and FlashLB (slow), `--plot` sweeps the tolerance.
"""

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks import peers
from benchmarks.page import printed
from benchmarks.traces import FOLDER, Case, cases
from eplb_core import Topology, balancedness, load_bound, moved_experts, rank_load, rebalance, round_robin

Planner = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Replay(NamedTuple):
    """What a planner did with a trace."""

    next_balancedness: float
    same_balancedness: float
    moved: int
    seconds: float


def replay(case: Case, topology: Topology, plan: Planner) -> Replay:
    """Plan on every window but the last; mean balancedness over layers and windows."""
    held = round_robin(*case.load.shape[1:], topology)
    moved, seconds, same, following = 0, [], [], []
    for now, then in zip(case.load[:-1], case.load[1:], strict=True):
        start = time.perf_counter()
        new = plan(now, held)
        seconds.append(time.perf_counter() - start)
        moved += int(moved_experts(held, new, topology).sum())
        same.append(balancedness(new, now, topology).mean())
        following.append(balancedness(new, then, topology).mean())
        held = new
    return Replay(float(np.mean(following)), float(np.mean(same)), moved, float(np.median(seconds)))


def planners(topology: Topology, *, slow: bool = False) -> dict[str, Planner]:
    """Ours and the peers', each as `(load, previous) -> placement`."""
    sizes = topology.num_slots, topology.ep_size

    def vllm(load, previous):
        return peers.vllm_plan(load, *sizes, previous=previous).astype(np.int32)

    def ours(policy, **options):
        return lambda load, previous: rebalance(load, topology, policy=policy, previous=previous, **options)

    found = {"vLLM default": vllm, "greedy": ours("greedy"), "refined": ours("refined")}
    found |= {"incremental": ours("incremental"), "incremental, tolerance 0.02": ours("incremental", tolerance=0.02)}
    if slow:
        swift, flashlb = peers.ascend_swift(), peers.ascend_flashlb(topology.ep_size)

        def swift_plan(load, previous):
            return peers.swift_plan(swift, load, topology.ep_size, previous).astype(np.int32)

        def flashlb_plan(load, previous):
            return peers.flashlb_plan(flashlb, load[None], topology.ep_size, previous).astype(np.int32)

        found["SwiftBalancer"] = swift_plan
        if importlib.util.find_spec("numba"):  # plain Python takes minutes per plan
            found["FlashLB"] = flashlb_plan
    return found


def gap_to_bound(case: Case, topology: Topology, windows: int = 3) -> str:
    """Refined's distance to the lower bound on the planned window, as a share of greedy's."""
    shares = []
    for load in case.load[:windows]:
        bound = load_bound(load, topology)
        gap = {
            policy: (rank_load(rebalance(load, topology, policy=policy), load, topology).max(axis=1) / bound - 1).mean()
            for policy in ("greedy", "refined")
        }
        shares.append(gap["refined"] / gap["greedy"])
    return f"{np.mean(shares):.1%}"


def table(slow: bool) -> None:
    """Print every case, as a Markdown table."""
    print("| trace | ranks, redundant | policy | balancedness | against vLLM | moved, share of vLLM's | ms per plan |")
    print("|---|---|---|---|---|---|---|")
    gaps = []
    for case in cases():
        topology = Topology.from_experts(case.load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        base = None
        for name, plan in planners(topology, slow=slow).items():
            if name == "refined" and case.ep_size > 32:
                continue
            result = replay(case, topology, plan)
            base = base or result
            print(
                f"| {case.name} | {case.ep_size}, {case.num_redundant} | {name} | {result.next_balancedness:.4f} "
                f"| {result.next_balancedness - base.next_balancedness:+.4f} | {result.moved / base.moved:.1%} "
                f"| {result.seconds * 1e3:.1f} |",
                flush=True,
            )
        gaps.append(f"{case.name}, {case.ep_size} ranks: {gap_to_bound(case, topology)}")
    print("\nRefined's distance to the lower bound, as a share of greedy's, on the planned window:\n")
    print("\n".join(f"* {line}" for line in gaps))


def plot(path: str) -> None:
    """Draw balancedness over moves per case, sweeping how much imbalance is accepted."""
    import matplotlib.pyplot as plt

    module = importlib.import_module("eplb_core.policies.incremental")

    chosen = [case for case in cases() if "0.03" not in case.name and "no noise" not in case.name]
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.4 * len(chosen), 3.4), layout="constrained")
    for axis, case in zip(np.atleast_1d(axes), chosen, strict=True):
        topology = Topology.from_experts(case.load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        base = replay(case, topology, planners(topology)["vLLM default"])
        frontier = []
        default = module.CAUTION
        for caution in (0.15, 0.3, default, 0.8, 1.1, 1.5):
            module.CAUTION = caution
            frontier.append(replay(case, topology, partial(_incremental, topology)))
        module.CAUTION = default
        moved = [result.moved / base.moved * 100 for result in frontier]
        axis.plot(moved, [r.next_balancedness for r in frontier], "o-", color="#0072B2", label="incremental")
        axis.plot(moved[2], frontier[2].next_balancedness, "o", ms=11, mfc="none", mec="#0072B2", label="its default")
        axis.plot(100, base.next_balancedness, "s", color="#D55E00", label="vLLM 0.32 default")
        swift = replay(case, topology, planners(topology, slow=True)["SwiftBalancer"])
        axis.plot(swift.moved / base.moved * 100, swift.next_balancedness, "^", color="#009E73", label="SwiftBalancer")
        axis.axhline(base.next_balancedness, color="0.8", zorder=0)
        axis.set(
            title=f"{case.name}\n{case.ep_size} ranks, {case.num_redundant} redundant", xlabel="moved, % of vLLM's"
        )
        axis.title.set_fontsize(9)
        axis.set_xscale("log")
        axis.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("balancedness on the next window")
    np.atleast_1d(axes)[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def _incremental(topology: Topology, load, previous):
    return rebalance(load, topology, previous=previous)


def main() -> None:
    """Print the table, or draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the frontier instead of printing the table")
    parser.add_argument("--all", action="store_true", help="SwiftBalancer and FlashLB as well")
    options = parser.parse_args()
    if not FOLDER.exists():
        print(f"Recorded traces are not in {FOLDER} (set EPLB_TRACES); replaying synthetic ones only.\n")
    if options.plot:
        plot(options.plot)
    else:
        table(options.all)


READING = """
Lost: where windows have no noise, so that the next is nearly the last, `incremental` balances the next window a little
less well than vLLM, by the moves that it saves; `refined` takes several times as long as vLLM.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
