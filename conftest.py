"""What is collected: without the extra `cli`, not the commands that need it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("typer") else ["eplb_core/commands"]
