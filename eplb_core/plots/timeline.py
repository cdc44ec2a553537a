"""Balancedness over time, and what each rebalance moved."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eplb_core.plots.style import GREY, clean, colour, label_ends, marker, new_figure
from eplb_core.replay import Replay

_MOST_MARKERS = 60


def timeline(
    replays: Sequence[Replay], *, bound: Any = None, labels: Sequence[str] | None = None, figure: Any = None
) -> Any:
    """Draw the mean balancedness of each judged window, and below it the experts that each rebalance moved.

    A marker on a curve is a rebalance that moved something; the window after it is the first under the new placement.

    Args:
        replays: of one trace.
        bound: `[windows - 1]` balancedness that no placement can exceed; not drawn without it.
        labels: names of the curves; by default the configurations' labels.
        figure: to draw into.
    """
    figure = new_figure(figure, 9, 4.6)
    labels = [replay.configuration.label for replay in replays] if labels is None else labels
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    ends = []
    for index, (replay, label) in enumerate(zip(replays, labels, strict=True)):
        shade, series = colour(index), replay.balancedness.mean(axis=1)
        window = np.arange(1, len(series) + 1)
        moves = [event for event in replay.rebalances if event.migration.moved_experts]
        when = np.asarray([event.window + 1 for event in moves], dtype=int)
        top.plot(window, series, color=shade, linewidth=1.4)
        sparse = when if len(when) <= _MOST_MARKERS else when[:: -(-len(when) // _MOST_MARKERS)]
        top.plot(sparse, series[sparse - 1], marker(index), color=shade, markersize=4)
        moved = [event.migration.moved_experts for event in moves]
        below.plot(when, moved, marker(index), color=shade, markersize=3, alpha=0.8)
        ends.append((float(series[-1]), label, shade))
    if bound is not None:
        top.plot(np.arange(1, len(bound) + 1), bound, ":", color=GREY, linewidth=1.4)
        ends.append((float(bound[-1]), "bound", GREY))
    _finish(top, below, ends)
    return figure


def _finish(top: Any, below: Any, ends: list) -> None:
    from matplotlib.ticker import MaxNLocator

    top.set_ylabel("balancedness\n(mean of layers)")
    top.set_ylim(top=min(1.0, top.get_ylim()[1]))
    below.set_ylabel("experts moved")
    below.set_xlabel("window")
    below.set_xlim(left=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(line.get_ydata().size for line in below.get_lines()):
        below.set_yscale("log")
    else:
        below.set_yticks([0])
    for axis in (top, below):
        clean(axis)
    label_ends(top, ends, share=0.6)
