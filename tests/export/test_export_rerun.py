"""`export RUN`: the student comes back from config.yaml and a checkpoint, or the message says what is missing."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from students import ATTENTION, opened, student_of

from stepdistill.config import parse, write_config
from stepdistill.errors import InputError
from stepdistill.export.config import ExportConfig
from stepdistill.export.lora import WEIGHTS
from stepdistill.export.rerun import export_run
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCMConfig
from stepdistill.networks.lora import StudentConfig
from stepdistill.training.checkpoint import CheckpointStore


@dataclass
class Recipe:
    """What a recipe's config has in it.

    Attributes:
        teacher: teacher.
        student: student.
        method: method.
        export: export.
        output_dir: output.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: LCMConfig = field(default_factory=LCMConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    output_dir: str = "out"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run of an attention adapter at rank 2, alpha 6, with checkpoints at steps 5 and 10."""
    options = ["--student.rank", "2", "--student.alpha", "6", "--student.targets", ",".join(ATTENTION)]
    write_config(parse(Recipe, ["--teacher.path", str(base), *options, "--method.w_max", "9"]), tmp_path / "run")
    for step in (5, 10):
        save(base, tmp_path / "run", step, {"student": step})
    return tmp_path / "run"


@functools.cache
def shapes(base: Path) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in student_of(opened(base), 2, 6, ATTENTION).named_trainable().items()}


def tensors(base: Path, seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=draws) for n, shape in shapes(base).items()}


def save(base: Path, run: Path, step: int, roles: dict[str, int]) -> None:
    CheckpointStore(run / "checkpoints").save(step, {n: tensors(base, seed) for n, seed in roles.items()}, {})


def assert_exported(folder: Path, base: Path, seed: int) -> None:
    saved, expected = load_file(folder / WEIGHTS), tensors(base, seed)
    assert saved.keys() == {f"unet.{n}" for n in expected}
    assert all(torch.equal(saved[f"unet.{n}"], v) for n, v in expected.items())


def test_the_latest_checkpoint_is_exported_into_the_run(base: Path, run: Path) -> None:
    assert export_run(run) == run
    assert_exported(run, base, 10)
    assert '"w_max": 9.0' in (run / "stepdistill.json").read_text()


def test_another_checkpoint_folder_and_dtype(base: Path, run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "other", "5", export={"verify": "full"})
    assert_exported(tmp_path / "other", base, 5)
    assert not (run / WEIGHTS).exists()
    export_run(run, tmp_path / "half", export={"dtype": "bf16"})
    assert {v.dtype for v in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.bfloat16}


def test_the_average_goes_before_the_last_weights(base: Path, run: Path) -> None:
    save(base, run, 15, {"student": 15, "student.ema": 99})
    export_run(run)
    assert_exported(run, base, 99)


def test_a_base_that_moved(base: Path, run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(base), "/nowhere/at/all"))
    with pytest.raises(InputError, match="/nowhere/at/all.*--teacher.path"):
        export_run(run)
    export_run(run, teacher={"path": str(base)})
    assert_exported(run, base, 10)


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(base: Path, run: Path) -> None:
    path = run / "checkpoints" / "10" / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"student\.safetensors"):
        export_run(run)
    assert not (run / WEIGHTS).exists()
    export_run(run, checkpoint="5")
    assert_exported(run, base, 5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank: 2", "rank: 3", r"of shape \(3, 8\).*rank in config.yaml"),
        ("rank: 2", "rank: 2\n  flavour: 1", "section student .*got also flavour"),
        ("to_q,", "", "expected the 48 tensors of this student .* 16 are in one only"),
        ("w_max", "w_most", "method that exports .*LCMConfig.*w_most"),
        ("method:", "methods:", "sections method"),
        ("teacher:", "teacher: [", "expected YAML"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(run: Path, old: str, new: str, message: str) -> None:
    config = run / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        export_run(run)
    assert not (run / WEIGHTS).exists()


def test_a_folder_without_config_or_checkpoints_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a run folder with config\.yaml"):
        export_run(tmp_path)
    write_config(parse(Recipe, ["--teacher.path", str(base)]), tmp_path)
    with pytest.raises(InputError, match="train first"):
        export_run(tmp_path)
