"""A rank under torchrun: goes on from the last snapshot, whatever the size of the group; see `test_restart.py`."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eplb_core import EMPTY, Topology, round_robin
from eplb_core.elastic.refit import refit
from eplb_core.snapshot import load_snapshot, save_snapshot
from eplb_torch import DeviceMaps, ExpertBalancer, ExpertWeights, LiveModel, ProcessGroupTransport
from eplb_torch.reload import reload_experts
from tests.expert_rows import expert_layers, expert_row, wrong_rows

LAYERS, LOGICAL, SLOTS = 3, 8, 5
BALANCER = {"use_async": False, "step_interval": 8, "window_size": 8, "timeout": 10.0}


def join_group() -> None:
    """Meet in the agent's store. It may be the one of the attempt before (torch 2.13), so its keys must differ."""
    host, port, attempt = (os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    store = dist.PrefixStore(f"attempt-{attempt}", dist.TCPStore(host, int(port), is_master=False))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))


def main(folder: Path, steps: int, die_after: int) -> None:
    torch.set_num_threads(1)
    join_group()
    rank, topology = dist.get_rank(), Topology(dist.get_world_size(), SLOTS)
    path, first = folder / "snapshot.npz", None
    placement = round_robin(LAYERS, LOGICAL, topology)
    if path.exists():
        first = load_snapshot(path)
        placement = refit(first.physical_to_logical, np.ones((LAYERS, LOGICAL)), first.topology, topology)
    vacant = np.full_like(placement, EMPTY)
    weights = ExpertWeights(expert_layers(vacant, topology, rank))
    reload_experts(weights, placement, topology, rank, lambda layer, name, e: expert_row(layer, e, name))
    model = LiveModel(weights, DeviceMaps(placement, LOGICAL), topology, placement)
    balancer = ExpertBalancer(model, ProcessGroupTransport(dist.new_group()), BALANCER)
    if first is not None and first.topology == topology:
        balancer.restore(first)
    for step in range(steps):
        load = torch.ones(LAYERS, LOGICAL, dtype=torch.int64)
        load[:, 3] = 90
        if balancer.step(load) and rank == 0:
            save_snapshot(path, balancer.snapshot())
        total = torch.ones(1)
        dist.all_reduce(total)
        if step == die_after and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    balancer.close()
    lines = {
        "attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "resumed": None if first is None else first.physical_to_logical.tolist(),
        "started": placement.tolist(),
        "ended": model.placement.tolist(),
        "epoch": balancer.snapshot().epoch,
        "wrong": wrong_rows(list(weights.layers), model.placement, topology, rank),
    }
    (folder / f"{topology.ep_size}-{rank}.json").write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
