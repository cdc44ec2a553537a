"""What ranks hold and what they have counted, told by each of them: the ground truth after a failure."""

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Real, Shaped

from eplb_core import EMPTY, Topology
from eplb_core.elastic import grow
from eplb_core.elastic.plan import ElasticPlan
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
    held_back: likewise, if it commits what all ranks had confirmed; `held` if there is nothing.
    load: float64 `[layers, logical]` tokens that it knows of.
    """

    held: Int[np.ndarray, "layers slots_per_rank"]
    held_back: Int[np.ndarray, "layers slots_per_rank"]
    load: Real[np.ndarray, "layers logical"]


def gather_holdings(
    mine: Mapping[str, Told], transport: Transport, num_nodes: int, timeout: float
) -> tuple[dict[str, Holdings], dict[str, Bool[np.ndarray, "layers slots_per_rank"]]]:
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
        By model what ranks hold, or are about to; and in which of its slots this one is to commit what it holds back:
        see `choose_slots`.

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
    holdings, chosen = {}, {}
    for name, ones in told.items():
        held, held_back = (np.concatenate([getattr(one, what) for one in ones], axis=1) for what in Told._fields[:2])
        load = np.sum([one.load for one in ones], axis=0)
        sizes = Topology(transport.size, slots[name], num_nodes)
        take = choose_slots(held, held_back, load.shape[1])
        holdings[name] = Holdings(np.where(take, held_back, held), load, sizes)
        chosen[name] = own_slots(take, sizes, transport.rank)[:, : mine[name].held.shape[1]]
    return holdings, chosen


def choose_slots(
    held: Int[np.ndarray, "layers slots"], held_back: Int[np.ndarray, "layers slots"], num_logical: int
) -> Bool[np.ndarray, "layers slots"]:
    """Choose the slots in which to commit what is held back: where that brings an expert back and loses none.

    An expert that no slot holds may wait in the memory of a rank that has not committed yet, while the rank that it
    came from has. Other commits only risk something: what they would overwrite may have gone to a rank that is lost.

    >>> choose_slots(np.asarray([[0, 1, 1, 0]]), np.asarray([[0, 1, 2, 3]]), 4).tolist()
    [[False, False, True, True]]
    >>> choose_slots(np.asarray([[0, 1, 2, 0]]), np.asarray([[0, 1, 0, 0]]), 3).any().item()
    False
    """
    take = np.zeros(held.shape, dtype=bool)
    copies = count_replicas(held, num_logical).copy()
    for layer, slot in np.argwhere(held_back != held):
        old, new = held[layer, slot], held_back[layer, slot]
        if new != EMPTY and copies[layer, new] == 0 and (old == EMPTY or copies[layer, old] > 1):
            take[layer, slot] = True
            copies[layer, new] += 1
            if old != EMPTY:
                copies[layer, old] -= 1
    return take


def heard(transport: Transport, payload: bytes, timeout: float) -> list[bytes]:
    """Gather, or raise `TransportError` if a rank is silent."""
    payloads = transport.gather(payload, timeout)
    silent = [rank for rank, theirs in enumerate(payloads) if theirs is None]
    if silent:
        raise TransportError(f"ranks {silent} did not answer within {timeout:g} s")
    return [theirs for theirs in payloads if theirs is not None]


def own_slots(by_slot: Shaped[np.ndarray, "layers slots"], topology: Topology, rank: int) -> np.ndarray:
    """Cut one rank's `[layers, slots_per_rank]` out of what is known of all slots."""
    return by_slot.reshape(len(by_slot), topology.ep_size, -1)[:, rank]


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
