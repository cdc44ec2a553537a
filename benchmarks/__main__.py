"""Run all benchmarks and write `docs/benchmarks.md`: `python -m benchmarks [--only planning,growth]`.

Every part runs in a process of its own, so that memory and settings of one do not reach another. A part that cannot
run, such as for want of a package, is named in the end, and keeps what the page said of it.
"""

import argparse
import importlib
import subprocess
import sys

from benchmarks.page import PAGE, section, splice

# module: title. Every module has `report() -> str`, in Markdown.
PARTS = {
    "planning": "Planning time",
    "growth": "Growth",
    "whole": "The whole rebalance",
    "executor": "Executor",
    "runtime": "The runtime",
    "frontier": "Balance against moves",
    "estimators": "Load estimators",
    "shares": "Shares and locality",
    "replay": "Replays",
    "plugs": "Plugs for vLLM and SGLang",
    "elastic": "Groups that change",
    "sharded": "Sharded JAX arrays",
}


def measure(names: list[str]) -> list[str]:
    """Measure parts in turn, writing the page after each; returns those that failed."""
    failed = []
    for name in names:
        print(f"{PARTS[name]} ({name}) ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks", "--print", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            continue
        old = PAGE.read_text() if PAGE.exists() else ""
        PAGE.write_text(splice(old, {name: done.stdout.strip()}, list(PARTS)))
    return failed


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--print", metavar="PART", choices=list(PARTS), help="print one part, leave the page alone")
    options = parser.parse_args()
    if options.print:
        print(section(PARTS[options.print], importlib.import_module(f"benchmarks.{options.print}")))
        return 0
    names = options.only.split(",") if options.only else list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = measure(names)
    if failed:
        print(f"could not be measured: {', '.join(failed)}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
