"""Kill ranks at random moments of a rearrangement and look at what the survivors have.

`python -m tests.kills --worlds 20` kills many more than the test suite does.
"""

import argparse
import os
import pickle
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eplb_core import Topology, plan_moves
from eplb_torch import ExpertWeights, ProcessGroupTransport, RearrangeError, rearrange
from tests.multiprocess import run_ranks

WORLD_SIZE = 6
LAYERS, SLOTS, VALUES = 6, 6, 16384  # 64 KiB per row of a layer
TIMEOUT = 3.0


class Outcome(NamedTuple):
    """What one survivor of one kill saw.

    committed: bool `[layers]`.
    wrong: (layer, slot) that do not hold what the placement in force says.
    lost_ranks, agreed: of the error; none and True without one.
    seconds: how long the call took.
    raised: whether the kill came before the end.
    """

    committed: tuple[bool, ...]
    wrong: list[tuple[int, int]]
    lost_ranks: tuple[int, ...]
    agreed: bool
    seconds: float
    raised: bool


def kill_one_after_another(rank: int, seed: int, folder: str) -> None:
    """One rank of a world in which all but two are killed, each in a rearrangement of those left."""
    random_delay = random.Random(seed)
    alive = list(range(dist.get_world_size()))
    for turn in range(len(alive) - 2):
        victim = alive[random_delay.randrange(len(alive))]
        delay = random_delay.uniform(0.0, 0.4)
        group = dist.new_group(alive, backend="gloo", use_local_synchronization=True)
        transport = ProcessGroupTransport(group)
        dist.barrier(group=group)
        if rank == victim:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        outcome = _rearrange_once(transport, len(alive), seed + turn)
        if rank == victim:
            time.sleep(60)
        (Path(folder) / f"{seed}-{turn}-{rank}").write_bytes(pickle.dumps(outcome))
        alive.remove(victim)


def _rearrange_once(transport, size: int, seed: int) -> Outcome:
    topology = Topology(size, SLOTS)
    rng = np.random.default_rng(seed)
    num_logical = topology.num_slots - size
    old, new = (_placement(rng, num_logical, topology) for _ in range(2))
    first = transport.rank * SLOTS
    weights = ExpertWeights([{"w": _rows(layer, old[layer, first : first + SLOTS])} for layer in range(LAYERS)])
    row = weights.row_bytes(0)
    start, error = time.monotonic(), None
    try:
        plan = plan_moves(old, new, topology)
        rearrange(weights, plan, topology, transport, timeout=TIMEOUT, max_staging_bytes=14 * row)
    except RearrangeError as failure:
        error = failure
    seconds = time.monotonic() - start
    now = new if error is None else error.placement(old, new)
    wrong = []
    for layer, tensors in enumerate(weights.layers):
        right = _rows(layer, now[layer, first : first + SLOTS])
        wrong += [(layer, slot) for slot in range(SLOTS) if not torch.equal(tensors["w"][slot], right[slot])]
    done = range(LAYERS) if error is None else error.committed_layers
    committed = tuple(layer in done for layer in range(LAYERS))
    if error is None:
        return Outcome(committed, wrong, (), True, seconds, False)
    return Outcome(committed, wrong, error.lost_ranks, error.agreed, seconds, True)


def _placement(rng, num_logical: int, topology: Topology) -> np.ndarray:
    spare = rng.integers(0, num_logical, (LAYERS, topology.num_slots - num_logical))
    full = np.concatenate([np.tile(np.arange(num_logical), (LAYERS, 1)), spare], axis=1)
    return rng.permuted(full, axis=1).astype(np.int32)


def _rows(layer: int, experts) -> torch.Tensor:
    """Rows that say at every place which expert they are."""
    base = torch.arange(VALUES, dtype=torch.int32)
    return torch.stack([base + (layer * 1000 + int(expert)) * VALUES for expert in experts])


def kill_world(seed: int, folder: str) -> list[dict[int, Outcome]]:
    """Run one world. Returns, for each kill, the outcomes of the survivors of that kill by their rank."""
    run_ranks(kill_one_after_another, WORLD_SIZE, seed, folder, timeout=120, may_die=range(WORLD_SIZE))
    turns: list[dict[int, Outcome]] = [{} for _ in range(WORLD_SIZE - 2)]
    for file in Path(folder).glob(f"{seed}-*"):
        _, turn, rank = map(int, file.name.split("-"))
        turns[turn][rank] = pickle.loads(file.read_bytes())
    return turns


def check_kill(outcomes: dict[int, Outcome]) -> None:
    """All survivors hold whole layers, the same ones, and know it; none took longer than allowed."""
    assert all(not outcome.wrong for outcome in outcomes.values()), outcomes
    assert len({outcome.committed for outcome in outcomes.values()}) == 1, outcomes
    assert all(outcome.agreed and len(outcome.lost_ranks) <= 1 for outcome in outcomes.values()), outcomes
    assert max(outcome.seconds for outcome in outcomes.values()) < 1.5 * TIMEOUT + 1.0, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills: list[dict[int, Outcome]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.worlds):
            for outcomes in kill_world(seed, folder):
                check_kill(outcomes)
                kills.append(outcomes)
    done = [sum(next(iter(outcomes.values())).committed) for outcomes in kills]
    seconds = [max(outcome.seconds for outcome in outcomes.values()) for outcomes in kills]
    raised = sum(any(outcome.raised for outcome in outcomes.values()) for outcomes in kills)
    print(f"{len(kills)} kills, {raised} before the end; layers committed by then {sorted(done)}")
    print(f"survivors returned after {np.median(seconds):.3f} s (median), {max(seconds):.3f} s (longest)")


if __name__ == "__main__":
    main()
