"""What importing the packages costs and pulls in."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import eplb_core


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_core_imports_neither_jax_nor_torch():
    heavy = "{'jax', 'torch', 'hypothesis', 'matplotlib', 'scipy', 'typer'}"
    done = run(f"import sys, eplb_core; sys.exit(str({heavy} & set(sys.modules) or ''))")
    assert done.returncode == 0 or done.stderr.strip() == "", done.stderr


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
    for info in pkgutil.walk_packages(eplb_core.__path__, "eplb_core."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == info.name:
                assert value.__doc__, f"{info.name}.{name}"
