"""`eplb demo`: the whole path on a real model."""

from typing import Annotated

import typer

from eplb_core._checks import EplbError
from eplb_core.commands._shared import JsonFile, fail, require_modules, write_json


def demo(
    ranks: Annotated[int, typer.Option(min=1, help="Processes to spread the experts over.")] = 4,
    redundant: Annotated[int, typer.Option(min=0, help="Slots per layer beyond one for each of the 32 experts.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, about 0.1 s each.")] = 150,
    policy: Annotated[str | None, typer.Option(help="Policy of `rebalance`.", show_default="the library's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of corpus, model and training.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Balance a small MoE model while its traffic shifts.

    Trains a Qwen3-MoE (4 layers, 32 experts, top-4) on Python's own documentation and sources for some seconds,
    spreads its experts over several processes and serves held-out prose, then code, then both. Each time it counts
    tokens per expert, makes a new placement, moves weights between the processes, and serves again.

    Exits with 1 if the balancedness after a move is below 0.85, if logits differ from the unmodified model's by
    1e-4 or more, or if a process fails.
    """
    require_modules("cli,hf", "torch", "transformers", "rich")
    from eplb_torch.demo.ranks import RankFailure, prepare_ranks

    prepare_ranks()
    from rich.console import Console

    from eplb_torch.demo.run import DemoOptions, run_demo

    options = DemoOptions(ranks, redundant, steps, policy, seed)
    try:
        result = run_demo(options, Console(highlight=False))
    except EplbError as error:
        fail(f"eplb demo: {error}", code=2)
    except RankFailure as error:
        fail(f"eplb demo: the processes were stopped.\n{error}", code=1)
    write_json(json_file, result.to_json())
    if result.problems():
        fail("eplb demo: promises not kept.\n" + "\n".join(result.problems()), code=1)
