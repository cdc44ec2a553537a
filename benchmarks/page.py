"""The page of results: what every part says, and when and on what it was measured."""

import contextlib
import datetime
import importlib.metadata
import inspect
import io
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench`. `python -m benchmarks --only planning,growth` measures some parts again and leaves the others
as they are, each with its own date. Times hang on the machine and on what else it does, so read the ratios: what is
compared was run in turn, in the same process, and figures are medians. Peers are their own released code, downloaded
on first use: vLLM 0.32.0 and SGLang 0.5.23. DeepSeek publishes its algorithm without releases; SGLang's `deepseek` is a
copy of it that computes the same, with lists in place of single tensor elements. Everything runs on the CPU. Where a
peer is better, or a goal is missed, the text beside the table says so.
"""


def printed(function: Callable[[], None]) -> str:
    """What a function prints, called as from a command line without options."""
    argv, text = sys.argv, io.StringIO()
    sys.argv = argv[:1]
    try:
        with contextlib.redirect_stdout(text):
            function()
    finally:
        sys.argv = argv
    return text.getvalue().strip()


def prose(part: ModuleType) -> str:
    """The docstring of a part without the lines that say how to run it."""
    paragraphs = (inspect.getdoc(part) or "").split("\n\n")
    kept = [text for text in paragraphs if not text.strip().lstrip("`").startswith("python -m")]
    return "\n\n".join(re.sub(r"`?python -m benchmarks\.\w+`?(, on)?", "On", text) for text in kept)


def section(title: str, part: ModuleType) -> str:
    """One part, measured now."""
    reading = getattr(part, "READING", "")
    texts = [f"## {title}", f"*{machine()}*", prose(part), part.report().strip(), reading.strip()]
    return "\n\n".join(text for text in texts if text)


def machine() -> str:
    """When this is, on what processor, and with which versions."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("numpy", "torch", "jax", "numba"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Measured {datetime.date.today()} on {_processor()}, {cores} cores; {', '.join(versions)}."


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def splice(page: str, sections: Mapping[str, str], order: list[str]) -> str:
    """Put sections into a page between their markers; others stay, and all come in the given order."""
    found = dict(re.findall(r"<!-- part (\w+) -->\n(.*?)\n<!-- end of \1 -->", page, re.DOTALL))
    found |= sections
    marked = [f"<!-- part {name} -->\n{found[name]}\n<!-- end of {name} -->\n" for name in order if name in found]
    return "\n".join([HEAD, *marked])
