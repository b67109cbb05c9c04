"""Which features of a denoiser heads are put on, as maps, and the condition they are judged with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from students import LCM_TARGETS, opened, randomised
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import Flow
from stepdistill.errors import InputError
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.discriminator import DenoiserFeatures, Discriminator, sinusoids
from stepdistill.networks.lora import LoraSpec

EXACT = {"rtol": 0, "atol": 0}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def teacher_of(base: Path) -> Any:
    return opened(base).denoiser


def given(h: int, w: int, batch: int = 1) -> tuple[Tensor, Tensor, Cond]:
    t = torch.full((batch,), 0.5, dtype=torch.float64)
    return draws(batch, 4, h, w), t, {"prompt_embeds": draws(batch, 24, 16, seed=5)}


@pytest.mark.parametrize(("h", "w"), [(4, 4), (4, 8), (8, 4), (6, 10)])
def test_every_attention_block_of_a_unet_is_a_map_of_the_right_shape(base: Path, h: int, w: int) -> None:
    """Also where tokens of a whole and of a half image are as many as those of another shape."""
    teacher = teacher_of(base)
    names, shapes = teacher.tap_points, [tuple(f.shape) for f in DenoiserFeatures(teacher)(*given(h, w))]
    assert len(names) == 4
    for name, shape in zip(names, shapes, strict=True):
        assert shape == ((1, 16, h // 2, w // 2) if name.startswith("mid") else (1, 8, h, w)), name


def test_tokens_lie_in_rows_of_the_image_or_of_its_halves_rounded_up(base: Path) -> None:
    teacher = teacher_of(base)
    assert teacher.feature_map("any", draws(1, 12, 6), draws(1, 4, 5, 7)).shape == (1, 6, 3, 4)
    assert teacher.feature_map("any", draws(1, 4, 6), draws(1, 4, 5, 7)).shape == (1, 6, 2, 2)
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    assert teacher.feature_map("any", tokens, torch.zeros(1, 4, 4, 6)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]


def test_what_is_no_picture_of_the_input_is_refused(base: Path) -> None:
    teacher = teacher_of(base)
    with pytest.raises(ValueError, match=r"\(1, 7, 3\)"):
        teacher.feature_map("any", draws(1, 7, 3), draws(1, 4, 4, 4))
    with pytest.raises(InputError, match=r"--method\.taps"):
        DenoiserFeatures(teacher, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])(*given(4, 4))


def test_a_tap_that_does_not_exist(base: Path) -> None:
    teacher = teacher_of(base)
    with pytest.raises(InputError, match=r"got 'mid_block.nowhere'; fix --method.taps .*all 4 of its attention blocks"):
        DenoiserFeatures(teacher, ["mid_block", "mid_block.nowhere"])
    with pytest.raises(InputError, match=r"--method\.taps"):
        DenoiserFeatures(teacher, [])
    with pytest.raises(InputError, match=r"computes with, got 'down_blocks'"):  # a list of modules is never called
        DenoiserFeatures(teacher, ["down_blocks"])(*given(4, 4))


class Joint(nn.Module):
    """A block of SD3's kind: (text, image) -> (text, image)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return text + image.mean(1, keepdim=True), self.mix(image)


class Tokens(Denoiser):
    """A token-only network: patches of 2 x 2, blocks that return the text's tokens first. its family knows the image's."""

    tap_points = ("0", "1")

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([Joint(), Joint()]), Flow(), "flow")

    def tapped(self, name: str, output: Any) -> Any:
        return output[1]

    def pooled(self, cond: Cond) -> Tensor:
        return cond["text"].mean(1)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows = x_t[:, :, ::2, ::2].flatten(2).transpose(1, 2)
        text = cond["text"]
        for block in self.net:
            text, rows = block(text, rows)
        image = rows.transpose(1, 2).unflatten(2, (x_t.shape[2] // 2, x_t.shape[3] // 2))
        return image.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_token_only_network_says_which_tokens_are_the_image() -> None:
    teacher, cond = Tokens(), {"text": draws(2, 5, 3)}
    x_t, t = draws(2, 3, 4, 8), torch.full((2,), 0.5, dtype=torch.float64)
    found = DenoiserFeatures(teacher)
    maps = found(x_t, t, cond)
    assert [tuple(m.shape) for m in maps] == [(2, 3, 2, 4)] * 2
    assert_close(maps[1].repeat_interleave(2, 2).repeat_interleave(2, 3), teacher.output(x_t, t, cond))
    net = found.discriminator((3, 4, 8), cond, width=8)
    logits = net(maps, found.condition(t, cond))
    assert [tuple(part.shape) for part in logits] == [(2, 8)] * 2


def test_heads_are_sized_by_a_look_and_see_features_in_units_of_their_size(base: Path) -> None:
    teacher = teacher_of(base)
    found, cond = DenoiserFeatures(teacher), given(4, 4)[2]
    net = found.discriminator((4, 4, 4), cond, width=8, seed=2)
    state = net.state()
    channels = [feature.shape[1] for feature in found(*given(4, 4))]
    assert [state[f"heads.{i}.point.weight"].shape[1] for i in range(4)] == channels
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    sizes = [f.square().mean().sqrt() for f in found(noise, torch.tensor([0.501], dtype=torch.float64), cond)]
    assert_close(state["scales"], torch.stack(sizes).detach())
    # a feature in other units, with its scale, gives the same logits
    other = Discriminator(channels, 64 + 16, 8, [10.0 * float(s) for s in state["scales"]], seed=2)
    maps, condition = found(*given(4, 4)), found.condition(torch.tensor([0.5]).double(), cond)
    assert_close(other([10.0 * m for m in maps], condition), net(maps, condition))


def test_the_condition_is_the_noise_level_and_the_pooled_text(base: Path) -> None:
    found = DenoiserFeatures(teacher_of(base))
    cond, t = given(4, 4, batch=2)[2], torch.tensor([0.2, 0.9]).double()
    condition = found.condition(t, cond)
    assert_close(condition[:, :64], sinusoids(t, 64))
    text = cond["prompt_embeds"].mean(1)
    assert_close(condition[:, 64:], nn.functional.layer_norm(text, text.shape[1:]))
    assert not torch.allclose(
        sinusoids(torch.tensor([0.5]).double(), 64), sinusoids(torch.tensor([0.503]).double(), 64)
    )


def test_a_noise_level_is_embedded_as_diffusion_networks_embed_theirs() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.001, 0.25, 1.0], dtype=torch.float64)
    wanted = get_timestep_embedding((1000 * t).float(), 64, downscale_freq_shift=0)
    assert_close(sinusoids(t, 64), wanted, rtol=0, atol=1e-4)


def test_families_pool_what_they_are_conditioned_on(tmp_path: Path) -> None:
    from tiny_pixels import tiny_pixels
    from tiny_sdxl import tiny_sdxl

    model = opened(tiny_sdxl(tmp_path / "sdxl"))
    cond = model.conditions(["a", "b"])
    assert torch.equal(model.denoiser.pooled(cond), cond["pooled_prompt_embeds"])
    classes = opened(tiny_pixels(tmp_path / "classes", classes=5))
    assert classes.denoiser.pooled(classes.conditions(["3", "0"])).tolist() == [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    plain = opened(tiny_pixels(tmp_path / "plain"))
    assert plain.denoiser.pooled({}) is None
    found = DenoiserFeatures(plain.denoiser)
    net = found.discriminator(plain.latent_shape, {}, width=8)
    x_t, t = draws(3, *plain.latent_shape), torch.full((3,), 0.5, dtype=torch.float64)
    assert [part.shape[0] for part in net(found(x_t, t, {}), found.condition(t, {}))] == [3] * len(found.names)


def test_gradients_reach_the_input_through_frozen_weights(base: Path) -> None:
    teacher = teacher_of(base)
    found = DenoiserFeatures(teacher)
    x_t, t, cond = given(4, 4)
    maps = found(x_t.requires_grad_(True), t, cond)
    net = found.discriminator((4, 4, 4), cond, width=8)
    torch.cat(net(maps, found.condition(t, cond)), 1).sum().backward()
    assert x_t.grad is not None and float(x_t.grad.abs().min()) > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.module.parameters())


def test_a_bare_copy_is_the_teacher_without_its_students_adapter(base: Path) -> None:
    teacher = teacher_of(base)
    x_t, t, cond = given(4, 4)
    with torch.no_grad():
        before = teacher.output(x_t, t, cond)
        student = teacher.with_lora(LoraSpec(2, 2.0, LCM_TARGETS))
        randomised(student)
        twin = teacher.bare_copy()
        assert_close(twin.output(x_t, t, cond), before, **EXACT)
        assert not torch.allclose(student.output(x_t, t, cond), before, atol=1e-3)
    own = {p.data_ptr() for p in twin.module.parameters()}
    assert not own & {p.data_ptr() for p in teacher.module.parameters()}
    assert not any("lora" in name for name, _ in twin.module.named_parameters())
    assert twin.trainable() == [] and not any(p.requires_grad for p in twin.module.parameters())
    assert len(student.trainable()) > 0 and teacher.module is student.module
    copied = copy.deepcopy(twin.module)  # nothing of PEFT is left that would stop it from being adapted
    assert not hasattr(copied, "peft_config")
    plain = teacher_of(base)
    assert plain.full_student().bare_copy().trainable() == []
    assert_close(plain.bare_copy().output(x_t, t, cond), before, **EXACT)
