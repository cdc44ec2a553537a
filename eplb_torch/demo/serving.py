"""What one rank does: serve batch after batch, while an `ExpertBalancer` moves weights beside it."""

import time
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from eplb_torch.demo.ledger import Ledger
from eplb_torch.demo.ranks import Send
from eplb_torch.demo.record import Record, Step
from eplb_torch.demo.results import PhaseResult
from eplb_torch.demo.server import Job, Server
from eplb_torch.demo.traffic import Phase
from eplb_torch.metrics import BalancerMetrics


class Listening(NamedTuple):
    """Metrics of a rank are served on a port of this machine from now on."""

    rank: int
    port: int


@torch.no_grad()
def serve_phases(rank: int, send: Send, store: Store, job: Job) -> None:
    """Serve all phases as one of the ranks.

    The reporter sends a `Listening` if it serves metrics, then a `Progress` after every step, a `Recovered` after the
    first one that was served without a lost rank, and a `PhaseResult` after every phase.
    """
    if rank != job.reporter:
        send = _discard
    metrics = None
    if rank == job.reporter and job.metrics_port is not None:
        metrics = BalancerMetrics(["main"], labels={"ep_rank": str(rank)})
        send(Listening(rank, metrics.serve(job.metrics_port).port))
    server = Server(job, Ledger(metrics), rank, store)
    for phase in job.phases:
        send(_serve_phase(server, phase, send))
    server.balancer.close()


def _serve_phase(server: Server, phase: Phase, send: Send) -> PhaseResult:
    """Serve the first batches, others until the balancer has acted, then fresh ones, until nothing moves any more."""
    more = phase.batches_between()
    server.begin_phase()
    record = Record(phase.traffic, server.hosts)

    def serve(requests: Int[Tensor, "requests length"]) -> Step:
        step = server.step(requests)
        record.steps.append(step)
        send(record.progress(server.ledger.predicted, server.ledger.decisions.total()))
        if server.recovered is not None and step.ranks == server.hosts.ranks:
            told = {"traffic": phase.traffic, "batch": len(record.steps), "served_at": time.monotonic()}
            send(server.recovered._replace(**told))
            server.recovered = None
        return step

    step, after = [serve(requests) for requests in phase.first][-1], []
    while not after or after[0].ranks != after[-1].ranks:  # after a loss among the fresh ones, they come again
        while not step.settled:
            step = serve(next(more))
        after = [serve(requests) for requests in phase.fresh]
        step = after[-1]
    while not step.settled:
        step = serve(next(more))
    return record.result(after, dict(server.ledger.decisions))


def _discard(_: object) -> None:
    pass
