from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.data.prompts import Prompts, embed_prompts
from stepdistill.errors import InputError


class Encoder:
    """Embeds a prompt as its length and counts."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.calls.append(list(prompts))
        return {"prompt_embeds": torch.tensor([[float(len(p))] for p in prompts])}


def test_each_prompt_is_encoded_once_and_rows_keep_their_order():
    model: Any = Encoder()
    cond = embed_prompts(model, ["aa", "b", "aa", "", "cccc", "b"], batch_size=3)
    assert model.calls == [["aa", "b", ""], ["cccc"]]
    assert cond["prompt_embeds"].flatten().tolist() == [2, 1, 2, 0, 4, 1]


def test_reading_skips_blank_lines_and_keeps_repeated_prompts(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("﻿one, é\r\n\r\n  two \n \t\none, é".encode())
    prompts = Prompts.read(tmp_path / "a.txt")
    assert prompts.captions == ["one, é", "two", "one, é"]
    assert len(prompts) == 3


def test_bad_prompt_files(tmp_path: Path):
    with pytest.raises(InputError, match="got no file"):
        Prompts.read(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_text("\n  \n")
    with pytest.raises(InputError, match="blank lines only"):
        Prompts.read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match="UTF-8"):
        Prompts.read(tmp_path / "a.txt")
