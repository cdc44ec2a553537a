"""Carry out a move plan while the model serves."""

import struct
import threading
import time

import numpy as np
from jaxtyping import Bool, Int

from eplb_core import MovePlan, Topology
from eplb_core._checks import require
from eplb_torch.report import RearrangeError, RearrangeReport
from eplb_torch.staging import Staging
from eplb_torch.streams import Streams
from eplb_torch.transaction import Options, Prepared, Transaction
from eplb_torch.transport import Transport
from eplb_torch.weights import ExpertWeights

_CLOCK = struct.Struct("<qd")  # a boundary, and the seconds between two of them
_ANYWHERE = -1  # the boundary at which a rank in `wait` stands: all that is left may be committed there
_STOPS = -2  # the boundary of a rank that will not commit at any
_LEAST_LEAD_SECONDS, _MAX_LEAD_SECONDS = 0.01, 5.0


class RearrangementAborted(RuntimeError):
    """`abort` or `drain` was called on some rank."""


class Rearrangement:
    """One rearrangement that runs on a worker thread while the caller serves.

    Building one is a collective and starts it. The worker receives rows, part by part, into memory outside the
    weights; the caller's thread commits a part in `step`, at a boundary between two forwards:

        moving = Rearrangement(weights, plan, topology, ProcessGroupTransport(own_group), timeout=30)
        while not moving.done:
            serve_one_forward()
            if layers := moving.step():
                switch_maps(layers, moving.placement(old, new))

    **All ranks commit a part at the same boundary.** A token is sent to a slot by one rank's maps and computed by
    another's weights, so ranks that switched at different forwards would compute with wrong experts. Therefore all
    ranks must call `step` equally often, between the same forwards; serving with all-to-all keeps them within one
    forward of each other anyhow. Boundaries are numbered by counting calls. When all ranks have their rows, the
    workers choose a boundary ahead of the one that any rank has reached, then confirm that no rank has passed it; if
    one has, they choose a later one. Choosing takes no part of the serving thread, and messages only
    between workers.

    `step` looks at a flag: it waits for nothing, with one exception that cannot be avoided. If a rank reaches the
    chosen boundary before it has heard that all others confirmed it, neither committing nor passing on would be safe,
    and it waits for the worker's vote, at most 1.5 times the timeout. Boundaries are chosen `lead` seconds ahead, so
    that this happens only when a message takes longer than that; `waited_seconds` tells how much.

    The worker needs a transport of its own: messages of the model on the same process group would be
    confused with its messages. On an accelerator it works on a stream of its own, which is not verified here.

    Args:
        weights, plan, topology, transport, timeout, max_staging_bytes, checksum, epoch, staging: as for `rearrange`.
            The larger the parts, the longer the copies of one `step`.
        lead: seconds from the choice of a boundary to the boundary, roughly; doubled each time it was too short.
        boundary: how many boundaries there have been. Ranks that build theirs between different forwards must count
            from a common beginning; 0 does where all build it between the same two.

    Attributes:
        waited_seconds: how long `step` has waited for votes, in all.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        plan: MovePlan,
        topology: Topology,
        transport: Transport,
        *,
        timeout: float,
        max_staging_bytes: int = 64 * 2**20,
        checksum: bool = False,
        epoch: int = 0,
        staging: Staging | None = None,
        lead: float = 0.05,
        boundary: int = 0,
    ):
        require(lead >= 0, "`Rearrangement(lead=...)` must be >= 0 seconds", f"lead={lead}", "Use the default.")
        options = Options(timeout=timeout, max_staging_bytes=max_staging_bytes, checksum=checksum, epoch=epoch)
        self._transaction = Transaction(weights, plan, topology, transport, options, staging)
        self._lead = lead
        self.waited_seconds = 0.0
        self._changed = threading.Condition()
        # All below is guarded by `_changed`.
        self._boundary = boundary
        self._step_seconds = 0.0
        self._last_step = time.monotonic()
        self._waiting = False
        self._pending: tuple[int, Prepared] | None = None
        self._confirmed = False
        self._error: Exception | None = None
        self._finished = False
        self._streams = Streams(weights.device)
        self._worker = threading.Thread(target=self._run, daemon=True, name="eplb-rearrangement")
        self._worker.start()

    @property
    def done(self) -> bool:
        """Whether there is nothing left for `step` to do: all is committed, or the error has been raised."""
        with self._changed:
            return self._finished and self._error is None

    @property
    def committed_layers(self) -> tuple[int, ...]:
        """Layers that hold the new placement."""
        return self._transaction.committed_layers

    def placement(
        self, old: Int[np.ndarray, "layers slots"], new: Int[np.ndarray, "layers slots"], *, settled: bool = False
    ) -> Int[np.ndarray, "layers slots"]:
        """The placement in force, given those that the plan was made from.

        Args:
            old, new: the placements.
            settled: as it would be with all of the part that `halt` has left.
        """
        committed = self._transaction.committed
        if settled and self._pending is not None:
            part = self._pending[1].part
            committed = committed.copy()
            committed[list(part.layers)] |= part.covers
        return np.where(committed, new, old)

    def report(self) -> RearrangeReport:
        """What this rank has done so far."""
        return self._transaction.report()

    def step(self) -> tuple[int, ...]:
        """Mark a boundary between two forwards; commit what all ranks commit here.

        Returns:
            The layers whose placement has changed, to switch their maps before the next forward; mostly none.

        Raises:
            RearrangeError: once, if the rearrangement has stopped; what was committed before stays.
        """
        with self._changed:
            self._boundary += 1
            now = time.monotonic()
            self._step_seconds, self._last_step = now - self._last_step, now
            if self._pending is None or self._pending[0] > self._boundary:
                self._raise_error()
                return ()
            return self._commit_here(now)

    def wait(self) -> RearrangeReport:
        """Stay at a boundary until all is committed. Every rank calls it at the same boundary.

        Raises:
            RearrangeError: if the rearrangement has stopped.
        """
        with self._changed:
            self._boundary, self._waiting = self._boundary + 1, True
            self._changed.notify_all()
            while not self._finished:
                if self._pending is not None and self._confirmed:
                    self._commit_here(time.monotonic())
                else:
                    # Every wait of the worker has an end, and it always tells when it has come to its own.
                    self._changed.wait(1.0)
            self._raise_error()
        self._worker.join()
        return self.report()

    def abort(self) -> None:
        """Stop all ranks before the next part that is not decided yet. Any rank may call it, at any time; returns
        at once. The next `step` or `wait` of every rank after the stop raises `RearrangeError`.
        """
        self._transaction.veto = RearrangementAborted(f"rank {self._transaction.transport.rank} aborted")

    def drain(self) -> tuple[int, ...]:
        """Stop, and stay at a boundary until no message is under way. Every rank calls it at the same boundary.

        Returns:
            The layers that hold the new placement; see `placement`.

        Raises:
            RearrangeError: if ranks were lost, or this one has failed.
        """
        self.abort()
        try:
            self.wait()
        except RearrangeError as error:
            stopped = error.__cause__ is None or isinstance(error.__cause__, RearrangementAborted)
            if error.lost_ranks or not stopped:
                raise
        return self.committed_layers

    def halt(self) -> bool:
        """Stop on this rank alone, after others were lost; `step` and `wait` must not be called any more.

        Waits for nothing but a vote on a part that this rank has said yes to, as others may commit it. The worker
        ends when its connections are broken.

        Returns:
            Whether a part is left that all ranks have confirmed: `settle` it.
        """
        self.abort()
        with self._changed:
            offer = self._pending  # the last one: from here on the worker says no
            while offer is not None and self._pending is offer and not self._confirmed:
                self._changed.wait(1.0)
            return self._pending is not None

    def settle(self, chosen: Bool[np.ndarray, "layers slots"]) -> None:
        """After `halt`, commit the part that is left in the slots that are chosen, and let the rest go."""
        with self._changed:
            if self._pending is None:
                return
            self._streams.before_commit()
            self._transaction.commit_some(self._pending[1], chosen)
            self._pending, self._confirmed = None, False
            self._changed.notify_all()

    def _commit_here(self, now: float) -> tuple[int, ...]:
        """Commit the pending part, once it is sure that all ranks do."""
        offer = self._pending
        while self._pending is offer and not self._confirmed:
            self._changed.wait(1.0)
        self.waited_seconds += time.monotonic() - now
        if offer is None or self._pending is not offer:
            # The vote failed: no rank commits here, though the worker may have offered another boundary since.
            return ()
        prepared = offer[1]
        try:
            self._streams.before_commit()
            return self._transaction.commit(prepared)
        finally:
            self._streams.after_commit()
            self._pending, self._confirmed = None, False
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._finished and self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        """The worker: prepare each part, choose a boundary for it, and wait until it is committed."""
        error: Exception | None = None
        try:
            with self._streams.side():
                for part in self._transaction.agree():
                    prepared = self._transaction.prepare(part, self._clock)
                    if prepared.verdict is not None:
                        self._choose_boundary(prepared)
                    self._wait_for_commit(prepared)
        except Exception as failure:
            error = failure
        with self._changed:
            self._error, self._finished = error, True
            self._changed.notify_all()

    def _clock(self) -> bytes:
        with self._changed:
            return _CLOCK.pack(_ANYWHERE if self._waiting else self._boundary, self._step_seconds)

    def _choose_boundary(self, prepared: Prepared) -> None:
        """Agree with all ranks on a boundary that none has passed."""
        assert prepared.verdict is not None
        verdict, lead = prepared.verdict, self._lead
        while True:
            clocks = [_CLOCK.unpack(note) for note in verdict.notes if note is not None]
            shortest = min((seconds for _, seconds in clocks if seconds > 0), default=lead)
            latest = max(boundary for boundary, _ in clocks)
            boundary = latest + 2 + int(lead / max(shortest, 1e-6))
            start = time.monotonic()
            error = self._offer(boundary, prepared)
            # Whether all stop must follow from what all have heard: a veto of the moment is known here alone.
            note = self._clock() if error is None or error is not self._transaction.veto else _CLOCK.pack(_STOPS, 0.0)
            verdict = self._transaction.vote(note, error, start)
            if verdict.accepted:
                with self._changed:
                    self._confirmed = True
                    self._changed.notify_all()
                return
            with self._changed:
                self._pending = None
                self._changed.notify_all()
            stops = any(note is not None and _CLOCK.unpack(note)[0] == _STOPS for note in verdict.notes)
            if verdict.lost_ranks or lead > _MAX_LEAD_SECONDS or stops:
                raise self._transaction.refuse(verdict, error)
            lead = max(2 * lead, _LEAST_LEAD_SECONDS)

    def _offer(self, boundary: int, prepared: Prepared) -> Exception | None:
        """Let `step` stop at a boundary, unless it is past it. Returns why not, or None."""
        with self._changed:
            if self._transaction.veto is not None:
                return self._transaction.veto
            if not self._waiting and self._boundary >= boundary:
                return RuntimeError(f"boundary {boundary} was passed, at {self._boundary} already")
            self._pending, self._confirmed = (boundary, prepared), False
            return None

    def _wait_for_commit(self, prepared: Prepared) -> None:
        with self._changed:
            if prepared.verdict is None:
                self._transaction.commit(prepared)
            while self._pending is not None:
                self._changed.wait()
