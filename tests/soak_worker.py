"""A long-lived process that serves through the routing maps, while its experts move and things go wrong."""

import faulthandler
import gc
import json
import os
import random
import signal
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eplb_core import Topology, round_robin
from eplb_torch.dispatch import count_tokens
from eplb_torch.elastic.groups import break_group, form_group
from eplb_torch.reload import reload_experts
from tests.elastic_worker import HIDDEN, LAYERS, LOGICAL, TOP_K, Log, Oracle, SoakModel
from tests.expert_rows import expert_row, wrong_rows
from tests.soak_faults import Fault, FaultyTransport

TOPOLOGY = Topology(ep_size=4, slots_per_rank=6, num_nodes=2)
_WAIT_SECONDS, _SETTLE_SECONDS = 60.0, 5.0
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class SoakError(AssertionError):
    """Something was not as documented."""


class Settings(NamedTuple):
    """What all workers share.

    port: of the store.
    folder: for logs and snapshots.
    seed: of all that happens.
    seconds: after which they end, once each kind of episode has come up.
    share: CPU cores that each may use at most.
    sample_seconds: between two samples of memory, open files and threads.
    kinds: (episode, fault) to go through, in random order, again and again.
    plant: what is made to go wrong, to see that it is noticed: `"row"`, `"token"`, `"memory"`, `"files"`, `"threads"`,
        `"silence"`.
    """

    port: int
    folder: str
    seed: int
    seconds: float
    share: float
    sample_seconds: float
    kinds: tuple[tuple[str, str], ...]
    plant: tuple[str, ...] = ()


class Worker:
    """What episodes work on.

    Attributes:
        rank: of this process.
        model: experts, and the maps to them.
        group: for tokens.
        transport: for weights.
        random: equal on all ranks.
    """

    def __init__(self, settings: Settings, rank: int):
        self.settings, self.rank, self.oracle = settings, rank, Oracle()
        self.log = Log(settings.folder, f"r{rank}")
        limit = timedelta(seconds=_WAIT_SECONDS)
        self._store = dist.TCPStore("127.0.0.1", settings.port, is_master=False, timeout=limit)
        self.random, self._own = random.Random(settings.seed), np.random.default_rng([settings.seed, rank])
        self.group = self.transport = None
        self._generation = self._told = self.batches = self.episode = 0
        self._start, self._cpu, self._sampled = time.monotonic(), time.process_time(), 0.0
        self._planted: list[Any] = []
        self._threads: int | None = None
        self.found(round_robin(LAYERS, LOGICAL, TOPOLOGY))
        self.connect()

    def found(self, placement: np.ndarray) -> None:
        """Load the model anew, in a placement."""
        self.model = SoakModel(placement, TOPOLOGY, self.rank)

    def connect(self) -> None:
        """Make new groups; break those before."""
        if self.transport is not None:
            break_group(self.group)
            break_group(self.transport.group)
        self._generation += 1
        groups = [
            form_group(dist.PrefixStore(f"{what}/{self._generation}", self._store), self.rank, TOPOLOGY.ep_size, limit)
            for what, limit in (("tokens", _WAIT_SECONDS), ("moves", 2 * _WAIT_SECONDS))
        ]
        self.group, self.transport = groups[0], FaultyTransport(groups[1])

    def run(self, episodes: dict[str, Any]) -> None:
        """Go through episodes until the time is over."""
        self._rest_and_sample()
        waiting: list[tuple[str, str]] = []
        while True:
            is_over = self.tell(time.monotonic() - self._start > self.settings.seconds)[0]
            if is_over and self.episode >= len(self.settings.kinds):
                self.connect()
                self._rest_and_sample()
                return
            if not waiting:
                waiting = list(self.settings.kinds)
                self.random.shuffle(waiting)
            name, kind = waiting.pop()
            start = time.monotonic()
            lost = episodes[name](self, kind)
            self.episode += 1
            self._plant()
            if lost is not None:
                self._take_back(lost)
            self.check_rows("after", name, kind)
            for _ in range(3):
                self.serve()
            if lost is not None:
                self._rest_and_sample()
            seconds = round(time.monotonic() - start, 3)
            self.log.write("episode", name=name, fault=kind, seconds=seconds, lost=lost, batches=self.batches)
            self.sample()

    def serve(self) -> torch.Tensor:
        """One batch through all layers, compared with the oracle. Returns its load `[layers, logical]`."""
        load = torch.zeros(LAYERS, LOGICAL, dtype=torch.int64)
        for layer in range(LAYERS):
            hidden, ids, weights = self._batch(layer)
            outputs = self.model.forward(layer, hidden, ids, weights, self.group)
            if "token" in self.settings.plant and self.batches == 9 and len(outputs):
                outputs[0, 0] += 1
            wrong = int((outputs != self.oracle.forward(layer, hidden, ids, weights)).any(dim=1).sum())
            if wrong:
                raise SoakError(f"{wrong} wrong tokens of {len(hidden)} in layer {layer}, batch {self.batches}")
            load[layer] += count_tokens(ids, LOGICAL)
        self.batches += 1
        self.sample()
        self._throttle()
        return load

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so; at this boundary, on all."""
        total = torch.tensor([int(flag)])
        dist.all_reduce(total, group=self.group)
        return bool(total)

    def tell(self, value: Any) -> list[Any]:
        """Give every rank what all ranks tell, in rank order; over the store, which nothing here breaks."""
        self._told += 1
        keys = [f"told/{self._told}/{rank}" for rank in range(TOPOLOGY.ep_size)]
        self._store.set(keys[self.rank], json.dumps(value))
        told = [json.loads(self._store.get(key)) for key in keys]
        if self._told > 2:  # all have read those by now, as they have told since
            self._store.delete_key(f"told/{self._told - 2}/{self.rank}")
        return told

    def check_rows(self, *where: str) -> None:
        """Compare the bytes of all slots with those of the experts that the placement puts there."""
        if wrong := wrong_rows(list(self.model.weights.layers), self.model.placement, TOPOLOGY, self.rank):
            raise SoakError(f"wrong rows {' '.join(where)}: (layer, slot, tensor) {wrong[:8]}")

    def reload(self) -> None:
        """Write all rows anew, into the slots that hold their experts now."""
        read = (self.model.weights, self.model.placement, TOPOLOGY, self.rank)
        reload_experts(*read, lambda layer, name, expert: expert_row(layer, expert, name))

    def sample(self, *, at_rest: bool = False) -> None:
        """Write down memory, open files and threads, if it is time, or if nothing is under way."""
        if not at_rest and time.monotonic() - self._sampled < self.settings.sample_seconds:
            return
        gc.collect()
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_KIB
        files, tasks = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        python = sorted(thread.name for thread in threading.enumerate())
        cpu = time.process_time() - self._cpu
        figures = {"rss": rss, "files": files, "threads": tasks, "python": python, "cpu": cpu}
        self.log.write("sample", at_rest=at_rest, batches=self.batches, **figures)
        self._sampled = time.monotonic()

    def _rest_and_sample(self) -> None:
        """With groups that are new: threads of those before have some seconds to end."""
        self.serve()
        gc.collect()
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (now := len(os.listdir("/proc/self/task"))) > (self._threads or now) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._threads = self._threads or now
        self.sample(at_rest=True)
        self.tell("sampled")  # connections are there until here

    def _batch(self, layer: int):
        tokens = int(self._own.integers(0, 24))
        hot = (self.batches // 60 + layer * 3) % LOGICAL
        uniform = self._own.integers(0, LOGICAL, (tokens, TOP_K))
        popular = np.where(self._own.random((tokens, TOP_K)) < 0.4, hot, uniform)
        hidden, weights = (self._own.standard_normal((tokens, n), dtype=np.float32) for n in (HIDDEN, TOP_K))
        return torch.from_numpy(hidden), torch.from_numpy(popular), torch.from_numpy(weights)

    def _take_back(self, victim: int) -> None:
        """A rank that was given up is there again: in new groups, in the placement of the others."""
        self.tell("at the end of what went before")
        self.connect()
        held = self.tell(self.model.placement.tolist())
        agreed = np.asarray(held[(victim + 1) % TOPOLOGY.ep_size], dtype=np.int32)
        if self.rank == victim:
            self.check_rows("of the lost rank")
            self.model.commit(agreed)
            self.reload()

    def _throttle(self) -> None:
        """Sleep so long that no more than the share of a core is used."""
        share = self.settings.share
        over = (time.process_time() - self._cpu) / share - (time.monotonic() - self._start)
        if over > 0:
            time.sleep(min(over, 3.0))

    def _plant(self) -> None:
        plant = self.settings.plant
        if "memory" in plant:
            self._planted.append(np.ones(2**18))  # 2 MiB
        if "files" in plant:
            self._planted.append(open(os.devnull))  # noqa: SIM115
        if "threads" in plant:
            threading.Thread(target=time.sleep, args=(600.0,), daemon=True).start()
        if "silence" in plant and self.rank == 1:
            time.sleep(600.0)
        if "row" in plant and self.rank == 1 and self.episode == 1:
            self.model.weights.layers[1]["packed"][2, 0] ^= 1


def work(settings: Settings, rank: int) -> None:
    """Be one of the workers, from start to end."""
    from tests.soak_episodes import EPISODES

    torch.set_num_threads(1)
    stacks = open(Path(settings.folder) / f"r{rank}.stack", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    log = Log(settings.folder, f"r{rank}")
    try:
        worker = Worker(settings, rank)
        worker.run(EPISODES)
        worker.check_rows("at the end")
    except BaseException as error:
        log.write("failed", kind=type(error).__name__, text=traceback.format_exc()[-3000:])
        with suppress(RuntimeError, NameError):
            time.sleep(1.0)  # so that the others do not fail for want of this one first
    else:
        log.write("ended", batches=worker.batches, episodes=worker.episode)
    os._exit(0)


__all__ = ("TOPOLOGY", "Fault", "Settings", "SoakError", "Worker", "work")
