"""Try what an installation with one extra promises, far from the sources: `wheel_works.py EXTRA README`."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

MODULES = {
    "none": [],
    "cli": ["typer", "rich", "matplotlib", "yaml", "eplb_core.commands", "eplb_core.plots"],
    "checkpoint": ["safetensors"],
    "metrics": ["prometheus_client"],
    "jax": ["jax", "eplb_core.sharded"],
    "torch": ["torch", "eplb_torch"],
    "hf": ["transformers", "eplb_torch.integrations.huggingface"],
}
MODULES["all"] = [name for names in MODULES.values() for name in names]


def run(*command: str) -> subprocess.CompletedProcess:
    """Run a command with a limit of two minutes."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def main(extra: str, readme: str) -> None:
    """Import the modules of the extra, run the README's snippet and the command."""
    eplb = Path(sys.executable).with_name("eplb")
    for name in ["eplb_core", *MODULES[extra]]:
        module = importlib.import_module(name)
        if "site-packages" not in str(module.__file__):
            sys.exit(f"{name} comes from {module.__file__}")
    code, output = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", Path(readme).read_text("utf-8"), re.DOTALL)[0]
    done = run(sys.executable, "-c", code)
    if done.stdout != output:
        sys.exit(f"the README's snippet printed {done.stdout!r}, {done.stderr!r}")
    done, has_cli = run(str(eplb), "--help"), extra in ("cli", "all")
    if has_cli and (done.returncode != 0 or "simulate" not in done.stdout):
        sys.exit(f"`eplb --help` printed {done.stdout!r}, {done.stderr!r}")
    if extra == "none" and (done.returncode, "eplb[cli]" in done.stderr) != (2, True):
        sys.exit(f"`eplb --help` without its extra printed {done.stderr!r}")


main(*sys.argv[1:])
