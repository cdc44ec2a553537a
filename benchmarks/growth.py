"""How time and memory of planning grow, from 8 to 2048 ranks and from 16 to 1024 experts.

    python -m benchmarks.growth

Four layers of synthetic drift. With the ranks the model grows too: two slots per rank and one expert per rank, up to
1024 experts. With the experts, 8 ranks stay and there are one and a half slots per expert. Moves and rounds are those
from a `greedy` placement to the next; `incremental` improves that placement. Times are the least of several calls. Peak
memory is what one call allocates beyond its arguments, by `tracemalloc`. Exponents are least squares on the logarithms
of the four largest sizes.
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.page import PAGE
from benchmarks.planning import SHAPES, Problem, label, table
from benchmarks.traces import drift
from eplb_core import Topology, derive_maps, plan_moves, rebalance, schedule_rounds
from eplb_core.plots.style import save
from tests.multiprocess import run_ranks

NUM_LAYERS, FITTED = 4, 4
REPEATS, ENOUGH = 15, 3000.0  # calls, and the milliseconds that are enough
RANKS = tuple(2**n for n in range(3, 12))
EXPERTS = tuple(2**n for n in range(4, 11))
FAR = 10_000
WHY = {
    "greedy": "One step per redundant copy and one per slot to pack, each over all experts or all ranks: quadratic in "
    "the end, and nearly linear while the fixed cost of a NumPy call outweighs the work in it. With 8 ranks packing "
    "stays linear, and only choosing whom to copy is quadratic.",
    "incremental": "One exchange at a time, from the busiest rank against all slots; larger layers need more "
    "exchanges, and each looks at more slots. The slots of two ranks are compared in pairs, so that memory is "
    "quadratic in the slots of a rank.",
    "derive_maps": "One radix sort, linear in the slots; the table has a column for each copy of the expert that has "
    "most, so that filling it depends on how skewed the load is.",
    "plan_moves": "Linear in messages times their candidates: an expert with many copies has many slots to fill and as "
    "many to take from, so that both grow. Senders are chosen in turn, one turn per message of a layer.",
    "schedule_rounds": "Linear in the rank pairs that exchange anything, of which there are at most as many as rows "
    "that move; a table over all pairs of ranks makes memory quadratic in the ranks.",
}


class Point(NamedTuple):
    """One call at one size: milliseconds and MiB."""

    milliseconds: float
    mebibytes: float


def calls(num_logical: int, topology: Topology) -> dict[str, Callable]:
    """What is measured, at one size."""
    first, now = drift(NUM_LAYERS, num_logical, 2)
    held = rebalance(first, topology, policy="greedy")
    new = rebalance(now, topology, policy="greedy", previous=held)
    plan = plan_moves(held, new, topology)
    return {
        "greedy": lambda: rebalance(now, topology, policy="greedy", previous=held),
        "incremental": lambda: rebalance(now, topology, previous=held),
        "derive_maps": lambda: derive_maps(new, num_logical),
        "plan_moves": lambda: plan_moves(held, new, topology),
        "schedule_rounds": lambda: schedule_rounds(plan, topology),
    }


def measure(call: Callable, repeats: int = REPEATS) -> Point:
    """Least time, which other work on the machine disturbs least, and the peak of one more call."""
    taken = []
    while len(taken) < repeats and sum(taken) < ENOUGH:
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Point(min(taken), peak / 2**20)


def by_ranks(ep_size: int) -> dict[str, Point]:
    """All calls on so many ranks."""
    work = calls(min(ep_size, 1024), Topology(ep_size, 2))
    return {name: measure(call) for name, call in work.items()}


def by_experts(num_logical: int) -> dict[str, Point]:
    """All calls with so many experts on 8 ranks."""
    work = calls(num_logical, Topology(8, num_logical * 3 // 2 // 8))
    return {name: measure(call) for name, call in work.items()}


def fit(sizes, values) -> tuple[float, float]:
    """Exponent and logarithm of the factor of `factor * size^exponent`, from the largest sizes."""
    return tuple(np.polyfit(np.log(sizes[-FITTED:]), np.log(values[-FITTED:]), 1))


def curve(points: dict[int, dict[str, Point]], name: str, field: int) -> tuple[list[int], list[float]]:
    """Sizes and one figure of one call."""
    return list(points), [found[name][field] for found in points.values()]


def draw(ranks: dict[int, dict[str, Point]], experts: dict[int, dict[str, Point]]) -> None:
    """Time and memory over both sizes, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex="col", sharey="row", layout="constrained")
    columns = ((ranks, "ranks (2 slots each)"), (experts, "experts (on 8 ranks)"))
    for column, (points, sizes) in enumerate(columns):
        for field, unit in enumerate(("least time of a call, ms", "peak memory of a call, MiB")):
            axis = axes[field, column]
            for name, marker in zip(WHY, "osv^D", strict=True):
                axis.loglog(*curve(points, name, field), marker=marker, ms=4, label=name)
            axis.grid(alpha=0.3)
            axis.set_xticks(list(points), [str(size) for size in points])
            axis.minorticks_off()
            axis.set_xlabel(sizes if field else "")
            axis.set_ylabel("" if column else unit)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"Planning {NUM_LAYERS} layers on the CPU")
    save(figure, str(PAGE.with_name("growth.png")))


def exponents(ranks, experts) -> str:
    """The fitted exponents, with why."""
    rows = []
    for name in WHY:
        fits = [fit(*curve(points, name, field))[0] for points in (ranks, experts) for field in (0, 1)]
        rows.append([f"`{name}`", *(f"{exponent:.2f}" for exponent in fits)])
    head = ["exponent of", "time, ranks", "memory, ranks", "time, experts", "memory, experts"]
    return table(head, rows) + "\n\n" + "\n".join(f"* `{name}`: {text}" for name, text in WHY.items())


def extremes(points: dict[int, dict[str, Point]], what: str) -> str:
    """Figures at the smallest and the largest size, and one between."""
    sizes = list(points)
    chosen = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    rows = [
        [f"`{name}`", *(f"{points[n][name].milliseconds:.2f} ms, {points[n][name].mebibytes:.2f} MiB" for n in chosen)]
        for name in WHY
    ]
    return table([what, *map(str, chosen)], rows)


def far(ranks: dict[int, dict[str, Point]]) -> str:
    """What the fits say of many more ranks."""
    rows, seconds = [], {}
    for name in WHY:
        milliseconds, mebibytes = (
            np.exp(factor + exponent * np.log(FAR)) * 58 / NUM_LAYERS
            for exponent, factor in (fit(*curve(ranks, name, field)) for field in (0, 1))
        )
        seconds[name] = milliseconds / 1e3
        rows.append([f"`{name}`", f"{seconds[name]:.1f} s", f"{mebibytes / 1024:.2f} GiB"])
    alone = seconds["incremental"] / 58
    sharing = (
        f"One layer per rank and an all-gather would bring `incremental` to {alone:.1f} s at best; `schedule_rounds` "
        "would have to take some layers at a time, or tables by node, to need less memory."
    )
    return table([f"{FAR} ranks, 58 layers, on paper", "time", "peak memory"], rows) + "\n\n" + sharing


def gather_milliseconds(rank: int, num_bytes: int, repeats: int = 15) -> float:
    """Least time of an all-gather to which every rank brings its part of so many bytes."""
    part = torch.zeros(num_bytes // dist.get_world_size() // 4 + 1, dtype=torch.int32)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather(parts, part)
        taken.append((time.perf_counter() - start) * 1e3)
    return min(taken)


def shared(num_ranks: int = 4) -> str:
    """Every rank plans all layers, against a share of them and an all-gather of the rows."""
    rows = []
    for shape in (SHAPES[0], SHAPES[-1]):
        problem = Problem(*shape)
        part = slice(0, -(-problem.num_layers // num_ranks))
        gather = max(run_ranks(gather_milliseconds, num_ranks, problem.new.nbytes, timeout=120))
        for policy, held, load in (
            ("greedy", problem.held, problem.now),
            ("incremental", problem.held, problem.now),
            ("incremental", problem.start, problem.first),
        ):
            options = {"policy": policy, "num_groups": problem.num_groups}
            whole, share = (
                measure(
                    lambda cut=cut, held=held, load=load, options=options, problem=problem: rebalance(
                        load[cut], problem.topology, previous=held[cut], **options
                    ),
                    7,
                ).milliseconds
                for cut in (slice(None), part)
            )
            name = f"{policy}, first plan" if held is problem.start else policy
            figures = (f"{x:.1f}" for x in (whole, share, gather, whole / (share + gather)))
            rows.append([label(shape), name, *figures])
    head = ["layers x experts / slots / ranks", "plan", "all layers, ms", f"a share of 1/{num_ranks}, ms"]
    return table([*head, "all-gather, ms", "times faster"], rows)


def report() -> str:
    """Tables, exponents, the picture, sharing, and 10,000 ranks on paper."""
    ranks = {size: by_ranks(size) for size in RANKS}
    experts = {size: by_experts(size) for size in EXPERTS}
    draw(ranks, experts)
    return "\n\n".join(
        (
            "![Time and peak memory of planning over ranks and experts](growth.png)",
            extremes(ranks, "ranks"),
            extremes(experts, "experts"),
            exponents(ranks, experts),
            f"### {FAR} ranks",
            "Extrapolated from the largest four sizes with two slots per rank, and times 58 / 4 layers, as all but "
            "`schedule_rounds` are linear in layers and that one is less. Nothing of this size was run. The placement "
            f"itself is {FAR * 2 * 58 * 4 / 2**20:.1f} MiB.",
            far(ranks),
            "### Planning shared among ranks",
            "Today every rank plans all layers, and nothing is sent. Layers are independent in `greedy`, and in "
            "`incremental` unless `max_total_moves` is set, so four ranks could plan a quarter each and gather the "
            "rows, here with four Gloo processes on one machine. It pays where the last column is above 1.",
            shared(),
        )
    )


def main() -> None:
    """Print the report, and draw the picture."""
    print(report())


if __name__ == "__main__":
    main()
