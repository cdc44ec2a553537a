"""The command line: what it loads, what it refuses and with which exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eplb_core.cli import main

pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from eplb_core.commands import app  # noqa: E402

HEAVY = ("torch", "jax", "matplotlib", "transformers")


COMMANDS = ("plan", "verify", "convert", "simulate", "advise", "report", "demo")


def eplb(*args):
    return CliRunner().invoke(app, args)


@pytest.mark.parametrize("args", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_heavy_library(args):
    code = (
        "import sys\n"
        "from eplb_core.cli import main\n"
        f"sys.argv = ['eplb', *{args}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    print(end.code, sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage" in out.stdout
    assert out.stdout.endswith("0 []\n")


@pytest.mark.parametrize(
    ("typed", "expected"), [("pl", {"plan"}), ("", set(COMMANDS)), ("plan --max-t", {"--max-total-moves"})]
)
def test_the_shell_completes_commands_and_options(typed, expected):
    script = Path(sys.executable).with_name("eplb")
    words = f"eplb {typed}"
    variables = {"_EPLB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    out = subprocess.run([script], env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False)
    assert expected <= set(out.stdout.split())


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "eplb_core", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "demo" in out.stdout


def test_a_missing_command_line_library_is_named(monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("eplb_core.commands")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "`eplb` needs typer. Install with: pip install 'eplb[cli]'\n"


@pytest.fixture
def demo_installed():
    """Skip where the demo's extra is not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.mark.usefixtures("demo_installed")
@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_demo_says_which_extra_is_missing(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    result = eplb("demo")
    assert result.exit_code == 2
    assert f"needs {module}. Install with: pip install 'eplb[cli,hf]'" in result.stderr


@pytest.mark.usefixtures("demo_installed")
def test_demo_needs_prometheus_only_for_metrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    result = eplb("demo", "--metrics-port", "0")
    assert result.exit_code == 2
    assert "needs prometheus_client. Install with: pip install 'eplb[cli,hf,metrics]'" in result.stderr
    assert "prometheus" not in eplb("demo", "--policy", "magic").stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Usage"),
        (["demo", "--ranks", "0"], "Invalid value for '--ranks'"),
        (["demo", "--interval", "0"], "Invalid value for '--interval'"),
        (["demo", "--metrics-port", "70000"], "Invalid value for '--metrics-port'"),
        (["demo", "--json", "no/such/folder/out.json"], "does not exist"),
        (["demo", "--json", "."], "is a directory"),
        (["deom"], "No such command"),
    ],
)
def test_requests_that_cannot_be_met_exit_with_2(args, message):
    result = eplb(*args)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.usefixtures("demo_installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "3"], "Use num_redundant=10"),
        (["--ranks", "130", "--redundant", "98"], "must have 1 to 128 ranks"),
        (["--policy", "magic"], "policy='magic'"),
    ],
)
def test_sizes_that_the_demo_cannot_have_exit_with_2(options, message):
    test_requests_that_cannot_be_met_exit_with_2(["demo", *options], message)
