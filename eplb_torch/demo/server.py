"""One rank's part of the model, kept balanced, beside the unmodified model to compare with."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from eplb_core import Topology, moved_experts
from eplb_torch.balancer import ExpertBalancer
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.demo.hosts import Hosts
from eplb_torch.demo.ledger import Ledger
from eplb_torch.demo.loss import Recovered, rehosted
from eplb_torch.demo.model import expert_rows, load_model
from eplb_torch.demo.record import Step
from eplb_torch.demo.traffic import WINDOW_STEPS, Phase
from eplb_torch.elastic import Change, ElasticGroup, is_loss
from eplb_torch.elastic.membership import Membership
from eplb_torch.integrations.huggingface import expert_parallel

_FIGURES = 8  # that a rank tells the others after a step, besides its load


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks are to do.

    folder: where `save_model` wrote the model.
    topology: sizes of the group.
    config: of the balancer.
    phases: in their order.
    metrics_port: where the reporter serves its metrics over HTTP; 0 for a free port, None for nowhere.
    group_timeout: seconds that a rank may wait for the others in one collective.
    silence: seconds without a sign of life after which a rank counts as dead.
    kill_rank: the rank that will be killed, None for none. That any other is lost is a failure.
    """

    folder: Path
    topology: Topology
    config: BalancerConfig
    phases: tuple[Phase, ...]
    metrics_port: int | None
    group_timeout: float
    silence: float = 2.0
    kill_rank: int | None = None

    @property
    def reporter(self) -> int:
        """The rank that speaks for all: the first that will not be killed."""
        return 1 if self.kill_rank == 0 else 0


class Server:
    """This rank's part of the model, the balancer of its experts, and the unmodified model to compare with.

    A collective, as is `step`: all ranks build it, and serve the same batches.

    Args:
        job: what to serve.
        ledger: where the balancer's figures go.
        rank: of this process.
        store: outlives all ranks, and is shared by them.

    Attributes:
        recovered: set when a rank was lost, with `served_at` and the batch to be filled in; to be reset by whoever
            has told the parent.
    """

    def __init__(self, job: Job, ledger: Ledger, rank: int, store: Store):
        self._job, self.ledger = job, ledger
        members = Membership(store, name=_name(rank), silence=job.silence, timeout=job.group_timeout)
        rows = expert_rows(job.folder)
        self.elastic = ElasticGroup(members, read_row=rows, timeout=job.config.timeout, group_timeout=job.group_timeout)
        self.elastic.found(rank, job.topology.ep_size)
        self._unmodified = load_model(job.folder)
        self.experts = expert_parallel(load_model(job.folder), job.topology, group=self.elastic.group)
        self.elastic.serve(self.experts)
        self.balancer = ExpertBalancer(self.experts, self.elastic.transport, job.config, metrics=ledger)
        self.recovered: Recovered | None = None
        self._served, self._last = 0, None
        self.begin_phase()

    @property
    def hosts(self) -> Hosts:
        """Where experts are now."""
        ranks = tuple(map(_number, self.elastic.members.names))
        return Hosts(self.experts.placement, self.experts.topology, ranks, self._job.topology.ep_size)

    def begin_phase(self) -> None:
        """Count decisions from now on: those for other traffic, or for more ranks, do not make a step `settled`."""
        self.ledger.begin()
        self._settled_at = self._decisions_needed

    def step(self, requests: Int[Tensor, "requests length"]) -> Step:
        """Serve one batch, let the balancer do what is due, and compare with the unmodified model.

        Where the rank that will be killed is lost meanwhile, the others go on without it and serve the batch anew,
        unless one of them knows that all had served it.
        """
        step = None
        while step is None:
            try:
                step = self._serve(requests)
            except Exception as error:
                if self._job.kill_rank is None or not is_loss(error):
                    raise
                step = self._recover(error)
        return step

    def _serve(self, requests: Int[Tensor, "requests length"]) -> Step:
        members = self.elastic.members
        share = requests.tensor_split(members.size)[members.rank]
        hosts, during_moves = self.hosts, self._moving
        start = time.perf_counter()
        logits = self._forward(share if len(share) else None)
        served = time.perf_counter()
        load = self.experts.take_load()
        self.balancer.step(load if self.balancer.recording else None)
        end = time.perf_counter()
        spent = [self.ledger.seconds[what] for what in ("planning", "prepare")]
        state = [during_moves, not self._settled]
        compared = [self._difference(logits, share), 0 if logits is None else len(logits)]
        step = self._join(requests, hosts, [end - start, end - served, *spent, *state, *compared], load)
        self._served, self._last = self._served + 1, step
        return step

    def _recover(self, error: Exception) -> Step | None:
        """Go on without the lost rank. Return the batch under way, if another rank knows what all have done in it."""
        noticed_at = time.monotonic()
        change = self.elastic.recover(error, balancer=self.balancer)
        if change.lost != (_name(self._job.kill_rank),):
            raise RuntimeError(f"lost {', '.join(change.lost) or 'nobody'}, not rank {self._job.kill_rank} alone")
        self.balancer = self.balancer.renewed(self.elastic.transport)
        self.experts.take_load()  # of what will be served anew
        self._settled_at = self.ledger.decisions.total() + self._decisions_needed
        told: list = [None] * self.elastic.members.size
        dist.all_gather_object(told, (self._served, self._last, noticed_at, change.seconds), group=self.elastic.group)
        noticed_at, seconds = min(told, key=lambda its: its[2])[2:]
        self.recovered = self._describe(change, noticed_at, seconds)
        served, last = max(told, key=lambda its: its[0])[:2]
        is_behind, self._served, self._last = served > self._served, served, last
        return last if is_behind else None

    def _describe(self, change: Change, noticed_at: float, seconds: dict[str, float]) -> Recovered:
        plan = change.plans["main"]
        return Recovered(
            traffic="",
            batch=0,
            noticed_at=noticed_at,
            agreeing=seconds["agreeing"],
            connecting=seconds["connecting"],
            moving=seconds["moving"],
            attempts=change.attempts,
            served_at=0.0,
            ranks=rehosted(plan, self.hosts.ranks),
            lost_copies=len(plan.reload),
        )

    @property
    def _decisions_needed(self) -> int:
        """The first decisions may still rest on the traffic before."""
        return 1 + -(-WINDOW_STEPS // self._job.config.step_interval)

    @property
    def _moving(self) -> bool:
        return self.balancer.state.models["main"].target is not None

    @property
    def _settled(self) -> bool:
        return self.ledger.decisions.total() >= self._settled_at and not self._moving

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

    def _join(self, requests: Int[Tensor, "requests length"], served_by: Hosts, figures: list, load: Tensor) -> Step:
        """Put together what all ranks have seen. The same on all ranks."""
        mine = torch.cat([torch.tensor(figures, dtype=torch.float64), load.flatten()])
        everyones = [torch.empty_like(mine) for _ in served_by.ranks]
        dist.all_gather(everyones, mine, group=self.elastic.group)
        table = torch.stack(everyones)
        seconds, stall, planning, moving, during_moves, unsettled, difference, _ = (
            table[:, :_FIGURES].amax(dim=0).tolist()
        )
        group_load = table[:, _FIGURES:].sum(dim=0).reshape(load.shape).to(torch.int64).numpy()
        before, after = served_by.placement, self.experts.placement
        moved = moved_experts(before, after, served_by.topology)
        row_bytes = [self.experts.weights.row_bytes(layer) for layer in range(len(moved))]
        return Step(
            tokens=requests.numel(),
            requests=len(requests),
            compared=int(table[:, _FIGURES - 1].sum()),
            ranks=served_by.ranks,
            load=group_load,
            rank_load=served_by.rank_load(group_load),
            seconds=seconds,
            stall_seconds=stall,
            planning_seconds=planning,
            moving_seconds=moving,
            during_moves=bool(during_moves),
            settled=not unsettled,
            difference=difference,
            switched_layers=int((after != before).any(axis=1).sum()),
            moved_experts=int(moved.sum()),
            bytes_moved=int(moved @ row_bytes),
        )


def _name(rank: int | None) -> str:
    return f"rank {rank}"


def _number(name: str) -> int:
    return int(name.removeprefix("rank "))
