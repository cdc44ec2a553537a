"""What ranks hold and what they have counted, told by each of them: the ground truth after a failure."""

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Real

from eplb_core import EMPTY, Topology
from eplb_core.elastic import grow
from eplb_core.elastic_plan import ElasticPlan
from eplb_core.maps import count_replicas
from eplb_torch.transport import Transport, TransportError

_COUNT = struct.Struct("<i")


class Holdings(NamedTuple):
    """One model in the ranks of a group.

    placement: int32 `[layers, slots]` in rank order, each rank's part as it says itself.
    load: `[layers, logical]` the sum of all ranks' loads.
    topology: of the group.
    """

    placement: Int[np.ndarray, "layers slots"]
    load: Real[np.ndarray, "layers logical"]
    topology: Topology

    def plan(self, slots_per_rank: int | None = None, *, max_extra_moves: int | None = None) -> ElasticPlan:
        """Plan a copy for every expert without one, and fill the slots of ranks that hold nothing.

        The same for ranks that were lost, that joined, and both at once: who is left says what there is.

        Args:
            slots_per_rank: of every rank, where they are to have more; as many as now by default.
            max_extra_moves: as for `eplb_core.elastic.grow`.
        """
        topology = self.topology
        by_rank = self.placement.reshape(len(self.placement), topology.ep_size, -1)
        vacant = (by_rank == EMPTY).all(axis=(0, 2))
        vacant &= not vacant.all()  # where nobody holds anything, nobody joins
        held = by_rank[:, ~vacant].reshape(len(by_rank), -1)
        before = Topology(int((~vacant).sum()), topology.slots_per_rank)
        after = Topology(topology.ep_size, slots_per_rank or topology.slots_per_rank, topology.num_nodes)
        joining = np.flatnonzero(vacant)
        return grow(held, self.load, before, after, joining_ranks=joining, max_extra_moves=max_extra_moves)


class Told(NamedTuple):
    """What one rank says of one model.

    held: int32 `[layers, slots_per_rank]` what its slots hold.
    held_back: likewise, after it has committed what all ranks had confirmed; `held` if there is nothing.
    load: float64 `[layers, logical]` tokens that it knows of.
    """

    held: Int[np.ndarray, "layers slots_per_rank"]
    held_back: Int[np.ndarray, "layers slots_per_rank"]
    load: Real[np.ndarray, "layers logical"]


def gather_holdings(
    mine: Mapping[str, Told], transport: Transport, num_nodes: int, timeout: float
) -> tuple[dict[str, Holdings], bool]:
    """Let every rank tell what its slots hold. A collective.

    A rank knows its own slots for certain, whatever became of the last rearrangement elsewhere; what it believes of
    others is not asked for. Ranks have different numbers of slots if some had got more when the group broke: then
    those of the others are counted as `EMPTY`.

    Args:
        mine: what this rank says of each model, in the same order on all ranks.
        transport: of the group.
        num_nodes: of the group.
        timeout: seconds to wait for the others, twice.

    Returns:
        By model; and whether those with something held back are to commit it: if no more experts are lost than without.

    Raises:
        TransportError: if a rank was not heard.
    """
    counts = b"".join(_COUNT.pack(told.held.shape[1]) for told in mine.values())
    everyones = [[count for (count,) in _COUNT.iter_unpack(p)] for p in heard(transport, counts, timeout)]
    slots = dict(zip(mine, (max(column) for column in zip(*everyones, strict=True)), strict=True))
    wide = {name: _widen(told, slots[name]) for name, told in mine.items()}
    payloads = heard(transport, b"".join(_to_bytes(told) for told in wide.values()), timeout)
    told, start = {}, 0
    for name, ours in wide.items():
        end = start + len(_to_bytes(ours))
        told[name] = [_from_bytes(payload[start:end], ours) for payload in payloads]
        start = end
    kept, committed = (
        {name: np.concatenate([getattr(one, what) for one in ones], axis=1) for name, ones in told.items()}
        for what in ("held", "held_back")
    )
    loads = {name: np.sum([one.load for one in ones], axis=0) for name, ones in told.items()}
    commit = _count_lost(committed, loads) <= _count_lost(kept, loads)
    chosen = committed if commit else kept
    sizes = {name: Topology(transport.size, slots[name], num_nodes) for name in mine}
    return {name: Holdings(chosen[name], loads[name], sizes[name]) for name in mine}, commit


def heard(transport: Transport, payload: bytes, timeout: float) -> list[bytes]:
    """Gather, or raise `TransportError` if a rank is silent."""
    payloads = transport.gather(payload, timeout)
    silent = [rank for rank, theirs in enumerate(payloads) if theirs is None]
    if silent:
        raise TransportError(f"ranks {silent} did not answer within {timeout:g} s")
    return [theirs for theirs in payloads if theirs is not None]


def own_slots(
    placement: Int[np.ndarray, "layers slots"], topology: Topology, rank: int
) -> Int[np.ndarray, "layers slots_per_rank"]:
    """Cut one rank's part out of a placement."""
    return placement.reshape(len(placement), topology.ep_size, -1)[:, rank].astype(np.int32)


def _widen(told: Told, slots: int) -> Told:
    more = ((0, 0), (0, slots - told.held.shape[1]))
    held, held_back = (np.pad(part, more, constant_values=EMPTY) for part in (told.held, told.held_back))
    return Told(held, held_back, told.load)


def _to_bytes(told: Told) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in told)


def _from_bytes(payload: bytes, like: Told) -> Told:
    arrays, start = [], 0
    for array in like:
        arrays.append(np.frombuffer(payload[start : start + array.nbytes], dtype=array.dtype).reshape(array.shape))
        start += array.nbytes
    return Told(*arrays)


def _count_lost(placements: Mapping[str, np.ndarray], loads: Mapping[str, np.ndarray]) -> int:
    return sum(int((count_replicas(held, loads[name].shape[1]) == 0).sum()) for name, held in placements.items())
