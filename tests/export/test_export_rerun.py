"""`export RUN`: the student comes back from config.yaml and a checkpoint, or the message says what is missing."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from students import ATTENTION, full_student_of, opened, student_of

from stepdistill.batch import Batch
from stepdistill.config import parse, write_config
from stepdistill.errors import InputError
from stepdistill.export import rerun
from stepdistill.export.config import ExportConfig
from stepdistill.export.lora import WEIGHTS
from stepdistill.export.rerun import export_run
from stepdistill.families import Model, TeacherConfig
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.lora import StudentConfig
from stepdistill.randomness import StepRandom
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.config import TrainConfig
from stepdistill.training.trainer import Trainer


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


def test_another_base_at_the_place_of_the_one_that_moved(base: Path, run: Path) -> None:
    known = opened(base).denoiser_hash()
    for step, teacher in ((15, {"float32": "of another one"}), (20, known)):
        CheckpointStore(run / "checkpoints").save(step, {"student": tensors(base, step)}, {"teacher": teacher})
    with pytest.raises(
        InputError, match=r"expected the teacher of checkpoint .*15, got other weights.*--teacher\.path"
    ):
        export_run(run, checkpoint="15")
    assert not (run / WEIGHTS).exists()
    export_run(run)
    assert_exported(run, base, 20)


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
        ("w_max", "w_most", "method that exports .*LCM.*w_most"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LCM", None),
        ("Denoising", r"method that exports \(LCM, Progressive, LADD, ADD, GuidanceDistill\), got Denoising"),
    ],
)
def test_the_checkpoint_says_which_method_it_was(base: Path, run: Path, name: str, message: str | None) -> None:
    CheckpointStore(run / "checkpoints").save(20, {"student": tensors(base, 20)}, {"run": {"method": name}})
    if message is None:
        export_run(run)
        assert_exported(run, base, 20)
    else:
        with pytest.raises(InputError, match=message):
            export_run(run)


class Latents:
    """Four latents with prompts."""

    def __init__(self, model: Model) -> None:
        self.x0 = torch.randn((4, *model.latent_shape), generator=torch.Generator().manual_seed(0))
        self.cond = model.conditions(["a", "b", "c", "d"])
        self.uncond = model.uncond(self.cond)

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        chosen = list(indices)
        cond, uncond = ({k: v[chosen] for k, v in c.items()} for c in (self.cond, self.uncond))
        return Batch(self.x0[chosen], cond, uncond, rng)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_from_training_to_a_file(base: Path, tmp_path: Path, kind: str) -> None:
    """What a training leaves behind is enough; the checkpoint names the method, and the average is what is exported."""
    parsed = parse(Recipe, ["--teacher.path", str(base), "--student.kind", kind, "--student.rank", "2"])
    model = opened(base)
    student = model.denoiser.student(parsed.recipe.student, embed_guidance=True)
    config = TrainConfig(max_train_steps=3, train_batch_size=2, learning_rate=1e-3, ema_decay=0.5, mixed_precision="no")
    trainer = Trainer(config, tmp_path, parsed.yaml)
    trainer.fit(LCM(parsed.recipe.method, student, model.denoiser), Latents(model))
    trainer.close()
    found = CheckpointStore(tmp_path / "checkpoints").find()
    assert found is not None and found.state["run"]["method"] == "LCM"
    assert not torch.equal(*(next(iter(found.tensors(n).values())) for n in ("student", "student.ema")))
    export_run(tmp_path)
    name, prefix = {"lora": (WEIGHTS, "unet."), "full": ("unet/diffusion_pytorch_model.safetensors", "")}[kind]
    saved, trained = load_file(tmp_path / name), student.state()  # after a fit the student holds its average
    assert saved.keys() == {prefix + n for n in trained}
    assert all(torch.equal(saved[prefix + n], v) for n, v in trained.items())


def test_both_formats_from_the_command_line_s_word(base: Path, run: Path) -> None:
    export_run(run, export={"formats": "diffusers,kohya"})
    assert_exported(run, base, 10)
    assert (run / "lora_kohya.safetensors").is_file()
    with pytest.raises(InputError, match=r"--export\.formats"):
        export_run(run, export={"formats": "kohya"})


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_a_full_student_comes_back_with_its_average(base: Path, tmp_path: Path, guidance: bool, average: bool) -> None:
    write_config(parse(Recipe, ["--teacher.path", str(base), "--student.kind", "full"]), tmp_path)
    first, second = (full_student_of(opened(base), guidance, seed) for seed in (1, 2))
    roles = {"student": first.state(), "target": second.state()}
    if average:
        roles["student.ema"] = {n: p.detach() for n, p in second.named_trainable().items()}
    CheckpointStore(tmp_path / "checkpoints").save(5, roles, {})
    export_run(tmp_path)
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    expected = (second if average else first).state()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[n], v) for n, v in expected.items())
    info = json.loads((tmp_path / "stepdistill.json").read_text())
    assert info["guidance_scale"] == (8.0 if guidance else 1.0)


def test_a_run_is_uploaded_where_asked_and_checked_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(rerun, "check_hub", lambda config, folder: steps.append(("check", config.push_to_hub, folder)))
    monkeypatch.setattr(rerun, "push", lambda folder, config: steps.append(("push", (folder / WEIGHTS).is_file())))
    monkeypatch.setattr(rerun, "load", lambda config, load=rerun.load: steps.append("load") or load(config))
    export_run(run, export={"push_to_hub": True})
    assert steps == [("check", True, run), "load", ("push", True)]


def test_a_student_that_is_made_from_its_teacher_has_no_path(run: Path) -> None:
    with pytest.raises(InputError, match=r"expected --teacher\.path alone .*got --student\.path; drop it"):
        export_run(run, student={"path": "elsewhere"})
    assert not (run / WEIGHTS).exists()
