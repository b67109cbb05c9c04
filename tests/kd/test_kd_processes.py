"""Two processes compute what one does, with rows of other lengths on each, and when the student writes the text itself."""

import sys
from pathlib import Path

import pytest
import torch
from kd_process import everything
from ranks import TRAINING, run_ranks
from torch.testing import assert_close
from toys import rows, saved

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    everything(tmp_path / "one")
    imported = (*TRAINING, "peft", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert")
    run_ranks("kd_process.py", [tmp_path / "two"], imported)
    for run in ("kd", "plain", "gkd", "minillm", "distillm", "distilbert", "fsdp", "layers", "answers"):
        found, wanted = (saved(tmp_path / world / run)[0] for world in ("two", "one"))
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert_close(rows(tmp_path / "two" / run), rows(tmp_path / "one" / run), rtol=1e-4, atol=1e-5)
    replay = saved(tmp_path / "two" / "distillm")[0]["method/replay"]
    assert torch.equal(replay, saved(tmp_path / "one" / "distillm")[0]["method/replay"]) and len(replay) == 12
    told = [(row["written"], row["replayed"]) for row in rows(tmp_path / "two" / "distillm")]
    assert set(told) == {(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)}, "new text, old text and the data's"
    assert {row["on_policy"] for row in rows(tmp_path / "two" / "gkd")} == {0.0, 1.0}
