"""Resize, crop and normalisation: by hand, and as the checkpoints' own image processors do it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vision import MEAN, SETTINGS, SIDE, STD, build, images, pixels, save

from stepdistill.bench.extractors import VisionFeatures
from stepdistill.errors import InputError
from stepdistill.families.preprocessing import Preprocessing


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
        ({"resample": None}, "no 'resample'"),
        ({"rescale_factor": "much"}, "much"),
        ({"keep_aspect_ratio": True}, "keep_aspect_ratio"),
        ({"ensure_multiple_of": 14}, "ensure_multiple_of"),
        ({"size_divisor": 32}, "size_divisor"),
        ({"include_top": True}, "include_top"),
        ({"offset": True}, "offset"),
        ({"crop_to_patches": True}, "crop_to_patches"),
        ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor"),
        ({"feature_extractor_type": "PerceiverFeatureExtractor"}, "PerceiverFeatureExtractor"),
        ({"do_pad": True}, "do_pad"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"do_center_crop": True}, "no 'crop_size'"),
    ],
)
def test_settings_that_are_missing_or_not_understood(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=found) as error:
        VisionFeatures(str(save(build("dinov2"), tmp_path, **change)))
    assert "--features" in str(error.value) and "preprocessor_config.json" in str(error.value)


def test_no_filter_is_needed_where_nothing_is_resized() -> None:
    assert not look(do_resize=False, resample=None).resizes
    assert look().resizes and look(size={"shortest_edge": 36}).resizes


def test_the_identity_is_all_that_changes_pixels() -> None:
    others: list[dict[str, Any]] = [
        {}, {"size": 24}, {"size": {"shortest_edge": 32}}, {"crop_size": 24}, {"image_mean": (0.4, 0.5, 0.5)},
        {"image_std": (0.2, 0.2, 0.3)}, {"resample": 2}, {"rescale_factor": 1 / 127.5}, {"do_resize": False},
    ]  # fmt: skip
    assert len({look(**change).identity() for change in others}) == len(others)
    assert look(image_processor_type="ViTImageProcessor", size=32).identity() == look().identity()


def test_settings_beside_the_model_or_in_the_processors_file(tmp_path: Path) -> None:
    own = save(build("dinov2"), tmp_path) / "preprocessor_config.json"
    batch, settings = images(2), json.loads(own.read_text(encoding="utf-8"))
    expected = VisionFeatures(str(tmp_path))(batch)
    own.unlink()
    with pytest.raises(InputError, match=r"preprocessor_config.json at --features .* got none"):
        VisionFeatures(str(tmp_path))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}), encoding="utf-8")
    torch.testing.assert_close(VisionFeatures(str(tmp_path))(batch), expected)


# Image processors of models that see one picture at once, and whether they are refused; all are asked with their defaults.
PROCESSORS = {
    "beit": "Beit", "bit": "Bit", "blip": "Blip", "chinese_clip": "ChineseCLIP", "clip": "CLIP", "convnext": "ConvNext",
    "deit": "DeiT", "dpt": "DPT", "flava": "Flava", "mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2",
    "owlvit": "OwlViT", "poolformer": "PoolFormer", "pvt": "Pvt", "segformer": "Segformer", "siglip": "Siglip", "vit": "ViT",
}  # fmt: skip
REFUSED = {
    "efficientnet": "EfficientNet", "glpn": "GLPN", "imagegpt": "ImageGPT", "levit": "Levit", "mobilevit": "MobileViT",
    "perceiver": "Perceiver", "siglip2": "Siglip2", "textnet": "TextNet",
}  # fmt: skip


def processor_of(kind: str, name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
    processor = module.__dict__[f"{name}ImageProcessorPil"](**changes)
    return processor, json.loads(processor.to_json_string())


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 261), (261, 300)])
def test_as_the_image_processors_that_use_pillow(kind: str, height: int, width: int) -> None:
    small = {"size": {"shortest_edge": 56}} if kind == "convnext" else {}  # below the size from which it warps
    batch = images(2, height, width)
    for changes in ({}, small):
        processor, settings = processor_of(kind, PROCESSORS[kind], **changes)
        expected = processor([Image.fromarray(image) for image in batch], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(Preprocessing.read(settings, "here", "")(batch), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", REFUSED)
def test_image_processors_that_do_something_else(kind: str) -> None:
    _, settings = processor_of(kind, REFUSED[kind])
    with pytest.raises(InputError, match="image settings in the preprocessor_config.json of --features 'x'.*; fix it"):
        Preprocessing.read(settings, "--features 'x'", "fix it")


def test_what_convnext_keeps_where_its_settings_dont_say() -> None:
    processor, settings = processor_of("convnext", "ConvNext", size={"shortest_edge": 28}, crop_pct=224 / 256)
    assert settings.pop("crop_pct") and settings["image_processor_type"] == "ConvNextImageProcessor"
    batch = images(1, 40, 61)
    expected = processor([Image.fromarray(batch[0])], return_tensors="pt")["pixel_values"]
    older = {**settings, "image_processor_type": None, "feature_extractor_type": "ConvNextFeatureExtractor"}
    for form in (settings, {**settings, "crop_pct": None}, older):
        torch.testing.assert_close(Preprocessing.read(form, "here", "")(batch), expected, rtol=0, atol=2e-6)
