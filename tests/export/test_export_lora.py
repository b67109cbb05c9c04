"""The adapter file against stock Diffusers: every module, the right strength, the same output to the bit, nothing said."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from students import ATTENTION, MODULES, log_lines, look, opened, run_unet, student_of

from stepdistill.errors import InputError
from stepdistill.export.lora import METADATA_KEY, WEIGHTS, save_lora
from stepdistill.families.unet import LCM_TARGETS

CASES = [(4, 4, ATTENTION), (4, 4, LCM_TARGETS), (4, 64, LCM_TARGETS), (6, 2.5, LCM_TARGETS)]


def stock_pipeline(base: Path, dtype: torch.dtype = torch.float32):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(base), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scalings(unet) -> list[float]:
    return [s for m in unet.modules() if "lora_A" in dict(m.named_children()) for s in m.scaling.values()]


@pytest.mark.parametrize(("rank", "alpha", "targets"), CASES)
def test_round_trip_through_a_stock_pipeline_is_exact(
    base: Path, tmp_path: Path, rank: int, alpha: float, targets: tuple[str, ...]
) -> None:
    student = student_of(opened(base), rank, alpha, targets)
    expected = look(student)
    save_lora(student, tmp_path)
    pipeline = stock_pipeline(base)
    bare = run_unet(pipeline.unet)
    with log_lines() as lines, warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(str(tmp_path))
    assert [line.split(" found with")[0] for line in lines] == ["No LoRA keys associated to CLIPTextModel"]
    assert scalings(pipeline.unet) == [alpha / rank] * MODULES[targets]
    found = run_unet(pipeline.unet)
    assert torch.equal(found, expected)
    assert (found - bare).abs().max() > 1e-3  # the adapter does something


def test_the_file_holds_raw_keys_in_float32_and_one_metadata_key(base: Path, tmp_path: Path) -> None:
    student = student_of(opened(base), 4, 64, ATTENTION)
    path = save_lora(student, tmp_path)
    assert path.name == WEIGHTS
    saved = load_file(path)
    trained = student.named_trainable()
    assert saved.keys() == {f"unet.{name}" for name in trained}
    assert all(torch.equal(saved[f"unet.{name}"], p) for name, p in trained.items())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == [METADATA_KEY]
    assert json.loads(metadata[METADATA_KEY]) == {
        "unet.r": 4,
        "unet.lora_alpha": 64,
        "unet.target_modules": sorted(ATTENTION),
    }


def test_equal_weights_make_equal_bytes(base: Path, tmp_path: Path) -> None:
    student = student_of(opened(base))
    first, second = save_lora(student, tmp_path / "1"), save_lora(student, tmp_path / "2")
    again = save_lora(student_of(opened(base)), tmp_path / "3")
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_loads_with_its_rounding_and_no_more(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    student = student_of(opened(base), 4, 16)
    save_lora(student, tmp_path, dtype)
    assert {v.dtype for v in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(tmp_path))
    assert scalings(pipeline.unet) == [4.0] * 79
    found, expected = run_unet(pipeline.unet), look(student)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(10 * torch.finfo(dtype).eps * expected.abs().max()))


def test_the_weights_of_now_are_saved_and_not_a_view_of_them(base: Path, tmp_path: Path) -> None:
    student = student_of(opened(base))
    bytes_before = save_lora(student, tmp_path).read_bytes()
    with torch.no_grad():
        student.trainable()[0].add_(1.0)
    assert save_lora(student, tmp_path).read_bytes() != bytes_before


def test_nan_is_not_exported(base: Path, tmp_path: Path) -> None:
    student = student_of(opened(base))
    student.trainable()[5].data[0, 0] = float("nan")
    with pytest.raises(InputError, match="nan or inf .* in 1 of 158 tensors"):
        save_lora(student, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_weights_too_large_for_float16_are_not_exported_as_inf(base: Path, tmp_path: Path) -> None:
    student = student_of(opened(base))
    student.trainable()[5].data[0, 0] = 1e6
    with pytest.raises(InputError, match="fp32"):
        save_lora(student, tmp_path, torch.float16)


def test_a_network_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    with pytest.raises(InputError, match="expected a LoRA student"):
        save_lora(model.denoiser, tmp_path)
    student_of(model)
    with pytest.raises(InputError, match="expected a LoRA student"):
        save_lora(model.denoiser, tmp_path)  # the teacher, whose adapters are off


def test_the_usual_scheduler_works_with_a_little_guidance_and_fusing_keeps_the_output(
    base: Path, tmp_path: Path
) -> None:
    from diffusers import LCMScheduler

    student = student_of(opened(base), 4, 8)
    save_lora(student, tmp_path)
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(tmp_path))
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    for guidance in (1.0, 1.5):
        images = pipeline(
            "abc", num_inference_steps=4, guidance_scale=guidance, generator=torch.manual_seed(0), output_type="np"
        ).images
        assert images.shape == (1, 32, 32, 3)
    expected = run_unet(pipeline.unet)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run_unet(pipeline.unet), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", [torch.float32, torch.float16])
def test_a_float16_pipeline_takes_it(base: Path, tmp_path: Path, file: torch.dtype) -> None:
    student = student_of(opened(base), 4, 64)
    save_lora(student, tmp_path, file)
    pipeline = stock_pipeline(base, torch.float16)
    pipeline.load_lora_weights(str(tmp_path))
    assert scalings(pipeline.unet) == [16.0] * 79
    x_t = torch.randn((1, 4, 4, 4), generator=torch.manual_seed(0))
    embeds = torch.randn((1, 24, 16), generator=torch.manual_seed(1))
    with torch.no_grad():
        half = pipeline.unet(x_t.half(), 499, embeds.half()).sample
        expected = student.output(x_t, torch.tensor([0.5], dtype=torch.float64), {"prompt_embeds": embeds})
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=float(0.01 * expected.abs().max()))


def test_it_adds_up_with_a_style_adapter(base: Path, tmp_path: Path) -> None:
    few_steps, style = student_of(opened(base), 4, 8), student_of(opened(base), 2, 6, ATTENTION, seed=9)
    save_lora(few_steps, tmp_path / "few"), save_lora(style, tmp_path / "style")
    pipeline = stock_pipeline(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT, for any second adapter
        pipeline.load_lora_weights(str(tmp_path / "few"), adapter_name="few")
        pipeline.load_lora_weights(str(tmp_path / "style"), adapter_name="style")
    pipeline.set_adapters(["few", "style"], adapter_weights=[1.0, 0.7])
    merged = opened(base).denoiser.module
    with torch.no_grad():
        for network, scale in ((few_steps, 8 / 4), (style, 0.7 * 6 / 2)):
            named = network.named_trainable()
            for key in [n for n in named if n.endswith("lora_A.weight")]:
                a, b = named[key], named[key.replace("lora_A", "lora_B")]
                weight = merged.get_parameter(key.replace("lora_A.", ""))
                weight += scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)  # B's kernels are 1x1
    found = run_unet(pipeline.unet)
    torch.testing.assert_close(found, run_unet(merged), rtol=1e-4, atol=1e-4)
    pipeline.set_adapters(["few"])
    assert torch.equal(run_unet(pipeline.unet), look(few_steps))
    assert (found - look(few_steps)).abs().max() > 1e-2
