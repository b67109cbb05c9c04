"""Two processes that share out a full student: they compute what one does, and their files are the files of any run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from parallel_process import Blocks, Follow, climb_in, fit_in, unet
from ranks import run_ranks
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import EXACT, rows, saved

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def launched(mode: str, folder: Path) -> list[dict]:
    """What each of two processes says of its runs of `mode`."""
    run_ranks("parallel_process.py", [mode, folder])
    return [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]


def agree(folder: Path, other: Path, only: str = "", **tolerance: float) -> None:
    """The same tensors (weights, moments, averages), counters and losses, up to the order of sums."""
    (tensors, state), (wanted, wanted_state) = saved(folder), saved(other)
    assert len({name.split("/")[0] for name in wanted}) == 4, "student, its moments and average, target"
    tensors, wanted = ({n: v for n, v in t.items() if n.startswith(only)} for t in (tensors, wanted))
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    assert_close(tensors, wanted, **tolerance)
    assert {**state, "config": {}} == {**wanted_state, "config": {}}
    assert_close(rows(folder), rows(other), **tolerance)


def test_two_processes_that_share_a_student_out_compute_what_one_does(tmp_path: Path) -> None:
    fit_in(tmp_path / "one", Follow(), told=True)
    fit_in(tmp_path / "one-begun", Follow(), steps=3)
    shutil.copytree(tmp_path / "one-begun", tmp_path / "one-fsdp")  # a run folder is its process's own
    ends = launched("toys", tmp_path)
    agree(tmp_path / "fsdp", tmp_path / "one")
    agree(tmp_path / "killed-3", tmp_path / "fsdp", **EXACT)
    # begun by one and ended by two, and the other way round
    agree(tmp_path / "one-fsdp", tmp_path / "one")
    fit_in(tmp_path / "fsdp-one", Follow(seed=9))
    agree(tmp_path / "fsdp-one", tmp_path / "one")
    for given in (True, False):
        one = climb_in(tmp_path / f"one-ladder-{given}", given)
        agree(tmp_path / f"ladder-{given}", tmp_path / f"one-ladder-{given}")
        assert one.rung == saved(tmp_path / f"ladder-{given}")[1]["method"]["rung"] == 2
    # neither held more than its rows of the student's weights: of 3, 5, 5, ... rows 2, 3, 3, ... and 1, 2, 2, ...
    held = [set(end["held"]) for end in ends]
    count = sum(p.numel() for p in Blocks().parameters())
    assert held[0] | held[1] < set(range(count // 3, 2 * count // 3)) and sum(held[0] | held[1]) == count
    check_callbacks(tmp_path / "fsdp", tmp_path / "one")
    # the loss of one of the two was NaN: both raised before the step
    assert all("loss (loss = nan" in end["poisoned"][0] and "at step 3" in end["poisoned"][0] for end in ends)
    assert [row["step"] for row in rows(tmp_path / "poisoned")] == [1, 2]
    check_scaled(ends)


def check_callbacks(folder: Path, one: Path) -> None:
    """Callbacks saw the averaged weights, whole: on_validate on the main process, on_round and the recipe on both."""
    seen = sorted(path.name for path in folder.glob("seen-*"))
    both = [f"seen-{moment}-{rank}.safetensors" for moment in ("end", "round") for rank in (0, 1)]
    assert seen == [*both, "seen-step3-0.safetensors", "seen-step6-0.safetensors"]
    for name in seen:
        wanted = load_file(one / name.replace("-1.", "-0."))
        assert {"answer", "blocks.2.calls", "first.weight"} < wanted.keys()
        assert_close(load_file(folder / name), wanted, rtol=1e-5, atol=1e-6)
    average = {n: v for n, v in saved(one)[0].items() if n.startswith("student.ema/")}
    last = load_file(folder / "seen-end-1.safetensors")
    assert_close({n: last[n.removeprefix("student.ema/")] for n in average}, average, rtol=1e-5, atol=1e-6)


def check_scaled(ends: list[dict]) -> None:
    """A gradient that overflows on one of the two stops the step on both, and lowers the scale."""
    first, second = (end["scaled"] for end in ends)
    assert_close(torch.tensor(first), torch.tensor(second), equal_nan=True, **EXACT)
    assert [scale for _, scale, _ in first] == [8.0, 4.0, 4.0]
    assert first[1][2] == first[0][2] != first[2][2]


@pytest.mark.slow
def test_a_shared_out_run_can_go_on_as_any_other_and_a_unet_is_shared_out_too(tmp_path: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline(tmp_path / "pipeline")
    ends = launched("more", tmp_path)
    fit_in(tmp_path / "one", Follow())
    for run in ("fsdp", "ddp", "fsdp-ddp", "ddp-fsdp"):
        agree(tmp_path / run, tmp_path / "one")
    for run in ("killed-4", "killed-6"):
        agree(tmp_path / run, tmp_path / "fsdp", **EXACT)
    two = (tmp_path / "lcm").rename(tmp_path / "lcm-2")
    unet(tmp_path)
    agree(two, tmp_path / "lcm", only="student/", rtol=5e-5, atol=1e-6)  # 1.3e-5 was seen, by how a CPU rounds
    for moment in ("step3", "round", "end"):
        name = f"seen-{moment}-0.safetensors"
        assert_close(load_file(two / name), load_file(tmp_path / "lcm" / name), rtol=1e-5, atol=1e-6)
    for given in (True, False):
        for death in (2, 3, 6):
            agree(tmp_path / f"ladder-{given}-{death}", tmp_path / f"ladder-{given}", **EXACT)
    # in bf16 the weights of one layer at a time are cast, where DDP keeps them all: the same numbers
    agree(tmp_path / "fsdp-bf16", tmp_path / "ddp-bf16")
    forwards = 6 * 2 * 2
    assert [end["caches"] for end in ends] == [[False] * forwards + [True] * forwards] * 2
