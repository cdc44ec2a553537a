"""What all pictures share: colours, sizes, labels that keep apart, and writing files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eplb_core._checks import require
from eplb_core._extras import import_extra

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, without its yellow, which is too pale for lines."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = "cividis"
"""Colours of heat maps: even steps of lightness, the same with and without red-green vision."""

GREY = "0.45"
DOTS_PER_INCH = 100


def new_figure(figure: Any, width: float, height: float) -> Any:
    """Take the given figure or subfigure, or make one of so many inches."""
    if figure is not None:
        return figure
    return import_extra("matplotlib.figure", "cli", "plots").Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, file: Path | str) -> None:
    """Write a figure as PNG, or as what the file's ending says.

    Raises:
        EplbError: as `check_ending`.
        OSError: if the file cannot be written.
    """
    check_ending(file)
    figure.savefig(file, dpi=DOTS_PER_INCH)


def check_ending(file: Path | str) -> None:
    """Refuse the name of a picture whose ending says no format that matplotlib writes.

    Raises:
        EplbError: listing the endings.
    """
    known = new_figure(None, 1.0, 1.0).canvas.get_supported_filetypes()
    ending = Path(file).suffix.lower().removeprefix(".")
    require(
        ending in known,
        "The name of a picture must end in " + ", ".join(f".{name}" for name in sorted(known)),
        f"{str(file)!r}",
        "Use .png or .svg.",
    )


def png(figure: Any) -> bytes:
    """Draw a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DOTS_PER_INCH, format="png")
    return buffer.getvalue()


def colour(index: int) -> str:
    """The colour of the curve with this index, from the start again when they run out."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of the curve with this index; other than its colour's, a second time round."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def clean(axis: Any) -> None:
    """Take away the frame's top and right, and put a light grid behind."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours differ by `gap`, in their order, as little as need be.

    Groups that touch are centred on the mean of their wishes.

    >>> spread([0.0, 0.0, 5.0], gap=1.0)
    [-0.5, 0.5, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[list[Any]] = []  # [mean wish of the first member, members]
    for index in order:
        groups.append([positions[index], [index]])
        while len(groups) > 1 and groups[-2][0] + gap * len(groups[-2][1]) > groups[-1][0]:
            (low, below), (high, above) = groups[-2:]
            shifted = high - gap * len(below)
            start = (low * len(below) + shifted * len(above)) / (len(below) + len(above))
            groups[-2:] = [[start, below + above]]
    placed = [0.0] * len(positions)
    for start, members in groups:
        for rank, index in enumerate(members):
            placed[index] = start + gap * rank
    return placed


def text_height(axis: Any, size: float, share: float = 0.8) -> float:
    """Height of a line of text in the units of a linear vertical axis, which takes `share` of its figure's height."""
    low, high = axis.get_ylim()
    inches = axis.figure.bbox.height / axis.figure.dpi * share
    return (high - low) * size * 1.3 / 72 / inches


def label_ends(axis: Any, ends: Sequence[tuple[float, str, str]], *, share: float, size: float = 9.0) -> None:
    """Write at the right end of each curve what it is, in its colour.

    Args:
        axis: with the limits that it will keep.
        ends: of each curve its last value, text and colour.
        share: of the figure's height that the axis takes.
        size: of the text in points.
    """
    placed = spread([end for end, _, _ in ends], text_height(axis, size, share))
    for at, (_, text, shade) in zip(placed, ends, strict=True):
        axis.annotate(
            text,
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=shade,
            fontsize=size,
            va="center",
            annotation_clip=False,
        )
