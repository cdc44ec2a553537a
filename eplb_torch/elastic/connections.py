"""What connects the members of one generation: a group for tokens, and a transport for weights."""

from typing import Any

import torch.distributed as dist

from eplb_core._checks import require
from eplb_torch.elastic.groups import MakeGroup, break_group, form_together
from eplb_torch.elastic.membership import Membership
from eplb_torch.transport import ProcessGroupTransport


class Connections:
    """Made anew for every generation; those before are broken.

    Args:
        membership: whose members.
        timeout, group_timeout, make_group: as for `ElasticGroup`.
    """

    def __init__(self, membership: Membership, timeout: float, group_timeout: float, make_group: MakeGroup):
        self._membership, self._timeout = membership, timeout
        self._group_timeout, self._make_group = group_timeout, make_group
        self._group: dist.ProcessGroup | None = None
        self._transport: ProcessGroupTransport | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """For tokens.

        Raises:
            EplbError: before the first `connect`.
        """
        _check_made(self._group)
        return self._group  # type: ignore[return-value]

    @property
    def transport(self) -> ProcessGroupTransport:
        """For weights, on a group of its own.

        Raises:
            EplbError: before the first `connect`.
        """
        _check_made(self._transport)
        return self._transport  # type: ignore[return-value]

    def connect(self) -> None:
        """Connect all members. A collective.

        Raises:
            MembersLost, TransportError: if not all could be connected.
            MembershipError: if the store failed.
        """
        self._group = self._form("tokens", self._group_timeout)
        # Longer than any wait of the transport, as Gloo answers a timeout of its own by closing all connections.
        self._transport = ProcessGroupTransport(self._form("moves", self._group_timeout + 4 * self._timeout))

    def break_tokens(self) -> None:
        """End every wait on the group for tokens, on all ranks."""
        break_group(self._group)

    def break_all(self) -> None:
        """End every wait on both groups, on all ranks."""
        break_group(self._group)
        if self._transport is not None:
            break_group(self._transport.group)

    def _form(self, what: str, timeout: float) -> dist.ProcessGroup:
        limits = {"timeout": timeout, "connect_timeout": self._timeout}
        return form_together(self._membership, what, make_group=self._make_group, **limits)


def _check_made(thing: Any) -> None:
    require(thing is not None, "`ElasticGroup` needs a group", "none yet", "Call found or join.")
