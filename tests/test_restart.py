"""Groups that end as a whole and start again, as torchrun does it: the live placement goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eplb_core import EplbError, Topology, check_placement, moved_experts, round_robin
from eplb_core.elastic.refit import refit
from tests.restart_worker import LAYERS, LOGICAL, SLOTS

ROOT = Path(__file__).parent.parent


def torchrun(folder, ranks, steps, die_after):
    """What each rank wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += [str(ROOT / "tests/restart_worker.py"), str(folder), str(steps), str(die_after)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def test_a_restart_after_a_kill_goes_on_with_the_placement_in_force_and_another_group_with_most_of_it(tmp_path):
    before = torchrun(tmp_path, 3, steps=60, die_after=40)
    for rank in before:
        assert (rank["attempt"], rank["wrong"]) == (1, [])
        assert rank["started"] == rank["resumed"] != round_robin(LAYERS, LOGICAL, Topology(3, SLOTS)).tolist()
        assert rank["epoch"] >= 1
        assert {key: rank[key] for key in ("started", "ended", "epoch")} == {
            key: before[0][key] for key in ("started", "ended", "epoch")
        }
    after = torchrun(tmp_path, 2, steps=1, die_after=-1)
    for rank in after:
        assert (rank["attempt"], rank["wrong"]) == (0, [])
        check_placement(np.asarray(rank["started"]), Topology(2, SLOTS), LOGICAL)
        same = np.asarray(rank["started"]) == np.asarray(rank["resumed"])[:, : 2 * SLOTS]
        assert same.mean() > 0.5


@pytest.mark.parametrize(("old_ranks", "new_ranks", "slots"), [(4, 4, 3), (4, 3, 4), (4, 3, 3), (3, 5, 4), (4, 3, 6)])
def test_refit_keeps_what_ranks_of_both_groups_hold_but_for_what_must_be_taken_over(old_ranks, new_ranks, slots):
    rng, num_logical = np.random.default_rng(old_ranks * 7 + slots), 9
    old, new = Topology(old_ranks, 3), Topology(new_ranks, slots)
    spare = rng.integers(0, num_logical, (4, old.num_slots - num_logical))
    held = rng.permuted(np.concatenate([np.tile(np.arange(num_logical), (4, 1)), spare], axis=1), axis=1)
    load = rng.integers(1, 90, (4, num_logical))
    placement = refit(held, load, old, new)
    check_placement(placement, new, num_logical)
    both = min(old_ranks, new_ranks)
    kept = held.reshape(4, old_ranks, 3)[:, :both]
    now = placement.reshape(4, new_ranks, slots)[:, :both, :3]
    orphans = sum(len(set(range(num_logical)) - set(row.ravel().tolist())) for row in kept)
    # Each orphan takes one slot, maybe one of these; balance a tenth of all transfers more.
    fresh = np.full((4, new_ranks, slots), -1)
    fresh[:, :both, :3] = kept
    moved = int(moved_experts(fresh.reshape(4, -1), placement, new).sum())
    assert (now != kept).sum() <= orphans + 0.1 * moved
    if (old_ranks, slots) == (new_ranks, 3):
        np.testing.assert_array_equal(placement, held)


def test_refit_refuses_what_does_not_fit():
    held, load = round_robin(1, 6, Topology(3, 2)), np.ones((1, 6))
    with pytest.raises(EplbError, match="slot for every expert.*slots_per_rank >= 3"):
        refit(held, load, Topology(3, 2), Topology(2, 2))
    with pytest.raises(EplbError, match="at least the ranks"):
        refit(held, load, Topology(3, 2), Topology(6, 1))
