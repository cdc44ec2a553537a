"""One picture of a simulation: over time, against moves, and per rank."""

from collections.abc import Sequence
from typing import Any

from eplb_core.plots.frontier import frontier
from eplb_core.plots.ranks import rank_loads
from eplb_core.plots.style import new_figure
from eplb_core.plots.timeline import timeline
from eplb_core.replay import Replay


def overview(load: Any, replays: Sequence[Replay], *, bound: Any = None, title: str = "", figure: Any = None) -> Any:
    """Draw `timeline`, `frontier`, and `rank_loads` of the last window under the best replay's placements.

    Args:
        load: `[windows, layers, logical]` the trace.
        replays: of this trace; at least one.
        bound: as for `timeline`.
        title: above everything.
        figure: to draw into.
    """
    figure = new_figure(figure, 12.0, 8.0)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    timeline(replays, bound=bound, figure=upper)
    left, right = lower.subfigures(1, 2, width_ratios=[1, 1.3])
    frontier(replays, figure=left)
    best = max(replays, key=lambda replay: replay.mean_balancedness)
    configuration = best.configuration
    start = configuration.first_placement(*load.shape[1:])
    titles = f"{configuration.start.replace('_', '-')}, last window", f"{configuration.label}, last window"
    rank_loads(start, best.placements[-1], load[-1], configuration.topology, titles=titles, figure=right)
    figure.suptitle(title)
    return figure
