"""What has become of a group whose members changed."""

from typing import NamedTuple

from eplb_core.elastic.plan import ElasticPlan
from eplb_torch.elastic.members import Members, MembersLost
from eplb_torch.report import RearrangeError


class Change(NamedTuple):
    """What one `ElasticGroup` went through. Equal on all members, but for `members.rank` and `seconds`.

    members: of the generation that serves now.
    lost, joined: names that are not in it any more, those who left among them, and that are new in it.
    plans: by model: what has moved, and what was reloaded.
    attempts: generations that it took, as members may be lost while others recover.
    seconds: of the last attempt, `agreeing` on the members, `connecting` them, and `moving` weights, reloading
        included; and `all` attempts together.
    """

    members: Members
    lost: tuple[str, ...]
    joined: tuple[str, ...]
    plans: dict[str, ElasticPlan]
    attempts: int
    seconds: dict[str, float]


def describe_change(
    before: tuple[str, ...],
    members: Members,
    plans: dict[str, ElasticPlan],
    attempts: int,
    phases: list[float],
    seconds: float,
) -> Change:
    """Put a `Change` together.

    Args:
        before: names of the members when it began.
        members, plans, attempts: as in `Change`.
        phases: seconds of agreeing, connecting and moving.
        seconds: in all.
    """
    lost = tuple(name for name in before if name not in members.names)
    joined = tuple(name for name in members.names if name not in before)
    spent = dict(zip(("agreeing", "connecting", "moving"), phases, strict=True)) | {"all": seconds}
    return Change(members, lost, joined, plans, attempts, spent)


def suspects_of(error: BaseException | None, members: Members) -> tuple[str, ...]:
    """The names of the members that an error blames."""
    if isinstance(error, MembersLost):
        return error.names
    if isinstance(error, RearrangeError):
        return tuple(members.names[rank] for rank in error.lost_ranks)
    return ()
