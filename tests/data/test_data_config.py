from pathlib import Path
from typing import Any

import pytest

from stepdistill.data.config import DataConfig
from stepdistill.errors import InputError


@pytest.mark.parametrize("resolution", [-8, 0, 100])
def test_resolution_must_be_a_multiple_of_eight(resolution: int):
    with pytest.raises(InputError, match=rf"multiple of 8 pixels, got resolution {resolution}; fix --data.resolution"):
        DataConfig(resolution=resolution)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEPDISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert DataConfig().cache_folder() == Path("~/.cache/stepdistill").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert DataConfig().cache_folder() == Path("/xdg/stepdistill")
    monkeypatch.setenv("STEPDISTILL_CACHE", "/own")
    assert DataConfig().cache_folder() == Path("/own")
    assert DataConfig(cache_dir="/given").cache_folder() == Path("/given")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": 0}, "variants >= 1"),
        ({"num_inference_steps": 0}, "num_inference_steps >= 1"),
        ({"demo_images": 0}, "demo_images >= 1"),
        ({"encode_batch_size": 0}, "encode_batch_size >= 1"),
        ({"split": ""}, "empty split"),
        ({"image_column": ""}, "empty image_column"),
        ({"caption_column": ""}, "empty caption_column"),
        ({"path": ""}, "empty path"),
        ({"max_bad_fraction": 1.0}, r"share in \[0, 1\)"),
        ({"max_bad_fraction": -0.1}, r"share in \[0, 1\)"),
        ({"max_bad_fraction": float("nan")}, r"share in \[0, 1\)"),
        ({"guidance_scale": -1.0}, "guidance scale >= 0"),
        ({"guidance_scale": float("inf")}, "guidance scale >= 0"),
        ({"guidance_scale": float("nan")}, "guidance scale >= 0"),
        ({"variants": 2}, r"at most 1 variants.*--data\.variants"),
        ({"variants": 3, "random_flip": True}, "at most 2 variants"),
    ],
)
def test_each_option_is_checked_and_named(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as error:
        DataConfig(**options)
    assert f"--data.{next(iter(options))}" in str(error.value)


def test_variants_that_differ_are_allowed():
    DataConfig(variants=2, random_flip=True)
    DataConfig(variants=9, center_crop=False)
