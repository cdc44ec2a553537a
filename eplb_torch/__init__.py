"""Carry out move plans on torch tensors over NCCL or Gloo process groups."""

from eplb_torch.dispatch import select_slots
from eplb_torch.execute import RearrangeError, RearrangeReport, rearrange
from eplb_torch.in_process import InProcessWorld
from eplb_torch.transport import ProcessGroupTransport, Transport, TransportError
from eplb_torch.weights import ExpertWeights

__all__ = (
    "ExpertWeights",
    "InProcessWorld",
    "ProcessGroupTransport",
    "RearrangeError",
    "RearrangeReport",
    "Transport",
    "TransportError",
    "rearrange",
    "select_slots",
)
