"""Carry out move plans on torch tensors over NCCL or Gloo process groups, and keep a serving model balanced."""

# ruff: noqa: E402  # without torch the imports below would fail with less to go by
from eplb_core._extras import import_extra

import_extra("torch", "torch", "eplb_torch")

from eplb_torch.balancer import ExpertBalancer
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.balancer.planning import PlanningError
from eplb_torch.device_maps import DeviceMaps, LayerMaps
from eplb_torch.dispatch import count_tokens, mask_padding, select_slots
from eplb_torch.dispatcher import Dispatcher
from eplb_torch.elastic import ElasticGroup, Membership, is_loss
from eplb_torch.execute import rearrange
from eplb_torch.in_process import InProcessWorld
from eplb_torch.live_model import LiveModel, ServedModel
from eplb_torch.metrics import BalancerMetrics, Metrics, NoMetrics
from eplb_torch.rearrangement import Rearrangement
from eplb_torch.recording import LoadRecorder
from eplb_torch.reload import ExpertReload, held_experts, reload_experts
from eplb_torch.report import RearrangeError, RearrangeReport
from eplb_torch.reserve import reserve
from eplb_torch.staged_transport import StagedTransport
from eplb_torch.staging import Staging
from eplb_torch.transport import ProcessGroupTransport, Transport, TransportError
from eplb_torch.weights import ExpertWeights

__all__ = (
    "BalancerConfig",
    "BalancerMetrics",
    "DeviceMaps",
    "Dispatcher",
    "ElasticGroup",
    "ExpertBalancer",
    "ExpertReload",
    "ExpertWeights",
    "InProcessWorld",
    "LayerMaps",
    "LiveModel",
    "LoadRecorder",
    "Membership",
    "Metrics",
    "NoMetrics",
    "PlanningError",
    "ProcessGroupTransport",
    "RearrangeError",
    "RearrangeReport",
    "Rearrangement",
    "ServedModel",
    "StagedTransport",
    "Staging",
    "Transport",
    "TransportError",
    "count_tokens",
    "held_experts",
    "is_loss",
    "mask_padding",
    "rearrange",
    "reload_experts",
    "reserve",
    "select_slots",
)
