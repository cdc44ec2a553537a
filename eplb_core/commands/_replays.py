"""What the commands that replay traces have in common: options, the trace, prices, progress and failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eplb_core.commands._shared import fail, failing, limit_bytes, require_modules

if TYPE_CHECKING:
    import numpy as np

    from eplb_core.costs import Costs

Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="greedy, refined, incremental or static. May be repeated.", show_default="all three"),
]
Intervals = Annotated[
    list[int] | None,
    typer.Option("--interval", min=1, help="Windows from one plan to the next. May be repeated.", show_default="1"),
]
Estimators = Annotated[
    list[str] | None,
    typer.Option(
        "--estimator",
        help="What is planned for: last, window:N, decay:HALF_LIFE or trend:N. May be repeated.",
        show_default="last",
    ),
]
BytesPerExpert = Annotated[int, typer.Option(min=0, help="Bytes of all tensors of one expert in one layer.")]
MicrosecondsPerToken = Annotated[
    float, typer.Option("--us-per-token", min=0, help="Microseconds of one expert for one token.")
]
Scale = Annotated[float, typer.Option(help="Tokens served for each one in the trace; > 1 if it is a sample.")]
WithinNode = Annotated[float, typer.Option(help="GB/s that a rank sends to ranks of its node.")]
AcrossNodes = Annotated[float, typer.Option(help="GB/s that a rank sends to other nodes.")]
LatencyMicroseconds = Annotated[float, typer.Option("--latency-us", min=0, help="Microseconds per round of messages.")]
Overlapped = Annotated[
    bool, typer.Option("--overlapped", help="Weights move while the model serves: moves cost no time.")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="the cores, for long traces")]


_WINDOWS_PER_PROCESS = 500
"""Starting a process takes about as long as replaying so many windows."""


def make_costs(
    bytes_per_expert: int,
    us_per_token: float,
    scale: float,
    within_node: float,
    across_nodes: float,
    latency_us: float,
    overlapped: bool,
) -> "Costs":
    """Return the prices that the options state."""
    from eplb_core.costs import Costs, Links

    links = Links(within_node * 1e9, across_nodes * 1e9, latency_us / 1e6)
    return Costs(bytes_per_expert, us_per_token / 1e6, scale, links, overlapped)


def describe_costs(costs: "Costs") -> dict[str, Any]:
    """Return prices as plain values for JSON, in bytes and seconds."""
    from dataclasses import asdict

    return asdict(costs)


def read_load(file: Path, max_gb: float, last: int | None = None) -> "np.ndarray":
    """Read a trace, `[windows, layers, logical]`, or the last windows of it."""
    from eplb_core.trace import read_trace

    load = read_trace(file, limit_bytes=limit_bytes(max_gb)).load
    return load if last is None else load[-last:]


def enough_jobs(jobs: int | None, windows: int) -> int:
    """Return how many processes to use for so many windows: by default those that are worth starting."""
    from eplb_core.simulate.sweep import available_cores

    return min(available_cores(), 1 + windows // _WINDOWS_PER_PROCESS) if jobs is None else jobs


@contextmanager
def replaying(command: str) -> Iterator[Any]:
    """Show a progress bar on stderr, and end with exit code 1 if a process fails.

    Yields:
        A function of windows served so far and in all.
    """
    require_modules("cli", "rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    to = Console(stderr=True)
    bar = Progress(*columns, console=to, transient=True, disable=not to.is_terminal)
    with failing(command):
        from eplb_core.simulate.sweep import SimulationError

        try:
            with bar:
                task = bar.add_task("replaying windows", total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        except SimulationError as error:
            fail(f"eplb {command}: {error}", code=1)
