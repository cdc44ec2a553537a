"""What the checks are given, and strategies that draw it."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from eplb_core._checks import EMPTY
from eplb_core.maps import ExpertMaps, derive_maps
from eplb_core.testing.models import model_slots
from eplb_core.testing.strategies import loads, placement_pairs, placements, read_only, topologies
from eplb_core.topology import Topology


class PolicyCase(NamedTuple):
    """What a placement policy is asked.

    load: int64 `[layers, logical]` tokens per expert.
    topology: ranks, slots and nodes; at least as many slots as experts.
    previous: int32 `[layers, slots]` the placement in force, or None.
    """

    load: Any
    topology: Topology
    previous: Any = None


class MoveCase(NamedTuple):
    """What an executor is asked.

    old: int32 `[layers, slots]` the placement in force; every expert has a copy.
    new: int32 `[layers, slots]` the placement wanted.
    topology: ranks, slots and nodes.
    rows: `[layers, slots, ...]` what each slot holds. No two slots of a layer hold the same bits, also not two copies
        of an expert, so that it can be seen which slot a row came from.
    """

    old: Any
    new: Any
    topology: Topology
    rows: Any


class DispatchCase(NamedTuple):
    """What a dispatch is asked, for one layer.

    topk_ids: int64 `[tokens, k]` experts; negative ids are padding.
    maps: `ExpertMaps` of one layer, without the layer axis. Every expert has a copy.
    """

    topk_ids: Any
    maps: ExpertMaps


@st.composite
def policy_cases(draw, *, previous: bool | None = None, **sizes: Any) -> PolicyCase:
    """Draw a topology, a load with ties and zeros and, maybe, a placement in force.

    Args:
        previous: whether there is a placement in force; by default now and then.
        sizes: bounds for `topologies`: `max_ranks_per_node`, `max_nodes`, `max_slots_per_rank`.
    """
    topology = draw(topologies(**sizes))
    load = draw(loads(draw(st.integers(1, topology.num_slots))))
    held = None
    if draw(st.booleans()) if previous is None else previous:
        held = draw(placements(topology, load.shape[1], len(load)))
    return PolicyCase(load, topology, held)


@st.composite
def move_cases(draw, *, empty: bool = False, width: int = 3, **sizes: Any) -> MoveCase:
    """Draw an old and a new placement, some far apart and some a few swaps, and rows of float32.

    Args:
        empty: the new placement may have `EMPTY` slots.
        width: numbers per row; the first is distinct in all slots, and others are NaN, infinite or -0 at times.
        sizes: bounds for `topologies`.
    """
    similar = placement_pairs(similar=True, **sizes)
    topology, _, old, new = draw(st.one_of(placement_pairs(empty=empty, **sizes), similar))
    odd = draw(st.sampled_from([np.nan, -np.inf, -0.0, 1e-45]))
    rows = np.full((*old.shape, width), odd, dtype=np.float32)
    rows[:, :, 0] = np.arange(1, old.size + 1).reshape(old.shape)
    return MoveCase(old, new, topology, read_only(rows))


@st.composite
def dispatch_cases(draw, *, max_tokens: int = 12, max_k: int = 4, padding: bool = True, **sizes: Any) -> DispatchCase:
    """Draw the maps of one layer and a batch of router decisions, which may be empty.

    Args:
        max_tokens: tokens in the batch.
        max_k: experts per token; one token may name an expert twice.
        padding: some ids may be -1.
        sizes: bounds for `topologies`.
    """
    topology = draw(topologies(**sizes))
    num_logical = draw(st.integers(1, topology.num_slots))
    placement = draw(placements(topology, num_logical, 1))[0]
    width = max(len(slots) for slots in model_slots(placement.tolist(), num_logical)) + draw(st.integers(0, 2))
    maps = ExpertMaps(*(read_only(np.asarray(x)) for x in derive_maps(placement, num_logical, max_replicas=width)))
    tokens, k = draw(st.integers(0, max_tokens)), draw(st.integers(1, max_k))
    ids = st.integers(EMPTY if padding else 0, num_logical - 1)
    batch = draw(st.lists(ids, min_size=tokens * k, max_size=tokens * k))
    return DispatchCase(read_only(np.asarray(batch, dtype=np.int64).reshape(tokens, k)), maps)
