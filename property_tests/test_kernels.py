"""NumPy has kernels of its own where they pay: they give what the source gives that all other libraries run."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import (
    EMPTY,
    Topology,
    _ops,
    derive_maps,
    plan_moves,
    preserve_slots,
    rebalance,
)
from eplb_core.moves import candidates, senders
from eplb_core.packing import pack, pack_apart
from eplb_core.replicate import replicate
from eplb_core.testing import placement_pairs, read_only
from property_tests.skewed import SEEDS, large_pairs, skewed_placements


def without_kernels(function, *args, **options):
    """Run the source that is written for any library, on NumPy's arrays."""
    with mock.patch.object(_ops, "is_numpy", return_value=False):
        return function(*args, **options)


def assert_same(got, expected):
    """Equal values, shapes and dtypes, of arrays and of tuples of arrays."""
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif expected is None:
        assert got is None
    else:
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(got, expected)


PAIRS = st.one_of(placement_pairs(empty=True), large_pairs(lost=True))


@given(PAIRS, st.integers(0, 3))
def test_derive_maps(pair, extra):
    _, num_logical, _, placement = pair
    expected = without_kernels(derive_maps, placement, num_logical)
    assert_same(derive_maps(placement, num_logical), expected)
    width = expected.logical_to_physical.shape[2] + extra
    given_width = without_kernels(derive_maps, placement, num_logical, max_replicas=width)
    assert_same(derive_maps(placement, num_logical, max_replicas=width), given_width)


@given(st.data(), PAIRS, st.sampled_from(["direct", "node"]), st.booleans(), st.booleans())
def test_plan_moves(data, pair, fan_out, together, table):
    topology, _, old, new = pair
    live = data.draw(st.none() | st.lists(st.integers(0, topology.ep_size - 1), unique=True))
    options = {"live_ranks": live, "fan_out": fan_out, "allow_lost": True}
    with (
        mock.patch.object(senders, "_TOGETHER", senders._TOGETHER if together else 0),
        mock.patch.object(candidates, "_TABLE", candidates._TABLE if table else 0),
    ):
        got = plan_moves(old, new, topology, **options)
        assert_same(tuple(got), tuple(without_kernels(plan_moves, old, new, topology, **options)))


@pytest.mark.parametrize("together", [True, False])
def test_plan_moves_where_the_first_choice_of_senders_is_bad(together):
    """Each level's experts are held by half of the ranks of the level before, which are then fully used."""
    ep_size, num_layers = 16, 3
    held = np.asarray([np.arange(ep_size) < level for level in (16, 8, 4, 2, 1) for _ in range(level)]).T
    topology = Topology(2 * ep_size, slots_per_rank=held.shape[1])
    experts = np.arange(held.shape[1])
    old = np.full((num_layers, 2 * ep_size, held.shape[1]), EMPTY)
    old[:, :ep_size] = np.where(held, experts, EMPTY)
    new = old.copy()
    for layer in range(num_layers):
        new[layer, ep_size + (experts + layer) % ep_size, experts] = experts
    old, new = (x.reshape(num_layers, -1) for x in (old, new))
    with mock.patch.object(senders, "_TOGETHER", 2**30 if together else 0):
        assert_same(plan_moves(old, new, topology), without_kernels(plan_moves, old, new, topology))


def test_plan_moves_where_one_rank_sends_more_than_its_cost_fits_32_bits():
    topology, num_logical = Topology(512, 3), 700
    rng = np.random.default_rng(0)
    old = skewed_placements(rng, topology, 12, num_logical, 0)
    new = np.array(old)
    new[:, ::3], new[:, 1::3] = old[:, :1], old[:, 1:2]  # every rank needs what the first holds
    assert_same(plan_moves(old, new, topology), without_kernels(plan_moves, old, new, topology))


@st.composite
def rows_of_loads(draw, max_items: int = 60):
    """`[rows, items]` with many ties and zeros, or with hardly any."""
    rng = np.random.default_rng(draw(SEEDS))
    size = draw(st.integers(1, 9)), draw(st.integers(1, max_items))
    most = draw(st.sampled_from([1, 3, 50, 10**6]))
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    load = rng.integers(0, most, size, endpoint=True) * (rng.random(size) < 2 * rng.random((size[0], 1)))
    return read_only((load / draw(st.sampled_from([1, 3, 10]))).astype(dtype))


@given(rows_of_loads())
def test_descending(load):
    values, order = without_kernels(_ops.descending, load)
    got_values, got_order = _ops.descending(load)
    np.testing.assert_array_equal(got_values, values)
    np.testing.assert_array_equal(got_order, order)


@given(rows_of_loads(), st.integers(0, 40), st.none() | st.integers(1, 5))
def test_replicate(load, spare, max_copies):
    num_slots = load.shape[1] + spare
    got = replicate(load, num_slots, max_copies=max_copies)
    assert_same(got, without_kernels(replicate, load, num_slots, max_copies=max_copies))


@given(st.data(), rows_of_loads())
def test_pack(data, load):
    num_items = load.shape[1]
    num_packs = data.draw(st.sampled_from([n for n in range(1, num_items + 1) if num_items % n == 0]))
    assert_same(pack(load, num_packs), without_kernels(pack, load, num_packs))
    expert = data.draw(SEEDS.map(lambda seed: np.random.default_rng(seed).integers(0, 9, load.shape).astype(np.int32)))
    assert_same(pack_apart(expert, load, num_packs), without_kernels(pack_apart, expert, load, num_packs))


@given(large_pairs(lost=True))
def test_preserve_slots(pair):
    topology, _, old, new = pair
    assert_same(preserve_slots(new, old, topology), without_kernels(preserve_slots, new, old, topology))


@given(large_pairs(), st.integers(1, 1000), SEEDS, st.sampled_from(["greedy", "refined", "incremental"]))
def test_rebalance(pair, most, seed, policy):
    topology, num_logical, old, _ = pair
    load = read_only(np.random.default_rng(seed).integers(0, most, (len(old), num_logical)))
    groups = topology.num_nodes if num_logical % topology.num_nodes == 0 else 1
    for options in ({"previous": old}, {"previous": old, "num_groups": groups}):
        got = rebalance(load, topology, policy=policy, **options)
        assert_same(got, without_kernels(rebalance, load, topology, policy=policy, **options))
