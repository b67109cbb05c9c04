"""The options of `stepdistill bench` for language models and classifiers, and which flags belong to which kind of model.

Imports nothing heavy: a wrong flag is told before models are opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .kinds import CLASSIFIER, LANGUAGE, PIPELINE
from .options import GROUPS, check_apart, ints, least, needed
from .writing import check_folder

REPEATS = "10"  # timed calls: the least whose median has an interval that leaves out the ends
BATCH_SIZES = "1,32"

# named as in recipes/lm_kd.py and recipes/hinton.py, and read as there
TEXT = ("data.path", "data.split", "data.config_name", "data.text_column", "data.block_size", "data.held_out")
EXAM = ("eval.max_tokens", "eval.stride", "eval.new_tokens")
IMAGES = (
    "data.path", "data.split", "data.test_split", "data.image_column", "data.label_column", "data.resolution",
    "data.test_images",
)  # fmt: skip
MODEL_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--data.path", {"metavar": "PATH", "help": "text (docstrings), or labelled images (demo), as in the recipes"}),
    ("--data.split", {"metavar": "NAME", "help": "of a data set (train, of which a part is held out)"}),
    ("--data.test_split", {"metavar": "NAME", "help": "of labelled images: where there is one it is measured on (test)"}),
    ("--data.config_name", {"metavar": "NAME", "help": "of a data set of several configurations"}),
    ("--data.text_column", {"metavar": "NAME", "help": "of documents (text)"}),
    ("--data.image_column", {"metavar": "NAME", "help": "of images (image)"}),
    ("--data.label_column", {"metavar": "NAME", "help": "of classes (label)"}),
    ("--data.block_size", {"metavar": "N", "type": int, "help": "tokens of the window that perplexity is taken under (128)"}),
    ("--data.held_out", {"metavar": "SHARE", "type": float,
                         "help": "of the text that is measured on, the same as in training (0.05); 1 for all of it"}),
    ("--data.resolution", {"metavar": "PIXELS", "type": int, "help": "of labelled images (the teacher's own)"}),
    ("--data.test_images", {"metavar": "N", "type": int, "help": "the first so many (all; demo: 1000)"}),
    ("--eval.max_tokens", {"metavar": "N", "type": int, "help": "of text, at most (20000)"}),
    ("--eval.stride", {"metavar": "N", "type": int, "help": "by which the window moves (half of it)"}),
    ("--eval.new_tokens", {"metavar": "N", "type": int, "help": "that are written when generation is timed (64)"}),
)  # fmt: skip

SHARED = ("teacher", "student", "dtype", "seed", "repeats", "skip_latency", "output_dir", "overwrite")
MODES = ("compare", "fail_if", "make_reference")
BELONGS = {
    LANGUAGE: {*SHARED, *MODES, *TEXT, *EXAM},
    CLASSIFIER: {*SHARED, *MODES, *IMAGES, "batch_sizes"},
    PIPELINE: {flag.removeprefix("--") for flags in GROUPS.values() for flag, _ in flags},
}
INSTEAD = {
    LANGUAGE: {"data": "data.path", "prompts": "data.path", "num_images": "eval.max_tokens"},
    CLASSIFIER: {
        "data": "data.path", "prompts": "data.path", "resolution": "data.resolution", "num_images": "data.test_images",
        "batch_size": "batch_sizes", "data.held_out": "data.test_split", "eval.max_tokens": "data.test_images",
    },
    PIPELINE: {"data.path": "data", "data.resolution": "resolution", "data.test_images": "num_images"},
}  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Puts the flags of language models and classifiers on a parser."""
    group = parser.add_argument_group(
        "of language models and image classifiers",
        "beside --teacher, --student, --dtype, --seed, --repeats, --output_dir",
    )
    for flag, how in MODEL_FLAGS:
        group.add_argument(flag, **how)


def check_flags(flags: Mapping[str, Any], kind: str) -> None:
    """InputError for a flag that says nothing about models of this kind, with what to give in its place."""
    usual = {
        flag.removeprefix("--"): how.get("default", False if "action" in how else None)
        for flag, how in [*(pair for group in GROUPS.values() for pair in group), *MODEL_FLAGS]
    }
    for name, value in flags.items():
        if name in usual and value != usual[name] and name not in BELONGS[kind]:
            instead = INSTEAD[kind].get(name)
            fix = f"give --{instead} instead" if instead else "drop it"
            why = "as --teacher is one"
            if kind == PIPELINE:
                why = "as --teacher has no config.json of a language model or classifier"
            raise InputError(f"expected flags for {kind}s, {why}, got --{name}; {fix}")


@dataclass(frozen=True)
class ModelOptions:
    """The flags of a comparison of language models or classifiers, checked.

    Attributes:
        kind: LANGUAGE or CLASSIFIER.
        teacher: folder or hub id.
        students: folders or hub ids.
        data: fields of TextConfig or LabelledConfig that were given.
        exam: fields of EvalConfig that were given.
        dtype: of the weights.
        batch_sizes: images a call, of classifiers.
        repeats: timed calls.
        seed: of the bootstrap.
        skip_latency: quality alone.
        output_dir: where results go.
        overwrite: whether results of another kind may be replaced there.
    """

    kind: str
    teacher: str
    students: tuple[str, ...]
    data: dict[str, Any]
    exam: dict[str, Any]
    dtype: str
    batch_sizes: tuple[int, ...]
    repeats: int
    seed: int
    skip_latency: bool
    output_dir: str
    overwrite: bool

    @classmethod
    def read(cls, flags: Mapping[str, Any], kind: str) -> ModelOptions:
        """From the flags as argparse has them. Raises InputError, which names the flag."""
        check_flags(flags, kind)
        given = {name: value for name, value in flags.items() if value is not None}
        teacher = needed(flags, "teacher", "a folder with config.json and safetensors, or a hub id")
        check_apart(teacher, flags["student"])
        check_folder(flags["output_dir"])

        def section(name: str) -> dict[str, Any]:
            return {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}

        return cls(
            kind=kind,
            teacher=teacher,
            students=tuple(flags["student"]),
            data=section("data"),
            exam=section("eval"),
            dtype=flags["dtype"],
            batch_sizes=ints({"batch_sizes": BATCH_SIZES, **given}, "batch_sizes"),
            repeats=least({"repeats": int(REPEATS), **given}, "repeats", 1),
            seed=flags["seed"],
            skip_latency=flags["skip_latency"],
            output_dir=flags["output_dir"],
            overwrite=flags["overwrite"],
        )
