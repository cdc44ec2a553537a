"""How long replays take: seconds per sweep, one run each.

    python -m benchmarks.replay [--jobs N]

The first row is the target of 20 s for 500 windows of 24 x 32 with three policies on two cores, the second that of
30 s for 100 windows of 58 x 256 on 288 slots and 32 ranks.
"""

import argparse
import time

from benchmarks.page import printed
from benchmarks.traces import drift
from eplb_core import Topology
from eplb_core.policies import POLICIES
from eplb_core.simulate.configuration import grid
from eplb_core.simulate.sweep import available_cores, sweep

# layers, experts, windows, ranks, redundant, nodes, policies
CASES = [
    (24, 32, 500, 8, 8, 1, POLICIES),
    (58, 256, 100, 32, 32, 4, ("incremental",)),
    (58, 256, 100, 32, 32, 4, POLICIES),
]


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=available_cores())
    jobs = parser.parse_args().jobs
    print(f"| layers x experts, windows | ranks | policies | s, 1 process | s, {jobs} processes | of it planning |")
    print("|---|---|---|---|---|---|")
    for num_layers, num_logical, num_windows, ep_size, redundant, nodes, policies in CASES:
        load = drift(num_layers, num_logical, num_windows)
        topology = Topology.from_experts(num_logical, ep_size, num_redundant=redundant, num_nodes=nodes)
        configurations = grid(topology, policy=list(policies))
        taken, planning = [], 0.0
        for processes in (1, jobs):
            start = time.perf_counter()
            replays = sweep(load, configurations, jobs=processes, keep_placements=False)
            taken.append(time.perf_counter() - start)
            planning = sum(replay.planning_seconds for replay in replays) / sum(taken[-1:]) / processes
        sizes = f"{num_layers} x {num_logical}, {num_windows}"
        print(
            f"| {sizes} | {ep_size} | {', '.join(policies)} | {taken[0]:.1f} | {taken[1]:.1f} | {planning:.0%} |",
            flush=True,
        )


READING = """
Two processes need two idle cores to be faster, and for small sweeps they are not, as starting them takes longer.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
