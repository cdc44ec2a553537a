"""`eplb report`: a simulation as a page to read and to send."""

from pathlib import Path
from typing import Annotated, Any

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
    replaying,
)
from eplb_core.commands._shared import (
    JsonFile,
    LoadFile,
    MaxGB,
    Nodes,
    Ranks,
    Redundant,
    examples,
    limit_bytes,
    output,
    require_modules,
    topology_for,
    write_json,
)
from eplb_core.commands.simulate import summarize_all

EPILOG = examples(
    "eplb report load.npz --ranks 8 --redundant 8 --out report.html",
    "eplb report load.npz --ranks 32 --redundant 32 --nodes 4 --interval 10 --scale 100 --out report.html --no-advice",
)


def report(
    load: LoadFile,
    ranks: Ranks,
    out: Annotated[Path, output("--out", "The page, HTML.")],
    redundant: Redundant = 0,
    nodes: Nodes = 1,
    policy: Policies = None,
    interval: Intervals = None,
    estimator: Estimators = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default="the trace's name")] = None,
    advice: Annotated[bool, typer.Option(help="Sweep for advice as well, as `eplb advise` does.")] = True,
    bytes_per_expert: BytesPerExpert = 44_040_192,
    us_per_token: MicrosecondsPerToken = 0.2,
    scale: Scale = 1.0,
    within_node: WithinNode = 300.0,
    across_nodes: AcrossNodes = 40.0,
    latency_us: LatencyMicroseconds = 50.0,
    overlapped: Overlapped = False,
    max_gb: MaxGB = 1.0,
    jobs: Jobs = None,
    json_file: JsonFile = None,
) -> None:
    """Write what each policy would have done with a load trace as one HTML page, pictures included.

    The page holds the figures of `eplb simulate`, the advice of `eplb advise`, and pictures: balancedness over time,
    balance against moves, the load of every rank, the copies of every expert and the transfers of one plan. It needs no
    other file and loads nothing.
    """
    require_modules("cli", "matplotlib")
    with replaying("report") as progress:
        from eplb_core.advise import advise
        from eplb_core.advise.advice import summarize_advice
        from eplb_core.report import report as write
        from eplb_core.simulate import check_trace
        from eplb_core.simulate.configuration import STATIC, grid
        from eplb_core.simulate.sweep import sweep
        from eplb_core.trace import read_trace

        trace = read_trace(load, limit_bytes=limit_bytes(max_gb))
        windows = check_trace(trace.load)
        costs = make_costs(bytes_per_expert, us_per_token, scale, within_node, across_nodes, latency_us, overlapped)
        topology = topology_for(windows.shape[2], ranks, redundant, nodes)
        configurations = [
            *grid(topology, policy=STATIC),
            *grid(topology, policy="refined", interval=None),
            *grid(
                topology,
                policy=policy or ["greedy", "refined", "incremental"],
                estimator=estimator or ["last"],
                interval=interval or [1],
            ),
        ]
        shared: dict[str, Any] = {"costs": costs, "progress": progress}
        replays = sweep(windows, configurations, jobs=enough_jobs(jobs, len(configurations) * len(windows)), **shared)
        found = None
        if advice:
            found = advise(windows, ranks, num_nodes=nodes, jobs=enough_jobs(jobs, 50 * len(windows)), **shared)
        page = write(windows, replays, title=title or load.name, facts=_facts(trace.metadata), advice=found)
        out.write_text(page, encoding="utf-8")
        figures = summarize_all(windows, replays[2:], replays[:2])
        advised = {} if found is None else {"advice": summarize_advice(found)}
        write_json(json_file, {"trace": str(load), "costs": describe_costs(costs)} | figures | advised)


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    """Short entries of a trace's metadata."""
    return {
        name.replace("_", " ").capitalize(): value
        for name, value in metadata.items()
        if isinstance(value, str | int | float)
    }
