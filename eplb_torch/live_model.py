"""One model as a balancer sees it: its weights, and the placement that they are in."""

from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from jaxtyping import Int

from eplb_core import EMPTY, Topology, check_placement
from eplb_core._checks import EplbError, check_count, check_kind, host_array, require
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


class ElasticModel(ServedModel, Protocol):
    """What a model must be able to do for its group to change. `LiveModel` and the models of
    `integrations.huggingface` can.
    """

    def regroup(
        self, physical_to_logical: Int[Any, "layers slots"], topology: Topology, group: dist.ProcessGroup | None
    ) -> None:
        """Be part of another group, in which slots and ranks have other numbers. Moves no weights.

        Args:
            physical_to_logical: `[layers, slots]` of the new group; this rank's part is what its slots hold. An
                expert without a copy must not be served, which is for the caller to see to.
            topology: sizes of the group.
            group: between the ranks, for the tokens.
        """
        ...

    def resize(self, slots_per_rank: int) -> None:
        """Let `weights` have more slots per rank: what it holds stays in the first. Called before `regroup`."""
        ...


class LiveModel:
    """A model given by its parts, for engines that have a dispatch of their own.

    Args:
        weights: this rank's slots, one layer for each of the placement.
        maps: what the engine's dispatch looks up; they are updated in place.
        topology: sizes of the group.
        physical_to_logical: `[layers, slots]` that weights and maps are in; `EMPTY` everywhere for a rank that is to
            join a group, with a topology of one rank.

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
        check_kind(weights, ExpertWeights, "LiveModel(weights=...)")
        check_kind(maps, DeviceMaps, "LiveModel(maps=...)")
        self.weights, self.maps, self.topology = weights, maps, topology
        ids = host_array(physical_to_logical)
        check_placement(ids, topology, self.num_logical, allow_lost=True)
        if (ids != EMPTY).any():
            check_placement(ids, topology, self.num_logical)
        require(
            weights.num_layers == maps.num_layers == len(ids),
            "`LiveModel` needs weights, maps and a placement of the same layers",
            f"{weights.num_layers}, {maps.num_layers} and {len(ids)}",
            "Register the layers of the placement.",
        )
        self._placement = np.array(ids, dtype=np.int32)

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
        new = host_array(physical_to_logical)
        if layer is not None:
            layer = check_count(layer, "LiveModel.commit(layer=...)", 0, len(self._placement) - 1)
        check_placement(new if layer is None else new[None], self.topology, self.num_logical)
        self.maps.update(new, layer=layer)
        self._placement[slice(None) if layer is None else layer] = new

    def regroup(
        self, physical_to_logical: Int[Any, "layers slots"], topology: Topology, group: dist.ProcessGroup | None = None
    ) -> None:
        """Be part of another group, of which this rank's slots hold what the placement says. See `ElasticModel`.

        The engine's dispatch must be told of the group by the engine.

        Raises:
            EplbError: if the placement does not fit. Experts may be lost.
        """
        check_regroup(physical_to_logical, topology, self)
        self.maps.resize(physical_to_logical)
        self.topology, self._placement = topology, np.array(physical_to_logical, dtype=np.int32)

    def resize(self, slots_per_rank: int) -> None:
        """Make room for more experts on this rank. See `ElasticModel`.

        Raises:
            EplbError: always, as the tensors are the engine's. Override this where it can allocate larger ones:
                copy the rows, and set `weights` to `self.weights.replaced(...)`.
        """
        raise EplbError(
            f"`LiveModel.resize` cannot allocate the engine's tensors; got slots_per_rank={slots_per_rank}, present "
            f"{self.weights.slots_per_rank}. Override it, or begin with more slots per rank."
        )


def check_regroup(physical_to_logical: Int[Any, "layers slots"], topology: Topology, model: ServedModel) -> None:
    """Refuse a placement and sizes that a model's slots cannot be part of."""
    check_placement(physical_to_logical, topology, model.num_logical, allow_lost=True)
    layers = len(np.asarray(physical_to_logical))
    require(
        (layers, topology.slots_per_rank) == (model.weights.num_layers, model.weights.slots_per_rank),
        "`regroup(topology=...)` must have the layers and slots of this rank's weights",
        f"{layers} layers of {topology.slots_per_rank} slots for {model.weights.num_layers} of "
        f"{model.weights.slots_per_rank}",
        "Call `resize` first where ranks get more slots.",
    )
