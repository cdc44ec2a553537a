"""One source, several array libraries: equal integers from NumPy, `jax.jit` with and without x64, and a strict one.

The libraries share the source, so agreement proves no result right; the other files do that.
"""

from functools import partial

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import (
    Topology,
    apply_moves,
    balancedness,
    derive_maps,
    load_bound,
    moved_experts,
    plan_moves,
    preserve_slots,
    rank_load,
    rebalance,
)
from eplb_core.testing import distinct_loads, loads, placements

# Compiling dominates, so sizes are few and values are many.
SIZES = [(Topology(4, 3, num_nodes=2), 8, 3), (Topology(6, 2), 7, 2)]
GREEDY = partial(rebalance, policy="greedy")


@st.composite
def problems(draw, make_load=loads):
    """A topology, a number of experts, a load, and an old and a new placement with `EMPTY` slots."""
    topology, num_logical, num_layers = draw(st.sampled_from(SIZES))
    load = draw(make_load(num_logical, num_layers=num_layers))
    old = draw(placements(topology, num_logical, num_layers))
    return topology, num_logical, load, old, draw(placements(topology, num_logical, num_layers, empty=True))


@partial(jax.jit, static_argnums=(0, 1))
def _everything(topology, num_logical, load, old, new):
    width = topology.num_slots
    groups = {"num_groups": topology.num_nodes} if num_logical % topology.num_nodes == 0 else {"hierarchy": "global"}
    placed = GREEDY(load, topology, previous=old, **groups)
    plans = [plan_moves(old, new, topology, fan_out=fan_out, allow_lost=True) for fan_out in ("direct", "node")]
    moved = [apply_moves(old, plan) for plan in plans]
    counts = moved_experts(old, new, topology), preserve_slots(new, old, topology)
    return placed, plans, moved, counts, derive_maps(new, num_logical, max_replicas=width)


def _same(got, expected):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(mine).dtype == np.asarray(theirs).dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("x64", [True, False])
@given(problem=problems(distinct_loads))
@settings(max_examples=40)
def test_jit_gives_numpys_integers(x64, problem):
    topology, num_logical, load, old, new = problem
    with jax.enable_x64(x64):
        traced = _everything(topology, num_logical, *(jnp.asarray(x, dtype=jnp.int32) for x in (load, old, new)))
    _same(traced, _everything.__wrapped__(topology, num_logical, load, old, new))


@given(problem=problems())
@settings(max_examples=40)
def test_with_x64_ties_are_broken_alike(problem):
    topology, _, load, old, _ = problem
    with jax.enable_x64(True):
        traced = jax.jit(GREEDY, static_argnums=1)(jnp.asarray(load), topology, previous=jnp.asarray(old))
    _same(traced, GREEDY(load, topology, previous=old))


@pytest.mark.parametrize("policy", ["refined", "incremental"])
@pytest.mark.parametrize("x64", [True, False])
def test_searching_policies_give_numpys_integers(policy, x64):
    """With x64 on any load, ties and zeros included; without it where no decision hangs on rounding.

    That is tested on loads of random magnitude, whose comparisons are never close enough for float32 to turn.
    """
    topology, num_logical, num_layers = SIZES[0]
    num_groups = topology.num_nodes

    def place(load, previous):
        return rebalance(load, topology, policy=policy, previous=previous, num_groups=num_groups)

    rng = np.random.default_rng(3)
    with jax.enable_x64(x64):
        traced = jax.jit(place)
        for turn in range(60):
            load = np.exp(rng.normal(0, 1.5, (num_layers, num_logical))) * 1000
            if x64 and turn % 2:
                load = rng.integers(0, 5, load.shape)
            spare = rng.integers(0, num_logical, (num_layers, topology.num_slots - num_logical))
            experts = np.broadcast_to(np.arange(num_logical), load.shape)
            old = rng.permuted(np.concatenate([experts, spare], axis=1), axis=1).astype(np.int32)
            load = load.astype(np.int32)
            _same(traced(jnp.asarray(load), jnp.asarray(old)), place(load, old))


@given(problem=problems(), policy=st.sampled_from(["refined", "incremental"]))
@settings(max_examples=30)
def test_searching_policies_on_a_strict_library(problem, policy):
    topology, _, load, old, _ = problem
    load_s, old_s = (array_api_strict.asarray(x.copy()) for x in (load, old))
    placed = rebalance(load_s, topology, policy=policy, previous=old_s)
    _same(np.asarray(placed), rebalance(load, topology, policy=policy, previous=old))
    np.testing.assert_allclose(np.asarray(load_bound(load_s, topology)), load_bound(load, topology))


@given(problem=problems())
@settings(max_examples=20)
def test_metrics_agree_to_rounding(problem):
    topology, _, load, old, _ = problem
    for metric in (rank_load, balancedness):
        with jax.enable_x64(True):
            traced = jax.jit(metric, static_argnums=2)(jnp.asarray(old), jnp.asarray(load), topology)
        np.testing.assert_allclose(np.asarray(traced), metric(old, load, topology), rtol=1e-12)


@given(problem=problems())
@settings(max_examples=40)
def test_a_strict_array_library_gives_numpys_integers_and_its_own_arrays(problem):
    topology, num_logical, load, old, new = problem
    xp = array_api_strict
    load_s, old_s, new_s = (xp.asarray(x.copy()) for x in (load, old, new))
    placed = GREEDY(load_s, topology, previous=old_s)
    assert isinstance(placed, type(load_s))
    _same(np.asarray(placed), GREEDY(load, topology, previous=old))
    for fan_out in ("direct", "node"):
        plan = plan_moves(old_s, new_s, topology, fan_out=fan_out)
        _same([np.asarray(x) for x in plan if x is not None], plan_moves(old, new, topology, fan_out=fan_out))
        _same(np.asarray(apply_moves(old_s, plan)), new)
    _same([np.asarray(x) for x in derive_maps(new_s, num_logical)], derive_maps(new, num_logical))
    _same(np.asarray(moved_experts(old_s, new_s, topology)), moved_experts(old, new, topology))
    np.testing.assert_allclose(np.asarray(balancedness(old_s, load_s, topology)), balancedness(old, load, topology))


def test_vmap_over_models():
    topology, num_logical, num_layers = SIZES[0]
    load = np.random.default_rng(0).integers(0, 1000, (5, num_layers, num_logical))
    with jax.enable_x64(True):
        got = jax.vmap(lambda one: GREEDY(one, topology))(jnp.asarray(load))
    _same(got, np.stack([GREEDY(one, topology) for one in load]))


def test_new_values_do_not_compile_again():
    topology, num_logical, num_layers = SIZES[0]
    traces = []

    @jax.jit
    def place(load):
        traces.append(load.shape)
        return GREEDY(load, topology)

    rng = np.random.default_rng(0)
    for _ in range(3):
        place(jnp.asarray(rng.integers(0, 1000, (num_layers, num_logical))))
    assert len(traces) == 1
