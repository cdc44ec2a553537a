"""Try mutants inside one pytest session: each in a fork of the process that has collected the tests."""

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from _pytest.runner import runtestprotocol
from mutations import Mutant

SLACK = 10.0  # CPU seconds that a mutant may take beyond several times what the unchanged tests take
MEMORY = 24 * 2**30  # bytes of address space


class Test(NamedTuple):
    """What the unchanged test did: CPU seconds, and the functions it called, as (module, name)."""

    seconds: float
    called: frozenset[tuple[str, str]]


class Verdict(NamedTuple):
    """What became of a mutant: `"killed"`, `"timeout"`, `"survived"`, or `"untested"` where no test calls the function.

    by: the test that failed.
    """

    status: str
    by: str = ""


class Killer:
    """A pytest plugin that hands the collected tests to `work` instead of running them.

    Args:
        root: the folder of the modules that are mutated.
        work: called with this object.
        budget: CPU seconds that the unchanged tests of one mutant may take; the rest are left out.
        watched: file that keeps what the unchanged tests do; None to watch them in every run.
    """

    def __init__(self, root: Path, work, budget: float, watched: Path | None = None):
        self.root, self.work, self.budget, self.watched = root, work, budget, watched
        self.items, self.tests, self.kills = [], {}, Counter()

    def pytest_runtestloop(self, session) -> bool:
        """Run the unchanged tests once, each watched; then let `work` try its mutants."""
        self.items = session.items
        if self.watched is not None and self.watched.exists():
            found = json.loads(self.watched.read_text())
        else:
            found = _in_fork(lambda: _watch(self.items, self.root), 3600.0)
            if self.watched is not None:
                self.watched.write_text(json.dumps(found))
        self.items = [item for item in self.items if item.nodeid in found]
        failed = [name for name, (passed, *_) in found.items() if not passed]
        if failed:
            raise SystemExit(f"the unchanged tests fail: {failed}")
        self.tests = {
            name: Test(seconds, frozenset((module, function) for module, function in called))
            for name, (_, seconds, called) in found.items()
        }
        self.work(self)
        return True

    def try_mutant(self, mutant: Mutant) -> Verdict:
        """Run the tests that call the mutated function, those that killed its neighbours and fast ones first."""
        return self._try(mutant.module, mutant.function, lambda: _install(mutant))

    def try_broken(self, module: str, function: str) -> Verdict:
        """The control: the function raises when it is called."""
        return self._try(module, function, lambda: _swap(_resolve(module, function), _raise))

    def _try(self, module: str, function: str, install) -> Verdict:
        calling = self._choose(module, function)
        if not calling:
            return Verdict("untested")
        limit = SLACK + 4 * sum(self._seconds(item) for item in calling)
        answer = _in_fork(lambda: _first_failure(calling, install, limit), 4 * limit)
        if answer is None:
            return Verdict("timeout")
        if answer:
            self.kills[module, answer] += 1
        return Verdict("killed", answer) if answer else Verdict("survived")

    def _choose(self, module: str, function: str) -> list:
        """The tests that call the function: those of its module first, then those that killed and quick ones."""
        concept = module.split(".")[-1]

        def order(item):
            return concept not in item.path.name, self._seconds(item) / (1 + 4 * self.kills[module, item.nodeid])

        calling = [item for item in self.items if (module, function) in self.tests[item.nodeid].called]
        calling.sort(key=order)
        total = accumulate(self._seconds(item) for item in calling)
        return [item for item, upto in zip(calling, total, strict=True) if upto <= self.budget] or calling[:1]

    def _seconds(self, item) -> float:
        return self.tests[item.nodeid].seconds


def _in_fork(run, timeout: float):
    """What `run` returns in a child process; None if it dies or takes longer than `timeout` seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = json.dumps(run()).encode()
        except BaseException as error:
            answer = json.dumps(f"raised {error!r}").encode()
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    answer, end = b"", time.monotonic() + timeout
    while select.select([reader], [], [], max(end - time.monotonic(), 0.0))[0]:
        part = os.read(reader, 2**16)
        if not part:
            break
        answer += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def _watch(items, root: Path) -> dict:
    """Run all tests; for each whether it passed, its CPU seconds, and the functions below `root` that it called."""
    folder, found = f"{root}{os.sep}", {}
    for item in items:
        codes = set()

        def note(frame, event, _, codes=codes):
            if event == "call":
                codes.add(frame.f_code)

        start = time.process_time()
        sys.setprofile(note)
        passed = _passes(item)
        sys.setprofile(None)
        seconds = time.process_time() - start
        called = {
            (_module(code.co_filename, root), code.co_qualname.split(".<locals>")[0])
            for code in codes
            if code.co_filename.startswith(folder)
        }
        found[item.nodeid] = passed, seconds, sorted(called)
    return found


def _module(filename: str, root: Path) -> str:
    parts = Path(filename).relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _passes(item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


def _first_failure(items, install, limit: float) -> str:
    """The first test that fails once `install` has been called, or nothing."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_PROF, limit)  # nobody handles the signal, so it ends the process
    try:
        install()
    except Exception as error:
        return f"import: {error!r}"
    return next((item.nodeid for item in items if not _passes(item)), "")


def _install(mutant: Mutant) -> None:
    """Run the mutated module beside the real one, and give the real function the mutant's code and defaults."""
    changed = types.ModuleType(mutant.module)
    real = importlib.import_module(mutant.module)
    changed.__dict__.update({name: getattr(real, name) for name in ("__file__", "__package__", "__spec__")})
    sys.modules[mutant.module] = changed  # dataclasses look themselves up
    exec(compile(mutant.source, real.__file__, "exec"), changed.__dict__)
    sys.modules[mutant.module] = real
    _swap(_resolve(mutant.module, mutant.function), _lookup(changed, mutant.function))


def _resolve(module: str, function: str):
    return _lookup(importlib.import_module(module), function)


def _lookup(module, function: str):
    found = module
    for name in function.split("."):
        found = getattr(found, name)
    return found


def _swap(function, other) -> None:
    """Whoever holds `function` calls `other` from now on."""
    for name in ("__code__", "__defaults__", "__kwdefaults__"):
        setattr(function, name, getattr(other, name))


def _raise(*args, **options):
    raise RuntimeError("the mutant was called")
