"""Rebalance experts that are sharded over several processes: `python docs/examples/jax_processes.py --processes 2`.

Without `--process` this starts that many processes on this machine, each with its part of four CPU devices. On real
hosts start one process each, as for any `jax.distributed` program, and leave out the two lines about CPUs.
"""

import argparse
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eplb_core import Topology, moved_experts, plan_moves, rebalance, round_robin
from eplb_core.sharded import rearrange

NUM_LAYERS, NUM_LOGICAL, NUM_DEVICES, WIDTH = 3, 10, 4, 64


def expert_rows(placement: np.ndarray) -> np.ndarray:
    """int32 `[layers, slots, WIDTH]`: weights that say which layer and expert they belong to."""
    expert = 1000 * np.arange(len(placement), dtype=np.int32)[:, None] + placement
    return expert[:, :, None] * WIDTH + np.arange(WIDTH, dtype=np.int32)


def serve(process: int, processes: int, address: str) -> None:
    """One process: makes its own shards, plans like all others, moves, and looks at what its devices hold."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process, initialization_timeout=60)
    mesh = Mesh(np.asarray(jax.devices()), ("ep",))
    topology = Topology(ep_size=NUM_DEVICES, slots_per_rank=3, num_nodes=processes)
    sharding = NamedSharding(mesh, PartitionSpec(None, "ep"))

    held = round_robin(NUM_LAYERS, NUM_LOGICAL, topology)
    shape = NUM_LAYERS, topology.num_slots, WIDTH
    weights = jax.make_array_from_callback(shape, sharding, lambda index: expert_rows(held)[index])
    rng = np.random.default_rng(0)  # the same loads everywhere, as after a sum over all processes
    for window in range(3):
        load = rng.zipf(1.5, size=(NUM_LAYERS, NUM_LOGICAL)).clip(max=1000)
        new = rebalance(load, topology, previous=held)
        weights = rearrange(weights, plan_moves(held, new, topology), topology, mesh=mesh)
        for shard in weights.addressable_shards:
            np.testing.assert_array_equal(shard.data, expert_rows(new)[shard.index])
        moved = int(moved_experts(held, new, topology).sum())
        print(f"process {process}, window {window}: {moved} experts moved, all rows in place", flush=True)
        held = new
    jax.distributed.shutdown()


def start(processes: int, timeout: float = 240.0) -> int:
    """Start all processes on this machine; end them all when one fails or time is up."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, "--processes", str(processes), "--address", address]
    children = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
    deadline = time.monotonic() + timeout
    try:
        while not any(codes := [child.poll() for child in children]) and None in codes:
            if time.monotonic() > deadline:
                print(f"not done within {timeout} seconds", file=sys.stderr)
                return 1
            time.sleep(0.1)
        return int(any(codes))
    finally:
        for child in children:
            child.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, choices=[1, 2, 4])
    parser.add_argument("--process", type=int)
    parser.add_argument("--address")
    options = parser.parse_args()
    if options.process is None:
        sys.exit(start(options.processes))
    serve(options.process, options.processes, options.address)
