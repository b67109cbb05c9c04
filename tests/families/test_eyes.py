"""Vision checkpoints as eyes: the stock model's hidden states of the patches, at the size it takes, or an error with a fix."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from vision import MEAN, STD, WIDTH, build, images, pixels, save

from stepdistill.errors import InputError
from stepdistill.families import EyeConfig, eyes, open_eye
from stepdistill.families.eyes import _options

EXACT = {"rtol": 0, "atol": 0}
SIGHTED = ("vit", "dinov2", "clip", "siglip", "unprojected", "registers")


def registers() -> torch.nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    from vision import SEES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SEES, num_register_tokens=3)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("eyes")
    kinds = (*SIGHTED, "convnext", "masked", "text")
    return {kind: save(registers() if kind == "registers" else build(kind), root / kind) for kind in kinds}


def shown(batch: np.ndarray) -> torch.Tensor:
    """Pixels [n, 3, H, W] in [-1, 1] of images."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("kind", SIGHTED)
def test_maps_are_the_stock_models_hidden_states_of_the_patches(folders: dict[str, Path], kind: str) -> None:
    eye = open_eye(EyeConfig(str(folders[kind])))
    assert len(eye.names) == 2 and eye.names[1].endswith(".1") and eye.size == (32, 32)
    stock = registers() if kind == "registers" else build(kind)
    stock = stock.vision_model if kind in ("clip", "siglip") else stock
    batch = images(3, 32)
    with torch.no_grad():
        wanted = stock(pixel_values=pixels(batch), output_hidden_states=True).hidden_states[1:]
        found = eye(shown(batch))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == (3, WIDTH, 4, 4)
        assert_close(mine.flatten(2).transpose(1, 2), theirs[:, -16:], rtol=1e-4, atol=1e-4)
    assert float(found[0].std((2, 3)).mean()) > 0.01, "places differ"


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_gradients_reach_the_pixels_and_the_checkpoint_stays(folders: dict[str, Path], kind: str) -> None:
    eye = open_eye(EyeConfig(str(folders[kind])))
    before = {name: value.clone() for name, value in eye.net.module.state_dict().items()}
    x = shown(images(2, 40)).requires_grad_(True)
    sum(m.square().sum() for m in eye(x)).backward()
    assert x.grad is not None and bool((x.grad.abs().amax((0, 1)) > 0).all()), "every pixel counts"
    assert all(p.grad is None and not p.requires_grad for p in eye.net.module.parameters())
    assert_close(dict(eye.net.module.state_dict()), before, **EXACT)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip", "registers"])
def test_another_size_than_the_checkpoints(folders: dict[str, Path], kind: str) -> None:
    """Position embeddings are interpolated; near its own size a picture is seen much the same."""
    own, larger = (open_eye(EyeConfig(str(folders[kind]), size)) for size in (None, 48))
    x = shown(images(2, 48))
    with torch.no_grad():
        small, large = own(x)[-1], larger(x)[-1]
    assert (small.shape, large.shape) == ((2, WIDTH, 4, 4), (2, WIDTH, 6, 6))
    assert larger.options == ({"interpolate_pos_encoding": True} if kind in ("vit", "clip", "siglip") else {})
    assert own.options == {}


def test_sizes_that_a_checkpoint_does_not_take(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"multiple of 8 pixels, the backbone's patch, got 36x36; fix --eye\.size \(32|40"
    ):
        open_eye(EyeConfig(str(folders["dinov2"]), 36))
    monkeypatch.setattr(eyes, "_options", lambda *_: {})  # a model whose position embeddings can't be interpolated
    for kind in ("vit", "clip"):
        with pytest.raises(
            InputError, match=r"a vision model that takes pictures of 48x48 \(--eye\.size\) at --eye\.path"
        ):
            open_eye(EyeConfig(str(folders[kind]), 48))


def test_only_models_that_take_the_option_are_told_to_interpolate() -> None:
    net = build("vit")
    assert _options(net, (48, 48), (32, 32)) and not _options(net, (32, 32), (32, 32))
    assert not _options(build("dinov2"), (48, 48), (32, 32))


def test_settings_of_the_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    """The size is the crop's where there is one; mean and std are in the units of its own scale; its filter."""
    one = open_eye(EyeConfig(str(folders["vit"])))
    assert_close((one._mean.flatten(), one._std.flatten()), (torch.tensor(MEAN), torch.tensor(STD)))
    assert not one.bilinear
    cropped = {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True}
    scaled = {"rescale_factor": 1 / 127.5, "image_mean": [0.8, 1.0, 1.2], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    other = open_eye(EyeConfig(str(save(build("dinov2"), tmp_path / "other", **cropped, **scaled))))
    assert other.size == (48, 48) and other.bilinear
    assert_close((other._mean, other._std), (one._mean, one._std))
    square = open_eye(EyeConfig(str(save(build("dinov2"), tmp_path / "square", size=40))))
    assert square.size == (40, 40)
    none = {"do_resize": False, "size": None, "resample": None}
    assert open_eye(EyeConfig(str(save(build("dinov2"), tmp_path / "none", **none)))).size == (32, 32)


def test_an_eye_sees_the_same_picture_the_same_way(folders: dict[str, Path], tmp_path: Path) -> None:
    """A masked autoencoder that hides nothing still draws an order of the patches at each call."""
    folder = Path(shutil.copytree(folders["masked"], tmp_path / "masked"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mask_ratio": 0.0}))
    with pytest.raises(InputError, match=r"others at each call \(masked autoencoders"):
        open_eye(EyeConfig(str(folder)))


@pytest.mark.parametrize(
    ("kind", "taps", "said"),
    [
        ("masked", None, r"got \(1, 5, 16\); tap another module .* DINOv2"),
        ("text", None, r"--eye\.path"),
        ("vit", ["layers.0", "nowhere"], r"'nowhere'; fix --method\.taps"),
        ("vit", ["pooler"], r"at 'pooler', got \(1, 16\)"),
        ("vit", [], "one tap or more"),
    ],
)
def test_what_is_no_eye(folders: dict[str, Path], kind: str, taps: list[str] | None, said: str) -> None:
    if taps and taps[0] == "layers.0":
        taps[0] = open_eye(EyeConfig(str(folders["vit"]))).names[0]
    with pytest.raises(InputError, match=said):
        open_eye(EyeConfig(str(folders[kind])), taps)


def test_maps_of_convolutional_networks_and_taps_by_name(folders: dict[str, Path]) -> None:
    eye = open_eye(EyeConfig(str(folders["convnext"])), ["encoder.stages.1", "encoder.stages.0"])
    assert [tuple(m.shape) for m in eye(shown(images(1, 32)))] == [(1, 8, 4, 4), (1, 8, 8, 8)]


def test_paths_without_an_eye(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--eye\.path.*nothing of the kind there"):
        open_eye(EyeConfig(str(tmp_path / "nothing")))
    save(build("dinov2"), tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json at --eye\.path"):
        open_eye(EyeConfig(str(tmp_path / "bare")))


def test_pooled_features(folders: dict[str, Path]) -> None:
    batch = images(2, 32)
    with torch.no_grad():
        for kind, key in (("dinov2", "pooler_output"), ("clip", "image_embeds")):
            stock = build(kind)
            wanted = (
                stock.visual_projection(stock.vision_model(pixel_values=pixels(batch)).pooler_output)
                if key == "image_embeds"
                else stock(pixel_values=pixels(batch))[key]
            )
            found = open_eye(EyeConfig(str(folders[kind]))).pooled(shown(batch))
            assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_needs_no_torchvision(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert open_eye(EyeConfig(str(folders["dinov2"])))(shown(images(1, 32)))
