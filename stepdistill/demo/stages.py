"""How the demo teacher is made: data and objective of each stage but the diffusion itself, and what to check after it.

Each stage is a :class:`Method` for the common trainer: `TextNaming`, `Autoencoding` (the KL-regularised autoencoder of
arXiv 2112.10752, without its perceptual and adversarial terms) and `Judging`. The denoiser's stage is plain
diffusion training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import Batch
from ..bench.judge import Judge
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Module, Network
from ..randomness import StepRandom
from .teacher import word_ids
from .world import ATTRIBUTES, World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer


class WorldPixels:
    """Images 0 .. count - 1 of a world, drawn once and kept as bytes: x0 = pixels, extra = {"labels"}."""

    def __init__(self, world: World, count: int) -> None:
        chunks = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
        self._bytes = torch.cat([world.pixels(chunk).add(1).mul(127.5).round().to(torch.uint8) for chunk in chunks])
        self._labels = world.labels(range(count))

    def __len__(self) -> int:
        return len(self._bytes)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Pixels [B, 3, R, R] float32 in [-1, 1] and labels [B, 7]."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self._bytes[rows].float().div(127.5).sub(1), {}, {}, rng, {"labels": self._labels[rows]})


class WorldCaptions:
    """Captions 0 .. count - 1 of a world as token ids: x0 = None, extra = {"input_ids" [B, L], "labels" [B, 7]}."""

    def __init__(self, world: World, count: int, tokenizer: CLIPTokenizer) -> None:
        encoded = tokenizer(world.captions(range(count)), padding="max_length", truncation=True, return_tensors="pt")
        self._ids, self._labels = encoded.input_ids, world.labels(range(count))

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(None, {}, {}, rng, {"input_ids": self._ids[rows], "labels": self._labels[rows]})


def naming_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy summed over attributes: logits [B, values] by name, labels [B, 7] in the order of `ATTRIBUTES`."""
    return torch.stack([F.cross_entropy(logits[name].float(), labels[:, i]) for i, name in enumerate(ATTRIBUTES)]).sum()


def _heads(dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in ATTRIBUTES.items()})


class Naming(nn.Module):
    """A text model with two sets of linear heads: one reads the pooled output, one the mean of all outputs."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text = text
        self.pooled, self.mean = _heads(text.config.hidden_size), _heads(text.config.hidden_size)

    def forward(self, input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of both from ids [B, L]."""
        output = self.text(input_ids)
        mean = output.last_hidden_state.mean(1)
        pooled = {name: head(output.pooler_output) for name, head in self.pooled.items()}
        return pooled, {name: head(mean) for name, head in self.mean.items()}


@dataclass
class TextNamingConfig:
    """Share of captions into which a run of fragments is inserted, as a foreign word would be, and its longest."""

    clutter: float = 0.3
    longest: int = 5


def insert_clutter(ids: Tensor, run: Tensor, where: Tensor, fragments: Tensor, end: int) -> Tensor:
    """Ids with `run` [B] fragments inserted before position `where` [B]; what overflows L is cut, and `end` stays last.

    Args:
        ids: [B, L] framed and padded token ids.
        fragments: [B, L] the ids to insert, read at the positions where they land.
    """
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    run, where = run[:, None], where[:, None]
    shifted = ids.gather(1, torch.where(position < where, position, (position - run).clamp(min=0)))
    inside = (position >= where) & (position < where + run)
    out = torch.where(inside, fragments, shifted)
    out[:, -1] = end
    return out


class TextNaming(Method):
    """The text model learns to name all attributes of its caption, and to read past words it does not know.

    The pooled output alone would leave the other tokens to chance, and cross-attention reads them all: the second set
    of heads makes their mean carry the attributes too.
    """

    def __init__(self, config: TextNamingConfig, text: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.config, self.student = config, Module(Naming(text))
        known = {*word_ids(tokenizer).tolist(), tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._fragments = torch.tensor([i for i in range(len(tokenizer)) if i not in known])
        self._end = int(tokenizer.eos_token_id)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def cluttered(self, batch: Batch) -> Tensor:
        """The batch's ids, some with a run of fragments somewhere between the first token and the end."""
        ids, rng = batch.extra["input_ids"], batch.rng
        hit = rng.uniform("clutter") < self.config.clutter
        run = torch.where(hit, rng.integers("clutter/run", 1, self.config.longest + 1), 0)
        length = (ids == self._end).int().argmax(1).cpu()  # position of the end token
        where = 1 + (rng.uniform("clutter/where") * length).long()
        fragments = self._fragments[rng.integers("clutter/ids", 0, len(self._fragments), ids.shape[1:])]
        run, where, fragments = (x.to(ids.device) for x in (run, where, fragments))
        return insert_clutter(ids, run, where, fragments, self._end)

    def training_step(self, batch: Batch) -> Losses:
        labels = batch.extra["labels"]
        pooled, mean = self.student(self.cluttered(batch))
        terms = {"pooled": naming_loss(pooled, labels), "mean": naming_loss(mean, labels)}
        return Losses(terms, {"accuracy": _all_right(pooled, labels)}, float(len(batch)))


class Reconstruction(nn.Module):
    """An AutoencoderKL whose posterior noise is given, and the whole round trip in one forward."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction [B, 3, R, R], posterior mean, posterior log variance) with z = mean + std noise."""
        posterior = self.vae.encode(pixels).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction, posterior.mean, posterior.logvar


@dataclass
class AutoencodingConfig:
    """Training of the autoencoder.

    Attributes:
        l1_weight: of the mean absolute error. Alone it is content with the ground: the objects are the minority.
        l2_weight: of the mean squared error, to which an object in the wrong colour is dear.
        edge_weight: of the L1 error of the differences between neighbouring pixels.
        kl_weight: of the KL divergence to N(0, 1), a mean over latent values.
    """

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    edge_weight: float = 0.0
    kl_weight: float = 1e-5

    def __post_init__(self) -> None:
        if negative := {name: value for name, value in vars(self).items() if value < 0}:
            raise InputError(f"expected weights >= 0, got {negative}; 0 leaves a term out")


def kl_to_standard(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) in nats, a mean over all values: (mean^2 + e^logvar - 1 - logvar) / 2."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def edge_error(error: Tensor) -> Tensor:
    """Mean |difference| of neighbours in an error image [B, C, H, W], along both axes: 0 for a constant error."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class Autoencoding(Method):
    """L1 and L2 reconstruction, a small KL term, and one on edges: few of a picture's pixels, and all of its shape."""

    def __init__(self, config: AutoencodingConfig, vae: AutoencoderKL) -> None:
        self.config, self.student = config, Module(Reconstruction(vae))
        self._channels, self._factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        x0 = batch.data()
        noise = batch.rng.normal("posterior", (self._channels, *(side // self._factor for side in x0.shape[2:])))
        reconstruction, mean, logvar = self.student(x0, noise)
        error = reconstruction.float() - x0
        terms = {
            "l1": self.config.l1_weight * error.abs().mean(),
            "l2": self.config.l2_weight * error.square().mean(),
            "edge": self.config.edge_weight * edge_error(error),
            "kl": self.config.kl_weight * kl_to_standard(mean.float(), logvar.float()),
        }
        return Losses(terms, {"latent_std": mean.detach().float().std()}, float(len(batch)))


@dataclass
class JudgingConfig:
    """Training of the judge.

    Attributes:
        noise: largest std of the noise added to pixels in [-1, 1].
        blur: share of images that are blurred, 3x3.
        shift: largest displacement in pixels, along each axis; of the whole picture, so every attribute stays true.
    """

    noise: float = 0.1
    blur: float = 0.2
    shift: int = 1


class Judging(Method):
    """The judge learns the attributes from drawings with noise, blur and shift: a decoder's smear is no trap."""

    def __init__(self, config: JudgingConfig, judge: Judge) -> None:
        self.config, self.student = config, Module(judge)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def augmented(self, batch: Batch) -> Tensor:
        """Blurred, shifted, then noisy pixels, [B, 3, R, R]."""
        x0, rng, reach = batch.data(), batch.rng, self.config.shift
        per_image = (-1, 1, 1, 1)
        blurred = F.avg_pool2d(x0, 3, stride=1, padding=1, count_include_pad=False)
        x0 = torch.where((rng.uniform("blur") < self.config.blur).to(x0.device).view(per_image), blurred, x0)
        padded = F.pad(x0, (reach,) * 4, mode="replicate") if reach else x0
        height, width = x0.shape[2:]
        moves = rng.integers("shift", 0, 2 * reach + 1, (2,)).tolist()
        moved = torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)]
        )
        level = (self.config.noise * rng.uniform("level")).to(x0.dtype).to(x0.device).view(per_image)
        return moved + level * rng.normal("noise", x0.shape[1:])

    def training_step(self, batch: Batch) -> Losses:
        labels = batch.extra["labels"]
        logits = self.student(self.augmented(batch))
        return Losses(
            {"naming": naming_loss(logits, labels)}, {"accuracy": _all_right(logits, labels)}, float(len(batch))
        )


def _right(logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return {name: logits[name].argmax(1) == labels[:, i] for i, name in enumerate(ATTRIBUTES)}


def _all_right(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    return torch.stack(list(_right(logits, labels).values())).all(0).float().mean()


@torch.no_grad()
def attribute_accuracy(judge: Judge, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of pixels [B, 3, R, R] in which the judge sees labels [B, 7]: by attribute, and all of them under "all"."""
    logits = judge(pixels)
    shares = {name: float(right.float().mean()) for name, right in _right(logits, labels).items()}
    return {**shares, "all": float(_all_right(logits, labels))}


@torch.no_grad()
def reconstruction_accuracy(judge: Judge, vae: AutoencoderKL, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """:func:`attribute_accuracy` of the decoded posterior means, and their mean absolute error under "l1"."""
    made = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return {**attribute_accuracy(judge, made, labels), "l1": float((made - pixels).abs().mean())}


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Sets and returns the config's factor that gives these pixels' latents unit std, posterior noise included."""
    posterior = vae.encode(pixels).latent_dist
    variance = posterior.mean.double().var() + posterior.var.double().mean()
    factor = float(variance.rsqrt())
    vae.register_to_config(scaling_factor=factor)
    return factor


@torch.no_grad()
def text_accuracy(naming: nn.Module, input_ids: Tensor, labels: Tensor) -> float:
    """Share of captions [B, L] of which the pooled output names all attributes in labels [B, 7]."""
    return float(_all_right(naming(input_ids)[0], labels))
