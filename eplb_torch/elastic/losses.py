"""Which errors mean that ranks may be lost."""

import re

import torch.distributed as dist

from eplb_torch.elastic.members import MembershipError
from eplb_torch.report import RearrangeError
from eplb_torch.transport import TransportError

_GLOO = re.compile(r"gloo|pair closure|Connection (closed|reset)|Socket (closed|timeout)|Broken pipe", re.IGNORECASE)


def is_loss(error: BaseException) -> bool:
    """Say whether an error of a serving loop means that ranks of its group may be lost.

    That is a `TransportError`, a `RearrangeError` with lost ranks, a balancer's `TimeoutError`, what NCCL raises, and
    what Gloo does, which is a plain RuntimeError that is known by its text (torch 2.13). Other errors are of the
    program, or, as a `MembershipError`, say that there is no group any more: they would only come again.

    >>> is_loss(RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3486"))
    True
    >>> is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MembershipError):
        return False
    if isinstance(error, RearrangeError):
        return bool(error.lost_ranks) or not error.agreed
    if type(error) is ValueError and error.__context__ is not None:
        # What torch.distributed raises while it logs an error of a group that it does not know by name.
        return is_loss(error.__context__)
    if isinstance(error, (TransportError, TimeoutError, dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None
