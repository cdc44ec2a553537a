"""One source, several array libraries: equal integers from NumPy, `jax.jit`, `jax.vmap` and a strict library.

The libraries share the source, so agreement proves no result right; the other files do that.
"""

from collections.abc import Callable
from functools import cache, partial
from math import lcm
from typing import Any
from unittest import mock

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import (
    Topology,
    _ops,
    apply_moves,
    balancedness,
    check_placement,
    derive_maps,
    load_bound,
    model_balancedness,
    moved_experts,
    plan_moves,
    preserve_slots,
    rank_load,
    rebalance,
)
from eplb_core.control import compare
from eplb_core.control.decision import worth_their_share
from eplb_core.load import exponential_decay, last_value, logical_load, sliding_window, trend_forecast
from eplb_core.testing import loads, placements, read_only
from tests.devices import enable_x64, num_compiled

# Compiling dominates, so sizes are few and values are many.
WINDOWS, LAYERS = 2, 3
SIZES = {"two nodes": (Topology(4, 3, num_nodes=2), 8), "one node": (Topology(6, 2), 7)}


@st.composite
def problems(draw, size: str = "two nodes", make_load=loads):
    """Loads of some windows, an old placement, and a new one with `EMPTY` slots."""
    topology, num_logical = SIZES[size]
    load = draw(make_load(num_logical, num_layers=LAYERS, num_windows=WINDOWS))
    old = draw(placements(topology, num_logical, LAYERS))
    return load, old, draw(placements(topology, num_logical, LAYERS, empty=True))


def _policies(topology: Topology, num_logical: int) -> dict[str, Callable]:
    """Every policy, plain, by groups, and with everything that can be asked of it."""

    def place(load, old, **options):
        return rebalance(load, topology, previous=old, **options)

    nodes = topology.num_nodes
    extras = {"spread": "node"} if nodes > 1 else {}
    limits = {"tolerance": 0.02, "max_moves": 3, "max_total_moves": 5, "cross_node_cost": 2.0, "risk": 1.0}
    found = {
        policy: partial(lambda load, old, new, policy: place(load[0, ...], old, policy=policy), policy=policy)
        for policy in ("greedy", "refined", "incremental")
    }
    found |= {
        f"{policy} by groups": partial(
            lambda load, old, new, policy: place(load, old, policy=policy, num_groups=nodes, risk=0.5), policy=policy
        )
        for policy in ("greedy", "refined", "incremental")
    }
    found["refined afresh"] = lambda load, old, new: rebalance(load[0, ...], topology, policy="refined", **extras)
    found["incremental with limits"] = lambda load, old, new: place(load, old, **limits, **extras)
    return found


def _plans(topology: Topology, num_logical: int) -> dict[str, Callable]:
    live = np.arange(topology.ep_size) != 1

    def plan(old, new, **options):
        return plan_moves(old, new, topology, allow_lost=True, **options)

    return {
        "derive_maps": lambda load, old, new: derive_maps(new, num_logical, max_replicas=topology.num_slots),
        "plan_moves": lambda load, old, new: plan(old, new),
        "plan_moves by node": lambda load, old, new: plan(old, new, fan_out="node"),
        "plan_moves from live ranks": lambda load, old, new: plan(old, new, live_ranks=live),
        "apply_moves": lambda load, old, new: apply_moves(old, plan(old, new)),
        "moved_experts": lambda load, old, new: moved_experts(old, new, topology),
        "preserve_slots": lambda load, old, new: preserve_slots(new, old, topology),
    }


def _estimates(topology: Topology, num_logical: int) -> dict[str, Callable]:
    """Each estimator after some windows; states are as much a result as estimates."""

    def run(load, estimator):
        state = estimator.init(LAYERS, num_logical)
        for window in range(WINDOWS):
            state = estimator.update(state, load[window, ...])
        return state, estimator.estimate(state), estimator.windows(state)

    estimators = {
        "last_value": last_value(),
        "sliding_window": sliding_window(3),
        "exponential_decay": exponential_decay(1.5),
        "trend_forecast": trend_forecast(3),
    }
    found = {
        name: partial(lambda load, old, new, estimator: run(load, estimator), estimator=estimator)
        for name, estimator in estimators.items()
    }

    def of_slots(load, old, new):
        xp = _ops.namespace(load)
        return logical_load(xp.concat([load[0, ...], load[1, ...]], axis=1)[:, : topology.num_slots], new, num_logical)

    return found | {"logical_load": of_slots}


def _metrics(topology: Topology, num_logical: int) -> dict[str, Callable]:
    def worth(load, old, new):
        both = compare(old, new, load[0, ...], topology)
        return worth_their_share(both.busiest_before - both.busiest_after, both.moved, 900.0, 1.5)

    return {
        "rank_load": lambda load, old, new: rank_load(new, load, topology),
        "balancedness": lambda load, old, new: balancedness(old, load, topology),
        "model_balancedness": lambda load, old, new: model_balancedness(old, load, topology),
        "load_bound": lambda load, old, new: load_bound(load, topology),
        "control.compare": lambda load, old, new: compare(old, new, load[0, ...], topology),
        "control.balancedness": lambda load, old, new: compare(old, new, load[0, ...], topology).balancedness(),
        "control.worth_their_share": worth,
    }


@cache
def transform(name: str, size: str = "two nodes") -> Callable[..., Any]:
    """A transform as a function of `(load, old, new)`."""
    tables = [make(*SIZES[size]) for make in (_policies, _plans, _estimates, _metrics)]
    return next(table[name] for table in tables if name in table)


@cache
def jitted(name: str, size: str = "two nodes") -> Callable[..., Any]:
    """The transform under `jax.jit`; the caller says whether with x64."""
    return jax.jit(transform(name, size))


@cache
def vmapped(name: str) -> Callable[..., Any]:
    """The transform of many problems at once."""
    return jax.jit(jax.vmap(transform(name)))


POLICIES, PLANS, ESTIMATES, METRICS = (
    tuple(make(*SIZES["two nodes"])) for make in (_policies, _plans, _estimates, _metrics)
)
ALL = (*POLICIES, *PLANS, *ESTIMATES, *METRICS)


def on_device(problem, dtype=None) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, dtype=dtype) for x in problem)


def assert_same(got, expected, *, rtol: float = 1e-12, dtypes: bool = True) -> None:
    """Integers and booleans equal bit for bit, and in their dtype; floats to rounding."""
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert not dtypes or mine.dtype == theirs.dtype
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-9)
        else:
            np.testing.assert_array_equal(mine, theirs)


# With x64


ON_ONE_NODE = ("greedy", "refined", "incremental", "derive_maps", "plan_moves")


@pytest.mark.parametrize(
    ("name", "size"), [*((name, "two nodes") for name in ALL), *((name, "one node") for name in ON_ONE_NODE)]
)
@given(data=st.data())
@settings(max_examples=15)
def test_jit_gives_numpys_integers(name, size, data):
    problem = data.draw(problems(size))
    with enable_x64(True):
        got = jitted(name, size)(*on_device(problem))
    assert_same(got, transform(name, size)(*problem))


def test_metrics_and_what_is_decided_by_them_are_the_same_bit_for_bit():
    """Where a rank has many slots, libraries would add up in different orders."""
    topology, num_logical, num_layers = Topology(8, 18, num_nodes=2), 100, 6
    rng = np.random.default_rng(0)
    spare = topology.num_slots - num_logical

    def everything(held, load):
        placed = rebalance(load, topology, previous=held, max_total_moves=20)
        metrics = [metric(held, load, topology) for metric in (rank_load, balancedness, model_balancedness)]
        return placed, metrics, compare(held, placed, load, topology).balancedness()

    traced = jax.jit(everything)
    for _ in range(20):
        rows = [np.r_[np.arange(num_logical), rng.integers(0, num_logical, spare)] for _ in range(num_layers)]
        held = rng.permuted(np.stack(rows), axis=1).astype(np.int32)
        load = rng.integers(0, 10**6, (num_layers, num_logical))
        with enable_x64(True):
            got = traced(jnp.asarray(held), jnp.asarray(load))
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(everything(held, load)), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@settings(max_examples=5)
def test_vmap_over_models_or_traces(name, data):
    """Each row is what the transform gives for that model alone."""
    batch = [data.draw(problems()) for _ in range(3)]
    with enable_x64(True):
        got = vmapped(name)(*(jnp.stack(x) for x in zip(*map(on_device, batch), strict=True)))
    for i, problem in enumerate(batch):
        assert_same(jax.tree.map(lambda x, i=i: x[i], got), transform(name)(*problem))


@pytest.mark.parametrize("name", ALL)
def test_new_values_neither_compile_nor_leave_the_device(name):
    """One program for all values, without callbacks to the host; results are where the arguments are."""
    rng = np.random.default_rng(0)
    topology, num_logical = SIZES["two nodes"]

    def draw():
        load = rng.integers(0, 1000, (WINDOWS, LAYERS, num_logical))
        spare = rng.integers(0, num_logical, (2, LAYERS, topology.num_slots - num_logical))
        experts = np.concatenate([np.broadcast_to(np.arange(num_logical), (2, LAYERS, num_logical)), spare], axis=2)
        return on_device((load, *rng.permuted(experts, axis=2).astype(np.int32)))

    with enable_x64(True):
        assert "callback" not in str(jax.make_jaxpr(transform(name))(*draw()))
        jitted(name)(*draw())
        others, before = [draw() for _ in range(5)], num_compiled()
        with jax.transfer_guard("disallow"):
            results = [jitted(name)(*problem) for problem in others]
        assert num_compiled() == before
        assert len({str(result) for result in results}) > 1
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(results))


# Without x64


@pytest.mark.parametrize("name", [*PLANS, "last_value", "sliding_window", "logical_load"])
@given(data=st.data())
@settings(max_examples=15)
def test_what_is_all_integers_needs_no_x64(name, data):
    problem = data.draw(problems())
    with enable_x64(False):
        got = jitted(name)(*on_device(problem, jnp.int32))
    assert_same(got, transform(name)(*problem), dtypes=name in PLANS)


def in_float32():
    """NumPy computes in float32: what JAX does without x64."""
    original = _ops.float_dtype
    return mock.patch.object(_ops, "float_dtype", lambda xp: np.dtype(np.float32) if xp is np else original(xp))


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
@settings(max_examples=25)
def test_without_x64_policies_decide_as_numpy_does_in_float32(name, data):
    """The condition for equality: NumPy in float64 decides alike. Loads have ties, zeros, and sums beyond 2^24."""
    problem = data.draw(problems())
    with enable_x64(False):
        got = jitted(name)(*on_device(problem, jnp.int32))
    with in_float32():
        assert_same(got, transform(name)(*problem))


def test_without_x64_greedy_decides_as_numpy_does_in_float32_where_much_is_rounded():
    topology, num_logical = Topology(3, 8), 20
    rng = np.random.default_rng(0)

    def place(load):
        return rebalance(load, topology, policy="greedy")

    load = rng.integers(2**25, 2**25 + 64, (500, num_logical)).astype(np.int32)
    with enable_x64(False):
        got = jax.jit(place)(jnp.asarray(load))
    with in_float32():
        assert_same(got, place(load))
    assert (np.asarray(got) != place(load)).any()


@st.composite
def whole_shares(draw, num_logical: int, num_layers: int, num_windows: int, most: int) -> np.ndarray:
    """Loads that any number of copies here divides without remainder, with sums per layer up to `most`; many ties."""
    topology, _ = SIZES["two nodes"]
    unit = lcm(*range(1, topology.num_slots - num_logical + 2))
    counts = st.integers(0, most // unit // num_logical)
    size = num_windows * num_layers * num_logical
    units = draw(st.lists(counts, min_size=size, max_size=size))
    return read_only(np.asarray(units, dtype=np.int64).reshape(num_windows, num_layers, num_logical) * unit)


@pytest.mark.parametrize(("name", "most"), [("greedy", 2**24), ("refined", 1000), ("refined afresh", 1000)])
@given(data=st.data())
@settings(max_examples=25)
def test_without_x64_nothing_is_rounded_where_all_shares_are_whole_and_small(name, most, data):
    problem = data.draw(problems(make_load=partial(whole_shares, most=most)))
    with enable_x64(False):
        got = jitted(name)(*on_device(problem, jnp.int32))
    assert_same(got, transform(name)(*problem))


@pytest.mark.parametrize("name", METRICS)
@given(data=st.data())
@settings(max_examples=15)
def test_without_x64_metrics_agree_to_float32(name, data):
    load, old, new = data.draw(problems())
    with enable_x64(False):
        got = jitted(name)(*on_device((load, old, new), jnp.int32))
    if name != "control.worth_their_share":
        assert_same(got, transform(name)(load, old, new), rtol=1e-5, dtypes=False)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(2, 6), st.integers(1, 3))
@settings(max_examples=100)
def test_searches_end_in_float32(load, ep_size, slots_per_rank):
    """Bounds above the mean are searched for, and swaps may gain less than float32 can tell."""
    topology = Topology(max(ep_size, -(-len(load) // slots_per_rank)), slots_per_rank)
    load = np.asarray([load])
    with in_float32():
        bound = load_bound(load, topology)
        placed = rebalance(load, topology, policy="refined")
    np.testing.assert_allclose(bound, load_bound(load, topology), rtol=1e-4)
    check_placement(placed, topology, load.shape[1])


# A strict library


@pytest.mark.parametrize("name", [name for name in ALL if name != "plan_moves from live ranks"])
@given(data=st.data())
@settings(max_examples=10)
def test_a_strict_array_library_gives_numpys_integers_and_its_own_arrays(name, data):
    problem = data.draw(problems())
    got = transform(name)(*(array_api_strict.asarray(x.copy()) for x in problem))
    leaves = jax.tree.leaves(got, is_leaf=lambda x: hasattr(x, "__array_namespace__"))
    assert all(type(leaf).__module__.startswith("array_api_strict") for leaf in leaves)
    assert_same([np.asarray(leaf) for leaf in leaves], transform(name)(*problem))
