"""Ranks that die, hang, or send damaged bytes, as real processes on Gloo: nothing hangs, no layer is half new."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch.distributed as dist

from eplb_core import Topology, plan_moves
from eplb_torch import ExpertWeights, ProcessGroupTransport, RearrangeError, rearrange
from tests.expert_rows import expert_layers, wrong_rows
from tests.kills import check_kill, kill_world
from tests.multiprocess import run_ranks
from tests.test_execute import random_placement

TOPOLOGY = Topology(ep_size=3, slots_per_rank=5)


def test_survivors_of_a_kill_hold_whole_layers_and_agree(tmp_path):
    for seed in range(2):
        for outcomes in kill_world(seed, str(tmp_path)):
            check_kill(outcomes)


class Faulty(ProcessGroupTransport):
    """Damages a bit of its first message of rows, or fails there."""

    def __init__(self, group, fault: str):
        super().__init__(group)
        self.fault = fault

    def exchange(self, sends, recvs, timeout):
        fault, self.fault = self.fault, ""
        if fault == "corrupt" and sends:
            damaged = sends[0][1].clone()
            damaged[0] ^= 1
            sends = [(sends[0][0], damaged), *sends[1:]]
        if fault == "raise":
            raise RuntimeError("told to")
        if fault == "hang":
            # Longer than its peers wait for it.
            time.sleep(6)
            os._exit(0)
        if fault == "pause":
            # Stopped as by a debugger: sockets stay open, and it goes on when its peers have given up.
            subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        super().exchange(sends, recvs, timeout)


def fail_and_resume(rank: int, fault: str):
    """One fault on rank 1, then, where all ranks live on, the same plan again on the same group."""
    rng = np.random.default_rng(3)
    old, new = (random_placement(rng, 3, 11, TOPOLOGY) for _ in range(2))
    plan = plan_moves(old, new, TOPOLOGY)
    weights = ExpertWeights(expert_layers(old, TOPOLOGY, rank))
    transport = Faulty(dist.group.WORLD, fault if rank == 1 else "")
    start, checksum = time.monotonic(), fault == "corrupt"
    with pytest.raises(RearrangeError) as caught:
        rearrange(weights, plan, TOPOLOGY, transport, timeout=2.0, checksum=checksum)
    seconds = time.monotonic() - start
    held = caught.value.placement(old, new)
    wrong = wrong_rows(list(weights.layers), held, TOPOLOGY, rank)
    if fault in ("corrupt", "raise"):
        rearrange(weights, plan_moves(held, new, TOPOLOGY), TOPOLOGY, transport, timeout=5.0, checksum=checksum)
        wrong += wrong_rows(list(weights.layers), new, TOPOLOGY, rank)
    error = caught.value
    return error.committed_layers, error.lost_ranks, error.agreed, wrong, seconds, str(error)


@pytest.mark.parametrize("fault", ["corrupt", "raise", "hang", "pause"])
def test_a_fault_leaves_every_layer_old_and_all_survivors_agree(fault):
    results = run_ranks(fail_and_resume, 3, fault, timeout=60, may_die=[1])
    for rank in (0, 2):
        committed, lost, agreed, wrong, seconds, text = results[rank]
        assert (committed, wrong, agreed) == ((), [], True)
        assert seconds < 1.5 * 2.0 + 1.0
        assert lost == (() if fault in ("corrupt", "raise") else (1,)), text
    if fault == "corrupt":
        assert any("arrived damaged" in result[5] for result in results)
    if fault == "pause":
        # It finds out that the others went on without it, and says that it cannot speak for them.
        committed, lost, _, wrong, _, _ = results[1]
        assert (committed, wrong) == ((), [])
        assert set(lost) == {0, 2}


def silent_corruption(rank: int):
    """Without checksums the same damage is not noticed: what the option is for."""
    rng = np.random.default_rng(3)
    old, new = (random_placement(rng, 3, 11, TOPOLOGY) for _ in range(2))
    weights = ExpertWeights(expert_layers(old, TOPOLOGY, rank))
    transport = Faulty(dist.group.WORLD, "corrupt" if rank == 1 else "")
    rearrange(weights, plan_moves(old, new, TOPOLOGY), TOPOLOGY, transport, timeout=5.0)
    return wrong_rows(list(weights.layers), new, TOPOLOGY, rank)


def test_without_checksums_damage_goes_unnoticed():
    assert sum(len(wrong) for wrong in run_ranks(silent_corruption, 3, timeout=60)) == 1
