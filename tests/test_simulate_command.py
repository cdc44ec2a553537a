"""`eplb simulate`, `advise` and `report` from the outside: files in, figures and exit codes out."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from eplb_core import Topology
from eplb_core.advise import advise
from eplb_core.costs import Costs, Links
from eplb_core.simulate import simulate
from eplb_core.simulate.replay import gain
from eplb_core.trace import write_trace

for extra in ("typer", "rich", "matplotlib"):
    pytest.importorskip(extra)
from typer.testing import CliRunner  # noqa: E402

from eplb_core.commands import app  # noqa: E402

WINDOWS, LAYERS, EXPERTS = 14, 3, 16


def eplb(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def load():
    rng = np.random.default_rng(0)
    popularity = np.exp(rng.normal(size=(LAYERS, EXPERTS)))
    return rng.poisson(popularity * 1000, (WINDOWS, LAYERS, EXPERTS))


@pytest.fixture(scope="module")
def trace(load, tmp_path_factory):
    file = tmp_path_factory.mktemp("traces") / "load.npz"
    write_trace(file, load, {"model": "made up"})
    return file


def run_json(tmp_path, *args):
    file = tmp_path / "out.json"
    result = eplb(*args, "--json", file)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text(encoding="utf-8"))


def test_simulate_reports_what_the_library_finds(load, trace, tmp_path):
    found = run_json(
        tmp_path, "simulate", trace, "--ranks", 4, "--redundant", 4, "--policy", "greedy", "--policy", "incremental"
    )
    assert [row["policy"] for row in found["policies"]] == ["greedy", "incremental"]
    static = simulate(load, Topology(4, 5), policy="static")
    for row in found["policies"]:
        replay = simulate(load, Topology(4, 5), policy=row["policy"])
        assert row["mean_balancedness"] == pytest.approx(replay.mean_balancedness)
        assert row["moved_experts"] == replay.moved_experts
        assert row["bytes_moved"] == replay.moved_experts * 44_040_192
        assert row["planning_seconds"] > 0
        assert row["gain"]["share"] == pytest.approx(gain(replay, static).share)
        assert row["mean_balancedness"] <= row["bound_balancedness"] <= 1
        assert len(row["events"]) == WINDOWS - 1
    assert [row["label"] for row in found["baselines"]] == ["static", "refined, once"]
    assert found["baselines"][0]["moved_experts"] == 0
    assert (found["windows"], found["layers"], found["logical_experts"]) == (WINDOWS, LAYERS, EXPERTS)
    assert found["judged_windows"] == WINDOWS - 1


def test_simulate_runs_every_combination(trace, tmp_path):
    sizes = ["--ranks", 4, "--ranks", 8, "--redundant", 0, "--redundant", 8]
    found = run_json(tmp_path, "simulate", trace, *sizes, "--policy", "refined", "--interval", 1, "--interval", 3)
    run = [(row["ranks"], row["redundant"], row["interval"]) for row in found["policies"]]
    assert run == [(ranks, redundant, interval) for ranks in (4, 8) for redundant in (0, 8) for interval in (1, 3)]
    assert len(found["baselines"]) == 8
    assert all(len(row["events"]) == (13 if row["interval"] == 1 else 5) for row in found["policies"])


def test_prices_and_gates_reach_the_replay(load, trace, tmp_path):
    args = (
        "--ranks 4 --nodes 2 --policy refined --estimator window:2 --bytes-per-expert 1000 --us-per-token 3 --scale 2 "
        "--within-node 10 --across-nodes 1 --latency-us 7 --horizon 2 --threshold 0.99"
    )
    found = run_json(tmp_path, "simulate", trace, *args.split())
    costs = Costs(1000, 3e-6, 2.0, Links(10e9, 1e9, 7e-6))
    assert found["costs"]["links"] == {"within_node": 10e9, "across_nodes": 1e9, "latency": 7e-6}
    replay = simulate(
        load, Topology(4, 4, 2), policy="refined", estimator="window:2", costs=costs, horizon=2, threshold=0.99
    )
    (row,) = found["policies"]
    assert row["critical_path_seconds"] == pytest.approx(replay.critical_path_seconds.sum())
    assert row["bytes_across_nodes"] > 0
    assert [event["reason"] for event in row["events"]] == [event.decision.reason.value for event in replay.events]


def test_simulate_prints_a_table_for_people(trace):
    result = eplb("simulate", trace, "--ranks", 4, "--policy", "greedy")
    assert result.exit_code == 0
    for word in ("4 ranks, 0 redundant experts", "static", "refined, once", "greedy", "balance", "13 windows judged"):
        assert word in result.output
    assert all(len(line) <= 120 for line in result.output.splitlines())


def test_json_on_standard_output_is_alone_there(trace):
    result = eplb("simulate", trace, "--ranks", 4, "--policy", "greedy", "--json", "-")
    assert json.loads(result.stdout)["policies"][0]["policy"] == "greedy"
    assert "windows judged" in result.stderr


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_simulate_draws(trace, tmp_path, ending, start):
    file = tmp_path / f"picture.{ending}"
    assert eplb("simulate", trace, "--ranks", 4, "--policy", "greedy", "--plot", file).exit_code == 0
    assert file.read_bytes().startswith(start)


def test_simulate_draws_several_topologies(trace, tmp_path):
    args = ["--ranks", 4, "--ranks", 8, "--policy", "greedy", "--plot", tmp_path / "p.png"]
    assert eplb("simulate", trace, *args).exit_code == 0
    assert (tmp_path / "p.png").exists()


def test_processes_change_nothing(trace, tmp_path):
    args = ["simulate", trace, "--ranks", 4, "--redundant", 4, "--interval", 2]
    one, two = (run_json(tmp_path, *args, "--jobs", jobs) for jobs in (1, 2))
    for rows in zip(one["policies"], two["policies"], strict=True):
        a, b = (json.dumps(row) for row in rows)
        assert re.sub(r'"planning_seconds": [\d.e-]+', "", a) == re.sub(r'"planning_seconds": [\d.e-]+', "", b)


def test_advise_agrees_with_the_library(load, trace, tmp_path):
    args = ["--ranks", 4, "--policy", "greedy", "--interval", 4, "--max-redundant", 4, "--bytes-per-expert", 1000]
    found = run_json(tmp_path, "advise", trace, *args, "--latency-us", 0)
    costs = Costs(bytes_per_expert=1000, links=Links(latency=0.0))
    advice = advise(load, 4, policies=["greedy"], intervals=[4], max_redundant=4, costs=costs)
    assert found["recommend"] is advice.recommend is True
    assert found["verdict"] == "enable"
    assert found["chosen"]["gain"]["share"] == pytest.approx(advice.chosen.gain.share)
    assert len(found["candidates"]) == 2


def test_advise_exits_with_0_whatever_it_says(trace, tmp_path):
    for args, recommend in (("--bytes-per-expert 1 --latency-us 0", True), ("--scale 1e-6", False)):
        result = eplb("advise", trace, "--ranks", 4, "--policy", "greedy", *args.split(), "--json", tmp_path / "a.json")
        assert result.exit_code == 0
        assert json.loads((tmp_path / "a.json").read_text())["recommend"] is recommend
        assert ("Enable it:" if recommend else "Do not enable it") in result.output


def test_advise_on_a_short_trace(trace, tmp_path):
    found = run_json(tmp_path, "advise", trace, "--ranks", 4, "--last", 5)
    assert (found["recommend"], found["verdict"], found["windows"]) == (False, "too_short", 5)


def test_report_writes_one_page(trace, tmp_path):
    file = tmp_path / "report.html"
    result = eplb("report", trace, "--ranks", 4, "--redundant", 4, "--out", file, "--title", "My page", "--no-advice")
    assert result.exit_code == 0
    page = file.read_text(encoding="utf-8")
    assert "<h1>My page</h1>" in page
    assert "made up" in page
    assert "<h2>Advice</h2>" not in page
    assert page.count("data:image/png") == 5


def test_report_gives_advice_and_figures(trace, tmp_path):
    file = tmp_path / "report.html"
    found = run_json(tmp_path, "report", trace, "--ranks", 4, "--policy", "greedy", "--out", file)
    assert "<h2>Advice</h2>" in file.read_text(encoding="utf-8")
    assert found["advice"]["recommend"] in (True, False)
    assert [row["label"] for row in found["baselines"]] == ["static", "refined, once"]
    assert [row["label"] for row in found["policies"]] == ["greedy"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["simulate", "LOAD"], "Missing option '--ranks'"),
        (["simulate", "nowhere.npz", "--ranks", "4"], "nowhere.npz"),
        (["simulate", "LOAD", "--ranks", "3"], "Use --redundant 2"),
        (["simulate", "LOAD", "--ranks", "4", "--nodes", "3"], "num_nodes=3"),
        (["simulate", "LOAD", "--ranks", "4", "--policy", "magic"], "policy='magic'"),
        (["simulate", "LOAD", "--ranks", "4", "--estimator", "oracle"], "estimator='oracle'"),
        (["simulate", "LOAD", "--ranks", "4", "--interval", "0"], "Invalid value for '--interval'"),
        (["simulate", "LOAD", "--ranks", "4", "--threshold", "2"], "threshold=2.0"),
        (["simulate", "LOAD", "--ranks", "4", "--scale", "0"], "scale=0.0"),
        (["simulate", "LOAD", "--ranks", "4", "--within-node", "0"], "within_node=0.0"),
        (["simulate", "LOAD", "--ranks", "4", "--plot", "picture.xyz"], "Use .png or .svg"),
        (["simulate", "LOAD", "--ranks", "4", "--plot", "no/folder/p.png"], "does not exist"),
        (["advise", "LOAD", "--ranks", "4", "--redundant", "3"], "Use num_redundant=4"),
        (["advise", "LOAD", "--ranks", "4", "--minimum-gain", "1"], "Invalid value for '--minimum-gain'"),
        (["report", "LOAD", "--ranks", "4"], "Missing option '--out'"),
    ],
)
def test_requests_that_cannot_be_met_exit_with_2(trace, args, message):
    result = eplb(*(trace if arg == "LOAD" else arg for arg in args))
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_that_cannot_be_written_exits_with_1(trace):
    result = eplb("report", trace, "--ranks", 4, "--no-advice", "--policy", "static", "--out", "/proc/nothing.html")
    assert result.exit_code == 1
    assert "/proc/nothing.html" in result.output


@pytest.mark.parametrize("command", ["simulate", "advise", "report"])
def test_the_examples_in_the_help_work(command, load, tmp_path, monkeypatch):
    big = np.concatenate([load] * 2, axis=2)[:10, :1]
    write_trace(tmp_path / "load.npz", big)
    monkeypatch.chdir(tmp_path)
    module = sys.modules[f"eplb_core.commands.{command}"]
    lines = module.EPILOG.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in lines if line.strip().startswith("eplb ")]
    assert len(examples) >= 2
    shown = " ".join(eplb(command, "--help").output.split())
    for _, *args in examples:
        assert f"eplb {args[0]} {args[1]}" in shown
        result = eplb(*args)
        assert result.exit_code == 0, (args, result.output)


@pytest.mark.parametrize("command", ["simulate", "advise", "report"])
def test_the_missing_extra_is_named(command, trace, monkeypatch, tmp_path):
    module = "matplotlib" if command == "report" else "rich"
    monkeypatch.setitem(sys.modules, module, None)
    args = ["--out", tmp_path / "r.html"] if command == "report" else []
    result = eplb(command, trace, "--ranks", 4, *args)
    assert result.exit_code == 2
    assert f"needs {module}. Install with: pip install 'eplb[cli]'" in result.stderr


def test_a_run_that_is_told_to_end_ends_with_its_processes(tmp_path):
    rng = np.random.default_rng(0)
    write_trace(tmp_path / "long.npz", rng.poisson(100, (400, 8, 64)))
    code = "from eplb_core.cli import main; main()"
    args = ["simulate", str(tmp_path / "long.npz"), "--ranks", "8", "--policy", "refined", "--policy", "greedy"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(_children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        children = _children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        deadline = time.monotonic() + 10
        while any(_alive(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [child for child in children if _alive(child)]
    finally:
        process.kill()
        process.wait(timeout=10)


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        pytest.skip("no /proc here to find child processes")


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
