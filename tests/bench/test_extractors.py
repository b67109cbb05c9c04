"""Vision models as extractors: the very features of the stock model on pixels made by hand, or an error that says why not."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vision import MEAN, PROJECTION, SETTINGS, SIDE, STD, WIDTH, build, images, pixels, save

from stepdistill.bench import extractors, towers
from stepdistill.bench.extractors import InceptionFeatures, VisionFeatures, open_features
from stepdistill.bench.features import JudgeFeatures, hash_weights
from stepdistill.bench.judge import Judge
from stepdistill.bench.preprocessing import Preprocessing
from stepdistill.errors import InputError
from stepdistill.families.loading import DEMO_JUDGE

KINDS = {
    "dinov2": lambda model, x: model(x).last_hidden_state[:, 0],
    "vit": lambda model, x: model(x).pooler_output,
    "classifier": lambda model, x: model.vit(x).last_hidden_state[:, 0],
    "clip": lambda model, x: model.visual_projection(model.vision_model(pixel_values=x).pooler_output),
    "projected": lambda model, x: model(x).image_embeds,
    "unprojected": lambda model, x: model(x).pooler_output,
    "siglip": lambda model, x: model.vision_model(pixel_values=x).pooler_output,
    "convnext": lambda model, x: model.layernorm(model(x).last_hidden_state.mean((2, 3))),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save(build(kind), root / kind) for kind in [*KINDS, "masked", "tokenless", "text"]}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_features_are_those_of_the_stock_model(folders: dict[str, Path], kind: str) -> None:
    batch = images(5)
    extractor = VisionFeatures(str(folders[kind]), batch_size=2)
    features = extractor(batch)
    dim = PROJECTION if kind in ("clip", "projected") else WIDTH
    assert (features.dtype, tuple(features.shape), extractor.dim) == (torch.float64, (5, dim), dim)
    expected = KINDS[kind](build(kind), pixels(batch)).double()
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).mean() > 1e-2  # pictures are told apart
    assert extractor.name == str(folders[kind])


@pytest.mark.parametrize("kind", ["dinov2", "clip", "convnext"])
def test_features_do_not_depend_on_the_batch(folders: dict[str, Path], kind: str) -> None:
    batch = images(7)
    whole = VisionFeatures(str(folders[kind]))(batch)
    for size in (1, 3):
        torch.testing.assert_close(VisionFeatures(str(folders[kind]), size)(batch), whole, rtol=1e-6, atol=1e-6)
    extractor = VisionFeatures(str(folders[kind]), batch_size=4)
    torch.testing.assert_close(torch.cat([extractor(batch[:5]), extractor(batch[5:])]), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(extractor(batch[::-1].copy()), whole.flip(0), rtol=1e-6, atol=1e-6)


def test_a_dark_picture_among_others_is_a_picture(folders: dict[str, Path]) -> None:
    """The check for floats that were cast looks at the whole set, not at a batch that holds one image."""
    batch = images(3)
    batch[1] = np.arange(48)[:, None, None] % 2
    assert VisionFeatures(str(folders["dinov2"]), batch_size=1)(batch).isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2).astype(np.float32) / 255, "uint8"),
        (torch.zeros(2, 48, 48, 3, dtype=torch.uint8), "NumPy"),
        (images(2).transpose(0, 3, 1, 2), "channels last"),
        (images(2)[:0], "channels last"),
        ((images(2) / 255).astype(np.uint8) | 1, "only 0 and 1"),
    ],
)
def test_wrong_dtype_range_or_shape(folders: dict[str, Path], bad: Any, message: str, inception: Any) -> None:
    for extractor in (VisionFeatures(str(folders["dinov2"])), InceptionFeatures()):
        with pytest.raises(ValueError, match=message):
            extractor(bad)


def test_a_checkpoint_in_half_precision_runs_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    extractor = VisionFeatures(str(save(build("dinov2").half(), tmp_path)))
    assert {p.dtype for p in extractor.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in extractor.module.parameters()) and not extractor.module.training
    torch.testing.assert_close(
        extractor(images(3)), VisionFeatures(str(folders["dinov2"]))(images(3)), rtol=0.03, atol=0.03
    )


def test_weights_hash(folders: dict[str, Path], tmp_path: Path) -> None:
    """Equal for equal weights, also where the stock loader would draw a pooler that the checkpoint lacks."""
    for kind in ("dinov2", "classifier"):
        assert VisionFeatures(str(folders[kind])).weights_hash == VisionFeatures(str(folders[kind])).weights_hash
    model = build("dinov2")
    assert VisionFeatures(str(folders["dinov2"])).weights_hash == hash_weights(model)
    with torch.no_grad():
        model.layernorm.bias.view(-1)[0] += 1e-3
    assert VisionFeatures(str(save(model, tmp_path))).weights_hash != hash_weights(build("dinov2"))


# --- what is no vision model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "CLIPTextModel, which reads input_ids"),
        ("masked", "others at each call"),
        ("tokenless", "IJepaModel without"),
    ],
)
def test_models_without_features(folders: dict[str, Path], kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        VisionFeatures(str(folders[kind]))
    assert "--features" in str(error.value)


def test_paths_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "hub_is_reachable", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "other" / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    for spec, found in {
        str(tmp_path / "gone"): "nothing of the kind there",
        str(tmp_path / "empty"): "a folder without config.json",
        str(tmp_path / "other"): "got: ",
        "nobody/nothing": "no folder here",
        "no such model!": "no folder here",
    }.items():
        with pytest.raises(InputError, match=found) as error:
            open_features(spec)
        assert f"--features {spec!r}" in str(error.value) or (f"--features, got {spec!r}") in str(error.value)


def test_a_missing_weight_is_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save(build("dinov2"), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("layernorm.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors missing from .* first layernorm.bias"):
        VisionFeatures(str(tmp_path))


# --- resize and normalisation


def look(**settings: Any) -> Preprocessing:
    given = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not None}
    return Preprocessing.read(given, "here", "fix it")


def normal(resized: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((resized / 255 - np.array(MEAN)) / np.array(STD)).float().permute(2, 0, 1)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 20), (48, 96)])
def test_a_square_by_pillow(height: int, width: int, resample: Image.Resampling) -> None:
    batch = images(2, height, width)
    torch.testing.assert_close(look(resample=int(resample))(batch), pixels(batch, SIDE, resample), rtol=0, atol=1e-6)


def test_the_resize_is_antialiased() -> None:
    """One-pixel stripes made four times smaller are grey; picking pixels would leave stripes, or one colour."""
    stripes = np.zeros((1, 128, 128, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    found = look(image_mean=(0, 0, 0), image_std=(1, 1, 1))(stripes)
    assert (found[..., 2:-2] - 0.5).abs().max() < 0.02


def test_shorter_side_then_the_centre() -> None:
    (image,) = batch = images(1, 40, 60)
    found = look(size={"shortest_edge": 36}, crop_size={"height": 30, "width": 32}, do_center_crop=True)(batch)
    resized = np.asarray(Image.fromarray(image).resize((54, 36), Image.Resampling.BICUBIC))
    torch.testing.assert_close(found[0], normal(resized[3:33, 11:43]), rtol=0, atol=1e-6)
    torch.testing.assert_close(look(size=36, crop_size=32)(batch)[0], normal(resized[2:34, 11:43]), rtol=0, atol=1e-6)
    uncropped = look(size={"shortest_edge": 36}, crop_size=32, do_center_crop=False)(batch)
    torch.testing.assert_close(uncropped[0], normal(resized), rtol=0, atol=1e-6)


def test_a_number_is_a_square_where_nothing_is_cropped() -> None:
    assert look(size=24)(images(1, 40, 60)).shape == (1, 3, 24, 24)
    assert look(size=[24, 30])(images(1, 40, 60)).shape == (1, 3, 24, 30)


def test_the_share_that_convnext_keeps() -> None:
    (image,) = batch = images(1, 40, 60)
    found = look(size={"shortest_edge": 28}, crop_pct=0.875)(batch)[0]
    resized = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC))
    torch.testing.assert_close(found, normal(resized[2:30, 10:38]), rtol=0, atol=1e-6)
    assert look(size=384, crop_pct=0.875)(batch).shape == (1, 3, 384, 384)


def test_steps_can_be_off() -> None:
    (image,) = batch = images(1, 20)
    torch.testing.assert_close(look(do_resize=False, size=None)(batch)[0], normal(image), rtol=0, atol=1e-6)
    plain = look(do_resize=False, do_normalize=False, do_rescale=False, image_mean=None, image_std=None)(batch)[0]
    assert torch.equal(plain, torch.from_numpy(image).float().permute(2, 0, 1))
    scaled = look(rescale_factor=None, do_normalize=False, do_resize=False)(batch)[0]
    torch.testing.assert_close(scaled, plain / 255)
    with pytest.raises(ValueError, match="to crop"):
        look(do_resize=False, crop_size=32)(batch)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"size": None}, "no 'size'"),
        ({"image_mean": None}, "no 'image_mean'"),
        ({"image_std": None}, "no 'image_std'"),
        ({"image_std": [0.5]}, "1 channels"),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"size": {"height": 32}}, "height"),
        ({"size": 0}, "the size"),
        ({"size": "large"}, "."),
        ({"resample": 77}, "77"),
        ({"do_pad": True}, "do_pad"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"do_center_crop": True}, "no 'crop_size'"),
    ],
)
def test_settings_that_are_missing_or_not_understood(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=found) as error:
        VisionFeatures(str(save(build("dinov2"), tmp_path, **change)))
    assert "--features" in str(error.value) and "preprocessor_config.json" in str(error.value)


def test_resample_is_bicubic_by_default() -> None:
    assert look(resample=None).resample == Image.Resampling.BICUBIC


def test_settings_beside_the_model_or_in_the_processors_file(folders: dict[str, Path], tmp_path: Path) -> None:
    own = save(build("dinov2"), tmp_path) / "preprocessor_config.json"
    settings = json.loads(own.read_text(encoding="utf-8"))
    own.unlink()
    with pytest.raises(InputError, match=r"preprocessor_config.json at --features .* got none"):
        VisionFeatures(str(tmp_path))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}), encoding="utf-8")
    batch = images(2)
    torch.testing.assert_close(VisionFeatures(str(tmp_path))(batch), VisionFeatures(str(folders["dinov2"]))(batch))


@pytest.mark.parametrize("kind", ["clip", "vit", "convnext"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 260)])
def test_as_the_image_processors_that_use_pillow(kind: str, height: int, width: int, tmp_path: Path) -> None:
    module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
    names = {"clip": "CLIPImageProcessorPil", "vit": "ViTImageProcessorPil", "convnext": "ConvNextImageProcessorPil"}
    size = {"size": {"shortest_edge": 56}} if kind == "convnext" else {}
    processor, batch = module.__dict__[names[kind]](**size), images(2, height, width)
    processor.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    expected = processor([Image.fromarray(image) for image in batch], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preprocessing.read(settings, "here", "")(batch), expected, rtol=0, atol=2e-6)


# --- the other extractors


class FakeInception(torch.nn.Module):
    """Takes what torch-fidelity's network takes, and gives the first 2048 levels of each image."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        self.wanted, self.scale = features_list, torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.dtype != torch.uint8 or x.shape[1] != 3 or self.wanted != ["2048"] or self.training:
            raise ValueError(f"{x.dtype} {x.shape}")
        return (x.flatten(1)[:, :2048].float() * self.scale,)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_inception_gets_levels_with_the_channels_first(inception: Any) -> None:
    extractor, batch = InceptionFeatures(batch_size=2), images(3)
    batch.setflags(write=False)
    features = extractor(batch)
    assert (features.dtype, tuple(features.shape), extractor.dim) == (torch.float64, (3, 2048), 2048)
    np.testing.assert_array_equal(features.numpy(), batch.transpose(0, 3, 1, 2).reshape(3, -1)[:, :2048])
    assert (extractor.name, extractor.weights_hash) == ("inception", hash_weights(FakeInception("", [])))
    assert open_features("inception").name == "inception"


def test_inception_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"--features inception.*pip install 'stepdistill\[inception\]'.*torchvision"):
        open_features("inception")


def test_inception_without_weights(inception: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(inception, "FeatureExtractorInceptionV3", offline)
    with pytest.raises(InputError, match="weights for --features inception, got: no network"):
        InceptionFeatures()


def test_open_features(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # importing it fails: only "inception" may need it
    shipped = open_features("demo")
    assert isinstance(shipped, JudgeFeatures) and shipped.weights_hash == hash_weights(Judge.load(DEMO_JUDGE))
    judge = Judge({"shape": 3}, 16, 4, 6)
    assert open_features("demo", judge).weights_hash == hash_weights(judge)
    assert isinstance(open_features(str(folders["vit"])), extractors.VisionFeatures)
    with pytest.raises(InputError, match="64x64 images for --features demo, got 48x48.*give --features a vision model"):
        shipped(images(2))
