"""The helper that all multi-process tests rely on: it reports what happened, and it ends."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.multiprocess import RankError, run_ranks


def add_up(rank, term):
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return total.item() + term, torch.get_num_threads(), rank


def misbehave(rank, how):
    if rank == 1:
        match how:
            case "raise":
                raise ValueError("told to")
            case "warn":
                warnings.warn("told to", stacklevel=1)
            case "die":
                os._exit(3)
            case "hang":
                time.sleep(60)
    if how == "hang":
        dist.barrier()
    return rank


def test_results_come_in_rank_order():
    assert run_ranks(add_up, 3, 10) == [(13, 1, 0), (13, 1, 1), (13, 1, 2)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1: Traceback(.|\n)*ValueError: told to"),
        ("warn", "rank 1: Traceback(.|\n)*UserWarning: told to"),
        ("die", "rank 1: died with exit code 3"),
        ("hang", r"(?s)rank 0: .*dist\.barrier\(\).*ranks \[1\] of 2 were not done in time"),
    ],
)
def test_failures_name_the_rank_and_end_the_world(how, message):
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(misbehave, 2, how, timeout=5 if how == "hang" else 60)
    assert time.monotonic() - start < 30


def test_a_rank_may_be_meant_to_die():
    assert run_ranks(misbehave, 2, "die", may_die=[1]) == [0, None]
