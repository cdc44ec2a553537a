"""What the README shows is what the code prints."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_snippet_prints_what_the_readme_says():
    (found,) = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL)
    code, output = found
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == output


def test_the_quick_start_to_planning_runs():
    page = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    before, after = (float(number) for number in done.stdout.split(" -> "))
    assert after > before


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
