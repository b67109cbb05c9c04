"""Discriminators: small trained heads on the features of a network that stays as it is.

Each tapped feature map gets a head of its own, which gives a logit for each place of the map, judged together with a
condition by projection (arXiv 1802.05637). The heads are those of StyleGAN-T (arXiv 2301.09515) in two dimensions, as LADD
(arXiv 2403.12015) has them, with norms that know no batch. Where the features come from is another object's matter:
:class:`DenoiserFeatures` reads them from a diffusion teacher, and :class:`.image_features.ImageFeatures` from pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..batch import Cond, concat
from ..diffusion.timesteps import trainable
from ..errors import InputError
from .denoiser import Denoiser
from .network import Network

LEVELS = 64  # sinusoids of a noise level
PROBED = 0.5  # time at which features are sized up


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value (spectral normalisation, arXiv 1802.05957).

    The singular vectors are buffers that :meth:`advance` moves, and no forward: however a batch is cut, and however often the
    layer computes in a step, it is one function.
    """

    u: Tensor
    v: Tensor

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2)
        self.register_buffer("u", functional.normalize(torch.randn(out), dim=0))
        self.register_buffer("v", torch.zeros(self.weight[0].numel()))
        self.advance(15)

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """Power iterations: once after each step of the optimizer is enough, since the weight moves little."""
        matrix = self.weight.flatten(1)
        for _ in range(iterations):
            self.v.copy_(functional.normalize(matrix.T @ self.u, dim=0))
            self.u.copy_(functional.normalize(matrix @ self.v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = torch.dot(self.u, self.weight.flatten(1) @ self.v)  # the vectors are constants, the weight is not
        return self._conv_forward(x, self.weight / sigma, self.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place: it sees no other place and no other sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Head(nn.Module):
    """A feature map [B, C, h, w] and a condition [B, D] -> logits [B, h w]."""

    def __init__(self, channels: int, conditions: int, width: int) -> None:
        super().__init__()
        self.point, self.point_norm = SpectralConv2d(channels, width, 1), ChannelNorm(width)
        self.around, self.around_norm = SpectralConv2d(width, width, 3), ChannelNorm(width)
        self.last = SpectralConv2d(width, width, 1)
        self.condition = nn.Linear(conditions, width)

    def forward(self, feature: Tensor, condition: Tensor) -> Tensor:
        x = functional.leaky_relu(self.point_norm(self.point(feature)), 0.2)
        x = (x + functional.leaky_relu(self.around_norm(self.around(x)), 0.2)) / math.sqrt(2.0)
        x, direction = self.last(x), self.condition(condition)  # its bias makes an unconditional part of it
        return torch.einsum("bchw,bc->bhw", x, direction).flatten(1) / math.sqrt(direction.shape[1])


class Heads(nn.Module):
    """One :class:`Head` a feature, on features in units of `scales`.

    Args:
        channels: of each feature.
        conditions: numbers that describe a sample's condition, at least 1.
        width: channels within a head.
        scales: the root mean square of each feature, so that gradient penalties mean the same at all of them.
    """

    scales: Tensor

    def __init__(self, channels: Sequence[int], conditions: int, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float32))
        self.embed = nn.Sequential(nn.Linear(conditions, width), nn.SiLU(), nn.Linear(width, width))
        self.heads = nn.ModuleList(Head(c, width, width) for c in channels)

    def forward(self, features: Sequence[Tensor], condition: Tensor) -> list[Tensor]:
        known = self.embed(condition)
        pairs = zip(self.heads, features, self.scales, strict=True)
        return [head(feature / scale, known) for head, feature, scale in pairs]


class Discriminator(Network):
    """The role that trains: logits of features. In float32, whatever precision the features come in and autocast is at.

    Args:
        channels, conditions, width, scales: of :class:`Heads`.
        seed: of the first weights.
    """

    def __init__(
        self, channels: Sequence[int], conditions: int, width: int, scales: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            heads = Heads(channels, conditions, width, scales or [1.0] * len(channels))
        super().__init__(heads)

    def __call__(self, features: Sequence[Tensor], condition: Tensor) -> list[Tensor]:
        """Logits [B, n] of each feature [B, C, h, w], n = h w of them; above 0 means real. condition [B, D]."""
        with torch.autocast(condition.device.type, enabled=False):
            logits: list[Tensor] = self.net([feature.float() for feature in features], condition.float())
        return logits

    def advance(self) -> None:
        """Lets the spectral norms follow the weights; once after each step of the optimizer, on all processes."""
        for module in self.module.modules():
            if isinstance(module, SpectralConv2d):
                module.advance()


def heads_for(features: Sequence[Tensor], condition: Tensor, width: int, seed: int = 0) -> Discriminator:
    """Heads for features [B, C, h, w] like these, in units of their size, and conditions [B, D]; on their device."""
    scales = [float(feature.float().square().mean().sqrt()) or 1.0 for feature in features]
    found = Discriminator([f.shape[1] for f in features], condition.shape[1], width, scales, seed)
    found.module.to(condition.device)
    return found


class DenoiserFeatures:
    """What a discriminator looks at: features inside a frozen denoiser, and the condition they are judged with.

    Args:
        backbone: the denoiser; gradients pass through it to x_t, and none of its weights requires one.
        names: of the submodules to tap, `backbone.tap_points` by default.

    Raises InputError for names that are no submodules, or none at all.
    """

    def __init__(self, backbone: Denoiser, names: Sequence[str] | None = None) -> None:
        self.backbone, self.names = backbone, tuple(backbone.tap_points if names is None else names)
        known = {name for name, _ in backbone.module.named_modules() if name}
        if missing := [name for name in self.names if name not in known]:
            usual = ", ".join(backbone.tap_points[:3]) or "none"
            raise InputError(
                f"expected names of the teacher's modules to tap, got {missing[0]!r}; fix --method.taps (by default all "
                f"{len(backbone.tap_points)} of its attention blocks: {usual}, ...)"
            )
        if not self.names:
            raise InputError(
                "expected one tap or more, got none: this network has no attention blocks; name its modules with --method.taps"
            )

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The features at x_t [B, ...], t [B], as maps [B, C, h, w], in the order of `names`."""
        with self.backbone.taps(self.names) as kept:
            self.backbone.output(x_t, t, cond)
        if silent := [name for name in self.names if name not in kept]:
            raise InputError(
                f"expected modules that the teacher computes with, got {silent[0]!r}, which it calls nothing of by that name; "
                "fix --method.taps"
            )
        try:
            return [self.backbone.feature_map(name, kept[name], x_t) for name in self.names]
        except ValueError as error:
            raise InputError(f"{error} (--method.taps)") from error

    def of_each(self, inputs: Sequence[Tensor], t: Tensor, cond: Cond) -> list[list[Tensor]]:
        """The same at each of several x_t [B, ...] that share t [B] and `cond`, in one forward of all of them."""
        count = len(inputs)
        found = self(torch.cat(list(inputs)), t.repeat(count), concat(*[cond] * count))
        return [list(part) for part in zip(*(feature.chunk(count) for feature in found), strict=True)]

    def condition(self, t: Tensor, cond: Cond) -> Tensor:
        """[B, D] float32: the noise level at t [B] as sinusoids, and the pooled condition in units of its own size."""
        pooled = self.backbone.pooled(cond)
        device = next(self.backbone.module.parameters(), t).device if pooled is None else pooled.device
        level = sinusoids(t, LEVELS).to(device)
        if pooled is None:
            return level
        return torch.cat([level, functional.layer_norm(pooled.float(), pooled.shape[1:])], dim=1)

    @torch.no_grad()
    def discriminator(self, shape: Sequence[int], cond: Cond, width: int, seed: int = 0) -> Discriminator:
        """Heads for these features, on the backbone's device; it computes once on noise, to see their sizes.

        Args:
            shape: of x_t, without the batch.
            cond: of one sample or more.
            width: channels within a head.
            seed: of the noise and of the first weights.
        """
        count = len(next(iter(cond.values()))) if cond else 1
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
        t = trainable(torch.full((count,), PROBED, dtype=torch.float64), self.backbone.schedule)
        condition = self.condition(t, cond)
        features = self(noise.to(condition.device), t, cond)
        return heads_for(features, condition, width, seed)


def sinusoids(t: Tensor, channels: int) -> Tensor:
    """[B] times in [0, 1] -> [B, channels] float32, as diffusion networks embed 1000 t."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angles = 1000.0 * t.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
