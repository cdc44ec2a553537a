"""Transports: what NCCL would not forgive, partial gathers, and messages through host memory."""

import gc
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import Topology, plan_moves
from eplb_torch import (
    ExpertWeights,
    InProcessWorld,
    ProcessGroupTransport,
    Rearrangement,
    StagedTransport,
    TransportError,
    rearrange,
    reserve,
)
from eplb_torch.in_process import InProcessTransport
from tests.expert_rows import expert_layers, wrong_rows
from tests.multiprocess import run_ranks
from tests.test_execute import random_placement

TOPOLOGY = Topology(ep_size=4, slots_per_rank=6, num_nodes=2)
MAX_OPS = 64


class NcclRules(InProcessTransport):
    """Breaks where NCCL would hang or mix up rows.

    * Messages have no tags: per pair, the k-th sent in a call is the k-th received in the peer's same call, and both
      have the same size (checked by the in-process transport itself).
    * The first message comes after all ranks have joined a collective (`connect`).
    * At most `MAX_OPS` messages in one call.
    * One thread at a time; buffers are contiguous uint8, and stay as they are until the call ends.
    """

    def __init__(self, world, rank):
        super().__init__(world, rank)
        self.connected = False
        self.calls = 0
        self.busy = threading.Lock()

    def connect(self, timeout):
        self.connected = True
        payloads = self.gather(b"connect", timeout)
        assert payloads == [b"connect"] * self.size, "connect is a collective"

    def exchange(self, sends, recvs, timeout):
        assert self.busy.acquire(blocking=False), "two threads use one communicator"
        self.calls += 1
        ops = len(sends) + len(recvs)
        assert ops <= MAX_OPS, f"{ops} operations in one batch"
        assert self.connected or not ops, "messages before all ranks were connected"
        tensors = [tensor for _, tensor in (*sends, *recvs)]
        assert all(tensor.is_contiguous() and tensor.dtype == torch.uint8 for tensor in tensors)
        assert not {tensor.data_ptr() for _, tensor in sends} & {tensor.data_ptr() for _, tensor in recvs}
        before = [tensor.clone() for _, tensor in sends]
        super().exchange(sends, recvs, timeout)
        for (_, tensor), copy in zip(sends, before, strict=True):
            assert torch.equal(tensor, copy), "a buffer changed while it was sent"
        self.busy.release()


@pytest.mark.parametrize("staging_rows", [1, 8, 10**6])
@pytest.mark.parametrize("fan_out", ["direct", "node"])
def test_the_executor_keeps_to_the_rules_of_nccl(staging_rows, fan_out, monkeypatch):
    monkeypatch.setattr("eplb_torch.transaction.DIRECT_BYTES", 1)
    rng = np.random.default_rng(0)
    old, new = (random_placement(rng, 4, 17, TOPOLOGY) for _ in range(2))
    plan = plan_moves(old, new, TOPOLOGY, fan_out=fan_out)

    def run(inner):
        transport = NcclRules(inner.world, inner.rank)
        weights = ExpertWeights(expert_layers(old, TOPOLOGY, transport.rank))
        limit = staging_rows * weights.row_bytes(0)
        rearrange(weights, plan, TOPOLOGY, transport, timeout=10, max_staging_bytes=limit)
        return wrong_rows(list(weights.layers), new, TOPOLOGY, transport.rank), transport.calls

    results = InProcessWorld(4).run(run)
    assert [wrong for wrong, _ in results] == [[]] * 4
    assert len({calls for _, calls in results}) == 1


def test_the_worker_keeps_to_the_rules_of_nccl():
    rng = np.random.default_rng(1)
    old, new = (random_placement(rng, 4, 17, TOPOLOGY) for _ in range(2))

    def run(inner):
        weights = ExpertWeights(expert_layers(old, TOPOLOGY, inner.rank))
        transport = NcclRules(inner.world, inner.rank)
        Rearrangement(weights, plan_moves(old, new, TOPOLOGY), TOPOLOGY, transport, timeout=10).wait()
        return wrong_rows(list(weights.layers), new, TOPOLOGY, inner.rank)

    assert InProcessWorld(4).run(run) == [[]] * 4


def gather_without_one(rank: int):
    """Rank 1 is late by more than the timeout; the others are heard, and later calls are not confused."""
    transport = ProcessGroupTransport()
    first = transport.gather(bytes([rank]), 5.0)
    if rank == 1:
        time.sleep(2.0)
    start = time.monotonic()
    second = transport.gather(bytes([10 + rank]), 1.0)
    seconds = time.monotonic() - start
    dist.barrier()
    return first, second, seconds, transport.gather(bytes([20 + rank]), 5.0)


def test_a_late_rank_does_not_keep_others_from_being_heard():
    results = run_ranks(gather_without_one, 3, timeout=60)
    assert all(first == [b"\x00", b"\x01", b"\x02"] for first, _, _, _ in results)
    for rank in (0, 2):
        assert results[rank][1] == [b"\x0a", None, b"\x0c"]
        assert results[rank][2] < 2.0
    assert all(third == [b"\x14", b"\x15", b"\x16"] for _, _, _, third in results)


def exchange_in_vain(rank: int):
    """An exchange that one rank does not join, then one that all join."""
    transport = ProcessGroupTransport()
    buffer, error = torch.zeros(8, dtype=torch.uint8), ""
    if rank < 2:
        try:
            transport.exchange([], [(2, buffer)], 0.5)
        except TransportError as failure:
            error = str(failure)
    transport.gather(b"x", 5.0)
    fresh = torch.zeros(8, dtype=torch.uint8)
    sends = [(peer, torch.full((8,), 7, dtype=torch.uint8)) for peer in (0, 1)] if rank == 2 else []
    transport.exchange(sends, [(2, fresh)] if rank < 2 else [], 5.0)
    return error, fresh.tolist(), buffer.tolist()


def test_messages_after_a_failed_exchange_are_not_taken_for_earlier_ones():
    for error, fresh, buffer in run_ranks(exchange_in_vain, 3, timeout=60)[:2]:
        assert "ranks [2]" in error
        assert fresh == [7] * 8
        assert buffer == [0] * 8


def move_through_host_memory(rank: int):
    topology = Topology(2, 6)
    rng = np.random.default_rng(2)
    old = random_placement(rng, 3, 12, topology)
    new = np.roll(old, 6, axis=1)  # every slot takes a row from the other rank
    weights = ExpertWeights(expert_layers(old, topology, rank))
    transport = StagedTransport(dist.group.WORLD)
    staging = reserve(weights, topology, transport, timeout=5.0)
    capacity = staging.capacity
    plan = plan_moves(old, new, topology)
    report = rearrange(weights, plan, topology, transport, timeout=5.0, checksum=True, staging=staging)
    return wrong_rows(list(weights.layers), new, topology, rank), capacity == staging.capacity, report.bytes_received


def test_rows_travel_through_host_memory_and_reserved_memory_is_enough():
    for wrong, same_capacity, received in run_ranks(move_through_host_memory, 2, timeout=60):
        assert wrong == []
        assert same_capacity
        assert received > 0


def test_reserved_memory_is_enough_when_every_slot_changes():
    topology = Topology(2, 4)
    old = np.arange(8, dtype=np.int32)[None]
    plan = plan_moves(old, np.roll(old, 4, axis=1), topology)

    def run(transport):
        weights = ExpertWeights([{"w": torch.zeros(4, 50000)}])
        staging = reserve(weights, topology, transport, timeout=5.0)
        capacity = staging.capacity
        rearrange(weights, plan, topology, transport, timeout=5.0, staging=staging)
        return capacity == staging.capacity

    assert InProcessWorld(2).run(run) == [True, True]


def gather_unequal(rank: int):
    """Payloads of another length on one rank, as after a failure that it alone has noticed; then equal ones."""
    transport = ProcessGroupTransport()
    first = transport.gather(bytes(8 if rank == 1 else 3), 0.5)
    return first, transport.gather(bytes([rank]), 5.0)


def test_a_payload_of_another_length_is_not_heard_and_ends_no_process():
    results = run_ranks(gather_unequal, 3, timeout=60)
    assert [first for first, _ in results] == [
        [bytes(3), None, bytes(3)],
        [None, bytes(8), None],
        [bytes(3), None, bytes(3)],
    ]
    assert all(second == [b"\x00", b"\x01", b"\x02"] for _, second in results)


def waiting_threads() -> int:
    """Threads that wait for messages, once those that are done have ended."""
    deadline = time.monotonic() + 5.0
    while (count := sum(t.name == "eplb-wait" for t in threading.enumerate())) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def let_threads_end(rank: int):
    """A rank that is late; later the group's own timeout is over; in the end the transport is let go."""
    group = dist.new_group(list(range(3)), timeout=timedelta(seconds=2.0))
    transport = ProcessGroupTransport(group)
    transport.gather(bytes([rank]), 1.0)
    if rank == 1:
        time.sleep(1.0)
    transport.gather(bytes([rank]), 0.3)
    time.sleep(3.0)
    heard, during = transport.gather(bytes([rank]), 1.5), waiting_threads()
    del transport
    gc.collect()
    time.sleep(0.2)
    return heard, during, sum(t.name == "eplb-wait" for t in threading.enumerate())


def test_no_thread_is_left_behind_and_the_groups_timeout_closes_nothing():
    for heard, during, after in run_ranks(let_threads_end, 3, timeout=60):
        assert heard == [b"\x00", b"\x01", b"\x02"]
        assert during == 1
        assert after == 0


def miss_a_message(rank: int):
    """A message that never comes, as from a rank that has failed before it sent; the group's timeout is long over."""
    group = dist.new_group(list(range(3)), timeout=timedelta(seconds=2.0))
    transport, failed = ProcessGroupTransport(group), False
    transport.gather(bytes([rank]), 1.5)
    try:
        transport.exchange([], [] if rank == 1 else [(1, torch.zeros(8, dtype=torch.uint8))], 0.3)
    except TransportError:
        failed = True
    time.sleep(3.0)
    return failed, transport.gather(bytes([rank]), 1.5)


def test_a_message_that_never_comes_does_not_close_the_group_when_its_timeout_is_over():
    results = run_ranks(miss_a_message, 3, timeout=60)
    assert [failed for failed, _ in results] == [True, False, True]
    assert all(heard == [b"\x00", b"\x01", b"\x02"] for _, heard in results)
