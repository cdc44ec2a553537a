"""Who computes what: experts that remember the rows they were given, on real processes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eplb_core import EMPTY, EplbError, Topology, round_robin
from eplb_torch.integrations.huggingface import expert_parallel
from tests.multiprocess import run_ranks


class RecordingExperts(nn.Module):
    """Experts that return what they get, wider if told to, and remember how many rows came in each call."""

    def __init__(self, num_experts=2):
        super().__init__()
        self.num_experts, self.widen, self.rows = num_experts, 1, []
        self.up = nn.Parameter(torch.zeros(num_experts, 1, 1))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.rows.append(len(top_k_index))
        return hidden_states.repeat(1, self.widen) * top_k_weights


@torch.inference_mode()
def spread(rank):
    model, token, weight = RecordingExperts(), torch.ones(1, 4), torch.ones(1, 1, dtype=torch.float64)
    # Expert 0 has a copy on each rank, expert 1 only on rank 0.
    experts = expert_parallel(model, Topology(2, 2), np.asarray([[0, 1, 0, EMPTY]]))
    for expert in [0, 0, 1, 0, 0]:
        output = model(token, torch.full((1, 1), expert), weight)
        assert output.dtype == token.dtype
        assert torch.equal(output, token)
    together, model.rows = model.rows, []
    for _ in range(4):
        num_tokens = 1 - rank
        model(token[:num_tokens], torch.zeros(num_tokens, 1, dtype=torch.int64), weight[:num_tokens])
    experts.load().fill_(99)
    return together, model.rows, experts.load().tolist()


def test_copies_share_tokens_between_ranks_and_between_calls():
    assert run_ranks(spread, 2) == [([1, 1, 2, 1, 1], [1, 1], [[8, 1]]), ([1, 1, 1, 1], [1, 1], [[4, 1]])]


def misuse(rank):
    model: Any = RecordingExperts()
    hidden, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(EplbError, match="2 rows, 1 layers"):
        expert_parallel(model, Topology(2, 1), round_robin(2, 2, Topology(2, 1)))
    with pytest.raises(EplbError, match="max_replicas=1, most copies=2"):
        expert_parallel(model, Topology(2, 2), max_replicas=1)
    model.use_kernels = True
    with pytest.raises(EplbError, match="use_kernels=True"):
        expert_parallel(model, Topology(2, 1))
    model.use_kernels = False
    expert_parallel(model, Topology(2, 1))
    with pytest.raises(EplbError, match=r"\(3, 4\), \(3, 2\), \(3, 1\)"):
        model(hidden, ids, torch.ones(3, 1))
    with pytest.raises(EplbError, match=r"\(2, 4\), \(3, 2\)"):
        model(hidden[:2], ids, torch.ones(3, 2))
    model.widen = 2
    with pytest.raises(EplbError, match=r"\(6, 4\) in, \(6, 8\) out"):
        model(hidden, torch.full_like(ids, rank), torch.ones(3, 2))


def test_misuse_is_refused():
    run_ranks(misuse, 2)
