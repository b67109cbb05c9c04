"""A full student as a folder: stock pipelines load it whole, read its guidance, and sample what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from students import full_student_of, log_lines, look_at, opened, student_of

from stepdistill.diffusion.solver import multistep_consistency
from stepdistill.errors import ExportError, InputError
from stepdistill.export.config import ExportConfig
from stepdistill.export.full import WholeNetwork
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.student import export_student
from stepdistill.export.verify import verify
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCM, LCMConfig

FILES = [
    "README.md", "scheduler/scheduler_config.json", "stepdistill.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def exported(
    checkpoint: Path, folder: Path, guidance: bool = True, method: LCMConfig | None = None, **config: Any
) -> Any:
    model = opened(checkpoint)
    student = full_student_of(model, guidance)
    teacher = TeacherConfig(str(checkpoint))
    plan = lcm_sampling(method or LCMConfig(), model, student.takes_guidance)
    export_student(folder, model, student, teacher, plan, ExportConfig(**config))
    return model, student


@pytest.fixture(params=["sd", "sdxl"])
def checkpoint(request: pytest.FixtureRequest, base: Path, sdxl: Path) -> Path:
    return base if request.param == "sd" else sdxl


@pytest.mark.parametrize("guidance", [True, False])
def test_the_card_s_code_loads_the_student_to_the_bit(checkpoint: Path, tmp_path: Path, guidance: bool) -> None:
    model, student = exported(checkpoint, tmp_path, guidance)
    assert files(tmp_path) == FILES
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    with log_lines() as lines:
        exec(code, scope)
    assert lines == []
    assert scope["image"].size == (32, 32)
    assert len(scope["pipe"].scheduler.timesteps) == 4
    expected = [look_at(model, student, w) for w in (2.0, 8.1)]
    assert torch.equal(*expected) != guidance
    student.net = scope["pipe"].unet
    assert all(torch.equal(look_at(model, student, w), e) for w, e in zip((2.0, 8.1), expected, strict=True))


def test_facts_and_card_say_what_it_is(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path, method=LCMConfig(w_min=2.0, w_max=6.0), dtype="bf16")
    info = json.loads((tmp_path / "stepdistill.json").read_text())
    assert info["student"] == {
        "kind": "full",
        "parameters": sum(v.numel() for v in load_file(tmp_path / WEIGHTS).values()),
    }
    assert info["weights"]["network"] == {"folder": "unet", "class": "UNet2DConditionModel"}
    assert list(info["weights"]["files"]) == [WEIGHTS]
    assert info["files"] == FILES
    assert (info["guidance_scale"], info["guidance_range"]) == (7.0, [3.0, 7.0])  # 8 is beyond what was trained
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["diffusers", "lcm", "stepdistill", "text-to-image"]
    assert front["base_model_relation"] == "finetune"
    assert "guidance_scale: 7, or another from 3 to 7" in card
    assert "guidance_scale=7.0" in card
    assert (
        str(base) not in (tmp_path / "unet" / "config.json").read_text()
    )  # where the teacher lay is nobody's business


@pytest.mark.parametrize(("low", "high", "scale"), [(5.0, 15.0, 8.0), (2.0, 4.0, 5.0), (9.0, 12.0, 10.0)])
def test_the_guidance_is_8_where_it_was_trained(base: Path, low: float, high: float, scale: float) -> None:
    method = LCMConfig(w_min=low, w_max=high)
    assert lcm_sampling(method, opened(base), takes_guidance=True).guidance_scale == scale
    assert lcm_sampling(method, opened(base)).guidance_scale == 1.0


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_each_dtype_is_that_of_the_file_and_loads_as_rounded(base: Path, tmp_path: Path, dtype: str) -> None:
    from diffusers import UNet2DConditionModel

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model, student = exported(base, tmp_path, dtype=dtype)
    saved = load_file(tmp_path / WEIGHTS)
    assert {v.dtype for v in saved.values()} == {kind}
    state = student.module.state_dict()
    assert all(torch.equal(saved[n], v.to(kind)) for n, v in state.items()) and len(saved) == len(state)
    assert {p.dtype for p in student.trainable()} == {torch.float32}  # training goes on in it
    UNet2DConditionModel.from_pretrained(str(tmp_path), subfolder="unet", dtype=kind)


def test_stock_pipelines_sample_as_the_method_does(base: Path, tmp_path: Path) -> None:
    """Same noise, same times: the LCM pipeline's latents are ours, at a guidance that the network reads."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    method = LCMConfig()
    model, student = exported(base, tmp_path, method=method)
    lcm = LCM(method, student, model.denoiser)
    unet = UNet2DConditionModel.from_pretrained(str(tmp_path), subfolder="unet")
    draws = torch.Generator().manual_seed(5)
    noise = [torch.randn((1, 4, 4, 4), generator=draws) for _ in range(5)]
    cond = {**model.encode_prompts(["abc"]), "guidance": torch.tensor([8.0])}
    times = lcm.schedule.time(torch.tensor([999, 759, 499, 259]))
    with torch.no_grad():
        expected = multistep_consistency(
            lambda x, t: lcm.consistency(x, t, student(x, t, cond)), lcm.schedule, noise[0], times, lambda i: noise[i]
        )
    for cls in (LatentConsistencyModelPipeline, StableDiffusionPipeline):
        pipe = cls.from_pretrained(str(base), unet=unet)
        pipe.scheduler = LCMScheduler.from_pretrained(str(tmp_path), subfolder="scheduler")
        found = pipe(
            "abc", num_inference_steps=4, guidance_scale=8.0, latents=noise[0].clone(), output_type="latent",
            generator=torch.Generator().manual_seed(5).set_state(_after(noise[0])),
        ).images  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _after(first: torch.Tensor) -> torch.Tensor:
    draws = torch.Generator().manual_seed(5)
    torch.randn(first.shape, generator=draws)
    return draws.get_state()


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["conv_in.weight"].view(-1)[:1].add_(0.25), r"1 of \d+ tensors .* by up to 0\.25: conv_in\.weight"),
        (lambda t: t.pop("time_embedding.cond_proj.weight"), r"1 of \d+ trained tensors are missing.*cond_proj"),
        (lambda t: t.update(more=torch.ones(2)), r"1 tensors that were not trained: more"),
        (
            lambda t: t.update({"conv_in.bias": torch.ones(9)}),
            r"conv_in\.bias is \(9,\) in the export, \(8,\) in training",
        ),
        (lambda t: t.update({"conv_in.bias": t["conv_in.bias"].half()}), r"differ|one dtype"),
    ],
    ids=["off", "missing", "more", "another shape", "mixed dtypes"],
)
def test_tampered_weights_are_an_error(base: Path, tmp_path: Path, edit: Any, message: str) -> None:
    model = opened(base)
    part = WholeNetwork(model, full_student_of(model))
    part.save(tmp_path, torch.float32)
    verify(part, tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ExportError, match=message):
        verify(part, tmp_path)
    verify(part, tmp_path, "none")


def config_edit(folder: Path, **fields: Any) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_cond_proj_dim": None}, r"unexpected_keys.*cond_proj"),
        ({"act_fn": "relu"}, r"computes something else"),
        ({"block_out_channels": [8, 32]}, r"does not load|missing_keys|mismatched"),
        ({"flip_sin_to_cos": False}, r"computes something else"),
    ],
)
def test_a_config_of_another_network_is_an_error(
    base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    model = opened(base)
    part = WholeNetwork(model, full_student_of(model))
    part.save(tmp_path, torch.float32)
    config_edit(tmp_path, **fields)
    with pytest.raises(ExportError, match=message):
        verify(part, tmp_path)


def test_guidance_that_is_read_wrongly_is_seen(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that ignores its guidance input at all but one scale would pass a look at that one scale."""
    model = opened(base)
    student = full_student_of(model)
    part = WholeNetwork(model, student)
    part.save(tmp_path, torch.float32)
    seen: list[float] = []
    call = type(student).call

    def watched(network: Any, x_t: Any, t: Any, cond: Any) -> Any:
        seen.append(cond["guidance"][0].item())
        return call(network, x_t, t, cond)

    monkeypatch.setattr(type(student), "call", watched)
    verify(part, tmp_path)
    assert sorted(seen) == [2.0, 2.0, 8.0, 8.0]


def test_a_sharded_network_is_whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(base)
    student = full_student_of(model)
    save = type(student.module).save_pretrained
    monkeypatch.setattr(
        type(student.module), "save_pretrained", lambda module, path: save(module, path, max_shard_size="100KB")
    )
    part = WholeNetwork(model, student)
    part.save(tmp_path, torch.float32)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    verify(part, tmp_path)


def test_nan_is_not_exported(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    student = full_student_of(model)
    student.trainable()[3].data.view(-1)[0] = 1e6
    part = WholeNetwork(model, student)
    with pytest.raises(InputError, match="1 of .*fp32"):
        part.save(tmp_path, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_one_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(base, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    save = WholeNetwork.save

    def wrong(part: WholeNetwork, folder: Path, dtype: torch.dtype) -> None:
        save(part, folder, dtype)
        config_edit(folder, act_fn="relu")

    monkeypatch.setattr(WholeNetwork, "save", wrong)
    with pytest.raises(ExportError, match="computes something else"):
        exported(base, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert list(tmp_path.glob(".*")) == []


def test_a_full_student_takes_the_place_of_an_adapter(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    config = ExportConfig(formats=("diffusers", "kohya"))
    export_student(
        tmp_path, model, student_of(model), TeacherConfig(str(base)), lcm_sampling(LCMConfig(), model), config
    )
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    exported(base, tmp_path)
    assert files(tmp_path) == sorted([*FILES, "metrics.jsonl"])


def test_export_never_leaves_the_student_s_weights_rounded(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    student = full_student_of(model)
    before = {n: (v.data_ptr(), v.clone()) for n, v in student.module.state_dict().items()}
    export_student(
        tmp_path,
        model,
        student,
        TeacherConfig(str(base)),
        lcm_sampling(LCMConfig(), model, student.takes_guidance),
        ExportConfig(dtype="fp16"),
    )
    for name, value in student.module.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
