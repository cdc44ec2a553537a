"""vLLM's own counting, moving and committing on real processes, with our policies."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import peers
from eplb_core import Topology, derive_maps, moved_experts, round_robin
from eplb_torch.integrations import vllm as plug
from tests.engines import fetched, same_weights, skewed, tensors, vllm_model, vllm_on_gloo, weights_of
from tests.multiprocess import run_ranks


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.vllm_policy)


LOADS = [skewed(3, 12, seed) for seed in range(4)]
TOPOLOGY = Topology(4, 4, 2)


def serve(rank, options):
    """Real steps of vLLM's `EplbState`: count, plan with our policy, move, commit. Returns what was in force."""
    seen = []
    with vllm_on_gloo(num_nodes=2) as eplb_state, plug.register(**options):
        start = round_robin(3, 12, TOPOLOGY)
        weights = weights_of(start, TOPOLOGY, rank)
        model = vllm_model(3, 12, 2, TOPOLOGY, weights)
        config = SimpleNamespace(window_size=1, step_interval=1, policy="default", communicator="torch_nccl")
        parallel = SimpleNamespace(
            eplb_config=SimpleNamespace(**vars(config), use_async=False), enable_elastic_ep=False, num_ubatches=0
        )
        state = eplb_state.EplbState(parallel, torch.device("cpu"))
        state.add_model(model, SimpleNamespace(model="tiny", compute_hash=lambda: "tiny"))
        live = state.model_states["tiny"]
        state.step(is_profile=True)
        assert live.physical_to_logical_map.numpy().tolist() == start.tolist()
        for load in LOADS:
            slots = live.logical_to_physical_map[:, :, 0]  # all tokens of an expert go to its first copy
            mine = torch.from_numpy(load // 4 + (rank < load % 4)).to(torch.int32)
            live.expert_load_pass.scatter_(1, slots, mine)
            state.step()
            placed = live.physical_to_logical_map.clone().numpy()
            assert same_weights(weights, weights_of(placed, TOPOLOGY, rank))
            maps = derive_maps(placed, 12)
            width = maps.logical_to_physical.shape[2]
            np.testing.assert_array_equal(live.logical_to_physical_map[:, :, :width].numpy(), maps.logical_to_physical)
            assert (live.logical_to_physical_map[:, :, width:] == -1).all()
            np.testing.assert_array_equal(live.logical_replica_count.numpy(), maps.replica_count)
            seen.append(placed)
    return np.stack(seen)


@pytest.mark.parametrize("options", [{}, {"policy": "refined"}, {"max_moves": 1}], ids=str)
def test_vllms_state_serves_with_our_policy(options):
    """Four ranks, four rebalances in a row: weights, maps and plan agree everywhere after each."""
    ranks = run_ranks(serve, 4, options)
    held = round_robin(3, 12, TOPOLOGY)
    policy = plug.make_policy(**options)
    for step, load in enumerate(LOADS):
        held = policy.rebalance_experts(*tensors(load), 16, 2, 2, 4, *tensors(held)).numpy()
        for placed in ranks:
            np.testing.assert_array_equal(placed[step], held)
    assert (ranks[0][-1] != round_robin(3, 12, TOPOLOGY)).any()


def move(rank, cases, rank_mapping):
    """vLLM's `rearrange_expert_weights_inplace` over its communicator, for one plan after the other."""
    with vllm_on_gloo() as eplb_state:
        communicators = importlib.import_module("vllm.distributed.eplb.eplb_communicator")
        group = SimpleNamespace(cpu_group=dist.group.WORLD, device_group=dist.group.WORLD)
        old, topology = cases[0]
        weights = weights_of(old, topology, rank)
        buffer = [torch.empty_like(tensor) for tensor in weights[0]]
        communicator = communicators.create_eplb_communicator(group, "torch_nccl", weights, buffer)
        for new, _ in cases[1:]:
            eplb_state.rearrange_expert_weights_inplace(
                *tensors(old, new), weights, buffer, dist.group.WORLD, communicator, rank_mapping=rank_mapping
            )
            old = new
        return weights


def test_vllms_transfers_carry_out_our_plans():
    topology, held = Topology(3, 5), round_robin(2, 12, Topology(3, 5))
    cases = [(held, topology)]
    for load in [skewed(2, 12, seed) for seed in range(3)]:
        new = plug.make_policy("refined").rebalance_experts(*tensors(load), 15, 1, 1, 3, *tensors(cases[-1][0]))
        cases.append((new.numpy(), topology))
    assert all((a[0] != b[0]).any() for a, b in zip(cases, cases[1:], strict=False))
    for rank, weights in enumerate(run_ranks(move, 3, cases, None)):
        assert same_weights(weights, weights_of(cases[-1][0], topology, rank))


def test_vllms_transfers_carry_out_our_plans_when_it_scales_down():
    """The last of four ranks leaves. The plan is for three, from the placement of four."""
    topology, old = Topology(4, 5), round_robin(2, 12, Topology(4, 5))
    new = plug.make_policy().rebalance_experts(*tensors(skewed(2, 12)), 15, 1, 1, 3, *tensors(old)).numpy()
    mapping = {0: 0, 1: 1, 2: 2, 3: -1}
    moved = run_ranks(move, 4, [(old, topology), (new, topology)], mapping)
    for rank in range(3):
        assert same_weights(moved[rank], weights_of(new, Topology(3, 5), rank))


def test_vllms_transfers_carry_out_our_plans_when_it_scales_up():
    """The fourth rank joins: its slots are -1 in the placement in force, and its weights are whatever they are."""
    old, new_topology = round_robin(2, 12, Topology(3, 5)), Topology(4, 5)
    grown = np.pad(old, ((0, 0), (0, 5)), constant_values=-1)
    new = plug.make_policy().rebalance_experts(*tensors(skewed(2, 12)), 20, 1, 1, 4, *tensors(grown)).numpy()
    for rank, weights in enumerate(run_ranks(move, 4, [(grown, new_topology), (new, new_topology)], None)):
        assert same_weights(weights, weights_of(new, new_topology, rank))


def transfer(rank, old, new, topology, batching):
    """vLLM's `transfer_layer` and `move_from_buffer`, the steps of its asynchronous worker, layer by layer."""
    with vllm_on_gloo():
        execute = importlib.import_module("vllm.distributed.eplb.rebalance_execute")
        communicators = importlib.import_module("vllm.distributed.eplb.eplb_communicator")
        weights = weights_of(old, topology, rank)
        buffer = [torch.empty_like(tensor) for tensor in weights[0]]
        communicator = communicators.TorchDistNcclEplbCommunicator(dist.group.WORLD)
        for layer, (before, after) in enumerate(zip(*tensors(old, new), strict=True)):
            metadata = execute.transfer_layer(
                before,
                after,
                weights[layer],
                buffer,
                dist.group.WORLD,
                communicator,
                layer_idx=layer,
                enable_migration_batching=batching,
            )
            execute.move_from_buffer(weights[layer], buffer, metadata, after.numpy(), rank)
        return weights


@pytest.mark.parametrize("batching", [False, True])
def test_the_steps_of_vllms_asynchronous_worker_carry_out_our_plans(batching):
    topology, old = Topology(4, 4), round_robin(3, 12, Topology(4, 4))
    new = plug.make_policy("refined").rebalance_experts(*tensors(LOADS[0]), 16, 1, 1, 4, *tensors(old)).numpy()
    assert moved_experts(old, new, topology).min() > 2
    for rank, weights in enumerate(run_ranks(transfer, 4, old, new, topology, batching)):
        assert same_weights(weights, weights_of(new, topology, rank))
