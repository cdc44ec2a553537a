"""Balance against moves: what each configuration reaches, and what it sends for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eplb_core.plots.style import clean, colour, marker, new_figure, spread, text_height
from eplb_core.simulate.bootstrap import mean_interval
from eplb_core.simulate.replay import Replay

MOST_NAMES = 7
"""With more points, colours stand for policies, and only the points that no other beats are named."""


def frontier(replays: Sequence[Replay], *, labels: Sequence[str] | None = None, figure: Any = None) -> Any:
    """Draw mean balancedness over moved experts per window, with confidence intervals.

    Left and up is better. The line joins the configurations that no other one beats in both.

    Args:
        replays: of one trace.
        labels: names of the points; by default the configurations' labels.
        figure: to draw into.
    """
    figure = new_figure(figure, 5.5, 4.2)
    axis = figure.subplots()
    labels = [replay.configuration.label for replay in replays] if labels is None else labels
    balance = np.asarray([replay.mean_balancedness for replay in replays])
    moved = np.asarray([replay.moved_experts / len(replay.balancedness) for replay in replays])
    best = undominated(moved, balance)
    axis.plot(moved[best], balance[best], color="0.8", linewidth=2, zorder=1)
    kinds = _kinds(replays)
    for kind, replay, x, y in zip(kinds, replays, moved, balance, strict=True):
        low, high = mean_interval(replay.balancedness.mean(axis=1))
        if np.isfinite(low):
            axis.plot([x, x], [max(low, 0), min(high, 1)], color=colour(kind), linewidth=1, alpha=0.6)
        axis.plot(x, y, marker(kind), color=colour(kind), markersize=7, zorder=3)
    axis.set_xlabel("experts moved per window")
    axis.set_ylabel("balancedness on the next window")
    axis.set_xscale("symlog", linthresh=max(_smallest(moved), 1e-3))
    axis.set_xlim(left=0)
    axis.margins(x=0.08)
    clean(axis)
    named = range(len(replays)) if len(replays) <= MOST_NAMES else best
    _name(axis, [labels[i] for i in named], moved[named], balance[named], [kinds[i] for i in named])
    return figure


def undominated(moved: np.ndarray, balance: np.ndarray) -> np.ndarray:
    """Indices of the points that none beats in both moves and balance, fewest moves first; the first of equals.

    >>> undominated(np.asarray([5.0, 0.0, 5.0, 9.0]), np.asarray([0.8, 0.6, 0.9, 0.7])).tolist()
    [1, 2]
    """
    order = np.lexsort((-balance, moved))
    reached = np.concatenate([[-np.inf], np.maximum.accumulate(balance[order])[:-1]])
    return order[balance[order] > reached]


def _smallest(moved: np.ndarray) -> float:
    return float(moved[moved > 0].min()) if (moved > 0).any() else 1.0


def _kinds(replays: Sequence[Replay]) -> list[int]:
    """Which colour and marker each point gets: its own, or its policy's where there are many."""
    if len(replays) <= MOST_NAMES:
        return list(range(len(replays)))
    policies = [replay.configuration.policy_name for replay in replays]
    return [list(dict.fromkeys(policies)).index(policy) for policy in policies]


def _name(axis: Any, labels: Sequence[str], x: np.ndarray, y: np.ndarray, kinds: Sequence[int]) -> None:
    """Write each label beside its point, towards the middle of the picture, all at different heights."""
    left = x > 0.3 * x.max()
    for index, at in enumerate(spread(y.tolist(), text_height(axis, 8.0))):
        # Labels to the left start before the whole cluster of points, so that none lies on a marker.
        cluster = x[left & (x > x[index] / 3)] if left[index] else x[[index]]
        axis.annotate(
            labels[index],
            (cluster.min(), at),
            xytext=(-9 if left[index] else 9, 3),
            textcoords="offset points",
            ha="right" if left[index] else "left",
            fontsize=8,
            color=colour(kinds[index]),
        )
