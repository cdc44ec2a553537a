"""How a run of the demo looks in a terminal."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from eplb_torch.demo.results import MIN_BALANCEDNESS, DemoResult, PhaseResult

_BAR_WIDTH = 24  # cells for the busiest rank


def training_bar(console: Console) -> Progress:
    """Make a progress bar whose description the caller keeps up to date."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def show_phase(console: Console, phase: PhaseResult) -> None:
    """Print the loads of the ranks before and after, in the layer that was least balanced before."""
    before, after = phase.rank_load_before, phase.rank_load_after
    layer = int(np.argmin(before.mean(axis=1) / before.max(axis=1)))
    shares = [loads[layer] / loads[layer].mean() for loads in (before, after)]
    scale = _BAR_WIDTH / max(share.max() for share in shares)
    table = Table(title=f"{phase.traffic}: load of each rank / mean, layer {layer}", title_justify="left", box=None)
    table.add_column()
    for heading in ("before", "after"):
        table.add_column(heading, min_width=_BAR_WIDTH)
        table.add_column(justify="right")
    for rank in range(before.shape[1]):
        cells: list[str | Text] = [f"rank {rank}"]
        for share in shares:
            style = "red" if share[rank] > 1 / MIN_BALANCEDNESS else "green"
            cells += [Text("█" * max(round(share[rank] * scale), 1), style=style), f"{share[rank]:.2f}"]
        table.add_row(*cells)
    console.print(table)
    console.print()


def show_result(console: Console, result: DemoResult) -> None:
    """Print one row per phase, and whether the promises were kept."""
    table = Table(
        title="balancedness = mean rank load / load of the busiest rank, over all layers",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("\ntraffic")
    for heading in (
        "\nbalancedness",
        "experts\nmoved",
        "MB\nmoved",
        "planning\nms",
        "moving\nms",
        "logit\ndifference",
    ):
        table.add_column(heading, justify="right")
    for phase in result.phases:
        difference = phase.max_abs_logit_difference
        table.add_row(
            phase.traffic,
            f"{phase.balancedness_before:.3f} → [bold]{phase.balancedness_after:.3f}[/]",
            f"{phase.moved_experts}",
            f"{phase.bytes_moved / 1e6:.1f}",
            f"{phase.planning_ms:.1f}",
            f"{phase.moving_ms:.1f}",
            f"{difference:.1e}" if difference else "none",
        )
    console.print(table)
