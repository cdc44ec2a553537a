"""Real MoE families on real processes: the unmodified model is the oracle."""

import copy
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import EMPTY, EplbError, Topology, plan_moves, round_robin
from eplb_torch.execute import rearrange
from eplb_torch.integrations.huggingface import expert_parallel
from eplb_torch.transport import ProcessGroupTransport
from tests.multiprocess import run_ranks
from tests.tiny_moe import FAMILIES, tiny_model

TOLERANCE = 1e-4
NUM_LOGICAL = {"qwen3_moe": 8, "olmoe": 10, "mixtral": 6, "deepseek_v3": 12, "gpt_oss": 8}


def topology_for(family, world_size, spare_per_rank=2):
    return Topology(world_size, -(-NUM_LOGICAL[family] // world_size) + spare_per_rank)


def random_placement(rng, num_layers, num_logical, topology):
    """Every expert once, and anything, `EMPTY` included, in the slots that remain."""
    rest = rng.integers(EMPTY, num_logical, (num_layers, topology.num_slots - num_logical))
    first = np.tile(np.arange(num_logical), (num_layers, 1))
    return rng.permuted(np.concatenate([first, rest], axis=1), axis=1).astype(np.int32)


def prompt(rank, seed=0):
    """Other tokens, and another number of them, on every rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(0, 61, (1 + rank % 2, 3 + 4 * rank), generator=generator)


def move_and_commit(experts, new):
    plan = plan_moves(experts.placement, new, experts.topology)
    rearrange(experts.weights, plan, experts.topology, ProcessGroupTransport(), timeout=20)
    experts.commit(new)


def routed_tokens(model, names, ids):
    """Logits of an unmodified model, and how often its routers chose each expert: `[layers, logical]`."""
    counts, handles = [], []
    for name in names:
        module = model.get_submodule(name)

        def count(module, args):
            counts.append(torch.bincount(args[1].flatten(), minlength=module.num_experts))

        handles.append(module.register_forward_pre_hook(count))
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack(counts)


@torch.no_grad()
def follow_rearrangements(rank, family, topology, implementation):
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    reference, rng = copy.deepcopy(model), np.random.default_rng(7)
    experts = expert_parallel(model, topology)
    stacked = [model.get_submodule(name) for name in experts.layer_names]
    assert all(len(p) == topology.slots_per_rank for module in stacked for p in module.parameters())
    errors, tokens = [], 0
    for step in range(3):
        expected, counts = routed_tokens(reference, experts.layer_names, prompt(rank, step))
        errors.append((model(prompt(rank, step)).logits - expected).abs().max().item())
        tokens += counts
        assert torch.equal(experts.load(), tokens)
        new = random_placement(rng, len(stacked), experts.num_logical, topology)
        move_and_commit(experts, new)
        assert np.array_equal(experts.placement, new)
    before = model(prompt(rank)).logits
    experts.commit(experts.placement[:, ::-1])
    return max(errors), (model(prompt(rank)).logits - before).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("world_size", "implementation"), [(2, "eager"), (4, "grouped_mm")])
def test_logits_stay_those_of_the_unmodified_model(family, world_size, implementation):
    topology = topology_for(family, world_size)
    for error, change in run_ranks(follow_rearrangements, world_size, family, topology, implementation):
        assert error < TOLERANCE
        # The comparison can tell: routing to slots that hold other experts shows.
        assert change > 100 * TOLERANCE


@torch.no_grad()
def live_storages(rank):
    model = tiny_model("gpt_oss")
    experts = expert_parallel(model, Topology(2, 5))
    for name, layer in zip(experts.layer_names, experts.weights.layers, strict=True):
        module = model.get_submodule(name)
        assert set(layer) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
        for key, tensor in layer.items():
            assert tensor.data_ptr() == getattr(module, key).data_ptr()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    addresses = [tensor.data_ptr() for tensor in experts.maps.layer(1)]
    slots = np.asarray([7, 6, 5, 4, 3, 2, 1, 0, 0, 1], dtype=np.int32)
    placement = experts.placement
    placement[1] = slots
    plan = plan_moves(experts.placement, placement, experts.topology)
    reference = tiny_model("gpt_oss")(prompt(rank)).logits
    rearrange(experts.weights, plan, experts.topology, ProcessGroupTransport(), timeout=20)
    experts.commit(slots, layer=1)
    assert np.array_equal(experts.placement, placement)
    assert [tensor.data_ptr() for tensor in experts.maps.layer(1)] == addresses
    return (model(prompt(rank)).logits - reference).abs().max().item()


def test_weights_are_the_storages_of_the_model_and_one_layer_can_switch_alone():
    assert max(run_ranks(live_storages, 2)) < TOLERANCE


@torch.no_grad()
def idle_ranks(rank, family, topology):
    model = tiny_model(family)
    expected = model(prompt(rank)).logits
    experts = expert_parallel(model, topology)
    errors = []
    for busy in range(topology.ep_size):
        if rank == busy:
            errors.append((model(prompt(rank)).logits - expected).abs().max().item())
        else:
            with experts.idle():
                model(torch.zeros(1, 1, dtype=torch.int64))
    tokens = prompt(rank).numel() * model.config.num_experts_per_tok
    assert experts.load().sum(1).tolist() == [tokens] * len(experts.layer_names)
    experts.reset_load()
    assert not experts.load().any()
    return max(errors)


def test_idle_ranks_serve_the_others_and_count_nothing():
    family = "qwen3_moe"
    assert max(run_ranks(idle_ranks, 4, family, topology_for(family, 4))) < TOLERANCE


@torch.no_grad()
def take_after_every_token(rank):
    model = tiny_model("mixtral")
    module = model.get_submodule("model.layers.0.mlp.experts")
    rows = []
    module.act_fn.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    experts = expert_parallel(model, Topology(2, 4), np.tile([0, 1, 2, 3, 0, 1, 4, 5], (3, 1)))
    tokens = 1 - rank
    hidden, ids, weights = torch.ones(tokens, 32), torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    taken, addresses = [], set()
    for _ in range(6):
        module(hidden, ids, weights)
        load = experts.take_load()
        addresses.add(load.data_ptr())
        taken.append(int(load.sum()))
    assert len(addresses) == 1
    assert int(experts.load().sum()) == sum(taken)
    experts.reset_load()
    assert not experts.take_load().any()
    return taken, sum(rows)


def test_load_is_taken_step_by_step_while_copies_go_on_taking_turns():
    assert run_ranks(take_after_every_token, 2) == [([1] * 6, 3), ([0] * 6, 3)]


@torch.no_grad()
def empty_batches(rank):
    model = tiny_model("mixtral")
    module = model.get_submodule("model.layers.0.mlp.experts")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    ids, weights = torch.tensor([[2, 0]] * 5), torch.rand(5, 2)
    expected = module(hidden, ids, weights)
    # All tokens go to slots of rank 0, so rank 1 receives nothing, and only rank 1 sends.
    expert_parallel(model, Topology(2, 4), np.tile([0, 1, 2, 3, 4, 5, EMPTY, EMPTY], (3, 1)))
    tokens = 5 * rank
    output = module(hidden[:tokens], ids[:tokens], weights[:tokens])
    assert output.shape == (tokens, 32)
    padded = module(hidden, torch.where(torch.tensor([[True, False]]), ids, EMPTY), weights)
    alone = module(hidden, ids, weights * torch.tensor([[1.0, 0.0]]))
    return (output - expected[:tokens]).abs().sum().item() + (padded - alone).abs().sum().item()


def test_ranks_may_have_no_tokens_and_may_receive_none():
    assert max(run_ranks(empty_batches, 2)) < TOLERANCE


@torch.no_grad()
def generate(rank):
    model: Any = tiny_model("olmoe", use_cache=True)
    ids = prompt(rank)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    expert_parallel(model, topology_for("olmoe", 2))
    return torch.equal(model.generate(ids, **options), expected)


def test_greedy_generation_is_the_same():
    assert all(run_ranks(generate, 2))


@torch.no_grad()
def bfloat16_model(rank):
    model = tiny_model("mixtral", intermediate_size=32).bfloat16()
    expected = model(prompt(rank)).logits.float()
    experts = expert_parallel(model, topology_for("mixtral", 2))
    move_and_commit(experts, random_placement(np.random.default_rng(1), 3, 6, experts.topology))
    return (model(prompt(rank)).logits.float() - expected).abs().max().item()


def test_bfloat16_models_stay_within_their_rounding():
    assert max(run_ranks(bfloat16_model, 2)) < 0.1


@torch.no_grad()
def read_from_slices(rank):
    whole = tiny_model("qwen3_moe")
    expected, checkpoint = whole(prompt(rank)).logits, whole.state_dict()
    model, reads = copy.deepcopy(whole), []
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.to_empty(device="meta")

    def read_expert(name, expert):
        reads.append((name, expert))
        return checkpoint[name][expert]

    groups: Any = [dist.new_group([first, first + 2]) for first in (0, 1)]
    experts = expert_parallel(model, Topology(2, 5), group=groups[rank % 2], read_expert=read_expert)
    assert len(reads) == 2 * 2 * 5
    assert {name for name, _ in reads} == {name for name in checkpoint if ".experts." in name}
    assert not any(tensor.is_meta for layer in experts.weights.layers for tensor in layer.values())
    return (model(prompt(rank)).logits - expected).abs().max().item()


def test_groups_of_ranks_that_read_only_their_slices_keep_to_themselves():
    assert max(run_ranks(read_from_slices, 4)) < TOLERANCE


def disagree(rank):
    topology, placement = Topology(2, 5), round_robin(2, 8, Topology(2, 5))
    if rank == 1:
        placement[0, [0, 1]] = placement[0, [1, 0]]
    with pytest.raises(EplbError, match=r"ranks {'physical_to_logical': \[1\]}"):
        expert_parallel(tiny_model("qwen3_moe"), topology, placement)
    with pytest.raises(EplbError, match="ep_size=4, group size=2"):
        expert_parallel(tiny_model("qwen3_moe"), Topology(4, 3))
    model = tiny_model("qwen3_moe")
    experts = expert_parallel(model, topology)
    with pytest.raises(EplbError, match="without gradients"):
        model(prompt(rank))
    with pytest.raises(EplbError, match="no copy"):
        experts.commit(np.zeros((2, 10), dtype=np.int32))
    with pytest.raises(EplbError, match="replaced already"):
        expert_parallel(model, topology)
    assert np.array_equal(experts.placement, round_robin(2, 8, topology))


def test_what_cannot_work_is_refused_on_every_rank():
    run_ranks(disagree, 2)


def stay_away(rank):
    model = tiny_model("olmoe")
    group: Any = dist.new_group(timeout=timedelta(seconds=2))
    expert_parallel(model, topology_for("olmoe", 2), group=group)
    if rank == 0:
        with torch.no_grad(), pytest.raises(RuntimeError, match="(?i)timed out"):
            model(prompt(rank))
    dist.barrier()


def test_a_rank_that_stays_away_ends_in_an_error_not_in_a_hang():
    run_ranks(stay_away, 2)
