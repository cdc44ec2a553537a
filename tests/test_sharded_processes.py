"""Sharded arrays over two and four real processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

ROOT = Path(__file__).parents[1]
TIMEOUT = 240.0


def environment() -> dict[str, str]:
    """Without what other tests, or their caller, tell JAX about devices."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_cross_processes(processes):
    """Also: processes with different plans all raise and move nothing, and the arrays can be rearranged afterwards."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    workers = [run(["-m", "tests.sharded_worker", str(i), str(processes), address]) for i in range(processes)]
    try:
        outputs = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            end(worker)
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert re.findall(r"^(moved|disagreed|went on)$", output, flags=re.M) == ["moved", "disagreed", "went on"]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_example_runs(processes):
    example = run(["docs/examples/jax_processes.py", "--processes", str(processes)])
    try:
        output, _ = example.communicate(timeout=TIMEOUT)
    finally:
        end(example)
    assert example.returncode == 0, output
    assert len(re.findall(r"process \d, window \d: \d+ experts moved, all rows in place", output)) == 3 * processes
