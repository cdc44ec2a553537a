"""`eplb plan`, `verify` and `convert`: from files to files."""

import json

import numpy as np
import pytest

from eplb_core import (
    Topology,
    balancedness,
    check_placement,
    load_bound,
    model_balancedness,
    moved_experts,
    rank_load,
    rebalance,
    round_robin,
    verify_plan,
)
from eplb_core.trace import (
    iter_windows,
    read_placement,
    read_plan,
    read_trace,
    write_placement,
    write_plan,
    write_trace,
)

pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from eplb_core.commands import app  # noqa: E402

TOPOLOGY = Topology(ep_size=4, slots_per_rank=5, num_nodes=2)
LOAD = np.random.default_rng(5).zipf(1.4, (6, 3, 16)) % 10_000


def eplb(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trace("load.npz", LOAD, {"layer_ids": [3, 4, 6]})
    return tmp_path


def plan(*args):
    done = eplb("plan", "load.npz", "--ranks", 4, "--redundant", 4, "--nodes", 2, *args)
    assert done.exit_code == 0, done.output
    return done


# plan


def test_plan_writes_what_rebalance_returns(folder):
    plan("--out", "new.npz", "--json", "new.json")
    expected = rebalance(LOAD.sum(axis=0), TOPOLOGY)
    stored = read_placement("new.npz")
    np.testing.assert_array_equal(stored.physical_to_logical, expected)
    assert stored.info["num_logical"] == 16
    assert (stored.info["ep_size"], stored.info["num_nodes"]) == (4, 2)
    assert stored.info["layer_ids"] == [3, 4, 6]
    assert stored.info["metadata"] == {"load": "load.npz", "policy": "incremental"}
    assert json.loads((folder / "new.json").read_text())["physical_to_logical"] == expected.tolist()


def test_plan_measures_both_placements(folder):
    plan("--previous", previous(), "--policy", "greedy", "--json", "new.json")
    found = json.loads((folder / "new.json").read_text())
    load, old = LOAD.sum(axis=0), read_placement("old.npz").physical_to_logical
    new = rebalance(load, TOPOLOGY, policy="greedy", previous=old)
    bound = load_bound(load, TOPOLOGY)
    busiest = rank_load(new, load, TOPOLOGY).max(axis=1)
    for key, expected in (
        ("balancedness_before", balancedness(old, load, TOPOLOGY)),
        ("balancedness", balancedness(new, load, TOPOLOGY)),
        ("balancedness_bound", load.sum(axis=1) / 4 / bound),
        ("gap", busiest / bound - 1),
        ("moved_experts", moved_experts(old, new, TOPOLOGY)),
    ):
        np.testing.assert_allclose(found[key], expected, atol=1e-12)
    assert found["model"] == {
        "balancedness_before": pytest.approx(model_balancedness(old, load, TOPOLOGY)),
        "balancedness": pytest.approx(model_balancedness(new, load, TOPOLOGY)),
        "balancedness_bound": pytest.approx(load.sum() / 4 / bound.sum()),
        "gap": pytest.approx(busiest.sum() / bound.sum() - 1),
        "moved_experts": moved_experts(old, new, TOPOLOGY).sum(),
    }
    assert found["compared_with"] == "previous"
    assert (found["load"], found["policy"]) == ("load.npz", "greedy")
    assert (found["ranks"], found["slots_per_rank"], found["nodes"], found["layer_ids"]) == (4, 5, 2, [3, 4, 6])
    assert found["planning_seconds"] > 0


def previous():
    ids = np.random.default_rng(1).permuted(round_robin(3, 16, TOPOLOGY), axis=1)
    write_placement("old.npz", ids, TOPOLOGY)
    return "old.npz"


def test_plan_without_a_previous_placement_compares_with_round_robin(folder):
    done = plan("--json", "-")
    found = json.loads(done.stdout)
    start = round_robin(3, 16, TOPOLOGY)
    np.testing.assert_allclose(found["balancedness_before"], balancedness(start, LOAD.sum(axis=0), TOPOLOGY))
    assert found["moved_experts"] == moved_experts(start, np.asarray(found["physical_to_logical"]), TOPOLOGY).tolist()


def test_plan_passes_its_options_on(folder):
    old = read_placement(previous()).physical_to_logical
    for args, load, options in (
        (["--last", 2], LOAD[-2:], {}),
        (["--last", 99], LOAD, {}),
        (["--groups", 4, "--policy", "greedy"], LOAD, {"num_groups": 4, "policy": "greedy"}),
        (["--previous", "old.npz", "--max-moves", 1], LOAD, {"previous": old, "max_moves": 1}),
        (["--previous", "old.npz", "--max-total-moves", 2], LOAD, {"previous": old, "max_total_moves": 2}),
    ):
        found = json.loads(plan("--json", "-", *args).stdout)["physical_to_logical"]
        assert found == rebalance(load.sum(axis=0), TOPOLOGY, **options).tolist()


def test_plan_writes_the_moves(folder):
    plan("--previous", previous(), "--moves", "moves.npz", "--out", "new.npz")
    found = read_plan("moves.npz")
    assert found.topology == TOPOLOGY
    np.testing.assert_array_equal(found.old, read_placement("old.npz").physical_to_logical)
    np.testing.assert_array_equal(found.new, read_placement("new.npz").physical_to_logical)
    assert verify_plan(found.old, found.new, found.plan, found.topology, found.schedule) == ()
    assert found.schedule is not None
    assert len(found.schedule.round)


def test_plan_prints_the_worst_layer_the_mean_and_the_total(folder):
    found = json.loads(plan("--json", "-").stdout)
    lines = plan().stdout.splitlines()
    worst = int(np.argmin(found["balancedness"]))
    (line,) = [line for line in lines if "worst" in line]
    assert line.split()[:3] == ["worst:", "layer", str([3, 4, 6][worst])]
    assert f"{found['balancedness'][worst]:.3f}" in line
    assert f"{found['balancedness_bound'][worst]:.3f}" in line
    (line,) = [line for line in lines if "all layers" in line]
    assert line.split()[-5:-3] == [f"{found['model'][key]:.3f}" for key in ("balancedness_before", "balancedness")]
    assert line.split()[-1] == str(found["model"]["moved_experts"])
    (line,) = [line for line in lines if "mean of 3 layers" in line]
    assert line.split()[-4] == f"{np.mean(found['balancedness']):.3f}"
    assert "layer 4 " not in "".join(lines) or worst == 1
    assert all(f"layer {number}" in plan("--layers").stdout for number in (3, 4, 6))


def test_json_on_standard_output_is_alone_there(folder):
    done = plan("--json", "-")
    json.loads(done.stdout)
    assert "all layers" in done.stderr


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.json", "x.yaml", "x.pt"])
def test_plan_writes_the_format_that_the_name_tells(name, folder):
    pytest.importorskip("torch" if name.endswith("pt") else "yaml")
    plan("--out", name)
    ids = read_placement(name).physical_to_logical
    rows = [3, 4, 6] if name in ("x.json", "x.pt") else slice(None)
    np.testing.assert_array_equal(ids[rows], rebalance(LOAD.sum(axis=0), TOPOLOGY))
    plan("--out", "map.json", "--format", "vllm-ascend")
    assert read_placement("map.json").info["format"] == "vllm-ascend"


def test_a_load_without_tokens_is_planned(folder):
    write_trace("load.npz", np.zeros((1, 2, 16), int))
    found = json.loads(plan("--json", "-").stdout)
    assert found["balancedness"] == found["balancedness_bound"] == [1.0, 1.0]
    assert found["gap"] == [0.0, 0.0]
    check_placement(np.asarray(found["physical_to_logical"]), TOPOLOGY, 16)


# verify


def test_verify_accepts_what_plan_writes(folder):
    plan("--previous", previous(), "--out", "new.npz", "--moves", "moves.npz")
    done = eplb("verify", "old.npz", "new.npz", "moves.npz", "--json", "-")
    assert done.exit_code == 0
    files = json.loads(done.stdout)["files"]
    assert [file["kind"] for file in files] == ["placement", "placement", "move plan"]
    assert not any(file["violations"] for file in files)
    moved = moved_experts(
        *(read_placement(name).physical_to_logical for name in ("old.npz", "new.npz")), TOPOLOGY
    ).sum()
    rounds = read_plan("moves.npz").schedule.num_rounds
    assert files[2]["summary"] == f"{moved} experts to move between 4 ranks in {rounds} rounds"
    done = eplb("verify", "new.npz", "--previous", "old.npz")
    assert done.exit_code == 0
    assert f"; {moved} experts to move" in done.stdout


def test_verify_finds_a_lost_expert(folder):
    write_placement("bad.npz", np.asarray([[0, 1, 2, 2], [0, 1, 2, 3]]), Topology(2, 2), num_logical=4)
    write_placement("good.npz", np.asarray([[0, 1, 2, 3]]), Topology(2, 2), num_logical=4)
    done = eplb("verify", "good.npz", "bad.npz", "--json", "-")
    assert done.exit_code == 1
    good, bad = json.loads(done.stdout)["files"]
    assert good["violations"] == []
    assert "(0, 3)" in bad["violations"][0]
    assert "eplb verify: rules are broken." in done.stderr
    done = eplb("verify", "bad.npz")
    assert done.exit_code == 1
    assert "violation: `check_placement` needs a slot for every expert" in done.stdout


def test_verify_warns_of_copies_that_help_nobody(folder):
    ids = np.asarray([[0, 0, 1, 2, 2, 2, -1, -1]])
    write_placement("x.npy", ids)
    for args, warnings in (
        (["--ranks", 2], ["2 empty slots", "2 copies share a rank"]),
        (["--ranks", 4], ["2 empty slots", "2 copies share a rank"]),
        (["--ranks", 8], ["2 empty slots"]),
        ([], ["2 empty slots", "number of ranks is unknown"]),
    ):
        done = eplb("verify", "x.npy", "--json", "-", *args)
        assert done.exit_code == 0
        (file,) = json.loads(done.stdout)["files"]
        assert len(file["warnings"]) == len(warnings)
        assert all(start in found for start, found in zip(warnings, file["warnings"], strict=True))
    assert eplb("verify", "x.npy", "--experts", 4).exit_code == 1


def test_verify_finds_a_broken_plan(folder):
    old, new = np.asarray([[0, 1, 2, 3]]), np.asarray([[2, 1, 0, 3]])
    from eplb_core import MovePlan, plan_moves, schedule_rounds

    planned = plan_moves(old, new, Topology(2, 2))
    schedule = schedule_rounds(planned, Topology(2, 2))
    write_plan("a.npz", old, new, MovePlan(np.asarray([[3, 1, 0, 3]])), Topology(2, 2))
    done = eplb("verify", "a.npz")
    assert done.exit_code == 1
    assert "layer 0, slot 0: coverage: slot 0 shall hold expert 2" in done.stdout
    late = schedule._replace(round=schedule.round + np.arange(len(schedule.round), dtype=np.int32) % 2)
    write_plan("b.npz", old, new, planned, Topology(2, 2), late._replace(dst_slot=late.dst_slot[::-1].copy()))
    assert eplb("verify", "b.npz").exit_code == 1


def test_verify_says_which_experts_a_change_loses(folder):
    write_placement("old.npz", np.asarray([[0, 1, 0, 1]]), Topology(2, 2))
    write_placement("new.npz", np.asarray([[0, 1, 2, 2]]), Topology(2, 2))
    done = eplb("verify", "new.npz", "--previous", "old.npz")
    assert done.exit_code == 1
    assert "lost (layer, expert) pairs [(0, 2)]" in done.stdout


# convert


@pytest.mark.parametrize("names", [["a.csv", "b.json", "c.npz", "d.npy", "e.npz"], ["a.pt", "b.npz"]])
def test_convert_takes_a_trace_around(names, folder):
    if "a.pt" in names:
        pytest.importorskip("torch")
    write_trace("load.npz", LOAD)
    for source, target in zip(["load.npz", *names], names, strict=False):
        kind = ["--kind", "trace"] if source == "d.npy" else []
        done = eplb("convert", source, target, *kind, "--json", "-")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found == {"source": source, "target": target, "kind": "trace", "windows": 6, "layers": 3, "experts": 16}
        np.testing.assert_array_equal(read_trace(target).load, LOAD)


@pytest.mark.parametrize("names", [["a.yaml", "b.json", "c.npy", "d.npz"], ["a.pt", "b.yml"]])
def test_convert_takes_a_placement_around(names, folder):
    pytest.importorskip("yaml")
    if "a.pt" in names:
        pytest.importorskip("torch")
    ids = rebalance(LOAD.sum(axis=0), TOPOLOGY)
    write_placement("placement.npz", ids, TOPOLOGY)
    for source, target in zip(["placement.npz", *names], names, strict=False):
        kind = ["--kind", "placement", "--ranks", 4] if source == "c.npy" else []
        done = eplb("convert", source, target, *kind)
        assert done.exit_code == 0, done.output
        assert "placement of 3 layers, 20 slots" in done.stdout
        np.testing.assert_array_equal(read_placement(target).physical_to_logical, ids)


def test_convert_keeps_metadata_and_numbers_layers(folder):
    done = eplb("convert", "load.npz", "copy.npz")
    assert done.exit_code == 0
    assert read_trace("copy.npz").metadata == {"layer_ids": [3, 4, 6]}
    assert eplb("convert", "load.npz", "copy.npz", "--first-layer", 1).exit_code == 0
    assert read_trace("copy.npz").metadata == {"layer_ids": [3, 4, 6]}
    np.save("plain.npy", LOAD)
    for target in ("copy.npz", "copy.csv"):
        assert eplb("convert", "plain.npy", target, "--first-layer", 1).exit_code == 0
        assert read_trace(target).metadata == {"layer_ids": [1, 2, 3]}
    write_placement("init.json", round_robin(3, 16, TOPOLOGY))
    pytest.importorskip("yaml")
    assert eplb("convert", "init.json", "balancer.yaml", "--first-layer", 3).exit_code == 0
    assert read_placement("balancer.yaml").info["layer_ids"] == [3, 4, 5]
    assert eplb("convert", "balancer.yaml", "map.json", "--to", "vllm-ascend", "--ranks", 4).exit_code == 0
    assert read_placement("map.json").info["ep_size"] == 4


def test_convert_asks_when_numbers_could_be_either(folder):
    np.save("x.npy", np.asarray([[0, 1, 2, 3]]))
    done = eplb("convert", "x.npy", "y.json")
    assert done.exit_code == 2
    assert "could be a trace or a placement" in done.stderr
    assert eplb("convert", "x.npy", "y.json", "--kind", "placement").exit_code == 0
    assert read_placement("y.json").physical_to_logical.tolist() == [[0, 1, 2, 3]]
    assert eplb("convert", "x.npy", "y.csv").exit_code == 0  # there are no placements in CSV
    assert read_trace("y.csv").load.tolist() == [[[0, 1, 2, 3]]]


def test_a_trace_larger_than_memory_is_converted_and_planned(folder):
    write_trace("large.npz", (LOAD[0] for _ in range(5000)))
    limit = ["--max-gb", 0.001]  # a window has 384 bytes, the trace 1.9 MB
    assert eplb("convert", "large.npz", "copy.npz", *limit).exit_code == 0
    assert sum(1 for _ in iter_windows("copy.npz")) == 5000
    assert eplb("plan", "large.npz", "--ranks", 4, *limit).exit_code == 0
    done = eplb("convert", "large.npz", "copy.csv", *limit)
    assert done.exit_code == 2
    assert "Raise the limit" in done.stderr


# Requests that cannot be met


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "load.npz"], "Missing option '--ranks'"),
        (["plan", "missing.npz", "--ranks", "4"], "`missing.npz` must be a file"),
        (["plan", "load.txt", "--ranks", "4"], "must be one of npz, npy, json, csv, sglang, sglang-pt"),
        (["plan", "load.npz", "--ranks", "3", "--redundant", "1"], "Use --redundant 2."),
        (["plan", "load.npz", "--ranks", "3", "--redundant", "3"], "Use --redundant 5 or 2."),
        (["plan", "load.npz", "--ranks", "4", "--nodes", "3"], "num_nodes"),
        (["plan", "load.npz", "--ranks", "4", "--policy", "magic"], "policy='magic'"),
        (["plan", "load.npz", "--ranks", "4", "--out", "x.csv"], "must be one of npz, npy, json, sglang"),
        (["plan", "load.npz", "--ranks", "4", "--out", "x.npz", "--format", "magic"], "format='magic'"),
        (["plan", "load.npz", "--ranks", "4", "--out", "no/x.npz"], "the folder no does not exist"),
        (["plan", "load.npz", "--ranks", "4", "--moves", "x.npz"], "must have `--previous`"),
        (["plan", "load.npz", "--ranks", "4", "--previous", "load.npz"], "physical_to_logical"),
        (["plan", "load.npz", "--ranks", "4", "--previous", "other.npz"], "slots"),
        (["plan", "other.npz", "--ranks", "4"], "A placement is not a trace"),
        (["plan", "misnumbered.npz", "--ranks", "4"], "must number each layer"),
        (["plan", "broken.npz", "--ranks", "4"], "`broken.npz` cannot be read"),
        (["verify"], "Missing argument 'FILE...'"),
        (["verify", "load.npz"], "physical_to_logical"),
        (["verify", "broken.npz"], "`broken.npz` cannot be read"),
        (["verify", "other.npz", "--ranks", "3"], "`--ranks` must divide"),
        (["verify", "other.npz", "other.npz", "--previous", "other.npz"], "must come with one placement"),
        (["verify", "other.npy", "--previous", "other.npz"], "Add --ranks"),
        (["convert", "load.npz"], "Missing argument 'OUT'"),
        (["convert", "load.npz", "no/x.csv"], "the folder no does not exist"),
        (["convert", "load.npz", "x.yaml"], "physical_to_logical"),
        (["convert", "load.npz", "x.csv", "--kind", "both"], "must be trace or placement"),
        (["convert", "load.npz", "x.csv", "--from", "npy"], "cannot be read"),
        (["convert", "other.npy", "x.json", "--to", "vllm-ascend"], "must get the topology"),
        (["convert", "broken.json", "x.csv"], "cannot be read"),
        (["convert", "broken.json", "x.json"], "cannot be read"),
    ],
)
def test_requests_that_cannot_be_met_exit_with_2_and_say_why(args, message, folder):
    write_placement("other.npz", np.asarray([[0, 1, 2, 3]]), Topology(2, 2))
    write_placement("other.npy", np.asarray([[0, 1, 2, 3]]))
    (folder / "broken.npz").write_bytes((folder / "load.npz").read_bytes()[:-40])
    (folder / "broken.json").write_text("[[")
    np.savez("misnumbered.npz", load=LOAD, layer_ids=np.arange(9))
    done = eplb(*args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_work_that_goes_wrong_exits_with_1(folder):
    (folder / "taken").mkdir()
    done = eplb("convert", "load.npz", "taken", "--to", "npz")
    assert done.exit_code == 1
    assert "eplb convert:" in done.stderr


def test_the_examples_of_the_help_work(folder):
    """Each line of the examples is a command that runs, once its files are there."""
    pytest.importorskip("yaml")
    torch = pytest.importorskip("torch")
    wide = np.random.default_rng(0).integers(1, 99, (2, 2, 64))
    for name in ("load.npz", "load.csv", "expert_distribution_recorder_1.pt"):
        write_trace(name, wide)
    (folder / "recordings").mkdir()
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.ones(2, 64, dtype=torch.int32)}
    recording = {"records": [record], "last_physical_to_logical_map": torch.arange(64).repeat(2, 1)}
    torch.save(recording, "recordings/0.pt")
    for command in ("plan", "convert", "verify"):
        text = eplb(command, "--help").stdout.partition("Examples:\n")[2].replace("\\\n", " ")
        lines = [line.partition("(")[0].split()[1:] for line in text.splitlines() if line.strip()]
        assert len(lines) >= 3
        for line in lines:
            done = eplb(*line)
            assert done.exit_code == 0, (line, done.output)
