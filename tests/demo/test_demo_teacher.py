"""The demo teacher's parts and stages."""

from __future__ import annotations

import math
import re

import pytest
import torch

from stepdistill.bench.judge import Judge
from stepdistill.demo import stages, teacher
from stepdistill.demo.world import ATTRIBUTES, World, tokens, vocabulary
from stepdistill.errors import InputError
from stepdistill.families.schedules import from_scheduler
from stepdistill.randomness import StepRandom

WORLD = World(7)
CAPTION = "a red circle left of a blue star on white stripes"


def rng(size: int, step: int = 0) -> StepRandom:
    return StepRandom(0, step, range(size))


@pytest.fixture(scope="module")
def tokenizer():
    return teacher.tokenizer()


# --- tokenizer


def test_merges_make_whole_words_in_rank_order():
    assert teacher.merge_rules(["ab", "abc", "b"]) == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    ids = tokenizer(WORLD.captions(range(300)), padding="max_length", truncation=True, return_tensors="pt").input_ids
    framed = {*teacher.word_ids(tokenizer).tolist(), tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert set(ids.flatten().tolist()) <= framed
    assert bool((ids[:, -1] == tokenizer.eos_token_id).all())  # nothing was cut off: the end is padding


def test_the_longest_caption_fits_with_its_frame(tokenizer):
    captions = WORLD.captions(range(1500))
    lengths = [len(tokens(caption)) for caption in captions]
    assert max(lengths) == 18 <= teacher.MAX_TOKENS - 2
    longest = captions[lengths.index(18)]
    assert len(tokenizer(longest).input_ids) == 20


def test_tokenizer_round_trip_and_foreign_words(tmp_path, tokenizer):
    from transformers import CLIPTokenizer

    teacher.build_tokenizer(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.model_max_length, loaded.unk_token) == (teacher.MAX_TOKENS, teacher.UNKNOWN)
    assert loaded.pad_token_id == loaded.eos_token_id
    for text in ("a RED circle", "a fluffy dog, 3 cafés\n near 日本", "", WORLD.captions([3])[0]):
        ids = loaded(text, truncation=True).input_ids
        assert ids == tokenizer(text, truncation=True).input_ids
        assert ids[0] == loaded.bos_token_id and ids.count(loaded.eos_token_id) == 1 and ids[-1] == loaded.eos_token_id
    assert loaded.unk_token_id in loaded("日本").input_ids
    assert loaded.decode(loaded("a RED circle").input_ids, skip_special_tokens=True) == "a red circle"
    assert loaded.get_vocab().keys() >= {word + teacher.WORD_END for word in ("stripes", "checkered", "under")}


# --- networks


def test_sizes_are_those_that_docstrings_state(tokenizer):
    parts = {
        teacher.unet: teacher.unet(), teacher.text_model: teacher.text_model(tokenizer),
        teacher.autoencoder: teacher.autoencoder(), teacher.judge: teacher.judge(),
    }  # fmt: skip
    for build, made in parts.items():
        stated = re.match(r"(\d+\.\d+) M parameters", build.__doc__)[1]
        decimals = len(stated.split(".")[1])
        assert f"{teacher.parameters(made) / 1e6:.{decimals}f}" == stated, build
    assert teacher.parameters(parts[teacher.unet]) <= 3_500_000
    assert 2 * sum(teacher.parameters(made) for made in parts.values()) <= 12e6  # bytes in fp16


def test_unet_takes_the_autoencoders_latents(tokenizer):
    """Latents of a quarter of the resolution, and text of any length that the tokenizer allows."""
    vae, unet = teacher.autoencoder(), teacher.unet()
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 4
    assert unet.config.sample_size * 4 == vae.config.sample_size == 64
    text = torch.randn(2, teacher.MAX_TOKENS, teacher.TEXT_WIDTH)
    with torch.no_grad():
        out = unet(torch.randn(2, teacher.LATENT_CHANNELS, 16, 16), torch.tensor([999, 1]), text).sample
        pixels = vae.decode(out).sample
    assert out.shape == (2, teacher.LATENT_CHANNELS, 16, 16) and pixels.shape == (2, 3, 64, 64)
    attending = {name for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert attending and not any(
        name.startswith(("down_blocks.0", "up_blocks.2")) for name in attending
    )  # not on 16x16


def test_schedule_ends_in_pure_noise_and_steps_end_in_clean_data():
    scheduler = teacher.scheduler()
    schedule, kind = from_scheduler(scheduler.config)
    assert kind == "v" and schedule.zero_terminal_snr
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    v = torch.randn(2, 4, 16, 16)
    # one step from alpha = 0, sigma = 1: x0 = alpha x - sigma v = -v, and at t = 0 nothing else is left
    torch.testing.assert_close(scheduler.step(v, 999, torch.randn(2, 4, 16, 16)).prev_sample, -v)


def test_autoencoder_posterior_begins_narrow():
    with torch.no_grad():
        posterior = teacher.autoencoder().encode(WORLD.pixels(range(4))).latent_dist
    assert posterior.mean.shape == (4, teacher.LATENT_CHANNELS, 16, 16)
    assert float(posterior.std.max()) < 0.2
    assert float(posterior.mean.std()) > float(posterior.std.mean())  # 1.5 to 5 times it, by the first weights


def test_saved_teacher_loads_in_stock_diffusers_and_takes_one_step(tmp_path, tokenizer):
    from diffusers import StableDiffusionPipeline

    vae = teacher.autoencoder()
    factor = stages.set_scaling_factor(vae, WORLD.pixels(range(16)))
    teacher.save(tmp_path, tokenizer, teacher.text_model(tokenizer).half(), vae, teacher.unet())
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= 11e6
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)  # as users do, without a dtype
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == pytest.approx(factor)
    with torch.no_grad():
        images = pipeline([CAPTION, "a dog"], num_inference_steps=1, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 3, 64, 64) and bool(images.isfinite().all())


def test_judge_round_trip_and_shapes(tmp_path):
    judge = teacher.judge().eval()
    pixels = WORLD.pixels(range(3))
    logits = judge(pixels)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        n: (3, len(v)) for n, v in ATTRIBUTES.items()
    }
    assert judge.features(pixels).shape == (3, judge.dim)
    torch.testing.assert_close(judge.features(3 * pixels), judge.features((3 * pixels).clamp(-1, 1)))
    judge.save(tmp_path, dtype=torch.float32)
    loaded = Judge.load(tmp_path)
    for name in ATTRIBUTES:
        torch.testing.assert_close(loaded(pixels)[name], logits[name], rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    judge.save(tmp_path)
    torch.testing.assert_close(Judge.load(tmp_path).features(pixels), judge.features(pixels), rtol=0, atol=0.02)
    assert (tmp_path / "judge.safetensors").stat().st_size <= 1_200_000


def test_judge_refuses_other_sizes_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="expected pixels"):
        teacher.judge()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"no judge\.safetensors"):
        Judge.load(tmp_path)


# --- stages


def test_data_is_the_world():
    data = stages.WorldPixels(WORLD, 9)
    batch = data.batch([8, 2], rng(2))
    assert len(data) == 9
    torch.testing.assert_close(batch.data(), WORLD.pixels([8, 2]), rtol=0, atol=1e-6)
    assert torch.equal(batch.extra["labels"], WORLD.labels([8, 2])) and batch.extra["labels"].shape == (2, 7)


def test_clutter_is_inserted_and_overflow_cut():
    ids = torch.tensor([[0, 5, 6, 7, 1, 1]] * 3)
    fragments = torch.tensor([[90, 91, 92, 93, 94, 95]] * 3)
    out = stages.insert_clutter(ids, torch.tensor([0, 2, 3]), torch.tensor([1, 2, 4]), fragments, end=1)
    assert out.tolist() == [[0, 5, 6, 7, 1, 1], [0, 5, 92, 93, 6, 1], [0, 5, 6, 7, 94, 1]]


def test_clutter_hits_its_share_and_keeps_the_frame(tokenizer):
    data = stages.WorldCaptions(WORLD, 200, tokenizer)
    method = stages.TextNaming(stages.TextNamingConfig(clutter=0.3), teacher.text_model(tokenizer), tokenizer)
    batch = data.batch(range(200), rng(200))
    clean, cluttered = batch.extra["input_ids"], method.cluttered(batch)
    changed = (clean != cluttered).any(1)
    assert 0.2 < float(changed.float().mean()) < 0.4
    assert bool((cluttered[:, 0] == tokenizer.bos_token_id).all())
    words = set(teacher.word_ids(tokenizer).tolist())
    for before, after in zip(clean[changed].tolist(), cluttered[changed].tolist(), strict=True):
        assert [i for i in after if i in words] == [i for i in before if i in words]


def test_kl_and_edges_in_closed_form():
    mean, logvar = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(stages.kl_to_standard(mean, logvar), wanted)
    ramp = torch.arange(4.0).mul(3).expand(1, 1, 4, 4)  # rises by 3 along x, constant along y
    assert float(stages.edge_error(ramp)) == 3.0
    assert float(stages.edge_error(torch.full((1, 1, 4, 4), 7.0))) == 0.0


def test_autoencoding_weighs_its_terms_and_rejects_negative_ones():
    vae = teacher.autoencoder()
    batch = stages.WorldPixels(WORLD, 2).batch([0, 1], rng(2))
    with torch.no_grad():
        one = stages.Autoencoding(stages.AutoencodingConfig(1.0, 1.0, 1.0, 1.0), vae).training_step(batch).terms
        other = stages.Autoencoding(stages.AutoencodingConfig(0.0, 2.0, 3.0, 0.5), vae).training_step(batch).terms
    for name, weight in {"l1": 0.0, "l2": 2.0, "edge": 3.0, "kl": 0.5}.items():
        assert float(one[name]) > 0
        torch.testing.assert_close(other[name], weight * one[name])
    with pytest.raises(InputError, match="kl_weight"):
        stages.AutoencodingConfig(kl_weight=-1.0)


def test_scaling_factor_gives_unit_std():
    vae, pixels = teacher.autoencoder(), WORLD.pixels(range(64))
    stages.set_scaling_factor(vae, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.manual_seed(0)
    latents = (posterior.mean + posterior.std * torch.randn_like(posterior.mean)) * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=0.02)


def test_judge_augmentation_is_off_at_zero_and_moves_by_whole_pixels():
    batch = stages.WorldPixels(WORLD, 40).batch(range(40), rng(40))
    still = stages.Judging(stages.JudgingConfig(noise=0.0, blur=0.0, shift=0), teacher.judge())
    torch.testing.assert_close(still.augmented(batch), batch.data(), rtol=0, atol=0)
    moved = stages.Judging(stages.JudgingConfig(noise=0.0, blur=0.0, shift=1), teacher.judge()).augmented(batch)
    x0 = batch.data()
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    inner = [torch.roll(x0, move, (2, 3))[:, :, 1:-1, 1:-1] for move in shifts]
    error = torch.stack([(image - moved[:, :, 1:-1, 1:-1]).abs().flatten(1).amax(1) for image in inner])
    torch.testing.assert_close(error.amin(0), torch.zeros(40))
    assert len(set(error.argmin(0).tolist())) > 4


def test_naming_loss_of_ignorance_is_the_log_of_the_choices():
    labels = WORLD.labels(range(6))
    logits = {name: torch.zeros(6, len(values)) for name, values in ATTRIBUTES.items()}
    wanted = sum(math.log(len(values)) for values in ATTRIBUTES.values())
    assert float(stages.naming_loss(logits, labels)) == pytest.approx(wanted, rel=1e-5)


def test_accuracy_counts_by_attribute_and_jointly():
    labels = WORLD.labels(range(4))

    class Oracle(Judge):
        def forward(self, pixels):
            logits = {}
            for i, (name, values) in enumerate(ATTRIBUTES.items()):
                said = labels[:, i].clone()
                if name == "second shape":
                    said[0] = (said[0] + 1) % len(values)
                logits[name] = torch.nn.functional.one_hot(said, len(values)).float()
            return logits

    found = stages.attribute_accuracy(Oracle({"second shape": 6}), WORLD.pixels(range(4)), labels)
    assert found == {**dict.fromkeys(ATTRIBUTES, 1.0), "second shape": 0.75, "all": 0.75}
    assert len(found) == 8


@pytest.mark.parametrize("stage", ["text", "autoencoder", "judge"])
def test_a_stage_learns_and_repeats_itself(stage, tokenizer):
    def losses() -> list[float]:
        torch.manual_seed(0)
        size = 2 if stage == "autoencoder" else 8
        if stage == "text":
            data = stages.WorldCaptions(WORLD, 8, tokenizer)
            method = stages.TextNaming(stages.TextNamingConfig(), teacher.text_model(tokenizer), tokenizer)
        elif stage == "autoencoder":
            data = stages.WorldPixels(WORLD, 8)
            method = stages.Autoencoding(stages.AutoencodingConfig(), teacher.autoencoder())
        else:
            data = stages.WorldPixels(WORLD, 8)
            method = stages.Judging(stages.JudgingConfig(), teacher.judge())
        (phase,) = method.phases()
        optimizer = torch.optim.AdamW(method.networks()["student"].trainable(), lr=2e-3)
        found = []
        for step in range(5):
            loss = phase.loss(data.batch(range(size), rng(size, step))).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first[-1] < first[0]
    assert losses() == first
