"""Shares of copies: balance on the next window, and how far tokens travel.

    python -m benchmarks.shares

The placement is made once, from the first third of a trace, and stays; only shares follow the load. The model's
balancedness is the mean over the other windows. Shares of earlier windows are what a balancer can have; those of the
window itself are the best that shares can do. Distances assume that all ranks send alike.
"""

import time
from typing import NamedTuple

import numpy as np

from benchmarks.page import printed
from benchmarks.traces import cases
from eplb_core import Topology, rebalance
from eplb_core.shares import balanced_shares, even_shares, slot_load
from eplb_core.shares.locality import local_shares


class Distance(NamedTuple):
    """Parts of all tokens by how far they go, and the balancedness that remains."""

    same_rank: float
    same_node: float
    across: float
    balancedness: float


def balance(tokens: np.ndarray, topology: Topology) -> float:
    """The model's balancedness of tokens `[layers, slots]`."""
    on_rank = tokens.reshape(len(tokens), topology.ep_size, -1).sum(axis=2)
    return on_rank.mean(axis=1).sum() / on_rank.max(axis=1).sum()


def follow(load: np.ndarray, topology: Topology, first: int) -> tuple[list[float], float]:
    """Balancedness over the windows after `first`: by even shares and those of earlier windows; ms per layer."""
    placement = rebalance(load[:first], topology, policy="refined")
    even, figures, seconds = even_shares(placement), [], []
    for window in range(first, len(load)):
        start = time.perf_counter()
        last = balanced_shares(placement, load[window - 1], topology)
        seconds.append(time.perf_counter() - start)
        four = balanced_shares(placement, load[window - 4 : window], topology)
        best = balanced_shares(placement, load[window], topology)
        kinds = (even, last, four, best)
        figures.append([balance(slot_load(placement, load[window], shares), topology) for shares in kinds])
    return np.mean(figures, axis=0).tolist(), 1000 * float(np.median(seconds)) / load.shape[1]


def travel(load: np.ndarray, topology: Topology, slack: float | None) -> Distance:
    """Where tokens go by local shares, or evenly if `slack` is None."""
    total = load.sum(axis=0)
    placement = rebalance(total, topology, policy="refined")
    ranks = np.arange(topology.num_slots) // topology.slots_per_rank
    received, near = np.zeros(placement.shape), np.zeros(2)
    for rank in range(topology.ep_size):
        shares = even_shares(placement)
        if slack is not None:
            shares = local_shares(placement, topology, rank, total.shape[1], slack=slack)
        sent = slot_load(placement, total / topology.ep_size, shares)
        same_node = ranks // topology.ranks_per_node == rank // topology.ranks_per_node
        near += sent[:, ranks == rank].sum(), sent[:, same_node].sum()
        received += sent
    on_rank, on_node = near / total.sum()
    return Distance(on_rank, on_node - on_rank, 1 - on_node, balance(received, topology))


def main() -> None:
    """Print both tables."""
    print(
        "| trace | ranks | even | shares of the last window | of the last four | of the window itself | ms per layer |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        topology = Topology.from_experts(case.load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        figures, milliseconds = follow(case.load, topology, first=max(len(case.load) // 3, 4))
        print(f"| {case.name} | {case.ep_size} | {' | '.join(f'{x:.3f}' for x in figures)} | {milliseconds:.2f} |")
    print("\n| dispatch | same rank | same node | across nodes | balancedness |")
    print("|---|---|---|---|---|")
    case = cases()[-2]
    topology = Topology.from_experts(
        case.load.shape[2], case.ep_size, num_redundant=4 * case.num_redundant, num_nodes=4
    )
    for name, slack in {"even": None, "local": 0.0, "local, 10% slack": 0.1, "nearest": 64.0}.items():
        distance = travel(case.load[:, :12], topology, slack)
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in distance)} |")


READING = """
Lost: where load drifts slowly under noise, and in gpt-oss-20b by subject, shares of the last window are worse than even
ones, as they follow what is gone by; those of the last four windows are about as good as even ones, or better. All are
well below what shares could do if the window were known.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
