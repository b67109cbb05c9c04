"""A run that is killed with -9 and resumed ends as one that was not, to the bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys import same

TESTS = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

Lives = tuple[list[int], list[int]]


def lives(**folders: Path) -> dict[str, Lives]:
    """By mode, the exit codes of all lives, and the steps that those began from which did not begin at 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    words = [str(word) for pair in folders.items() for word in pair]
    command = [sys.executable, "-u", str(TESTS / "toy_process.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, began = [], list[int]()
    for line in done.stdout.splitlines():
        if resumed := re.fullmatch(r"resuming from .* \(step (\d+)\)", line):
            began.append(int(resumed[1]))
        elif line.startswith('{"codes"'):  # the end of a mode
            found.append((json.loads(line)["codes"], began))
            began = []
    return dict(zip(folders, found, strict=True))


def check_lives(lives: Lives, folder: Path) -> None:
    codes, began = lives
    # a life may also have ended before its kill came
    assert codes.count(-9) >= len(codes) // 4 and set(codes) <= {0, -9} and codes[-2:] == [0, 0] and len(began) >= 2
    same(folder / "killed", folder / "whole")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Lives], dict[str, Path]]:
    """The lives of the toy method, in children of one process, which imports for all, and their folders."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in ("kills", "kills_in_saves")}
    return lives(**folders), folders


def test_killed_at_random_moments_and_resumed_is_the_same(killed: Any) -> None:
    found, folders = killed
    check_lives(found["kills"], folders["kills"])


def test_killed_within_a_checkpoint_and_resumed_is_the_same(killed: Any) -> None:
    """After some files, before the rename, and between the rename and the removal of the oldest."""
    found, folders = killed
    (codes, began), folder = found["kills_in_saves"], folders["kills_in_saves"]
    assert codes == [-9, -9, -9, 0, 0] and began == [3, 6, 12]
    same(folder / "killed", folder / "whole")
    assert sorted(p.name for p in (folder / "killed" / "checkpoints").iterdir()) == ["18", "20"]


@pytest.mark.slow
def test_a_killed_and_resumed_lora_of_stable_diffusion_is_the_same(tmp_path: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline(tmp_path / "pipeline")
    check_lives(lives(kills_sd=tmp_path)["kills_sd"], tmp_path)
