"""Whatever one rank does during a vote, all others reach the same verdict, and nobody claims more than is so."""

from types import SimpleNamespace

from hypothesis import example, given
from hypothesis import strategies as st

from eplb_torch.transaction.agreement import decide


class Stop(Exception):
    pass


def run_vote(votes, delivered):
    """Every rank's verdict, given which messages arrive: `delivered[round][src][dst]`."""
    size = len(votes)

    def vote(rank, told):
        said = []

        def gather(payload, timeout):
            said.append(payload)
            turn = len(said) - 1
            if turn == 1 and told is None:
                raise Stop
            messages = ballots if turn == 0 else told
            return [messages[src] if src == rank or delivered[turn][src][rank] else None for src in range(size)]

        transport = SimpleNamespace(rank=rank, size=size, gather=gather)
        try:
            return decide(transport, votes[rank], bytes([rank]), 0.0, 0.0)
        except Stop:
            return said[1]

    ballots = [(b"\x01" if votes[rank] else b"\x00") + bytes([rank]) for rank in range(size)]
    told = [vote(rank, None) for rank in range(size)]
    return [vote(rank, told) for rank in range(size)]


def check_claims(verdicts, faulty):
    """Also the faulty rank, when it is back, is right about all those it does not call lost."""
    for rank, verdict in enumerate(verdicts):
        for other in range(len(verdicts)):
            if verdict.agreed and other not in (rank, faulty, *verdict.lost_ranks):
                assert verdicts[other].accepted == verdict.accepted


@st.composite
def one_faulty_rank(draw):
    size = draw(st.integers(1, 5))
    faulty = draw(st.integers(0, size - 1))
    votes = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=size, max_size=size))
    delivered = [[[True] * size for _ in range(size)] for _ in range(2)]
    for turn in range(2):
        for other in range(size):
            delivered[turn][faulty][other] = draw(st.booleans())
            delivered[turn][other][faulty] = draw(st.booleans())
    return votes, delivered, faulty


def came_back_too_late():
    """Rank 0 is heard by nobody, and finds what all others said."""
    delivered = [[[src != 0] * 3 for src in range(3)] for _ in range(2)]
    return [True] * 3, delivered, 0


@given(one_faulty_rank())
@example(came_back_too_late())
def test_with_one_faulty_rank_all_others_agree_and_know_it(case):
    votes, delivered, faulty = case
    verdicts = run_vote(votes, delivered)
    others = [verdict for rank, verdict in enumerate(verdicts) if rank != faulty]
    assert len({verdict.accepted for verdict in others}) <= 1
    assert all(verdict.agreed and set(verdict.lost_ranks) <= {faulty} for verdict in others)
    if not all(votes):
        assert not any(verdict.accepted for verdict in verdicts)
    if len(votes) > 2 and not any(verdict.accepted for verdict in others):
        # Also when it comes back and finds the votes of all in its inbox.
        assert not verdicts[faulty].accepted
    check_claims(verdicts, faulty)


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_without_faults_the_vote_is_carried_by_all_or_none(votes):
    size = len(votes)
    delivered = [[[True] * size for _ in range(size)] for _ in range(2)]
    verdicts = run_vote(votes, delivered)
    assert {verdict.accepted for verdict in verdicts} == {all(votes)}
    assert all(verdict.lost_ranks == () and verdict.agreed for verdict in verdicts)
    assert all(verdict.notes == tuple(bytes([rank]) for rank in range(size)) for verdict in verdicts)


@given(st.data(), st.integers(2, 5))
def test_ranks_that_die_claim_nothing_wrong_about_survivors(data, size):
    """Any number of ranks die at any point of the vote: a message of a rank that died is not followed by later ones."""
    votes = [True] * size
    last = [data.draw(st.sampled_from([0, 1, 2])) for _ in range(size)]
    delivered = [[[True] * size for _ in range(size)] for _ in range(2)]
    for rank, turn in enumerate(last):
        for later in range(turn, 2):
            for other in range(size):
                delivered[later][rank][other] = later == turn and data.draw(st.booleans())
    verdicts = run_vote(votes, delivered)
    survivors = [rank for rank in range(size) if last[rank] == 2]
    for rank in survivors:
        if verdicts[rank].agreed:
            for other in survivors:
                if other not in verdicts[rank].lost_ranks:
                    assert verdicts[other].accepted == verdicts[rank].accepted
