"""`eplb simulate`: what each policy would have done with a recorded trace."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eplb_core.commands._replays import (
    AcrossNodes,
    BytesPerExpert,
    Estimators,
    Intervals,
    Jobs,
    LatencyMicroseconds,
    MicrosecondsPerToken,
    Overlapped,
    Policies,
    Scale,
    WithinNode,
    describe_costs,
    enough_jobs,
    make_costs,
    read_load,
    replaying,
)
from eplb_core.commands._shared import (
    Groups,
    JsonFile,
    LoadFile,
    MaxGB,
    Nodes,
    console,
    examples,
    output,
    require_modules,
    topology_for,
    write_json,
)

if TYPE_CHECKING:
    from eplb_core.simulate.replay import Replay
    from eplb_core.topology import Topology

EPILOG = examples(
    "eplb simulate load.npz --ranks 8 --redundant 8 --policy greedy --policy incremental",
    "eplb simulate load.npz --ranks 32 --redundant 32 --nodes 4 --interval 1 --interval 10 \\",
    "    --bytes-per-expert 44040192 --scale 100 --plot simulation.png",
    "eplb simulate load.npz --ranks 8 --redundant 0 --redundant 8 --horizon 10 --json -",
)


def simulate(
    load: LoadFile,
    ranks: Annotated[list[int], typer.Option(min=1, help="Ranks of the expert-parallel group. May be repeated.")],
    redundant: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Slots per layer beyond one per expert. May be repeated.", show_default="0"),
    ] = None,
    nodes: Nodes = 1,
    groups: Groups = 1,
    policy: Policies = None,
    interval: Intervals = None,
    estimator: Estimators = None,
    threshold: Annotated[float | None, typer.Option(help="Plan only below this balancedness.")] = None,
    hysteresis: Annotated[float, typer.Option(help="How far below, before plans are made again.")] = 0.0,
    min_gain: Annotated[float, typer.Option(help="Share of busiest ranks' load that a plan must take off.")] = 0.0,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Windows in which a plan must save the time that its moves take.")
    ] = None,
    min_return: Annotated[float, typer.Option(help="Seconds saved per second of moves, with --horizon.")] = 1.0,
    max_moves: Annotated[int | None, typer.Option(min=0, help="Experts moved per layer and plan.")] = None,
    bytes_per_expert: BytesPerExpert = 44_040_192,
    us_per_token: MicrosecondsPerToken = 0.2,
    scale: Scale = 1.0,
    within_node: WithinNode = 300.0,
    across_nodes: AcrossNodes = 40.0,
    latency_us: LatencyMicroseconds = 50.0,
    overlapped: Overlapped = False,
    last: Annotated[int | None, typer.Option(min=2, help="Replay the last windows only.")] = None,
    max_gb: MaxGB = 1.0,
    jobs: Jobs = None,
    plot: Annotated[Path | None, output("--plot", "Draw the results: .png, .svg or .pdf.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Replay a load trace under policies, and judge each on the next window.

    Starts from the round-robin placement. After the first window, and then after every --interval windows, a placement
    is planned from what was seen so far; it is judged on the windows that follow. Reports the balancedness (mean rank
    load / busiest rank's load; mean over windows and layers, with a 95 % confidence interval), what was moved, and the
    time on the critical path: the busiest ranks' tokens, and the moves. The gain is against the placement that is never
    changed ("static"). "refined, once" is planned on the first window and kept.
    """
    with replaying("simulate") as progress:
        from eplb_core.simulate import check_trace
        from eplb_core.simulate.configuration import STATIC, grid
        from eplb_core.simulate.sweep import sweep

        if plot is not None:
            require_modules("cli", "matplotlib")
            from eplb_core.plots.style import check_ending

            check_ending(plot)
        trace = check_trace(read_load(load, max_gb, last))
        costs = make_costs(bytes_per_expert, us_per_token, scale, within_node, across_nodes, latency_us, overlapped)
        topologies = [
            topology_for(trace.shape[2], count, extra, nodes) for count, extra in product(ranks, redundant or [0])
        ]
        limits: dict[str, Any] = {"num_groups": groups} if groups > 1 else {}
        limits |= {} if max_moves is None else {"max_moves": max_moves}
        chosen = grid(
            topologies,
            policy=policy or ["greedy", "refined", "incremental"],
            estimator=estimator or ["last"],
            interval=interval or [1],
            threshold=threshold,
            hysteresis=hysteresis,
            min_gain=min_gain,
            horizon=horizon,
            min_return=min_return,
            options=limits,
        )
        compared = [*grid(topologies, policy=STATIC), *grid(topologies, policy="refined", interval=None)]
        jobs = enough_jobs(jobs, len(trace) * len(chosen))
        replays = sweep(trace, [*compared, *chosen], costs=costs, jobs=jobs, progress=progress)
        baselines, replays = replays[: len(compared)], replays[len(compared) :]
        result = {
            "trace": str(load),
            "windows": trace.shape[0],
            "layers": trace.shape[1],
            "logical_experts": trace.shape[2],
            "judged_windows": trace.shape[0] - 1,
            "costs": describe_costs(costs),
        } | summarize_all(trace, replays, baselines)
        if plot is not None:
            _draw(plot, trace, [*baselines, *replays], f"{load.name}: {_sizes(topologies)}")
        _print(console(json_file), result)
        write_json(json_file, result)


def summarize_all(load: Any, replays: "tuple[Replay, ...]", baselines: "tuple[Replay, ...]") -> dict[str, Any]:
    """Return the figures of all replays, each with the gain over the static one on its topology."""
    from eplb_core.simulate import balancedness_bound
    from eplb_core.simulate.configuration import STATIC
    from eplb_core.simulate.replay import summarize

    static = {r.configuration.topology: r for r in baselines if r.configuration.policy == STATIC}
    bounds = {topology: float(balancedness_bound(load, topology).mean()) for topology in static}

    def figures(replay: "Replay") -> dict[str, Any]:
        topology = replay.configuration.topology
        sizes = {"redundant": topology.num_slots - load.shape[2], "bound_balancedness": bounds[topology]}
        return summarize(replay, static[topology]) | sizes

    return {"policies": [figures(r) for r in replays], "baselines": [figures(r) for r in baselines]}


def _sizes(topologies: "list[Topology]") -> str:
    return "; ".join(f"{t.ep_size} ranks of {t.slots_per_rank} slots" for t in topologies)


def _draw(file: Path, load: Any, replays: "list[Replay]", title: str) -> None:
    from eplb_core.plots import overview, save
    from eplb_core.simulate import balancedness_bound

    topologies = {replay.configuration.topology for replay in replays}
    bound = balancedness_bound(load, topologies.pop()).mean(axis=1) if len(topologies) == 1 else None
    save(overview(load, replays, bound=bound, title=title), file)


def _print(to: Any, result: dict[str, Any]) -> None:
    from itertools import groupby

    rows = sorted([*result["baselines"], *result["policies"]], key=_size)  # stable: baselines stay first
    for size, group in groupby(rows, key=_size):
        same = list(group)
        to.print(_table(f"{size[0]} ranks, {size[1]} redundant experts", same))
        to.print(f"No placement could exceed a balance of {same[0]['bound_balancedness']:.3f}.\n")
    to.print(
        f"{result['judged_windows']} windows judged. balance: balancedness on the next window; "
        "path: critical path, moves included; gain: over static."
    )


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["ranks"], row["redundant"]


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("\npolicy")
    for heading in ("\nbalance", "experts\nmoved", "GB\nmoved", "moves\ns", "path\ns", "\ngain", "95 %\ninterval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["label"], *_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    gain = row["gain"]
    figures = [
        f"{row['mean_balancedness']:.3f}",
        f"{row['moved_experts']}",
        f"{row['bytes_moved'] / 1e9:.3g}" if row["bytes_moved"] < 1e11 else f"{row['bytes_moved'] / 1e9:.0f}",
        f"{row['migration_seconds']:.3g}",
        f"{row['critical_path_seconds']:.3g}",
    ]
    if row["policy"] == "static":
        return [*figures, "", ""]
    ends = "" if gain["low"] is None else f"{gain['low']:+.0%} to {gain['high']:+.0%}"
    return [*figures, f"{gain['share']:+.1%}", ends]
