"""The `eplb` command. Its commands are in `eplb_core.commands`, one module each."""

import signal
import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from eplb_core.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"`eplb` needs {error.name}. Install with: pip install 'eplb[cli]'", file=sys.stderr)
        sys.exit(2)
    # A command that is told to end unwinds, so that it ends its processes and removes its files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
