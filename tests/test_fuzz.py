"""Fuzzing finds planted failures, keeps them, replays them and outlives a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from property_tests.fuzz import Tally, fuzz, main, summary

ROOT = Path(__file__).parents[1]
PLANTED = """
import os, time
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

@given(st.integers(0, 10**6))
def test_rare(x):
    assert x < 5000

@given(st.integers())
def test_sound(x):
    assert x == x

class Machine(RuleBasedStateMachine):
    @rule()
    def step(self):
        pass

TestMachine = Machine.TestCase

def test_no_property():
    raise RuntimeError("not for us")
"""


@pytest.fixture
def planted(tmp_path):
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "test_planted.py").write_text(PLANTED, encoding="utf-8")
    return folder


def run(folder, keep, rounds=1) -> Tally:
    return fuzz(folder, 120, keep, rounds=rounds)


def test_a_planted_failure_is_found_kept_and_reported(planted, tmp_path):
    keep = tmp_path / "kept"
    tally = run(planted, keep, rounds=3)
    (name,) = tally.findings
    assert name.endswith("test_planted.py::test_rare")
    assert {test.rpartition("::")[2] for test in tally.tests} == {"test_rare", "test_sound", "runTest"}
    report = tally.findings[name].read_text(encoding="utf-8")
    assert name in report
    assert "x=5000" in report
    assert "@reproduce_failure(" in report
    assert tally.examples > 100
    assert any((keep / "examples").rglob("*"))
    text = summary(tally, 66)
    assert "3 tests" in text
    assert f"{tally.examples} examples" in text
    assert "1.1 minutes" in text
    assert "1 findings" in text
    assert str(tally.findings[name]) in text


def test_what_was_found_is_tried_first_the_next_time(planted, tmp_path):
    """With one example, which random numbers would not find: it comes from the database."""
    keep = tmp_path / "kept"
    assert run(planted, keep, rounds=3).findings
    code = PLANTED.replace("@given(st.integers(0, 10**6))", "@settings(max_examples=1)\n@given(st.integers(0, 10**6))")
    (planted / "test_planted.py").write_text(code, encoding="utf-8")
    assert run(planted, keep).findings
    (planted / "test_planted.py").write_text(code.replace("x < 5000", "True"), encoding="utf-8")
    assert not run(planted, keep).findings


def test_a_process_that_dies_is_a_finding_and_the_rest_is_run(planted, tmp_path):
    code = "import os\nfrom hypothesis import given, strategies as st\n"
    code += "@given(st.integers())\ndef test_fatal(x):\n    os._exit(7)\n"
    (planted / "test_fatal.py").write_text(code, encoding="utf-8")
    tally = run(planted, tmp_path / "kept", rounds=2)
    assert {"test_rare", "test_sound", "runTest"} <= {test.rpartition("::")[2] for test in tally.tests}
    fatal = next(path for test, path in tally.findings.items() if test.endswith("test_fatal"))
    assert "status 7" in fatal.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_imported_is_a_finding(planted, tmp_path):
    (planted / "test_broken.py").write_text("import no_such_module_anywhere\n", encoding="utf-8")
    tally = run(planted, tmp_path / "kept")
    assert len(tally.tests) == 4
    assert any("test_broken.py" in test for test in tally.findings)


HANGING = """
import time
from hypothesis import given, strategies as st

@given(st.integers())
def test_hanging(x):
    time.sleep(600)
"""


def test_a_test_that_hangs_is_a_finding_with_its_stacks(planted, tmp_path):
    (planted / "test_hanging.py").write_text(HANGING, encoding="utf-8")
    tally = fuzz(planted, 120, tmp_path / "kept", rounds=2, hang=-25)
    report = next(path for test, path in tally.findings.items() if test.endswith("test_hanging"))
    assert "time.sleep(600)" in report.read_text(encoding="utf-8")
    assert {"test_rare", "test_sound", "runTest"} <= {test.rpartition("::")[2] for test in tally.tests}


def test_a_test_that_runs_when_time_is_over_is_stopped_and_named(planted, tmp_path):
    (planted / "test_planted.py").write_text(HANGING, encoding="utf-8")
    tally = fuzz(planted, 10, tmp_path / "kept", grace=1)
    assert tally.unfinished is not None
    assert tally.unfinished.endswith("test_hanging")
    assert "test_hanging" in summary(tally, 1)
    assert not tally.findings
    assert "in test_hanging" in (tmp_path / "kept" / "pytest.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("content", "status"), [(PLANTED, 1), (PLANTED.replace("x < 5000", "True"), 0), ("", 2)])
def test_the_status_says_whether_anything_was_found(tmp_path, content, status, capsys):
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "test_planted.py").write_text(content, encoding="utf-8")
    assert main([str(folder), "--minutes", "0.1", "--keep", str(tmp_path / "kept")]) == status
    assert "findings" in capsys.readouterr().out


def test_a_wrong_option_is_an_error_and_no_finding(planted, tmp_path, capsys):
    assert main([str(planted), "--minutes", "1", "--keep", str(tmp_path / "kept"), "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().out


def test_the_command_takes_our_tests_by_default(tmp_path):
    """For no time at all, which begins no test."""
    done = subprocess.run(
        [sys.executable, "-m", "property_tests.fuzz", "--minutes", "0", "--keep", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "0 tests, 0 examples, 0 rounds" in done.stdout
