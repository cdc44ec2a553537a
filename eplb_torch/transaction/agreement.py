"""How ranks decide together whether to go on: two rounds of telling each other all they have heard."""

import time
from dataclasses import dataclass

from eplb_torch.transport import Transport, TransportError

_YES, _NO = b"\x01", b"\x00"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rank knows after a vote.

    accepted: all ranks voted yes and, among three ranks or more, a peer confirmed that it counted this rank's vote.
    notes: what each rank sent along with its vote; None where that is not known. Equal on all ranks if accepted.
    no_ranks: ranks that voted no.
    lost_ranks: ranks that this one cannot speak for: they were not heard, or did not hear this one. They may be dead,
        or have decided otherwise.
    agreed: all ranks but the lost ones have reached the same verdict. False if the votes of more than one lost rank
        may have reached some ranks and not others.
    """

    accepted: bool
    notes: tuple[bytes | None, ...]
    no_ranks: tuple[int, ...]
    lost_ranks: tuple[int, ...]
    agreed: bool


def decide(transport: Transport, yes: bool, note: bytes, vote_by: float, confirm_by: float) -> Verdict:
    """Vote, and learn the outcome. A collective; every rank sends a note of the same length.

    In the first round each rank sends its vote to all. In the second it sends to all every vote that it heard; who
    was silent in the first round is not listened to in the second. The vote is carried if all votes are known and
    all are yes. Two rounds make that knowledge common: if one rank dies, hangs or is cut off at any moment of the
    vote, then either one of the others heard its vote and has told the rest, or none did. A rank that was away
    and comes back finds that nobody counted it, and says no like the others.

    Guarantee: with at most one such rank, and messages between the others in time, all other ranks
    reach the same verdict and know it (`agreed`). That one rank may miss the last message, so that nobody can vouch for
    it; it knows, as it names all those it did not hear in `lost_ranks`. With more such ranks, others may decide
    differently, and `agreed` is False.

    Args:
        transport: between the voters.
        yes: this rank's vote.
        note: bytes that every rank shall know if the vote is carried.
        vote_by: `time.monotonic()` until which votes are waited for.
        confirm_by: the same for what others heard; later by more than the clocks of ranks are apart at the start.

    Returns:
        `Verdict`.
    """
    mine = (_YES if yes else _NO) + note
    known = gather(transport, mine, vote_by)
    heard = {rank for rank, ballot in enumerate(known) if ballot is not None}
    length = 1 + len(mine)
    told = b"".join((_NO + bytes(len(mine))) if ballot is None else _YES + ballot for ballot in known)
    mutual = {transport.rank}
    for rank, message in enumerate(gather(transport, told, confirm_by)):
        if message is None or rank not in heard or rank == transport.rank:
            continue
        theirs = [message[i : i + length] for i in range(0, len(message), length)]
        if theirs[transport.rank][:1] == _YES:
            mutual.add(rank)
        known = [
            ours if ours is not None else (other[1:] if other[:1] == _YES else None)
            for ours, other in zip(known, theirs, strict=True)
        ]
    return _conclude(transport, known, heard, mutual)


def _conclude(transport: Transport, known: list[bytes | None], heard: set[int], mutual: set[int]) -> Verdict:
    votes = {rank: ballot for rank, ballot in enumerate(known) if ballot is not None}
    no_ranks = tuple(rank for rank, ballot in votes.items() if ballot[:1] == _NO)
    carried = len(votes) == transport.size and not no_ranks
    lost = tuple(rank for rank in range(transport.size) if rank not in mutual)
    return Verdict(
        # One of two ranks that is left alone cannot tell whether the other has its confirmation: it keeps to the vote.
        accepted=carried and (transport.size <= 2 or len(mutual) > 1),
        notes=tuple(None if ballot is None else ballot[1:] for ballot in known),
        no_ranks=no_ranks,
        lost_ranks=lost,
        # Nobody whom we hear has heard anybody else: then all of us know exactly the same.
        agreed=len(lost) <= 1 or set(votes) == heard == mutual,
    )


def gather(transport: Transport, payload: bytes, deadline: float) -> list[bytes | None]:
    """Gather until a deadline of `time.monotonic()`; a transport that fails has heard nobody but this rank."""
    try:
        return transport.gather(payload, max(deadline - time.monotonic(), 0.0))
    except TransportError:
        return [payload if rank == transport.rank else None for rank in range(transport.size)]
