"""Carry out a move plan on this rank's weights: agree, prepare, verify, commit, one group of layers at a time."""

import hashlib
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eplb_core import EMPTY, MovePlan, Schedule, Topology, schedule_rounds
from eplb_core._checks import listing, require
from eplb_torch.local import Copy, order_copies
from eplb_torch.transport import Transport, TransportError
from eplb_torch.weights import ExpertWeights

_ROUNDS_PER_BATCH = 16  # point-to-point operations in flight stay below twice this: large NCCL batches hang


@dataclass(frozen=True, slots=True)
class RearrangeReport:
    """What one rank did.

    p2p_ops: messages sent and received.
    bytes_sent, bytes_received: payload of these messages.
    peak_staging_bytes: most bytes that lay in buffers outside the weights at one time.
    seconds: wall-clock time of the call.
    committed_layers: layers that now hold the new placement: all of the plan's.
    """

    p2p_ops: int
    bytes_sent: int
    bytes_received: int
    peak_staging_bytes: int
    seconds: float
    committed_layers: tuple[int, ...]


class RearrangeError(RuntimeError):
    """A rearrangement stopped. Committed layers hold the new placement, uncommitted ones exactly the old.

    To go on, plan again from the placement that is now in force: new rows for committed layers, old rows for others.
    """

    def __init__(
        self,
        committed_layers: tuple[int, ...],
        uncommitted_layers: tuple[int, ...],
        reason: str = "Rearrangement stopped.",
    ):
        self.committed_layers, self.uncommitted_layers = committed_layers, uncommitted_layers
        super().__init__(
            f"{reason} Committed layers: {listing(committed_layers)}; unchanged: {listing(uncommitted_layers)}. "
            "Plan again from the placement in force to resume."
        )


def rearrange(
    weights: ExpertWeights,
    plan: MovePlan,
    topology: Topology,
    transport: Transport,
    *,
    timeout: float,
    max_staging_bytes: int = 256 * 2**20,
    epoch: int = 0,
) -> RearrangeReport:
    """Move this rank's part of a plan. A collective: every rank of the transport calls it with the same plan.

    First all ranks compare a hash of plan, epoch and tensor layout. Then, for each group of layers, rows are
    received into staging, all ranks report success, and only then are weights written. A failure before that leaves
    the group as it was.

    Args:
        weights: this rank's tensors, one layer for each of the plan.
        plan: from `plan_moves`, the same on all ranks.
        topology: sizes; `ep_size` is that of the transport, `slots_per_rank` that of the weights.
        transport: how bytes travel.
        timeout: seconds that any single step (agreement, a batch of messages, a vote) may take.
        max_staging_bytes: layers are grouped so that no rank stages more than this; a layer that needs more makes a
            group of its own.
        epoch: the caller's number of this rearrangement; ranks that disagree about it move nothing.

    Returns:
        `RearrangeReport` of this rank.

    Raises:
        EplbError: if plan, topology, weights and transport do not fit on this rank.
        RearrangeError: on every rank that is left, if ranks disagree, or one failed or was lost on the way.
    """
    start = time.monotonic()
    _check(weights, plan, topology, transport)
    _agree(weights, plan, topology, transport, timeout, max_staging_bytes, epoch)
    groups = group_layers(weights, plan, topology, max_staging_bytes)
    ops = sent = received = peak = 0
    for index, group in enumerate(groups):
        schedule = schedule_rounds(plan, topology, layers=group)
        staged = _Staged(weights, schedule, transport.rank)
        error: Exception | None = None
        try:
            staged.exchange(transport, timeout)
        except (RuntimeError, MemoryError) as failure:
            error = failure
        reason = _vote(transport, error, timeout)
        if reason is not None:
            done = tuple(layer for other in groups[:index] for layer in other)
            left = tuple(layer for other in groups[index:] for layer in other)
            raise RearrangeError(done, left, reason) from error
        peak = max(peak, staged.num_bytes + _commit(weights, plan, topology, transport.rank, group, staged))
        ops, sent, received = ops + staged.num_ops, sent + staged.bytes_sent, received + staged.bytes_received
    layers = tuple(range(weights.num_layers))
    return RearrangeReport(ops, sent, received, peak, time.monotonic() - start, layers)


def group_layers(
    weights: ExpertWeights, plan: MovePlan, topology: Topology, max_staging_bytes: int
) -> list[tuple[int, ...]]:
    """Split the layers into consecutive groups that no rank needs more than `max_staging_bytes` for.

    The same on every rank, as it depends only on what all ranks know.
    """
    needed = np.zeros(weights.num_layers, dtype=np.int64)
    schedule = schedule_rounds(plan, topology)
    for side in (schedule.src_rank, schedule.dst_rank):
        rows = np.bincount(schedule.layer * topology.ep_size + side, minlength=needed.size * topology.ep_size)
        needed += rows.reshape(-1, topology.ep_size).max(axis=1)
    needed *= [weights.row_bytes(layer) for layer in range(weights.num_layers)]
    groups: list[list[int]] = [[]]
    total = 0
    for layer, num_bytes in enumerate(needed.tolist()):
        if groups[-1] and total + num_bytes > max_staging_bytes:
            groups.append([])
            total = 0
        groups[-1].append(layer)
        total += num_bytes
    return [tuple(group) for group in groups]


class _Staged:
    """The messages of one group on one rank: packed rows out, rows in that wait for the commit."""

    def __init__(self, weights: ExpertWeights, schedule: Schedule, rank: int):
        self.weights, self.schedule, self.rank = weights, schedule, rank
        self.rows: dict[tuple[int, int], Tensor] = {}
        self.num_ops = self.bytes_sent = self.bytes_received = self.num_bytes = 0

    def exchange(self, transport: Transport, timeout: float) -> None:
        """Run the rounds in bounded batches; relayed rows are packed only after their own arrival."""
        for first in range(0, self.schedule.num_rounds, _ROUNDS_PER_BATCH):
            for relayed in (False, True):
                rounds = (self.schedule.round >= first) & (self.schedule.round < first + _ROUNDS_PER_BATCH)
                index = np.flatnonzero(rounds & (self.schedule.relayed == relayed))
                sends = self._messages(
                    index[self.schedule.src_rank[index] == self.rank], self.schedule.dst_rank
                )
                recvs = self._messages(
                    index[self.schedule.dst_rank[index] == self.rank], self.schedule.src_rank
                )
                out = [(peer, self._pack(rows)) for peer, rows in sends]
                into = [(peer, self._reserve(rows)) for peer, rows in recvs]
                transport.exchange(out, into, timeout)
                self.num_ops += len(out) + len(into)
                self.bytes_sent += sum(tensor.numel() for _, tensor in out)
                self.bytes_received += sum(tensor.numel() for _, tensor in into)
                self.num_bytes = max(self.num_bytes, self.bytes_received + sum(t.numel() for _, t in out))

    @staticmethod
    def _messages(index: np.ndarray, peers: np.ndarray) -> list[tuple[int, list[int]]]:
        """Rows by peer, in the schedule's order, which is the same on both sides."""
        by_peer: dict[int, list[int]] = {}
        for row in index.tolist():
            by_peer.setdefault(int(peers[row]), []).append(row)
        return list(by_peer.items())

    def _pack(self, rows: list[int]) -> Tensor:
        layers = self.schedule.layer[rows].tolist()
        sizes = [self.weights.row_bytes(layer) for layer in layers]
        packed = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device())
        for row, layer, piece in zip(rows, layers, packed.split(sizes), strict=True):
            slot = int(self.schedule.src_slot[row])
            if self.schedule.relayed[row]:
                piece.copy_(self.rows[layer, slot])
            else:
                self.weights.pack_row(layer, slot % self.weights.slots_per_rank, piece)
        return packed

    def _reserve(self, rows: list[int]) -> Tensor:
        layers = self.schedule.layer[rows].tolist()
        sizes = [self.weights.row_bytes(layer) for layer in layers]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device())
        for row, layer, piece in zip(rows, layers, buffer.split(sizes), strict=True):
            self.rows[layer, int(self.schedule.dst_slot[row])] = piece
        return buffer

    def _device(self) -> torch.device:
        return next(iter(self.weights.layers[0].values())).device


def _commit(weights, plan, topology, rank: int, group, staged: _Staged) -> int:
    """Write one group's rows. Returns the bytes that local cycles needed on the side."""
    first, spare_bytes = rank * topology.slots_per_rank, 0
    for layer in group:
        source = np.asarray(plan.source_slot)[layer, first : first + topology.slots_per_rank].tolist()
        arrived = {
            source[slot - first]: row for (row_layer, slot), row in staged.rows.items() if row_layer == layer
        }
        local = {
            slot: src - first
            for slot, src in enumerate(source)
            if src not in (EMPTY, first + slot) and src not in arrived
        }
        spare_bytes = max(spare_bytes, _copy_locally(weights, layer, order_copies(local)))
        for slot, src in enumerate(source):
            if src in arrived:
                weights.unpack_row(layer, slot, arrived[src])
    return spare_bytes


def _copy_locally(weights: ExpertWeights, layer: int, copies: list[Copy]) -> int:
    """Carry out ordered copies with at most one row on the side at a time."""
    spare: Tensor | None = None
    for copy in copies:
        if copy.saves:
            device = next(iter(weights.layers[layer].values())).device
            spare = torch.empty(weights.row_bytes(layer), dtype=torch.uint8, device=device)
            weights.pack_row(layer, copy.src, spare)
        elif copy.restores and spare is not None:
            weights.unpack_row(layer, copy.dst, spare)
        else:
            weights.copy_row(layer, copy.src, copy.dst)
    return 0 if spare is None else spare.numel()


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


def _agree(weights, plan, topology, transport, timeout, max_staging_bytes, epoch) -> None:
    """Compare on all ranks what must be equal, one digest per thing, so that the error can name what differs."""
    relay = (
        b"" if plan.relay_slot is None else np.ascontiguousarray(plan.relay_slot, dtype=np.int32).tobytes()
    )
    parts = {
        "plan": np.ascontiguousarray(plan.source_slot, dtype=np.int32).tobytes() + relay,
        "topology": repr((topology, max_staging_bytes)).encode(),
        "epoch": repr(epoch).encode(),
        "tensor layout": weights.layout().encode(),
    }
    size = 16
    mine = b"".join(hashlib.blake2b(part, digest_size=size).digest() for part in parts.values())
    unchanged = tuple(range(weights.num_layers))
    try:
        theirs = transport.all_gather(mine, timeout)
    except TransportError as error:
        raise RearrangeError((), unchanged, f"Ranks could not compare plans: {error}.") from error
    digests = [[other[i : i + size] for i in range(0, len(mine), size)] for other in theirs]
    odd = {
        name: [rank for rank, theirs in enumerate(digests) if theirs[i] != digests[0][i]]
        for i, name in enumerate(parts)
    }
    if any(odd.values()):
        odd = {name: ranks for name, ranks in odd.items() if ranks}
        raise RearrangeError(
            (),
            unchanged,
            "`rearrange` needs the same plan, topology, epoch and tensor layout on all ranks; "
            f"got others than rank 0's on ranks {odd}. Plan once and broadcast, or plan everywhere from the same load.",
        )


def _vote(transport: Transport, error: Exception | None, timeout: float) -> str | None:
    """Tell all ranks whether this one has all its rows. Returns why the group must not be committed, or None."""
    try:
        votes = transport.all_gather(b"\x00" if error is None else b"\x01", timeout)
    except TransportError as failure:
        return (
            f"Rank {transport.rank} could not learn whether all ranks have their rows: {failure}. "
            "Other ranks may have committed this group."
        )
    failed = [rank for rank, vote in enumerate(votes) if vote != b"\x00"]
    if not failed:
        return None
    return f"Ranks {failed} could not receive their rows" + (f" (here: {error})." if error else ".")
