"""Balancedness over time, and what each rebalance moved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from eplb_core.plots.style import GREY, clean, colour, label_ends, marker, new_figure
from eplb_core.simulate.replay import Replay

_MOST_MARKERS = 40
_MOST_WINDOWS = 60


def timeline(
    replays: Sequence[Replay], *, bound: Any = None, labels: Sequence[str] | None = None, figure: Any = None
) -> Any:
    """Draw the mean balancedness of each judged window, and below it the experts that each rebalance moved.

    A marker is a rebalance that moved something, at the first window under the new placement; above, markers are left
    out where there are more than 40. Of more than 60 windows each curve is drawn thin, with a running mean on top.

    Args:
        replays: of one trace.
        bound: `[windows - 1]` balancedness that no placement can exceed; not drawn without it.
        labels: names of the curves; by default the configurations' labels.
        figure: to draw into.
    """
    figure = new_figure(figure, 9.0, 4.6)
    labels = [replay.configuration.label for replay in replays] if labels is None else labels
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    ends = []
    for index, (replay, label) in enumerate(zip(replays, labels, strict=True)):
        shade = colour(index)
        curve = _draw_curve(top, replay.balancedness.mean(axis=1), shade)
        moves = [event for event in replay.rebalances if event.migration.moved_experts]
        when = np.asarray([event.window + 1 for event in moves], dtype=int)
        if len(when) <= _MOST_MARKERS:
            top.plot(when, curve[when - 1], marker(index), color=shade, markersize=4)
        below.plot(when, [e.migration.moved_experts for e in moves], marker(index), color=shade, markersize=3)
        ends.append((float(curve[-1]), label, shade))
    if bound is not None:
        top.plot(np.arange(1, len(bound) + 1), bound, ":", color=GREY, linewidth=1.4)
        ends.append((float(bound[-1]), "bound", GREY))
    _finish(top, below, ends)
    return figure


def running_mean(series: Float[np.ndarray, " windows"], width: int) -> Float[np.ndarray, " windows"]:
    """Mean of the `width` windows around each one, as far as there are any.

    >>> running_mean(np.asarray([1.0, 2.0, 6.0, 3.0]), 3).tolist()
    [1.5, 3.0, 3.6666666666666665, 4.5]
    """
    position = np.arange(len(series))
    low, high = np.maximum(position - width // 2, 0), np.minimum(position + width // 2 + 1, len(series))
    total = np.concatenate([[0.0], np.cumsum(series)])
    return (total[high] - total[low]) / (high - low)


def _draw_curve(axis: Any, series: np.ndarray, shade: str) -> np.ndarray:
    """Draw a series, and give the curve that stands out."""
    window = np.arange(1, len(series) + 1)
    if len(series) <= _MOST_WINDOWS:
        axis.plot(window, series, color=shade, linewidth=1.4)
        return series
    smooth = running_mean(series, len(series) // 20 * 2 + 1)
    axis.plot(window, series, color=shade, linewidth=0.6, alpha=0.5)
    axis.plot(window, smooth, color=shade, linewidth=1.8)
    return smooth


def _finish(top: Any, below: Any, ends: list) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    top.set_ylabel("balancedness\n(mean of layers)")
    top.set_ylim(top=min(1.0, top.get_ylim()[1]))
    below.set_ylabel("experts\nmoved")
    below.set_xlabel("window")
    below.set_xlim(left=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(line.get_ydata().size for line in below.get_lines()):
        below.set_yscale("log")
        below.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=5))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.yaxis.set_minor_formatter(NullFormatter())
        below.margins(y=0.2)
    else:
        below.set_yticks([0])
    for axis in (top, below):
        clean(axis)
    label_ends(top, ends, share=0.6)
