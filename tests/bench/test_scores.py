"""Scores of single images: the judge against the labels that the world knows, CLIP against its own model's logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vision import build, images, pixels, save, tokenizer

from stepdistill.bench.features import Images, to_images, to_pixels
from stepdistill.bench.judge import Judge
from stepdistill.bench.scores import ClipScore, JudgeAccuracy, Scorer
from stepdistill.demo.world import ATTRIBUTES, TEST_SEED, World
from stepdistill.errors import InputError
from stepdistill.families.loading import DEMO_JUDGE

# --- prompt accuracy

WORLD, N = World(TEST_SEED), 48


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(DEMO_JUDGE)


@pytest.fixture(scope="module")
def real() -> Images:
    return to_images(WORLD.pixels(range(N)))


@torch.inference_mode()
def test_accuracy_by_hand(judge: Judge, real: Images) -> None:
    """Half of the images are of other captions, so both answers are there."""
    shown = np.concatenate([real[: N // 2], real[: N // 2]])
    scorer: Scorer = JudgeAccuracy(judge)
    scores = scorer(WORLD.captions(range(N)), shown)
    assert scorer.names == (*ATTRIBUTES, "all") == tuple(scores)
    logits, labels = judge(to_pixels(shown)), WORLD.labels(range(N))
    every = torch.ones(N, dtype=torch.float64)
    for i, name in enumerate(ATTRIBUTES):
        right = (logits[name].argmax(1) == labels[:, i]).double()
        assert torch.equal(scores[name], right) and 0 < right.mean() < 1
        every *= right
    assert torch.equal(scores["all"], every) and scores["all"].dtype == torch.float64
    assert every[: N // 2].mean() > 0.9 and every[N // 2 :].mean() < 0.1


def test_accuracy_goes_by_the_caption(judge: Judge, real: Images) -> None:
    order = np.random.default_rng(0).permutation(N)
    captions = WORLD.captions(range(N))
    scores, mixed = (
        JudgeAccuracy(judge)(captions, real),
        JudgeAccuracy(judge)([captions[i] for i in order], real[order]),
    )
    for name, values in scores.items():
        assert torch.equal(values[order], mixed[name])
    same = JudgeAccuracy(judge)([captions[3]] * 2, real[[3, 3]])
    assert same["all"].tolist() == [scores["all"][3]] * 2


def test_accuracy_of_what_it_cannot_read(judge: Judge, real: Images) -> None:
    with pytest.raises(InputError, match="'a cat'.*--prompts demo"):
        JudgeAccuracy(judge)(["a cat"], real[:1])
    with pytest.raises(InputError, match="--features"):
        JudgeAccuracy(judge)(WORLD.captions([0]), real[:1, :32, :32])
    with pytest.raises(ValueError, match="a judge of"):
        JudgeAccuracy(Judge({"shape": 3}, 16, 4, 6))


# --- CLIP score

PROMPTS = ["a cat", "two dogs, 1 house", "x", "the end of it", "a cat", "blue"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build("clip"), tmp_path_factory.mktemp("clip"))
    tokenizer().save_pretrained(str(folder))
    return folder


@torch.inference_mode()
def raw(prompts: list[str], batch: Images) -> torch.Tensor:
    """100 cos of every image with its prompt, by the logits of the whole model."""
    tokens = tokenizer()(prompts, padding=True, return_tensors="pt")
    model = build("clip")
    logits = model(pixel_values=pixels(batch), **tokens).logits_per_image
    return 100 * (logits / model.logit_scale.exp()).diagonal().double()


class Parts:
    """A CLIP as torchmetrics asks for it: embeddings themselves, which transformers 5 hands out among other outputs."""

    def __init__(self) -> None:
        self.model = build("clip")
        self.config = self.model.config

    def to(self, device: Any) -> Parts:
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.model.get_image_features(pixel_values)
        return found if isinstance(found, torch.Tensor) else found.pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.model.get_text_features(input_ids, attention_mask)
        return found if isinstance(found, torch.Tensor) else found.pooler_output


@torch.inference_mode()
def torchmetrics_scores(prompts: list[str], batch: Images) -> torch.Tensor:
    """What torchmetrics gives for each image alone."""
    from torchmetrics.functional.multimodal import clip_score

    def processor(text: Any = None, images: Any = None, **options: Any) -> Any:
        if text is not None:
            return tokenizer()(text, **options)
        return {"pixel_values": pixels(torch.stack(images).permute(0, 2, 3, 1).numpy())}

    model, levels = Parts(), torch.from_numpy(batch).permute(0, 3, 1, 2)
    values = [clip_score([x], [p], lambda: (model, processor)) for p, x in zip(prompts, levels, strict=True)]
    return torch.stack(values).double()


def test_clip_score_is_that_of_torchmetrics(clip: Path) -> None:
    scorer: Scorer = ClipScore(str(clip), batch_size=4)
    prompts, batch = PROMPTS * 4, images(24)
    scores, expected = scorer(prompts, batch), raw(prompts, batch)
    assert scorer.names == ("clip",) == tuple(scores)
    assert scores["clip"].dtype == torch.float64
    # the maximum with 0 has something to do, for each image alone
    assert (expected < -0.1).any() and (expected > 0.1).any()
    torch.testing.assert_close(scores["clip"], expected.clamp(min=0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores["clip"], torchmetrics_scores(prompts, batch), rtol=1e-5, atol=1e-4)


def test_clip_score_is_each_images_own(clip: Path) -> None:
    """Whatever batch, order and neighbours an image and its prompt come with."""
    batch, order = images(6), [4, 0, 5, 2, 1, 3]
    whole = ClipScore(str(clip))(PROMPTS, batch)["clip"]
    assert whole.std() > 0.1
    mixed = ClipScore(str(clip), batch_size=1)([PROMPTS[i] for i in order], batch[order])["clip"]
    torch.testing.assert_close(mixed, whole[order], rtol=1e-6, atol=1e-6)
    short, long = (ClipScore(str(clip))._embed(["x", other]) for other in ("b", "the end of it all"))
    assert torch.equal(short[0], long[0])  # to the last bit: all texts are padded to one length
    alone = ClipScore(str(clip), batch_size=5)(PROMPTS[2:3], batch[2:3])["clip"]
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-6, atol=1e-6)


def test_long_prompts_are_cut_with_a_warning(clip: Path) -> None:
    scorer, batch = ClipScore(str(clip)), images(2)
    with pytest.warns(UserWarning, match="reads 24 tokens of a prompt: 1 of 2 prompts are longer"):
        scores = scorer(["a" * 200, "b"], batch)
    fits = scorer(["a" * 22, "b"], batch)[
        "clip"
    ]  # beside the two tokens at its ends; no warning, which would be an error
    torch.testing.assert_close(scores["clip"], fits)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        scorer(["a" * 23], batch[:1])


def test_hash_of_both_towers_and_the_resize(clip: Path, tmp_path: Path) -> None:
    hashes = [ClipScore(str(clip)).weights_hash]
    assert hashes[0] == ClipScore(str(clip)).weights_hash
    for part in ("text_projection", "visual_projection", None):
        model = build("clip")
        if part is not None:
            with torch.no_grad():
                model.get_submodule(part).weight[0, 0] += 1
        folder = save(model, tmp_path / str(part), resample=3 if part else 2)
        tokenizer().save_pretrained(str(folder))
        hashes.append(ClipScore(str(folder)).weights_hash)
    assert len(set(hashes)) == 4


def test_a_clip_in_half_precision_runs_in_float32(clip: Path, tmp_path: Path) -> None:
    tokenizer().save_pretrained(str(save(build("clip").half(), tmp_path)))
    scorer = ClipScore(str(tmp_path))
    parts = (scorer._text, scorer._vision.module)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    batch = images(6)
    torch.testing.assert_close(
        scorer(PROMPTS, batch)["clip"], ClipScore(str(clip))(PROMPTS, batch)["clip"], rtol=0.02, atol=0.5
    )


def test_what_is_no_clip(tmp_path: Path) -> None:
    for kind in ("dinov2", "projected"):
        with pytest.raises(InputError, match="expected a CLIP at --clip "):
            ClipScore(str(save(build(kind), tmp_path / kind)))
    with pytest.raises(InputError, match="--clip .*nothing of the kind"):
        ClipScore(str(tmp_path / "gone"))
    bare = save(build("clip"), tmp_path / "bare")
    with pytest.raises(InputError, match="--clip .*token"):
        ClipScore(str(bare))
    tokenizer("abc").save_pretrained(str(bare))
    with pytest.raises(InputError, match=r"a tokenizer of \d+ tokens at --clip .*, got 8; save the CLIP's own"):
        ClipScore(str(bare))


def test_a_missing_weight_of_the_text_is_not_drawn_at_random(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clip, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("text_model.final_layer_norm.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="all weights of the text model at --clip .* lacks 1 tensors, first .*norm.bias"
    ):
        ClipScore(str(folder))


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"], "ab"])
def test_a_prompt_for_each_image(clip: Path, judge: Judge, prompts: list[str]) -> None:
    for scorer in (ClipScore(str(clip)), JudgeAccuracy(judge)):
        with pytest.raises(ValueError, match="a prompt for each of 2 images"):
            scorer(prompts, images(2))
