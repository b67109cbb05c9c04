"""LADD's recipe killed with -9 within and between its phases, in a checkpoint and in the export: the end is a whole run's."""

import re
import sys
from pathlib import Path

import pytest
from recipe_runs import exported, lives
from torch.testing import assert_close
from toys import EXACT, rows, saved


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_with_9_it_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    codes, told, errors = lives("ladd", kind, tmp_path)
    assert codes == [-9] * 5 + [0, 0], errors
    began = re.findall(r"^resuming from .*/checkpoints/\d+ \(step (\d+)\)$", told, re.MULTILINE)
    assert began == ["2", "4", "4", "4", "6"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    (tensors, facts), (wanted, wanted_facts) = exported(killed), exported(whole)
    assert len(wanted) > 50
    assert_close(tensors, wanted, **EXACT)
    assert facts == wanted_facts
    (tensors, state), (wanted, wanted_state) = saved(killed), saved(whole)
    assert_close(tensors, wanted, **EXACT)
    assert state == wanted_state
    parts = {name.split("/")[0] for name in wanted}
    assert {"student", "student.ema", "student.optimizer", "discriminator", "discriminator.optimizer"} <= parts
    for role in ("student", "discriminator"):
        assert any(name.startswith(f"{role}.optimizer/") and "exp_avg_sq" in name for name in wanted)
    assert wanted_state["method"]["taken"] == 6 and wanted_state["method"]["guard"]["accuracy"] != 0.5
    assert rows(killed) == rows(whole)
    assert [("diversity" in row, "r1" in row) for row in rows(whole)] == [(True, True), (False, False)] * 3
