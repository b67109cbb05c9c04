"""The check of an export: it passes what is right, and each way of being wrong is an error that says what and how much."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import log_lines, look, opened, run_unet, student_of
from torch import Tensor

from stepdistill.errors import ExportError
from stepdistill.export.lora import METADATA_KEY, WEIGHTS, AdapterFile, diffusers_layout, save_lora
from stepdistill.export.verify import verify
from stepdistill.families import Model, TeacherConfig
from stepdistill.networks.denoiser import Denoiser


@pytest.fixture(scope="module")
def ready(base: Path) -> tuple[Model, Denoiser]:
    """A model and its student at rank 4, alpha 64, for tests that change the file alone."""
    model = opened(base)
    return model, student_of(model, 4, 64)


def adapter(model: Model, student: Denoiser, base: Path) -> AdapterFile:
    return AdapterFile(model, student, TeacherConfig(str(base)), diffusers_layout())


Change = Callable[[dict[str, Tensor], dict[str, object]], None]


def rewrite(folder: Path, change: Change) -> None:
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata)} if metadata else None)


def a_tensor_off(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    next(iter(tensors.values())).view(-1)[0] += 0.25


def a_module_missing(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    for key in [k for k in tensors if "mid_block.resnets.0.conv1" in k]:
        del tensors[key]


def a_module_more(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    tensors["unet.conv_in.lora_A.weight"], tensors["unet.conv_in.lora_B.weight"] = (
        torch.ones(4, 4, 3, 3),
        torch.ones(8, 4, 1, 1),
    )


def another_shape(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    key = next(iter(tensors))
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def renamed_attention(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers

    renamed = convert_state_dict_to_diffusers(dict(tensors))
    tensors.clear()
    tensors.update(renamed)


def another_alpha(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    metadata["unet.lora_alpha"] = 4


def no_metadata(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    metadata.clear()


def an_argument_nobody_knows(tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    metadata["unet.flavour"] = "vanilla"


CHANGES: list[tuple[Change, str]] = [
    (a_tensor_off, r"1 of 158 tensors .* by up to 0\.25"),
    (a_module_missing, r"2 of 158 trained tensors are missing.*mid_block\.resnets\.0\.conv1"),
    (a_module_more, r"2 tensors that were not trained.*conv_in"),
    (another_shape, r"1 of 158 tensors .* is \(8, .* in the export, \(4, "),
    (renamed_attention, r"of 158 trained tensors are missing"),
    (another_alpha, r"79 of 79 modules load at another strength.*\(1 instead of 16\)"),
    (no_metadata, r"79 of 79 modules load at another strength.*\(1 instead of 16\)"),
    (an_argument_nobody_knows, r"does not load"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_tampered_file_is_an_error_that_says_what_is_wrong(
    base: Path, ready: tuple[Model, Denoiser], tmp_path: Path, change: Change, message: str
) -> None:
    model, student = ready
    save_lora(student, tmp_path)
    rewrite(tmp_path, change)
    before = look(student)
    with pytest.raises(ExportError, match=message):
        verify(adapter(model, student, base), tmp_path)
    assert torch.equal(look(student), before)
    assert list(student.module.peft_config) == ["student"]
    verify(adapter(model, student, base), tmp_path, "none")


@pytest.mark.parametrize("how", ["shared", "full"])
@pytest.mark.parametrize(
    ("base_dtype", "file_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_a_good_export_passes_in_silence(
    base: Path, tmp_path: Path, how: str, base_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    model = opened(base, base_dtype)
    student = student_of(model, 4, 64)
    save_lora(student, tmp_path, file_dtype)
    with log_lines() as lines:
        verify(adapter(model, student, base), tmp_path, how)
    assert lines == []


def test_the_check_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    student = student_of(model)
    student.frozen_copy()
    student.module.train()
    module = student.module

    def state() -> object:
        layers = [m for m in module.modules() if "lora_A" in dict(m.named_children())]
        return (
            [(n, p.requires_grad, id(p), p.dtype) for n, p in module.named_parameters()],
            [(m.active_adapters, m.disable_adapters, dict(m.scaling)) for m in layers],
            (student.adapters.current, sorted(module.peft_config), {m.training for m in module.modules()}),
            torch.get_rng_state().tolist(),
        )

    save_lora(student, tmp_path)
    for resting in ("student", None):
        with student.adapters.use(resting):
            before, output = state(), run_unet(module)
            verify(adapter(model, student, base), tmp_path)
            assert state() == before
            assert torch.equal(run_unet(module), output)


def test_the_check_sees_past_the_rounding_of_an_autocast_around_it(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    student = student_of(model)
    save_lora(student, tmp_path)
    weight = student.module.conv_out.weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        verify(adapter(model, student, base), tmp_path, "full")
        rounded = weight.bfloat16()
        weight.mul_(1 + 1e-6)
        assert torch.equal(weight.bfloat16(), rounded)
        with pytest.raises(ExportError, match="computes something else"):
            verify(adapter(model, student, base), tmp_path, "full")


def test_a_base_that_changed_in_memory_is_seen_by_the_full_check(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    student = student_of(model)
    with torch.no_grad():
        student.module.conv_in.weight.add_(0.01)
    save_lora(student, tmp_path)
    verify(adapter(model, student, base), tmp_path, "shared")
    with pytest.raises(ExportError, match="computes something else.*differ by up to"):
        verify(adapter(model, student, base), tmp_path, "full")


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_a_damaged_file_is_named(base: Path, ready: tuple[Model, Denoiser], tmp_path: Path, damage: bytes) -> None:
    model, student = ready
    (tmp_path / WEIGHTS).write_bytes(damage)
    with pytest.raises(ExportError, match=WEIGHTS):
        verify(adapter(model, student, base), tmp_path)


def test_a_missing_file_is_named(base: Path, ready: tuple[Model, Denoiser], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=WEIGHTS):
        verify(adapter(*ready, base), tmp_path)
