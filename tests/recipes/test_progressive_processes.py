"""The ladder's recipe in two processes, each with the whole student or a share of it: the rungs are those of one process."""

import sys
from pathlib import Path

import pytest
from recipe_process import make_inputs, words
from recipe_runs import exported, load_recipe, run_in_process, run_in_two_processes
from torch.testing import assert_close
from toys import rows, saved

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_climb_as_one_does(tmp_path: Path, parallel: str) -> None:
    make_inputs(tmp_path)
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    more = ["--train.adam_epsilon", "1e-2", "--train.validation_prompts", "a cat", "--train.parallel", parallel]
    run_in_process(load_recipe("progressive"), words(tmp_path, tmp_path / "one", "full", *more))
    run_in_two_processes(
        "progressive", words(tmp_path, tmp_path / "two", "full", *more, "--train.train_batch_size", "1")
    )
    one, two = tmp_path / "one", tmp_path / "two"
    (tensors, _), (wanted, _) = exported(two / "rungs"), exported(one / "rungs")
    assert {name.split("/")[0] for name in wanted} == {"4", "2", "1"}
    assert_close(tensors, wanted, rtol=1e-5, atol=1e-6)
    for fit in ("guidance", "ladder"):
        assert_close(saved(two, fit)[0], saved(one, fit)[0], rtol=1e-5, atol=1e-6)
    assert_close(rows(two), rows(one), rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in (two / "samples").iterdir()) == sorted(p.name for p in (one / "samples").iterdir())
