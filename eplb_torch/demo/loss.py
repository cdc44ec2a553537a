"""What it took the ranks that are left to serve again after one was killed."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from eplb_core import EMPTY
from eplb_core.elastic.plan import ElasticPlan
from eplb_torch.demo.ranks import Killed


class Rehosted(NamedTuple):
    """What one rank received after the loss, counted as (layer, expert) pairs.

    slots: that it has in each layer.
    from_copies: experts that other ranks still held.
    from_checkpoint: experts that no rank held any more.
    """

    slots: int
    from_copies: int
    from_checkpoint: int


class Recovered(NamedTuple):
    """What the ranks that are left have to tell. Times are as of `time.monotonic`.

    traffic, batch: the first batch that they served without the lost rank, counted in its phase from 1.
    noticed_at: when the first of them got an error.
    agreeing, connecting, moving: seconds of that rank; see `eplb_torch.elastic.Change`.
    attempts: generations that it took.
    served_at: when that batch had been served.
    ranks: what each received, by its first number.
    lost_copies: (layer, expert) pairs of which the lost rank had the last copy.
    """

    traffic: str
    batch: int
    noticed_at: float
    agreeing: float
    connecting: float
    moving: float
    attempts: int
    served_at: float
    ranks: dict[int, Rehosted]
    lost_copies: int


@dataclass(frozen=True, slots=True)
class LossResult:
    """A loss as it was lived through, on the slowest way: from the kill until all ranks had served the next batch.

    rank: that was killed.
    traffic, batch: the batch that was served anew, or first, without it.
    during_moves: whether weights were on their way in the batch before.
    noticed_ms: from the kill until the first rank got an error.
    silence_ms: for which it then waited for a sign of life: the detection time-out, which is a setting.
    agreeing_ms: until the list of members was agreed on, beyond that.
    connecting_ms: of new groups.
    moving_ms: of weights, those from the checkpoint included.
    first_batch_ms: until the batch had been served, with all else that lay between.
    attempts: generations that it took.
    ranks: by number, what those who are left received.
    lost_copies: (layer, expert) pairs of which it had the last copy.
    """

    rank: int
    traffic: str
    batch: int
    during_moves: bool
    noticed_ms: float
    silence_ms: float
    agreeing_ms: float
    connecting_ms: float
    moving_ms: float
    first_batch_ms: float
    attempts: int
    ranks: dict[int, Rehosted]
    lost_copies: int

    @property
    def recovery_ms(self) -> float:
        """From detection until serving again."""
        return self.agreeing_ms + self.connecting_ms + self.moving_ms + self.first_batch_ms

    @property
    def total_ms(self) -> float:
        """From the kill until serving again."""
        return self.noticed_ms + self.silence_ms + self.recovery_ms

    @property
    def from_copies(self) -> int:
        """Experts that ranks received from others."""
        return sum(rank.from_copies for rank in self.ranks.values())

    @property
    def from_checkpoint(self) -> int:
        """Experts that ranks read anew."""
        return sum(rank.from_checkpoint for rank in self.ranks.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        fields = asdict(self) | {"ranks": {str(rank): told._asdict() for rank, told in self.ranks.items()}}
        sums = ("recovery_ms", "total_ms", "from_copies", "from_checkpoint")
        return fields | {name: getattr(self, name) for name in sums}


def describe_loss(killed: Killed, recovered: Recovered, silence: float, during_moves: bool) -> LossResult:
    """Put together what the parent and the ranks know.

    Args:
        killed: by the parent.
        recovered: told by a rank.
        silence: seconds without a sign of life after which a rank counts as dead. Waiting for that is part of
            `recovered.agreeing`.
        during_moves: see `LossResult`.
    """
    told, silent = recovered, min(silence, recovered.agreeing)
    noticed = told.noticed_at - killed.at
    rest = told.served_at - told.noticed_at - told.agreeing - told.connecting - told.moving
    return LossResult(
        rank=killed.rank,
        traffic=told.traffic,
        batch=told.batch,
        during_moves=during_moves,
        noticed_ms=1e3 * noticed,
        silence_ms=1e3 * silent,
        agreeing_ms=1e3 * (told.agreeing - silent),
        connecting_ms=1e3 * told.connecting,
        moving_ms=1e3 * told.moving,
        first_batch_ms=1e3 * rest,
        attempts=told.attempts,
        ranks=told.ranks,
        lost_copies=told.lost_copies,
    )


def rehosted(plan: ElasticPlan, ranks: tuple[int, ...]) -> dict[int, Rehosted]:
    """Count what each rank of a plan's group receives, by other numbers of these ranks.

    >>> import numpy as np
    >>> from eplb_core import Topology
    >>> from eplb_core.elastic import lose_ranks
    >>> plan = lose_ranks(np.asarray([[0, 1, 0, 3, 1, 2]]), np.asarray([[4, 1, 1, 1]]), Topology(3, 2), [1])
    >>> plan.old.tolist(), plan.new.tolist()
    ([[0, 1, 1, 2]], [[0, 3, 1, 2]])
    >>> rehosted(plan, (0, 2))
    {0: Rehosted(slots=2, from_copies=0, from_checkpoint=1), 2: Rehosted(slots=2, from_copies=0, from_checkpoint=0)}
    """
    slots, reload = plan.group.slots_per_rank, set(plan.reload)
    found = {}
    for i, rank in enumerate(ranks):
        old, new = (part[:, i * slots : (i + 1) * slots] for part in (plan.old, plan.new))
        pairs = set[tuple[int, int]]()
        for layer, (before, after) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
            pairs |= {(layer, expert) for expert in set(after) - set(before) - {EMPTY}}
        found[rank] = Rehosted(slots, len(pairs - reload), len(pairs & reload))
    return found
