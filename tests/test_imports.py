"""What importing the packages costs and pulls in."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import eplb_core
from eplb_core._extras import MissingExtraError, import_extra
from tests.extras import EXTRAS

ROOT = Path(__file__).parents[1]

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))\n"
"""Code after which no library of an extra can be imported, installed or not."""

NEED_MORE = {"eplb_core.commands": "typer", "eplb_core.testing": "hypothesis", "eplb_core.__main__": "a command line"}
"""Modules that are not NumPy alone, with what is below them."""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_core_imports_numpy_and_jaxtyping_alone():
    heavy = sorted(EXTRAS | {"hypothesis", "pytest"})
    done = run(f"import sys, eplb_core; print(sorted(set({heavy}) & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_all_but_commands_and_testing_import_without_any_extra():
    modules = [info.name for info in pkgutil.walk_packages(eplb_core.__path__, "eplb_core.", onerror=lambda _: None)]
    alone = [name for name in modules if not name.startswith(tuple(NEED_MORE))]
    assert len(alone) > 60
    done = run(f"{BLOCK}import importlib\nfor name in {alone}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


ABSENT = {
    "checkpoint": "open('x.safetensors', 'w'); from eplb_core.checkpoint import CheckpointRows\n"
    "CheckpointRows('x.safetensors', str)",
    "jax": "from eplb_core import Topology, sharded; sharded.rearrange({}, None, Topology(1, 1), mesh=None)",
    "jax of lower": "from eplb_core import Topology, sharded; sharded.lower({}, None, Topology(1, 1), mesh=None)",
    "cli": "from eplb_core.cli import main; main()",
    "cli for pictures": "from eplb_core import Topology; from eplb_core.plots import rank_loads\n"
    "rank_loads([[0]], [[0]], [[1]], Topology(1, 1))",
    "cli for copies": "from eplb_core.plots import replicas; replicas([[0]], 1)",
    "cli for endings": "from eplb_core.plots import save; save(None, 'x.png')",
    "cli for YAML": "open('x.yaml', 'w'); from eplb_core.formats.tensorrt_llm import _read_yaml\n"
    "_read_yaml('x.yaml', 99)",
    "torch of eplb_torch": "import eplb_torch",
    "torch": "from eplb_core.formats.sglang_pt import _write; _write('x.pt', {})",
}


@pytest.mark.parametrize("case", ABSENT)
def test_a_missing_extra_is_named(case, tmp_path, monkeypatch):
    """What needs an extra ends in an error, or for the command in a message, that says how to install it."""
    monkeypatch.chdir(tmp_path)
    done = run(f"{BLOCK}sys.path.insert(0, {str(ROOT)!r})\n{ABSENT[case]}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert f"pip install 'eplb[{case.split()[0]}]'" in last
    assert last.startswith(("eplb_core._extras.MissingExtraError: ", "eplb_core._checks.EplbError: ", "`eplb` needs "))


def test_an_import_that_fails_within_a_library_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        import_extra("half", "jax", "test")
    with pytest.raises(MissingExtraError, match=r"`test` needs absent; got none installed.*eplb\[jax\]") as caught:
        import_extra("absent.part", "jax", "test")
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "absent"


def test_core_plans_without_jax_and_torch():
    """The modules are made impossible to import, and the whole path from load to rounds runs."""
    done = run(
        "import sys; sys.modules['jax'] = sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from eplb_core import *\n"
        "t = Topology(4, 3, num_nodes=2)\n"
        "old = round_robin(2, 8, t)\n"
        "new = rebalance(np.arange(16).reshape(2, 8), t, policy='greedy', previous=old)\n"
        "plan = plan_moves(old, new, t)\n"
        "assert verify_plan(old, new, plan, t, schedule_rounds(plan, t)) == ()\n"
        "derive_maps(new, 8), balancedness(new, np.ones((2, 8)), t)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["eplb_core", "eplb_torch"])
def test_all_is_complete(package):
    """`__all__` is sorted, names what exists, and misses nothing that the package imports from its own modules."""
    if package == "eplb_torch":
        pytest.importorskip("torch")
    module = importlib.import_module(package)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith(package)
    }
    assert public <= set(module.__all__)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_public_function_has_a_docstring():
    for info in pkgutil.walk_packages(eplb_core.__path__, "eplb_core.", onerror=lambda _: None):
        if info.name.endswith("__main__") or (info.name.startswith("eplb_core.commands") and not find_spec("typer")):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == info.name:
                assert value.__doc__, f"{info.name}.{name}"
