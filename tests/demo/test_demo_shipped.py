"""The demo's weights as they ship: made by this code, for this world, small, and as good as they are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from stepdistill.batch import Batch
from stepdistill.bench.judge import Judge
from stepdistill.demo import eye, making, stages, teacher
from stepdistill.demo.world import ATTRIBUTES, TEST_SEED, World
from stepdistill.families import EyeConfig, open_eye
from stepdistill.families.loading import DEMO_EYE, DEMO_JUDGE, DEMO_TEACHER
from stepdistill.randomness import StepRandom

COUNT, DECODED = 1000, 600
TEST = World(TEST_SEED)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def config(path: str) -> dict:
    return json.loads((DEMO_TEACHER / path).read_text(encoding="utf-8"))


def dtypes(path: Path) -> set[torch.dtype]:
    with safe_open(path, "pt") as file:
        return {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # the handle is no dict


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(DEMO_JUDGE)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(DEMO_TEACHER, subfolder="vae").eval()


def test_it_is_a_stock_pipeline_of_the_classes_stated():
    index = config("model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    assert parts == {
        "scheduler": "DDIMScheduler", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL",
    }  # fmt: skip


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder"])
def test_its_parts_are_those_that_the_code_makes(part):
    tokenizer = teacher.tokenizer()
    made = {
        "unet": teacher.unet, "vae": teacher.autoencoder, "scheduler": teacher.scheduler,
        "text_encoder": lambda: teacher.text_model(tokenizer),
    }[part]()  # fmt: skip
    shipped = config(f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json")
    own = made.config.to_dict() if part == "text_encoder" else dict(made.config)
    trained = {"scaling_factor"} if part == "vae" else {"dtype"}
    for name in shipped.keys() & own.keys() - trained:
        if not name.startswith("_") and name not in ("transformers_version", "architectures"):
            assert shipped[name] == (list(own[name]) if isinstance(own[name], tuple) else own[name]), name
    if part in WEIGHTS:
        with safe_open(DEMO_TEACHER / WEIGHTS[part], "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert stored == {name: tuple(value.shape) for name, value in made.state_dict().items()}


def test_its_tokenizer_is_the_worlds():
    from transformers import CLIPTokenizer

    shipped, made = CLIPTokenizer.from_pretrained(DEMO_TEACHER / "tokenizer"), teacher.tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    captions = TEST.captions(range(50))
    assert shipped(captions).input_ids == made(captions).input_ids


def test_precision_and_size():
    assert {name: dtypes(DEMO_TEACHER / path) for name, path in WEIGHTS.items()} == {
        "unet": {torch.float16}, "vae": {torch.float16}, "text_encoder": {torch.float32},
    }  # fmt: skip
    files = [*DEMO_TEACHER.rglob("*.safetensors"), *DEMO_JUDGE.rglob("*.safetensors")]
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_no_file_tells_where_it_was_made():
    for file in (*DEMO_TEACHER.rglob("*.json"), *DEMO_JUDGE.rglob("*.json"), *DEMO_EYE.rglob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        assert not str(found.get("_name_or_path", "")), f"{file}: take _name_or_path out"


def test_the_judge_reads_what_is_there(judge):
    made = teacher.judge()
    assert judge.attributes == made.attributes == {name: len(options) for name, options in ATTRIBUTES.items()}
    assert {n: v.shape for n, v in judge.state_dict().items()} == {n: v.shape for n, v in made.state_dict().items()}
    labels = TEST.labels(range(COUNT))
    parts = [judge(TEST.pixels(range(i, i + 250))) for i in range(0, COUNT, 250)]
    for i, name in enumerate(ATTRIBUTES):
        read = torch.cat([logits[name].argmax(1) for logits in parts])
        assert float((read == labels[:, i]).float().mean()) >= 0.995, name


@torch.no_grad()
def test_latents_have_unit_std(vae):
    posterior = vae.encode(TEST.pixels(range(100))).latent_dist
    variance = posterior.mean.double().var() + posterior.var.double().mean()
    assert vae.config.scaling_factor * float(variance.sqrt()) == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_reconstructions_are_read_as_well_as_their_originals(judge, vae):
    """Within a point, either object's: what the decoder smears is no student's fault."""
    lost: dict[str, list[float]] = {}
    for start in range(0, DECODED, 20):  # few at a time, since what fits into the caches is decoded sooner
        pixels, labels = TEST.pixels(range(start, start + 20)), TEST.labels(range(start, start + 20))
        before = stages.attribute_accuracy(judge, pixels, labels)
        after = stages.reconstruction_accuracy(judge, vae, pixels, labels)
        assert after["l1"] < 0.03
        for name in ATTRIBUTES:
            lost.setdefault(name.split()[-1], []).append(before[name] - after[name])
    shares = {kind: sum(parts) / len(parts) for kind, parts in lost.items()}
    assert list(shares) == ["layout", "shape", "colour", "ground", "texture"]
    assert max(shares.values()) <= 0.01, shares


def test_the_eye_is_a_small_dinov2_in_fp16_that_is_opened_as_a_real_one():
    (weights,) = DEMO_EYE.glob("*.safetensors")
    assert dtypes(weights) == {torch.float16} and weights.stat().st_size <= 1.2e6
    made = eye.eye()
    assert 0.4e6 < teacher.parameters(made) < 0.6e6
    opened = open_eye(EyeConfig("demo"))
    stored = {name: value.shape for name, value in opened.net.module.state_dict().items()}
    assert stored == {name: value.shape for name, value in made.state_dict().items()}
    assert opened.size == (64, 64) and opened.names == tuple(f"encoder.layer.{i}" for i in range(4))
    maps = opened(TEST.pixels(range(2)))
    assert [tuple(m.shape) for m in maps] == [(2, 96, 8, 8)] * 4 and maps[0].dtype == torch.float32


@torch.no_grad()
def test_the_eye_knows_what_is_hidden():
    """More of it can be read, linearly, from its tokens than from those of an eye that was never trained."""
    pixels, rng = TEST.pixels(range(400)), StepRandom(0, 0, range(400))
    batch = Batch(pixels, {}, {}, rng)

    def error(net) -> float:
        hidden = eye.Masking(eye.MaskingConfig(), net).hidden(batch)
        tokens = net(pixel_values=pixels, bool_masked_pos=hidden).last_hidden_state
        known = torch.cat([tokens[:, :1].expand(-1, 64, -1), tokens[:, 1:], torch.ones(400, 64, 1)], 2)
        (x, other), (y, wanted) = (
            (part[:300][hidden[:300]], part[300:][hidden[300:]]) for part in (known, eye.patches(pixels))
        )
        ridge = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1])
        return float((other @ torch.linalg.solve(ridge, x.T @ y) - wanted).abs().mean())

    fresh = making.made(0, eye.eye).eval()
    assert error(open_eye(EyeConfig("demo")).net.module) < 0.97 * error(fresh)
