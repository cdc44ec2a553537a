"""Dispatch and recording of all layers, as one object that an engine's MoE layers call."""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core._checks import check_choice, check_count, check_kind
from eplb_torch.device_maps import DeviceMaps, LayerMaps
from eplb_torch.dispatch import count_tokens, mask_padding, select_and_count
from eplb_torch.recording import LayerRecorder, LoadRecorder


class LayerDispatcher:
    """Dispatch of one layer: what its MoE block calls between the router and the all-to-all.

    Made by `Dispatcher.layer`. No host synchronisation and stable addresses, so it can be captured or compiled with
    the model; updates of placement, shares and recording gate reach it.
    """

    def __init__(self, maps: LayerMaps, rotation: Tensor, recorder: LayerRecorder, count: str):
        self._maps, self._rotation, self._recorder, self._count = maps, rotation, recorder, count

    def __call__(
        self, topk_ids: Int[Tensor, "*tokens"], *, unpadded: int | Tensor | None = None
    ) -> Int[Tensor, "*tokens"]:
        """Choose slots as `select_slots` does, going on where the last call ended, and count them.

        Args, Returns: as `select_slots`.
        """
        topk_ids = mask_padding(topk_ids, unpadded)
        slots, counts = select_and_count(topk_ids, self._maps, self._rotation)
        self._rotation.add_(counts)
        if self._count == "slots":
            counts = count_tokens(slots, self._recorder.counts.shape[0])
        self._recorder.add(counts)
        return slots


class Dispatcher:
    """Dispatch of all layers of one rank: maps, the turn of every expert's copies, and token counts.

    Turns go on from call to call, whether or not tokens are recorded. So, over all calls together and however few
    tokens each has, the copies of an expert get equally many tokens to within one (or their shares, to within two)
    for as long as the maps stay. Ranks begin with different copies.

    Args:
        maps: the maps in force; update them in place.
        ep_rank: this rank.
        count: what `recorder` counts: tokens per slot, from which the load of ranks follows, or per expert, which
            includes experts that have lost all copies and outlives changes of placement.
        enabled: whether to record from the start.

    Attributes:
        maps: as given.
        recorder: the counts of this rank's tokens.

    >>> dispatcher = Dispatcher(DeviceMaps([[0, 1, 0]], num_logical=2), ep_rank=0)
    >>> dispatch = dispatcher.layer(0)
    >>> [dispatch(torch.tensor([[0, 1]])).tolist() for _ in range(3)]
    [[[0, 1]], [[2, 1]], [[0, 1]]]
    >>> dispatcher.recorder.take().counts.tolist()
    [[2, 3, 1]]
    """

    def __init__(
        self, maps: DeviceMaps, ep_rank: int, *, count: Literal["slots", "experts"] = "slots", enabled: bool = True
    ):
        check_kind(maps, DeviceMaps, "Dispatcher(maps=...)")
        ep_rank = check_count(ep_rank, "Dispatcher(ep_rank=...)", 0, 2**14, "Count ranks from 0.")
        check_choice(count, ("slots", "experts"), "Dispatcher(count=...)", "Count slots unless experts may be lost.")
        self.maps, self._count = maps, count
        num_ids = maps.num_slots if count == "slots" else maps.num_logical
        device = maps.replica_count.device
        self.recorder = LoadRecorder(maps.num_layers, num_ids, device=device, enabled=enabled)
        self._rotation = torch.full(maps.replica_count.shape, ep_rank, dtype=torch.int64, device=device)

    def layer(self, index: int) -> LayerDispatcher:
        """The dispatch of one layer."""
        return LayerDispatcher(self.maps.layer(index), self._rotation[index], self.recorder.layer(index), self._count)
