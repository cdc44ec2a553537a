"""What counts as the experts of a model, and what is refused because part of an expert would be left behind."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from eplb_core import EMPTY, EplbError, Topology
from eplb_torch.integrations._experts import find_expert_layers, localise
from eplb_torch.integrations.huggingface import expert_parallel
from tests.tiny_moe import FAMILIES, tiny_model


class Experts(nn.Module):
    scale: torch.Tensor

    def __init__(self, num_experts=4):
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, 3, 2))
        self.register_buffer("scale", torch.randn(num_experts))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers: Any = nn.ModuleList(layers or (Experts(), nn.Linear(2, 2), Experts()))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_found_with_all_their_tensors(family):
    layers = find_expert_layers(tiny_model(family))
    biased = family == "gpt_oss"
    names = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if biased else set())
    assert len(layers) == {"mixtral": 3, "gpt_oss": 3}.get(family, 2)
    assert all(set(layer.tensors) == names for layer in layers)


def test_buffers_belong_to_experts_and_dense_layers_are_passed_over():
    layers = find_expert_layers(Model(Experts(), SharedExperts(2, 2), Experts()))
    assert [layer.name for layer in layers] == ["layers.0", "layers.2"]
    assert [layer.tensors for layer in layers] == [("up", "scale")] * 2


def test_localise_keeps_the_rows_of_the_slots_and_nothing_else():
    model = Model(Experts())
    up, scale, layer = model.layers[0].up.detach().clone(), model.layers[0].scale.clone(), find_expert_layers(model)[0]
    local = localise(layer, [3, EMPTY, 3, 0], None)
    assert torch.equal(local["up"][[0, 2, 3]], up[[3, 3, 0]])
    assert torch.equal(local["scale"], torch.stack([scale[3], torch.zeros(()), scale[3], scale[0]]))
    assert local["up"] is model.layers[0].up
    assert local["scale"] is model.layers[0].scale
    assert not local["up"].requires_grad
    assert model.layers[0].num_experts == 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.bfloat16])
def test_rows_of_any_dtype_are_copied_bit_for_bit(dtype):
    module: Any = Experts()
    module.register_buffer("packed", torch.arange(8, dtype=torch.uint8).reshape(4, 2).view(dtype).reshape(4, -1))
    before = module.packed.view(torch.uint8).clone()
    local = localise(find_expert_layers(Model(module))[0], [2, 1], None)
    assert torch.equal(local["packed"].view(torch.uint8), before[[2, 1]])


def test_rows_that_cannot_be_read_are_refused():
    layer = find_expert_layers(Model())[0]
    with pytest.raises(EplbError, match=r"must return \(3, 2\) torch.float32 for layers.0.up; got .*\(3,\)"):
        localise(layer, [0, 1], lambda name, expert: torch.zeros(3))
    with pytest.raises(EplbError, match=r"got .*torch.float64"):
        localise(layer, [0, 1], lambda name, expert: torch.zeros(3, 2, dtype=torch.float64))
    layer.module.to_empty(device="meta")
    with pytest.raises(EplbError, match=r"layers.0.up on the meta device"):
        localise(layer, [0, 1], None)


class SharedExperts(nn.Linear):
    """Not routed: every token passes through."""


def spoil(how):
    model = Model()
    first, last = model.layers[0], model.layers[2]
    match how:
        case "row count":
            first.extra = nn.Parameter(torch.zeros(3, 4))
        case "other dimension":
            last.register_buffer("extra", torch.zeros(2, 4))
        case "nested":
            first.norm = nn.LayerNorm(2)
        case "bare":
            first.cached = torch.zeros(4)
        case "tied":
            last.up = first.up
        case "sizes":
            model.layers[2] = Experts(6)
        case "list":
            model.layers[1] = nn.Module()
            model.layers[1].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        case "parallel":
            first._is_expert_parallel = True
        case "call":
            first.forward = nn.Linear(2, 2).forward
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("row count", r"layers\.0\.extra \(3, 4\) without 4 rows"),
        ("other dimension", r"layers\.2\.extra \(2, 4\) without 4 rows"),
        ("nested", r"layers\.0\.norm\.weight \(2,\) without 4 rows, layers\.0\.norm\.bias"),
        ("bare", r"layers\.0\.cached, a tensor that is neither parameter nor buffer"),
        ("tied", r"layers\.2\.up, the same tensor as layers\.0\.up"),
        ("sizes", r"layers\.0 with 4 experts, layers\.2 with 6 experts"),
        ("list", r"layers\.1\.experts \(ModuleList\) with no \[num_experts, \., \.\] of its own but \[0\.weight"),
        ("parallel", r"layers\.0 with a forward that was replaced already, or made expert-parallel"),
        ("call", r"layers\.0 with a forward that was replaced"),
    ],
)
def test_whatever_would_be_left_behind_is_named(how, message):
    with pytest.raises(EplbError, match=message):
        find_expert_layers(spoil(how))


def test_what_belongs_to_no_expert_can_be_named():
    model = spoil("nested")
    model.layers[2].norm = model.layers[0].norm
    assert find_expert_layers(model, shared=["norm.weight", "norm.bias"])[0].tensors == ("up", "scale")
    with pytest.raises(EplbError, match="shared='norm.gain' in no experts module"):
        find_expert_layers(model, shared=["norm.weight", "norm.bias", "norm.gain"])


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("llama", {}, "a LlamaModel with no stacked experts"),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 8}, r"Llama4TextExperts\) called with"),
        ("longcat_flash", {"n_routed_experts": 4, "expert_ffn_hidden_size": 8}, r"LongcatFlashExperts\) with no"),
        ("jetmoe", {"num_local_experts": 4}, r"JetMoeParallelExperts\) called with \(inputs, expert_size\)"),
        ("switch_transformers", {"num_experts": 4, "d_model": 8, "d_kv": 2}, r"SwitchTransformersExperts\) with no"),
    ],
)
def test_models_with_other_kinds_of_experts_are_refused(kind, sizes, message):
    common = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_layers": 2, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **common | heads | sizes))
    with pytest.raises(EplbError, match=message):
        find_expert_layers(model)


def test_a_process_group_is_needed():
    with pytest.raises(EplbError, match="init_process_group"):
        expert_parallel(Model(), Topology(1, 4))


def test_a_placement_is_checked_before_the_group_is_used():
    model = Model()
    with pytest.raises(EplbError, match="no copy"):
        expert_parallel(model, Topology(1, 4), np.zeros((2, 4), dtype=np.int32))
    assert model.layers[0].up.shape == (4, 3, 2)
