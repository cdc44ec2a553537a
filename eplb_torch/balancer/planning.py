"""One decision of all ranks: add up what each has counted, decide, and compare."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import MovePlan, Topology
from eplb_core._checks import require
from eplb_core.control import ControlConfig, ControlState, Decision, decide, measure, observe
from eplb_core.maps import count_replicas
from eplb_core.metrics import received_experts
from eplb_torch.transport import Transport, TransportError

_DIGEST_BYTES = 16
_FAILED = bytes(_DIGEST_BYTES)


class PlanningError(RuntimeError):
    """Ranks could not agree on a decision. Nothing has moved; all ranks raise it, and may decide again later.

    Attributes:
        step: the last step at which any rank has begun this decision.
    """

    def __init__(self, text: str, step: int = 0):
        super().__init__(text)
        self.step = step


class Outcome(NamedTuple):
    """What all ranks have decided.

    state: with the load of the whole group observed; not yet adopted.
    decisions: by model.
    plans: of the models that are to move.
    received: by each of these, how many experts ranks receive within their node, and from other nodes.
    seconds: that planning took on this rank.
    step: the last step at which any rank has begun this decision.
    """

    state: ControlState
    decisions: dict[str, Decision]
    plans: dict[str, MovePlan]
    received: dict[str, tuple[int, int]]
    seconds: float
    step: int


class LimitedPlanner(NamedTuple):
    """A planner whose placements the maps of a model have room for.

    planner: as in `eplb_core.control.ModelConfig`.
    max_replicas: most copies of one expert.
    """

    planner: Callable[..., Any]
    max_replicas: int

    def __call__(self, load, topology: Topology, *, previous):
        """Plan.

        Raises:
            EplbError: if an expert has more copies than fit.
        """
        placement = self.planner(load, topology, previous=previous)
        most = int(count_replicas(np.asarray(placement), load.shape[-1]).max())
        require(
            most <= self.max_replicas,
            "a planner must give no expert more copies than the maps have room for",
            f"{most} copies, max_replicas={self.max_replicas}",
            "Build wider maps.",
        )
        return placement


def plan_together(
    transport: Transport,
    config: ControlConfig,
    state: ControlState,
    loads: Mapping[str, Int[np.ndarray, "layers logical"]],
    seconds: Mapping[str, float],
    timeout: float,
) -> Outcome:
    """Let every rank plan from the sum of all ranks' loads, and compare what they decided.

    All plan, instead of one that sends its decision: planning is a deterministic function of integers, takes the
    others no time that they would not spend waiting, and leaves no rank that the others hang on. Should processors or
    versions ever differ in a result, comparing 16 bytes shows it before a weight moves.

    Args:
        transport: of all ranks.
        config, state: of the controller, equal on all ranks.
        loads: int64 tokens of this rank, by model; every model on every rank.
        seconds: that the last moves of each model took on this rank; the largest of all ranks' is measured.
        timeout: seconds that each of two messages may take.

    Raises:
        TransportError: if a rank was not heard.
        PlanningError: if a rank failed or decided differently.
    """
    names = sorted(config.models)
    payload = b"".join(np.ascontiguousarray(loads[name], dtype=np.int64).tobytes() for name in names)
    times = np.asarray([seconds.get(name, -1.0) for name in names])
    clock = np.asarray([state.step], dtype=np.int64).tobytes()
    heard = _all_of(transport.gather(clock + times.tobytes() + payload, timeout))
    step = max(int(np.frombuffer(payload, dtype=np.int64, count=1)[0]) for payload in heard)
    error: Exception | None = None
    outcome = None
    try:
        outcome = _plan(config, state, names, heard, step)
        mine = _digest(names, outcome)
    except Exception as failure:
        error, mine = failure, _FAILED
    digests = _all_of(transport.gather(mine, timeout))
    failed = [rank for rank, digest in enumerate(digests) if digest == _FAILED]
    if outcome is None or failed:
        raise PlanningError(f"planning failed on ranks {failed}: {error or 'see their errors'}", step) from error
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise PlanningError(
            f"ranks {odd} decided differently from rank 0, from the same load. Give all ranks one configuration, one "
            "version of every library, and a planner that depends on nothing else.",
            step,
        )
    return outcome


def _all_of(payloads: list[bytes | None]) -> list[bytes]:
    silent = [rank for rank, payload in enumerate(payloads) if payload is None]
    if silent:
        raise TransportError(f"ranks {silent} did not answer")
    return [payload for payload in payloads if payload is not None]


def _plan(config: ControlConfig, state: ControlState, names: list[str], heard: list[bytes], step: int) -> Outcome:
    rows = np.stack([np.frombuffer(payload, dtype=np.int64) for payload in heard])
    start = 1 + len(names)
    seconds = rows[:, 1:start].view(np.float64).max(axis=0)
    total = rows.sum(axis=0)
    loads = {}
    for name, spent in zip(names, seconds.tolist(), strict=True):
        shape = (len(state.models[name].placement), config.models[name].num_logical)
        loads[name] = total[start : start + shape[0] * shape[1]].reshape(shape)
        start += shape[0] * shape[1]
        if spent >= 0:
            state = measure(config, state, name, spent)
    begun = time.perf_counter()
    state = observe(config, state, loads, steps=0)
    decisions = decide(config, state)
    plans = {name: decision.plan for name, decision in decisions.items() if decision.plan is not None}
    received = {}
    for name, plan in plans.items():
        within, across = received_experts(plan, config.models[name].topology)
        received[name] = (int(within.sum()), int(across.sum()))
    return Outcome(state, decisions, plans, received, time.perf_counter() - begun, step)


def _digest(names: list[str], outcome: Outcome) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in names:
        decision, model = outcome.decisions[name], outcome.state.models[name]
        digest.update(f"{name} {decision.reason} {model.epoch} ".encode())
        digest.update(np.ascontiguousarray(model.placement).tobytes())
        if decision.placement is not None:
            digest.update(np.ascontiguousarray(decision.placement).tobytes())
    return digest.digest()
