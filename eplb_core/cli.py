"""The `eplb` command. Its commands are in `eplb_core.commands`, one module each."""

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from eplb_core.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"`eplb` needs {error.name}. Install it with: pip install 'eplb[cli]'", file=sys.stderr)
        sys.exit(2)
    app()
