"""Kill, add and release random members of a serving group, and look what the others compute.

`python -m tests.elastic_soak --events 200` takes longer than the test suite does.
"""

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from tests.elastic_worker import Settings, read_log, work

_PRELOAD = ["torch.distributed", "tests.elastic_worker"]
_SETTLE_SECONDS = 90.0
_SIZES = (3, 8)


class Kill(NamedTuple):
    """One loss that met a group in which nothing else was going on.

    name: of the victim.
    time: of the signal.
    """

    name: str
    time: float


class World:
    """Processes, their store and their logs.

    Args:
        folder: for logs.
        seed: of the order of events.
        settings: of the workers; port and folder are set here.
    """

    def __init__(self, folder: str, seed: int, **settings: Any):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._server = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self._orders = dist.PrefixStore("orders", self._server)
        self.folder, self.random = Path(folder), random.Random(seed)
        self._settings = Settings(self._server.port, folder, **settings)
        self.processes: dict[str, Any] = {}
        self.live: list[str] = []
        self.kills: list[Kill] = []
        self.events: list[str] = []
        self._born = 0

    def found(self, size: int) -> None:
        """Start the first members."""
        for rank in range(size):
            self._start(rank, size)

    def join(self) -> None:
        """Start one more."""
        self._start(None, 0)
        self.events.append("join")

    def kill(self, calm: bool) -> None:
        """Kill one of those who live."""
        name = self.live.pop(self.random.randrange(len(self.live)))
        os.kill(self.processes[name].pid, signal.SIGKILL)
        if calm:
            self.kills.append(Kill(name, time.monotonic()))
        self.events.append("kill")

    def leave(self) -> None:
        """Ask one to leave."""
        name = self.live.pop(self.random.randrange(len(self.live)))
        self._orders.set(f"leave/{self._orders.add('asked', 1)}", name)
        self._orders.add("leaves", 1)
        self.events.append("leave")

    def settle(self) -> None:
        """Wait until all who live serve in one generation of their own.

        Raises:
            AssertionError: if they do not in time: somebody hangs.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self._is_settled():
            if time.monotonic() > deadline:
                self._dump()
                raise AssertionError(f"a hang after {self.events[-5:]}; logs and stacks are in {self.folder}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Let all end.

        Raises:
            AssertionError: if one does not.
        """
        self._orders.set("stop", "1")
        deadline = time.monotonic() + _SETTLE_SECONDS
        for name in self.live:
            self.processes[name].join(max(deadline - time.monotonic(), 0.1))
            if self.processes[name].is_alive():
                self._dump()
                raise AssertionError(f"{name} does not stop; logs and stacks are in {self.folder}")

    def close(self) -> None:
        """End what is left, by force."""
        for process in self.processes.values():
            process.kill()
            process.join()

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """What each process wrote."""
        return {file.stem: read_log(file) for file in sorted(self.folder.glob("*.jsonl"))}

    def _start(self, rank: int | None, size: int) -> None:
        name = f"p{self._born:03d}"
        self._born += 1
        process = self._context.Process(target=work, args=(self._settings, name, rank, size), daemon=True)
        process.start()
        self.processes[name] = process
        self.live.append(name)

    def _is_settled(self) -> bool:
        logs, generations = self.logs(), set()
        for name in self.live:
            log = logs.get(name, [])
            assert not any(line["event"] == "failed" for line in log), log[-1]
            served = [line["generation"] for line in log if line["event"] == "served" and line["step"] >= 2]
            changed = [line for line in log if line["event"] == "changed"]
            if not served or (changed and changed[-1]["generation"] != served[-1]):
                return False
            if changed and set(changed[-1]["names"]) != set(self.live):
                return False
            generations.add(served[-1])
        return len(generations) == 1

    def _dump(self) -> None:
        for name in self.live:
            if self.processes[name].is_alive():
                os.kill(self.processes[name].pid, signal.SIGUSR1)
        time.sleep(1.0)


def run_events(world: World, num_events: int, size: int) -> None:
    """Make random events happen, some while the group still deals with others."""
    least, most = _SIZES[0], size
    world.found(size)
    world.settle()
    calm = True
    while len(world.events) < num_events:
        choices = {
            "kill": 5 if len(world.live) > least else 0,
            "join": 4 if len(world.live) < most else 0,
            "leave": 2 if len(world.live) > least else 0,
        }
        kind = world.random.choices(list(choices), weights=list(choices.values()))[0]
        time.sleep(world.random.uniform(0.0, 1.2))
        world.kill(calm) if kind == "kill" else getattr(world, kind)()
        calm = world.random.random() < 0.7
        if calm:
            world.settle()
    world.settle()
    world.stop()


class Report(NamedTuple):
    """What came of it.

    events: by kind.
    served: batches that were written down as served; far more were.
    wrong_tokens: outputs other than the oracle's.
    wrong_rows: slots with other bytes than their expert's.
    lost_in_vain: experts loaded anew of which a survivor had a copy in all survivors' views.
    disputed: likewise, but the views differ, as a layer was switching, or more were lost meanwhile.
    reloaded: experts loaded anew.
    evicted: living processes that the others left behind.
    detected: seconds from a kill to the first error on each survivor, for kills that met a calm group.
    recovered: seconds from the first error to the first batch served by the last survivor.
    phases: seconds of agreeing, connecting, moving, on the slowest survivor of each such kill.
    files, threads: most that a process had.
    """

    events: dict[str, int]
    served: int
    wrong_tokens: int
    wrong_rows: int
    lost_in_vain: int
    disputed: int
    reloaded: int
    evicted: int
    detected: list[float]
    recovered: list[float]
    phases: list[tuple[float, float, float]]
    files: int
    threads: int


def examine(world: World) -> Report:
    """Go through the logs."""
    logs = world.logs()
    lines = [line for log in logs.values() for line in log]
    changes = [line for line in lines if line["event"] == "changed"]
    in_vain, disputed = _lost_in_vain(logs)
    timed = [found for kill in world.kills if (found := _timing(logs, kill)) is not None]
    reloads = {(c["generation"], tuple(pair)) for c in changes for pair in c["reload"]}
    return Report(
        events={kind: world.events.count(kind) for kind in ("kill", "join", "leave")},
        served=sum(line["event"] == "served" for line in lines),
        wrong_tokens=sum(line["wrong"] for line in lines if line["event"] == "served"),
        wrong_rows=sum(len(line["rows"]) for line in lines if line["event"] == "wrong rows"),
        lost_in_vain=in_vain,
        disputed=disputed,
        reloaded=len(reloads),
        evicted=sum(line["event"] == "failed" for line in lines),
        detected=[seconds for detected, _, _ in timed for seconds in detected],
        recovered=[recovered for _, recovered, _ in timed],
        phases=[phases for _, _, phases in timed],
        files=max((c["files"] for c in changes), default=0),
        threads=max((c["threads"] for c in changes), default=0),
    )


def _lost_in_vain(logs: dict[str, list[dict[str, Any]]]) -> tuple[int, int]:
    """Experts that were loaded anew although a survivor had a copy before the loss: surely, and perhaps."""
    before: dict[int, list[tuple[list[int], dict[str, Any]]]] = {}
    for log in logs.values():
        for lost, changed in zip(log, log[1:], strict=False):
            if lost["event"] == "lost" and changed["event"] == "changed":
                before.setdefault(changed["generation"], []).append((lost["view"], changed))
    surely = perhaps = 0
    for pairs in before.values():
        reload, names = pairs[0][1]["reload"], pairs[0][1]["names"]
        for layer, expert in reload:
            held = [_holds(view, names, layer, expert) for view, _ in pairs]
            is_sure = all(held) and all(changed["attempts"] == 1 for _, changed in pairs)
            surely, perhaps = surely + is_sure, perhaps + (any(held) and not is_sure)
    return surely, perhaps


def _holds(view: dict[str, Any], survivors: list[str], layer: int, expert: int) -> bool:
    by_rank = np.asarray(view["placement"][layer]).reshape(len(view["names"]), -1)
    return any(expert in by_rank[rank] for rank, name in enumerate(view["names"]) if name in survivors)


def _timing(logs, kill: Kill) -> tuple[list[float], float, tuple[float, float, float]] | None:
    """For one kill: when survivors noticed, when the last of them served again, and what took the time between."""
    detected, served, phases = [], [], []
    for name, log in logs.items():
        after = [line for line in log if line["time"] >= kill.time]
        if name == kill.name or not after or after[0]["event"] == "failed":
            continue
        lost = next((line for line in after if line["event"] == "lost"), None)
        changed = next((line for line in after if line["event"] == "changed"), None)
        if lost is None or changed is None or changed["lost"] != [kill.name] or changed["attempts"] != 1:
            continue
        first = next(
            (line["time"] for line in after if line["event"] == "served" and line["time"] > changed["time"]), None
        )
        if first is not None:
            detected.append(lost["time"] - kill.time)
            served.append(first)
            phases.append(tuple(changed["seconds"][phase] for phase in ("agreeing", "connecting", "moving")))
    if not detected:
        return None
    return detected, max(served) - kill.time - min(detected), max(phases)


def show(report: Report, silence: float) -> str:
    """The figures as text."""
    text = [
        f"events {report.events}; batches written down {report.served}, wrong tokens {report.wrong_tokens}, wrong rows "
        f"{report.wrong_rows}",
        f"experts loaded anew {report.reloaded}: with a live copy {report.lost_in_vain}, disputed {report.disputed}",
        f"evicted {report.evicted}; most open files {report.files}, threads {report.threads}",
    ]
    if report.recovered:
        total = np.asarray(report.recovered)
        text.append(
            f"{len(total)} single kills: noticed after {_summary(report.detected)}; serving {_summary(total)} later, "
            f"of which {silence:g} s waiting for signs of life: without that {_summary(total - silence)}"
        )
        names = ("agreeing", "connecting", "moving")
        text.append(
            "; ".join(f"{n} {_summary(p)}" for n, p in zip(names, zip(*report.phases, strict=True), strict=True))
        )
    return "\n".join(text)


def _summary(seconds) -> str:
    return f"{np.median(seconds):.2f} s (median), {np.max(seconds):.2f} s (longest)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--size", type=int, default=_SIZES[1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--silence", type=float, default=1.5)
    parser.add_argument("--folder", help="for the logs; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        world = World(options.folder or temporary, options.seed, silence=options.silence)
        start = time.monotonic()
        try:
            run_events(world, options.events, options.size)
        finally:
            world.close()
            print(f"{time.monotonic() - start:.0f} s, last events {world.events[-5:]}")
            print(show(examine(world), options.silence))


if __name__ == "__main__":
    main()
