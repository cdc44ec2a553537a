"""How the results of the demo look in a terminal."""

from collections.abc import Iterable

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from eplb_torch.demo.hosts import balancedness_of_layers
from eplb_torch.demo.loss import LossResult
from eplb_torch.demo.results import MIN_BALANCEDNESS, DemoResult, PhaseResult

_BAR_WIDTH = 24  # cells for the busiest rank
_MAX_RANKS = 16  # rows of one table


def training_bar(console: Console) -> Progress:
    """Make a progress bar whose description the caller keeps up to date."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def show_phase(console: Console, phase: PhaseResult) -> None:
    """Print the loads of the ranks before and after, in the layer that was least balanced before."""
    before, after = phase.rank_load_before, phase.rank_load_after
    layer = int(np.argmin(balancedness_of_layers(before)))
    shares = {name: load[layer] / np.nanmean(load[layer]) for name, load in (("before", before), ("after", after))}
    console.print(f"{phase.traffic}: load of each rank / mean, layer {layer}")
    console.print(rank_bars(shares))
    console.print()


def rank_bars(shares: dict[str, np.ndarray], full: float = 0.0) -> Table:
    """Draw a bar for each rank and each column of `shares`; of very many ranks, the busiest of the first column.

    A bar has full length at the largest share, or at `full` where no share is larger. A share that is NaN is that of
    a lost rank.
    """
    scale = _BAR_WIDTH / max(full, *(float(np.nanmax(share)) for share in shares.values()))
    table = Table(box=None, show_header=any(shares))
    table.add_column()
    for heading in shares:
        table.add_column(heading, min_width=_BAR_WIDTH)
        table.add_column(justify="right")
    busiest = np.argsort(-next(iter(shares.values())), kind="stable")[:_MAX_RANKS]
    for rank in sorted(busiest.tolist()):
        cells: list[str | Text] = [f"rank {rank}"]
        for share in (float(share[rank]) for share in shares.values()):
            if np.isnan(share):
                cells += [Text("lost", style="dim"), ""]
                continue
            style = "red" if share > 1 / MIN_BALANCEDNESS else "green"
            cells += [Text("█" * max(round(share * scale), 1), style=style), f"{share:.2f}"]
        table.add_row(*cells)
    return table


def new_table(headings: Iterable[str], first: str = "traffic") -> Table:
    """Make a table of right-aligned columns after a first one of names. It must fit in 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(f"\n{first}")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def show_result(console: Console, result: DemoResult) -> None:
    """Print one row per phase."""
    headings = (
        "\nbalancedness",
        "experts\nmoved",
        "\nMB",
        "batches\nmeanwhile",
        "ms idle\n/moving",
        "stall\nms",
        "logit\ndiff.",
    )
    table = new_table(headings)
    for phase in result.phases:
        pace = phase.to_json()["step_ms"]
        table.add_row(
            phase.traffic,
            f"{phase.balancedness_before:.3f} → [bold]{phase.balancedness_after:.3f}[/]",
            f"{phase.moved_experts}",
            f"{phase.bytes_moved / 1e6:.1f}",
            f"{phase.steps_during_moves}",
            f"{milliseconds(pace['idle'])} / {milliseconds(pace['moving'])}",
            f"{phase.stall_ms:.0f}",
            f"{difference(phase.max_abs_logit_difference)}",
        )
    console.print("balancedness = mean rank load / load of the busiest rank, over all layers")
    console.print(table)
    if result.loss is not None:
        _show_loss(console, result, result.loss)


def loss_in_words(loss: LossResult) -> str:
    """Write one line."""
    return (
        f"Rank {loss.rank} was killed; batch {loss.batch} of {loss.traffic} was served without it "
        f"{loss.total_ms / 1e3:.1f} s later."
    )


def rehosted_table(loss: LossResult) -> Table:
    """Make a table of what each rank that is left received."""
    table = new_table(("\nslots", "experts\nfrom copies", "from the\ncheckpoint"), first="")
    for rank in sorted({*loss.ranks, loss.rank}):
        told = loss.ranks.get(rank)
        table.add_row(f"rank {rank}", *map(str, told or ("lost", "", "")), style="dim" if told is None else None)
    return table


def _show_loss(console: Console, result: DemoResult, loss: LossResult) -> None:
    """Print how long each part of living through the loss took, and what it moved."""
    moving = f"filling slots: {loss.from_copies} from copies, {loss.from_checkpoint} from the checkpoint"
    parts = (
        (loss.noticed_ms, "until the other ranks noticed"),
        (loss.silence_ms, "for a sign of life, the time-out of detection"),
        (loss.agreeing_ms, "until they agreed to go on without it"),
        (loss.connecting_ms, "connecting them anew"),
        (loss.moving_ms, moving),
        (loss.first_batch_ms, "until they had served the batch"),
    )
    when = "while weights moved" if loss.during_moves else "while no weights moved"
    console.print(f"Rank {loss.rank} was killed {when}, before the end of batch {loss.batch} of {loss.traffic}:")
    for milliseconds, what in parts:
        console.print(f"  {milliseconds / 1e3:6.3f} s {what}")
    console.print(f"  {loss.total_ms / 1e3:6.3f} s in all, {loss.recovery_ms / 1e3:.3f} s of them after detection")
    if result.loss_phase is not None and result.loss_phase.around_loss is not None:
        before, after = result.loss_phase.around_loss
        then = result.loss_phase.balancedness_after
        console.print(f"Balancedness {before:.3f} before, {after:.3f} right after, {then:.3f} at the end of the phase.")
    console.print(f"It had the last copy of {loss.lost_copies} experts, all layers together.")
    console.print(rehosted_table(loss))


def milliseconds(value: float | None) -> str:
    """Write whole milliseconds; a dash for None and NaN.

    >>> milliseconds(12.3), milliseconds(None)
    ('12', '-')
    """
    return f"{value:.0f}" if value is not None and value == value else "-"


def difference(value: float) -> str:
    """Write a difference of logits.

    >>> difference(0.0), difference(2.5e-9)
    ('none', '2.5e-09')
    """
    return f"{value:.1e}" if value else "none"
