"""A process that serves synthetic traffic in an `ElasticGroup`, checks what it computes, and writes a log."""

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eplb_core import EMPTY, Topology, round_robin
from eplb_torch import DeviceMaps, ExpertBalancer, ExpertWeights, LiveModel
from eplb_torch.dispatch import count_tokens, select_slots
from eplb_torch.elastic import Change, ElasticGroup, is_loss
from eplb_torch.elastic.membership import Membership
from eplb_torch.integrations._exchange import exchange_tokens
from tests.expert_rows import expert_layers, expert_row, wrong_rows

LAYERS, LOGICAL, HIDDEN, TOP_K = 3, 20, 5, 2
BALANCER = {"step_interval": 12, "window_size": 6, "timeout": 8.0, "max_staging_bytes": 2048}


class Settings(NamedTuple):
    """What all processes of a world share.

    port: of the store.
    folder: where each writes its log.
    silence: as for `Membership`.
    checkpoint: whether lost experts can be read anew.
    resize: whether ranks may get more slots.
    """

    port: int
    folder: str
    silence: float = 1.5
    checkpoint: bool = True
    resize: bool = True


class SoakModel(LiveModel):
    """Experts that compute `x * gate + up[0]`, on weights that can be made larger."""

    def __init__(self, placement: np.ndarray, topology: Topology, rank: int):
        weights = ExpertWeights(expert_layers(placement, topology, rank))
        super().__init__(weights, DeviceMaps(placement, LOGICAL), topology, placement)

    def resize(self, slots_per_rank: int) -> None:
        """See `ElasticModel.resize`."""
        more = slots_per_rank - self.weights.slots_per_rank
        layers = [
            {name: torch.cat([rows, rows.new_zeros((more, *rows.shape[1:]))]) for name, rows in layer.items()}
            for layer in self.weights.layers
        ]
        for layer in layers:
            layer["down.weight"] = layer["down.weight"].mT.contiguous().mT
        self.weights = self.weights.replaced(layers)

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group
    ) -> torch.Tensor:
        """Route tokens to their experts, wherever they are."""
        tensors = self.weights.layers[layer]

        def run(rows, slots):
            return _compute(rows, tensors["gate"][slots], tensors["up.weight"][slots, 0])

        slots = select_slots(ids, self.maps.layer(layer), offset=group.rank())
        return exchange_tokens(hidden, slots, weights, run, self.topology, group)


def _compute(rows: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return rows * gate[:, None] + shift


class Oracle:
    """The same without a group: all experts in one place."""

    def __init__(self):
        rows = [
            [[expert_row(la, e, name) for e in range(LOGICAL)] for la in range(LAYERS)]
            for name in ("gate", "up.weight")
        ]
        self._gate, self._up = (torch.stack([torch.stack(layer) for layer in tensor]) for tensor in rows)

    def forward(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What every group must compute, bit for bit."""
        flat, k = ids.reshape(-1), ids.shape[1]
        outputs = _compute(hidden.repeat_interleave(k, dim=0), self._gate[layer][flat], self._up[layer][flat, 0])
        return (outputs.view(-1, k, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1)


class Log:
    """Lines of JSON, each with the time; a last line that is cut off by a kill is left out by readers."""

    def __init__(self, folder: str, name: str):
        self._file = open(Path(folder) / f"{name}.jsonl", "ab", buffering=0)  # noqa: SIM115

    def write(self, event: str, **values: Any) -> None:
        """Write one event."""
        line = json.dumps({"event": event, "time": time.monotonic(), **values})
        self._file.write(line.encode() + b"\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def work(settings: Settings, name: str, rank: int | None, size: int) -> None:
    """Found the group as one of `size` ranks, or join it if `rank` is None; serve until told to stop or released."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, lambda *_: _dump(settings.folder, name))
    log = Log(settings.folder, name)
    try:
        Worker(settings, name, log).run(rank, size)
    except BaseException as error:
        log.write("failed", kind=type(error).__name__, text=traceback.format_exc()[-3000:])
    else:
        log.write("ended")
    os._exit(0)


def _dump(folder: str, name: str) -> None:
    frames = {thread.ident: thread.name for thread in threading.enumerate()}
    text = [f"{frames.get(i)}\n{''.join(traceback.format_stack(f))}" for i, f in sys._current_frames().items()]
    (Path(folder) / f"{name}.stack").write_text("\n\n".join(text))


class Worker:
    """One process's loop."""

    def __init__(self, settings: Settings, name: str, log: Log):
        self.log, self.name, self.oracle = log, name, Oracle()
        client = dist.TCPStore("127.0.0.1", settings.port, is_master=False, timeout=timedelta(seconds=30))
        self.orders = dist.PrefixStore("orders", client)
        store = dist.PrefixStore("group", client)
        self.elastic = ElasticGroup(
            Membership(store, name=name, silence=settings.silence, timeout=20.0),
            read_row=(lambda layer, name, expert: expert_row(layer, expert, name)) if settings.checkpoint else None,
            resize=settings.resize,
            timeout=8.0,
            group_timeout=12.0,
        )
        self.rng = np.random.default_rng(list(name.encode()))
        self.step = self.obeyed = 0

    def run(self, rank: int | None, size: int) -> None:
        """Serve."""
        if rank is None:
            vacant = np.full((LAYERS, 1), EMPTY)  # the group says how many slots it has
            self.model = SoakModel(vacant, Topology(1, 1), 0)
            self._note(self.elastic.join(self.model, 60.0))
        else:
            members, topology = self.elastic.found(rank, size), Topology(size, -(-LOGICAL // size) + 1)
            self.model = SoakModel(round_robin(LAYERS, LOGICAL, topology), topology, members.rank)
            self.elastic.serve(self.model)
        self.balancer = ExpertBalancer(self.model, self.elastic.transport, BALANCER)
        while True:
            try:
                if not self._serve_one():
                    return
            except Exception as error:
                if not is_loss(error):
                    raise
                view = {"placement": self.model.placement.tolist(), "names": self.elastic.members.names}
                view["epoch"] = self.balancer.state.models["main"].epoch
                self.log.write("lost", view=view, generation=self.elastic.members.generation, text=repr(error)[:300])
                self._note(self.elastic.recover(error, balancer=self.balancer))
                self._renew()

    def _serve_one(self) -> bool:
        """One batch of all layers, then whatever is to be done between two batches."""
        group, load, wrong = self.elastic.group, torch.zeros(LAYERS, LOGICAL, dtype=torch.int64), 0
        for layer in range(LAYERS):
            hidden, ids, weights = self._batch(layer)
            outputs = self.model.forward(layer, hidden, ids, weights, group)
            wrong += int((outputs != self.oracle.forward(layer, hidden, ids, weights)).any(dim=1).sum())
            load[layer] += count_tokens(ids, LOGICAL)
        self.step += 1
        if wrong or self.step in (1, 2) or self.step % 50 == 0:
            self.log.write("served", generation=self.elastic.members.generation, step=self.step, wrong=wrong)
        self.balancer.step(load)
        if self.step % 20 == 0:
            self._check_rows()
        return self._obey(group)

    def _batch(self, layer: int):
        tokens = int(self.rng.integers(0, 24))
        hot = (self.step // 60 + layer * 3) % LOGICAL
        popular = np.where(self.rng.random((tokens, TOP_K)) < 0.4, hot, self.rng.integers(0, LOGICAL, (tokens, TOP_K)))
        hidden, weights = (self.rng.standard_normal((tokens, n), dtype=np.float32) for n in (HIDDEN, TOP_K))
        return torch.from_numpy(hidden), torch.from_numpy(popular), torch.from_numpy(weights)

    def _obey(self, group) -> bool:
        """Do what one rank has seen to be asked for, on all ranks at this boundary."""
        wanted = self._look() if group.rank() == 0 and self.step % 4 == 0 else None
        key = f"{self.elastic.members.generation}/{self.step}"
        if wanted is not None:
            self.orders.set(key, json.dumps(wanted))
        flag = torch.tensor([0 if wanted is None else 1])
        dist.all_reduce(flag, group=group)
        if not flag:
            return True
        order = json.loads(self.orders.get(key))
        if order["kind"] == "stop":
            self.balancer.close()
            self._check_rows()
            return False
        act = self.elastic.admit if order["kind"] == "admit" else self.elastic.release
        change = act(order["names"], balancer=self.balancer)
        if change is not None:
            self._note(change)
            self._renew()
        return change is not None

    def _look(self) -> dict[str, Any] | None:
        if self.orders.check(["stop"]):
            return {"kind": "stop"}
        if waiting := self.elastic.waiting():
            return {"kind": "admit", "names": waiting}
        count = self.orders.add("leaves", 0)
        asked = [self.orders.get(f"leave/{i}").decode() for i in range(1, count + 1)]
        leaving = [name for name in asked if name in self.elastic.members.names]
        return {"kind": "release", "names": leaving} if leaving else None

    def _note(self, change: Change) -> None:
        plan = change.plans["main"]
        self.log.write(
            "changed",
            generation=change.members.generation,
            names=change.members.names,
            lost=change.lost,
            joined=change.joined,
            attempts=change.attempts,
            seconds=change.seconds,
            moves=plan.num_moves,
            reload=plan.reload,
            slots_per_rank=plan.group.slots_per_rank,
            threads=threading.active_count(),
            files=len(os.listdir("/proc/self/fd")),
            memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        self._check_rows()

    def _check_rows(self) -> None:
        rank = self.elastic.members.rank
        if wrong := wrong_rows(list(self.model.weights.layers), self.model.placement, self.model.topology, rank):
            self.log.write("wrong rows", rows=wrong)

    def _renew(self) -> None:
        self.balancer, self.step = self.balancer.renewed(self.elastic.transport), 0
