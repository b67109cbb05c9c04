"""LADD's recipe in two processes: both roles, their optimizers and the export are those of one process."""

import sys
from pathlib import Path

import pytest
from recipe_process import ladd_words, make_inputs
from recipe_runs import exported, load_recipe, run_in_process, run_in_two_processes
from torch.testing import assert_close
from toys import rows, saved

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun")]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_play_the_game_that_one_plays(tmp_path: Path, kind: str) -> None:
    make_inputs(tmp_path)
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    more = ["--train.adam_epsilon", "1e-2", "--train.validation_prompts", "a cat", "--method.approximate_r1", "1"]
    more += ["--method.distillation", "1", "--method.w", "0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_in_process(load_recipe("ladd"), ladd_words(tmp_path, one, kind, *more))
    run_in_two_processes("ladd", ladd_words(tmp_path, two, kind, *more, "--train.train_batch_size", "1"))
    assert_close(exported(two)[0], exported(one)[0], rtol=1e-5, atol=1e-6)
    (tensors, state), (wanted, wanted_state) = saved(two), saved(one)
    assert_close(tensors, wanted, rtol=1e-5, atol=1e-6)
    guards = [s["method"].pop("guard") for s in (state, wanted_state)]
    assert state["method"] == wanted_state["method"] == {"taken": 6}
    assert_close(*guards, rtol=1e-5, atol=1e-6)
    for role in ("student", "discriminator"):
        moments = [
            value for name, value in wanted.items() if name.startswith(f"{role}.optimizer/") and "exp_avg" in name
        ]
        assert moments and all(float(value.abs().max()) > 0 for value in moments if value.ndim > 1)
    assert_close(rows(two), rows(one), rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in (two / "samples").iterdir()) == sorted(p.name for p in (one / "samples").iterdir())
