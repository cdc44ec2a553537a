"""What one rank does: serve, count, plan, move, serve again. The library in use, from end to end."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from eplb_core import Topology, model_balancedness, moved_experts, plan_moves, rank_load, rebalance, verify_plan
from eplb_torch import ProcessGroupTransport, RearrangeReport, rearrange
from eplb_torch.demo.model import load_model
from eplb_torch.demo.ranks import Send
from eplb_torch.demo.results import PhaseResult
from eplb_torch.integrations.huggingface import ExpertParallelModel, expert_parallel


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of traffic of one kind.

    traffic: its kind.
    measured: `[requests, length]` tokens served first, from whose load the new placement is made.
    fresh: `[requests, length]` other tokens, served after the move.
    """

    traffic: str
    measured: Int[Tensor, "requests length"]
    fresh: Int[Tensor, "requests length"]


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks are to do.

    folder: where `save_model` wrote the model.
    topology: sizes of the group.
    policy: of `rebalance`.
    phases: in their order.
    timeout: seconds for each step of moving weights.
    """

    folder: Path
    topology: Topology
    policy: str
    phases: tuple[Phase, ...]
    timeout: float


@torch.no_grad()
def serve_phases(rank: int, send: Send, job: Job) -> None:
    """Serve all phases as one of the ranks. Rank 0 sends what it is about to do, and a `PhaseResult` per phase."""
    if rank != 0:
        send = _discard
    send("loading the model")
    unmodified = load_model(job.folder)
    experts = expert_parallel(load_model(job.folder), job.topology)
    for phase in job.phases:
        old = experts.placement
        send(f"serving {phase.traffic}")
        load_before, difference_before = _serve(experts, unmodified, phase.measured)
        send(f"moving experts for {phase.traffic}")
        planning, moving, report = _rebalance(experts, load_before, job)
        send(f"serving more {phase.traffic}")
        load_after, difference_after = _serve(experts, unmodified, phase.fresh)
        new, topology = experts.placement, job.topology
        send(
            PhaseResult(
                traffic=phase.traffic,
                tokens=phase.measured.numel(),
                balancedness_before=float(model_balancedness(old, load_before, topology)),
                balancedness_after=float(model_balancedness(new, load_after, topology)),
                rank_load_before=np.asarray(rank_load(old, load_before, topology)),
                rank_load_after=np.asarray(rank_load(new, load_after, topology)),
                moved_experts=int(moved_experts(old, new, topology).sum()),
                bytes_moved=int(_reduce(report.bytes_received, dist.ReduceOp.SUM)),
                planning_ms=1e3 * _reduce(planning, dist.ReduceOp.MAX),
                moving_ms=1e3 * _reduce(moving, dist.ReduceOp.MAX),
                max_abs_logit_difference=max(difference_before, difference_after),
            )
        )


def _serve(
    experts: ExpertParallelModel, unmodified: PreTrainedModel, requests: Int[Tensor, "requests length"]
) -> tuple[Int[np.ndarray, "layers logical"], float]:
    """Serve this rank's share of the requests.

    Returns:
        The load that all ranks saw together, and the largest difference of any of their logits from those of the
        unmodified model.
    """
    share = requests.tensor_split(dist.get_world_size())[dist.get_rank()]
    experts.reset_load()
    logits = experts.model(share).logits
    load = experts.load()
    dist.all_reduce(load)
    difference = (logits - unmodified(share).logits).abs().nan_to_num(nan=torch.inf).max().item()
    return load.numpy(), _reduce(difference, dist.ReduceOp.MAX)


def _rebalance(
    experts: ExpertParallelModel, load: Int[np.ndarray, "layers logical"], job: Job
) -> tuple[float, float, RearrangeReport]:
    """Make a placement for the load, move weights to it and route by it.

    Returns:
        Seconds of planning, seconds of moving, and what this rank sent and received.
    """
    start = time.perf_counter()
    old = experts.placement
    new = rebalance(load, job.topology, policy=job.policy, previous=old)
    plan = plan_moves(old, new, job.topology)
    planned = time.perf_counter()
    violations = verify_plan(old, new, plan, job.topology)
    assert not violations, violations
    # No rank's clock shall count another rank's planning.
    dist.barrier()
    begun = time.perf_counter()
    report = rearrange(experts.weights, plan, job.topology, ProcessGroupTransport(), timeout=job.timeout)
    experts.commit(new)
    return planned - start, time.perf_counter() - begun, report


def _reduce(value: float, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.item()


def _discard(_: object) -> None:
    pass
