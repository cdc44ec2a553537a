"""Load of every rank in every layer, under two placements."""

from typing import Any

import numpy as np
from jaxtyping import Real

from eplb_core.metrics import rank_load
from eplb_core.plots.style import MAP, new_figure
from eplb_core.topology import Topology


def rank_loads(
    before: Real[Any, "layers slots"],
    after: Real[Any, "layers slots"],
    load: Real[Any, "layers logical"],
    topology: Topology,
    *,
    titles: tuple[str, str] = ("before", "after"),
    figure: Any = None,
) -> Any:
    """Draw the load of each rank and layer over the mean of its layer, before and after, with one scale.

    Args:
        before: `[layers, slots]` a placement.
        after: `[layers, slots]` another one.
        load: `[layers, logical]` tokens served under both.
        topology: sizes of the placements.
        titles: of the two panels; the mean balancedness is written below each.
        figure: to draw into.
    """
    figure = new_figure(figure, 8.0, 4.0)
    shares = [_over_mean(rank_load(placement, load, topology)) for placement in (before, after)]
    highest = max(float(share.max()) for share in shares)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, share, title in zip(panels, shares, titles, strict=True):
        image = axis.imshow(share, cmap=MAP, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}\nbalancedness {(1 / share.max(axis=1)).mean():.3f}", fontsize=9)
        axis.set_xlabel("rank")
        whole_numbers(axis)
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, shrink=0.9)
    bar.set_label("rank load / mean of the layer")
    return figure


def whole_numbers(axis: Any) -> None:
    """Let ticks be at whole numbers only: ids have no halves."""
    from matplotlib.ticker import MaxNLocator

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _over_mean(on_rank: np.ndarray) -> np.ndarray:
    mean = on_rank.mean(axis=1, keepdims=True)
    return np.divide(on_rank, mean, out=np.ones_like(on_rank), where=mean > 0)
