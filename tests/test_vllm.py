"""Our policies through vLLM's policy interface, against its released modules."""

import importlib
import inspect

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.traces import drift
from eplb_core import EplbError, Topology, balancedness, derive_maps, moved_experts, rebalance, round_robin
from eplb_torch.integrations import vllm as plug
from tests.engines import fetched, skewed, tensors


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.vllm_policy)


def test_the_interface_is_that_of_vllms_abstract_policy():
    with peers.vllm_installed():
        registry = importlib.import_module("vllm.distributed.eplb.policy")
        theirs = registry.AbstractEplbPolicy
        with plug.register():
            ours = registry.EPLB_POLICIES["default"]
    assert issubclass(ours, theirs)
    assert not inspect.isabstract(ours)
    ours, theirs = (inspect.signature(policy.rebalance_experts).parameters for policy in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old_dtype", [torch.int32, torch.int64, None])
def test_results_are_int64_tensors_on_the_cpu(dtype, old_dtype):
    load = torch.tensor([[90, 10, 12, 14], [1, 2, 64, 8]], dtype=dtype)
    old = None if old_dtype is None else torch.tensor([[0, 1, 2, 3, 1, 2]] * 2, dtype=old_dtype)
    new = plug.make_policy().rebalance_experts(load, 6, 1, 1, 2, old)
    assert new.dtype == torch.int64
    assert new.device.type == "cpu"
    assert new.shape == (2, 6)
    assert new.is_contiguous()
    assert all(set(row) == {0, 1, 2, 3} for row in new.tolist())


@pytest.mark.parametrize("policy", ["greedy", "refined", "incremental"])
@pytest.mark.parametrize(
    "sizes", [(3, 16, 24, 4, 2, 4), (2, 16, 18, 6, 3, 4), (2, 12, 16, 8, 2, 3), (4, 10, 12, 6, 1, 1)]
)
def test_a_plan_is_that_of_rebalance_for_the_same_numbers(policy, sizes):
    num_layers, num_logical, num_slots, num_ranks, num_nodes, num_groups = sizes
    topology = Topology(num_ranks, num_slots // num_ranks, num_nodes)
    load, old = skewed(num_layers, num_logical), round_robin(num_layers, num_logical, topology)
    new = plug.make_policy(policy).rebalance_experts(
        *tensors(load), num_slots, num_groups, num_nodes, num_ranks, *tensors(old)
    )
    expected = rebalance(load, topology, policy=policy, num_groups=num_groups, previous=old)
    np.testing.assert_array_equal(new.numpy(), expected)


@pytest.mark.parametrize("absent", [0, 2])
def test_greedy_gives_the_result_of_vllms_default_policy(absent):
    theirs, ours = peers.vllm_policy(), plug.make_policy("greedy")
    rng = np.random.default_rng(3)
    for seed in range(40):
        num_nodes = int(rng.choice([1, 2, 4]))
        num_ranks = num_nodes * int(rng.integers(1, 4)) + absent
        nodes = num_nodes if num_ranks % num_nodes == 0 else 1  # vLLM does this before it calls the policy
        num_logical = 16 * int(rng.integers(1, 3))
        slots_per_rank = -(-num_logical // num_ranks) + int(rng.integers(0, 3))
        load, old = tensors(
            skewed(2, num_logical, seed), round_robin(2, num_logical, Topology(num_ranks, slots_per_rank, nodes))
        )
        old[:, old.shape[1] - absent * slots_per_rank :] = -1
        arguments = (num_ranks * slots_per_rank, 8, nodes, num_ranks)
        assert torch.equal(
            ours.rebalance_experts(load, *arguments, old), theirs.rebalance_experts(load, *arguments, old)
        ), f"{seed=}"


def test_counts_above_24_bits_are_not_rounded():
    """Experts 0 and 1 differ by one token in 2^25, which float32 cannot tell apart; expert 1 is the hotter one."""
    load = torch.tensor([[2**25, 2**25 + 1, 7]])
    ours = plug.make_policy("greedy").rebalance_experts(load, 4, 1, 1, 2, None)
    theirs = peers.vllm_policy().rebalance_experts(load, 4, 1, 1, 2, None)
    assert (ours == 1).sum() == 2
    assert (theirs == 1).sum() == 1


@pytest.mark.parametrize("policy", ["refined", "incremental"])
def test_vllms_own_slot_preservation_finds_nothing_to_improve(policy):
    preserve = peers.vllm_policy().preserve_intragpu_slots
    topology = Topology(4, 5, 2)
    held = round_robin(3, 16, topology)
    for seed in range(20):
        new = plug.make_policy(policy).rebalance_experts(*tensors(skewed(3, 16, seed)), 20, 4, 2, 4, *tensors(held))
        np.testing.assert_array_equal(preserve(new.numpy(), 4, held), new.numpy())
        held = new.numpy()


def test_vllms_maps_of_our_plans_are_ours():
    compute = peers.vllm_compute_logical_maps()
    load, old = tensors(skewed(3, 12), round_robin(3, 12, Topology(4, 4)))
    new = plug.make_policy().rebalance_experts(load, 16, 1, 1, 4, old)
    slots, count = compute(new, 12)
    maps = derive_maps(new.numpy(), 12)
    np.testing.assert_array_equal(maps.logical_to_physical, slots.numpy())
    np.testing.assert_array_equal(maps.replica_count, count.numpy())


def test_a_load_of_zeros_moves_nothing():
    """vLLM plans for one when it profiles its memory, before any token was counted."""
    old = torch.from_numpy(round_robin(2, 10, Topology(3, 4))).long()
    new = plug.make_policy().rebalance_experts(torch.zeros(2, 10, dtype=torch.int64), 12, 1, 1, 3, old)
    assert torch.equal(new, old)


def test_nodes_that_do_not_divide_the_ranks_are_ignored():
    load, old = tensors(skewed(2, 12), round_robin(2, 12, Topology(3, 5)))
    policy = plug.make_policy()
    assert torch.equal(
        policy.rebalance_experts(load, 15, 4, 2, 3, old), policy.rebalance_experts(load, 15, 1, 1, 3, old)
    )


def test_slots_that_do_not_split_over_the_ranks_are_refused_with_the_number_that_does():
    load = torch.ones(1, 10, dtype=torch.int64)
    with pytest.raises(EplbError, match=r"num_redundant=3.*Use num_redundant=5"):
        plug.make_policy().rebalance_experts(load, 13, 1, 1, 5)


def test_another_number_of_slots_per_rank_is_refused():
    load, old = torch.ones(1, 4, dtype=torch.int64), torch.arange(8)[None] % 4
    with pytest.raises(EplbError, match="as many slots per rank"):
        plug.make_policy().rebalance_experts(load, 6, 1, 1, 2, old)


def test_there_are_no_empty_slots():
    """More slots than there are useful copies: vLLM's ROCm gate and our own planner would stumble over -1."""
    load = torch.tensor([[50, 30, 20]])
    for old in (None, torch.tensor([[0, 1, 2, -1, -1, -1, 2, 1, 0, -1, -1, -1]])):
        for policy in ("refined", "incremental"):
            new = plug.make_policy(policy).rebalance_experts(load, 12, 1, 1, 2, old)
            assert (new >= 0).all()
            assert balancedness(new.numpy(), load.numpy(), Topology(2, 6)) == pytest.approx(1)


def moves(old, new, topology):
    """Experts that the ranks of the new placement must receive, in all layers."""
    return moved_experts(old[:, : topology.num_slots].numpy(), new.numpy(), topology).sum()


def test_what_fills_a_slot_lies_where_it_lay():
    """Rank 0 gets expert 0; its third slot has no use, and is left to expert 1, in a slot that held it before."""
    load, old = torch.tensor([[5, 4]]), torch.tensor([[1, 1, 1, 0, 0, 1]])
    new = plug.make_policy("refined").rebalance_experts(load, 6, 1, 1, 2, old)
    assert new[0, :3].tolist() == [1, 1, 0]


def test_ranks_that_join_are_filled_with_fewer_moves_than_vllm_makes():
    topology = Topology(6, 5)
    load, old = tensors(skewed(4, 16), round_robin(4, 16, Topology(4, 5)))
    policy = plug.make_policy()
    held = policy.rebalance_experts(load, 20, 1, 1, 4, old)
    grown = torch.nn.functional.pad(held, (0, 10), value=-1)
    new, default = (p.rebalance_experts(load, 30, 1, 1, 6, grown) for p in (policy, peers.vllm_policy()))
    assert (new >= 0).all()
    assert 4 * 10 <= moves(grown, new, topology) < 0.7 * moves(grown, default, topology)
    assert (balancedness(new.numpy(), load.numpy(), topology) > 0.95).all()
    assert torch.equal(policy.rebalance_experts(load, 30, 1, 1, 6, held), new), "absent columns count as empty slots"


def test_when_vllm_scales_down_what_fits_is_kept():
    topology = Topology(5, 6)
    load, old = tensors(skewed(4, 24), round_robin(4, 24, Topology(6, 6)))
    policy = plug.make_policy()
    held = policy.rebalance_experts(load, 36, 1, 1, 6, old)
    new, default = (p.rebalance_experts(load, 30, 1, 1, 5, held) for p in (policy, peers.vllm_policy()))
    assert new.shape == (4, 30)
    assert all(set(row) == set(range(24)) for row in new.tolist())
    assert moves(held, new, topology) < 0.6 * moves(held, default, topology)


def test_options_reach_the_policy():
    load, old = tensors(skewed(3, 24), round_robin(3, 24, Topology(8, 4)))
    unlimited = plug.make_policy().rebalance_experts(load, 32, 1, 1, 8, old)
    limited = plug.make_policy(max_moves=2).rebalance_experts(load, 32, 1, 1, 8, old)
    assert moved_experts(old.numpy(), unlimited.numpy(), Topology(8, 4)).min() > 2
    assert moved_experts(old.numpy(), limited.numpy(), Topology(8, 4)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy='best'"),
        ({"max_move": 3}, r"takes the options policy, hierarchy, .*got \['max_move'\]"),
        ({"risk": 1.0}, "got .*risk"),
        ({"tolerance": -1.0}, "tolerance=-1"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(EplbError, match=message):
        plug.make_policy(**options)
    with peers.vllm_installed(), pytest.raises(EplbError, match=message):
        plug.register(**options)


def test_on_a_drift_vllm_sends_an_order_less():
    """Messages counted by vLLM's own transfer planning, per rank, over six rebalances."""
    loads, topology = drift(4, 64, 7, drift=0.1), Topology(16, 6)
    sent = {}
    for policy in (plug.make_policy(), peers.vllm_policy()):
        held, sent[policy] = torch.from_numpy(round_robin(4, 64, topology)).long(), 0
        for window, load in enumerate(tensors(*loads)):
            new = policy.rebalance_experts(load, 96, 1, 1, 16, held)
            if window:  # the first one corrects the start, for both
                sent[policy] += sum(
                    len(peers.vllm_plan_rank(held[layer].numpy(), new[layer].numpy(), 6, rank).sends)
                    for layer in range(4)
                    for rank in range(16)
                )
            held = new
    ours, theirs = sent.values()
    assert 0 < ours * 5 < theirs, sent
