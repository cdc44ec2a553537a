"""What each possible loss of a rank, or of a node, would lead to."""

from collections.abc import Sequence
from typing import Any

from eplb_core.elastic.survive import Loss
from eplb_core.plots.style import GREY, clean, colour, new_figure


def losses(
    dry_run: Sequence[Loss], *, balancedness: float | None = None, title: str = "after each loss", figure: Any = None
) -> Any:
    """Draw, for each loss, the balancedness of the survivors and the experts that no survivor holds.

    Losses after which some expert has no slot any more are marked by a cross, and hatched.

    Args:
        dry_run: what `survive.dry_run` returns.
        balancedness: before any loss, as a line to compare with.
        title: above everything.
        figure: to draw into.
    """
    figure = new_figure(figure, 8.0, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    places = range(len(dry_run))
    for marks, complete, label in (("o", True, "all experts hosted"), ("X", False, "too few slots")):
        chosen = [place for place in places if (not dry_run[place].unhosted) == complete]
        if chosen:
            values = [dry_run[place].balancedness for place in chosen]
            upper.plot(chosen, values, marks, color=colour(0 if complete else 1), label=label)
    if balancedness is not None:
        upper.axhline(balancedness, color=GREY, linewidth=1, linestyle="--", label="before the loss")
    upper.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    upper.set_ylabel("balancedness")
    bars = lower.bar(places, [len(loss.lost) for loss in dry_run], color=colour(0), width=0.7)
    for bar, loss in zip(bars, dry_run, strict=True):
        bar.set(hatch="//" if loss.unhosted else None, facecolor=colour(1 if loss.unhosted else 0), edgecolor="white")
    lower.set_ylabel("experts to load\nfrom a checkpoint")
    lower.set_xlabel("lost " + ("rank" if all(len(loss.ranks) == 1 for loss in dry_run) else "node"))
    lower.locator_params(axis="both", integer=True)
    for axis in (upper, lower):
        clean(axis)
    figure.suptitle(title, fontsize=10)
    return figure
