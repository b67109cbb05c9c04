"""The ladder's recipe killed with -9 between and within its parts: rungs and checkpoints are those of a whole run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import EXACT, rows, saved

TESTS = Path(__file__).resolve().parent.parent


def rungs(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all tensors, all facts) of the exported rungs, by file; a file's hash is not one of its contents."""
    files = {str(p.relative_to(run)): p for p in (run / "rungs").rglob("*") if p.is_file()}
    facts = {name: json.loads(path.read_text()) for name, path in files.items() if path.name == "stepdistill.json"}
    for fact in facts.values():
        fact["weights"]["files"] = sorted(fact["weights"]["files"])
    tensors = {f"{name}/{key}": value for name in files if name.endswith(".safetensors")
               for key, value in load_file(files[name]).items()}  # fmt: skip
    return tensors, {**facts, "files": sorted(files)}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_killed_with_9_it_ends_in_the_same_rungs(tmp_path: Path, kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(TESTS / "recipe_process.py"), kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fits, deaths = (("guidance", "ladder"), 4) if kind == "full" else (("ladder",), 3)
    assert json.loads(done.stdout.splitlines()[-1]) == [-9] * deaths + [0, 0], done.stderr
    # the export and the change are of the second rung's end; a checkpoint of the third was there in the last death alone
    began = re.findall(r"^resuming from .*/ladder/\d+ \(step (\d+)\)$", done.stdout, re.MULTILINE)
    assert began == (["8", "8", "10"] if kind == "full" else ["6", "6", "8"])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    (tensors, facts), (wanted, wanted_facts) = rungs(killed), rungs(whole)
    assert {name.split("/")[1] for name in wanted} == {"4", "2", "1"}
    assert_close(tensors, wanted, **EXACT)
    assert facts == wanted_facts
    for fit in fits:
        (tensors, state), (wanted, wanted_state) = saved(killed, fit), saved(whole, fit)
        assert_close(tensors, wanted, **EXACT)
        assert state == wanted_state
    assert any(name.startswith("teacher/") for name in wanted) and any("exp_avg" in name for name in wanted)
    assert rows(killed) == rows(whole)
