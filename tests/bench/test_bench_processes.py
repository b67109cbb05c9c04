"""A sweep in processes of its own: two that share it, and one that is killed as `kill -9` would."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeping import demo_student, files_of

TESTS = Path(__file__).resolve().parents[1]


def launched(words: Sequence[str], processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    setting = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(TESTS / "bench_process.py"), *words]
    return subprocess.run(command, env=setting, capture_output=True, text=True, timeout=900)


@pytest.fixture
def from_outside(tmp_path: Path) -> Callable[[Path], list[str]]:
    """Flags of a small sweep of the demo."""
    student = demo_student(tmp_path / "runs" / "untrained")

    def given(output: Path) -> list[str]:
        words = ["--teacher=demo", f"--student={student}", "--steps=1", "--teacher_steps=2", "--num_images=20"]
        words += ["--diversity_prompts=2", "--diversity_images=2", "--batch_size=6", f"--output_dir={output}"]
        return [*words, "--skip_latency"]

    return given


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun, and SIGKILL")
def test_two_processes_and_a_killed_sweep_end_like_an_undisturbed_one(from_outside: Any, tmp_path: Path) -> None:
    done = launched(from_outside(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    done = launched(from_outside(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    moment = random.Random(time.time_ns()).randrange(14)  # of 15 batches
    done = launched(from_outside(tmp_path / "killed"), DIE_AFTER=str(moment))
    assert done.returncode == -9, f"not killed after {moment} batches: {done.stderr}"
    finished = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("samples.safetensors")}
    done = launched(from_outside(tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == data for path, data in finished.items())
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    for other in ("two", "killed"):
        found = json.loads((tmp_path / other / "results.json").read_text())
        alike(one["quality"], found["quality"])
        alike(one["samples"], found["samples"])
        assert found["fingerprint"] == one["fingerprint"]
    assert files_of(tmp_path / "killed" / "cells") == files_of(tmp_path / "one" / "cells"), f"after {moment} batches"


def alike(a: Any, b: Any) -> None:
    """The same, numbers to 1e-6."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            alike(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            alike(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-6, abs=1e-6) if isinstance(b, float) else b)
