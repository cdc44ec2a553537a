"""What runs in place of the forward of one experts module."""

from collections.abc import Callable

import torch
from torch import Tensor

from eplb_core import EMPTY
from eplb_core._checks import require
from eplb_torch.dispatch import count_tokens, select_slots
from eplb_torch.integrations._exchange import exchange_tokens
from eplb_torch.integrations._model import ExpertParallelModel


class ExpertParallelForward:
    """Sends tokens to the slots of their experts; what it replaces runs on the rows that arrive.

    Group, sizes and maps are looked up at every call, as they change when ranks are lost or join.

    Args:
        experts: of which this is a layer.
        layer: its number.
        local_forward: of the experts module, on this rank's slots.
    """

    def __init__(
        self, experts: ExpertParallelModel, layer: int, local_forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    ):
        self._experts, self._layer, self._local_forward = experts, layer, local_forward

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = self._experts
        _check_call(hidden_states, top_k_index, top_k_weights)
        require(
            experts.is_whole,
            "a model under `expert_parallel` must have a copy of every expert",
            "some without",
            "Join a group, or reload what was lost with its ranks.",
        )
        if experts.is_idle:
            top_k_index = torch.full_like(top_k_index, EMPTY)
        load = experts.counted(self._layer)
        slots = select_slots(top_k_index, experts.maps.layer(self._layer), offset=load + experts.ep_rank)
        load += count_tokens(top_k_index, experts.num_logical)

        def run_slots(rows: Tensor, local_slots: Tensor) -> Tensor:
            unit_weights = top_k_weights.new_ones((rows.shape[0], 1))
            return self._local_forward(rows, local_slots.to(top_k_index.dtype).unsqueeze(1), unit_weights)

        return exchange_tokens(hidden_states, slots, top_k_weights, run_slots, experts.topology, experts.group)


def _check_call(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    tokens_k, shapes = top_k_index.shape, [tuple(t.shape) for t in (hidden_states, top_k_index, top_k_weights)]
    require(
        hidden_states.ndim == len(tokens_k) == 2
        and top_k_weights.shape == tokens_k
        and hidden_states.shape[0] == tokens_k[0],
        "experts under `expert_parallel` must be called with `[tokens, hidden]`, `[tokens, k]` and `[tokens, k]`",
        f"{shapes}",
        "Adapt the block that calls them.",
    )
    require(
        not (torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)),
        "a model under `expert_parallel` must run without gradients, which do not pass between ranks",
        "inputs that require them",
        "Call it under torch.no_grad() or torch.inference_mode().",
    )
