"""The ladder's recipe killed with -9 between and within its parts: rungs and checkpoints are those of a whole run."""

import re
import sys
from pathlib import Path

import pytest
from recipe_runs import exported, lives
from torch.testing import assert_close
from toys import EXACT, rows, saved


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_with_9_it_ends_in_the_same_rungs(tmp_path: Path, kind: str) -> None:
    codes, told, errors = lives("progressive", kind, tmp_path)
    fits, deaths = (("guidance", "ladder"), 4) if kind == "full" else (("ladder",), 3)
    assert codes == [-9] * deaths + [0, 0], errors
    # the export and the change are of the second rung's end; a checkpoint of the third was there in the last death alone
    began = re.findall(r"^resuming from .*/ladder/\d+ \(step (\d+)\)$", told, re.MULTILINE)
    assert began == (["8", "8", "10"] if kind == "full" else ["6", "6", "8"])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    (tensors, facts), (wanted, wanted_facts) = exported(killed / "rungs"), exported(whole / "rungs")
    assert {name.split("/")[0] for name in wanted} == {"4", "2", "1"}
    assert_close(tensors, wanted, **EXACT)
    assert facts == wanted_facts
    for fit in fits:
        (tensors, state), (wanted, wanted_state) = saved(killed, fit), saved(whole, fit)
        assert_close(tensors, wanted, **EXACT)
        assert state == wanted_state
    assert any(name.startswith("teacher/") for name in wanted) and any("exp_avg" in name for name in wanted)
    assert rows(killed) == rows(whole)
