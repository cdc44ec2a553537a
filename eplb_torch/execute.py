"""Carry out a move plan on this rank's weights, all at once."""

from eplb_core import MovePlan, Topology
from eplb_torch.report import RearrangeError, RearrangeReport
from eplb_torch.staging import Staging
from eplb_torch.transaction import Options, Transaction
from eplb_torch.transport import Transport
from eplb_torch.weights import ExpertWeights

__all__ = ("RearrangeError", "RearrangeReport", "rearrange")


def rearrange(
    weights: ExpertWeights,
    plan: MovePlan,
    topology: Topology,
    transport: Transport,
    *,
    timeout: float,
    max_staging_bytes: int = 256 * 2**20,
    checksum: bool = False,
    epoch: int = 0,
    staging: Staging | None = None,
) -> RearrangeReport:
    """Move this rank's part of a plan. A collective: every rank of the transport calls it with the same plan.

    First all ranks compare a hash of plan, epoch and tensor layout. Then, for each group of layers, rows are
    received into staging, all ranks report success, and only then are weights written. A failure before that leaves
    the group as it was, on all ranks: how they decide, and what is guaranteed when a rank is lost while they do, is
    told at `agreement.decide`. `Rearrangement` does the same while the model serves.

    Args:
        weights: this rank's tensors, one layer for each of the plan.
        plan: from `plan_moves`, the same on all ranks.
        topology: sizes; `ep_size` is that of the transport, `slots_per_rank` that of the weights.
        transport: how bytes travel.
        timeout: seconds that the messages of one group may take. A vote waits half as long again, so every rank
            returns within 1.5 times this after the last group was begun, however its peers fail.
        max_staging_bytes: most that a rank holds outside its weights. Layers share a group as long as they fit. A
            layer that does not fit alone is split, and is then in placements between old and new on the way (see
            `RearrangeError.split_layers`). Rows that replace each other in a cycle cannot be split: they take the
            memory they need.
        checksum: send a checksum with every row and compare it before the commit.
        epoch: the caller's number of this rearrangement; ranks that disagree about it move nothing.
        staging: memory to use, from `reserve`; by default it is allocated here.

    Returns:
        `RearrangeReport` of this rank.

    Raises:
        EplbError: if plan, topology, weights and transport do not fit on this rank.
        RearrangeError: on every rank that is left, if ranks disagree, or one failed or was lost on the way.
    """
    options = Options(timeout=timeout, max_staging_bytes=max_staging_bytes, checksum=checksum, epoch=epoch)
    transaction = Transaction(weights, plan, topology, transport, options, staging)
    for part in transaction.agree():
        transaction.commit(transaction.prepare(part))
    return transaction.report()
