"""Serve a mixture-of-experts model under `jax.jit` and rebalance it online: `python docs/examples/jax_moe.py`.

The model is small and its weights are random; which experts each token goes to is recorded from a real router
(`--trace FILE.npz` with integer arrays `[tokens, layers, top_k]`, one per task), or drawn with a skew that changes.
Eight devices hold the experts; without accelerators eight CPU devices take their part. All that is decided is decided
on the device: load is counted, estimated, planned for, and turned into maps under `jax.jit`; only `sharded.rearrange`
looks at the plan. Each logit is the same bit for bit before and after.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eplb_core import ExpertMaps, Topology, balancedness, derive_maps, plan_moves, rebalance, round_robin
from eplb_core.load import sliding_window
from eplb_core.sharded import rearrange

NUM_DEVICES, SLOTS_PER_RANK, BATCH, WINDOW, WIDTH, HIDDEN, VOCABULARY = 8, 9, 128, 1024, 16, 32, 48
TOPOLOGY = Topology(NUM_DEVICES, SLOTS_PER_RANK)
BY_SLOT = PartitionSpec(None, "ep")
IN_SPECS = (PartitionSpec("ep"), PartitionSpec("ep"), PartitionSpec(), PartitionSpec())
ESTIMATOR = sliding_window(2)


class Model(NamedTuple):
    """What is replicated: `router [layers, WIDTH, logical]` and `head [WIDTH, VOCABULARY]`."""

    router: jax.Array
    head: jax.Array


def forward(mesh: Mesh, model: Model, experts: dict[str, jax.Array], maps: ExpertMaps, x: jax.Array, ids: jax.Array):
    """Logits `[tokens, VOCABULARY]`, and the load `[layers, logical]` of these tokens.

    Args:
        mesh: devices, along the axis `ep`.
        model: replicated parameters.
        experts: `up [layers, slots, WIDTH, HIDDEN]` and `down [layers, slots, HIDDEN, WIDTH]`, sharded by slot.
        maps: in force.
        x: `[tokens, WIDTH]`.
        ids: `[layers, tokens, top_k]` the experts that the router chose.
    """

    @partial(jax.shard_map, mesh=mesh, in_specs=IN_SPECS, out_specs=PartitionSpec())
    def serve(up, down, x, slots):
        """Every rank runs its slots, and gives what was asked of them; zeros are added from the others."""
        outputs = jax.nn.silu(jnp.einsum("tw,swh->sth", x, up)) @ down
        local = slots - jax.lax.axis_index("ep") * SLOTS_PER_RANK
        mine = (local >= 0) & (local < SLOTS_PER_RANK)
        token = jnp.arange(x.shape[0])[:, None]
        chosen = outputs[jnp.clip(local, 0, SLOTS_PER_RANK - 1), token]
        return jax.lax.psum(jnp.where(mine[..., None], chosen, 0.0), "ep")

    def layer(x, of_layer):
        router, up, down, slots_of, copies, ids = of_layer
        gates = jnp.take_along_axis(jax.nn.softmax(x @ router), ids, axis=1)
        copy = jnp.arange(x.shape[0])[:, None] % copies[ids]
        outputs = serve(up, down, x, slots_of[ids, copy])
        load = jnp.zeros(copies.shape, jnp.int32).at[ids].add(1)
        return x + jnp.sum(gates[..., None] * outputs, axis=1), load

    per_layer = model.router, experts["up"], experts["down"], maps.logical_to_physical, maps.replica_count, ids
    x, load = jax.lax.scan(layer, x, per_layer)
    return x @ model.head, load


@jax.jit
def plan(state, load: jax.Array, held: jax.Array):
    """Take in a window's load; the new placement, the moves to it, and its maps."""
    state = ESTIMATOR.update(state, load)
    new = rebalance(ESTIMATOR.estimate(state), TOPOLOGY, previous=held)
    return state, new, plan_moves(held, new, TOPOLOGY), to_maps(new, load.shape[1])


def to_maps(placement, num_logical: int) -> ExpertMaps:
    """Maps whose shapes do not depend on the placement."""
    return derive_maps(placement, num_logical, max_replicas=NUM_DEVICES)


def recorded_ids(path: str) -> np.ndarray:
    """`[layers, tokens, top_k]` of all tasks of a trace, two windows of each."""
    with np.load(path, allow_pickle=False) as file:
        tasks = [file[name] for name in file.files if file[name].ndim == 3]
    return np.concatenate([task[: 2 * WINDOW] for task in tasks]).transpose(1, 0, 2).astype(np.int32)


def drawn_ids(num_layers: int = 4, num_logical: int = 64, top_k: int = 4, num_windows: int = 6) -> np.ndarray:
    """The same from skewed popularities that change every two windows."""
    rng = np.random.default_rng(0)
    windows = []
    for window in range(num_windows):
        if window % 2 == 0:
            popularity = rng.normal(size=(num_layers, 1, num_logical))
        scores = popularity + rng.gumbel(size=(num_layers, WINDOW, num_logical))
        windows.append(np.argsort(-scores, axis=2)[:, :, :top_k])
    return np.concatenate(windows, axis=1).astype(np.int32)


def make_model(mesh: Mesh, num_layers: int, num_logical: int, placement: np.ndarray):
    """Random parameters; slots that hold the same expert hold the same weights."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape, scale=shape[-2] ** -0.5).astype(np.float32)

    logical = {
        "up": normal(num_layers, num_logical, WIDTH, HIDDEN),
        "down": normal(num_layers, num_logical, HIDDEN, WIDTH),
    }
    layer, sharding = np.arange(num_layers)[:, None], NamedSharding(mesh, BY_SLOT)
    experts = {name: jax.device_put(rows[layer, placement], sharding) for name, rows in logical.items()}
    model = Model(normal(num_layers, WIDTH, num_logical), normal(WIDTH, VOCABULARY))
    return jax.device_put(model, NamedSharding(mesh, PartitionSpec())), experts


def run(ids: np.ndarray) -> bool:
    """Serve all windows, rebalancing after each; whether all logits stayed the same."""
    mesh = Mesh(np.asarray(jax.devices()[:NUM_DEVICES]), ("ep",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    num_layers, num_logical = ids.shape[0], 64
    held = jax.device_put(round_robin(num_layers, num_logical, TOPOLOGY), replicated)
    model, experts = make_model(mesh, num_layers, num_logical, np.asarray(held))
    traced = []

    @jax.jit
    def step(*arguments):
        traced.append(len(traced))
        return forward(mesh, *arguments)

    maps = jax.device_put(to_maps(np.asarray(held), num_logical), replicated)
    state = jax.device_put(ESTIMATOR.init(num_layers, num_logical), replicated)
    x = jax.device_put(np.random.default_rng(2).normal(size=(BATCH, WIDTH)).astype(np.float32), replicated)

    same = True
    for window in range(ids.shape[1] // WINDOW):
        batches = ids[:, window * WINDOW : (window + 1) * WINDOW].reshape(num_layers, -1, BATCH, ids.shape[2])
        load = sum(step(model, experts, maps, x, batches[:, i])[1] for i in range(batches.shape[1]))
        before, _ = step(model, experts, maps, x, batches[:, -1])
        state, new, moves, new_maps = plan(state, load, held)
        experts = rearrange(experts, moves, TOPOLOGY, mesh=mesh)
        after, _ = step(model, experts, new_maps, x, batches[:, -1])
        same &= bool((before == after).all())
        was, now = (float(balancedness(placement, load, TOPOLOGY).mean()) for placement in (held, new))
        changed = int((moves.source_slot != jnp.arange(TOPOLOGY.num_slots)).sum())
        difference = float(jnp.abs(after - before).max())
        print(f"window {window}: balancedness {was:.3f} -> {now:.3f}, {changed} slots changed, logits by {difference}")
        held, maps = new, new_maps
    print(f"forward compiled {len(traced)} time(s)")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help="router decisions, an .npz of [tokens, layers, top_k] arrays")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    unchanged = run(recorded_ids(options.trace) if options.trace else drawn_ids())
    raise SystemExit(0 if unchanged else "logits changed")
