"""Keep four processes serving while experts move and things go wrong, and look whether anything grows or is wrong.

    python -m tests.soak --minutes 30 [--seed 0] [--cores 0.5]

Every token is compared with a model that holds all experts, all weights are compared bit for bit after every episode,
and of every fault the documented outcome is checked (`tests/soak_checks.py`). Memory, open files and threads are
sampled. The first thing that is not as it should be ends the run with an error; nothing is waited for without an end.
"""

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from tests.elastic_worker import read_log
from tests.soak_episodes import KINDS
from tests.soak_worker import TOPOLOGY, Settings, work

MOST_KIB_PER_MINUTE = 64.0
"""Growth of memory that is allowed in the second half of a run: 1.3 GiB in two weeks."""

_GRACE_SECONDS = 300.0


class Growth(NamedTuple):
    """How one process has changed in the second half of a run.

    slope: KiB per minute of resident memory, of a line fitted to it.
    first, last: medians of resident memory, in MiB, in the first and the last quarter of that half.
    files, threads: fewest open files and fewest threads at rest, in the first and the last third of the whole run. At
        rest groups have just been made anew, as after a loss, and nothing else is under way.
    """

    slope: float
    first: float
    last: float
    files: tuple[int, int]
    threads: tuple[int, int]


class Report(NamedTuple):
    """What came of a run.

    episodes: how often each (episode, fault) came up.
    lost: times that ranks gave one up.
    batches: that every rank has served.
    seconds: from the first sample to the last.
    cores: CPU cores that all processes used.
    growth: of each process.
    """

    episodes: dict[tuple[str, str], int]
    lost: int
    batches: int
    seconds: float
    cores: float
    growth: list[Growth]


def soak(folder: str, *, silent_seconds: float = 150.0, **settings: Any) -> Report:
    """Run four workers to their end.

    Args:
        folder: for logs and snapshots.
        silent_seconds: for which all of them may write nothing.
        settings: of the workers; port and folder are set here.

    Raises:
        AssertionError: if a worker fails, dies, or is silent for too long. None outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "tests.soak_episodes"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    chosen = Settings(store.port, folder, **settings)
    processes = [context.Process(target=work, args=(chosen, rank), daemon=True) for rank in range(TOPOLOGY.ep_size)]
    for process in processes:
        process.start()
    try:
        _watch(Path(folder), processes, time.monotonic() + chosen.seconds + _GRACE_SECONDS, silent_seconds)
        return examine([read_log(Path(folder) / f"r{rank}.jsonl") for rank in range(TOPOLOGY.ep_size)])
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _watch(folder: Path, processes: list[Any], deadline: float, silent_seconds: float) -> None:
    logs = [folder / f"r{rank}.jsonl" for rank in range(len(processes))]
    sizes, heard = [0] * len(logs), time.monotonic()
    while True:
        time.sleep(0.5)
        now = [log.stat().st_size if log.exists() else 0 for log in logs]
        if now != sizes:
            sizes, heard = now, time.monotonic()
        if any(not process.is_alive() for process in processes):
            time.sleep(2.0)  # the others end too, or say what they saw
            ends = [read_log(log)[-1] if log.exists() else {"event": "no log"} for log in logs]
            failed = [f"rank {r}: {end['text']}" for r, end in enumerate(ends) if end["event"] == "failed"]
            assert not failed, "\n".join(failed)
            if all(end["event"] == "ended" for end in ends):
                return
            assert time.monotonic() < heard + 30.0, f"a worker died: {ends}"
        if time.monotonic() > min(deadline, heard + silent_seconds):
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1.0)
            stacks = "\n".join(f"{log.stem}:\n{log.with_suffix('.stack').read_text()}" for log in logs)
            raise AssertionError(f"workers hang; logs are in {folder}\n{stacks}")


def examine(logs: list[list[dict[str, Any]]]) -> Report:
    """Go through the logs of all ranks."""
    episodes = [line for line in logs[0] if line["event"] == "episode"]
    samples = [[line for line in log if line["event"] == "sample"] for log in logs]
    seconds = min(lines[-1]["time"] - lines[0]["time"] for lines in samples)
    cores = sum((s[-1]["cpu"] - s[0]["cpu"]) / max(s[-1]["time"] - s[0]["time"], 1e-9) for s in samples)
    return Report(
        dict(Counter((line["name"], line["fault"]) for line in episodes)),
        sum(line["lost"] is not None for line in episodes),
        logs[0][-1]["batches"],
        seconds,
        cores,
        [measure(lines) for lines in samples],
    )


def measure(samples: list[dict[str, Any]]) -> Growth:
    """Fit a line to the second half of one process's samples, and compare what is there at rest."""
    half = samples[len(samples) // 2 :]
    minutes = np.asarray([sample["time"] for sample in half]) / 60
    rss = np.asarray([sample["rss"] for sample in half], dtype=float)
    slope = float(np.polyfit(minutes - minutes[0], rss, 1)[0]) if len(half) > 2 else 0.0
    quarter = max(1, len(half) // 4)
    ends = half[:quarter], half[-quarter:]
    first, last = (float(np.median([sample["rss"] for sample in end])) / 1024 for end in ends)
    at_rest = [sample for sample in samples if sample["at_rest"]]
    third = max(1, len(at_rest) // 3)
    ends = at_rest[:third], at_rest[-third:]
    files, threads = (tuple(min(s[what] for s in end) for end in ends) for what in ("files", "threads"))
    return Growth(slope, first, last, files, threads)


def leaks(report: Report, most_kib_per_minute: float = MOST_KIB_PER_MINUTE) -> list[str]:
    """What has grown more than it may, in words."""
    found = []
    for rank, growth in enumerate(report.growth):
        if growth.slope > most_kib_per_minute and growth.last > growth.first:
            found.append(f"rank {rank}: memory grows by {growth.slope:.0f} KiB per minute")
        for what in ("files", "threads"):
            before, after = getattr(growth, what)
            if after > before:
                found.append(f"rank {rank}: {what} grew from {before} to {after}")
    return found


def show(report: Report) -> str:
    """The figures as text."""
    text = [
        f"{report.seconds / 60:.1f} minutes, {sum(report.episodes.values())} episodes, {report.batches} batches on "
        f"each rank, {report.lost} times a rank was given up and taken back; {report.cores:.2f} cores used"
    ]
    by_kind = sorted(report.episodes.items())
    text.append("episodes: " + ", ".join(f"{name} {fault} {count}" for (name, fault), count in by_kind))
    for rank, growth in enumerate(report.growth):
        text.append(
            f"rank {rank}, second half: {growth.slope:+.1f} KiB/min, medians {growth.first:.1f} and {growth.last:.1f} "
            f"MiB; open files at rest {growth.files[0]} and {growth.files[1]}, threads {growth.threads[0]} and "
            f"{growth.threads[1]}"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=float, default=0.5, help="CPU cores that all workers may use together")
    parser.add_argument("--sample-seconds", type=float, default=5.0)
    parser.add_argument("--folder", help="for the logs; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = soak(
            given.folder or temporary,
            seed=given.seed,
            seconds=60 * given.minutes,
            share=given.cores / TOPOLOGY.ep_size,
            sample_seconds=given.sample_seconds,
            kinds=KINDS,
        )
    print(show(report))
    found = leaks(report)
    print("\n".join(found) if found else "nothing grew, and nothing was wrong")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
