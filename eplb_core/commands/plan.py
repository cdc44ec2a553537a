"""`eplb plan`: from a load to a placement."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eplb_core.commands._shared import (
    Groups,
    JsonFile,
    LoadFile,
    MaxGB,
    Nodes,
    Policy,
    Ranks,
    Redundant,
    console,
    examples,
    failing,
    limit_bytes,
    output,
    topology_for,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    from eplb_core.topology import Topology

EPILOG = examples(
    "eplb plan load.npz --ranks 32 --redundant 32 --out placement.npz",
    "eplb plan expert_distribution_recorder_1.pt --ranks 8 --redundant 8 --out init.json",
    "eplb plan load.csv --ranks 32 --redundant 32 --nodes 4 --previous placement.npz \\",
    "    --max-moves 8 --out next.npz --moves moves.npz --json -",
)


def plan(
    load: LoadFile,
    ranks: Ranks,
    redundant: Redundant = 0,
    nodes: Nodes = 1,
    groups: Groups = 1,
    policy: Policy = "incremental",
    previous: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Placement in force; otherwise round robin is compared with.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Plan for the last windows only.")] = None,
    max_moves: Annotated[int | None, typer.Option(min=0, help="Experts that may be moved per layer.")] = None,
    max_total_moves: Annotated[int | None, typer.Option(min=0, help="Experts that may be moved in all.")] = None,
    out: Annotated[Path | None, output("--out", "Write the placement.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Format of --out: npz, npy, json, sglang, sglang-pt, tensorrt-llm or vllm-ascend."),
    ] = None,
    moves: Annotated[Path | None, output("--moves", "Write the moves from --previous, as .npz.")] = None,
    max_gb: MaxGB = 1.0,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Make a placement for a load.

    Prints the balancedness (mean rank load / busiest rank's load) before and after, the best that any placement could
    reach (bound), by how much the busiest rank is above what that would give it (gap), and the experts that ranks must
    receive.
    """
    with failing("plan"):
        from eplb_core._checks import require
        from eplb_core.formats.layers import layer_ids_or_range
        from eplb_core.policies import rebalance
        from eplb_core.trace import read_placement, write_placement

        require(moves is None or previous is not None, "`--moves` must have `--previous`", "none", "Say what is moved.")
        window, metadata = _total(load, last, limit_bytes(max_gb))
        topology = topology_for(window.shape[1], ranks, redundant, nodes)
        old = None if previous is None else read_placement(previous).physical_to_logical
        limits: dict[str, Any] = {"max_moves": max_moves, "max_total_moves": max_total_moves}
        start = time.perf_counter()
        new = rebalance(window, topology, policy=policy, num_groups=groups, previous=old, **limits)
        seconds = time.perf_counter() - start
        layer_ids = layer_ids_or_range(metadata.get("layer_ids"), len(new), load)
        result = _measure(window, old, new, topology) | {"layer_ids": layer_ids, "planning_seconds": seconds}
        if out is not None:
            described = {"load": str(load), "policy": policy}
            ids = {"num_logical": window.shape[1], "layer_ids": layer_ids, "metadata": described}
            write_placement(out, new, topology, format=format, **ids)
        if moves is not None:
            _write_moves(moves, old, new, topology)
        _print(console(json_file), result, layers)
        sizes = {
            "load": str(load),
            "policy": policy,
            "ranks": ranks,
            "slots_per_rank": topology.slots_per_rank,
            "nodes": nodes,
        }
        write_json(json_file, sizes | result | {"physical_to_logical": new.tolist()})


def _total(file: Path, last: int | None, limit: int) -> "tuple[np.ndarray, dict[str, Any]]":
    """Sum the windows of a trace, or its last ones, with one at a time in memory where the format can."""
    from collections import deque
    from functools import reduce
    from operator import add

    from eplb_core.trace import iter_windows, read_metadata

    windows = iter_windows(file, limit_bytes=limit)
    total = reduce(add, windows if last is None else deque(windows, maxlen=last))
    return total, read_metadata(file, limit_bytes=limit)


def _measure(load: "np.ndarray", old: Any, new: "np.ndarray", topology: "Topology") -> dict[str, Any]:
    """Compare two placements under one load, per layer and in all."""
    import numpy as np

    from eplb_core.bound import load_bound
    from eplb_core.metrics import balancedness, model_balancedness, moved_experts, rank_load
    from eplb_core.placement import round_robin

    start = round_robin(len(load), load.shape[1], topology) if old is None else old
    mean = load.sum(axis=1) / topology.ep_size
    bound = np.asarray(load_bound(load, topology))
    busiest = rank_load(new, load, topology).max(axis=1)
    moved = moved_experts(start, new, topology)
    return {
        "compared_with": "round robin" if old is None else "previous",
        "balancedness_before": balancedness(start, load, topology).tolist(),
        "balancedness": balancedness(new, load, topology).tolist(),
        "balancedness_bound": np.divide(mean, bound, out=np.ones_like(mean), where=bound > 0).tolist(),
        "gap": (np.divide(busiest, bound, out=np.ones_like(mean), where=bound > 0) - 1).tolist(),
        "moved_experts": moved.tolist(),
        "model": {
            "balancedness_before": float(model_balancedness(start, load, topology)),
            "balancedness": float(model_balancedness(new, load, topology)),
            "balancedness_bound": float(mean.sum() / bound.sum()) if bound.any() else 1.0,
            "gap": float(busiest.sum() / bound.sum() - 1) if bound.any() else 0.0,
            "moved_experts": int(moved.sum()),
        },
    }


def _write_moves(file: Path, old: Any, new: Any, topology: "Topology") -> None:
    from eplb_core.moves import plan_moves
    from eplb_core.rounds import schedule_rounds
    from eplb_core.trace import write_plan

    planned = plan_moves(old, new, topology)
    write_plan(file, old, new, planned, topology, schedule_rounds(planned, topology))


_COLUMNS = ("balancedness_before", "balancedness", "balancedness_bound", "gap", "moved_experts")


def _print(to: Any, result: dict[str, Any], every_layer: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = [f"layer {number}" for number in result["layer_ids"]]
    rows = list(zip(*(result[column] for column in _COLUMNS), strict=True))
    worst = min(range(len(rows)), key=lambda row: rows[row][1])
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    table = Table(box=SIMPLE_HEAD)
    table.add_column()
    for heading in (f"{result['compared_with']}\nbalancedness", "planned\nbalancedness", "\nbound", "\ngap"):
        table.add_column(heading, justify="right")
    table.add_column("experts\nmoved", justify="right")
    if every_layer:
        for name, row in zip(names, rows, strict=True):
            table.add_row(name, *_cells(row))
    table.add_row(f"worst: {names[worst]}", *_cells(rows[worst]))
    table.add_row(f"mean of {len(rows)} layers", *_cells(mean))
    table.add_row("all layers", *_cells([result["model"][column] for column in _COLUMNS]))
    to.print(table)


def _cells(row: Any) -> list[str]:
    *shares, gap, moved = row
    return [*(f"{share:.3f}" for share in shares), f"{gap:.1%}", f"{moved:.1f}" if moved % 1 else f"{moved:.0f}"]
