"""What goes wrong in a soak: faults that a process survives, and what the others may see of them."""

import time
from typing import NamedTuple

from eplb_torch import ProcessGroupTransport, Staging, TransportError

LATE_SECONDS = 0.3


class Fault(NamedTuple):
    """One fault of one rank.

    kind: `"none"`; `"fail"`, `"corrupt"`, `"late"` or `"hang"`, which happen to messages; others to what the episode
        gives to a rearrangement or a balancer.
    victim: the rank.
    verb: `"exchange"` or `"gather"`, which of the transport's calls it happens to.
    turn: to the how manieth of them, from 1.
    """

    kind: str
    victim: int
    verb: str = "exchange"
    turn: int = 1

    @property
    def loses(self) -> bool:
        """Whether others may give up the victim: it is silent, or late by more than the timeout."""
        return self.kind == "hang" or (self.kind == "fail" and self.verb == "gather")

    @property
    def refuses(self) -> bool:
        """Whether all ranks hear of it in time, and stop together."""
        return self.kind in ("fail", "corrupt", "veto", "plan", "epoch") and not self.loses

    def timeout(self) -> float:
        """Short where it is to run out: others wait for rows that do not come. Else more than a busy machine needs."""
        return 4.0 if self.loses or self.kind in ("fail", "veto") else 30.0


class FaultyTransport(ProcessGroupTransport):
    """One to which a fault happens once.

    Attributes:
        fired: whether it has happened.
    """

    def __init__(self, group):
        super().__init__(group)
        self.fired, self._fault, self._left = False, None, 0

    def arm(self, fault: Fault) -> None:
        """Have a fault happen, if this is its victim. Takes back the one before."""
        mine = fault.victim == self.rank and fault.kind in ("fail", "corrupt", "late", "hang")
        self._fault, self._left, self.fired = fault if mine else None, fault.turn, False

    def gather(self, payload, timeout):
        """See `Transport.gather`."""
        if self._due("gather"):
            self._suffer()
        return super().gather(payload, timeout)

    def exchange(self, sends, recvs, timeout):
        """See `Transport.exchange`."""
        if sends and self._due("exchange"):
            if self._fault.kind == "corrupt":
                damaged = sends[-1][1].clone()
                damaged[0] ^= 1
                sends = [*sends[:-1], (sends[-1][0], damaged)]
            self._suffer()
        super().exchange(sends, recvs, timeout)

    def _due(self, verb: str) -> bool:
        if self._fault is None or self.fired or self._fault.verb != verb:
            return False
        self._left -= 1
        self.fired = self._left == 0
        return self.fired

    def _suffer(self) -> None:
        if self._fault.kind == "late":
            time.sleep(LATE_SECONDS)
        if self._fault.kind == "hang":
            time.sleep(1.5 * self._fault.timeout() + 1.0)
        if self._fault.kind == "fail":
            raise TransportError("told to fail")


class NoMemory(Staging):
    """Memory that cannot be had."""

    def require(self, num_bytes: int) -> None:
        """Refuse."""
        raise MemoryError(f"told to have no room for {num_bytes} bytes")
