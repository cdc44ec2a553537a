"""Bring the rows of one part to the ranks that need them: bounded batches, the same on all ranks."""

import time
from dataclasses import dataclass

import numpy as np

from eplb_core import Schedule, Topology
from eplb_core._checks import listing
from eplb_torch.staging import Staging
from eplb_torch.transaction.parcel import Parcel, Row, WireFormat
from eplb_torch.transport import Message, Transport
from eplb_torch.weights import ExpertWeights, aligned

_MAX_OPS = 32  # messages that a rank has in flight in each direction: large NCCL batches hang
_CHUNK_OPS = 8  # of them for one peer, so that several peers fit
_CHUNK_BYTES = 2**22  # packed for one peer at a time: memory that sending takes


class DamagedRowsError(RuntimeError):
    """Rows arrived with other bytes than were sent."""


@dataclass(slots=True)
class Traffic:
    """Messages of one rank: how many, and the bytes in them."""

    ops: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Delivery:
    """All messages of one part, as one rank sees them. Laid out before any memory is taken.

    Args:
        weights: this rank's.
        schedule: the rows of the part.
        topology: sizes.
        rank: this rank.
        wire: how rows become messages.

    Attributes:
        staging_bytes: memory that receiving takes, and until the end of each batch sending as well.
        kept_bytes: the share of it that is taken until the commit: the rows that arrive.
        arrived: filled by `run`: for (layer, destination slot) the row, in staging memory.
    """

    def __init__(self, weights: ExpertWeights, schedule: Schedule, topology: Topology, rank: int, wire: WireFormat):
        self._weights, self._schedule, self._slots_per_rank = weights, schedule, topology.slots_per_rank
        self.arrived: dict[tuple[int, int], Row] = {}
        self._batches = [self._address(rows, rank, wire) for rows in batch_rows(schedule, weights, wire)]
        self.kept_bytes = self.staging_bytes = 0
        for sends, recvs in self._batches:
            self.kept_bytes += sum(aligned(parcel.num_bytes) for _, parcel, _ in recvs)
            packed = sum(aligned(parcel.packed_bytes) for _, parcel, _ in sends)
            self.staging_bytes = max(self.staging_bytes, self.kept_bytes + packed)

    def run(self, transport: Transport, staging: Staging, deadline: float, traffic: Traffic) -> None:
        """Exchange all batches and check what arrived.

        Raises:
            TransportError: if a message did not go through before the deadline.
            DamagedRowsError: if a row does not have the checksum that came with it.
        """
        for sends, recvs in self._batches:
            incoming: list[Message] = []
            arrivals = []
            for peer, parcel, rows in recvs:
                buffers, arrival = parcel.receive_into(staging)
                incoming += [(peer, buffer) for buffer in buffers]
                arrivals.append((peer, arrival, rows))
            mark = staging.mark()
            outgoing: list[Message] = []
            for peer, parcel, rows in sends:
                sources = [self._source(row) for row in rows]
                outgoing += [(peer, message) for message in parcel.send_from(sources, staging)]
            transport.exchange(outgoing, incoming, max(deadline - time.monotonic(), 1e-3))
            staging.release(mark)
            traffic.ops += len(outgoing) + len(incoming)
            traffic.bytes_sent += sum(tensor.numel() for _, tensor in outgoing)
            traffic.bytes_received += sum(tensor.numel() for _, tensor in incoming)
            self._unload(arrivals)

    def _unload(self, arrivals) -> None:
        schedule, damaged = self._schedule, []
        for peer, arrival, rows in arrivals:
            places = [(int(schedule.layer[row]), int(schedule.dst_slot[row])) for row in rows]
            self.arrived.update(zip(places, arrival.rows, strict=True))
            damaged += [(*places[i], peer) for i in arrival.damaged()]
        if damaged:
            raise DamagedRowsError(f"rows arrived damaged at (layer, slot, sender) {listing(damaged)}")

    def _source(self, row: int) -> Row:
        """A row to send: from the weights, or from staging memory if it is passed on."""
        layer, slot = int(self._schedule.layer[row]), int(self._schedule.src_slot[row])
        if self._schedule.relayed[row]:
            return self.arrived[layer, slot]
        return [views[slot % self._slots_per_rank] for views in self._weights.rows(layer)]

    def _address(self, rows: np.ndarray, rank: int, wire: WireFormat):
        """One batch's parcels that this rank sends, and those that it receives, with their peers and rows."""
        schedule = self._schedule
        sides = []
        for mine, theirs in ((schedule.src_rank, schedule.dst_rank), (schedule.dst_rank, schedule.src_rank)):
            by_peer: dict[int, list[int]] = {}
            for row in rows[mine[rows] == rank].tolist():
                by_peer.setdefault(int(theirs[row]), []).append(row)
            sides.append(
                [
                    (peer, Parcel(self._weights, schedule.layer[own].tolist(), wire), own)
                    for peer, own in by_peer.items()
                ]
            )
        return sides


def batch_rows(schedule: Schedule, weights: ExpertWeights, wire: WireFormat) -> list[np.ndarray]:
    """Cut a schedule into batches of few messages; the same on every rank.

    Consecutive rounds share a batch. Rows that make messages of their own are sent a few at a time. Relayed rows
    come in later batches than those that bring them to their relay.

    Returns:
        Indices of the schedule's rows, in its order within each batch.
    """
    if not len(schedule.round):
        return []
    fields = [weights.fields(layer) for layer in range(weights.num_layers)]
    direct = max(sum(map(wire.is_direct, layer)) for layer in fields)
    packed = max(sum(aligned(f.num_bytes) for f in layer if not wire.is_direct(f)) for layer in fields)
    rows_per_chunk = _CHUNK_BYTES // max(packed, 1)
    if direct:
        rows_per_chunk = min(rows_per_chunk, (_CHUNK_OPS - 1) // direct)
    rows_per_chunk = max(1, rows_per_chunk)
    rounds_per_batch = max(1, _MAX_OPS // (1 + direct * rows_per_chunk))
    pair = np.stack([schedule.round, schedule.src_rank, schedule.dst_rank])
    starts = np.flatnonzero(np.r_[True, (pair[:, 1:] != pair[:, :-1]).any(axis=0)])
    position = np.arange(len(schedule.round)) - np.repeat(starts, np.diff(np.r_[starts, len(schedule.round)]))
    key = np.stack([schedule.relayed, schedule.round // rounds_per_batch, position // rows_per_chunk])
    _, batch = np.unique(key, axis=1, return_inverse=True)
    batch = batch.reshape(-1)
    return [np.flatnonzero(batch == i) for i in range(int(batch.max()) + 1)]
