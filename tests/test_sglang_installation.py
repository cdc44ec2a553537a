"""Our policies in SGLang's released packages: installed, refused, undone, and by its plugin loader."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from benchmarks import peers
from benchmarks.released import StandIn, fetch
from eplb_core import EplbError
from eplb_torch.integrations import sglang as plug
from tests.engines import entry_point, fetched


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.sglang_deepseek)


def test_installing_replaces_the_planner_and_can_be_undone():
    with peers.sglang_installed():
        algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
        theirs = algorithms.rebalance_experts
        first = plug.install(max_moves=4)
        ours = algorithms.rebalance_experts
        assert ours is not theirs
        again = plug.install(max_moves=4)
        assert algorithms.rebalance_experts is ours, "twice is the same as once"
        with plug.install("greedy"):
            assert algorithms.rebalance_experts is not ours
        assert algorithms.rebalance_experts is ours
        first.close()
        assert algorithms.rebalance_experts is theirs
        again.close()
        assert algorithms.rebalance_experts is theirs


def test_a_release_that_imports_the_planner_by_name_is_served_as_well():
    with peers.sglang_installed():
        algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
        theirs = algorithms.rebalance_experts
        location = StandIn("sglang.srt.eplb.expert_location", rebalance_experts=theirs)
        sys.modules[location.__name__] = location
        with plug.install():
            assert location.rebalance_experts is algorithms.rebalance_experts is not theirs
        assert location.rebalance_experts is theirs


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.5.23.post1"])
def test_other_releases_are_refused_unless_forced(version):
    with peers.sglang_installed(version=version):
        with pytest.raises(EplbError, match=f"tested with sglang 0.5.23; got sglang {version}.*force=True"):
            plug.install()
        plug.install(force=True).close()


def test_a_changed_planner_is_refused_even_if_forced():
    def changed(tokens_per_expert, num_ranks): ...

    module = StandIn("sglang.srt.eplb.eplb_algorithms", rebalance_experts=changed)
    with peers.sglang_installed({module.__name__: module}):
        with pytest.raises(
            EplbError, match=r"must take \['tokens_per_expert', 'num_phys.*got \['tokens_per_expert', 'num_ranks'\]"
        ):
            plug.install(force=True)
        assert module.rebalance_experts is changed


def test_without_sglang_the_error_says_so():
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang is installed here")
    with pytest.raises(ModuleNotFoundError, match="sglang"):
        plug.install()


@pytest.mark.parametrize(
    ("value", "installed"), [(None, False), ("incremental", True), ('{"max_moves": 3}', True), ("oops!", False)]
)
def test_sglang_runs_the_plugin_which_obeys_the_environment(value, installed, tmp_path, monkeypatch, caplog):
    """A plugin that fails is logged by SGLang, which serves on with its own planner."""
    fetched(fetch, peers.SGLANG[0], "sglang/srt/plugins")
    name = entry_point(tmp_path, "sglang.srt.plugins", "eplb_torch.integrations.sglang:plugin")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(plug.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(plug.VARIABLE, value)
    envs = SimpleNamespace(SGLANG_PLUGINS=SimpleNamespace(get=lambda: name), SGLANG_PLATFORM=SimpleNamespace(get=str))
    environ = StandIn("sglang.srt.environ", envs=envs)
    with peers.sglang_installed({environ.__name__: environ}, run=["sglang.srt.plugins"]):
        theirs = importlib.import_module("sglang.srt.eplb.eplb_algorithms").rebalance_experts
        importlib.import_module("sglang.srt.plugins").load_plugins()
        now = importlib.import_module("sglang.srt.eplb.eplb_algorithms").rebalance_experts
    assert (now is not theirs) == installed
    assert ("Failed to execute general plugin" in caplog.text) == (value == "oops!")
