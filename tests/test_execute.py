"""Rearrangement between real processes on Gloo, and what happens when ranks do not agree or do not answer."""

import time

import numpy as np
import pytest
import torch

from eplb_core import EMPTY, EplbError, Topology, apply_moves, plan_moves, round_robin
from eplb_torch import ExpertWeights, InProcessWorld, ProcessGroupTransport, RearrangeError, rearrange
from eplb_torch.in_process import InProcessTransport
from tests.expert_rows import expert_layers, wrong_rows
from tests.multiprocess import run_ranks

TOPOLOGY = Topology(ep_size=4, slots_per_rank=5, num_nodes=2)


def random_placement(rng, num_layers: int, num_logical: int, topology: Topology) -> np.ndarray:
    spare = rng.integers(0, num_logical, (num_layers, topology.num_slots - num_logical))
    full = np.concatenate([np.tile(np.arange(num_logical), (num_layers, 1)), spare], axis=1)
    return rng.permuted(full, axis=1).astype(np.int32)


def follow_random_placements(rank: int, seed: int):
    """Rearrange again and again; return the first wrong rows, and the reports."""
    rng = np.random.default_rng(seed)
    transport = ProcessGroupTransport()
    held = random_placement(rng, 3, 13, TOPOLOGY)
    weights = ExpertWeights(expert_layers(held, TOPOLOGY, rank))
    reports = []
    for turn in range(12):
        new = random_placement(rng, 3, 13, TOPOLOGY)
        if turn % 3 == 2:
            spare = new == new[:, :1]
            spare[:, 0] = False
            new = np.where(spare, np.int32(EMPTY), new)
        plan = plan_moves(held, new, TOPOLOGY, fan_out="node" if turn % 2 else "direct")
        staging = 1 if turn % 4 == 3 else 2**20
        reports.append(rearrange(weights, plan, TOPOLOGY, transport, timeout=20, max_staging_bytes=staging, epoch=turn))
        if wrong := wrong_rows(list(weights.layers), new, TOPOLOGY, rank):
            return wrong, reports
        held = new
    return [], reports


@pytest.mark.parametrize("seed", [0, 1])
def test_every_slot_holds_its_expert_after_random_rearrangements(seed):
    results = run_ranks(follow_random_placements, 4, seed, timeout=90)
    assert [wrong for wrong, _ in results] == [[]] * 4
    turns = list(zip(*(reports for _, reports in results), strict=True))
    assert sum(report.bytes_sent > 0 for turn in turns for report in turn) > 30
    for index, turn in enumerate(turns):
        assert sum(report.bytes_sent for report in turn) == sum(report.bytes_received for report in turn)
        assert {report.committed_layers for report in turn} == {(0, 1, 2)}
        if index % 4 != 3:
            # One message per rank pair, counted by its sender and its receiver; relayed rows make one more.
            assert sum(report.p2p_ops for report in turn) <= 2 * 4 * 3 * (1 + index % 2)
        assert all((report.peak_staging_bytes > 0) >= (report.bytes_received > 0) for report in turn)


def plan_of(new) -> tuple:
    old = round_robin(len(new), 13, TOPOLOGY)
    return old, plan_moves(old, new, TOPOLOGY)


def disagree(rank: int, what: str):
    rng = np.random.default_rng(0)
    old, plan = plan_of(random_placement(rng, 2, 13, TOPOLOGY))
    layers, epoch = expert_layers(old, TOPOLOGY, rank), 7
    if rank == 2 and what == "plan":
        plan = plan._replace(source_slot=plan.source_slot[:, ::-1].copy())
    if rank == 2 and what == "epoch":
        epoch = 8
    if rank == 2 and what == "tensor layout":
        layers[1]["gate"] = layers[1]["gate"].double()
    weights = ExpertWeights(layers)
    with pytest.raises(RearrangeError, match=f"'{what}': ") as caught:
        rearrange(weights, plan, TOPOLOGY, ProcessGroupTransport(), timeout=10, epoch=epoch)
    assert caught.value.committed_layers == ()
    assert caught.value.uncommitted_layers == (0, 1)
    return [] if what == "tensor layout" else wrong_rows(list(weights.layers), old, TOPOLOGY, rank)


def disagree_about_everything(rank: int):
    return [disagree(rank, what) for what in ("plan", "epoch", "tensor layout")]


def test_ranks_that_disagree_all_raise_and_nothing_has_moved():
    assert run_ranks(disagree_about_everything, 4, timeout=60) == [[[], [], []]] * 4


def lose_a_rank(rank: int):
    old, plan = plan_of(random_placement(np.random.default_rng(1), 2, 13, TOPOLOGY))
    if rank == 3:
        time.sleep(6)  # takes no part
        return None
    weights = ExpertWeights(expert_layers(old, TOPOLOGY, rank))
    start = time.monotonic()
    with pytest.raises(RearrangeError):
        rearrange(weights, plan, TOPOLOGY, ProcessGroupTransport(), timeout=2)
    return time.monotonic() - start, wrong_rows(list(weights.layers), old, TOPOLOGY, rank)


def test_a_rank_that_takes_no_part_ends_in_an_error_within_the_timeout():
    for result in run_ranks(lose_a_rank, 4, timeout=60)[:3]:
        assert result is not None
        seconds, wrong = result
        assert seconds < 5
        assert wrong == []


def on_threads(world, function, *args):
    results = world.run(function, *args)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_one_row_at_a_time_is_enough_memory_for_local_cycles():
    topology = Topology(ep_size=1, slots_per_rank=4)
    old, new = np.asarray([[0, 1, 2, 3]]), np.asarray([[1, 0, 3, 2]])
    weights = ExpertWeights(expert_layers(old, topology, 0))
    plan = plan_moves(old, new, topology)
    (report,) = on_threads(InProcessWorld(1), lambda t: rearrange(weights, plan, topology, t, timeout=5))
    assert wrong_rows(list(weights.layers), new, topology, 0) == []
    assert report.peak_staging_bytes == weights.row_bytes(0)
    assert report.p2p_ops == report.bytes_sent == report.bytes_received == 0


def test_a_plan_that_changes_nothing_sends_nothing():
    old = round_robin(2, 13, TOPOLOGY)
    plan = plan_moves(old, old, TOPOLOGY)

    def run(transport):
        weights = ExpertWeights(expert_layers(old, TOPOLOGY, transport.rank))
        report = rearrange(weights, plan, TOPOLOGY, transport, timeout=5)
        return report, wrong_rows(list(weights.layers), old, TOPOLOGY, transport.rank)

    for report, wrong in on_threads(InProcessWorld(4), run):
        assert (report.p2p_ops, report.bytes_sent, report.peak_staging_bytes, wrong) == (0, 0, 0, [])


def test_staging_is_bounded_by_groups_of_layers():
    rng = np.random.default_rng(3)
    old, new = (random_placement(rng, 6, 13, TOPOLOGY) for _ in range(2))
    plan = plan_moves(old, new, TOPOLOGY)

    def run(transport, limit):
        weights = ExpertWeights(expert_layers(old, TOPOLOGY, transport.rank))
        report = rearrange(weights, plan, TOPOLOGY, transport, timeout=5, max_staging_bytes=limit)
        assert wrong_rows(list(weights.layers), new, TOPOLOGY, transport.rank) == []
        return report

    for limit in (4000, 8000, 2**30):
        reports = on_threads(InProcessWorld(4), run, limit)
        assert max(report.peak_staging_bytes for report in reports) <= limit


def test_a_layer_that_stops_between_two_parts_is_named_and_served_as_told():
    """Two independent swaps in each layer, memory for one of them, and a failure in the fourth part."""
    topology = Topology(ep_size=2, slots_per_rank=4)
    old = np.tile(np.arange(8), (2, 1))
    new = np.tile([4, 1, 2, 7, 0, 5, 6, 3], (2, 1))
    parts_left = {0: 4, 1: 4}

    class Failing(InProcessTransport):
        def exchange(self, sends, recvs, timeout):
            parts_left[self.rank] -= 1
            if parts_left[self.rank] == 0:
                raise RuntimeError("told to")
            super().exchange(sends, recvs, timeout)

    def run(transport):
        transport = Failing(transport.world, transport.rank)
        weights = ExpertWeights(expert_layers(old, topology, transport.rank))
        limit = weights.row_bytes(0) + 64
        with pytest.raises(RearrangeError) as caught:
            rearrange(weights, plan_moves(old, new, topology), topology, transport, timeout=5, max_staging_bytes=limit)
        held = caught.value.placement(old, new)
        return caught.value, held, wrong_rows(list(weights.layers), held, topology, transport.rank)

    results = on_threads(InProcessWorld(2), run)
    for error, held, wrong in results:
        assert (error.committed_layers, error.uncommitted_layers, error.split_layers) == ((0,), (1,), (1,))
        assert held[0].tolist() == new[0].tolist()
        changed = (held[1] != old[1]).nonzero()[0].tolist()
        assert changed in ([0, 4], [3, 7])
        assert sorted(held[1].tolist()) == list(range(8))
        assert wrong == []
        assert "Partly committed: [1]" in str(error)


def test_apply_moves_is_the_meaning():
    """The checksums of all rows, moved by the core, are those of the rows moved by the executor."""
    rng = np.random.default_rng(4)
    old, new = (random_placement(rng, 2, 13, TOPOLOGY) for _ in range(2))
    plan = plan_moves(old, new, TOPOLOGY)

    def run(transport):
        weights = ExpertWeights(expert_layers(old, TOPOLOGY, transport.rank))
        before = [layer["up.weight"].double().sum((1, 2)) for layer in weights.layers]
        rearrange(weights, plan, TOPOLOGY, transport, timeout=5)
        return torch.stack(before), torch.stack([layer["up.weight"].double().sum((1, 2)) for layer in weights.layers])

    before, after = (torch.cat(part, dim=1).numpy() for part in zip(*on_threads(InProcessWorld(4), run), strict=True))
    np.testing.assert_array_equal(apply_moves(before, plan), after)


REFUSED = {
    "layers": (Topology(1, 4), np.asarray([[0, 1, 2, 3]] * 2), r"plan \(2, 4\), layers=1"),
    "slots": (Topology(1, 5), np.asarray([[0, 1, 2, 3, 4]]), r"slots_per_rank 5 and 4"),
    "ranks": (Topology(2, 4), np.asarray([list(range(8))]), r"ep_size 2 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_sent(case):
    topology, old, message = REFUSED[case]
    weights = ExpertWeights([{"w": torch.zeros(4, 2)}])
    with pytest.raises(EplbError, match=message):
        rearrange(weights, plan_moves(old, old, topology), topology, InProcessWorld(1).transport(0), timeout=5)


def test_a_transport_needs_a_process_group():
    with pytest.raises(EplbError, match="init_process_group"):
        ProcessGroupTransport()
