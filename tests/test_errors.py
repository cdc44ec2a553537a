"""Requests that cannot be met: each names what was given and what to change, and nothing else is raised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_core import (
    EplbError,
    LostExpertsError,
    MovePlan,
    Topology,
    apply_moves,
    balancedness,
    check_placement,
    derive_maps,
    moved_experts,
    plan_moves,
    preserve_slots,
    rebalance,
    round_robin,
    schedule_rounds,
)
from eplb_core._checks import check_kind
from tests.devices import enable_x64

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3, num_nodes=2)
LOAD = np.arange(20).reshape(2, 10)
PLACED = round_robin(2, 10, TOPOLOGY)


def bad_load(value, dtype=np.float64):
    load = LOAD.astype(dtype)
    load[1, 3] = value
    return load


def greedy(load, **options):
    return rebalance(load, TOPOLOGY, policy="greedy", **options)


REFUSED = {
    "NaN load": (lambda: greedy(bad_load(np.nan)), r"NaN or infinity at \[\(1, 3\)\]"),
    "infinite load": (lambda: greedy(bad_load(np.inf)), r"NaN or infinity at \[\(1, 3\)\]"),
    "negative load": (lambda: greedy(bad_load(-1, np.int64)), r"negative entries at \[\(1, 3\)\].*overflow"),
    "load without layers": (lambda: greedy(LOAD[0]), r"shape=\(10,\).*leading axis"),
    "load of four axes": (lambda: greedy(LOAD[None, None]), r"shape=\(1, 1, 2, 10\)"),
    "empty load": (lambda: greedy(LOAD[:, :0]), r"must not be empty"),
    "no windows": (lambda: greedy(LOAD[None][:0]), r"must not be empty"),
    "complex load": (lambda: greedy(LOAD.astype(complex)), r"dtype=complex128"),
    "text as load": (lambda: greedy([["a", "b"]]), r"must hold real numbers"),
    "ragged load": (lambda: greedy(np.asarray([[1, 2], [3]], dtype=object)), r"\[layers, logical\]"),
    "boolean load": (lambda: greedy(LOAD > 3), r"dtype=bool"),
    "more experts than slots": (lambda: greedy(np.ones((1, 13))), r"num_logical=13, num_slots=12.*slots_per_rank >= 4"),
    "unknown policy": (lambda: rebalance(LOAD, TOPOLOGY, policy="magic"), r"policy='magic'"),
    "unknown hierarchy": (lambda: greedy(LOAD, hierarchy="tree"), r"hierarchy='tree'"),
    "no groups": (lambda: greedy(LOAD, num_groups=0), r"num_groups=0"),
    "groups over nodes": (lambda: greedy(LOAD, num_groups=5, hierarchy="hierarchical"), r"num_groups=5, num_nodes=2"),
    "experts over groups": (lambda: greedy(LOAD, num_groups=4), r"num_groups=4, num_logical=10"),
    "previous of another model": (lambda: greedy(LOAD, previous=PLACED[:1]), r"shapes \(1, 12\) and \(2, 10\)"),
    "previous of another group": (lambda: greedy(LOAD, previous=PLACED[:, :9]), r"12 slots.*shape=\(2, 9\)"),
    "previous of floats": (lambda: greedy(LOAD, previous=PLACED * 1.0), r"dtype=float64"),
    "no ranks": (lambda: Topology(0, 3), r"ep_size=0"),
    "half a slot": (lambda: Topology(2, 1.5), r"slots_per_rank=1.5"),
    "ranks over nodes": (lambda: Topology(4, 3, num_nodes=3), r"ep_size=4, num_nodes=3"),
    "slots that do not divide": (
        lambda: Topology.from_experts(256, 3),
        r"num_logical=256, num_redundant=0, ep_size=3. Use num_redundant=2",
    ),
    "negative redundancy": (lambda: Topology.from_experts(4, 2, num_redundant=-2), r"num_redundant=-2"),
    "too many experts to start": (lambda: round_robin(1, 13, TOPOLOGY), r"num_logical=13"),
    "no layers to start": (lambda: round_robin(0, 3, TOPOLOGY), r"num_layers=0"),
    "id too large": (lambda: derive_maps(PLACED, 9), r"ids 0..8.*larger ids at \(layer, slot\) \[\(0, 9\), \(1, 9\)\]"),
    "id too small": (lambda: derive_maps(PLACED - 2, 9), r"smaller ids at"),
    "no experts": (lambda: derive_maps(PLACED, 0), r"num_logical=0"),
    "too few columns": (lambda: derive_maps(PLACED, 10, max_replicas=1), r"most copies=2. Use max_replicas >= 2"),
    "maps of a scalar": (lambda: derive_maps(np.asarray(3), 10), r"shape=\(\)"),
    "lost expert": (lambda: check_placement(PLACED, TOPOLOGY, 11), r"no copy of .* \[\(0, 10\), \(1, 10\)\]"),
    "unknown expert": (lambda: check_placement(PLACED, TOPOLOGY, 9), r"ids \[9\] at"),
    "placement of another group": (lambda: check_placement(PLACED, Topology(2, 3)), r"6 slots"),
    "preserve across models": (lambda: preserve_slots(PLACED, PLACED[:1], TOPOLOGY), r"same layers"),
    "moves across models": (lambda: plan_moves(PLACED, PLACED[:1], TOPOLOGY), r"same layers"),
    "moves across groups": (lambda: plan_moves(PLACED, PLACED, Topology(2, 3)), r"6 slots"),
    "count across models": (lambda: moved_experts(PLACED, PLACED[:1], TOPOLOGY), r"same layers"),
    "unknown fan-out": (lambda: plan_moves(PLACED, PLACED, TOPOLOGY, fan_out="tree"), r"fan_out='tree'"),
    "dead rank's id": (lambda: plan_moves(PLACED, PLACED, TOPOLOGY, live_ranks=[4]), r"rank ids 0..3"),
    "mask of another group": (
        lambda: plan_moves(PLACED, PLACED, TOPOLOGY, live_ranks=np.ones(3, bool)),
        r"shape=\(3,\), ep_size=4",
    ),
    "lost on the way": (
        lambda: plan_moves(PLACED, (PLACED + 1) % 11, TOPOLOGY),
        r"lost \(layer, expert\) pairs \[\(0, 10\), \(1, 10\)\]. Reload",
    ),
    "rows of another plan": (
        lambda: apply_moves(np.zeros((2, 11)), MovePlan(PLACED)),
        r"values.shape=\(2, 11\), source_slot.shape=\(2, 12\)",
    ),
    "layer that is not there": (lambda: schedule_rounds(MovePlan(PLACED), TOPOLOGY, layers=[2]), r"0..1.*layers=\[2\]"),
    "load of other layers": (lambda: balancedness(PLACED, LOAD[:1], TOPOLOGY), r"load.shape=\(1, 10\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    call, message = REFUSED[case]
    with pytest.raises(EplbError, match=message):
        call()


def test_all_offenders_are_named_up_to_a_limit():
    load = LOAD.astype(float)
    load[0] = np.nan
    with pytest.raises(EplbError, match=r"\(0, 7\), and 2 more\]"):
        greedy(load)


def test_lost_experts_are_data_too():
    with pytest.raises(LostExpertsError) as caught:
        plan_moves(PLACED, (PLACED + 1) % 11, TOPOLOGY)
    assert caught.value.lost == [(0, 10), (1, 10)]


def test_under_jit_shapes_are_checked_and_values_are_not():
    with pytest.raises(EplbError, match="more experts|at most the number of slots"):
        jax.jit(greedy)(jnp.ones((1, 13)))
    with pytest.raises(EplbError, match="max_replicas=None"):
        jax.jit(lambda ids: derive_maps(ids, 10))(jnp.asarray(PLACED))
    plan = jax.jit(lambda old, new: plan_moves(old, new, TOPOLOGY))(jnp.asarray(PLACED), (jnp.asarray(PLACED) + 1) % 11)
    assert (np.asarray(plan.source_slot) == -1).sum() == 2


def test_jax_arrays_with_values_are_checked():
    with pytest.raises(EplbError, match="negative"):
        greedy(jnp.asarray(bad_load(-1, np.int32)))


def test_32_bit_keys_that_would_overflow_are_refused():
    topology = Topology(ep_size=1, slots_per_rank=40_000)
    with enable_x64(False):
        old = jnp.zeros((2, 40_000), dtype=jnp.int32)
        with pytest.raises(EplbError, match="jax_enable_x64"):
            jax.eval_shape(lambda x: plan_moves(x, x, topology), old)


def test_what_is_of_the_right_type_is_not_formatted():
    class Costly:
        def __repr__(self):
            raise AssertionError("formatted")

    check_kind(Costly(), Costly, "f(x=...)")
    with pytest.raises(EplbError, match=r"`f\(x=...\)` must be of type str or int"):
        check_kind(Costly(), (str, int), "f(x=...)")
