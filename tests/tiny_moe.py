"""Small random MoE models of real families: several MoE layers, sizes that differ, experts that matter."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}

# Dense layers come first, in the middle or not at all.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "intermediate_size": 40,
        "moe_intermediate_size": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "olmoe": {"num_hidden_layers": 2, "intermediate_size": 12, "num_experts": 10, "num_experts_per_tok": 4},
    "mixtral": {"num_hidden_layers": 3, "intermediate_size": 28, "num_local_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "intermediate_size": 44,
        "moe_intermediate_size": 16,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "num_hidden_layers": 3,
        "intermediate_size": 36,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_config(family: str, **overrides: Any) -> Any:
    return AutoConfig.for_model(family, **COMMON | FAMILIES[family] | overrides)


@torch.no_grad()
def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode, everything in it random and at a scale that shows in the logits."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.2
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1))
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model
