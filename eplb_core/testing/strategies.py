"""Hypothesis strategies for valid input: sizes, loads and placements."""

import numpy as np
from hypothesis import strategies as st

from eplb_core._checks import EMPTY
from eplb_core.topology import Topology


def read_only(array: np.ndarray) -> np.ndarray:
    """Forbid writes, so that a function that is not pure fails."""
    array.setflags(write=False)
    return array


@st.composite
def topologies(draw, max_ranks_per_node: int = 4, max_nodes: int = 3, max_slots_per_rank: int = 4) -> Topology:
    """Topologies of one rank and up; few ranks per node, few nodes, few slots."""
    num_nodes = draw(st.integers(1, max_nodes))
    ranks_per_node = draw(st.integers(1, max_ranks_per_node))
    return Topology(num_nodes * ranks_per_node, draw(st.integers(1, max_slots_per_rank)), num_nodes)


def token_counts() -> st.SearchStrategy[int]:
    """Tokens of one expert: often zero or small, so that ties are common; sometimes millions."""
    return st.one_of(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 10**7))


@st.composite
def loads(draw, num_logical: int, num_layers: int | None = None, num_windows: int | None = None) -> np.ndarray:
    """Read-only int64 loads `[layers, logical]`, or `[windows, layers, logical]`, with ties and zeros."""
    layers = draw(st.integers(1, 3)) if num_layers is None else num_layers
    shape = (layers, num_logical) if num_windows is None else (num_windows, layers, num_logical)
    size = int(np.prod(shape))
    counts = draw(st.lists(token_counts(), min_size=size, max_size=size))
    return read_only(np.asarray(counts, dtype=np.int64).reshape(shape))


@st.composite
def distinct_loads(draw, num_logical: int, num_layers: int) -> np.ndarray:
    """Read-only loads `[layers, logical]` of distinct primes, so that no two shares of different experts are equal."""
    primes = _primes(num_logical * num_layers)
    order = draw(st.permutations(range(len(primes))))
    return read_only(np.asarray([primes[i] for i in order], dtype=np.int64).reshape(num_layers, num_logical))


@st.composite
def placements(
    draw, topology: Topology, num_logical: int, num_layers: int | None = None, *, empty: bool = False
) -> np.ndarray:
    """Read-only int32 placements `[layers, slots]`.

    Every expert has a copy, unless `empty`: then some slots are `EMPTY` and experts may have none.
    """
    layers = draw(st.integers(1, 3)) if num_layers is None else num_layers
    spare = topology.num_slots - num_logical
    rows = []
    for _ in range(layers):
        extra = draw(st.lists(st.integers(0, num_logical - 1), min_size=spare, max_size=spare))
        row = draw(st.permutations([*range(num_logical), *extra]))
        if empty:
            gone = draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
            row = [EMPTY if lost else expert for expert, lost in zip(row, gone, strict=True)]
        rows.append(row)
    return read_only(np.asarray(rows, dtype=np.int32))


@st.composite
def placement_pairs(
    draw, *, empty: bool = False, similar: bool = False, **sizes: int
) -> tuple[Topology, int, np.ndarray, np.ndarray]:
    """A topology, a number of experts, and an old and a new placement of them.

    Args:
        empty: the new placement may have `EMPTY` slots (the old one holds every expert).
        similar: the new placement differs from the old one in a few swaps only.
        sizes: bounds for `topologies`.
    """
    topology = draw(topologies(**sizes))
    num_logical = draw(st.integers(1, topology.num_slots))
    old = draw(placements(topology, num_logical))
    if not similar:
        return topology, num_logical, old, draw(placements(topology, num_logical, len(old), empty=empty))
    new = old.copy()
    slots = st.integers(0, topology.num_slots - 1)
    for layer, a, b in draw(st.lists(st.tuples(st.integers(0, len(old) - 1), slots, slots), max_size=4)):
        new[layer, [a, b]] = new[layer, [b, a]]
    return topology, num_logical, old, read_only(new)


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 1009
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            found.append(candidate)
        candidate += 1
    return found
