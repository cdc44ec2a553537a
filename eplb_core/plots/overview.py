"""One picture of a simulation: over time, against moves, and per rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eplb_core.plots.frontier import MOST_NAMES, frontier, undominated
from eplb_core.plots.ranks import rank_loads
from eplb_core.plots.style import new_figure
from eplb_core.plots.timeline import timeline
from eplb_core.simulate.replay import Replay


def overview(load: Any, replays: Sequence[Replay], *, bound: Any = None, title: str = "", figure: Any = None) -> Any:
    """Draw `timeline`, `frontier`, and `rank_loads` of the last window under the best replay's placements.

    Of more than seven replays, the timeline shows those that no other beats in both moves and balance.

    Args:
        load: `[windows, layers, logical]` the trace.
        replays: of this trace; at least one.
        bound: as for `timeline`.
        title: above everything.
        figure: to draw into.
    """
    figure = new_figure(figure, 12.0, 8.0)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    names = _names(replays)
    shown = range(len(replays))
    if len(replays) > MOST_NAMES:
        moved = np.asarray([float(replay.moved_experts) for replay in replays])
        shown = undominated(moved, np.asarray([replay.mean_balancedness for replay in replays]))[-MOST_NAMES:].tolist()
    timeline([replays[i] for i in shown], bound=bound, labels=[names[i] for i in shown], figure=upper)
    left, right = lower.subfigures(1, 2, width_ratios=[1, 1.3])
    frontier(replays, labels=names, figure=left)
    best = max(range(len(replays)), key=lambda index: replays[index].mean_balancedness)
    configuration = replays[best].configuration
    start = configuration.first_placement(*load.shape[1:])
    titles = f"{configuration.start.replace('_', '-')}, last window", f"{names[best]}, last window"
    rank_loads(start, replays[best].placements[-1], load[-1], configuration.topology, titles=titles, figure=right)
    figure.suptitle(title)
    return figure


def _names(replays: Sequence[Replay]) -> list[str]:
    """Labels of the configurations, with ranks and slots where these differ."""
    labels = [replay.configuration.label for replay in replays]
    sizes = [replay.configuration.topology for replay in replays]
    if len(set(sizes)) == 1:
        return labels
    return [f"{label} ({t.ep_size} x {t.slots_per_rank})" for label, t in zip(labels, sizes, strict=True)]
