"""Scores of single images: the judge against the labels that the world knows, CLIP against its own model's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from vision import PROJECTION, build, images, pixels, save, tokenizer

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
    """100 cos of every image with its prompt, as torchmetrics takes it from the whole model."""
    tokens = tokenizer()(prompts, padding=True, return_tensors="pt")
    model = build("clip")
    logits = model(pixel_values=pixels(batch), **tokens).logits_per_image
    return 100 * (logits / model.logit_scale.exp()).diagonal().double()


def test_clip_score_is_torchmetrics_formula(clip: Path) -> None:
    scorer: Scorer = ClipScore(str(clip), batch_size=4)
    prompts, batch = PROMPTS * 4, images(24)
    scores, expected = scorer(prompts, batch), raw(prompts, batch)
    assert scorer.names == ("clip",) == tuple(scores)
    assert scores["clip"].dtype == torch.float64
    assert (expected < -0.1).any() and (
        expected > 0.1
    ).any()  # the maximum with 0 has something to do, for each image alone
    torch.testing.assert_close(scores["clip"], expected.clamp(min=0), rtol=1e-5, atol=1e-4)


def test_clip_score_is_each_images_own(clip: Path) -> None:
    """Whatever batch, order and neighbours an image and its prompt come with."""
    batch, order = images(6), [4, 0, 5, 2, 1, 3]
    whole = ClipScore(str(clip))(PROMPTS, batch)["clip"]
    assert whole.std() > 0.1
    mixed = ClipScore(str(clip), batch_size=1)([PROMPTS[i] for i in order], batch[order])["clip"]
    torch.testing.assert_close(mixed, whole[order], rtol=1e-6, atol=1e-6)
    alone = ClipScore(str(clip), batch_size=5)(PROMPTS[2:3], batch[2:3])["clip"]
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-6, atol=1e-6)


def test_long_prompts_are_cut_with_a_warning(clip: Path) -> None:
    scorer, batch = ClipScore(str(clip)), images(2)
    with pytest.warns(UserWarning, match="reads 24 tokens of a prompt: 1 of 2 prompts are longer"):
        scores = scorer(["a" * 200, "b"], batch)
    torch.testing.assert_close(scores["clip"], scorer(["a" * 22, "b"], batch)["clip"])


def test_hash_of_both_towers(clip: Path, tmp_path: Path) -> None:
    first = ClipScore(str(clip)).weights_hash
    assert first == ClipScore(str(clip)).weights_hash
    model = build("clip")
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    tokenizer().save_pretrained(str(save(model, tmp_path)))
    assert first != ClipScore(str(tmp_path)).weights_hash
    assert model.text_projection.weight.shape[0] == PROJECTION


def test_what_is_no_clip(tmp_path: Path) -> None:
    for kind in ("dinov2", "projected"):
        with pytest.raises(InputError, match="expected a CLIP at --clip "):
            ClipScore(str(save(build(kind), tmp_path / kind)))
    with pytest.raises(InputError, match="--clip .*nothing of the kind"):
        ClipScore(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="token"):
        ClipScore(str(save(build("clip"), tmp_path / "bare")))


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"], "ab"])
def test_a_prompt_for_each_image(clip: Path, judge: Judge, prompts: list[str]) -> None:
    for scorer in (ClipScore(str(clip)), JudgeAccuracy(judge)):
        with pytest.raises(ValueError, match="a prompt for each of 2 images"):
            scorer(prompts, images(2))
