"""One process of a world that shares a mesh: `python -m tests.sharded_worker PROCESS PROCESSES ADDRESS`."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from eplb_core import EplbError, Topology, plan_moves
from eplb_core.sharded import rearrange
from tests.devices import FIELDS, NUM_DEVICES, host_rows

TOPOLOGY = Topology(4, 3, num_nodes=2)
NUM_LAYERS = 4


def random_plan(seed: int, fan_out: str = "direct"):
    rng = np.random.default_rng(seed)
    experts = np.tile(np.r_[np.arange(10), 0, 1], (2, NUM_LAYERS, 1))
    return plan_moves(*rng.permuted(experts, axis=2).astype(np.int32), TOPOLOGY, fan_out=fan_out)


def place(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays of which this process makes only its own shards."""
    return {
        name: jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, FIELDS[name][2]), lambda index, array=array: array[index]
        )
        for name, array in rows.items()
    }


def check(weights: dict[str, jax.Array], rows: dict[str, np.ndarray]) -> None:
    """Fail unless every shard of this process holds the same bytes as its part of the rows."""
    for name, array in weights.items():
        for shard in array.addressable_shards:
            part = np.ascontiguousarray(rows[name][shard.index])
            assert np.asarray(shard.data).tobytes() == part.tobytes(), (name, shard.index)


def main(process: int, processes: int, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process, initialization_timeout=120)
    # The experts' axis is the outer one, so that it spans all processes.
    mesh = Mesh(np.asarray(jax.devices()).reshape(TOPOLOGY.ep_size, 2), ("ep", "tp"))
    rows = host_rows(NUM_LAYERS, TOPOLOGY.num_slots)
    weights = place(rows, mesh)
    layer = np.arange(NUM_LAYERS)[:, None]
    for seed in range(4):
        plan = random_plan(seed, fan_out=("direct", "node")[seed % 2])
        weights = rearrange(weights, plan, TOPOLOGY, mesh=mesh)
        rows = {name: array[layer, plan.source_slot] for name, array in rows.items()}
        check(weights, rows)
    print("moved")

    text = "no error"
    try:
        rearrange(weights, random_plan(seed=process == 1), TOPOLOGY, mesh=mesh)
    except EplbError as error:
        text = str(error)
    print("disagreed" if "must be called with the same plan" in text else text)
    check(weights, rows)
    plan = random_plan(9)
    check(rearrange(weights, plan, TOPOLOGY, mesh=mesh), {k: v[layer, plan.source_slot] for k, v in rows.items()})
    print("went on")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
