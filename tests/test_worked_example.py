"""The outputs in docs/worked-example.md are what the commands print, where the traces are present."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.traces import FOLDER

for extra in ("typer", "rich", "matplotlib"):
    pytest.importorskip(extra)
from typer.testing import CliRunner  # noqa: E402

from eplb_core.commands import app  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "worked-example.md"
BLOCKS = re.findall(r"```console\n\$ (.*?[^\\])\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def words(text):
    """Text without regard to line breaks and padding: that the terminal's width decides."""
    return text.split()


@pytest.mark.parametrize(("command", "output"), BLOCKS, ids=[shlex.split(command)[1] for command, _ in BLOCKS])
def test_the_page_shows_what_the_command_prints(command, output, tmp_path, monkeypatch):
    _, name, trace, *options = shlex.split(command.replace("\\\n", " "))
    if not (FOLDER / trace).exists():
        pytest.skip(f"{trace} is not in the folder of traces (EPLB_TRACES)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(app, [name, str(FOLDER / trace), *options])
    assert result.exit_code == 0, result.output
    assert words(result.output) == words(output)


def test_the_page_has_outputs_and_pictures():
    assert len(BLOCKS) >= 5
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) >= 3
    for picture in pictures:
        assert (PAGE.parent / picture).stat().st_size < 150_000


def test_the_last_commands_on_the_page_exist():
    (plain,) = re.findall(r"```\n(eplb .*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in plain.splitlines():
        _, name, _, *options = shlex.split(line)
        shown = CliRunner().invoke(app, [name, "--help"]).output
        assert all(option in shown for option in options if option.startswith("--"))
