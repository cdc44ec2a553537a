"""The demo from end to end, as the parent of its ranks sees it."""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from transformers import PreTrainedModel

from eplb_core import Topology
from eplb_core._checks import EplbError, require
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.demo.corpus import Domain, read_domains
from eplb_torch.demo.display import show_result, training_bar
from eplb_torch.demo.live import View, make_view
from eplb_torch.demo.loss import LossResult, Recovered, describe_loss
from eplb_torch.demo.model import EXPERT_BYTES, NUM_LOGICAL, VOCAB_SIZE, new_model, save_model, train
from eplb_torch.demo.ranks import Killed, run_ranks
from eplb_torch.demo.record import Progress
from eplb_torch.demo.results import DemoResult, PhaseResult, TrainingResult
from eplb_torch.demo.server import Job
from eplb_torch.demo.serving import Listening, serve_phases
from eplb_torch.demo.traffic import WINDOW_STEPS, Phase, make_phases

TIMEOUT = 240.0  # seconds for all that the ranks do
GROUP_TIMEOUT = 60.0  # seconds that a rank waits for the others in one forward
BALANCER_TIMEOUT = 20.0  # seconds of one step of the balancer; what is left of a forward's is for its votes
SILENCE = 2.0  # seconds without a sign of life after which a rank counts as dead
MAX_RANKS = 128

_REDUNDANT = 8  # slots beyond one for each expert
_BALANCED = 0.96  # balancedness that is left alone; what is missing from there on is mostly chance
_STAGING_BYTES = 6 * EXPERT_BYTES  # about what a layer needs, so that layers switch one after another


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a user may choose.

    ranks: processes, between which the experts are spread.
    redundant: slots beyond one for each of the 32 experts; together they split evenly over the ranks. None for 8, or
        with `kill_rank` for as many per rank as the others need for that.
    steps: of training.
    policy: of `rebalance`; None for the balancer's default.
    seed: of corpus, model and training.
    interval: batches between decisions.
    use_async: move weights while the model serves.
    metrics_port: where to serve Prometheus metrics; 0 for a free port, None for nowhere.
    kill_rank: the rank to kill while it serves, None for none.
    """

    ranks: int = 4
    redundant: int | None = None
    steps: int = 150
    policy: str | None = None
    seed: int = 0
    interval: int = WINDOW_STEPS
    use_async: bool = True
    metrics_port: int | None = None
    kill_rank: int | None = None


class Killing:
    """Says when to kill a rank: while weights move for the second kind of traffic, or else after some batches of it.

    Args:
        rank: to kill, None for none.
        phases: of traffic, in order.
    """

    def __init__(self, rank: int | None, phases: Sequence[Phase]):
        self._rank, self._traffic = rank, [phase.traffic for phase in phases[:2]][-1]
        self.during_moves = False

    def __call__(self, message: object) -> int | None:
        """Return the rank to kill after a message, or None."""
        if self._rank is None or not isinstance(message, Progress) or message.traffic != self._traffic:
            return None
        if not message.during_moves and message.step < WINDOW_STEPS:
            return None
        self.during_moves = message.during_moves
        rank, self._rank = self._rank, None
        return rank


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Train the model, serve it on all ranks under shifting traffic, and print what happens.

    Args:
        options: sizes, checked before anything is done.
        console: where progress and results are shown.

    Returns:
        The result; `DemoResult.problems` says whether the promises were kept.

    Raises:
        EplbError: if the options cannot be met.
        RankFailure: if a rank failed, died or was late.
    """
    start = time.monotonic()
    topology = _choose_slots(options)
    config = _configure(options, topology)
    with console.status("reading the standard library"):
        domains = read_domains(VOCAB_SIZE, options.seed)
    with TemporaryDirectory(prefix="eplb-") as folder:
        training = _train_into(Path(folder), domains, options, console)
        phases = make_phases(domains, options.seed)
        job = Job(
            Path(folder), topology, config, phases, options.metrics_port, GROUP_TIMEOUT, SILENCE, options.kill_rank
        )
        served, loss = _serve(job, console)
    seconds = time.monotonic() - start
    result = DemoResult(topology, config, options.seed, training, served, seconds, options.kill_rank, loss)
    show_result(console, result)
    return result


def _choose_slots(options: DemoOptions) -> Topology:
    """Give ranks so many slots that those who are left after a loss can host all experts."""
    killed, redundant, ranks = options.kill_rank, options.redundant, options.ranks
    if killed is None:
        return Topology.from_experts(NUM_LOGICAL, ranks, num_redundant=_REDUNDANT if redundant is None else redundant)
    require(
        ranks > 1,
        "the demo's `--kill-rank` must leave a rank that serves",
        f"{killed} of {ranks} ranks",
        "Use --ranks 2 or more.",
    )
    require(
        0 <= killed < ranks,
        f"the demo's `--kill-rank` must be one of its ranks, 0 to {ranks - 1}",
        f"{killed}",
        "Choose one of these, or more --ranks.",
    )
    if redundant is None:
        redundant = -(-(NUM_LOGICAL + _REDUNDANT) // (ranks - 1)) * ranks - NUM_LOGICAL
    topology = Topology.from_experts(NUM_LOGICAL, ranks, num_redundant=redundant)
    fewest = -(-NUM_LOGICAL // (ranks - 1)) * ranks - NUM_LOGICAL
    require(
        redundant >= fewest,
        "the demo's `--redundant` must leave the other ranks a slot for every expert after a loss",
        f"redundant={redundant}, and so {topology.slots_per_rank} slots on each of {ranks - 1} ranks",
        f"Use --redundant {fewest} or more, or leave it out.",
    )
    return topology


def _configure(options: DemoOptions, topology: Topology) -> BalancerConfig:
    """Refuse what cannot be met before anything is trained."""
    require(
        1 <= options.ranks <= MAX_RANKS and options.steps >= 1,
        f"the demo must have 1 to {MAX_RANKS} ranks and at least one step",
        f"ranks={options.ranks}, steps={options.steps}",
        "Choose other numbers.",
    )
    _check_port(options.metrics_port)
    config = BalancerConfig(
        window_size=WINDOW_STEPS,
        step_interval=options.interval,
        use_async=options.use_async,
        policy=options.policy or BalancerConfig().policy,
        threshold=_BALANCED,
        timeout=BALANCER_TIMEOUT,
        max_staging_bytes=_STAGING_BYTES,
    )
    config.model(topology, NUM_LOGICAL, EXPERT_BYTES)
    return config


def _check_port(port: int | None) -> None:
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise EplbError(
                f"the demo's `--metrics-port` must be free; got {port}: {error}. Use another one, or 0 for any."
            ) from error


def _train_into(folder: Path, domains: Mapping[str, Domain], options: DemoOptions, console: Console) -> TrainingResult:
    """Train a model, showing its loss, and save it."""
    model: PreTrainedModel = new_model(options.seed)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start, losses = time.monotonic(), []
    with training_bar(console) as bar, _one_thread():
        task = bar.add_task("training", total=options.steps)
        for loss in train(model, [domain.train for domain in domains.values()], options.steps, options.seed):
            losses.append(loss)
            bar.update(task, advance=1, description=f"training, loss {loss:.2f}")
    save_model(model, folder)
    training = TrainingResult(options.steps, time.monotonic() - start, losses[0], losses[-1])
    console.print(
        f"Trained a Qwen3-MoE of {size:.1f} M parameters in {training.seconds:.0f} s: "
        f"loss {training.first_loss:.2f} → {training.last_loss:.2f}."
    )
    return training


@contextmanager
def _one_thread() -> Iterator[None]:
    """The operations of so small a model gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _serve(job: Job, console: Console) -> tuple[tuple[PhaseResult, ...], LossResult | None]:
    """Run the ranks and show what they report as it comes."""
    topology, config = job.topology, job.config
    console.print(
        f"Serving it on {topology.ep_size} processes with {topology.slots_per_rank} slots per layer each.\n"
        f"Policy {config.policy}; a decision every {config.step_interval} batches, "
        f"weights moved {'beside serving' if config.use_async else 'while serving waits'}."
    )
    if job.kill_rank is not None:
        console.print(
            f"Rank {job.kill_rank} will be killed under traffic. "
            f"That leaves {(topology.ep_size - 1) * topology.slots_per_rank} slots per layer for {NUM_LOGICAL} experts."
        )
    console.print()
    killing = Killing(job.kill_rank, job.phases)
    messages = run_ranks(serve_phases, topology.ep_size, job, timeout=TIMEOUT, kill=killing)

    def describe(killed: Killed, recovered: Recovered) -> LossResult:
        return describe_loss(killed, recovered, job.silence, killing.during_moves)

    with make_view(console) as view:
        return _show(messages, view, console, describe)


def _show(
    messages: Iterable[object], view: View, console: Console, describe: Callable[[Killed, Recovered], LossResult]
) -> tuple[tuple[PhaseResult, ...], LossResult | None]:
    """Show what ranks report; return what is left when they have ended."""
    phases, killed, loss = [], None, None
    for message in messages:
        match message:
            case Listening(rank, port):
                console.print(f"Metrics of rank {rank}: http://127.0.0.1:{port}/metrics\n")
            case Progress():
                view.show(message)
            case PhaseResult():
                view.show_phase(message)
                phases.append(message)
            case Killed():
                killed = message
            case Recovered() if killed is not None:
                loss = describe(killed, message)
                view.show_loss(loss)
    return tuple(phases), loss
