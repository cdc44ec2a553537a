"""Our executor beside vLLM's, on the same weights and placements, as real processes on Gloo.

`python -m benchmarks.executor`. vLLM's own code runs: `rearrange_expert_weights_inplace` with its Gloo communicator, as
released. Repeats are interleaved, so that what else the machine does hits all alike; times are those of the slowest
rank, and medians of the repeats.
"""

import argparse
import contextlib
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.page import printed
from benchmarks.peers import VLLM
from benchmarks.released import fetch, load
from eplb_core import Topology, plan_moves, schedule_rounds
from eplb_torch import ExpertWeights, ProcessGroupTransport, Rearrangement, rearrange, reserve
from tests.multiprocess import run_ranks

TIMEOUT = 60.0


class Case(NamedTuple):
    """Bytes of each tensor of one expert, and the sizes of the model."""

    name: str
    tensors: tuple[int, ...]
    layers: int
    slots_per_rank: int
    num_logical: int
    repeats: int


CASES = (
    Case("small experts, 24 KiB", (16384, 8192, 128), 8, 16, 48, 15),
    Case("large experts, 1.1 MiB", (768 * 1024, 384 * 1024, 4096), 4, 12, 40, 9),
)


def placements(case: Case, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Two unrelated placements: nearly every slot changes, as under a planner that starts from nothing."""
    rng = np.random.default_rng(0)
    spare = topology.num_slots - case.num_logical
    rows = [np.r_[np.arange(case.num_logical), rng.choice(case.num_logical, spare)] for _ in range(2 * case.layers)]
    both = np.stack([rng.permutation(row) for row in rows]).astype(np.int32)
    return both[: case.layers], both[case.layers :]


def expert_tensors(case: Case, placement: np.ndarray, topology: Topology, rank: int) -> list[dict[str, torch.Tensor]]:
    """int64 tensors whose values are the expert's id, so that any mix-up shows."""
    own = torch.from_numpy(placement).reshape(case.layers, topology.ep_size, -1)[:, rank].long()
    return [
        {f"t{i}": ids[:, None].expand(-1, size // 8).contiguous() for i, size in enumerate(case.tensors)} for ids in own
    ]


class Ours:
    """`rearrange`, with memory reserved once as vLLM's is."""

    def __init__(self, layers, topology: Topology, **options: Any):
        self.weights, self.topology = ExpertWeights(layers), topology
        self.transport, self.options = ProcessGroupTransport(), options
        self.staging = reserve(self.weights, topology, self.transport, timeout=TIMEOUT, max_staging_bytes=2**27)

    def run(self, old: np.ndarray, new: np.ndarray):
        plan = plan_moves(old, new, self.topology)
        options = {"max_staging_bytes": 2**27, "staging": self.staging, **self.options}
        return rearrange(self.weights, plan, self.topology, self.transport, timeout=TIMEOUT, **options)


class Theirs:
    """vLLM's executor with its Gloo communicator."""

    def __init__(self, layers):
        names = ("eplb_utils", "eplb_communicator", "migration_scheduler", "rebalance_execute")
        modules = load(fetch(*VLLM), [f"vllm.distributed.eplb.{name}" for name in names])
        _, communicator, _, self.execute = modules
        communicator.PIN_MEMORY = False
        for module in modules:
            module.device_stream = contextlib.nullcontext
        stream: Any = SimpleNamespace(synchronize=lambda: None)
        self.communicator = communicator.TorchDistGlooStagedEplbCommunicator(dist.group.WORLD, stream)
        self.weights = [list(layer.values()) for layer in layers]
        self.buffer = [torch.empty_like(tensor) for tensor in self.weights[0]]
        self.ops = 0
        communicator.batch_isend_irecv = self._count(communicator.batch_isend_irecv)

    def _count(self, send):
        def counted(ops):
            self.ops += len(ops)
            return send(ops)

        return counted

    def run(self, old: np.ndarray, new: np.ndarray) -> None:
        self.ops = 0
        maps = (torch.from_numpy(x.astype(np.int64)) for x in (old, new))
        self.execute.rearrange_expert_weights_inplace(
            *maps, self.weights, self.buffer, dist.group.WORLD, self.communicator
        )


class Plain:
    """The same bytes between the same ranks, as one message per pair from and into memory that is there: the bound."""

    def __init__(self, case: Case, old: np.ndarray, new: np.ndarray, topology: Topology, rank: int):
        schedule = schedule_rounds(plan_moves(old, new, topology), topology)
        size = sum(case.tensors)
        sent, received = (
            np.bincount(peer[me == rank], minlength=topology.ep_size) * size
            for me, peer in ((schedule.src_rank, schedule.dst_rank), (schedule.dst_rank, schedule.src_rank))
        )
        self.sends, self.recvs = ([torch.zeros(n, dtype=torch.uint8) for n in sizes] for sizes in (sent, received))

    def run(self, *_: Any) -> None:
        works = [dist.irecv(buffer, peer) for peer, buffer in enumerate(self.recvs) if buffer.numel()]
        works += [dist.isend(buffer, peer) for peer, buffer in enumerate(self.sends) if buffer.numel()]
        for work in works:
            work.wait()


def compare(rank: int, case: Case) -> dict[str, Any]:
    """Move to and fro with each executor in turn."""
    topology = Topology(dist.get_world_size(), case.slots_per_rank)
    old, new = placements(case, topology)
    runners = {
        "ours": Ours(expert_tensors(case, old, topology, rank), topology),
        "ours, checksums": Ours(expert_tensors(case, old, topology, rank), topology, checksum=True),
        "vLLM": Theirs(expert_tensors(case, old, topology, rank)),
        "plain Gloo": Plain(case, old, new, topology, rank),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    report = None
    for turn in range(2 * case.repeats + 1):
        there, back = (old, new) if turn % 2 == 0 else (new, old)
        for name, runner in runners.items():
            dist.barrier()
            start = time.perf_counter()
            result = runner.run(there, back)
            longest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            if turn and turn % 2 == 0:
                seconds[name].append(longest.item())
            if name == "ours" and turn % 2 == 0:
                report = result
    expected = expert_tensors(case, new, topology, rank)
    for got in (list(runners["ours"].weights.layers), runners["vLLM"].weights):
        for mine, right in zip(got, expected, strict=True):
            mine = list(mine.values()) if isinstance(mine, dict) else mine
            assert all(torch.equal(a, b) for a, b in zip(mine, right.values(), strict=True))
    assert report is not None
    return {
        "seconds": seconds,
        "ops": (report.p2p_ops, runners["vLLM"].ops),
        "bytes": report.bytes_received,
        "staging": (report.peak_staging_bytes, sum(t.numel() * t.element_size() for t in runners["vLLM"].buffer)),
    }


def show(case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Print one case; returns the figures."""
    medians = {name: statistics.median(times) for name, times in results[0]["seconds"].items()}
    ours, theirs = (sum(result["ops"][i] for result in results) for i in (0, 1))
    moved = sum(result["bytes"] for result in results)
    peak, buffer = (max(result["staging"][i] for result in results) for i in (0, 1))
    sizes = f"{case.layers} layers, 4 ranks x {case.slots_per_rank} slots, {moved / 2**20:.1f} MiB moved."
    print(f"\n### {case.name}\n\n{sizes}")
    print("\n| | ms | least | most | times as fast as vLLM |\n|---|---|---|---|---|")
    for name, median in medians.items():
        times = results[0]["seconds"][name]
        faster = medians["vLLM"] / median
        print(f"| {name} | {1e3 * median:.1f} | {1e3 * min(times):.1f} | {1e3 * max(times):.1f} | {faster:.2f} |")
    ratio, share = medians["ours"] / medians["vLLM"], medians["plain Gloo"] / medians["ours"]
    print(
        f"\nOurs takes {ratio:.2f} of vLLM's time, at {share:.0%} of the bandwidth of plain Gloo. Point-to-point "
        f"operations: {ours}, vLLM's {theirs} ({ours / theirs:.3f}). Memory outside the weights: {peak / 2**20:.2f} "
        f"MiB, vLLM's buffer of one layer {buffer / 2**20:.2f} MiB."
    )
    return {"case": case.name, "ratio": ratio, "ops": ours / theirs, "share": share, "medians": medians}


def serve_beside(rank: int, case: Case) -> dict[str, float]:
    """Median step of a serving loop: idle, beside an asynchronous rearrangement, and beside a plain copy."""
    topology = Topology(dist.get_world_size(), case.slots_per_rank)
    old, new = placements(case, topology)
    weights = ExpertWeights(expert_tensors(case, old, topology, rank))
    model, own = dist.new_group(), dist.new_group()
    transport, plain = ProcessGroupTransport(own), Plain(case, old, new, topology, rank)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    flag = torch.zeros(1)
    times: dict[str, list[float]] = {"idle": [], "rearrangement": [], "plain copy": [], "step()": []}
    for turn in range(12):
        for name in ("idle", "rearrangement", "plain copy"):
            dist.barrier(group=model)
            background = _start_background(name, weights, old, new, topology, transport, plain, turn)
            while True:
                start = time.perf_counter()
                for _ in range(12):
                    torch.mm(left, right)
                flag[0] = (
                    float(background.done if len(times[name]) % 60 else True) if name == "idle" else background.done
                )
                dist.all_reduce(flag, dist.ReduceOp.MIN, group=model)
                begin = time.perf_counter()
                background.step()
                end = time.perf_counter()
                times[name].append(end - start)
                if name == "rearrangement":
                    times["step()"].append(end - begin)
                if flag.item():
                    break
    return {name: statistics.median(values) for name, values in times.items()} | {
        f"{name}, steps": float(len(values)) for name, values in times.items()
    }


def _start_background(name, weights, old, new, topology, transport, plain, turn):
    if name == "rearrangement":
        there, back = (old, new) if turn % 2 == 0 else (new, old)
        return Rearrangement(
            weights, plan_moves(there, back, topology), topology, transport, timeout=TIMEOUT, max_staging_bytes=2**23
        )
    if name == "plain copy":
        return _PlainCopy(plain)
    return SimpleNamespace(done=False, step=lambda: None)


class _PlainCopy:
    """The bytes of the rearrangement on a background thread, with nothing else."""

    def __init__(self, plain: Plain):
        import threading

        self.thread = threading.Thread(target=plain.run, daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def step(self) -> None:
        """Nothing to commit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file as well")
    parser.add_argument("--only", choices=["compare", "serve"])
    options = parser.parse_args()
    figures: list[Any] = []
    if options.only != "serve":
        figures += [show(case, run_ranks(compare, 4, case, timeout=500)) for case in CASES]
    if options.only != "compare":
        results = run_ranks(serve_beside, 4, CASES[1], timeout=500)
        print("\n### Beside a serving loop\n\nMedians of rank 0.\n\n| | |\n|---|---|")
        print("\n".join(f"| {name} | {value:.6f} |" for name, value in results[0].items()))
        figures.append(results[0])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


READING = """
Lost: with checksums ours is slower than vLLM, which has none. It stages several layers at a time where vLLM has a
buffer for one, and so takes more memory unless `max_staging_bytes` says otherwise. With small experts most of the time
goes into agreement between the ranks and not into bytes, which is why plain Gloo is many times faster there.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
