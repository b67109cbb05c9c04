"""Ladders that can't be, and what is said of them."""

import math
from typing import Any

import pytest
import torch
from ladders import Net, config, ladder
from toys import sd_table

from stepdistill.batch import Batch
from stepdistill.config import CommaList
from stepdistill.diffusion.schedule import Flow, Tabulated
from stepdistill.errors import InputError
from stepdistill.methods.progressive import Progressive, ProgressiveConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import StepRandom


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rungs": "8,3"}, r"3 steps after 8; fix .*--method\.rungs"),
        ({"rungs": "8,8"}, "8 steps after 8"),
        ({"rungs": "4,8"}, "8 steps after 4"),
        ({"rungs": "8,0"}, "0 steps after 8"),
        ({"rungs": "8,-2"}, "-2 steps after 8"),
        ({"rungs": "8,a"}, r"integers .*'8,a'; fix --method\.rungs"),
        ({"rungs": ","}, r"at least one rung.*--method\.rungs"),
        ({"rungs": "16"}, r"16 steps after 40; fix --method\.teacher_steps"),
        ({"teacher_steps": 8}, r"8 steps after 8; fix --method\.teacher_steps"),
        ({"teacher_steps": 4}, "8 steps after 4"),
        ({"teacher_steps": 0}, "8 steps after 0"),
        ({"start_steps": 6}, r"times 2, 4, 8, \.\.\., got 6 and 1.*--method\.start_steps"),
        ({"start_steps": 2, "final_steps": 4}, "got 2 and 4"),
        ({"start_steps": 0}, "got 0 and 0"),
        ({"final_steps": 0}, "got 8 and 0"),
        ({"rungs": "8,4", "start_steps": 8}, "got both"),
        ({"rungs": "8,4", "final_steps": 4}, "got both"),
        ({"w_min": 3.0, "w_max": 2.0}, r"--method\.w_min"),
        ({"w_min": -1.0}, r"--method\.w_min"),
        ({"w_max": math.inf}, r"--method\.w_max"),
        ({"shift": 0.0}, r"--method\.shift"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    if "rungs" in options:
        options = {**options, "rungs": CommaList.parse(options["rungs"])}
    with pytest.raises(InputError, match=match):
        ProgressiveConfig(**options)


def test_defaults() -> None:
    assert ProgressiveConfig().teacher_steps == 40 and ProgressiveConfig().ladder() == (8, 4, 2, 1)
    assert ProgressiveConfig(teacher_steps=64, start_steps=32).ladder() == (32, 16, 8, 4, 2, 1)
    assert ProgressiveConfig(start_steps=8, final_steps=4).ladder() == (8, 4)
    assert ProgressiveConfig(teacher_steps=2, start_steps=1).ladder() == (1,)
    assert config((10, 5, 1), 40).ladder() == (10, 5, 1)


def refused(match: str, student: Denoiser, teacher: Denoiser | None = None, **options: Any) -> None:
    rungs, teacher_steps = options.pop("rungs", (8, 4)), options.pop("teacher_steps", 40)
    ladder_options = config(rungs, teacher_steps, **options)
    for say in (ladder_options.check, lambda *networks: Progressive(ladder_options, *networks)):
        with pytest.raises(InputError, match=match):
            say(student, teacher)


def test_rungs_that_the_stock_scheduler_would_not_follow_are_refused() -> None:
    student = Net().full_student()
    refused(r"divide the teacher's 1000 levels, got 32: .*1000 // 32 = 31 .*1, 2, 4, 5, 8, 10, 20, 25, 40, 50 "
            r"\(--method\.teacher_steps, --method\.rungs\)", student, rungs=(8, 4), teacher_steps=32)  # fmt: skip
    refused("got 80: .*1000 // 80 = 12", student, rungs=(16, 8), teacher_steps=80)
    Progressive(config((16, 8), 32), Net(Flow()).full_student())
    refused(r"no shift on a discrete noise table, got 3\.0.*--method\.shift", student, shift=3.0)


def test_eps_at_few_steps_is_refused_with_the_reason_and_the_ways_out() -> None:
    student = Net(kind="eps").full_student()
    match = r"at least 8 steps of an eps student, got 4: .*15 on.*--method\.final_steps 8, or .*v, x0 or flow.*--teacher\.path"
    refused(match, student)
    refused(match, student, Net(kind="eps"))
    Progressive(config((20, 10), 40), student)
    Progressive(config((8,), 40), student)


def test_eps_where_alpha_is_zero_is_refused() -> None:
    zero = Tabulated(torch.cat([sd_table().alpha(sd_table().grid(1000)[1:-1].flip(0)) ** 2, torch.zeros(1)]).double())
    match = r"v, x0 or flow prediction where alpha is 0.*got eps: x0 is 0/0"
    for schedule in (zero, Flow()):
        eps, v = Net(schedule, "eps"), Net(schedule, "v")
        steps: dict[str, Any] = {"rungs": (8,), "teacher_steps": 40}
        refused(match, eps.full_student(), **steps)
        refused(match, v.full_student(), eps, **steps)
        refused(match, eps.full_student(), v, **steps)
        refused(r"above 0 at every time, got snr .*--method\.weighting truncated_snr", v.full_student(), weighting="snr",
                **steps)  # fmt: skip
        Progressive(config(**steps), v.full_student())


def test_a_range_of_guidance_needs_a_student_that_is_told() -> None:
    match = r"one w for a student without a guidance input, got 2\.0 to 4\.0.*--method\.w_min.*--student\.kind full"
    refused(match, Net().full_student(), Net(), w_min=2.0, w_max=4.0)
    refused(match, Net().full_student(), w_min=2.0, w_max=4.0)


def test_a_batch_without_images_says_so() -> None:
    with pytest.raises(ValueError, match="needs data"):
        ladder().training_step(Batch(None, {}, {}, StepRandom(0, 0, range(2))))
