"""How a run of the demo looks while it goes on: a table that changes in a terminal, some lines elsewhere."""

from types import TracebackType
from typing import Protocol, Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from eplb_torch.demo.display import loss_in_words, milliseconds, new_table, rank_bars, rehosted_table, show_phase
from eplb_torch.demo.loss import LossResult
from eplb_torch.demo.record import Progress
from eplb_torch.demo.results import MIN_BALANCEDNESS, PhaseResult
from eplb_torch.demo.traffic import WINDOW_STEPS

_LEVELS = "▁▂▃▄▅▆▇█"
_LOWEST = 0.4  # balancedness of the lowest level
_TIMELINE_WIDTH = 70  # steps


class View(Protocol):
    """Shows a run as it goes on. Use it as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, progress: Progress) -> None:
        """Show where a phase stands."""
        ...

    def show_phase(self, phase: PhaseResult) -> None:
        """Show what came of a phase."""
        ...

    def show_loss(self, loss: LossResult) -> None:
        """Show that ranks go on without another."""
        ...


def make_view(console: Console) -> View:
    """Choose what the console can show."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else LineView(console)


class LineView:
    """A line each `WINDOW_STEPS` steps, and where moves begin or end."""

    def __init__(self, console: Console):
        self._console, self._moving = console, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """See `View.show`."""
        if progress.during_moves != self._moving or progress.step % WINDOW_STEPS == 0:
            self._console.print(in_words(progress))
        self._moving = progress.during_moves

    def show_phase(self, phase: PhaseResult) -> None:
        """See `View.show_phase`."""
        self._console.print()
        show_phase(self._console, phase)

    def show_loss(self, loss: LossResult) -> None:
        """See `View.show_loss`."""
        self._console.print(loss_in_words(loss))


class LiveView:
    """A table with a row for each phase, how balanced its batches were one after another, and the ranks' loads now."""

    def __init__(self, console: Console):
        self._console = console
        self._rows: dict[str, list[Progress]] = {}
        self._loss: LossResult | None = None
        self._spinner = Spinner("dots", "starting the processes")
        self._live = Live(console=console, transient=True, refresh_per_second=8, get_renderable=self.render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """See `View.show`."""
        self._rows.setdefault(progress.traffic, []).append(progress)

    def show_phase(self, phase: PhaseResult) -> None:
        """See `View.show_phase`."""
        show_phase(self._console, phase)

    def show_loss(self, loss: LossResult) -> None:
        """See `View.show_loss`."""
        self._console.print(loss_in_words(loss))
        self._loss = loss

    def render(self) -> RenderableType:
        """Draw it all as of now."""
        if not self._rows:
            return self._spinner
        rows = list(self._rows.values())
        last = rows[-1][-1]
        bars = Text(f"\n {last.traffic} now: load of each rank / mean in layer {last.layer}, the least balanced one")
        parts = [_table(rows), _timelines(rows), bars, rank_bars({"": last.rank_share}, full=2.0)]
        return Group(*parts if self._loss is None else [*parts, rehosted_table(self._loss)])


def in_words(progress: Progress) -> str:
    """Write one line."""
    text = (
        f"{progress.traffic:5} batch {progress.step:3}  balancedness {progress.now:.3f}  "
        f"experts moved {progress.moved_experts:2}  layers {progress.switched_layers:2}"
    )
    return f"{text}  predicted {progress.predicted:.3f}" if progress.during_moves and progress.predicted else text


def _table(rows: list[list[Progress]]):
    headings = (
        "\nbatch",
        "balancedness\nfound → now",
        "pre-\ndicted",
        "experts\nmoved",
        "layers\nswitched",
        "batches\nmeanwhile",
        "ms idle\n/moving",
    )
    table = new_table(headings)
    for row in rows:
        last = row[-1]
        table.add_row(
            last.traffic,
            f"{last.step}",
            f"{last.found:.3f} → [bold]{last.now:.3f}[/]",
            "" if last.predicted is None else f"{last.predicted:.3f}",
            f"{last.moved_experts}",
            f"{last.switched_layers}",
            f"{last.steps_during_moves}",
            f"{milliseconds(last.idle_ms)} / {milliseconds(last.moving_ms)}",
        )
    return table


def _timelines(rows: list[list[Progress]]) -> Text:
    """One character per step."""
    text = Text(f" balancedness over the last {WINDOW_STEPS} batches, batch by batch (")
    text.append("yellow", "yellow").append(": weights move)")
    for row in rows:
        text.append(f"\n {row[-1].traffic:8}")
        shown = row[-_TIMELINE_WIDTH:]
        for before, progress in zip([row[0], *shown], shown, strict=False):
            is_loss = np.isnan(progress.rank_share).sum() > np.isnan(before.rank_share).sum()
            text.append("✕" if is_loss else _level(progress.now), "red" if is_loss else _style(progress))
    return text


def _level(balancedness: float) -> str:
    height = (balancedness - _LOWEST) / (1 - _LOWEST) * (len(_LEVELS) - 1)
    return _LEVELS[min(max(round(height), 0), len(_LEVELS) - 1)]


def _style(progress: Progress) -> str:
    if progress.during_moves:
        return "yellow"
    return "green" if progress.now >= MIN_BALANCEDNESS else "red"
