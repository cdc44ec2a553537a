"""Losing, adding and spreading ranks: transfers and balance, beside what SGLang's released planner does.

    python -m benchmarks.elastic [--quick] [--plot FILE]

Loads are the synthetic drift of `benchmarks.traces`, 58 layers of 256 experts, with 32 redundant slots. Plans are
made on one window and judged on it and on the next. An orphan is an expert of a layer whose last copy was on the lost
rank. Somebody must receive it, whatever the plan, so moves are given as a multiple of the orphans.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from benchmarks import peers, released
from benchmarks.page import printed
from benchmarks.traces import drift
from eplb_core import EMPTY, Topology, balancedness, model_balancedness, moved_experts, rebalance
from eplb_core.elastic import grow, lose_ranks
from eplb_core.elastic.survive import dry_run, survivable
from eplb_core.plots.losses import losses as draw_losses
from eplb_core.plots.style import save

RANKS, REDUNDANT = 32, 32


@cache
def sglang_elasticity_aware() -> Callable:
    """SGLang's `rebalance_experts`, which takes the active ranks as a mask after the arguments of DeepSeek's."""
    names = [f"sglang.srt.eplb.eplb_algorithms.{name}" for name in ("deepseek", "elasticity_aware")]
    return released.load(released.fetch(*peers.SGLANG), names)[1].rebalance_experts


def sglang_plan(load: np.ndarray, topology: Topology, dead: int) -> np.ndarray:
    """What SGLang puts on the ranks that are left, `[layers, slots]`."""
    import torch

    active = torch.ones(topology.ep_size, dtype=torch.int32)
    active[dead] = 0
    tokens = torch.from_numpy(load)
    placed, _, _ = sglang_elasticity_aware()(tokens, topology.num_slots, 1, 1, topology.ep_size, False, active)
    return without(placed.numpy().astype(np.int32), topology, dead)


def without(placement: np.ndarray, topology: Topology, rank: int) -> np.ndarray:
    """The slots of all ranks but one."""
    by_rank = placement.reshape(len(placement), topology.ep_size, -1)
    return np.delete(by_rank, rank, axis=1).reshape(len(placement), -1)


def losses(load: np.ndarray, dead_ranks: list[int]) -> None:
    """Print moves and balance after the loss of one rank."""
    topology = Topology.from_experts(load.shape[2], RANKS, num_redundant=REDUNDANT)
    after = Topology(RANKS - 1, topology.slots_per_rank)
    now, then = load[:2]

    def ours(share):
        return lambda held, dead, orphans: (
            lose_ranks(held, now, topology, [dead], max_extra_moves=int(share * orphans)).placement
        )

    planners = {
        "lose_ranks, no extra moves": ours(0.0),
        "lose_ranks, a tenth more (default)": ours(0.1),
        "lose_ranks, as many again": ours(1.0),
        "rebalance, incremental": lambda held, dead, _: rebalance(now, after, previous=without(held, topology, dead)),
        "SGLang elasticity_aware": lambda held, dead, _: sglang_plan(now, topology, dead),
    }
    sglang_elasticity_aware()
    print("| placement | plan | moves / orphans | balancedness, same window | next window | plan, ms |")
    print("|---|---|---|---|---|---|")
    for policy in ("greedy", "incremental"):
        held = rebalance(now, topology, policy=policy)
        before = [balancedness(held, window, topology).mean() for window in (now, then)]
        print(f"| {policy} | before the loss | | {before[0]:.3f} | {before[1]:.3f} | |")
        for name, plan in planners.items():
            rows = []
            for dead in dead_ranks:
                kept = without(held, topology, dead)
                orphans = sum(load.shape[2] - len(set(row)) for row in kept.tolist())
                start = time.perf_counter()
                placed = plan(held, dead, orphans)
                seconds = time.perf_counter() - start
                moved = int(moved_experts(kept, placed, after).sum())
                balance = [balancedness(placed, window, after).mean() for window in (now, then)]
                rows.append((moved / orphans, *balance, seconds * 1e3))
            ratio, same, following, _ = np.mean(rows, axis=0)
            worst = max(row[0] for row in rows)
            milliseconds = np.median([row[3] for row in rows])
            print(
                f"| {policy} | {name} | {ratio:.2f} (most {worst:.2f}) | {same:.3f} | {following:.3f} "
                f"| {milliseconds:.0f} |",
                flush=True,
            )


def growth(load: np.ndarray) -> None:
    """Print moves and balance after ranks have joined."""
    topology = Topology.from_experts(load.shape[2], RANKS, num_redundant=REDUNDANT)
    now, then = load[:2]
    held = rebalance(now, topology)
    print("| ranks | plan | experts moved | new slots | balancedness, same window | next window |")
    print("|---|---|---|---|---|---|")
    for more in (1, 8):
        after = Topology(RANKS + more, topology.slots_per_rank)
        slots = len(now) * more * topology.slots_per_rank
        plans = {
            f"grow, {'no extra moves' if extra == 0 else 'a tenth more'}": grow(
                held, now, topology, after, max_extra_moves=extra
            )
            for extra in (0, None)
        }
        old = next(iter(plans.values())).old
        placements = {name: plan.placement for name, plan in plans.items()}
        placements["rebalance, incremental"] = rebalance(now, after, previous=old)
        placements["rebalance, greedy"] = rebalance(now, after, previous=old, policy="greedy")
        for name, placed in placements.items():
            balance = [balancedness(placed, window, after).mean() for window in (now, then)]
            moved = int(moved_experts(old, placed, after).sum())
            print(
                f"| {RANKS} + {more} | {name} | {moved} | {slots} | {balance[0]:.3f} | {balance[1]:.3f} |", flush=True
            )


def spreading(load: np.ndarray) -> None:
    """Print what `spread="node"` costs, and what it saves."""
    print("| nodes | policy | spread | same window | next window | moves per window | experts lost with a node |")
    print("|---|---|---|---|---|---|---|")
    for num_nodes, policy in itertools.product((2, 4), ("greedy", "incremental")):
        topology = Topology.from_experts(load.shape[2], RANKS, num_redundant=REDUNDANT, num_nodes=num_nodes)
        for spread in (None, "node"):
            held, rows = None, []
            for now, then in itertools.pairwise(load):
                new = rebalance(now, topology, policy=policy, previous=held, spread=spread)
                moved = 0 if held is None else int(moved_experts(held, new, topology).sum())
                rows.append((*(balancedness(new, window, topology).mean() for window in (now, then)), moved))
                held = new
            same, following, _ = np.mean(rows, axis=0)
            moved = np.mean([row[2] for row in rows[1:]])
            lost = np.mean([len(gone) for gone in survivable(held, topology).lost_with_node])
            print(
                f"| {num_nodes} | {policy} | {spread} | {same:.3f} | {following:.3f} | {moved:.0f} | {lost:.0f} |",
                flush=True,
            )


def gap_to_optimum(num_cases: int) -> None:
    """Print how near the busiest rank is to the best of all placements with the fewest moves, on small cases."""
    rng = np.random.default_rng(0)
    ratios = []
    while len(ratios) < num_cases:
        topology = Topology(int(rng.integers(3, 5)), int(rng.integers(2, 4)))
        num_logical = int(rng.integers(3, (topology.ep_size - 1) * topology.slots_per_rank))
        tokens = rng.poisson(np.exp(rng.normal(size=num_logical)) * 100)
        spare = rng.integers(0, num_logical, topology.num_slots - num_logical)
        held = rng.permutation(np.concatenate([np.arange(num_logical), spare])).astype(np.int32)
        plan = lose_ranks(held[None], tokens[None], topology, [0], max_extra_moves=0)
        if plan.num_moves > 1:
            best = _best_busiest(plan.old[0].tolist(), tokens, plan.topology)
            ratios.append(_busiest(plan.placement[0].tolist(), tokens, plan.topology) / best)
    optimal = np.mean(np.asarray(ratios) < 1 + 1e-9)
    print(
        f"{num_cases} random cases of two orphans or more, by brute force over all placements with the fewest moves: "
        f"the busiest rank is as light as possible in {optimal:.0%}, {np.mean(ratios) - 1:.1%} heavier on average, "
        f"{np.max(ratios) - 1:.0%} at most."
    )


def _busiest(row: list[int], tokens: np.ndarray, topology: Topology) -> float:
    copies = np.bincount([e for e in row if e != EMPTY], minlength=len(tokens))
    each = [0.0 if e == EMPTY else tokens[e] / copies[e] for e in row]
    return max(np.reshape(each, (topology.ep_size, -1)).sum(axis=1))


def _best_busiest(kept: list[int], tokens: np.ndarray, topology: Topology) -> float:
    """The lightest busiest rank of all placements in which each orphan takes one slot and all else stays."""
    orphans = sorted(set(range(len(tokens))) - set(kept))
    best = np.inf
    for slots in itertools.permutations(range(len(kept)), len(orphans)):
        row = list(kept)
        for slot, orphan in zip(slots, orphans, strict=True):
            row[slot] = orphan
        if len(set(row) - {EMPTY}) == len(tokens):
            best = min(best, _busiest(row, tokens, topology))
    return best


def plot(path: str) -> None:
    """Draw what each possible loss of a rank would lead to."""
    now = drift(num_windows=1)[0]
    topology = Topology.from_experts(now.shape[1], RANKS, num_redundant=REDUNDANT)
    held = rebalance(now, topology)
    before = float(model_balancedness(held, now, topology))
    title = (
        f"{len(now)} layers of {now.shape[1]} experts, {REDUNDANT} redundant, on {RANKS} ranks, one of which is lost"
    )
    save(draw_losses(dry_run(held, now, topology), balancedness=before, title=title), path)


def main(quick: bool = False) -> None:
    """Print all tables."""
    load = drift(num_layers=8 if quick else 58, num_windows=4 if quick else 8)
    print("### One of 32 ranks is lost\n")
    losses(load, [0, 13] if quick else [0, 7, 13, 22, 31])
    print()
    gap_to_optimum(20 if quick else 200)
    print("\n### Ranks join\n")
    growth(load)
    print("\n### Copies spread over nodes\n")
    spreading(load)


READING = """
Lost: `lose_ranks` takes several times as long to plan as SGLang, and with so few moves balances less well: SGLang
moves nearly all experts. `rebalance` on a group that has grown by one rank sees little reason to move, and leaves the
new rank with its copies; `spread="node"` costs moves and saves few of the experts that are lost with a node, as there
are far more experts than redundant slots.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 layers, two lost ranks")
    parser.add_argument("--plot", metavar="FILE", help="draw a dry run of all losses instead of printing tables")
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
    else:
        main(options.quick)
