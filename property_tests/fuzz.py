"""Run property tests on fresh random examples until the time is over, and keep what fails.

`python -m property_tests.fuzz --minutes 10`: all tests with few examples first, then with twice as many, and so on.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_EXAMPLES, MOST_EXAMPLES = 30, 10_000
HANG_SECONDS = 300.0  # a test that takes longer than this and a second per example hangs
GRACE_SECONDS = 120.0  # a test that has begun may take longer by this, as shrinking does
TYPE_CHECKS = "--jaxtyping-packages=eplb_core,beartype.beartype"


@dataclass
class Tally:
    """What has been run and found.

    tests: the tests that have ended at least once.
    examples: in all tests together; those tried while shrinking count.
    findings: the report of each test that failed.
    rounds: passes over all tests, of which the last is seldom complete.
    unfinished: the test that was stopped as time was over, if any.
    """

    tests: set[str] = field(default_factory=set)
    examples: int = 0
    findings: dict[str, Path] = field(default_factory=dict)
    rounds: int = 0
    unfinished: str | None = None


def fuzz(
    folder: Path,
    seconds: float,
    keep: Path,
    options: Sequence[str] = (),
    *,
    rounds: float = math.inf,
    grace: float = GRACE_SECONDS,
    hang: float = HANG_SECONDS,
) -> Tally:
    """Run the hypothesis tests under `folder`, in an order that changes, until `seconds` have passed.

    Each pass is a process of its own; if it dies or hangs, the test that it was in is a finding, and the next pass
    leaves it out, as it does all tests with a finding.

    Args:
        folder: where test files are looked for, or one file.
        seconds: no test is begun after them.
        keep: gets `examples` (hypothesis' database, which the next run tries first), `findings` and `events.jsonl`.
        options: further options for pytest.
        rounds: passes after which to stop even if there is time left.
        grace: seconds, once time is over, after which a test that is still running is stopped.
        hang: seconds, and one for each example, after which a test counts as one that hangs.

    Raises:
        RuntimeError: if pytest itself fails, such as for an option that it does not know.
    """
    keep.mkdir(parents=True, exist_ok=True)
    tally, until = Tally(), time.time() + seconds
    while time.time() < until and tally.rounds < rounds:
        examples = min(FIRST_EXAMPLES * 2**tally.rounds, MOST_EXAMPLES)
        before = len(tally.tests), len(tally.findings), tally.examples
        command = _command(folder, keep, until, examples, tally.findings, hang, options)
        died = _run_once(command, keep, until + grace, examples, tally)
        tally.rounds += 1
        if not died and before == (len(tally.tests), len(tally.findings), tally.examples):
            break
    return tally


def _run_once(command: list[str], keep: Path, until: float, examples: int, tally: Tally) -> bool:
    """One pass, at most until `until`. Whether its process died of its own."""
    events, log = keep / "events.jsonl", keep / "pytest.log"
    events.write_text("", encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment, late = {**os.environ, "PYTHONPATH": path}, False
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(max(until - time.time(), 0))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(process)
    end = log.read_text(encoding="utf-8", errors="replace")[-12_000:]
    running = _read(events, keep, examples, tally)
    if late:
        tally.unfinished = running
    elif running is not None:
        _store(running, f"The process ended with status {process.returncode}.\n\n{end}", keep, examples, tally)
    elif process.returncode not in (0, 1, 2, 5):
        raise RuntimeError(f"pytest ended with status {process.returncode}:\n{end}")
    return running is not None and not late


def _command(folder: Path, keep: Path, until: float, examples: int, skip, hang: float, options) -> list[str]:
    """Files in random order, as one pass seldom gets through all."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("test_*.py"))
    random.SystemRandom().shuffle(files)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "property_tests.fuzz_recorder"]
    command += [f"--fuzz-keep={keep}", f"--fuzz-examples={examples}", f"--fuzz-until={until}"]
    command += [f"--fuzz-skip={test}" for test in skip]
    command += [f"--timeout={hang + examples}", "--timeout-method=thread", "--continue-on-collection-errors"]
    return [*command, *options, *map(str, files)]


def _kill(process: subprocess.Popen) -> None:
    """With the processes that tests have started; one that is still running writes its stacks to the log first."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        time.sleep(1)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(events: Path, keep: Path, examples: int, tally: Tally) -> str | None:
    """Add what happened to the tally. The test that had begun and not ended, if any."""
    running = None
    for line in events.read_text(encoding="utf-8").split("\n")[:-1]:  # a last line without end was cut off
        event = json.loads(line)
        running = None if event["ended"] else event["test"]
        if event["ended"]:
            tally.tests.add(event["test"])
            tally.examples += event["examples"]
            if event["failure"]:
                _store(event["test"], event["failure"], keep, examples, tally)
    return running


def _store(test: str, text: str, keep: Path, examples: int, tally: Tally) -> None:
    path = keep / "findings" / (re.sub(r"[^\w.-]+", "-", test).strip("-")[-150:] + ".txt")
    path.parent.mkdir(exist_ok=True)
    found = time.strftime("%Y-%m-%d %H:%M:%S")
    path.write_text(f"{test}\nfound {found}, with {examples} examples per test\n\n{text}\n", encoding="utf-8")
    tally.findings[test] = path


def summary(tally: Tally, seconds: float) -> str:
    """What was run and found, a line for each finding."""
    lines = [
        f"{len(tally.tests)} tests, {tally.examples} examples, {tally.rounds} rounds, {seconds / 60:.1f} minutes, "
        f"{len(tally.findings)} findings"
    ]
    if tally.unfinished:
        lines.append(f"unfinished when the time was over: {tally.unfinished} (its stacks are in pytest.log)")
    for test, path in sorted(tally.findings.items()):
        lines.append(f"FAILED {test}\n       {path}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the status is 1 if anything was found, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m property_tests.fuzz", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "property_tests", help="tests; ours by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long no new test is refused")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder for what is found")
    args, options = parser.parse_known_args(arguments)
    if args.folder == parser.get_default("folder"):
        options = [TYPE_CHECKS, *options]
    begun = time.time()
    try:
        tally = fuzz(args.folder.resolve(), args.minutes * 60, args.keep.resolve(), options)
    except RuntimeError as error:
        print(error)
        return 2
    print(summary(tally, time.time() - begun))
    if not tally.tests and not tally.findings:
        print(f"no hypothesis test was run; see {args.keep / 'pytest.log'}")
        return 2
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
