"""A small Qwen3-MoE: its sizes, a short training, and its way through a folder to the ranks."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from eplb_core.checkpoint import CheckpointRows

NUM_LOGICAL = 32
NUM_LAYERS = 4
VOCAB_SIZE = 1024

_TOP_K = 4
_HIDDEN = 64
_EXPERT_HIDDEN = 32
EXPERT_BYTES = 3 * _HIDDEN * _EXPERT_HIDDEN * 8  # of the float64 that `load_model` reads
_SEQUENCES_PER_STEP = 8
_SEQUENCE_LENGTH = 128  # tokens
_LEARNING_RATE = 1e-2
# Enough to keep most experts in use, not enough to make their loads even: as in many released models.
_BALANCING_LOSS = 0.01


def new_model(seed: int) -> PreTrainedModel:
    """Make an untrained float32 model of about a million parameters."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=_HIDDEN,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=NUM_LOGICAL,
            num_experts_per_tok=_TOP_K,
            moe_intermediate_size=_EXPERT_HIDDEN,
            norm_topk_prob=True,
            router_aux_loss_coef=_BALANCING_LOSS,
            output_router_logits=True,
            initializer_range=0.05,
            tie_word_embeddings=False,
            max_position_embeddings=_SEQUENCE_LENGTH,
            use_cache=False,
        )
    )


def train(
    model: PreTrainedModel, texts: Sequence[Int[Tensor, " tokens"]], num_steps: int, seed: int
) -> Iterator[float]:
    """Train a model in place, as the caller iterates; every step sees all texts equally.

    Args:
        model: from `new_model`.
        texts: tokens of each domain, each of more than 128.
        num_steps: optimizer steps; the learning rate falls to zero over them.
        seed: which windows of the texts are seen.

    Yields:
        The cross entropy of each step's batch, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(num_steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / num_steps)
    )
    model.train()
    for _ in range(num_steps):
        batch = _draw(texts, generator)
        output = model(input_ids=batch, labels=batch)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        yield (output.loss - _BALANCING_LOSS * output.aux_loss).item()
    model.eval()


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write what `load_model` reads."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)


def load_model(folder: Path) -> PreTrainedModel:
    """Read a model for inference, in float64.

    Once in some million tokens the fourth and the fifth expert of a token are so close that the rounding of float32
    decides between them; ranks that sum in another order then disagree with the unmodified model in a whole
    expert. In float64 any visible difference of logits is a real one; the smallest ones vanish, as the model's norms
    round to float32.
    """
    logging.disable_progress_bar()
    # Of the implementations of transformers, the others have no float64 on CPU.
    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", output_router_logits=False
    )


def expert_rows(folder: Path) -> Callable[[int, str, int], Tensor]:
    """Read tensors of single experts, `(layer, name, expert) -> [...]`, equal to those of `load_model`.

    The checkpoint has the experts one by one, and their gates beside what they multiply, as the released ones have.
    """

    def key(layer: int, name: str, expert: int) -> str:
        return f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"

    rows = CheckpointRows(folder, key, framework="torch")

    def read(layer: int, name: str, expert: int) -> Tensor:
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        return torch.cat([rows(layer, part, expert) for part in parts]).to(torch.float64)

    return read


def _draw(texts: Sequence[Tensor], generator: torch.Generator) -> Int[Tensor, "sequences length"]:
    """One window at a random place of each text in turn."""
    windows = []
    for i in range(_SEQUENCES_PER_STEP):
        text = texts[i % len(texts)]
        start = int(torch.randint(len(text) - _SEQUENCE_LENGTH, (), generator=generator))
        windows.append(text[start : start + _SEQUENCE_LENGTH])
    return torch.stack(windows)
