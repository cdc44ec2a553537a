"""The page of results is written part by part, and what it compares is the same work."""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import page, sequential
from benchmarks.__main__ import PARTS
from benchmarks.growth import fit
from benchmarks.planning import distinct, verdict
from eplb_core import Topology, rebalance

ORDER = ["first", "second", "third"]


def test_a_part_that_is_measured_again_replaces_itself_and_leaves_the_others():
    whole = page.splice("", {"third": "## 3\n\nold", "first": "## 1\n\n| a |"}, ORDER)
    again = page.splice(whole, {"third": "## 3\n\nnew"}, ORDER)
    assert again == whole.replace("old", "new")
    assert again.startswith(page.HEAD)


def test_a_new_part_goes_where_the_order_says():
    whole = page.splice("", {"third": "C", "first": "A"}, ORDER)
    texts = page.splice(whole, {"second": "B"}, ORDER)[len(page.HEAD) :]
    assert [texts.index(letter) for letter in "ABC"] == sorted(texts.index(letter) for letter in "ABC")


def test_a_section_says_when_and_on_what_it_was_measured():
    part = SimpleNamespace(report=lambda: "| 1 |", READING="Lost: all.")
    text = page.section("Title", part)
    assert text.startswith("## Title\n\n*Measured 20")
    assert f"numpy {np.__version__}" in text
    assert text.endswith("| 1 |\n\nLost: all.")
    assert page.section("Title", SimpleNamespace(report=lambda: "| 1 |")).endswith("\n\n| 1 |")


def test_every_part_can_report():
    for name in PARTS:
        tree = ast.parse((Path(page.__file__).parent / f"{name}.py").read_text())
        assert "report" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize(("num_nodes", "num_groups"), [(1, 1), (2, 4), (4, 4)])
def test_the_compiled_pass_places_as_greedy_does(num_nodes, num_groups):
    pytest.importorskip("numba")
    topology = Topology(8, 5, num_nodes)
    load = np.random.default_rng(num_nodes).integers(0, 9, (7, 32))  # with many ties
    expected = rebalance(load, topology, policy="greedy", num_groups=num_groups)
    placed = sequential.compiled()(load.astype(float), topology.num_slots, 8, num_groups, num_nodes)
    np.testing.assert_array_equal(placed, expected)


def test_distinct_loads_have_no_ties_and_keep_their_order():
    load = np.random.default_rng(0).integers(0, 5, (3, 4, 50))
    made = distinct(load)
    assert all(len(set(row)) == 50 for row in made.reshape(-1, 50).tolist())
    assert (made // 50 == load).all()


def test_a_missed_goal_is_said():
    times = {"greedy": 1.0, "vLLM policy": 7.0, "derive_maps": 1.0, "vLLM maps": 20.0}
    times |= {"plan_moves, all ranks": 1.0, "vLLM moves, one rank": 2.0, "vLLM batches": 11.0}
    times |= {"schedule_rounds, all layers": 1.0, "schedule_rounds, layer by layer": 2.0}
    lines = verdict({"small": times}).splitlines()
    assert "missed: 7.0 at small" in lines[0]
    assert "met, at least 20.0" in lines[1]
    assert "missed: 5.5 at small" in lines[-1]


def test_the_fit_finds_the_exponent():
    sizes = [2, 4, 8, 16, 32, 64]
    exponent, factor = fit(sizes, [3 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5)
    assert np.exp(factor) == pytest.approx(3)
