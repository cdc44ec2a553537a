"""A model whose experts are spread over a group, as `expert_parallel` makes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from eplb_core import Topology, check_placement
from eplb_core._checks import require
from eplb_core.maps import count_replicas
from eplb_torch.dispatch import DeviceMaps
from eplb_torch.integrations._exchange import Group
from eplb_torch.integrations._experts import enlarged, install
from eplb_torch.live_model import check_regroup
from eplb_torch.weights import ExpertWeights


class ExpertParallelModel:
    """A model whose experts are spread over a process group: its live slots, maps and counters.

    Made by `expert_parallel`.

    Attributes:
        model: the model, changed in place.
        topology: sizes of the group.
        layer_names: path of the experts module of each MoE layer; their order is the layer axis of everything here.
        weights: this rank's slots, in the very tensors that the model computes with.
        maps: the dispatch maps that the model looks up.
        group: through which tokens travel; None for the default group.
        is_idle: whether this rank serves others only; see `idle`.
        is_whole: whether every expert has a copy; else the model refuses to run.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        layer_names: tuple[str, ...],
        weights: ExpertWeights,
        physical_to_logical: Int[np.ndarray, "layers slots"],
        maps: DeviceMaps,
        group: Group = None,
    ):
        self.model, self.topology, self.layer_names = model, topology, layer_names
        self.weights, self.maps, self.group = weights, maps, group
        self._placement = physical_to_logical.astype(np.int32)
        self.is_idle, self.is_whole = False, self._hosts_all()
        self._load = torch.zeros_like(maps.replica_count, dtype=torch.int64)
        self._taken, self._new = torch.zeros_like(self._load), torch.zeros_like(self._load)

    @property
    def num_logical(self) -> int:
        """Experts of each layer."""
        return self.maps.num_logical

    @property
    def placement(self) -> Int[np.ndarray, "layers slots"]:
        """A copy of the placement in force, `[layers, slots]` int32."""
        return self._placement.copy()

    @property
    def ep_rank(self) -> int:
        """This rank in the group."""
        return rank_in(self.group)

    def counted(self, layer: int) -> Int[Tensor, " logical"]:
        """The counter behind `load` for one layer, to be added to in place."""
        return self._load[layer]

    def load(self) -> Int[Tensor, "layers logical"]:
        """Copy the tokens this rank's routers sent to each expert since the last reset, `[layers, logical]` int64.

        Sum it over the group for the load of the model. Padding that the model itself routes is counted.
        """
        return self._load.clone()

    def take_load(self) -> Int[Tensor, "layers logical"]:
        """Hand out the tokens since the last call, in a tensor that is reused: the next call overwrites it.

        For `ExpertBalancer.step` after every forward. `load` goes on counting beside it.

        Returns:
            `[layers, logical]` int64, of this rank.
        """
        torch.sub(self._load, self._taken, out=self._new)
        # Not a reset: copies of an expert take turns by what was counted, also where a forward has few tokens.
        self._taken.copy_(self._load)
        return self._new

    def reset_load(self) -> None:
        """Count from zero again, also for `take_load`."""
        self._load.zero_()
        self._taken.zero_()

    def commit(self, physical_to_logical: Int[Any, "*layers slots"], *, layer: int | None = None) -> None:
        """Route by a new placement from the next forward on: all layers, or one `layer` given `[slots]`.

        Moves no weights: commit when `weights` holds what the placement says, between the same two forwards on
        every rank. Maps change in place.

        Raises:
            EplbError: if the placement is malformed, leaves an expert without a slot, or gives one more copies than
                the maps have room for. The placement in force stays then.
        """
        new = np.asarray(physical_to_logical)
        check_placement(new if layer is None else new[None], self.topology, self.num_logical)
        self.maps.update(new, layer=layer)
        self._placement[slice(None) if layer is None else layer] = new
        self.is_whole = self.is_whole or self._hosts_all()

    def regroup(
        self, physical_to_logical: Int[Any, "layers slots"], topology: Topology, group: dist.ProcessGroup | None
    ) -> None:
        """Be part of another group from the next forward on; see `eplb_torch.live_model.ElasticModel`.

        Weights stay where they are in memory; maps do unless they must be wider.

        Raises:
            EplbError: if the placement or the group does not fit. While it leaves an expert without a copy, the
                model refuses to run.
        """
        check_regroup(physical_to_logical, topology, self)
        check_group(topology, group)
        self.maps.resize(physical_to_logical)
        self.topology, self.group = topology, group
        self._placement = np.array(physical_to_logical, dtype=np.int32)
        self.is_whole = self._hosts_all()

    def resize(self, slots_per_rank: int) -> None:
        """Make room for more experts on this rank; `regroup` must follow before the next forward.

        Takes new memory for all layers before the old is let go.

        Raises:
            EplbError: if there are more slots already.
            RuntimeError: if there is not enough memory (`torch.OutOfMemoryError` on accelerators).
        """
        require(
            slots_per_rank >= self.weights.slots_per_rank,
            "`ExpertParallelModel.resize(slots_per_rank=...)` must be at least the present number",
            f"slots_per_rank={slots_per_rank}, present {self.weights.slots_per_rank}",
            "Slots that hold experts cannot be taken away.",
        )
        modules = [self.model.get_submodule(name) for name in self.layer_names]
        layers = [enlarged(layer, slots_per_rank) for layer in self.weights.layers]
        self.weights = self.weights.replaced(layers)
        for module, layer in zip(modules, layers, strict=True):
            install(module, layer, slots_per_rank)
        self.is_whole = False

    def _hosts_all(self) -> bool:
        return bool(count_replicas(self._placement, self.maps.num_logical).all())

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Join a forward of the other ranks without tokens of one's own.

        Transformers models cannot be called with an empty batch. Inside this context, whatever the model is called
        with, say one token, is neither sent to an expert nor counted and its logits mean nothing, while this rank's
        experts serve the others.
        """
        self.is_idle = True
        try:
            yield
        finally:
            self.is_idle = False


def rank_in(group: Group) -> int:
    """This process's rank in a group, also in one that `torch.distributed` does not know by name."""
    return dist.get_rank() if group is None else group.rank()


def check_group(topology: Topology, group: Group) -> None:
    """Refuse a group of another size than the topology's."""
    require(
        group is not None or dist.is_initialized(),
        "`expert_parallel` needs torch.distributed",
        "no initialised default process group",
        "Call torch.distributed.init_process_group first, with a timeout.",
    )
    size = dist.get_world_size() if group is None else group.size()
    require(
        size == topology.ep_size,
        "`expert_parallel(topology=...)` must have the ranks of the group",
        f"ep_size={topology.ep_size}, group size={size}",
        "Pass the expert-parallel group.",
    )
