"""The demo teacher's parts: a Stable Diffusion checkpoint (arXiv 2112.10752) that a CPU can train, for the demo world.

Stock classes throughout, so that what holds for it holds for a real checkpoint: CLIPTokenizer, CLIPTextModel,
AutoencoderKL with f = 4, UNet2DConditionModel in v-prediction (arXiv 2202.00512) with zero terminal SNR (arXiv
2305.08891): the first step starts at pure noise and is well posed, so one step is a fair question to ask. The stages
that train them are in `.stages`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bench.judge import Judge
from .world import ATTRIBUTES, vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24  # the longest caption has 18 words; two more tokens frame it
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
START, END, UNKNOWN = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|unknown|>",
)  # END is not id 2, which CLIPTextModel takes for legacy
WORD_END = "</w>"


def merge_rules(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (arXiv 1508.07909), in rank order, that turn each of the words into one token.

    Always merges the first pair of the first word that is still in pieces, and in all words at once: a tokenizer that
    applies the rules in this order repeats the same steps on the same words, so they come out whole.
    """
    split = [[*word[:-1], word[-1] + WORD_END] for word in sorted(words)]
    rules: list[tuple[str, str]] = []
    while broken := next((pieces for pieces in split if len(pieces) > 1), None):
        rules.append((broken[0], broken[1]))
        split = [_merge(pieces, rules[-1]) for pieces in split]
    return rules


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each word of the world is one token.

    Other words fall into letters and known fragments, and characters that no word uses into one unknown token; the text
    stage scatters such fragments over its captions, so that the text model learns to read past them.
    """
    from transformers import CLIPTokenizer

    words = vocabulary()
    rules = merge_rules(words)
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz", *"".join(words)})
    pieces = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in rules)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys((START, END, UNKNOWN, *pieces)))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=rules,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def build_tokenizer(folder: str | os.PathLike[str]) -> CLIPTokenizer:
    """Writes :func:`tokenizer` into `folder`, in the layout of a pipeline's `tokenizer/`, and returns it."""
    made = tokenizer()
    made.save_pretrained(Path(folder))
    return made


def word_ids(tokenizer: CLIPTokenizer) -> Tensor:
    """[N] int64 ids of the tokens that are words of the world; all other ids but the special ones are fragments."""
    known = tokenizer.get_vocab()
    return torch.tensor(sorted(known[word + WORD_END] for word in vocabulary()))


def text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """0.12 M parameters: 2 causal layers of width 64 with 4 heads."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def autoencoder() -> AutoencoderKL:
    """0.68 M parameters, f = 4: [B, 3, 64, 64] pixels to [B, 4, 16, 16] latents; training sets `scaling_factor`.

    One norm group: with eight, a group here would be two to eight channels, and normalising so few takes out the level
    of a flat area, its colour (L1 after 100 steps .46 with eight groups, .24 with one; one run each of an f = 8 net, in
    groups of one to eight, on a simpler world). The rest of the start is reasoned, not measured by itself: a narrow
    posterior, since a fresh AutoencoderKL has std 1 around means near 0 and shows its decoder noise; and a nearly
    linear net, with small residual branches, averaging downsamplers and repeating upsamplers, so that mean colours can
    pass at once. Learning rates above 1e-3 were slower.
    """
    from diffusers import AutoencoderKL

    channels = (16, 32, 64)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=64,
    )
    _start_nearly_linear(vae)
    return vae


@torch.no_grad()
def _start_nearly_linear(vae: AutoencoderKL) -> None:
    for name, module in vae.named_modules():
        kind = name.rsplit(".", 1)[-1]
        down, up = "downsamplers" in name, "upsamplers" in name
        last = kind in ("conv2", "0")  # of a residual branch; of attention it is to_out.0
        if not isinstance(module, nn.Conv2d | nn.Linear) or not (down or up or last or kind == "conv_shortcut"):
            continue
        if module.bias is not None:
            module.bias.zero_()
        if kind == "conv_shortcut":
            nn.init.orthogonal_(module.weight)
            continue
        module.weight.mul_(0.1)
        own = torch.arange(len(module.weight))
        if down:  # the mean of 2x2 pixels, each channel by itself
            module.weight[own, own, :2, :2] += 0.25
        elif up:  # the nearest pixel
            module.weight[own, own, 1, 1] += 1.0
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias[LATENT_CHANNELS:] -= 5.0


def unet() -> UNet2DConditionModel:
    """3.3 M parameters: Stable Diffusion's blocks, one layer each, on 16x16, 8x8 and 4x4; the lower two with attention.

    On the 64 latents of 8x8 attention finds the two objects; on 256 it would take almost as long as all of the rest.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 80, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's table, rescaled to zero terminal SNR.

    `set_alpha_to_one`: the last step goes to t = 0, clean data, and returns x0 as the network sees it. The
    table's first level instead would leave 3 % of noise in every sample.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,  # idle under trailing spacing, but the pipeline insists on it
        clip_sample=False,
    )


def judge() -> Judge:
    """0.55 M parameters: the classifier of the world's attributes."""
    return Judge({name: len(values) for name, values in ATTRIBUTES.items()}, width=24)


def parameters(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def save(
    folder: str | os.PathLike[str],
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Writes a StableDiffusionPipeline folder: autoencoder and UNet in fp16, cast in place, the text encoder in fp32.

    Transformers loads a model in the dtype of its file unless told otherwise, Diffusers in fp32: a text encoder in fp16
    would meet a UNet in fp32 in a plain `from_pretrained`.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    text.float()
    for module in (vae, unet):
        module.half()
        module.register_to_config(_name_or_path="")  # of what was trained further it would tell the folder it came from
    pipeline.save_pretrained(Path(folder), safe_serialization=True)
