"""`eplb advise`: whether to enable a load balancer, and how."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from eplb_core.commands._replays import (
    AcrossNodes,
    BytesPerExpert,
    Estimators,
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
from eplb_core.commands._shared import JsonFile, LoadFile, MaxGB, Nodes, Ranks, console, examples, write_json

if TYPE_CHECKING:
    from eplb_core.advise.advice import Advice, Candidate

MinimumGain = Annotated[
    float, typer.Option(min=0, max=0.99, help="Share of the time of expert layers that must be saved, surely.")
]
MaxRedundant = Annotated[
    int | None, typer.Option(min=0, help="Most redundant experts.", show_default="half of the experts")
]

EPILOG = examples(
    "eplb advise load.npz --ranks 32 --nodes 4 --bytes-per-expert 44040192 --scale 100",
    "eplb advise load.npz --ranks 8 --max-redundant 16 --interval 1 --interval 10 --json advice.json",
    "eplb advise load.npz --ranks 8 --overlapped --minimum-gain 0.05",
)


def advise(
    load: LoadFile,
    ranks: Ranks,
    nodes: Nodes = 1,
    redundant: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Slots per layer beyond one per expert. May be repeated.", show_default="several"),
    ] = None,
    max_redundant: MaxRedundant = None,
    policy: Policies = None,
    interval: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Windows between plans. May be repeated.", show_default="1, 2, 4, ... and once"),
    ] = None,
    estimator: Estimators = None,
    minimum_gain: MinimumGain = 0.02,
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
    json_file: JsonFile = None,
) -> None:
    """Say from a load trace whether to enable a load balancer, and how.

    Replays the trace with every combination of redundant experts, policy and interval, and judges each on the windows
    that follow its plans. Advises to enable one only if it saves --minimum-gain of the time of the expert layers,
    moves included, at the lower end of a 95 % confidence interval that holds for all combinations at once; and as
    much against the same redundant experts spread evenly and never moved. Of those within 1 % of the best it takes
    the one with fewest redundant experts, then the one that plans most rarely. Exits with 0 whatever the advice is;
    JSON has "recommend".
    """
    with replaying("advise") as progress:
        from eplb_core.advise import advise as find_advice
        from eplb_core.advise.advice import summarize_advice
        from eplb_core.policies import POLICIES

        trace = read_load(load, max_gb, last)
        costs = make_costs(bytes_per_expert, us_per_token, scale, within_node, across_nodes, latency_us, overlapped)
        advice = find_advice(
            trace,
            ranks,
            num_nodes=nodes,
            policies=policy or POLICIES,
            intervals=interval,
            estimators=estimator or ["last"],
            redundancies=redundant,
            max_redundant=max_redundant,
            minimum_gain=minimum_gain,
            costs=costs,
            jobs=enough_jobs(jobs, 50 * len(trace)),
            progress=progress,
        )
        _print(console(json_file), advice)
        sizes = {"trace": str(load), "windows": len(trace), "ranks": ranks, "nodes": nodes}
        write_json(json_file, sizes | {"costs": describe_costs(costs)} | summarize_advice(advice))


def _print(to: Any, advice: "Advice") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eplb_core.advise.advice import explain
    from eplb_core.units import in_units

    to.print(explain(advice), style="bold", soft_wrap=False)
    if not advice.candidates:
        return
    title = "\nBest of each number of redundant experts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("redun-\ndant")
    table.add_column("\nconfiguration")
    for heading in ("\ngain", "95 %\ninterval", "over\neven", "sent per\nwindow", "memory\nper rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in shown(advice):
        gain, windows = candidate.gain, len(candidate.replay.balancedness)
        table.add_row(
            f"{'*' if candidate is advice.chosen else ' '} {candidate.num_redundant}",
            candidate.replay.configuration.label,
            f"{gain.share:+.1%}",
            f"{gain.low:+.0%} to {gain.high:+.0%}",
            f"{candidate.gain_over_even.share:+.1%}",
            in_units(candidate.replay.bytes_moved / windows),
            in_units(candidate.extra_bytes_per_rank),
        )
    to.print(table)
    to.print(f"* {'chosen' if advice.recommend else 'gains most'}. Gains are shares of the time of the expert layers,")
    to.print("over no load balancer, and (over even) over the same redundant experts spread evenly and never moved.")


def shown(advice: "Advice") -> "list[Candidate]":
    """Return the candidate with the largest gain for each number of redundant experts, and the chosen one."""
    best: dict[int, Candidate] = {}
    for candidate in sorted(advice.candidates, key=lambda c: c.gain.share):
        best[candidate.num_redundant] = candidate
    chosen = [] if advice.chosen is None or advice.chosen in best.values() else [advice.chosen]
    return sorted([*best.values(), *chosen], key=lambda c: (c.num_redundant, -c.gain.share))
