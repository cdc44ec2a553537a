"""What each rank sends to each other in one plan."""

from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core.plots.ranks import whole_numbers
from eplb_core.plots.style import MAP, new_figure
from eplb_core.topology import Topology
from eplb_core.units import in_units, unit_of


def transfers(
    matrix: Int[np.ndarray, "ep_size ep_size"],
    topology: Topology,
    *,
    bytes_per_expert: int,
    title: str = "one plan",
    figure: Any = None,
) -> Any:
    """Draw a transfer matrix (`costs.transfer_matrix`); lines part the nodes.

    Args:
        matrix: `[ep_size, ep_size]` experts from each rank (row) to each rank (column).
        topology: sizes.
        bytes_per_expert: bytes of one expert in one layer.
        title: the total is added.
        figure: to draw into.
    """
    figure = new_figure(figure, 5.2, 4.4)
    axis = figure.subplots()
    unit, divisor = unit_of(float(matrix.max()) * bytes_per_expert)
    image = axis.imshow(matrix * (bytes_per_expert / divisor), cmap=MAP, vmin=0, interpolation="nearest")
    for node in range(1, topology.num_nodes):
        edge = node * topology.ranks_per_node - 0.5
        axis.axhline(edge, color="white", linewidth=1)
        axis.axvline(edge, color="white", linewidth=1)
    total = in_units(float(matrix.sum()) * bytes_per_expert)
    axis.set_title(f"{title}: {matrix.sum()} experts, {total}", fontsize=10)
    axis.set_xlabel("receiving rank")
    axis.set_ylabel("sending rank")
    whole_numbers(axis)
    figure.colorbar(image, ax=axis, shrink=0.9).set_label(unit)
    return figure
