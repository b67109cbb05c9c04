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
def test_two_processes_and_killed_sweeps_end_like_an_undisturbed_one(from_outside: Any, tmp_path: Path) -> None:
    """Of 15 batches; each launch is of so many processes, which all die after so many batches of their own."""
    moments = random.Random(seed := time.time_ns())
    launches: dict[str, list[tuple[int, int | None]]] = {
        "one": [(1, None)],
        "two": [(2, None)],
        "killed": [(1, moments.randrange(14)), (1, None)],
        "mixed": [(2, moments.randrange(6)), (1, moments.randrange(2)), (2, None)],
    }
    for name, takes in launches.items():
        for processes, after in takes:
            finished = {path: path.read_bytes() for path in (tmp_path / name).rglob("samples.safetensors")}
            environment = {} if after is None else {"DIE_AFTER": str(after)}
            done = launched(from_outside(tmp_path / name), processes, **environment)
            assert (done.returncode == 0) == (after is None), f"{takes}: {done.stderr}"
            assert all(path.read_bytes() == data for path, data in finished.items())
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    for name in launches:
        found = json.loads((tmp_path / name / "results.json").read_text())
        alike(one["quality"], found["quality"])
        alike(one["samples"], found["samples"])
        assert found["fingerprint"] == one["fingerprint"]
        assert files_of(tmp_path / name / "cells") == files_of(tmp_path / "one" / "cells"), f"{name}, seed {seed}"


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
