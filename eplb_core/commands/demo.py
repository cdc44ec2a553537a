"""`eplb demo`: the whole path on a real model."""

from typing import Annotated

import typer

from eplb_core._checks import EplbError
from eplb_core.commands._shared import JsonFile, console, fail, require_modules, write_json


def demo(
    ranks: Annotated[int, typer.Option(min=1, help="Processes to spread the experts over.")] = 4,
    redundant: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Slots per layer beyond one for each of the 32 experts.",
            show_default="8; with --kill-rank those the others need for that",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, about 0.1 s each.")] = 150,
    policy: Annotated[str | None, typer.Option(help="Policy of `rebalance`.", show_default="the library's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of corpus, model and training.")] = 0,
    interval: Annotated[int, typer.Option(min=1, max=100, help="Batches between decisions of the balancer.")] = 8,
    sync: Annotated[bool, typer.Option("--sync", help="Let serving wait while weights move.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port of 127.0.0.1; 0 for a free one."),
    ] = None,
    kill_rank: Annotated[
        int | None,
        typer.Option(help="Kill this rank while it serves the second kind of text; the others go on without it."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Balance a small MoE model while its traffic shifts.

    Trains a Qwen3-MoE (4 layers, 32 experts, top-4) on Python's own documentation and sources for some seconds,
    spreads its experts over several processes and serves held-out prose, then code, then both, batch by batch.
    Meanwhile a balancer counts tokens per expert, makes new placements, and moves weights between the processes.
    Every batch is served by the unmodified model as well, to compare.

    With --kill-rank a process is killed under traffic. The others agree to go on without it, host its experts anew,
    from copies or from the checkpoint, and serve the batch again.

    Exits with 1 if the balancedness of fresh batches, once the balancer has acted, is below 0.85, if logits of any
    batch differ from the unmodified model's by 1e-4 or more, if any were not compared, if no batch was served while
    weights moved (without --sync), or if a process fails, but for the one that is killed.
    """
    require_modules("cli,hf", "torch", "transformers", "rich")
    if metrics_port is not None:
        require_modules("cli,hf,metrics", "prometheus_client")
    from eplb_torch.demo.ranks import RankFailure, prepare_ranks

    prepare_ranks()
    from eplb_torch.demo.run import DemoOptions, run_demo

    options = DemoOptions(ranks, redundant, steps, policy, seed, interval, not sync, metrics_port, kill_rank)
    try:
        result = run_demo(options, console(json_file))
    except EplbError as error:
        fail(f"eplb demo: {error}", code=2)
    except RankFailure as error:
        fail(f"eplb demo: the processes were stopped.\n{error}", code=1)
    write_json(json_file, result.to_json())
    if result.problems():
        fail("eplb demo: promises not kept.\n" + "\n".join(result.problems()), code=1)
