"""The dispatch maps on the device of the tokens."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core import EMPTY, derive_maps
from eplb_core._checks import MOST_EXPERTS, check_count, check_ids, check_room, host_array, require
from eplb_core.maps import count_replicas
from eplb_core.shares import RESOLUTION
from eplb_core.shares.turns import derive_turns


class LayerMaps(NamedTuple):
    """Where the tokens of each expert of one layer go, as tensors on the device of the tokens.

    logical_to_physical: int32 `[logical, max_replicas]` slots, padded with `EMPTY`: each copy once and ascending or,
        where copies have unequal shares, each as often as its share, in the order of their turns.
    replica_count: int32 `[logical]` live entries of `logical_to_physical`; 0 for a lost expert.
    """

    logical_to_physical: Tensor
    replica_count: Tensor


class DeviceMaps:
    """The dispatch maps of all layers, in tensors that keep their addresses for as long as this object lives.

    A layer's maps are views, so a captured CUDA graph or a compiled function that holds them sees every update.
    Updates are copies on the current stream: make them on the stream that runs the model.

    How the copies of an expert share its tokens is a matter of the maps alone: evenly by default, or by integer
    shares of any origin (`balanced_shares`, `local_shares`). Nothing is compiled or captured anew when they change.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force.
        num_logical: experts the router knows.
        max_replicas: width of the maps: most copies that an expert of any later placement has and, where shares are
            used, most that those of one expert add up to. By default as many as there can be copies while every
            expert keeps one; at least `RESOLUTION` where `shares` are given.
        device: of the tokens.
        shares: integers `[layers, slots]`; by default copies share evenly.

    Raises:
        EplbError: if the placement is malformed, shares do not fit it, or either needs wider maps.

    >>> maps = DeviceMaps([[0, 1, 0]], num_logical=2, max_replicas=4, shares=[[2, 1, 1]])
    >>> maps.layer(0).logical_to_physical.tolist()
    [[0, 0, 2, -1], [1, -1, -1, -1]]
    """

    def __init__(
        self,
        physical_to_logical: Int[Any, "layers slots"],
        num_logical: int,
        *,
        max_replicas: int | None = None,
        device: torch.device | str | None = None,
        shares: Int[Any, "layers slots"] | None = None,
    ):
        placement = host_array(physical_to_logical)
        num_logical = check_count(num_logical, "DeviceMaps(num_logical=...)", 1, MOST_EXPERTS)
        require(
            placement.ndim == 2,
            "`DeviceMaps(physical_to_logical=...)` must be `[layers, slots]`",
            f"shape={placement.shape}",
            "Add a leading axis of one layer if there is only one.",
        )
        check_ids(placement, placement.shape[1], "DeviceMaps(physical_to_logical=...)")
        num_layers, self._num_slots = placement.shape
        self.num_logical = num_logical
        self._is_wide = max_replicas is None
        widest = max(self._num_slots - num_logical + 1, 1 if shares is None else RESOLUTION)
        given = widest if max_replicas is None else max_replicas
        self.max_replicas = check_count(given, "DeviceMaps(max_replicas=...)", 1, advice="Give every expert a slot.")
        shape = (num_layers, num_logical, self.max_replicas)
        check_room("DeviceMaps", *shape)
        self.logical_to_physical = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
        self.replica_count = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.update(placement, shares=shares)

    @property
    def num_layers(self) -> int:
        """Layers these maps hold."""
        return self.replica_count.shape[0]

    @property
    def num_slots(self) -> int:
        """Slots of each layer, over all ranks."""
        return self._num_slots

    def layer(self, index: int) -> LayerMaps:
        """The maps of one layer, as views that later updates change."""
        index = check_count(index, "DeviceMaps.layer(index=...)", 0, self.num_layers - 1, "Count layers from 0.")
        return LayerMaps(self.logical_to_physical[index], self.replica_count[index])

    def resize(self, physical_to_logical: Int[Any, "layers slots"]) -> None:
        """Switch all layers to a placement with another number of slots, as after the loss of a rank.

        Tensors keep their addresses unless the maps must be wider: because an expert has more copies than fit or, if
        `max_replicas` was not given, because there are more slots to copy experts to. Then `layer` returns other
        views, and whatever holds the old ones must ask again. Experts may be lost.

        Raises:
            EplbError: if the placement is malformed or has other layers; the maps are unchanged then.
        """
        placement = host_array(physical_to_logical)
        require(
            placement.ndim == 2 and len(placement) == self.num_layers,
            f"`DeviceMaps.resize(physical_to_logical=...)` must have {self.num_layers} layers",
            f"shape={placement.shape}",
            "Only the number of slots may change.",
        )
        check_ids(placement, placement.shape[1], "DeviceMaps.resize(physical_to_logical=...)")
        most = int(count_replicas(placement, self.num_logical).max())
        widest = placement.shape[1] - self.num_logical + 1 if self._is_wide else 1
        width = max(self.max_replicas, most, widest)
        maps = derive_maps(placement, self.num_logical, max_replicas=width)
        if width > self.max_replicas:
            shape = (self.num_layers, self.num_logical, width)
            self.logical_to_physical = self.logical_to_physical.new_full(shape, EMPTY)
        self._num_slots, self.max_replicas = placement.shape[1], width
        self.logical_to_physical.copy_(torch.tensor(maps.logical_to_physical))
        self.replica_count.copy_(torch.tensor(maps.replica_count))

    def update(
        self,
        physical_to_logical: Int[Any, "*layers slots"],
        *,
        layer: int | None = None,
        shares: Int[Any, "*layers slots"] | None = None,
    ) -> None:
        """Switch all layers to the placement `[layers, slots]`, or one `layer` to `[slots]`, in place.

        Args:
            physical_to_logical: the placement; the one in force where only shares change.
            layer: the layer to switch; by default all.
            shares: integers of the placement's shape; by default copies share evenly.

        Raises:
            EplbError: if the placement is malformed or has another shape, shares do not fit it, or either needs
                wider maps; the maps are unchanged then.
        """
        placement = host_array(physical_to_logical)
        if layer is not None:
            layer = check_count(layer, "DeviceMaps.update(layer=...)", 0, self.num_layers - 1, "Count layers from 0.")
        expected = (self._num_slots,) if layer is not None else (self.num_layers, self._num_slots)
        require(
            placement.shape == expected,
            f"`DeviceMaps.update(physical_to_logical=..., layer={layer})` must have the shape {expected}",
            f"shape={placement.shape}",
            "Build new DeviceMaps where the number of layers or slots changes.",
        )
        placement = placement.reshape(-1, self._num_slots)
        check_ids(placement, self._num_slots, "DeviceMaps.update(physical_to_logical=...)")
        if shares is None:
            maps = derive_maps(placement, self.num_logical, max_replicas=self.max_replicas)
        else:
            shares = host_array(shares)
            require(
                shares.shape == expected,
                "`DeviceMaps.update(shares=...)` must have the placement's shape",
                f"shape={shares.shape}, where the placement has {expected}",
                "Pass the shares of the layers that are updated.",
            )
            shares = shares.reshape(placement.shape)
            maps = derive_turns(placement, shares, self.num_logical, max_turns=self.max_replicas)
        where = slice(None) if layer is None else slice(layer, layer + 1)
        self.logical_to_physical[where].copy_(torch.tensor(maps.logical_to_physical))
        self.replica_count[where].copy_(torch.tensor(maps.replica_count))
