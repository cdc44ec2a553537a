"""The demo from end to end, as the parent of its ranks sees it."""

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from eplb_core import Topology, rebalance
from eplb_core._checks import require
from eplb_torch.demo.corpus import Domain, read_domains
from eplb_torch.demo.display import show_phase, show_result, training_bar
from eplb_torch.demo.model import NUM_LOGICAL, VOCAB_SIZE, new_model, save_model, train
from eplb_torch.demo.ranks import run_ranks
from eplb_torch.demo.results import DemoResult, PhaseResult, TrainingResult
from eplb_torch.demo.serving import Job, Phase, serve_phases

REQUESTS = 128  # served before the move, and again after it, over all ranks
REQUEST_LENGTH = 64  # tokens
TIMEOUT = 240.0  # seconds for all that the ranks do
STEP_TIMEOUT = 60.0  # seconds that a rank waits for the others


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a user may choose.

    ranks: processes, between which the experts are spread.
    redundant: slots beyond one for each of the 32 experts; together they split evenly over the ranks.
    steps: of training.
    policy: of `rebalance`; None for its default.
    seed: of corpus, model and training.
    """

    ranks: int = 4
    redundant: int = 8
    steps: int = 150
    policy: str | None = None
    seed: int = 0


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
    topology = Topology.from_experts(NUM_LOGICAL, options.ranks, num_redundant=options.redundant)
    policy = options.policy or inspect.signature(rebalance).parameters["policy"].default
    _check(options, topology, policy)
    with console.status("reading the standard library"):
        domains = read_domains(VOCAB_SIZE, options.seed)
    with TemporaryDirectory(prefix="eplb-") as folder:
        training = _train_into(Path(folder), domains, options, console)
        job = Job(Path(folder), topology, policy, make_phases(domains, options.seed), STEP_TIMEOUT)
        phases = tuple(_serve(job, console))
    result = DemoResult(topology, policy, options.seed, training, phases, time.monotonic() - start)
    show_result(console, result)
    return result


def make_phases(domains: Mapping[str, Domain], seed: int) -> tuple[Phase, ...]:
    """Cut the held-out text into requests, which arrive in random order. No text is served twice.

    Returns:
        Prose, code, and a mix of both, each with `REQUESTS` requests to measure and as many fresh ones.
    """
    generator = torch.Generator().manual_seed(seed)
    left = {}
    for name, domain in domains.items():
        requests = domain.held_out.unfold(0, REQUEST_LENGTH, REQUEST_LENGTH)
        left[name] = requests[torch.randperm(len(requests), generator=generator)]

    def take(name: str, count: int) -> Int[Tensor, "requests length"]:
        taken, left[name] = left[name].tensor_split([count])
        require(
            len(taken) == count,
            "`make_phases(domains=...)` must have enough held-out text",
            f"{len(taken)} requests of {name} where {count} are needed",
            "Use a Python with a complete standard library.",
        )
        return taken

    def mix() -> Int[Tensor, "requests length"]:
        return torch.stack([take(name, REQUESTS // len(domains)) for name in domains], dim=1).flatten(0, 1)

    pure = [Phase(name, take(name, REQUESTS), take(name, REQUESTS)) for name in domains]
    return (*pure, Phase("mix", mix(), mix()))


def _check(options: DemoOptions, topology: Topology, policy: str) -> None:
    require(
        1 <= options.ranks <= REQUESTS and options.steps >= 1,
        f"the demo must have 1 to {REQUESTS} ranks and at least one step",
        f"ranks={options.ranks}, steps={options.steps}",
        "Choose other numbers.",
    )
    # An unknown policy is refused here, before the training.
    rebalance(np.ones((1, NUM_LOGICAL), dtype=np.int64), topology, policy=policy)


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


def _serve(job: Job, console: Console) -> Iterator[PhaseResult]:
    """Run the ranks and show what they report as it comes."""
    topology = job.topology
    console.print(
        f"Serving it on {topology.ep_size} processes with {topology.slots_per_rank} slots per layer each; "
        f"policy {job.policy}.\n"
    )
    messages = run_ranks(serve_phases, topology.ep_size, job, timeout=TIMEOUT, group_timeout=STEP_TIMEOUT)
    with console.status("starting ranks") as status:
        for message in messages:
            if isinstance(message, PhaseResult):
                show_phase(console, message)
                yield message
            else:
                status.update(message)
