"""Vision models as extractors: the very features of the stock model on pixels made by hand, or an error that says why not."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vision import PROJECTION, SIDE, WIDTH, build, images, pixels, save

from stepdistill.bench.extractors import InceptionFeatures, VisionFeatures, open_features
from stepdistill.bench.features import JudgeFeatures, hash_weights
from stepdistill.bench.judge import Judge
from stepdistill.errors import InputError
from stepdistill.families import towers
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
    "resnet": lambda model, x: model(x).last_hidden_state.mean((2, 3)),
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


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batch(folders: dict[str, Path], kind: str) -> None:
    """To 1e-6 of their length."""
    batch, extractor = images(7), VisionFeatures(str(folders[kind]), batch_size=4)
    whole = VisionFeatures(str(folders[kind]))(batch)
    others = [VisionFeatures(str(folders[kind]), size)(batch) for size in (1, 3)]
    others += [torch.cat([extractor(batch[:5]), extractor(batch[5:])]), extractor(batch[::-1]).flip(0)]
    for features in others:
        assert ((features - whole).norm(dim=1) / whole.norm(dim=1)).max() < 1e-6


def test_arrays_as_pillow_makes_them(folders: dict[str, Path]) -> None:
    """Read-only, and mirrored without a copy."""
    batch = images(2)
    batch.setflags(write=False)
    extractor = VisionFeatures(str(folders["dinov2"]))
    mirrored = extractor(batch[:, :, ::-1])
    torch.testing.assert_close(mirrored, extractor(batch[:, :, ::-1].copy()))
    assert not torch.allclose(mirrored, extractor(batch))


def test_convolutions_are_not_rounded_on_a_gpu(folders: dict[str, Path], inception: Any) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(*_: Any) -> None:
        cudnn = torch.backends.cudnn
        seen.append((cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))

    vision, fidelity = VisionFeatures(str(folders["dinov2"])), InceptionFeatures()
    for module in (vision.module, fidelity._net):
        module.register_forward_pre_hook(look)
    vision(images(1)), fidelity(images(1))
    assert seen == [(False, True, False)] * 2


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_none(folders: dict[str, Path], inception: Any, size: int) -> None:
    with pytest.raises(ValueError, match="batch_size >= 1"):
        VisionFeatures(str(folders["dinov2"]), size)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        InceptionFeatures(size)


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
    expected = VisionFeatures(str(folders["dinov2"]))
    assert expected.weights_hash == hash_weights(model, expected.preprocessing.identity())
    assert expected.weights_hash == VisionFeatures(str(save(model, tmp_path / "copy"))).weights_hash
    with torch.no_grad():
        model.layernorm.bias.view(-1)[0] += 1e-3
    assert VisionFeatures(str(save(model, tmp_path / "other"))).weights_hash != expected.weights_hash


def test_another_resize_is_another_extractor(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the same weights: or statistics of real images would be taken for those of generated ones resized otherwise."""
    bicubic, bilinear = (
        VisionFeatures(str(path)) for path in (folders["vit"], save(build("vit"), tmp_path, resample=2))
    )
    assert not torch.allclose(bicubic(images(2)), bilinear(images(2)), rtol=1e-3, atol=1e-3)
    assert bicubic.weights_hash != bilinear.weights_hash


def test_sizes_that_a_checkpoint_without_a_resize_does_not_take(folders: dict[str, Path], tmp_path: Path) -> None:
    extractor = VisionFeatures(str(save(build("vit"), tmp_path, do_resize=False, size=None, resample=None)))
    fits = images(2, SIDE)
    torch.testing.assert_close(extractor(fits), VisionFeatures(str(folders["vit"]))(fits))
    with pytest.raises(InputError, match=r"takes images of 48x64 at --features .*48\*64"):
        extractor(images(2, 48, 64))
    with pytest.raises(ValueError, match="expected a NumPy array of uint8") as error:
        extractor(images(2).astype(np.float32))
    assert not isinstance(error.value, InputError)


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
    with pytest.raises(InputError, match=r"vision model at --features .* lacks 1 tensors, first layernorm.bias"):
        VisionFeatures(str(tmp_path))


def test_weights_of_another_size(tmp_path: Path) -> None:
    config = save(build("dinov2"), tmp_path) / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"mlp_ratio": 4', '"mlp_ratio": 3'), encoding="utf-8")
    with pytest.raises(
        InputError, match="a vision model at --features .* tensors of other shapes .*, first encoder.*mlp"
    ):
        VisionFeatures(str(tmp_path))


def test_the_probe_looks_twice_at_a_picture_that_fits(tmp_path: Path) -> None:
    """A checkpoint without a resize is probed at its own size, not at one that it would refuse."""
    assert VisionFeatures(str(save(build("vit"), tmp_path, do_resize=False))).dim == WIDTH


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


def test_inception_whose_torchvision_is_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("torch_fidelity"):
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        InputError, match=r"nms does not exist; pip install 'stepdistill\[inception\]'.*fits your torch"
    ):
        InceptionFeatures()


def test_inception_without_weights(inception: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("no network"), EOFError("no network"), pickle.UnpicklingError("no network")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(inception, "FeatureExtractorInceptionV3", fail)
        with pytest.raises(InputError, match="weights for --features inception, got: no network; .*checkpoints"):
            InceptionFeatures()


def test_open_features(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # importing it fails: only "inception" may need it
    shipped = open_features("demo")
    assert isinstance(shipped, JudgeFeatures) and shipped.weights_hash == hash_weights(Judge.load(DEMO_JUDGE))
    judge = Judge({"shape": 3}, 16, 4, 6)
    assert open_features("demo", judge).weights_hash == hash_weights(judge)
    assert isinstance(open_features(str(folders["vit"])), VisionFeatures)
    with pytest.raises(InputError, match="64x64 images for --features demo, got 48x48.*give --features a vision model"):
        shipped(images(2))
