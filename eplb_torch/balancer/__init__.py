"""The one stateful object that a serving loop holds."""

import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Real

from eplb_core import control
from eplb_core._checks import require
from eplb_core.control import ControlState, Decision, ModelConfig
from eplb_core.snapshot import Snapshot
from eplb_torch.balancer.account import Account, row_bytes
from eplb_torch.balancer.balancedness_log import BalancednessLog
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.balancer.mover import Mover, Moves, Progress
from eplb_torch.balancer.planning import LimitedPlanner, Outcome, PlanningError, plan_together
from eplb_torch.balancer.tallies import Tallies, Tokens
from eplb_torch.live_model import ServedModel
from eplb_torch.metrics import Metrics, NoMetrics
from eplb_torch.report import RearrangeError
from eplb_torch.transport import Transport, TransportError
from eplb_torch.worker import Job, Worker

Committed = Mapping[str, tuple[int, ...]]
"""Layers that have switched to new rows of their placement, by model."""

_NOTHING: Committed = MappingProxyType({})
_FAILURES = (PlanningError, RearrangeError, TransportError, TimeoutError)


class ExpertBalancer:
    """Keeps the experts of one or more models balanced while they serve.

        balancer = ExpertBalancer(experts, ProcessGroupTransport(own_group), {"step_interval": 3000})
        while serving:
            serve_one_forward()
            balancer.step(load)

    Every `step_interval` steps it adds up the loads of all ranks, decides, and moves weights if that pays; maps are
    updated in place, at the same boundary between two forwards on every rank. With `use_async` all of this but the
    copies of a commit happens on threads beside the serving one; without, inside `step`.

    **All ranks call `step` equally often, between the same forwards**, with or without load of their own: that is
    how they stay in step when some run dummy batches.

    Args:
        models: what to balance: one, which is called `"main"`, or several by name, such as `"main"` and `"draft"`.
            They share one cadence.
        transport: between the ranks of the group, used by nothing else; its `rank` is this process's ep_rank.
        config: `BalancerConfig`, or a dict with its fields, such as vLLM's `eplb_config`.
        log_transport: another one, needed for `log_balancedness` with `use_async`, where both work at the same time.
        metrics: where figures go, such as `BalancerMetrics`.

    Attributes:
        models: by name.
        decisions: the last decision for each model; empty before the first.
        failure: the error with which balancing has ended, or None. See `step`.

    Raises:
        EplbError: if models, transport and configuration do not fit each other.
    """

    def __init__(
        self,
        models: ServedModel | Mapping[str, ServedModel],
        transport: Transport,
        config: BalancerConfig | Mapping[str, Any] | None = None,
        *,
        log_transport: Transport | None = None,
        metrics: Metrics | None = None,
    ):
        self.models: dict[str, ServedModel] = dict(models) if isinstance(models, Mapping) else {"main": models}
        self.config = config if isinstance(config, BalancerConfig) else BalancerConfig.from_dict(config or {})
        self._transport = transport
        self._account = Account(NoMetrics() if metrics is None else metrics, transport.rank)
        self._control = self.config.control({name: self._configure(name, m) for name, m in self.models.items()})
        self._state = control.init(self._control, {name: model.placement for name, model in self.models.items()})
        self._mover = Mover(self.models, transport, self.config)
        self._worker = Worker("eplb-planning")
        self._job: Job | None = None
        self._count, self._next_step = 0, self._state.next_step
        self._log = self._make_log(log_transport) if self.config.log_balancedness else None
        self._tallies = Tallies(self.models, *([] if self._log is None else [self._log.tallies]))
        self.decisions: dict[str, Decision] = {}
        self.failure: Exception | None = None

    @property
    def recording(self) -> bool:
        """Whether the load of the coming step will be used. Counting may be left out while it is False."""
        if self.failure is not None:
            return False
        return self._log is not None or self._next_step - self._count <= self.config.recorded_steps

    @property
    def in_flight(self) -> bool:
        """Whether weights are being moved, or a decision to move them may be under way. `drain` ends that."""
        return self._job is not None or self._mover.busy

    @property
    def state(self) -> ControlState:
        """What the controller knows: live placements, their epochs, and the load seen."""
        return control.observe(self._control, self._state, steps=self._count - self._state.step)

    def step(
        self,
        load: Tokens = None,
        *,
        slot_load: Tokens = None,
    ) -> Committed:
        """Mark the boundary after a forward. Returns at once where nothing is to be done.

        Args:
            load: integer tokens `[layers, logical]` that this rank's router sent to each expert in that forward, of
                the only model or by name. None for a dummy batch, or while not `recording`.
            slot_load: integer tokens `[layers, slots]` that slots have served, for engines that count these.

        Returns:
            The layers that switched here, by model; mostly none. Their maps are up to date.

        Raises:
            PlanningError: ranks decided differently, or planning failed on one. Nothing has moved. All ranks raise it.
            RearrangeError: moving weights stopped half-way. What had been committed is in force, with its maps.
            TransportError, TimeoutError: a rank was not heard.
            EplbError: a load does not fit.

            Where ranks were lost, `failure` is set: from then on `step` does nothing, and the placement in force
            stays. Otherwise the next decision is made an interval later.
        """
        if self.failure is not None:
            return _NOTHING
        if (load is not None or slot_load is not None) and self.recording:
            self._tallies.add(load, slot_load)
        self._count += 1
        try:
            return self._advance()
        except _FAILURES as error:
            self._give_up(error)
            raise

    def drain(self) -> None:
        """Stop what is under way and wait until nothing is, as before weights are reloaded or the group changes.

        Every rank calls it at the same boundary. What is committed stays in force; the rest is given up.

        Raises:
            RearrangeError, TransportError, TimeoutError: as `step`.
        """
        failure = None
        while self.failure is None:
            try:
                self._settle()
                # Another rank may have begun a decision that is due, and waits for all ranks to take part.
                if self._count < self._next_step:
                    break
                self._begin()
            except _FAILURES as error:
                self._give_up(error)
                failure = failure if isinstance(error, PlanningError) else error
        if failure is not None:
            raise failure

    def halt(self) -> None:
        """End for good on this rank alone, after others were lost. For `ElasticGroup.recover`, as is `settle`.

        From now on `step` does nothing. Waits for nothing but a vote that this rank has said yes in. Threads that wait
        for other ranks end when the connections of the transport are broken, which is next.
        """
        if self.failure is None:
            self._job = None  # a decision alone has moved nothing
            self._mover.halt()
            self.failure = TransportError("the balancer was halted")
        self._stop_threads()

    def held_back(self, name: str = "main") -> Int[np.ndarray, "layers slots"] | None:
        """After `halt`, the placement that all ranks had confirmed and this one has not committed; None without one.

        Others may have committed it. It may be that what it moves is held by ranks alone that are lost.
        """
        return self._mover.held_back(name)

    def settle(self, chosen: Bool[np.ndarray, "layers slots"], name: str = "main") -> None:
        """After `halt`, commit what is `held_back`, in this rank's slots that are chosen, and let the rest go.

        The model is not told: its placement and its maps stay as they are until it is regrouped.
        """
        self._mover.settle(name, chosen)

    def renewed(self, transport: Transport, *, log_transport: Transport | None = None) -> "ExpertBalancer":
        """Go on in another group, with models that are part of it by now. Every rank calls it at the same boundary.

        The threads of this one end.

        The first decision comes after a quarter of the interval, from load that is counted from now on.

        Args:
            transport, log_transport: of the new group.

        Raises:
            EplbError: if models and transport do not fit each other.
        """
        self._stop_threads()
        metrics = self._account.metrics
        return ExpertBalancer(self.models, transport, self.config, log_transport=log_transport, metrics=metrics)

    def forecast(self, name: str = "main") -> Real[np.ndarray, "layers logical"]:
        """What the next decision would plan a model for, were it made from the decisions' load so far; zeros before."""
        estimator = self._control.models[name].estimator
        return np.asarray(estimator.estimate(self._state.models[name].load))

    def snapshot(self, name: str = "main") -> Snapshot:
        """Tell what a restart must not forget of a model, for `eplb_core.snapshot.save_snapshot`.

        Equal on all ranks; one of them may save it. Load that has not yet led to a decision is not in it.
        """
        model, state = self.models[name], self._state.models[name]
        return Snapshot(state.placement, model.topology, model.num_logical, state.epoch, state.load)

    def restore(self, snapshot: Snapshot, name: str = "main") -> None:
        """Go on where a former run has ended. Every rank calls it before the first step, with the same snapshot.

        The model must have been loaded with the placement of the snapshot.

        Raises:
            EplbError: if it was not, the balancer has other windows than the former one, or something has moved.
        """
        require(
            np.array_equal(snapshot.physical_to_logical, self._state.models[name].placement),
            "`ExpertBalancer.restore(snapshot=...)` must hold the placement that the model was loaded with",
            f"another one for {name!r}",
            "Build the model with snapshot.physical_to_logical.",
        )
        self._state = control.restore(self._control, self._state, name, snapshot.load, epoch=snapshot.epoch)

    def close(self) -> None:
        """Drain, and end the threads. Every rank calls it at the same boundary."""
        try:
            if self.failure is None:
                self.drain()
        finally:
            self._worker.stop()
            if self._log is not None:
                self._log.stop()

    def _stop_threads(self) -> None:
        self._worker.stop()
        if self._log is not None:
            self._log.forget()

    def _settle(self) -> None:
        """Wait for the decision under way, stop the moves under way, and give up what is left of the target."""
        if self._job is not None:
            self._mover.start(self._adopt(self._job.result(4 * self.config.timeout)), self._count)
        for progress in self._mover.drain(self._count):
            self._switch(progress)
        self._abandon_targets()

    def _configure(self, name: str, model: ServedModel) -> ModelConfig:
        require(
            model.topology.ep_size == self._transport.size,
            "`ExpertBalancer(transport=...)` must connect the ranks of the topology",
            f"size={self._transport.size}, ep_size={model.topology.ep_size} of {name!r}",
            "Pass a transport on the expert-parallel group.",
        )
        config = self.config.model(model.topology, model.num_logical, row_bytes(model))
        return replace(config, planner=LimitedPlanner(config.planner, model.maps.max_replicas))

    def _make_log(self, transport: Transport | None) -> BalancednessLog:
        require(
            transport is not None or not self.config.use_async,
            "`ExpertBalancer(log_transport=...)` must be given for log_balancedness with use_async",
            "None",
            "Build a second transport on a process group of its own, or set use_async=False.",
        )
        return BalancednessLog(self.models, transport or self._transport, self.config, self._account.metrics)

    def _advance(self) -> Committed:
        if self._log is not None:
            self._log.step(self._count)
        if self._mover.busy:
            progress = self._mover.step(self._count)
            return _NOTHING if progress is None else self._switch(progress)
        if self._job is not None:
            if self._job.done:
                self._mover.start(self._adopt(self._job.result(0.0)), self._count)
            return _NOTHING
        return self._begin() if self._count >= self._next_step else _NOTHING

    def _begin(self) -> Committed:
        """Decide together with all ranks: on the worker, or here and now."""
        state = self._state = self.state
        self._next_step += self.config.step_interval
        loads, seconds = self._tallies.take(), self._account.take_move_seconds()

        def decide() -> Outcome:
            return plan_together(self._transport, self._control, state, loads, seconds, self.config.timeout)

        if self.config.use_async:
            self._job = self._worker.start(decide)
            return _NOTHING
        committed = {}
        for progress in self._mover.run(self._adopt(decide())):
            committed |= self._switch(progress)
        return committed

    def _adopt(self, outcome: Outcome) -> list[Moves]:
        self._job = None
        state = control.observe(self._control, outcome.state, steps=self._count - outcome.state.step)
        self._state = control.adopt(self._control, state, outcome.decisions, step=outcome.step)
        self._next_step = self._state.next_step
        self.decisions = outcome.decisions
        self._account.decided(outcome, self._count)
        models = self._state.models
        return [
            Moves(name, plan, models[name].placement, target, models[name].epoch)
            for name, plan in outcome.plans.items()
            if (target := models[name].target) is not None
        ]

    def _switch(self, progress: Progress) -> Committed:
        """Put in force what the slots hold by now, in the model's maps and in the controller."""
        name, start, before = progress.name, time.perf_counter(), self._state.models[progress.name].placement
        layers = tuple(np.flatnonzero((progress.placement != before).any(axis=1)).tolist())
        if layers:
            self._tallies.settle(name)
            for layer in layers:
                self.models[name].commit(progress.placement[layer], layer=layer)
            self._state = control.commit(self._control, self.state, name, layers, placement=progress.placement)
            self._next_step = self._state.next_step
            self._account.switched(name, self._state.models[name].epoch, time.perf_counter() - start)
        self._account.waited(progress.waited)
        if progress.seconds is not None:
            self._account.moved(name, self.models[name], progress.seconds)
        return {name: layers} if layers else _NOTHING

    def _give_up(self, error: Exception) -> None:
        """After a failure: what is committed stays, the rest is dropped."""
        self._job = None
        self._mover.forget()
        if not self._abandon_targets():
            step = error.step if isinstance(error, PlanningError) else 0
            self._next_step = control.later(self._control, self._next_step, step)
            self._state = self._state._replace(next_step=self._next_step)
        if not isinstance(error, PlanningError) and not (isinstance(error, RearrangeError) and _may_go_on(error)):
            self.failure = error
            self._worker.stop()
        self._account.failed(self.models, error, ended=self.failure is not None)

    def _abandon_targets(self) -> bool:
        moving = [name for name, model in self._state.models.items() if model.target is not None]
        for name in moving:
            self._state = control.abandon(self._control, self._state, name)
            self._next_step = self._state.next_step
        return bool(moving)


def _may_go_on(error: RearrangeError) -> bool:
    return not error.lost_ranks and error.agreed
