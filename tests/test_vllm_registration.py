"""Our policies in vLLM's released registry, configuration and plugin loader."""

import importlib

import pytest

from benchmarks import peers
from benchmarks.released import StandIn, fetch
from eplb_core import EplbError
from eplb_torch.integrations import vllm as plug
from tests.engines import entry_point, fetched


@pytest.fixture(autouse=True, scope="module")
def _released():
    fetched(peers.vllm_policy)


def test_registering_replaces_the_default_and_can_be_undone():
    with peers.vllm_installed():
        registry = importlib.import_module("vllm.distributed.eplb.policy")
        before = dict(registry.EPLB_POLICIES)
        first = plug.register(max_moves=4)
        ours = registry.EPLB_POLICIES["default"]
        assert dict(ours.options) == {"policy": "incremental", "max_moves": 4}
        assert "Incremental" in ours.__name__
        again = plug.register(max_moves=4)
        assert {"default": ours} == registry.EPLB_POLICIES, "twice is the same as once"
        with plug.register("greedy"):
            assert "Greedy" in registry.EPLB_POLICIES["default"].__name__
        assert registry.EPLB_POLICIES["default"] is ours
        first.close()
        assert before == registry.EPLB_POLICIES
        again.close()
        first.close()
        assert before == registry.EPLB_POLICIES


def test_closing_leaves_what_someone_else_put_there():
    with peers.vllm_installed():
        registry = importlib.import_module("vllm.distributed.eplb.policy")
        registration = plug.register()
        registry.EPLB_POLICIES["default"] = other = object()
        registration.close()
        assert registry.EPLB_POLICIES["default"] is other


def test_another_name_leaves_the_default_alone():
    with peers.vllm_installed():
        registry = importlib.import_module("vllm.distributed.eplb.policy")
        with plug.register(name="incremental"):
            assert list(registry.EPLB_POLICIES) == ["default", "incremental"]
            assert registry.EPLB_POLICIES["default"] is registry.DefaultEplbPolicy
        assert list(registry.EPLB_POLICIES) == ["default"]


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.32.1", "dev"])
def test_other_releases_are_refused_unless_forced(version):
    with peers.vllm_installed(version=version):
        with pytest.raises(EplbError, match=f"tested with vllm 0.32.0; got vllm {version}.*force=True"):
            plug.register()
        plug.register(force=True).close()


def test_a_build_of_the_tested_release_is_accepted():
    with peers.vllm_installed(version="0.32.0+cu129"):
        plug.register().close()


def test_a_changed_interface_is_refused_even_if_forced():
    class Abstract:
        @classmethod
        def rebalance_experts(cls, weight, num_ranks): ...

    changed = StandIn("vllm.distributed.eplb.policy", AbstractEplbPolicy=Abstract, EPLB_POLICIES={})
    with peers.vllm_installed({changed.__name__: changed}):
        with pytest.raises(EplbError, match=r"must take \['weight', 'num_replicas'.*got \['weight', 'num_ranks'\]"):
            plug.register(force=True)
        assert changed.EPLB_POLICIES == {}


def test_without_vllm_the_error_says_so():
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        plug.register()


def test_vllms_configuration_accepts_only_the_name_default():
    """Why the default is replaced; and that another name can be assigned after validation."""
    pytest.importorskip("pydantic")
    pytest.importorskip("regex")
    config = fetched(peers.vllm_config).EPLBConfig
    assert config().use_async
    with pytest.raises(ValueError, match="Input should be 'default'"):
        config(policy="incremental", use_async=False)
    chosen = config()
    chosen.policy = "incremental"
    assert chosen.policy == "incremental"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("greedy", {"policy": "greedy"}),
        ('{"max_moves": 3}', {"policy": "incremental", "max_moves": 3}),
    ],
)
def test_vllm_runs_the_plugin_which_obeys_the_environment(value, expected, tmp_path, monkeypatch):
    fetched(fetch, peers.VLLM[0], "vllm/plugins")
    name = entry_point(tmp_path, "vllm.general_plugins", "eplb_torch.integrations.vllm:plugin")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(plug.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(plug.VARIABLE, value)
    envs = StandIn("vllm.envs", VLLM_PLUGINS=[name])
    with peers.vllm_installed({envs.__name__: envs}, run=["vllm.plugins"]):
        plugins = importlib.import_module("vllm.plugins")
        plugins.load_general_plugins()
        plugins.plugins_loaded = False
        plugins.load_general_plugins()
        registered = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES["default"]
    assert getattr(registered, "options", None) == expected


def test_a_mistake_in_the_variable_keeps_vllm_from_starting(tmp_path, monkeypatch):
    fetched(fetch, peers.VLLM[0], "vllm/plugins")
    name = entry_point(tmp_path, "vllm.general_plugins", "eplb_torch.integrations.vllm:plugin")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plug.VARIABLE, "best")
    envs = StandIn("vllm.envs", VLLM_PLUGINS=[name])
    with peers.vllm_installed({envs.__name__: envs}, run=["vllm.plugins"]), pytest.raises(EplbError, match="'best'"):
        importlib.import_module("vllm.plugins").load_general_plugins()


@pytest.mark.parametrize("value", ["[1]", "{policy: greedy}", "max_moves=3"])
def test_a_variable_that_cannot_be_read_is_an_error(value, monkeypatch):
    monkeypatch.setenv(plug.VARIABLE, value)
    with pytest.raises(EplbError, match="EPLB_VLLM must be the name of a policy or a JSON object"):
        plug.plugin()
