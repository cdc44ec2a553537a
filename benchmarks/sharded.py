"""Rows of sharded JAX arrays, moved by plan, beside a jitted gather over the slots with `out_shardings`.

`python -m benchmarks.sharded`, on eight CPU devices of one process. Bytes are counted in the compiled programs: what
every collective sends, times the rounds in which it runs. Repeats are interleaved, so that what else the machine does
hits both alike; times are medians, from the plan on the host to rows in place.
"""

import argparse
import json
import math
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.page import printed
from benchmarks.traces import recorded
from eplb_core import MovePlan, Topology, plan_moves, rebalance, schedule_rounds
from eplb_core.sharded import choose_width, lower, rearrange
from eplb_core.sharded.script import write_script

NUM_DEVICES = 8
BY_SLOT = PartitionSpec(None, "ep")


class Case(NamedTuple):
    """Weights `[layers, slots, ...]` on eight devices, and a plan for them."""

    name: str
    topology: Topology
    num_layers: int
    row: tuple[int, ...]
    plan: MovePlan
    repeats: int
    dtype: Any = np.float32


def exchange(num_layers: int, topology: Topology, share: float, seed: int = 0) -> MovePlan:
    """A share of the slots of every layer, drawn at random, exchange their experts: no slot is freed for free."""
    rng = np.random.default_rng(seed)
    source = np.tile(np.arange(topology.num_slots, dtype=np.int32), (num_layers, 1))
    for row in source:
        chosen = rng.choice(topology.num_slots, round(share * topology.num_slots), replace=False)
        row[chosen] = np.roll(chosen, 1)
    return MovePlan(source)


def replay(load: np.ndarray, topology: Topology, share: float) -> MovePlan | None:
    """The rebalance of a recorded trace, window by window, whose share of changed slots is nearest to the one given."""
    held, best = rebalance(load[0], topology), None
    for window in load[1:]:
        new = rebalance(window, topology, previous=held)
        plan = plan_moves(held, new, topology)
        if best is None or abs(changed(plan) - share) < abs(changed(best) - share):
            best = plan
        held = new
    return best


def changed(plan: MovePlan) -> float:
    """Share of slots that change."""
    source = plan.source_slot
    return float((source != np.arange(source.shape[1])).mean())


def cases() -> list[Case]:
    small, large = Topology(8, 9), Topology(8, 36)
    found = [
        Case("10 % exchanged, 26 layers, 72 slots", small, 26, (128, 64), exchange(26, small, 0.1), 15),
        Case("10 % exchanged, 58 layers, 288 slots", large, 58, (32, 32), exchange(58, large, 0.1), 9),
        Case("all exchanged, 26 layers, 72 slots", small, 26, (128, 64), exchange(26, small, 1.0), 5),
        Case("10 % exchanged, bfloat16", small, 26, (128, 128), exchange(26, small, 0.1), 9, ml_dtypes.bfloat16),
    ]
    trace = recorded("esft_dsv2lite_w1024")
    plan = None if trace is None else replay(trace, small, 0.1)
    if plan is not None:
        found.insert(1, Case("rebalanced, ESFT, DeepSeek-V2-Lite", small, 26, (128, 64), plan, 15))
    return found


class Gather:
    """The obvious alternative: one jitted gather; XLA finds the collectives. Donates its input, as ours does."""

    def __init__(self, sharding: NamedSharding, structure: dict[str, Any]):
        def gather(weights, source):
            layer = jnp.arange(source.shape[0])[:, None]
            return jax.tree.map(lambda rows: rows[layer, source], weights)

        shardings = dict.fromkeys(structure, sharding)
        self.run = jax.jit(gather, donate_argnums=0, out_shardings=shardings)


def collective_bytes(text: str, rounds_of_shift: dict[int, int]) -> int:
    """Bytes that cross devices in a run of a compiled program, padding included.

    A permute sends its operand over each of its pairs, in every round of its shift; an all-gather sends every device
    all but its own part of the result; an all-reduce sends each part around the ring twice.
    """
    total = 0
    for line in text.splitlines():
        found = re.search(r"= \(?(\w+)\[([\d,]*)\]\S* (collective-permute|all-\w+|reduce-scatter)(?:-start)?\(", line)
        if not found:
            continue
        size = int(re.sub(r"\D", "", found[1]) or 8) // 8 * math.prod(int(n) for n in found[2].split(",") if n)
        if found[3] == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", line[line.index("source_target_pairs") :].split("}}")[0] + "}")
            shift = (int(pairs[0][1]) - int(pairs[0][0])) % NUM_DEVICES
            total += size * len(pairs) * rounds_of_shift.get(shift, 0)
        else:
            total += size * (NUM_DEVICES - 1) * {"all-gather": 1, "all-reduce": 2}[found[3]]
    return total


def measure(case: Case, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    sharding = NamedSharding(mesh, BY_SLOT)
    shape = case.num_layers, case.topology.num_slots
    rng = np.random.default_rng(0)

    def make():
        weights = {
            "up": rng.normal(size=(*shape, *case.row)).astype(case.dtype),
            "down": rng.normal(size=(*shape, *case.row[::-1])).astype(case.dtype),
            "scale": rng.normal(size=shape).astype(np.float32),
        }
        return {name: jax.device_put(rows, sharding) for name, rows in weights.items()}

    ours, theirs = make(), make()
    row_bytes = sum(rows.nbytes for rows in ours.values()) // math.prod(shape)
    gather, source = Gather(sharding, theirs), jnp.asarray(case.plan.source_slot)
    programs = lower(ours, case.plan, case.topology, mesh=mesh).compile(), gather.run.lower(theirs, source).compile()
    script = write_script(case.plan, case.topology, width=choose_width(case.num_layers, case.topology))
    shifts, counts = np.unique(script.shift, return_counts=True)
    rounds = dict(zip(shifts.tolist(), counts.tolist(), strict=True))
    sent = [collective_bytes(program.as_text(), rounds) for program in programs]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(case.repeats + 1):
        start = time.perf_counter()
        ours = jax.block_until_ready(rearrange(ours, case.plan, case.topology, mesh=mesh))
        middle = time.perf_counter()
        theirs = jax.block_until_ready(gather.run(theirs, source))
        if turn:  # the first compiles
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
    transfers = len(schedule_rounds(case.plan, case.topology).layer) * row_bytes
    medians = [statistics.median(series) for series in times]
    return {
        "case": case.name,
        "slots changed": changed(case.plan),
        "transfers MiB": transfers / 2**20,
        "bytes / transfers": sent[0] / transfers,
        "gather's bytes / transfers": sent[1] / transfers,
        "temporary MiB": memory[0] / 2**20,
        "temporary / gather's": memory[0] / memory[1],
        "temporary / one gathered layer": memory[0] / (case.topology.num_slots * row_bytes),
        "ms": 1000 * medians[0],
        "time / gather's": medians[0] / medians[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file as well")
    options, _ = parser.parse_known_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices("cpu")[:NUM_DEVICES]), ("ep",), axis_types=(AxisType.Auto,))
    figures = [measure(case, mesh) for case in cases()]
    columns = list(figures[0])
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for figure in figures:
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in figure.values()) + " |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


READING = """
Ours sends at most half as much again as the plan asks for, as all pairs of a collective send rows of one width. On
other devices than CPUs of one process nothing was measured.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
