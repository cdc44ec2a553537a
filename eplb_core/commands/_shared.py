"""What commands have in common: how they ask for an extra, fail, and write machine-readable results."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


def _check_folder(file: Path | None) -> Path | None:
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"the folder {file.parent} does not exist.")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        dir_okay=False,
        writable=True,
        callback=_check_folder,
        help="Write the results as JSON.",
    ),
]


def require_modules(extra: str, *modules: str) -> None:
    """End with exit code 2 and the extra to install, unless all modules can be found."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        fail(f"This command needs {' and '.join(missing)}. Install with: pip install 'eplb[{extra}]'", code=2)


def fail(message: str, *, code: int) -> NoReturn:
    """Print a message to stderr and end: code 2 for a request that cannot be met, 1 for work that went wrong."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write a result, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
