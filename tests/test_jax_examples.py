"""The JAX example: logits stay what they were while experts move, with router decisions recorded or drawn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.traces import FOLDER
from eplb_core import Topology, plan_moves, round_robin
from eplb_core.sharded import rearrange
from tests.devices import make_mesh

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "jax_moe.py"
TRACE = FOLDER / "esft_dsv2lite_token_ids.npz"


@pytest.mark.parametrize("trace", [None, TRACE])
def test_logits_stay_over_rebalances(trace):
    if trace is not None and not trace.exists():
        pytest.skip(f"no recorded router decisions at {trace}; set EPLB_TRACES to their folder")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *([] if trace is None else ["--trace", str(trace)])],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"balancedness (\S+) -> (\S+), (\d+) slots changed, logits by (\S+)", done.stdout)
    assert len(lines) == (6 if trace is None else 8)
    assert all(float(after) > float(before) for before, after, _, _ in lines)
    assert all(int(changed) > 0 and float(difference) == 0.0 for _, _, changed, difference in lines)
    assert "forward compiled 1 time(s)" in done.stdout


def test_the_documented_snippet_runs():
    code = (ROOT / "docs" / "jax.md").read_text().split("```python")[1].split("```")[0]
    mesh, rng = make_mesh(ep=8), np.random.default_rng(0)
    held = jnp.asarray(round_robin(2, 64, Topology(8, 9)))
    load = jnp.asarray(rng.integers(1, 1000, (2, 64)).astype(np.int32))
    experts = jax.device_put(np.asarray(held), NamedSharding(mesh, PartitionSpec(None, "ep")))
    names = {"jax": jax, "mesh": mesh, "load": load, "held": held, "experts": experts}
    exec(code, names)
    np.testing.assert_array_equal(names["experts"], names["new"])
    np.testing.assert_array_equal(names["maps"].physical_to_logical, names["new"])
    assert experts.is_deleted()


def test_the_example_notices_rows_in_wrong_places():
    """Moved rows with the maps of before change logits; with their own maps they do not."""
    spec = importlib.util.spec_from_file_location("jax_moe", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    mesh, (num_layers, num_logical) = make_mesh(ep=example.NUM_DEVICES), (2, 64)
    old = round_robin(num_layers, num_logical, example.TOPOLOGY)
    new = old[:, ::-1].copy()
    model, experts = example.make_model(mesh, num_layers, num_logical, old)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(example.BATCH, example.WIDTH)).astype(np.float32)
    ids = rng.integers(0, num_logical, (num_layers, example.BATCH, 3)).astype(np.int32)
    x, ids, *maps = jax.device_put(
        (x, ids, *(example.to_maps(p, num_logical) for p in (old, new))), NamedSharding(mesh, PartitionSpec())
    )
    step = jax.jit(lambda experts, maps: example.forward(mesh, model, experts, maps, x, ids)[0])
    before = np.asarray(step(experts, maps[0]))
    experts = rearrange(experts, plan_moves(old, new, example.TOPOLOGY), example.TOPOLOGY, mesh=mesh)
    assert not np.allclose(step(experts, maps[0]), before)
    np.testing.assert_array_equal(step(experts, maps[1]), before)
