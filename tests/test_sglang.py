"""Our policies through SGLang's planner interface, against its released planner, metadata and elastic state."""

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.traces import drift
from eplb_core import EMPTY, EplbError, Topology, balancedness, derive_maps, moved_experts, rebalance, round_robin
from eplb_torch.integrations import sglang as plug
from tests.engines import SGLang, fetched, recorded


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.sglang_deepseek)


def algorithm(name):
    return SimpleNamespace(name=name)


def planner(previous=None, alive=None, **options):
    """Ours, with a given placement in force instead of SGLang's."""
    held = None if previous is None else torch.as_tensor(previous)
    return plug.make_planner(placement=lambda: held, ranks=lambda n: np.asarray(alive, dtype=bool), **options)


def test_the_signature_is_that_of_sglangs_function():
    with peers.sglang_installed():
        theirs = importlib.import_module("sglang.srt.eplb.eplb_algorithms").rebalance_experts
    assert list(inspect.signature(plug.make_planner()).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_results_have_the_types_and_shapes_of_sglangs(dtype):
    with SGLang(3, 10, Topology(3, 4)) as engine:
        load = recorded(3, 10).to(dtype)
        theirs = engine.algorithms.rebalance_experts(load, 12, 4, None, 1, engine.algorithms.EplbAlgorithm.deepseek)
        ours = planner(policy="greedy")(load, 12, 4, None, 1, engine.algorithms.EplbAlgorithm.deepseek)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype == torch.int64
        assert mine.shape == other.shape
        assert mine.device == other.device


@pytest.mark.parametrize(
    ("name", "alive"),
    [
        ("deepseek", [1, 1, 1, 1]),
        ("deepseek_hierarchical", [1, 1, 1, 1]),
        ("elasticity_aware", [1, 1, 1, 1]),
        ("elasticity_aware_hierarchical", [1, 1, 1, 1]),
        ("elasticity_aware", [1, 0, 1, 1]),
        ("elasticity_aware_hierarchical", [1, 0, 1, 0]),
    ],
)
def test_greedy_gives_the_results_of_sglangs_own_algorithms(name, alive):
    """Placement and counts are equal; an expert's slots are the same in another order."""
    with SGLang(3, 12, Topology(4, 7, 2), alive=alive) as engine:
        for seed in range(10):
            arguments = (recorded(3, 12, seed), 28, 7, 4, 2, engine.algorithms.EplbAlgorithm[name])
            theirs = engine.algorithms.rebalance_experts(*arguments)
            ours = planner(policy="greedy", alive=alive)(*arguments)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1].sort(dim=2).values, theirs[1].sort(dim=2).values)
            assert torch.equal(ours[2], theirs[2])


def test_a_plan_keeps_what_is_in_place():
    topology, load = Topology(4, 4, 2), recorded(3, 12)
    held = round_robin(3, 12, topology)
    placed, to_slots, count = planner(held)(load, 16, 4, None, 2, algorithm("deepseek"))
    np.testing.assert_array_equal(placed, rebalance(load.sum(0).numpy(), topology, previous=held, hierarchy="global"))
    maps = derive_maps(placed.numpy(), 12)
    np.testing.assert_array_equal(to_slots, maps.logical_to_physical)
    np.testing.assert_array_equal(count, maps.replica_count)


def test_without_a_placement_it_plans_afresh():
    placed, _, _ = planner()(recorded(2, 12), 16, 4, None, 1, algorithm("deepseek"))
    expected = rebalance(recorded(2, 12).sum(0).numpy(), Topology(4, 4), policy="refined")
    np.testing.assert_array_equal(placed, expected)


def test_one_recorded_load_needs_no_steps():
    load = recorded(2, 12)
    one, other = (planner()(x, 16, 4, None, 1, algorithm("deepseek"))[0] for x in (load, load.sum(0)))
    assert torch.equal(one, other)


def test_steps_of_int32_do_not_overflow():
    """SGLang records int32; four steps of 2^30 tokens would wrap to zero."""
    load = torch.full((4, 1, 4), 2**20, dtype=torch.int32)
    load[:, 0, 3] = 2**30
    _, _, count = planner()(load, 6, 3, None, 1, algorithm("deepseek"))
    assert count[0, 3] == 2


def test_groups_stay_on_nodes_where_the_algorithm_says_so():
    def nodes_per_group(name):
        placed, _, _ = planner()(recorded(2, 12), 16, 4, 4, 2, algorithm(name))
        return [
            len({slot // 8 for slot in range(16) if row[slot] // 3 == group}) for row in placed for group in range(4)
        ]

    assert set(nodes_per_group("deepseek_hierarchical")) == {1}
    assert set(nodes_per_group("deepseek_vec_hierarchical")) == {1}
    assert 2 in nodes_per_group("deepseek")


def test_groups_that_cannot_stay_on_nodes_are_refused():
    with pytest.raises(EplbError, match="num_groups=3, num_nodes=2"):
        planner()(recorded(2, 12), 16, 4, 3, 2, algorithm("deepseek_hierarchical"))


def test_slots_that_do_not_split_over_the_ranks_are_refused():
    with pytest.raises(EplbError, match=r"num_physical_experts=14, num_local_physical_experts=4\. .* by 2"):
        planner()(recorded(2, 12), 14, 4, None, 1, algorithm("deepseek"))


def test_risk_looks_at_the_steps():
    steady = np.asarray([[[40, 40, 20, 21, 22, 23]], [[40, 0, 20, 21, 22, 23]], [[0, 80, 20, 21, 22, 23]]])
    load = torch.from_numpy(steady)
    placed, _, _ = planner(risk=2.0)(load, 8, 4, None, 1, algorithm("deepseek"))
    expected = rebalance(steady, Topology(2, 4), risk=2.0, hierarchy="global")
    np.testing.assert_array_equal(placed, expected)
    assert not torch.equal(placed, planner()(load, 8, 4, None, 1, algorithm("deepseek"))[0])


def test_there_are_no_empty_slots():
    """SGLang would index its experts with -1."""
    load = torch.tensor([[[50, 30, 20]]])
    placed, to_slots, count = planner()(load, 12, 6, None, 1, algorithm("deepseek"))
    assert (placed >= 0).all()
    assert count.sum() == 12
    assert (to_slots >= 0).sum() == 12


def test_a_slot_without_use_takes_the_coldest_expert_of_all_steps():
    """Both ranks hold every expert, so a further copy of the coldest one disturbs the balance least."""
    load = torch.tensor([[[0, 30, 20]], [[50, 0, 20]], [[0, 60, 0]]])
    for options in ({}, {"risk": 1.0}):
        _, _, count = planner(**options)(load, 8, 4, None, 1, algorithm("deepseek"))
        assert count.tolist() == [[2, 2, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy='best'"),
        ({"hierarchy": "global"}, r"got \['hierarchy'\]"),
        ({"risk": -1.0}, "risk=-1"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(EplbError, match=message):
        plug.make_planner(**options)


def test_dead_ranks_hold_nothing_and_the_living_keep_what_they_have():
    topology, alive = Topology(4, 6), [1, 0, 1, 1]
    load, held = recorded(3, 12), rebalance(recorded(3, 12).sum(0).numpy(), topology)
    placed, to_slots, count = planner(held, alive)(load, 24, 6, 4, 2, algorithm("elasticity_aware_hierarchical"))
    slots = np.repeat(np.asarray(alive, dtype=bool), 6)
    assert (placed[:, ~slots] == 0).all()
    live = np.where(slots, placed, EMPTY)
    maps = derive_maps(live, 12)
    np.testing.assert_array_equal(to_slots, maps.logical_to_physical)
    np.testing.assert_array_equal(count, maps.replica_count)
    assert (count >= 1).all()
    changed = moved_experts(held[:, slots], placed.numpy()[:, slots], Topology(3, 6))
    afresh = planner(None, alive)(load, 24, 6, 4, 2, algorithm("elasticity_aware"))[0].numpy()
    assert changed.sum() < moved_experts(held[:, slots], afresh[:, slots], Topology(3, 6)).sum() / 2
    assert (balancedness(placed.numpy()[:, slots], load.sum(0).numpy(), Topology(3, 6)) > 0.9).all()


def test_other_algorithms_do_not_ask_who_is_alive():
    def fail(num_ranks):
        raise AssertionError("asked")

    plug.make_planner(placement=lambda: None, ranks=fail)(recorded(2, 12), 16, 4, None, 1, algorithm("deepseek"))


def test_too_few_live_slots_are_refused_with_what_to_change():
    with pytest.raises(EplbError, match=r"12 experts, 9 slots on ranks \[0, 2, 3\].*--ep-num-redundant-experts"):
        planner(None, [1, 0, 1, 1])(recorded(2, 12), 12, 3, None, 1, algorithm("elasticity_aware"))


@pytest.mark.parametrize(
    ("alive", "expected"), [(None, [1, 1, 1]), ([1, 0, 1], [1, 0, 1]), ([1, 1, 1, 0, 0], [1, 1, 1])]
)
def test_live_ranks_are_those_of_sglangs_elastic_state(alive, expected):
    """Entries beyond the ranks of the plan are reserved for ranks that may join."""
    with SGLang(1, 6, Topology(3, 2), alive=alive):
        assert plug.live_ranks(3).tolist() == [bool(x) for x in expected]


def test_an_elastic_state_of_fewer_ranks_is_refused():
    with SGLang(1, 6, Topology(3, 2), alive=[1, 1]), pytest.raises(EplbError, match="2 entries for 3 ranks"):
        plug.live_ranks(3)


def test_ranks_that_joined_count_as_empty_where_the_placement_does_not_know_them():
    """Three ranks were known, of which one has died; a fourth has joined."""
    held = round_robin(2, 12, Topology(3, 6))
    placed, _, _ = planner(held, [1, 0, 1, 1])(recorded(2, 12), 24, 6, None, 1, algorithm("elasticity_aware"))
    live = np.concatenate([held[:, :6], held[:, 12:], np.full((2, 6), EMPTY)], axis=1)
    expected = rebalance(recorded(2, 12).sum(0).numpy(), Topology(3, 6), previous=live)
    np.testing.assert_array_equal(placed[:, [*range(6), *range(12, 24)]], expected)


def test_ranks_beyond_those_of_the_plan_are_left_out():
    held = rebalance(recorded(2, 12).sum(0).numpy(), Topology(4, 5))
    placed, _, _ = planner(held)(recorded(2, 12), 15, 5, None, 1, algorithm("deepseek"))
    expected = rebalance(recorded(2, 12).sum(0).numpy(), Topology(3, 5), previous=held[:, :15])
    np.testing.assert_array_equal(placed, expected)


def test_sglangs_metadata_is_built_from_our_plan():
    topology, load = Topology(4, 4, 2), recorded(3, 12)
    with SGLang(3, 12, topology) as engine, plug.install():
        assert plug.live_placement() is None
        start = engine.start()
        assert torch.equal(plug.live_placement(), start.physical_to_logical_map)
        made = engine.location.ExpertLocationMetadata.init_by_eplb(engine.config, load)
    held = start.physical_to_logical_map.numpy()
    placed = rebalance(load.sum(0).numpy(), topology, previous=held, hierarchy="global")
    np.testing.assert_array_equal(made.physical_to_logical_map, placed)
    maps = derive_maps(placed, 12, max_replicas=16)
    np.testing.assert_array_equal(made.logical_to_all_physical_map, maps.logical_to_physical)
    np.testing.assert_array_equal(made.logical_to_all_physical_map_num_valid, maps.replica_count)
    assert made.ep_size == 4


def test_at_startup_sglang_plans_from_recorded_counts():
    """`--init-expert-location` with a recorded `logical_count`: there is no placement in force yet."""
    with SGLang(2, 12, Topology(4, 4)) as engine, plug.install():
        engine.moe.init_expert_location = (
            '{"logical_count": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 90], [9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1]]}'
        )
        made = engine.location.compute_initial_expert_location_metadata(engine.config, moe_ep_rank=0)
    assert made.logical_to_all_physical_map_num_valid[0, 11] == 4
    assert (made.logical_to_all_physical_map_num_valid >= 1).all()


def test_on_a_drift_an_order_less_is_moved():
    loads, topology = drift(4, 64, 7, drift=0.1), Topology(16, 6)
    moved = {}
    with SGLang(4, 64, topology) as engine:
        for plan in (engine.algorithms.rebalance_experts, None):
            held, moved[plan] = round_robin(4, 64, topology), 0
            for window, load in enumerate(torch.from_numpy(loads)):
                ours = planner(held)
                new = (plan or ours)(load[None], 96, 6, None, 1, engine.algorithms.EplbAlgorithm.deepseek)[0].numpy()
                moved[plan] += moved_experts(held, new, topology).sum() if window else 0
                held = new
    theirs, ours = moved.values()
    assert 0 < ours * 5 < theirs, moved
