"""Placements larger and more skewed than those of `eplb_core.testing`, from seeds."""

import numpy as np
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology
from eplb_core.testing import read_only

SEEDS = st.integers(0, 2**32 - 1)


def skewed_placements(rng, topology: Topology, num_layers: int, num_logical: int, empty: float) -> np.ndarray:
    """Placements in which some experts have very many copies, also on one rank, and some slots are `EMPTY`."""
    spare = (num_logical * rng.random((num_layers, topology.num_slots - num_logical)) ** 3).astype(np.int32)
    experts = np.broadcast_to(np.arange(num_logical, dtype=np.int32), (num_layers, num_logical))
    placed = rng.permuted(np.concatenate([experts, spare], axis=1), axis=1)
    return read_only(np.where(rng.random(placed.shape) < empty, EMPTY, placed).astype(np.int32))


@st.composite
def large_pairs(draw, *, lost: bool = False):
    """A topology of up to 24 ranks and 120 slots, the number of experts, and two placements of up to 6 layers.

    The new placement may have `EMPTY` slots; the old one too if experts may be `lost`.
    """
    num_nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    topology = Topology(num_nodes * ranks_per_node, draw(st.integers(1, 5)), num_nodes)
    num_logical, num_layers = draw(st.integers(1, topology.num_slots)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(SEEDS))
    shares = draw(st.sampled_from([0, 0.2, 0.6])) if lost else 0, draw(st.sampled_from([0, 0.2, 0.6]))
    old, new = (skewed_placements(rng, topology, num_layers, num_logical, empty) for empty in shares)
    return topology, num_logical, old, new
