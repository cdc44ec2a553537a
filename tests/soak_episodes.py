"""What happens in a soak, one after another, and what must come of it according to the documentation.

An episode takes a worker and the kind of its fault. It returns the rank that the others have given up, or None.
"""

import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from eplb_core import EplbError, Topology, plan_moves
from eplb_core.snapshot import load_snapshot, save_snapshot
from eplb_torch import (
    BalancerMetrics,
    ExpertBalancer,
    PlanningError,
    RearrangeError,
    Rearrangement,
    TransportError,
    rearrange,
)
from eplb_torch.reload import reload_experts
from tests.elastic_worker import LAYERS, LOGICAL
from tests.expert_rows import expert_row, wrong_rows
from tests.soak_checks import check_balance, check_move
from tests.soak_faults import Fault, NoMemory
from tests.soak_worker import TOPOLOGY, SoakError, Worker
from tests.test_execute import random_placement

KINDS = (
    *(("move", kind) for kind in ("none", "late", "fail", "corrupt", "veto", "plan", "epoch", "shape")),
    *(("beside", kind) for kind in ("none", "late", "fail", "corrupt", "abort", "drain", "reload")),
    *(("balance", kind) for kind in ("none", "late", "fail", "corrupt", "planner", "policy")),
    *(("reload", kind) for kind in ("none", "broken")),
    *(("snapshot", kind) for kind in ("none", "full")),
    *((episode, kind) for episode in ("move", "beside", "balance") for kind in ("hang", "deaf")),
)
"""All (episode, fault). The last six take seconds each, as timeouts run out."""

_NO_FAULT = Fault("none", 0)


def draw_fault(worker: Worker, kind: str, *, gathers: int) -> Fault:
    """Where it happens; equal on all ranks. `"deaf"` fails one of the first `gathers` small messages."""
    victim, turn = worker.random.randrange(TOPOLOGY.ep_size), worker.random.randint(1, gathers)
    if kind == "deaf":
        return Fault("fail", victim, "gather", turn)
    if kind in ("late", "hang") and worker.random.random() < 0.5:
        return Fault(kind, victim, "gather", turn)
    return Fault(kind, victim)


def options(worker: Worker, fault: Fault) -> dict[str, Any]:
    """Of a rearrangement: all layers at once, in groups, or in parts of layers."""
    row = worker.model.weights.row_bytes(0)
    staging = worker.random.choice((row, 9 * row, 2**20))
    checksum = worker.random.random() < 0.5 or fault.kind == "corrupt"
    return {"timeout": fault.timeout(), "max_staging_bytes": staging, "checksum": checksum}


def draw_target(worker: Worker) -> tuple[np.ndarray, np.ndarray]:
    """The placement in force, and a random one."""
    rng = np.random.default_rng(worker.random.getrandbits(32))
    return worker.model.placement, random_placement(rng, LAYERS, LOGICAL, TOPOLOGY)


def move(worker: Worker, kind: str) -> int | None:
    """One rearrangement while nothing is served."""
    fault = draw_fault(worker, kind, gathers=5)
    (old, new), chosen = draw_target(worker), options(worker, fault)
    mine, topology = fault.victim == worker.rank, TOPOLOGY
    plan = plan_moves(old, new, TOPOLOGY, fan_out=worker.random.choice(("direct", "node")))
    if kind == "plan" and mine:
        plan = plan_moves(old, draw_target_of_one(new), TOPOLOGY)
    if kind == "epoch" and mine:
        chosen["epoch"] = 1
    if kind == "veto" and mine:
        chosen["staging"] = NoMemory(worker.model.weights.device)
    if kind == "shape":
        topology = Topology(TOPOLOGY.ep_size, TOPOLOGY.slots_per_rank + 1)
    worker.transport.arm(fault)
    start, error = time.monotonic(), None
    try:
        rearrange(worker.model.weights, plan, topology, worker.transport, **chosen)
    except (RearrangeError, EplbError) as failure:
        error = failure
    return settle(worker, fault, old, new, error, time.monotonic() - start)


def draw_target_of_one(new: np.ndarray) -> np.ndarray:
    """Another placement than that of the other ranks."""
    return np.roll(new, 1, axis=1)


def beside(worker: Worker, kind: str) -> int | None:
    """One rearrangement while batches are served; layers switch between two of them."""
    fault = draw_fault(worker, kind, gathers=1)
    (old, new), chosen, after = draw_target(worker), options(worker, fault), worker.random.randint(0, 6)
    worker.transport.arm(fault)
    moving = Rearrangement(worker.model.weights, plan_moves(old, new, TOPOLOGY), TOPOLOGY, worker.transport, **chosen)
    error, batches, switched = None, 0, []
    while True:
        worker.serve()
        batches += 1
        if kind == "reload" and not moving.done:
            refuse_to_reload(worker, moving)
        if kind == "abort" and batches > after and fault.victim == worker.rank:
            moving.abort()
        try:
            if kind == "drain" and batches > after:
                moving.drain()
            for layer in moving.step() if error is None else ():
                switched.append((batches, layer))
                worker.model.commit(moving.placement(old, new)[layer], layer=layer)
        except RearrangeError as failure:
            error = failure
        over = error is not None or moving.done or (kind == "drain" and batches > after)
        if not worker.any_rank(not over):
            break
    held = moving.placement(old, new)
    return settle(worker, fault, old, new, error, held=held, switched=switched)


def refuse_to_reload(worker: Worker, moving: Rearrangement) -> None:
    """Weights must not be reloaded while rows are under way."""
    busy = (worker.model.weights, worker.model.placement, TOPOLOGY, worker.rank, _no_row)
    try:
        reload_experts(*busy, in_flight=lambda: True)
    except EplbError as error:
        if "under way" in str(error):
            return
        raise
    raise SoakError(f"a reload was allowed while {moving} was under way")


def _no_row(layer: int, name: str, expert: int):
    raise SoakError(f"a refused reload asked for {(layer, name, expert)}")


def settle(worker, fault, old, new, error, seconds=0.0, *, held=None, switched=()) -> int | None:
    """Serve by what is held now, and look whether all ranks saw what they should have seen."""
    if held is None:
        held = new if error is None else error.placement(old, new) if isinstance(error, RearrangeError) else old
    wrong = wrong_rows(list(worker.model.weights.layers), held, TOPOLOGY, worker.rank)
    worker.model.commit(held)
    is_moved = isinstance(error, RearrangeError)
    mine = {
        "kind": type(error).__name__ if error is not None else None,
        "text": str(error),
        "cause": repr(error.__cause__) if error is not None else None,
        "lost": list(error.lost_ranks) if is_moved else [],
        "agreed": error.agreed if is_moved else True,
        "left": len(error.uncommitted_layers) if is_moved else 0,
        "held": held.tolist(),
        "wrong": len(wrong),
        "fired": worker.transport.fired,
        "seconds": seconds,
        "switched": list(switched),
    }
    records = worker.tell(mine)
    problems = check_move(fault, records, old.tolist(), new.tolist())
    if problems:
        raise SoakError(f"{fault}: {'; '.join(problems)}; {[{**r, 'held': '...'} for r in records]}")
    return fault.victim if fault.loses and any(record["lost"] for record in records) else None


def balance(worker: Worker, kind: str) -> int | None:
    """A balancer, made anew, for some decisions."""
    fault = draw_fault(worker, kind, gathers=3)
    balancer = new_balancer(worker, fault)
    return conclude(worker, fault, balancer, serve_with(worker, fault, balancer, worker.random.randint(20, 50)))


def new_balancer(worker: Worker, fault: Fault, **more: Any) -> ExpertBalancer:
    """With random options."""
    chosen = options(worker, fault) | {
        "step_interval": worker.random.choice((6, 10, 16)),
        "window_size": worker.random.choice((4, 6, 20)),
        "use_async": worker.random.random() < 0.5,
        "policy": worker.random.choice(("greedy", "refined", "incremental")),
    }
    if fault.kind == "policy" and fault.victim == worker.rank:
        chosen["policy"] = "greedy" if chosen["policy"] == "incremental" else "incremental"
    metrics = BalancerMetrics(["main"]) if worker.random.random() < 0.5 else None
    balancer = ExpertBalancer(worker.model, worker.transport, chosen | more, metrics=metrics)
    if fault.kind == "planner" and fault.victim == worker.rank:
        object.__setattr__(balancer._control.models["main"], "planner", _no_plan)
    return balancer


def _no_plan(*_: Any, **__: Any):
    raise RuntimeError("told not to plan")


def serve_with(worker: Worker, fault: Fault, balancer: ExpertBalancer, batches: int) -> dict[str, Any]:
    """Serve and balance; what came of it."""
    errors, closing, switched = [], [], []
    worker.transport.arm(fault)
    for _ in range(batches):
        load = worker.serve()
        try:
            if layers := balancer.step(load if balancer.recording else None):
                switched.append((worker.batches, list(layers["main"])))
                worker.check_rows("after layers", str(layers), "switched")
        except (PlanningError, RearrangeError, TransportError, TimeoutError) as error:
            errors.append(type(error).__name__)
        if worker.any_rank(balancer.failure is not None):
            break
    try:
        balancer.close()
    except (PlanningError, RearrangeError, TransportError, TimeoutError) as error:
        closing.append(type(error).__name__)
    return {"errors": errors, "closing": closing, "switched": switched}


def conclude(worker: Worker, fault: Fault, balancer: ExpertBalancer, seen: dict[str, Any]) -> int | None:
    """Look whether all ranks saw what they should have seen."""
    held, model = worker.model.placement, balancer.state.models["main"]
    seen |= {
        "held": held.tolist(),
        "known": bool((model.placement == held).all()) and model.target is None,
        "failure": repr(balancer.failure) if balancer.failure is not None else None,
        "fired": worker.transport.fired,
    }
    worker.check_rows("after a balancer was closed")
    records = worker.tell(seen)
    if problems := check_balance(fault, records):
        told = [{**record, "held": "..."} for record in records]
        raise SoakError(f"{fault}, {balancer.config}: {'; '.join(problems)}; {told}")
    return fault.victim if fault.loses and any(record["failure"] for record in records) else None


def reload(worker: Worker, kind: str) -> None:
    """New weights into slots whose experts have moved; before that, none of the rows is right."""
    layers = worker.model.weights.layers
    for tensors in layers:
        for tensor in tensors.values():
            tensor.zero_()
    if not wrong_rows(list(layers), worker.model.placement, TOPOLOGY, worker.rank):
        raise SoakError("rows of zeros were found right")
    if kind == "broken":
        calls = []

        def source(layer, name, expert):
            calls.append(1)
            if len(calls) == 9:
                raise OSError("told that the checkpoint ends here")
            return expert_row(layer, expert, name)

        with suppress(OSError):
            reload_experts(worker.model.weights, worker.model.placement, TOPOLOGY, worker.rank, source)
            raise SoakError("a checkpoint that ends early was taken for whole")
    worker.reload()


def snapshot(worker: Worker, kind: str) -> None:
    """Save, load the model as a new process would, and go on; or find the disk full."""
    fault, balancer = _NO_FAULT, new_balancer(worker, _NO_FAULT, step_interval=6, window_size=4)
    path = Path(worker.settings.folder) / f"snapshot{worker.random.choice(('.npz', '.json'))}"
    conclude(worker, fault, balancer, serve_with(worker, fault, balancer, 15))
    before = balancer.snapshot()
    if worker.rank == 0:
        save_snapshot(path, before)
        if kind == "full":
            find_disk_full(path, before._replace(epoch=before.epoch + 1))
    worker.tell("saved")
    saved = load_snapshot(path, TOPOLOGY)
    if saved.epoch != before.epoch or (saved.physical_to_logical != worker.model.placement).any():
        raise SoakError(f"loaded another snapshot than was saved: epoch {saved.epoch}, {before.epoch}")
    worker.found(saved.physical_to_logical)
    config = balancer.config
    balancer = ExpertBalancer(worker.model, worker.transport, config)
    balancer.restore(saved)
    if (
        balancer.forecast().tolist()
        != np.asarray(config.model(TOPOLOGY, LOGICAL, 1).estimator.estimate(before.load)).tolist()
    ):
        raise SoakError("the load of the snapshot was lost")
    conclude(worker, fault, balancer, serve_with(worker, fault, balancer, 10))


def find_disk_full(path: Path, later) -> None:
    """No byte beyond the first few can be written: the old snapshot stays, and nothing else is left behind."""
    before, names = path.read_bytes(), sorted(os.listdir(path.parent))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        save_snapshot(path, later)
    except OSError:
        pass
    else:
        raise SoakError("a snapshot was saved on a full disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if path.read_bytes() != before or sorted(os.listdir(path.parent)) != names:
        raise SoakError("a full disk has changed the snapshot, or left a file behind")


EPISODES = {"move": move, "beside": beside, "balance": balance, "reload": reload, "snapshot": snapshot}
