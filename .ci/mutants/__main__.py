"""Mutate the planning modules and count the mutants that the tests kill: `python .ci/mutants`, from the root.

mutmut makes the mutants; a uniform sample of each module's is tried, in forks of a process that has collected the
tests of `TESTS` once. Results go to a file of one JSON object a line.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
sys.dont_write_bytecode = True
os.environ.setdefault("OMP_NUM_THREADS", "1")

from kill import Killer, Verdict  # noqa: E402
from mutations import functions, sample  # noqa: E402
from score import overall, wilson  # noqa: E402

FILES = "bound maps metrics packing placement replicate rounds topology verify"
PACKAGES = "elastic moves policies"
CONCEPTS = "bound elastic golden greedy kernels maps metrics moves parity placement policies rounds search senders"
CONCEPTS += " layers spread survive verify worked_example guarantees backends errors topology packing replicate"
# JAX runs the source that a strict library runs, after compiling it for seconds.
TESTS = "test_errors or not (jit or vmap or x64 or compile or float32 or bit_for_bit or jax)"


def planning_files() -> dict[str, Path]:
    """The modules that plan, by their dotted names."""
    package = ROOT / "eplb_core"
    paths = [package / f"{name}.py" for name in FILES.split()]
    paths += [path for name in PACKAGES.split() for path in sorted((package / name).glob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def planning_tests() -> list[str]:
    """The test files of these concepts, and the modules for their examples."""
    folders = (ROOT / "tests", ROOT / "property_tests")
    files = [folder / f"test_{name}.py" for name in CONCEPTS.split() for folder in folders]
    return [str(path) for path in (*files, *planning_files().values()) if path.exists()]


class Profile:
    """A pytest plugin: few examples, the same in every run, and no time spent on making failures smaller."""

    def __init__(self, examples: int):
        self.examples = examples

    def pytest_configure(self) -> None:
        """Load the profile, after that of the property tests."""
        from hypothesis import Phase, settings  # imported before pytest starts, it would not be rewritten

        phases = [Phase.explicit, Phase.generate]
        few = settings(settings.default, max_examples=self.examples, phases=phases, report_multiple_bugs=False)
        settings.register_profile("mutants", few)
        settings.load_profile("mutants")


def main() -> None:
    """Parse the options, try the mutants, print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module")
    parser.add_argument("--share", type=float, default=0.0, help="or this share of them, where that is more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=20, help="examples of each property")
    parser.add_argument("--modules", nargs="*", default=list(planning_files()))
    parser.add_argument("--control", action="store_true", help="let every function raise instead")
    parser.add_argument("--again", type=Path, help="only the mutants of this file of results that lived")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds of tests for each mutant")
    parser.add_argument("--tests", default=TESTS, help="which of the tests, as pytest's -k")
    parser.add_argument("--watched", type=Path, help="file that keeps what the unchanged tests do from run to run")
    options = parser.parse_args()
    killer = Killer(ROOT / "eplb_core", lambda killer: work(killer, options), options.budget, options.watched)

    arguments = ["-q", "-p", "no:cacheprovider", "--capture=sys", f"--rootdir={ROOT}", *planning_tests()]
    arguments += ["-k", options.tests]
    raise SystemExit(pytest.main(arguments, plugins=[Profile(options.examples), killer]))


def work(killer: Killer, options) -> None:
    """Try every function as a control, or a sample of mutants of each module."""
    out = sys.__stderr__
    assert Path(sys.modules["eplb_core"].__file__).is_relative_to(ROOT)
    print(
        f"{len(killer.tests)} tests pass, {sum(t.seconds for t in killer.tests.values()):.0f} s", file=out, flush=True
    )
    if options.control:
        tried = [(name, function) for name in options.modules for function in functions(name)]
        verdicts = {pair: killer.try_broken(*pair) for pair in tried}
        for pair, verdict in verdicts.items():
            if verdict.status != "killed":
                print(*pair, verdict.status, file=out)
        print(f"control: {sum(v.status == 'killed' for v in verdicts.values())} of {len(tried)} killed", file=out)
        return
    lived = None if options.again is None else _lived(options.again)
    options.out.parent.mkdir(exist_ok=True)
    strata = []
    with options.out.open("w") as results:
        for name in options.modules:
            count, total = _sizes(name, options)
            mutants, _ = sample(name, total if lived is not None else count, options.seed)
            if lived is not None:
                mutants = [m for m in mutants if (m.module, m.function, _lines(m.diff)) in lived]
            killed = 0
            for mutant in mutants:
                verdict: Verdict = killer.try_mutant(mutant)
                killed += verdict.status in ("killed", "timeout")
                row = mutant._asdict() | verdict._asdict() | {"total": total}
                del row["source"]
                print(json.dumps(row), file=results, flush=True)
            strata.append((killed, len(mutants), total))
            low, high = wilson(killed, len(mutants), total)
            print(f"{name:36} {killed:4}/{len(mutants):<4} of {total:5}  {low:.1%} .. {high:.1%}", file=out, flush=True)
    strata = [stratum for stratum in strata if stratum[1]]
    if strata and lived is None:
        share, half = overall(strata)
        print(
            f"{sum(s[0] for s in strata)} of {sum(s[1] for s in strata)} killed; of all {share:.1%} +- {half:.1%}",
            file=out,
        )


def _sizes(name: str, options) -> tuple[int, int]:
    total = sample(name, 0, 0)[1]
    return max(options.sample, int(options.share * total)), total


def _lived(path: Path) -> set[tuple[str, str, str]]:
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {(r["module"], r["function"], _lines(r["diff"])) for r in rows if r["status"] in ("survived", "untested")}


def _lines(diff: str) -> str:
    """A diff without the line numbers, which change with the code around."""
    return "\n".join(line for line in diff.splitlines() if not line.startswith("@@"))


main()
