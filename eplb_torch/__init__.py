"""Carry out move plans on torch tensors over NCCL or Gloo process groups."""

from eplb_torch.balancer import ExpertBalancer
from eplb_torch.balancer_config import BalancerConfig
from eplb_torch.device_maps import DeviceMaps
from eplb_torch.dispatch import select_slots
from eplb_torch.execute import rearrange
from eplb_torch.in_process import InProcessWorld
from eplb_torch.live_model import LiveModel, ServedModel
from eplb_torch.planning import PlanningError
from eplb_torch.rearrangement import Rearrangement
from eplb_torch.report import RearrangeError, RearrangeReport
from eplb_torch.reserve import reserve
from eplb_torch.staged_transport import StagedTransport
from eplb_torch.staging import Staging
from eplb_torch.transport import ProcessGroupTransport, Transport, TransportError
from eplb_torch.weights import ExpertWeights

__all__ = (
    "BalancerConfig",
    "DeviceMaps",
    "ExpertBalancer",
    "ExpertWeights",
    "InProcessWorld",
    "LiveModel",
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
    "rearrange",
    "reserve",
    "select_slots",
)
