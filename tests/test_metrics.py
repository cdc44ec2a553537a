"""The balancer's figures in Prometheus: names, units, a number of series that never grows, and HTTP."""

import inspect
import math
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eplb_core import EplbError
from eplb_torch.metrics import PHASES, REASONS, BalancerMetrics, Metrics, NoMetrics


def figures(text: str) -> dict[tuple, float]:
    """Every sample of an exposition: `{(name, sorted labels): value}`."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int, addr: str = "127.0.0.1") -> dict[tuple, float]:
    with urllib.request.urlopen(f"http://{addr}:{port}/metrics", timeout=10) as answer:
        return figures(answer.read().decode())


def report_a_rebalance(metrics: Metrics, model: str) -> None:
    metrics.observe_balancedness(model, 0.625, 0.875)
    metrics.count_decision(model, "rebalance")
    metrics.count_decision(model, "failed")
    metrics.count_decision(model, "rebalance")
    metrics.observe_seconds(model, "planning", 0.25)
    metrics.observe_seconds(model, "prepare", 2.0)
    metrics.observe_seconds(model, "prepare", 4.0)
    metrics.observe_seconds(model, "commit", 0.002)
    metrics.count_moves(model, 7, 1000, 24)
    metrics.count_moves(model, 1, 0, 500)
    metrics.set_epoch(model, 3)
    metrics.observe_stall(0.02)


def test_figures_are_read_back_over_http():
    metrics = BalancerMetrics(["main", "draft"])
    served = metrics.serve(port=0)
    try:
        report_a_rebalance(metrics, "main")
        got = scrape(served.port)
    finally:
        served.close()
    main, draft = ("model", "main"), ("model", "draft")
    assert got["eplb_balancedness_ratio", main] == 0.625
    assert got["eplb_predicted_balancedness_ratio", main] == 0.875
    assert got["eplb_epoch", main] == 3
    assert {reason: got["eplb_decisions_total", main, ("reason", reason)] for reason in REASONS} == {
        "not_due": 0,
        "balanced": 0,
        "not_worth_it": 0,
        "rebalance": 2,
        "failed": 1,
    }
    assert [got["eplb_phase_seconds_sum", main, ("phase", phase)] for phase in PHASES] == [0.25, 6.0, 0.002]
    assert [got["eplb_phase_seconds_count", main, ("phase", phase)] for phase in PHASES] == [1, 2, 1]
    assert got["eplb_phase_seconds_bucket", ("le", "3.0"), main, ("phase", "prepare")] == 1
    assert got["eplb_moved_experts_total", main] == 8
    assert got["eplb_moved_bytes_total", main, ("scope", "within_node")] == 1000
    assert got["eplb_moved_bytes_total", main, ("scope", "across_nodes")] == 524
    assert (got["eplb_stall_seconds_sum",], got["eplb_stall_seconds_count",]) == (0.02, 1)
    assert math.isnan(got["eplb_balancedness_ratio", draft])
    assert got["eplb_moved_experts_total", draft] == 0


def test_the_series_are_there_from_the_start_and_never_more():
    metrics = BalancerMetrics(["main", "draft", "other"], labels={"ep_rank": "5"})
    before = figures(prometheus_client.generate_latest(metrics.registry).decode())
    for _ in range(3):
        for model in ("main", "draft", "other"):
            report_a_rebalance(metrics, model)
            for reason in REASONS:
                metrics.count_decision(model, reason)
    after = figures(prometheus_client.generate_latest(metrics.registry).decode())
    assert after.keys() == before.keys()
    assert all(("ep_rank", "5") in key for key in after)
    one = len(figures(prometheus_client.generate_latest(BalancerMetrics(["main"]).registry).decode()))
    two = len(figures(prometheus_client.generate_latest(BalancerMetrics(["main", "b"]).registry).decode()))
    assert two - one <= 70


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.count_decision("other", "balanced"), "'other'"),
        (lambda m: m.count_decision("main", "bored"), r"not_due.*'bored'"),
        (lambda m: m.observe_seconds("main", "lunch", 1.0), r"planning.*'lunch'"),
        (lambda m: m.observe_seconds("main", "planning", -1.0), "seconds=-1.0"),
        (lambda m: m.observe_seconds("main", "planning", math.nan), "seconds=nan"),
        (lambda m: m.observe_balancedness("main", 1.5, 0.5), "balancedness=1.5"),
        (lambda m: m.observe_balancedness("other", 0.5, 0.5), "'other'"),
        (lambda m: m.count_moves("main", 1, -1, 0), "bytes_within_node=-1"),
        (lambda m: m.count_moves("other", 1, 1, 0), "'other'"),
        (lambda m: m.set_epoch("other", 1), "'other'"),
        (lambda m: m.observe_stall(math.inf), "seconds=inf"),
    ],
)
def test_unknown_names_and_impossible_values_change_nothing(call, message):
    metrics = BalancerMetrics(["main"])
    before = str(figures(prometheus_client.generate_latest(metrics.registry).decode()))
    with pytest.raises(EplbError, match=message):
        call(metrics)
    assert str(figures(prometheus_client.generate_latest(metrics.registry).decode())) == before


def test_rounding_above_one_and_no_prediction_are_accepted():
    metrics = BalancerMetrics(["main"])
    metrics.observe_balancedness("main", 1.0000000002)
    assert metrics.registry.get_sample_value("eplb_balancedness_ratio", {"model": "main"}) == pytest.approx(1)
    assert math.isnan(metrics.registry.get_sample_value("eplb_predicted_balancedness_ratio", {"model": "main"}))


@pytest.mark.parametrize(
    "options",
    [{"models": []}, {"models": ["a", "a"]}, {"models": "main"}, {"models": ["a"], "labels": {"phase": "decode"}}],
    ids=str,
)
def test_unusable_models_and_labels_are_refused(options):
    with pytest.raises(EplbError, match="models with different names"):
        BalancerMetrics(**options)


def test_an_engine_can_have_the_series_in_its_own_registry():
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Gauge("engine_requests", "of the engine", registry=registry).set(5)
    metrics = BalancerMetrics(["main"], registry=registry)
    assert metrics.registry is registry
    metrics.set_epoch("main", 9)
    got = figures(prometheus_client.generate_latest(registry).decode())
    assert (got["engine_requests",], got["eplb_epoch", ("model", "main")]) == (5, 9)


def test_registries_are_separate_by_default():
    first, second = BalancerMetrics(["main"]), BalancerMetrics(["main"])
    first.set_epoch("main", 4)
    assert second.registry.get_sample_value("eplb_epoch", {"model": "main"}) == 0


def test_close_frees_the_port_and_ends_the_thread():
    metrics = BalancerMetrics(["main"])
    before = set(threading.enumerate())
    served = metrics.serve()
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert len(started) == 1
    scrape(served.port)
    with pytest.raises(OSError, match="in use"):
        metrics.serve(served.port)
    served.close()
    served.close()
    assert not started[0].is_alive()
    with pytest.raises(urllib.error.URLError):
        scrape(served.port)
    again = metrics.serve(served.port)
    assert again.port == served.port
    again.close()


def test_only_this_machine_can_connect_by_default():
    served = BalancerMetrics(["main"]).serve()
    try:
        with pytest.raises(OSError):  # noqa: PT011 - platforms word it differently
            socket.create_connection(("127.0.0.2", served.port), timeout=5).close()
    finally:
        served.close()


def members(kind: Any) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(value) for name, value in vars(kind).items() if callable(value) and name[0] != "_"}


def test_both_implementations_have_the_methods_of_the_protocol():
    wanted = members(Metrics)
    assert members(NoMetrics) == wanted
    assert {name: members(BalancerMetrics)[name] for name in wanted} == wanted
    report_a_rebalance(NoMetrics(), "any model")


def test_prometheus_is_needed_only_where_it_is_used():
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from eplb_core import EplbError\n"
        "from eplb_torch.metrics import BalancerMetrics, NoMetrics\n"
        "NoMetrics().set_epoch('main', 1)\n"
        "try:\n    BalancerMetrics()\nexcept EplbError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'eplb[metrics]'" in done.stdout
