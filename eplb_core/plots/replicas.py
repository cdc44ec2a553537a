"""How many copies each expert has."""

from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core._extras import import_extra
from eplb_core.maps import derive_maps
from eplb_core.plots.ranks import whole_numbers
from eplb_core.plots.style import MAP, new_figure


def replicas(
    physical_to_logical: Int[Any, "layers slots"], num_logical: int, *, title: str = "copies", figure: Any = None
) -> Any:
    """Draw the number of copies of every expert in every layer.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        num_logical: experts of each layer.
        title: the largest number of copies is added.
        figure: to draw into.
    """
    matplotlib = import_extra("matplotlib", "cli", "plots")
    figure = new_figure(figure, 8.0, 3.6)
    axis = figure.subplots()
    count = np.asarray(derive_maps(physical_to_logical, num_logical).replica_count)
    low, most = min(int(count.min()), 1), int(count.max())
    steps = np.arange(low, most + 2)
    colours = matplotlib.colormaps[MAP].resampled(len(steps) - 1)
    norm = matplotlib.colors.BoundaryNorm(steps - 0.5, colours.N) if colours.N > 1 else None
    image = axis.imshow(count, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_title(f"{title}: at most {most} of an expert", fontsize=10)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    whole_numbers(axis)
    bar = figure.colorbar(image, ax=axis, shrink=0.9, ticks=steps[:-1][:: -(-len(steps) // 12)])
    bar.set_label("copies")
    return figure
