"""The output layer of a language model as the losses know it: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn, tanh


class NotCalled(RuntimeError):
    """A part that a model names is not what its forward calls: MobileBERT's reads its output layer's weights alone."""


@dataclass(frozen=True)
class Head:
    """An output layer: logits = c tanh(z / c), z = h W^T + b. A scale of the logits belongs on h.

    Attributes:
        weight: W, [V, H]; may be tied to the embedding.
        bias: b, [V].
        softcap: c (Gemma's final_logit_softcapping), None for plain z.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected a softcap > 0 or None, got {self.softcap}")

    @classmethod
    def of(cls, layer: nn.Linear, softcap: float | None = None) -> Head:
        """The head of a module: its weight and bias as they are now."""
        return cls(layer.weight, layer.bias, softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], dense and differentiable."""
        z = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)  # Mamba's are in float32
        return z if self.softcap is None else self.softcap * tanh(z / self.softcap)
