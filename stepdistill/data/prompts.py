"""Prompts: read from a text file, and embedded once each however often they occur."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..batch import Cond
from ..errors import InputError
from ..families.model import Model
from .images import Source, digest


class Prompts(Source):
    """A list of prompts; as training data it has no images, the teacher makes the latents.

    Args:
        captions: the prompts, in the order of the file.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = list(captions)

    @classmethod
    def read(cls, path: str | Path) -> Prompts:
        """One prompt a line, UTF-8; blank lines and white space around a prompt don't count, repeated prompts do.

        Raises InputError for a missing or undecodable file and for one without a prompt.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"expected a text file of prompts, one a line, got no file at {str(path)!r}; fix the path")
        try:
            lines = file.read_text(
                encoding="utf-8-sig"
            ).splitlines()  # -sig: editors may put a byte-order mark in front
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text in {str(path)!r}, got {error.reason}; save the file as UTF-8"
            ) from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise InputError(
                f"expected at least one prompt in {str(path)!r}, got blank lines only; write one prompt a line"
            )
        return cls(texts)

    def fingerprint(self) -> str:
        return str(digest(self.captions).hexdigest())


def unique(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """(each different prompt once, in order of first use; for every prompt its place in that list)."""
    places: dict[str, int] = {}
    rows = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return list(places), rows


@torch.no_grad()
def embed_prompts(model: Model, prompts: Sequence[str], batch_size: int = 16) -> Cond:
    """Text conditions of B prompts, [B, ...] each, on the CPU; every different prompt goes through the encoder once.

    Args:
        model: its `encode_prompts` is called with up to `batch_size` prompts.
    """
    if not prompts or batch_size < 1:
        raise ValueError(f"expected prompts and batch_size >= 1, got {len(prompts)} prompts, batch_size {batch_size}")
    texts, rows = unique(prompts)
    parts = [model.encode_prompts(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    return {name: torch.cat([part[name].cpu() for part in parts])[rows] for name in parts[0]}
