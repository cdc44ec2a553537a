"""What one rank does: serve batch after batch, while an `ExpertBalancer` moves weights beside it."""

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from eplb_core import Topology, moved_experts, rank_load
from eplb_torch.balancer import ExpertBalancer
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.demo.ledger import Ledger
from eplb_torch.demo.model import load_model
from eplb_torch.demo.ranks import Send
from eplb_torch.demo.record import Record, Step
from eplb_torch.demo.results import PhaseResult
from eplb_torch.demo.traffic import WINDOW_STEPS, Phase
from eplb_torch.integrations.huggingface import expert_parallel
from eplb_torch.metrics import BalancerMetrics
from eplb_torch.transport import ProcessGroupTransport

_FIGURES = 5  # that a rank tells the others after a step, besides its load


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks are to do.

    folder: where `save_model` wrote the model.
    topology: sizes of the group.
    config: of the balancer.
    phases: in their order.
    metrics_port: where rank 0 serves its metrics over HTTP; 0 for a free port, None for nowhere.
    group_timeout: seconds that a rank may wait for the others in one collective.
    """

    folder: Path
    topology: Topology
    config: BalancerConfig
    phases: tuple[Phase, ...]
    metrics_port: int | None
    group_timeout: float


class Listening(NamedTuple):
    """Metrics are served on a port of this machine from now on."""

    port: int


@torch.no_grad()
def serve_phases(rank: int, send: Send, job: Job) -> None:
    """Serve all phases as one of the ranks.

    Rank 0 sends a `Listening` if it serves metrics, then a `Progress` after every step and a `PhaseResult` after
    every phase.
    """
    if rank != 0:
        send = _discard
    metrics = None
    if rank == 0 and job.metrics_port is not None:
        metrics = BalancerMetrics(["main"], labels={"ep_rank": "0"})
        send(Listening(metrics.serve(job.metrics_port).port))
    server = Server(job, Ledger(metrics))
    for phase in job.phases:
        send(_serve_phase(server, phase, send))
    server.balancer.close()


class Server:
    """This rank's part of the model, the balancer of its experts, and the unmodified model to compare with.

    A collective, as is `step`: all ranks build it, and serve the same batches.

    Args:
        job: what to serve.
        ledger: where the balancer's figures go.
    """

    def __init__(self, job: Job, ledger: Ledger):
        self.topology, self.ledger = job.topology, ledger
        self._unmodified = load_model(job.folder)
        self.experts = expert_parallel(load_model(job.folder), job.topology)
        # The balancer's messages travel at the same time as the model's, hence on a group of their own.
        own_group: Any = dist.new_group(timeout=timedelta(seconds=job.group_timeout))
        transport = ProcessGroupTransport(own_group)
        self.balancer = ExpertBalancer(self.experts, transport, job.config, metrics=ledger)
        self._decisions_needed = 1 + -(-WINDOW_STEPS // job.config.step_interval)
        self._rank, self._size = transport.rank, transport.size

    def step(self, requests: Int[Tensor, "requests length"]) -> Step:
        """Serve one batch, let the balancer do what is due, and compare with the unmodified model."""
        share = requests.tensor_split(self._size)[self._rank]
        served_by, during_moves = self.experts.placement, self._moving
        start = time.perf_counter()
        logits = self._forward(share if len(share) else None)
        served = time.perf_counter()
        load = self.experts.take_load()
        self.balancer.step(load if self.balancer.recording else None)
        end = time.perf_counter()
        figures = [end - start, end - served, during_moves, not self._settled, self._difference(logits, share)]
        return self._join(requests.numel(), served_by, figures, load)

    @property
    def _moving(self) -> bool:
        return self.balancer.state.models["main"].target is not None

    @property
    def _settled(self) -> bool:
        """The first decisions of a phase may still rest on the traffic before it."""
        return self.ledger.decisions.total() >= self._decisions_needed and not self._moving

    def _forward(self, share: Int[Tensor, "requests length"] | None) -> Tensor | None:
        if share is not None:
            return self.experts.model(share).logits
        with self.experts.idle():
            self.experts.model(torch.zeros((1, 1), dtype=torch.int64))
        return None

    def _difference(self, logits: Tensor | None, share: Int[Tensor, "requests length"]) -> float:
        if logits is None:
            return 0.0
        return (logits - self._unmodified(share).logits).abs().nan_to_num(nan=torch.inf).max().item()

    def _join(self, tokens: int, served_by: np.ndarray, figures: list, load: Int[Tensor, "layers logical"]) -> Step:
        """Put together what all ranks have seen. The same on all ranks."""
        mine = torch.cat([torch.tensor(figures, dtype=torch.float64), load.flatten()])
        everyones = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(everyones, mine)
        table = torch.stack(everyones)
        seconds, stall, during_moves, unsettled, difference = table[:, :_FIGURES].amax(dim=0).tolist()
        group_load = table[:, _FIGURES:].sum(dim=0).reshape(load.shape).to(torch.int64).numpy()
        placement, topology = self.experts.placement, self.topology
        moved = np.asarray(moved_experts(served_by, placement, topology))
        row_bytes = [self.experts.weights.row_bytes(layer) for layer in range(len(moved))]
        return Step(
            tokens=tokens,
            load=group_load,
            rank_load=np.asarray(rank_load(served_by, group_load, topology)),
            seconds=seconds,
            stall_seconds=stall,
            during_moves=bool(during_moves),
            settled=not unsettled,
            difference=difference,
            switched_layers=int((placement != served_by).any(axis=1).sum()),
            moved_experts=int(moved.sum()),
            bytes_moved=int(moved @ row_bytes),
        )


def _serve_phase(server: Server, phase: Phase, send: Send) -> PhaseResult:
    """Serve the first batches, others until the balancer has acted, then fresh ones, until nothing moves any more."""
    ledger, more = server.ledger, phase.batches_between()
    ledger.begin()
    record = Record(phase.traffic, server.experts.placement, server.topology)

    def serve(requests: Int[Tensor, "requests length"]) -> Step:
        step = server.step(requests)
        record.steps.append(step)
        send(record.progress(ledger.predicted, ledger.decisions.total()))
        return step

    step = [serve(requests) for requests in phase.first][-1]
    while not step.settled:
        step = serve(next(more))
    after = [serve(requests) for requests in phase.fresh]
    step = after[-1]
    while not step.settled:
        step = serve(next(more))
    seconds = torch.tensor([ledger.seconds["planning"], ledger.seconds["prepare"]], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return record.result(after, dict(ledger.decisions), *seconds.tolist())


def _discard(_: object) -> None:
    pass
