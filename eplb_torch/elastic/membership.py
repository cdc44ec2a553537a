"""Who is in the group: agreed, generation by generation, through a store that outlives every member."""

import os
import socket
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from eplb_core._checks import require
from eplb_torch.elastic.members import Evicted, Members, MembershipError, MembersLost
from eplb_torch.elastic.pulse import Pulse, own_connection
from eplb_torch.elastic.roll import Roll
from eplb_torch.worker import Worker

__all__ = ("Evicted", "Members", "MembersLost", "Membership", "MembershipError")

_BEATS_PER_SILENCE = 5
_STORE_SECONDS = 10.0  # that calls of the store may take beyond the waits that are meant


class Membership:
    """One process's part in agreeing who is in the group.

    A generation is a list of members that never changes. Whoever finds that it must end calls `renew`, and so do the
    others when they find out. Each writes down that it is here; the next list holds all who came. Whoever first sees
    that nobody else is to be waited for writes the list, in one atomic step, and that is the agreement: there is no
    leader who could die. Not waited for are those who are silent, that is, whose `Pulse` has stopped.

    One list is written per generation, so the group cannot split. A process that is not in it gets `Evicted`. Who is
    alive and does not come in `timeout` seconds is left behind, but never by a minority of the living: a process that
    alone believes the group to be broken gives up itself.

    Args:
        store: a `torch.distributed.Store` of a process that is no member: the launcher's `TCPStore`, say. Keys of
            other groups and of earlier runs must not be in it: use a `PrefixStore`. A `FileStore` will do where
            processes are not killed: one that dies while it writes can spoil the file for all.
        name: of this process; never that of an earlier one. By default made of host, process id and random digits.
        node: where it runs; by default the host.
        silence: seconds without a sign of life after which a process counts as dead. Longer than any process may be
            stopped or starved.
        timeout: seconds that a living member may take to come.

    Attributes:
        name: of this process.

    Raises:
        EplbError: if a time is not positive.
        MembershipError: if the store does not answer.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str | None = None,
        node: str | None = None,
        silence: float = 2.0,
        timeout: float = 60.0,
    ):
        require(
            0 < silence <= timeout < float("inf"),
            "`Membership` needs 0 < silence <= timeout, both finite",
            f"silence={silence}, timeout={timeout}",
            "Nothing here waits forever.",
        )
        host = socket.gethostname()
        self.name = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}" if name is None else name
        self._store, self._silence, self._timeout = store, silence, timeout
        self._members: Members | None = None
        self._worker = Worker("eplb-membership")
        place = host if node is None else node
        self._roll: Roll = self._in_time(lambda: Roll(store, self.name, place, silence, timeout))
        self._pulse: Pulse = self._in_time(lambda: Pulse(store, self.name, silence / _BEATS_PER_SILENCE))

    @property
    def members(self) -> Members:
        """The generation that this process is in.

        Raises:
            EplbError: before `found` or `join`.
        """
        require(self._members is not None, "`Membership.members` needs a group", "none yet", "Call found or join.")
        assert self._members is not None
        return self._members

    @property
    def store(self) -> Store:
        """A part of the store for this generation alone, for what its members have to tell each other.

        Over a connection of its own, where the store can be cloned: who waits there does not keep this waiting.
        """
        return PrefixStore(f"{self.members.generation}/own", own_connection(self._store))

    def found(self, rank: int, size: int) -> Members:
        """Be one of the first members. All `size` call it, with ranks `0..size-1`; later ranks may be others, as
        those of a node get consecutive ones.

        Raises:
            EplbError: if the rank is not one of them.
            MembershipError: if not all came in time, or the store knows another group already.
        """
        require(
            0 <= rank < size, "`Membership.found(rank=...)` must be 0..size-1", f"{rank} of {size}", "Count from 0."
        )
        return self._enter_or_leave(lambda: self._roll.found(rank, size), self._timeout)

    def join(self, timeout: float) -> Members:
        """Ask to be let in, and wait until the members do so. Afterwards as if `renew` had returned.

        Raises:
            MembershipError: if they did not in `timeout` seconds. This process counts as dead then, as after every
                `MembershipError` of this, `found` and `renew`.
        """
        return self._enter_or_leave(lambda: self._roll.join(timeout), timeout)

    def waiting(self) -> tuple[str, ...]:
        """Look who is waiting in `join`, and shows signs of life. Costs a few calls of the store.

        A process is listed when two calls have seen it alive. Members may see others at other times: let one of them
        look, and tell the rest.

        Raises:
            MembershipError: if the store failed.
        """
        return self._in_time(lambda: self._roll.waiting(self.members))

    def renew(
        self, *, suspects: Collection[str] = (), joining: Sequence[str] = (), leaving: Collection[str] = ()
    ) -> Members:
        """Agree with all who are left on the next generation.

        Survivors keep their order. Who joins comes after them, or after those of the same node.

        Args:
            suspects: members of whom a timeout or an error has told already: if they live, they get only `silence`
                seconds to come.
            joining: who is let in, as `waiting` lists them; whoever of these has died meanwhile is left out.
            leaving: members who go, and do not call this.

        Raises:
            Evicted: if others went on without this process.
            MembershipError: if only a minority of the living came in time, or the store failed.
        """
        before, wait = self.members, self._timeout + self._silence
        return self._enter_or_leave(lambda: self._roll.agree(before, suspects, joining, leaving), wait)

    def check(self) -> None:
        """Look whether the generation still holds.

        Raises:
            MembersLost: if others have begun the next one, or a member is silent.
            MembershipError: if the store failed.
        """
        self._in_time(lambda: self._roll.check(self.members))

    def meet(self, what: str, timeout: float) -> None:
        """Wait until all members have come to this point.

        Args:
            what: names the point; each only once in a generation.
            timeout: seconds to wait at most.

        Raises:
            MembersLost: if not all will come, or did not in time.
            MembershipError: if the store failed.
        """
        self._in_time(lambda: self._roll.meet(self.members, what, timeout), timeout)

    def tell(self, text: str) -> None:
        """Leave a note that others can read by this process's name, in place of an earlier one."""
        self._in_time(lambda: self._store.set(f"note/{self.name}", text))

    def told(self, name: str) -> str | None:
        """Read the note of another process; None if it has left none."""
        key = f"note/{name}"
        return self._in_time(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def latest(self) -> tuple[str, ...]:
        """The names of the latest generation, of which this process need not be; none before the first."""
        return self._in_time(self._roll.latest)

    def leave(self) -> None:
        """Be dead to the others from now on."""
        self._pulse.stop()
        self._worker.stop()

    def _enter_or_leave(self, function: Callable[[], Members], wait: float) -> Members:
        """Become a member, or be dead to the others, so that they do not wait for who will not come."""
        try:
            self._members = members = self._in_time(function, wait)
        except MembershipError:
            self.leave()
            raise
        return members

    def _in_time(self, function: Callable[[], Any], wait: float = 0.0) -> Any:
        """Call on another thread, as a store that hangs would hang this one."""
        limit = wait + _STORE_SECONDS
        try:
            return self._worker.start(function).result(limit)
        except TimeoutError as error:
            raise MembershipError(f"the store did not answer within {limit:g} s") from error
        except (MembershipError, MembersLost):
            raise
        except RuntimeError as error:
            raise MembershipError(f"the store failed: {error}") from error
