"""A short soak, and proof that the soak notices what it is there for. `python -m tests.soak` runs for half an hour."""

import numpy as np
import pytest

from tests.soak import Report, leaks, measure, show, soak
from tests.soak_checks import check_balance, check_move
from tests.soak_episodes import KINDS
from tests.soak_faults import Fault

SHORT = (
    *(("move", kind) for kind in ("none", "corrupt", "epoch")),
    *(("beside", kind) for kind in ("none", "drain", "deaf")),
    *(("balance", kind) for kind in ("corrupt", "planner")),
    *(("reload", "broken"), ("snapshot", "full")),
)
MOST_MIB = 48.0  # pages of code and libraries that are touched for the first time


def run(tmp_path, **settings):
    chosen = {"seed": 1, "seconds": 0.0, "share": 1.0, "sample_seconds": 0.5, "kinds": SHORT}
    return soak(str(tmp_path), **(chosen | settings))


def test_four_processes_serve_on_through_moves_reloads_restarts_and_faults(tmp_path):
    assert set(SHORT) < set(KINDS)
    report = run(tmp_path)
    assert set(report.episodes) == set(SHORT)
    assert report.batches > 5 * len(SHORT)
    assert report.lost >= 1
    assert leaks(report, float("inf")) == []
    assert all(growth.last - growth.first < MOST_MIB for growth in report.growth)
    assert show(report).count("KiB/min") == 4


def test_leaks_are_found(tmp_path):
    plant = ("files", "threads", "memory")
    report = run(tmp_path, kinds=(*(("move", "none"), ("move", "shape")) * 2, ("beside", "deaf")), plant=plant)
    for rank in range(4):
        found = " ".join(text for text in leaks(report, 64.0) if text.startswith(f"rank {rank}:"))
        assert "files grew" in found
        assert "threads grew" in found
        assert "memory grows" in found


@pytest.mark.parametrize(("plant", "message"), [("row", "wrong rows after"), ("token", "wrong tokens of")])
def test_a_wrong_row_and_a_wrong_token_end_the_run(tmp_path, plant, message):
    with pytest.raises(AssertionError, match=message):
        run(tmp_path, seconds=60.0, kinds=(("move", "none"),), plant=(plant,))


def test_workers_that_say_nothing_any_more_end_the_run_with_their_stacks(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)workers hang.*r1:.*_plant"):
        run(tmp_path, kinds=(("move", "none"),), plant=("silence",), silent_seconds=8.0)


def samples(kib_per_minute=0.0, *, files=27, threads=9, minutes=30):
    """What a process writes down that grows, with the noise of an allocator."""
    rng, count = np.random.default_rng(0), int(minutes * 12)
    return [
        {
            "time": 5.0 * i,
            "rss": 200_000 + round(kib_per_minute * i / 12 + rng.integers(0, 40) + 8000 * (1 - np.exp(-i / 20))),
            "files": files + (i % 7) + (2 if files > 27 and i > count // 2 else 0),
            "threads": threads + (i % 5) + (1 if threads > 9 and i > count // 2 else 0),
            "at_rest": i % 35 == 0,
        }
        for i in range(count)
    ]


def report_of(lines):
    return Report({}, 0, 0, 0.0, 0.0, [measure(lines)])


def test_a_process_that_warms_up_and_then_stays_is_passed():
    assert leaks(report_of(samples())) == []
    assert abs(measure(samples()).slope) < 5.0


@pytest.mark.parametrize(
    ("growing", "message"),
    [({"kib_per_minute": 100.0}, "memory grows by"), ({"files": 28}, "files grew"), ({"threads": 10}, "threads grew")],
)
def test_a_process_that_goes_on_growing_is_found(growing, message):
    (found,) = leaks(report_of(samples(**growing)))
    assert message in found


def test_the_slope_is_that_of_the_second_half_in_kib_per_minute():
    lines = [{"time": 60.0 * i, "rss": 7 * i, "files": 1, "threads": 1, "at_rest": True} for i in range(40)]
    growth = measure(lines)
    assert growth.slope == pytest.approx(7.0)
    assert (growth.first * 1024, growth.last * 1024) == (7 * 22, 7 * 37)


def record(**changes):
    """What a rank tells of a move on which nothing happened."""
    usual = {
        "kind": None,
        "text": "",
        "lost": [],
        "agreed": True,
        "left": 0,
        "held": [[1, 0]],
        "wrong": 0,
        "fired": False,
        "seconds": 0.1,
        "switched": [],
    }
    return usual | changes


ERROR = {"kind": "RearrangeError", "left": 1, "held": [[0, 1]]}


@pytest.mark.parametrize(
    ("fault", "records", "problem"),
    [
        ("none", [record(), record()], None),
        ("none", [record(), record(wrong=1)], "other rows"),
        ("none", [record(), record(held=[[0, 1]])], "different placements"),
        ("none", [record(held=[[0, 1]])] * 2, "not moved"),
        ("none", [record(), record(**ERROR)], "were due"),
        ("none", [record(), record(switched=[[3, 0]])], "different boundaries"),
        ("none", [record(), record(seconds=200.0)], "later than"),
        ("corrupt", [record(fired=True, text="arrived damaged", **ERROR)] * 2, None),
        ("corrupt", [record(fired=True, **ERROR)] * 2, "damaged"),
        ("corrupt", [record(fired=True)] * 2, "were due"),
        ("veto", [record()] * 2, "were due"),
        ("plan", [record(**ERROR)] * 2, None),
        ("plan", [record(**(ERROR | {"held": [[1, 0]]}))] * 2, "though it was refused"),
        ("epoch", [record(**(ERROR | {"left": 0}))] * 2, "nothing left"),
        ("epoch", [record(lost=[1], **ERROR)] * 2, "alive"),
        ("hang", [record(fired=True, lost=[1, 2], **ERROR), *[record(lost=[0], **ERROR)] * 2], None),
        ("hang", [record(fired=True), *[record(lost=[0], agreed=False, **ERROR)] * 2], "that they agree"),
        ("hang", [record(fired=True), record(lost=[0], **ERROR), record()], "different placements"),
    ],
)
def test_outcomes_of_moves_that_are_not_as_documented_are_found(fault, records, problem):
    found = "; ".join(check_move(Fault(fault, 0), records, [[0, 1]], [[1, 0]]))
    assert (problem in found) if problem else found == ""


def told(**changes):
    """What a rank tells of a balancer."""
    usual = {"errors": [], "closing": [], "switched": [], "held": [[0]], "known": True, "failure": None, "fired": False}
    return usual | changes


@pytest.mark.parametrize(
    ("fault", "records", "problem"),
    [
        ("none", [told(), told()], None),
        ("none", [told(), told(held=[[1]])], "different placements"),
        ("none", [told(known=False), told()], "believes"),
        ("none", [told(), told(switched=[[1, [0]]])], "different boundaries"),
        ("none", [told(), told(failure="x")], "has ended"),
        ("none", [told(errors=["RearrangeError"])] * 2, "were due"),
        ("corrupt", [told(errors=["RearrangeError"], fired=True), told(errors=["RearrangeError"])], None),
        ("corrupt", [told(errors=["RearrangeError"], fired=True), told()], "different errors"),
        ("corrupt", [told(errors=["RearrangeError"] * 2, fired=True)] * 2, "more than one"),
        ("corrupt", [told(fired=True)] * 2, "were due"),
        ("planner", [told(errors=["PlanningError"] * 3)] * 2, None),
        ("planner", [told()] * 2, "were due"),
        ("policy", [told()] * 2, None),
        ("policy", [told(errors=["TransportError"])] * 2, "were due"),
        ("hang", [told(fired=True, held=[[1]], failure="x"), told(failure="y")], None),
        ("hang", [told(fired=True), told()], "no balancer has ended"),
    ],
)
def test_outcomes_of_balancers_that_are_not_as_documented_are_found(fault, records, problem):
    found = "; ".join(check_balance(Fault(fault, 0), records))
    assert (problem in found) if problem else found == ""
