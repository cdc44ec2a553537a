"""Carry out an elastic plan for one model: rows from copies, then from a checkpoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eplb_core import EMPTY
from eplb_core._checks import EplbError, LostExpertsError, require
from eplb_core.elastic.plan import ElasticPlan
from eplb_torch.execute import rearrange
from eplb_torch.live_model import ElasticModel
from eplb_torch.report import RearrangeError
from eplb_torch.transport import Transport
from eplb_torch.weights import ExpertWeights

ReadRow = Callable[[int, str, int], Any]
"""`(layer, name of a registered tensor, logical expert) -> [...]`: its row, a tensor or an array."""


class MoveOptions(NamedTuple):
    """How rows travel; as for `rearrange`."""

    timeout: float
    max_staging_bytes: int
    checksum: bool


def check_plan(plan: ElasticPlan, read_row: ReadRow | None) -> None:
    """Refuse a plan that leaves experts without a slot, or without a source, before anything has changed.

    Raises:
        LostExpertsError: if no rank holds what the plan needs, and there is no checkpoint.
        EplbError: if there are too few slots.
    """
    if plan.unhosted:
        raise EplbError(f"{' '.join(plan.problems())} Nothing was moved; ranks keep what they hold.")
    if plan.reload and read_row is None:
        raise LostExpertsError(
            list(plan.reload),
            "`ElasticGroup` needs a copy of every expert, or a checkpoint",
            "Pass read_row=..., such as `eplb_core.checkpoint.CheckpointRows`, and recover again. Ranks keep what "
            "they hold.",
        )


def carry_out(
    plan: ElasticPlan,
    model: ElasticModel,
    group: dist.ProcessGroup | None,
    transport: Transport,
    options: MoveOptions,
    *,
    epoch: int,
    read_row: ReadRow | None = None,
) -> None:
    """Bring a model from `plan.old` to `plan.new` in the ranks of `plan.group`. A collective.

    At every moment `model.placement` says what this rank's slots hold, so that after an error the next plan can be
    made from it. The model must not be served until all ranks have returned.

    Args:
        plan: the same on all ranks; see `check_plan`.
        model: regrouped here; its weights must have the slots of `plan.group`.
        group: for the model's tokens.
        transport: between the same ranks.
        options: of the moves.
        epoch: a number that all ranks agree on, such as the generation.
        read_row: for what no rank holds.

    Raises:
        RearrangeError: if rows could not be moved.
        EplbError: if a row that was read does not fit; and whatever `read_row` raises.
    """
    model.regroup(plan.old, plan.group, group)
    reload = plan.reload_slots()
    moved = plan.new.copy()
    moved[reload[:, 0], reload[:, 1]] = EMPTY
    try:
        rearrange(model.weights, plan.moves(), plan.group, transport, epoch=epoch, **options._asdict())
    except RearrangeError as error:
        model.regroup(error.placement(plan.old, moved), plan.group, group)
        raise
    model.regroup(moved, plan.group, group)
    first = transport.rank * plan.group.slots_per_rank
    own = [(layer, slot - first, expert) for layer, slot, expert in reload.tolist()]
    own = [(layer, slot, expert) for layer, slot, expert in own if 0 <= slot < plan.group.slots_per_rank]
    if own:
        require(read_row is not None, "`carry_out(read_row=...)` must be given", "None", "Call `check_plan` first.")
        assert read_row is not None
        _read(model.weights, own, read_row)
    model.commit(plan.new)


def _read(weights: ExpertWeights, own: list[tuple[int, int, int]], read_row: ReadRow) -> None:
    """Write the rows of (layer, local slot, expert) triples, then bring derived tensors up to date."""
    for layer, slot, expert in own:
        for field in weights.fields(layer):
            row = _as_tensor(read_row(layer, field.name, expert))
            require(
                (tuple(row.shape), row.dtype) == (field.shape, field.dtype),
                "`read_row` must return rows of the shape and dtype of the registered tensor",
                f"{tuple(row.shape)} {row.dtype} for {(layer, field.name, expert)}, not {field.shape} {field.dtype}",
                "Convert and slice the row as when the model was first loaded.",
            )
            with torch.no_grad():
                weights.layers[layer][field.name][slot].copy_(row)
    for layer in sorted({layer for layer, _, _ in own}):
        weights.refresh(layer, tuple(sorted(slot for at, slot, _ in own if at == layer)))


def _as_tensor(row: Any) -> Tensor:
    return row if isinstance(row, Tensor) else torch.from_numpy(np.array(row))
