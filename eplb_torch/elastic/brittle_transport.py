"""A transport that gives its group up at the first failure, so that no rank waits for one that has failed."""

from collections.abc import Sequence

from eplb_torch.elastic.groups import break_group
from eplb_torch.transport import Message, ProcessGroupTransport, TransportError


class BrittleTransport:
    """Breaks the connections of the group when messages of an exchange fail, as all else will fail then.

    Where a rank dies in the middle of a rearrangement, those who exchanged rows with it notice at once. Others wait for
    these, and would do so until their timeout. In a group that is given up after any loss they need not.

    A failed vote breaks nothing: ranks must still tell each other what they have heard.

    Args:
        transport: does the work. It may be used directly before and afterwards.
    """

    def __init__(self, transport: ProcessGroupTransport):
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size

    def connect(self, timeout: float) -> None:
        """See `Transport.connect`."""
        self._transport.connect(timeout)

    def gather(self, payload: bytes, timeout: float) -> list[bytes | None]:
        """See `Transport.gather`."""
        return self._transport.gather(payload, timeout)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        try:
            self._transport.exchange(sends, recvs, timeout)
        except TransportError:
            break_group(self._transport.group)
            raise
