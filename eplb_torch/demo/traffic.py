"""What is asked of the model: batches of requests, first of one kind of text, then of another."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle

import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core._checks import require
from eplb_torch.demo.corpus import Domain

WINDOW_STEPS = 8  # steps over which balancedness is measured, and whose load a decision rests on
REQUESTS = 16  # per step, over all ranks
REQUEST_LENGTH = 64  # tokens

_STEPS_BETWEEN = 40

Batches = Int[Tensor, "steps requests length"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of traffic of one kind.

    traffic: its kind.
    first: `[steps, requests, length]` tokens served on arrival.
    between: those served next, until the balancer has acted, and after `fresh` while it still moves weights.
    fresh: those served once the balancer has acted. Nothing in them was served before.
    """

    traffic: str
    first: Batches
    between: Batches
    fresh: Batches

    def batches_between(self) -> Iterator[Int[Tensor, "requests length"]]:
        """Yield batches without end. Where the balancer takes very long, text comes again."""
        return cycle(self.between)


def make_phases(domains: Mapping[str, Domain], seed: int) -> tuple[Phase, ...]:
    """Cut the held-out text into requests, which arrive in random order. No two requests are the same text.

    Returns:
        Prose, code, and a mix of both.

    Raises:
        EplbError: if there is too little text.
    """
    generator = torch.Generator().manual_seed(seed)
    left = {}
    for name, domain in domains.items():
        requests = domain.held_out.unfold(0, REQUEST_LENGTH, REQUEST_LENGTH).unique(dim=0)
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

    def batches(names: list[str], num_steps: int) -> Batches:
        parts = [take(name, num_steps * REQUESTS // len(names)) for name in names]
        return torch.stack(parts, dim=1).reshape(num_steps, REQUESTS, REQUEST_LENGTH)

    def phase(traffic: str, names: list[str]) -> Phase:
        lengths = (WINDOW_STEPS, _STEPS_BETWEEN, WINDOW_STEPS)
        return Phase(traffic, *(batches(names, num_steps) for num_steps in lengths))

    return (*(phase(name, [name]) for name in domains), phase("mix", list(domains)))
