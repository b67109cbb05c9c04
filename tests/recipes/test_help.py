"""What makes --help slow is imports; seconds depend on the machine, so the imports are what is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("diffusers", "transformers", "peft", "torchmetrics", "datasets", "matplotlib", "accelerate")
PROBE = """
import io, json, runpy, sys
from contextlib import redirect_stdout

heavy, *paths = sys.argv[1:]
for path in paths:
    sys.argv, code, said = [path, "--help"], None, io.StringIO()
    try:
        with redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    told = said.getvalue().startswith("usage: ") and "--output_dir" in said.getvalue()
    print(json.dumps([path, code, told, sorted({*heavy.split(",")} & {*sys.modules})]))
"""


@pytest.fixture(scope="module")
def recipes() -> list[str]:
    found = sorted(map(str, (ROOT / "recipes").glob("*.py")))
    assert len(found) >= 12
    return found


def test_help_of_recipes_imports_no_heavy_package(recipes: list[str]) -> None:
    """All in one process: torch takes seconds too."""
    command = [sys.executable, "-c", PROBE, ",".join(HEAVY), *recipes]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"})
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[path, 0, True, []] for path in recipes]


def test_help_of_the_command_imports_no_torch_either() -> None:
    probe = [sys.executable, "-X", "importtime", "-m", "stepdistill.cli", "--help"]
    done = subprocess.run(probe, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"})
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "stepdistill" in imported
    assert not imported & {*HEAVY, "torch"}
