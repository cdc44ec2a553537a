"""One model as a balancer sees it: its weights, and the placement that they are in."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from eplb_core import Topology, check_placement
from eplb_torch.device_maps import DeviceMaps
from eplb_torch.weights import ExpertWeights


class ServedModel(Protocol):
    """What a balancer needs of a model. `LiveModel` and the models of `integrations.huggingface` have it.

    topology: sizes of the group.
    weights: this rank's slots.
    maps: what the model's dispatch looks up.
    num_logical: experts of each layer.
    placement: int32 `[layers, slots]` in force.
    """

    topology: Topology
    weights: ExpertWeights
    maps: DeviceMaps

    @property
    def num_logical(self) -> int: ...

    @property
    def placement(self) -> Int[np.ndarray, "layers slots"]: ...

    def commit(self, physical_to_logical: Int[Any, "*layers slots"], *, layer: int | None = None) -> None:
        """Route by a new placement from the next forward on: all layers, or one `layer` given `[slots]`."""
        ...


class LiveModel:
    """A model given by its parts, for engines that have a dispatch of their own.

    Args:
        weights: this rank's slots, one layer for each of the placement.
        maps: what the engine's dispatch looks up; they are updated in place.
        topology: sizes of the group.
        physical_to_logical: `[layers, slots]` that weights and maps are in.

    Raises:
        EplbError: if the placement does not fit, or lacks an expert.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        maps: DeviceMaps,
        topology: Topology,
        physical_to_logical: Int[Any, "layers slots"],
    ):
        self.weights, self.maps, self.topology = weights, maps, topology
        self._placement = np.array(physical_to_logical, dtype=np.int32)
        check_placement(self._placement, topology, self.num_logical)

    @property
    def num_logical(self) -> int:
        """Experts of each layer."""
        return self.maps.num_logical

    @property
    def placement(self) -> Int[np.ndarray, "layers slots"]:
        """A copy of the placement in force, `[layers, slots]` int32."""
        return self._placement.copy()

    def commit(self, physical_to_logical: Int[Any, "*layers slots"], *, layer: int | None = None) -> None:
        """Route by a new placement from the next forward on: all layers, or one `layer` given `[slots]`.

        Raises:
            EplbError: if the placement is malformed, lacks an expert, or has more copies of one than the maps have
                room for. What is in force stays then.
        """
        new = np.asarray(physical_to_logical)
        check_placement(new if layer is None else new[None], self.topology, self.num_logical)
        self.maps.update(new, layer=layer)
        self._placement[slice(None) if layer is None else layer] = new
