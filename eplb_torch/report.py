"""What a rearrangement has done, or how far it came."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from eplb_core._checks import listing


@dataclass(frozen=True, slots=True)
class RearrangeReport:
    """What one rank did.

    p2p_ops: messages with rows, sent and received.
    bytes_sent, bytes_received: payload of these messages.
    peak_staging_bytes: most bytes that lay in buffers outside the weights at one time.
    seconds: wall-clock time of the call.
    committed_layers: layers that now hold the new placement: all of the plan's.
    """

    p2p_ops: int
    bytes_sent: int
    bytes_received: int
    peak_staging_bytes: int
    seconds: float
    committed_layers: tuple[int, ...]


class RearrangeError(RuntimeError):
    """A rearrangement stopped. What is committed stays; the rest was not touched.

    To go on, plan again from the placement that is now in force, `error.placement(old, new)`.

    Attributes:
        committed_layers: layers that hold the new placement.
        uncommitted_layers: all others. They hold exactly the old placement, except those in `split_layers`.
        split_layers: layers too large for the staging memory that were caught between two of their parts. They
            hold a placement between old and new, in which no expert is missing.
        lost_ranks: ranks of which this one cannot tell what they have committed: dead, hung or cut off.
        agreed: all ranks but the lost ones have stopped at the same point. False only if two or more ranks were lost
            in the very same vote, so that others may have heard what this rank has not.
    """

    def __init__(
        self,
        committed_layers: tuple[int, ...],
        uncommitted_layers: tuple[int, ...],
        reason: str = "Rearrangement stopped.",
        *,
        committed_slots: Bool[np.ndarray, "layers slots"] | None = None,
        lost_ranks: tuple[int, ...] = (),
        agreed: bool = True,
    ):
        self.committed_layers, self.uncommitted_layers = committed_layers, uncommitted_layers
        self.lost_ranks, self.agreed = lost_ranks, agreed
        self._committed_slots = committed_slots
        partly = [] if committed_slots is None else [x for x in uncommitted_layers if committed_slots[x].any()]
        self.split_layers = tuple(partly)
        text = [reason, f"Committed layers: {listing(committed_layers)}; uncommitted: {listing(uncommitted_layers)}."]
        if partly:
            text.append(f"Partly committed: {listing(partly)}.")
        if lost_ranks:
            text.append(f"Ranks {listing(lost_ranks)} were lost: their weights may hold either placement.")
        if not agreed:
            text.append("Other ranks may have committed one group more: compare before serving on.")
        text.append("Plan again from `error.placement(old, new)` to resume.")
        super().__init__(" ".join(text))

    def placement(
        self, old: Int[np.ndarray, "layers slots"], new: Int[np.ndarray, "layers slots"]
    ) -> Int[np.ndarray, "layers slots"]:
        """The placement in force: what to serve by, and to plan from.

        Args:
            old, new: the placements that the plan was made from, int32.
        """
        committed = self._committed_slots
        if committed is None:
            committed = np.isin(np.arange(len(old)), self.committed_layers)[:, None]
        return np.where(committed, new, old)
