"""Checkpoints by hub id: from the cache of this machine, at a revision, or an error at once that says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vision import build, images, save, tokenizer

from stepdistill.bench.extractors import VisionFeatures, open_features
from stepdistill.bench.scores import ClipScore
from stepdistill.errors import InputError
from stepdistill.families import towers
from stepdistill.families.towers import Tower


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "hub_is_reachable", lambda: False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with a CLIP: two commits, of other weights and another filter, and names of them."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--clip"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repository.parent))
    for i, (names, commit) in enumerate({("main",): "a" * 40, ("v2", "refs/pr/1"): "b" * 40}.items()):
        model = build("clip")
        with torch.no_grad():
            model.visual_projection.weight.copy_(model.visual_projection.weight.roll(i, 0))
        tokenizer().save_pretrained(str(save(model, repository / "snapshots" / commit, resample=3 - i)))
        for name in names:
            file = repository / "refs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(commit, encoding="utf-8")
    return repository


def test_a_hub_id_from_the_cache(cache: Path, away: None) -> None:
    """Its main branch, or the revision after an @: a branch, a tag or a commit."""
    batch = images(2)
    for spec, commit in {
        "org/clip": "a",
        "org/clip@v2": "b",
        f"org/clip@{'b' * 40}": "b",
        "org/clip@": "a",
        "org/clip@refs/pr/1": "b",
    }.items():
        extractor = open_features(spec)
        folder = cache / "snapshots" / (commit * 40)
        assert extractor.name == spec and extractor.weights_hash == VisionFeatures(str(folder)).weights_hash
        torch.testing.assert_close(extractor(batch), VisionFeatures(str(folder))(batch))
    scores = [
        ClipScore(spec)(["a", "b"], batch)["clip"] for spec in ("org/clip@v2", str(cache / "snapshots" / ("b" * 40)))
    ]
    torch.testing.assert_close(*scores)
    assert not torch.allclose(scores[0], ClipScore("org/clip")(["a", "b"], batch)["clip"])


def test_what_is_not_cached_is_an_error_at_once(cache: Path, away: None) -> None:
    for spec in ("org/other", "org/clip@v3", "no such model!"):
        with pytest.raises(InputError, match="no folder here and not in the hub's cache") as error:
            open_features(spec)
        assert f"at --features, got {spec!r}" in str(error.value)
    shutil.rmtree(cache / "snapshots" / ("b" * 40))
    with pytest.raises(InputError, match="not in the hub's cache"):
        open_features("org/clip@v2")


def test_a_cache_without_the_weights(cache: Path, away: None) -> None:
    (cache / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"a vision model at --features 'org/clip@v2', got: .*give --features another"):
        open_features("org/clip@v2")


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("vit"), tmp_path / "vit@2")
    monkeypatch.chdir(tmp_path)
    for spec in ("vit@2", "./vit@2", str(tmp_path / "vit@2")):
        assert Tower.find(spec, "--features").revision is None
        assert open_features(spec).dim
    with pytest.raises(InputError, match=r"--features './vit@3', got nothing of the kind there"):
        open_features("./vit@3")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("vit"), tmp_path / "vit")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_features("~/vit").dim


# what the hub says, which can't be asked here; transformers hands its words on in an OSError
@pytest.mark.parametrize(
    "answer",
    [
        "You are trying to access a gated repo. Make sure to have access to it at https://hub/org/gated.",
        "org/gated is not a local folder and is not a valid model identifier listed on the hub.",
    ],
)
def test_what_the_hub_refuses(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def refuse(path: str, **options: Any) -> None:
        assert (path, options["local_files_only"], options["trust_remote_code"]) == ("org/gated", False, False)
        raise OSError(f"{answer}\n  403 Client Error.")

    monkeypatch.setattr(towers, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(InputError) as error:
        open_features("org/gated")
    assert f"at --features 'org/gated', got: {answer} 403 Client Error.; give --features another" in str(error.value)
    with pytest.raises(InputError, match="at --clip 'org/gated', got: .*; give --clip another"):
        ClipScore("org/gated")


def test_models_that_need_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    save(build("vit"), tmp_path)
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnet18", "model_type": "timm_wrapper"}', encoding="utf-8"
    )
    with pytest.raises(InputError, match="at --features .*timm"):
        open_features(str(tmp_path))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    save(build("vit"), tmp_path)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    with pytest.raises(InputError, match="the config of a transformers model at --features"):
        open_features(str(tmp_path))


def test_transformers_talks_as_before(tmp_path: Path) -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        with Tower("x", "--here").explained("this"):
            assert logging.get_verbosity() == logging.ERROR
        assert logging.get_verbosity() == logging.INFO
        with (
            pytest.raises(InputError, match="expected this at --here 'x', got: ValueError; give --here"),
            Tower("x", "--here").explained("this"),
        ):
            raise ValueError
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)
    with pytest.raises(InputError, match="^as it is$"), Tower("x", "--here").explained("this"):
        raise InputError("as it is")
