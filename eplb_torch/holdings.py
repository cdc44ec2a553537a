"""What ranks hold and what they have counted, told by each of them: the ground truth after a failure."""

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Real

from eplb_core import EMPTY, Topology
from eplb_core.elastic import grow
from eplb_core.elastic_plan import ElasticPlan
from eplb_torch.live_model import ElasticModel
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


def level_slots(models: Mapping[str, ElasticModel], transport: Transport, timeout: float) -> None:
    """Give every rank as many slots as the rank that has most, in every model. A collective.

    Ranks differ only if some had got more and others were not told before the group broke.

    Raises:
        TransportError: if a rank was not heard.
        EplbError: if a model cannot have more slots.
    """
    mine = b"".join(_COUNT.pack(model.weights.slots_per_rank) for model in models.values())
    counts = [[count for (count,) in _COUNT.iter_unpack(payload)] for payload in heard(transport, mine, timeout)]
    for model, slots in zip(models.values(), zip(*counts, strict=True), strict=True):
        if max(slots) > model.weights.slots_per_rank:
            model.resize(max(slots))


def gather_holdings(
    models: Mapping[str, ElasticModel],
    seats: Mapping[str, int],
    loads: Mapping[str, Real[np.ndarray, "layers logical"]],
    transport: Transport,
    num_nodes: int,
    timeout: float,
) -> dict[str, Holdings]:
    """Let every rank tell what its slots hold. A collective, after `level_slots`.

    A rank knows its own slots for certain, whatever became of the last rearrangement elsewhere; what it believes of
    others is not asked for.

    Args:
        models: in the same order on all ranks.
        seats: by model, which rank of its placement this one is.
        loads: by model.
        transport: of the group.
        num_nodes: of the group.
        timeout: seconds to wait for the others.

    Raises:
        TransportError: if a rank was not heard.
    """
    held = {name: _own_slots(model, seats[name]) for name, model in models.items()}
    mine = b"".join(held[name].tobytes() + loads[name].astype(np.float64).tobytes() for name in models)
    payloads, start, holdings = heard(transport, mine, timeout), 0, {}
    for name, model in models.items():
        middle, end = start + held[name].nbytes, start + held[name].nbytes + loads[name].size * 8
        parts = [np.frombuffer(p[start:middle], dtype=np.int32).reshape(held[name].shape) for p in payloads]
        load = np.sum([np.frombuffer(p[middle:end]).reshape(loads[name].shape) for p in payloads], axis=0)
        topology = Topology(transport.size, model.weights.slots_per_rank, num_nodes)
        holdings[name] = Holdings(np.concatenate(parts, axis=1), load, topology)
        start = end
    return holdings


def heard(transport: Transport, payload: bytes, timeout: float) -> list[bytes]:
    """Gather, or raise `TransportError` if a rank is silent."""
    payloads = transport.gather(payload, timeout)
    silent = [rank for rank, theirs in enumerate(payloads) if theirs is None]
    if silent:
        raise TransportError(f"ranks {silent} did not answer within {timeout:g} s")
    return [theirs for theirs in payloads if theirs is not None]


def _own_slots(model: ElasticModel, seat: int) -> Int[np.ndarray, "layers slots_per_rank"]:
    """What the slots of this rank hold; `EMPTY` in those that have been added since."""
    by_rank = model.placement.reshape(model.weights.num_layers, model.topology.ep_size, -1)
    more = model.weights.slots_per_rank - by_rank.shape[2]
    return np.pad(by_rank[:, seat], ((0, 0), (0, more)), constant_values=EMPTY).astype(np.int32)
