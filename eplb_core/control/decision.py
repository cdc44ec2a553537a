"""Whether to rebalance now: what a placement would gain, what its moves cost, and the verdict with its reason."""

from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from eplb_core import _ops
from eplb_core._checks import check_kind
from eplb_core.control.config import ControlConfig, ModelConfig
from eplb_core.control.state import ControlState, ModelState, frozen
from eplb_core.costs import Costs, migration_cost
from eplb_core.maps import count_replicas
from eplb_core.metrics import model_balancedness, moved_experts, rank_load
from eplb_core.moves import MovePlan, plan_moves
from eplb_core.placement import check_placement
from eplb_core.topology import Topology


class Reason(StrEnum):
    """Why a decision fell as it did.

    NOT_DUE: the interval is not over, or the rearrangement before is still under way.
    BALANCED: the live placement is balanced enough, or the planner would leave it as it is.
    NOT_WORTH_IT: a better placement exists, but gains too little or costs more time than it saves.
    REBALANCE: move to the decision's placement.
    """

    NOT_DUE = "not_due"
    BALANCED = "balanced"
    NOT_WORTH_IT = "not_worth_it"
    REBALANCE = "rebalance"


class Decision(NamedTuple):
    """What to do for one model, and the numbers behind it. All but `reason` are None where they were not worked out.

    reason: why.
    balancedness: of the live placement under the estimated load, in (0, 1]; all layers together.
    predicted_balancedness: of `placement`, or of the one that was not worth it.
    moved_experts: (layer, rank, expert) that a rank would receive.
    bytes_moved: their bytes.
    bytes_across_nodes: those of them that leave a node.
    saved_seconds: time that serving would save over the horizon.
    cost_seconds: time that moving would take from serving.
    placement: int32 `[layers, slots]` to move to; None unless `reason` is `REBALANCE`.
    plan: the moves that lead there; None likewise. Experts without any copy have `EMPTY` sources: reload them.
    """

    reason: Reason
    balancedness: float | None = None
    predicted_balancedness: float | None = None
    moved_experts: int | None = None
    bytes_moved: int | None = None
    bytes_across_nodes: int | None = None
    saved_seconds: float | None = None
    cost_seconds: float | None = None
    placement: np.ndarray | None = None
    plan: MovePlan | None = None

    def in_words(self) -> str:
        """Say it in a line, for a log.

        >>> Decision(Reason.NOT_WORTH_IT, 0.8, 0.9, 12, saved_seconds=0.1, cost_seconds=0.5).in_words()
        'not_worth_it: balancedness 0.800, would be 0.900 after 12 moved experts, saving 0.1 s at a cost of 0.5 s'
        """
        text = [self.reason.value + ":" if self.balancedness is not None else self.reason.value]
        if self.balancedness is not None:
            text.append(f"balancedness {self.balancedness:.3f}")
        if self.predicted_balancedness is not None:
            text[-1] += f", would be {self.predicted_balancedness:.3f} after {self.moved_experts} moved experts"
        if self.cost_seconds is not None:
            text[-1] += f", saving {self.saved_seconds:.3g} s at a cost of {self.cost_seconds:.3g} s"
        return " ".join(text)


class Comparison(NamedTuple):
    """Two placements under one load, layer by layer.

    mean: floating `[layers]` tokens of the mean rank.
    busiest_before: floating `[layers]` tokens of the busiest rank under the old placement.
    busiest_after: the same under the new one.
    moved: int32 `[layers]` (rank, expert) pairs to receive.
    """

    mean: Any
    busiest_before: Any
    busiest_after: Any
    moved: Any

    def balancedness(self) -> tuple[Any, Any]:
        """Balancedness of the model before and after: sum of means / sum of maxima, 1 without load."""
        return _ratio(self.mean, self.busiest_before), _ratio(self.mean, self.busiest_after)


def compare(
    old: Int[Any, "layers slots"],
    new: Int[Any, "layers slots"],
    load: Real[Any, "layers logical"],
    topology: Topology,
) -> Comparison:
    """Compare two placements under one load. A transform: works under `jax.jit` with `topology` static.

    Raises:
        EplbError: as `rank_load`.

    >>> both = compare(np.asarray([[0, 1, 2, 0]]), np.asarray([[0, 1, 2, 1]]), np.asarray([[2, 8, 2]]), Topology(2, 2))
    >>> both.busiest_before.tolist(), both.busiest_after.tolist(), both.moved.tolist()
    ([9.0], [6.0], [1])
    """
    before, after = rank_load(old, load, topology), rank_load(new, load, topology)
    xp = _ops.namespace(before)
    mean = _ops.divide(_ops.tree_sum(xp.astype(_ops.as_array(load), before.dtype)), topology.ep_size)
    return Comparison(mean, xp.max(before, axis=-1), xp.max(after, axis=-1), moved_experts(old, new, topology))


def worth_their_share(saved: Float[Any, " layers"], moved: Int[Any, " layers"], cost: float, min_return: float) -> Any:
    """Tell which layers save at least `min_return` times their share of the cost, shared out by moved experts.

    >>> worth_their_share(np.asarray([5.0, 1.0, 0.0]), np.asarray([1, 3, 0]), cost=8.0, min_return=1.0).tolist()
    [True, False, False]
    """
    xp = _ops.namespace(saved)
    floating = _ops.float_dtype(xp)
    total = xp.sum(moved)
    share = xp.astype(moved, floating) * (cost * min_return / xp.astype(xp.where(total > 0, total, 1), floating))
    return (saved > 0) & (saved >= share)


def due(state: ControlState) -> bool:
    """Whether the interval is over and no rearrangement is under way."""
    check_kind(state, ControlState, "due(state=...)")
    return state.step >= state.next_step and all(model.target is None for model in state.models.values())


def decide(config: ControlConfig, state: ControlState) -> dict[str, Decision]:
    """Decide for every model whether to rebalance, and plan its placement if so.

    Gates, in this order: the interval; the threshold with its hysteresis; the least gain; and, with
    `ModelConfig.costs`, seconds saved against seconds spent, first layer by layer, then for all that is left. A
    placement in which an expert has no copy is replaced whatever the other gates say.

    Returns:
        A `Decision` for each model; all `NOT_DUE` where `due` is false.

    Raises:
        EplbError: if the planner refuses, or what it returns is no placement of every expert.
    """
    check_kind(config, ControlConfig, "decide(config=...)")
    if not due(state):
        return dict.fromkeys(config.models, Decision(Reason.NOT_DUE))
    return {name: _decide_model(config, model, state.models[name]) for name, model in config.models.items()}


def acts(config: ControlConfig, state: ModelState, balancedness: float) -> bool:
    """Whether something shall be done about this balancedness."""
    return balancedness < (config.threshold if state.acting else config.threshold - config.hysteresis)


def _decide_model(config: ControlConfig, model: ModelConfig, state: ModelState) -> Decision:
    load = np.asarray(model.estimator.estimate(state.load))
    held = float(model_balancedness(state.placement, load, model.topology))
    balanced = Decision(Reason.BALANCED, balancedness=held)
    lost = bool((count_replicas(state.placement, model.num_logical) == 0).any())
    if not lost and not acts(config, state, held):
        return balanced
    target = np.asarray(_ops.as_array(model.planner(load, model.topology, previous=state.placement)))
    check_placement(target, model.topology, model.num_logical)
    target = target.astype(np.int32)
    if np.array_equal(target, state.placement):
        return balanced
    decision, both = _weigh(config, model, state, load, target, allow_lost=lost)
    if not lost and decision.cost_seconds is not None:
        saved = _saved_seconds(config, model, state, both)
        keep = worth_their_share(saved, both.moved, decision.cost_seconds, config.min_return)
        worthwhile = np.where(keep[:, None], target, state.placement)
        if not np.array_equal(worthwhile, target):
            target = worthwhile
            decision, both = _weigh(config, model, state, load, target)
    if lost or _pays(config, decision, both):
        plan = decision.plan or plan_moves(state.placement, target, model.topology, allow_lost=lost)
        return decision._replace(reason=Reason.REBALANCE, placement=frozen(target), plan=plan)
    return decision._replace(plan=None)


def _weigh(
    config: ControlConfig, model: ModelConfig, state: ModelState, load, target, *, allow_lost: bool = False
) -> tuple[Decision, Comparison]:
    """What a target would bring and cost, as a decision against it."""
    both = compare(state.placement, target, load, model.topology)
    held, predicted = (float(x) for x in both.balancedness())
    decision = Decision(Reason.NOT_WORTH_IT, held, predicted, int(both.moved.sum()))
    if model.costs is None:
        return decision, both
    plan = plan_moves(state.placement, target, model.topology, allow_lost=allow_lost)
    migration = migration_cost(state.placement, target, model.topology, model.costs, plan=plan)
    decision = decision._replace(
        bytes_moved=migration.bytes_moved,
        bytes_across_nodes=migration.bytes_across_nodes,
        saved_seconds=float(_saved_seconds(config, model, state, both).sum()),
        cost_seconds=0.0 if model.costs.overlapped else migration.seconds * state.slowness,
        plan=plan,
    )
    return decision, both


def _pays(config: ControlConfig, decision: Decision, both: Comparison) -> bool:
    before, after = float(both.busiest_before.sum()), float(both.busiest_after.sum())
    if after >= before or before - after < config.min_gain * before:
        return False
    if decision.saved_seconds is None or decision.cost_seconds is None:
        return True
    return decision.saved_seconds >= config.min_return * decision.cost_seconds


def _saved_seconds(config: ControlConfig, model: ModelConfig, state: ModelState, both: Comparison) -> np.ndarray:
    """`[layers]` seconds of serving saved over the horizon."""
    costs: Costs = model.costs or Costs()
    steps = max(float(model.estimator.windows(state.load)), 1.0) * config.window_steps
    tokens = (both.busiest_before - both.busiest_after) * (config.horizon_steps / steps)
    return tokens * (costs.seconds_per_token * costs.scale)


def _ratio(mean, busiest):
    xp = _ops.namespace(mean)
    total, maxima = _ops.tree_sum(mean), _ops.tree_sum(busiest)
    return xp.where(maxima > 0, total / xp.where(maxima > 0, maxima, 1.0), 1.0)
