"""The pure controller: when to rebalance, what is live, and under which placement load was counted.

The loop of a serving engine as a state machine without tensors, threads or a process group. Values go in and come
out; nothing is changed in place:

    state = init(config, {"main": placement})
    state = observe(config, state, {"main": load}, steps=3000)     # the group's load of the last window
    decisions = decide(config, state)                              # plans; the one slow step
    state = adopt(config, state, decisions)                        # the same on every rank
    state = commit(config, state, "main", layers)                  # as often as layers switch

`decide` is the only function that plans. One rank may run it and send the decisions to the others, whose `adopt`
brings them to the same state.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Real

from eplb_core import _ops, _tree
from eplb_core._checks import EplbError, check_count, check_indices, check_kind, require
from eplb_core.control.config import ControlConfig, ModelConfig, check_range
from eplb_core.control.decision import Decision, Reason, acts, compare, decide, due
from eplb_core.control.state import (
    HISTORY,
    Change,
    ControlState,
    ModelState,
    differing,
    frozen,
    placement_at,
    switch,
)
from eplb_core.load import logical_load
from eplb_core.placement import check_placement

__all__ = (
    "HISTORY",
    "Change",
    "ControlConfig",
    "ControlState",
    "Decision",
    "ModelConfig",
    "ModelState",
    "Reason",
    "abandon",
    "adopt",
    "commit",
    "compare",
    "decide",
    "due",
    "init",
    "later",
    "measure",
    "observe",
    "placement_at",
    "restore",
)

_MEMORY = 0.5  # weight of what was believed of the slowness of moves


def init(config: ControlConfig, placements: Mapping[str, Int[Any, "layers slots"]]) -> ControlState:
    """Begin with the placements that the models were loaded with.

    Raises:
        EplbError: if models and placements differ in name, or a placement is malformed or lacks an expert.
    """
    check_kind(config, ControlConfig, "init(config=...)")
    check_kind(placements, Mapping, "init(placements=...)")
    _check_names("init(placements=...)", placements, config, exact=True)
    models = {}
    for name, model in config.models.items():
        placement = _checked_placement(placements[name], model)
        load = model.estimator.init(len(placement), model.num_logical)
        models[name] = ModelState(frozen(placement), None, 0, (), load, False, 1.0, None)
    return ControlState(0, config.first_step, models)


def observe(
    config: ControlConfig,
    state: ControlState,
    loads: Mapping[str, Real[Any, "layers _"]] | None = None,
    *,
    epochs: Mapping[str, int] | None = None,
    steps: int = 1,
) -> ControlState:
    """Let steps pass, and take in the load that was counted in them.

    Args:
        config: as for `init`.
        state: before.
        loads: integer tokens of the whole group by model name, `[layers, logical]`; nothing for models that served
            none, and None for dummy steps, which count as steps and nothing else.
        epochs: models whose `loads` are `[layers, slots]` tokens per slot, with the epoch under which they were
            counted. They are credited to the experts that the slots held *then*.
        steps: how many have passed, >= 0.

    Raises:
        EplbError: if a load is malformed, a name is unknown, or an epoch is in the future or forgotten.
    """
    _check_kinds("observe", config, state)
    steps = check_count(steps, "observe(steps=...)")
    loads, epochs = {} if loads is None else loads, {} if epochs is None else epochs
    check_kind(loads, Mapping, "observe(loads=...)")
    check_kind(epochs, Mapping, "observe(epochs=...)")
    _check_names("observe(loads=...)", loads, config)
    _check_names("observe(epochs=...)", epochs, config)
    models = dict(state.models)
    for name, load in loads.items():
        model, before = config.models[name], state.models[name]
        if name in epochs:
            load = logical_load(load, placement_at(before, epochs[name]), model.num_logical)
        models[name] = before._replace(load=model.estimator.update(before.load, load))
    return ControlState(state.step + steps, state.next_step, models)


def adopt(
    config: ControlConfig, state: ControlState, decisions: Mapping[str, Decision], *, step: int | None = None
) -> ControlState:
    """Take the decisions over: placements to move to become targets, and the next decision is due an interval later.

    An interval is counted from the step at which this decision was due, not from now: ranks may adopt at different
    steps, and must agree on the next one.

    Args:
        config: as for `init`.
        state: before.
        decisions: from `decide`, of this rank or another.
        step: the last step at which any rank has begun this decision, if ranks begin at different steps; decisions
            that were due up to it are left out.

    Raises:
        EplbError: if a placement is malformed or lacks an expert, or a rearrangement is under way.
    """
    _check_kinds("adopt", config, state)
    check_kind(decisions, Mapping, "adopt(decisions=...)")
    for decision in decisions.values():
        check_kind(decision, Decision, "adopt(decisions={...: decision})")
    _check_names("adopt(decisions=...)", decisions, config)
    models = dict(state.models)
    for name, decision in decisions.items():
        if decision.reason is Reason.NOT_DUE:
            continue
        after = models[name]
        if decision.balancedness is not None:
            after = after._replace(acting=acts(config, after, decision.balancedness))
        if decision.placement is not None:
            after = _with_target(config.models[name], after, decision)
        models[name] = after
    if all(decision.reason is Reason.NOT_DUE for decision in decisions.values()):
        return state
    next_step = state.next_step + config.interval
    return ControlState(state.step, next_step if step is None else later(config, next_step, step), models)


def commit(
    config: ControlConfig,
    state: ControlState,
    name: str,
    layers: Sequence[int] | None = None,
    *,
    placement: Int[Any, "layers slots"] | None = None,
) -> ControlState:
    """Put layers of a target in force: weights and maps of these have switched. Begins a new epoch.

    Args:
        config: as for `init`.
        state: before.
        name: of the model.
        layers: those that switched; all that differ by default.
        placement: `[layers, slots]` what the slots hold now, where that is between old and target
            (`Rearrangement.placement`); the target by default.

    Returns:
        The state; without a target once no layer differs from it. Decisions that fell due while layers moved are
        left out.

    Raises:
        EplbError: if nothing is under way, a layer does not exist, or the placement lacks an expert.
    """
    before, target = _moving(config, state, name, "commit")
    if layers is None:
        layers = differing(before)
    else:
        advice = "Count layers as the placement does."
        layers = tuple(check_indices(layers, len(before.placement), "commit(layers=...)", "layers", advice).tolist())
    held = target if placement is None else _checked_placement(placement, config.models[name], len(target))
    after = switch(before, layers, held[list(layers)]) if layers else before
    next_step = state.next_step
    if not differing(after):
        after = after._replace(target=None)
        next_step = later(config, next_step, state.step)
    return ControlState(state.step, next_step, {**state.models, name: after})


def abandon(config: ControlConfig, state: ControlState, name: str) -> ControlState:
    """Give a target up, after a failure or a drain: what is committed stays, and the next decision starts from there,
    an interval later than it would have been due.

    Raises:
        EplbError: if nothing is under way.
    """
    after = _moving(config, state, name, "abandon")[0]._replace(target=None, expected_seconds=None)
    return ControlState(state.step, state.next_step + config.interval, {**state.models, name: after})


def measure(config: ControlConfig, state: ControlState, name: str, seconds: float) -> ControlState:
    """Correct the prices of `ModelConfig.costs` by the time that the last moves have taken.

    Give every rank the same figure, such as the largest of all, where every rank decides. Half of what was believed
    is kept. Does nothing if no price was put on these moves, or they have been measured already.

    Raises:
        EplbError: if `seconds` is negative or not finite.
    """
    _check_kinds("measure", config, state, name)
    _check_names("measure(name=...)", (name,), config)
    check_range("seconds", seconds, 0, 1e9, "seconds", "measure")
    before = state.models[name]
    if not before.expected_seconds:
        return state
    factor = _MEMORY + (1 - _MEMORY) * seconds / before.expected_seconds
    after = before._replace(slowness=before.slowness * factor, expected_seconds=None)
    return state._replace(models={**state.models, name: after})


def restore(config: ControlConfig, state: ControlState, name: str, load: Any, *, epoch: int = 0) -> ControlState:
    """Go on with the load that a former run has seen, such as that of a `Snapshot`.

    The model must have been loaded with the placement of that time, which `init` was given. Counts tagged with epochs
    before this one cannot be observed.

    Args:
        config: as for `init`.
        state: before anything was committed.
        name: of the model.
        load: a state of the model's estimator; lists may stand for tuples.
        epoch: of the placement.

    Raises:
        EplbError: if the load is not of this estimator and these sizes, or layers have moved already.
    """
    _check_kinds("restore", config, state, name)
    epoch = check_count(epoch, "restore(epoch=...)")
    _check_names("restore(name=...)", (name,), config)
    before = state.models[name]
    require(
        before.epoch == 0 and before.target is None,
        "`restore` must come before the first commit",
        f"epoch {before.epoch} of {name!r}, epoch={epoch}",
        "Call it after init.",
    )
    after = before._replace(load=_tree.like(load, before.load, "load"), epoch=epoch)
    return state._replace(models={**state.models, name: after})


def later(config: ControlConfig, next_step: int, step: int) -> int:
    """The first step after `step` that is `next_step` or whole intervals later.

    >>> from eplb_core import Topology
    >>> later(ControlConfig({"main": ModelConfig(Topology(1, 1), 1)}, interval=10), next_step=25, step=47)
    55
    """
    check_kind(config, ControlConfig, "later(config=...)")
    next_step, step = check_count(next_step, "later(next_step=...)"), check_count(step, "later(step=...)")
    return next_step + max((step - next_step) // config.interval + 1, 0) * config.interval


def _with_target(model: ModelConfig, state: ModelState, decision: Decision) -> ModelState:
    require(
        state.target is None,
        "`adopt(decisions=...)` must wait until the rearrangement before has ended",
        "a target that is not committed yet",
        "Commit its layers, or abandon it.",
    )
    target = _checked_placement(decision.placement, model, len(state.placement))
    after = state._replace(target=frozen(target), expected_seconds=decision.cost_seconds)
    return after if differing(after) else state


def _moving(config: ControlConfig, state: ControlState, name: str, verb: str) -> tuple[ModelState, np.ndarray]:
    _check_kinds(verb, config, state, name)
    _check_names(f"{verb}(name=...)", (name,), config)
    model = state.models[name]
    if model.target is None:
        raise EplbError(
            f"`{verb}(name=...)` must name a model that is moving to a target; got name={name!r} with nothing under "
            "way. Adopt a decision to rebalance first."
        )
    return model, model.target


def _checked_placement(placement: Any, model: ModelConfig, num_layers: int | None = None) -> np.ndarray:
    """A copy as int32 of a placement in which every expert has a slot."""
    ids = np.asarray(_ops.as_array(placement))
    check_placement(ids, model.topology, model.num_logical)
    require(
        num_layers in (None, len(ids)),
        "a placement must have the layers of the one before",
        f"{len(ids)} layers, {num_layers} before",
        "Pass a placement of the same model.",
    )
    return np.array(ids, dtype=np.int32)


def _check_kinds(where: str, config: Any, state: Any, name: Any = "") -> None:
    check_kind(config, ControlConfig, f"{where}(config=...)")
    check_kind(state, ControlState, f"{where}(state=...)")
    check_kind(name, str, f"{where}(name=...)")


def _check_names(where: str, names: Iterable[str], config: ControlConfig, *, exact: bool = False) -> None:
    given, known = set(names), set(config.models)
    require(
        given == known if exact else given <= known,
        f"`{where}` must name {'exactly ' if exact else ''}the configured models",
        f"{sorted(map(str, given))}, configured {sorted(known)}",
        "Use the names of ControlConfig.models.",
    )
