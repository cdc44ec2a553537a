"""A pytest plugin for `property_tests.fuzz`: hypothesis tests only, until a time; outcomes are written down at once."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import is_hypothesis_test, settings
from hypothesis.database import DirectoryBasedExampleDatabase


def pytest_addoption(parser):
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-keep", type=Path, help="folder for the database and the events")
    group.addoption("--fuzz-examples", type=int, help="examples per test, where the test does not say")
    group.addoption("--fuzz-until", type=float, help="seconds since the epoch after which no test is begun")
    group.addoption("--fuzz-skip", action="append", default=[], help="a test to leave out")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    options = config.option
    settings.register_profile(
        "fuzz",
        max_examples=options.fuzz_examples,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(options.fuzz_keep / "examples"),
        print_blob=True,
    )
    settings.load_profile("fuzz")
    config.pluginmanager.register(Recorder(options), "fuzz-recorder")


class Recorder:
    """Writes one line of JSON when a test begins and one when it ends, so that a crash loses nothing."""

    def __init__(self, options):
        self.until, self.skip = options.fuzz_until, set(options.fuzz_skip)
        self.events = options.fuzz_keep / "events.jsonl"

    def _write(self, **event):
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        chosen = [x for x in items if is_hypothesis_test(getattr(x, "obj", None)) and x.nodeid not in self.skip]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid not in self.skip:
            self._write(test=report.nodeid, ended=True, examples=0, failure=report.longreprtext)

    def pytest_runtest_logstart(self, nodeid):
        self._write(test=nodeid, ended=False)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        if report.failed:
            item.fuzz_failure = report.longreprtext
        if report.when == "teardown":
            ran = re.findall(r"(\d+) passing.*?(\d+)\s+failing", getattr(item, "hypothesis_statistics", ""), re.DOTALL)
            examples = sum(int(count) for pair in ran for count in pair)
            failure = getattr(item, "fuzz_failure", None)
            self._write(test=item.nodeid, ended=True, examples=examples, failure=failure)
            if time.time() >= self.until:
                item.session.shouldstop = "the time is over"
        return report
