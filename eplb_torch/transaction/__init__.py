"""The steps of a rearrangement, in their order: agree, then prepare, vote and commit each part."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from eplb_core import MovePlan, Topology, schedule_rounds
from eplb_core._checks import EplbError, listing, require
from eplb_torch.report import RearrangeError, RearrangeReport
from eplb_torch.staging import Staging
from eplb_torch.transaction.agreement import Verdict, decide, gather
from eplb_torch.transaction.checksum import CHECKSUM_BYTES
from eplb_torch.transaction.delivery import Delivery, Traffic
from eplb_torch.transaction.parcel import Row, WireFormat
from eplb_torch.transaction.parts import Part, plan_parts
from eplb_torch.transaction.writes import LayerWrites, apply_writes, plan_writes
from eplb_torch.transport import Transport, TransportError
from eplb_torch.weights import ExpertWeights

MARGIN = 0.25  # of the timeout: how much longer a vote, and then its confirmation, is waited for
DIRECT_BYTES = 2**20  # tensors of an expert from this size on are sent without packing

NOTE_BYTES = 16  # what a rank may tell the others along with any vote

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of a rearrangement may choose; equal on all ranks. See `rearrange`."""

    timeout: float
    max_staging_bytes: int
    checksum: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A part whose rows have arrived on every rank. Its commit needs no more memory and no other rank.

    verdict: of the vote on it; None for a part in which nothing changes.
    """

    part: Part
    writes: list[LayerWrites]
    arrived: Mapping[tuple[int, int], Row]
    spare: Tensor | None
    verdict: Verdict | None


class Transaction:
    """One rearrangement of one rank. `agree` and `prepare` are collectives, `commit` is local.

    Attributes:
        committed: bool `[layers, slots]` the slots that hold the new placement.
        veto: why this rank votes against all that is not committed yet, or None.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        plan: MovePlan,
        topology: Topology,
        transport: Transport,
        options: Options,
        staging: Staging | None = None,
    ):
        _check(weights, plan, topology, transport)
        self.weights, self.plan, self.topology = weights, plan, topology
        self.transport, self.options = transport, options
        self.staging = Staging(weights.device) if staging is None else staging
        self.staging.peak = 0
        self.committed = np.zeros((weights.num_layers, topology.num_slots), dtype=bool)
        self.veto: Exception | None = None
        self._traffic = Traffic()
        self._start = time.monotonic()

    def agree(self) -> list[Part]:
        """Compare on all ranks what must be equal, one digest per thing, so that the error can name what differs.

        Returns:
            What is to be committed, part by part.

        Raises:
            RearrangeError: if ranks differ, or one does not answer.
        """
        facts, start = self._facts(), time.monotonic()
        mine = b"".join(hashlib.blake2b(fact, digest_size=_DIGEST_BYTES).digest() for fact in facts.values())
        error = self._compare(list(facts), gather(self.transport, mine, start + self.options.timeout))
        if error is not None:
            # Ranks that have heard all may have gone on: they learn of it in their next vote, which is this one.
            raise self.refuse(self.vote(b"", error, start), error)
        overhead = CHECKSUM_BYTES if self.options.checksum else 0
        limit = self.options.max_staging_bytes
        return plan_parts(self.weights, self.plan, self.topology, limit, row_overhead=overhead)

    def _compare(self, names: list[str], digests: list[bytes | None]) -> Exception | None:
        """What keeps this rank from taking part."""
        silent = [rank for rank, theirs in enumerate(digests) if theirs is None]
        if silent:
            return TransportError(f"ranks {silent} did not answer")
        odd = {}
        for i, name in enumerate(names):
            piece = slice(i * _DIGEST_BYTES, (i + 1) * _DIGEST_BYTES)
            first, *_ = parts = [theirs[piece] for theirs in digests if theirs is not None]
            if ranks := [rank for rank, part in enumerate(parts) if part != first]:
                odd[name] = ranks
        if odd:
            return EplbError(
                f"`rearrange` needs the same {', '.join(names)} on all ranks; got others than rank 0's on ranks {odd}. "
                "Plan once and broadcast, or plan everywhere from the same load."
            )
        return None

    def prepare(self, part: Part, note: Callable[[], bytes] = bytes) -> Prepared:
        """Receive the rows of a part and vote. Weights are only read.

        Args:
            part: the next one.
            note: called before the vote; what it returns, at most `NOTE_BYTES`, is told to all ranks.

        Raises:
            RearrangeError: on all ranks, if any of them could not receive its rows.
        """
        if not part.changes:
            return Prepared(part, [], {}, None, None)
        start, prepared = time.monotonic(), None
        try:
            # Also in face of a veto, which the others do not know of: they wait for this rank's rows.
            prepared = self._receive(part, start + self.options.timeout)
            error = self.veto
        except Exception as failure:
            # Whatever it is, the others must hear of it.
            error = failure
        verdict = self.vote(note(), error, start)
        if prepared is None or not verdict.accepted:
            raise self.refuse(verdict, error)
        return replace(prepared, verdict=verdict)

    def vote(self, note: bytes, error: Exception | None, start: float) -> Verdict:
        """Decide with all ranks, in what the timeout leaves of the time since `start`, and its margin."""
        vote_by = start + (1 + MARGIN) * self.options.timeout
        confirm_by = start + (1 + 2 * MARGIN) * self.options.timeout
        return decide(self.transport, error is None, note.ljust(NOTE_BYTES, b"\0"), vote_by, confirm_by)

    def commit(self, prepared: Prepared) -> tuple[int, ...]:
        """Write a part's rows, then bring derived tensors up to date. Returns the layers whose placement changed."""
        first_slot = self.transport.rank * self.topology.slots_per_rank
        apply_writes(self.weights, prepared.writes, prepared.arrived, first_slot, prepared.spare)
        self.committed[list(prepared.part.layers)] |= prepared.part.covers
        self.staging.release()
        for writes in prepared.writes:
            self.weights.refresh(writes.layer, writes.slots)
        return prepared.part.layers

    def commit_some(self, prepared: Prepared, chosen: Bool[np.ndarray, "layers slots"]) -> tuple[int, ...]:
        """Write a part's rows into some slots only; others keep what they hold. Returns the layers of the part."""
        part, layers = prepared.part, list(prepared.part.layers)
        source = np.array(part.plan.source_slot)
        own = np.broadcast_to(np.arange(self.topology.num_slots), (len(layers), self.topology.num_slots))
        source[layers] = np.where(chosen[layers], source[layers], own)
        some = replace(part, plan=part.plan._replace(source_slot=source), covers=part.covers & chosen[layers])
        writes = plan_writes(some, self.topology, self.transport.rank)
        return self.commit(replace(prepared, part=some, writes=writes))

    def refuse(self, verdict: Verdict, error: Exception | None) -> RearrangeError:
        """Drop what was prepared; build the error that says why."""
        if isinstance(error, TransportError):
            self.staging.discard()
        self.staging.release()
        failure = self._stopped(verdict, _explain(verdict, error))
        failure.__cause__ = error
        return failure

    def report(self) -> RearrangeReport:
        """What was done so far."""
        traffic, seconds = self._traffic, time.monotonic() - self._start
        moved = traffic.ops, traffic.bytes_sent, traffic.bytes_received
        return RearrangeReport(*moved, self.staging.peak, seconds, self.committed_layers)

    @property
    def committed_layers(self) -> tuple[int, ...]:
        """Layers that hold the new placement in every slot."""
        return tuple(np.flatnonzero(self.committed.all(axis=1)).tolist())

    def _receive(self, part: Part, deadline: float) -> Prepared:
        rank = self.transport.rank
        schedule = schedule_rounds(part.plan, self.topology, layers=part.layers)
        wire = WireFormat(1 if part.in_place else DIRECT_BYTES, self.options.checksum)
        delivery = Delivery(self.weights, schedule, self.topology, rank, wire)
        writes = plan_writes(part, self.topology, rank)
        spare_bytes = max((self.weights.row_bytes(w.layer) for w in writes if w.needs_spare), default=0)
        self.staging.require(max(delivery.staging_bytes, delivery.kept_bytes + spare_bytes))
        self.transport.connect(deadline - time.monotonic())
        delivery.run(self.transport, self.staging, deadline, self._traffic)
        spare = self.staging.take(spare_bytes) if spare_bytes else None
        return Prepared(part, writes, delivery.arrived, spare, None)

    def _facts(self) -> dict[str, bytes]:
        moves = [self.plan.source_slot] if self.plan.relay_slot is None else list(self.plan[:2])
        return {
            "plan": b"".join(np.ascontiguousarray(array, dtype=np.int32).tobytes() for array in moves),
            "topology": repr(self.topology).encode(),
            "options": repr((self.options.max_staging_bytes, self.options.checksum)).encode(),
            "epoch": repr(self.options.epoch).encode(),
            "tensor layout": self.weights.layout().encode(),
        }

    def _stopped(self, verdict: Verdict, reason: str) -> RearrangeError:
        done = self.committed_layers
        left = tuple(layer for layer in range(self.weights.num_layers) if layer not in done)
        return RearrangeError(
            done,
            left,
            reason,
            committed_slots=self.committed.copy(),
            lost_ranks=verdict.lost_ranks,
            agreed=verdict.agreed,
        )


def _explain(verdict: Verdict, error: Exception | None) -> str:
    parts = ["Rearrangement stopped:"]
    if verdict.no_ranks:
        parts.append(f"ranks {listing(verdict.no_ranks)} voted against.")
    elif verdict.lost_ranks:
        parts.append(f"ranks {listing(verdict.lost_ranks)} did not vote.")
    if error is not None:
        parts.append(f"Here: {error}.")
    return " ".join(parts)


def _check(weights: ExpertWeights, plan: MovePlan, topology: Topology, transport: Transport) -> None:
    shape = tuple(plan.source_slot.shape)
    require(
        shape == (weights.num_layers, topology.num_slots),
        "`rearrange(plan=...)` must be `[layers, slots]` of the weights and the topology",
        f"plan {shape}, layers={weights.num_layers}, num_slots={topology.num_slots}",
        "Plan for this model and this group.",
    )
    require(
        weights.slots_per_rank == topology.slots_per_rank and transport.size == topology.ep_size,
        "`rearrange(topology=...)` must have the slots of the weights and the ranks of the transport",
        f"slots_per_rank {topology.slots_per_rank} and {weights.slots_per_rank}, "
        f"ep_size {topology.ep_size} and {transport.size}",
        "Use the topology that the placement was made for.",
    )
