"""The options of `stepdistill bench`, judged before anything heavy is imported: a wrong flag is told at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CommaList
from ..errors import InputError
from ..export.folder import FACTS, check_one_base, read_facts, rung_folders
from .quantities import OPTIONAL
from .writing import check_folder

INDEX, ADAPTER = "model_index.json", "pytorch_lora_weights.safetensors"
GUIDANCE = {"demo": "1.5"}  # of the teacher, where it isn't said; as pipelines have it for others
USUAL = "7.5"
REPEATS = 5
IMAGES = 1200  # of the demo, whose prompts have no end

GROUPS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "what is compared": (
        ("--teacher", {"metavar": "PATH", "help": "a Diffusers or Transformers folder, hub id, .safetensors, or demo"}),
        ("--student", {"metavar": "PATH", "action": "append", "default": [],
                       "help": "an --output_dir of a training, or a Diffusers pipeline of few steps; repeatable"}),
        ("--steps", {"metavar": "LIST", "help": "of students and teacher (default: those that the students are for)"}),
        ("--guidance", {"metavar": "LIST", "help": "of the students (default: each one's own, from its stepdistill.json)"}),
        ("--teacher_steps", {"metavar": "N", "type": int, "default": 50, "help": "that the teacher is meant for (50)"}),
        ("--teacher_guidance", {"metavar": "LIST", "help": "the first is what students are held against (7.5; demo: 1.5)"}),
        ("--variant", {"help": "of the teacher's files, e.g. fp16"}),
        ("--dtype", {"choices": ("fp32", "fp16", "bf16"), "default": "fp32", "help": "of all weights (fp32)"}),
        ("--resolution", {"metavar": "PIXELS", "type": int, "help": "of the images (default: the teacher's own)"}),
    ),
    "how quality is measured": (
        ("--prompts", {"metavar": "FILE", "help": ".txt, .csv or .jsonl, one an image (demo teacher: the demo's captions)"}),
        ("--num_images", {"metavar": "N", "type": int, "help": "of each cell (default: one a prompt; demo: 1200)"}),
        ("--data", {"metavar": "PATH", "help": "real images: a folder, .tar shards, a data set, or a --make_reference file"}),
        ("--features", {"metavar": "WHAT", "default": "demo",
                        "help": "compared by: demo (default), inception, or a vision model's path, hub id, or id@revision"}),
        ("--metrics", {"metavar": "LIST", "default": "", "help": f"more of them, out of {','.join(OPTIONAL)}"}),
        ("--clip", {"metavar": "PATH", "help": "a CLIP, for the CLIP score"}),
        ("--diversity_prompts", {"metavar": "P", "type": int, "default": 40, "help": "whose diversity is measured (40)"}),
        ("--diversity_images", {"metavar": "K", "type": int, "default": 8, "help": "of each of those; 0 for none (8)"}),
        ("--seed", {"type": int, "default": 0, "help": "of the noise and of the bootstrap (0)"}),
        ("--batch_size", {"metavar": "B", "type": int, "default": 16, "help": "images a call while they are made (16)"}),
    ),
    "how speed is measured": (
        ("--batch_sizes", {"metavar": "LIST", "help": "images a call; those that fit are timed (1; classifiers: 1,32)"}),
        ("--repeats", {"metavar": "N", "type": int, "help": "timed calls of each (5; language models, classifiers: 10)"}),
        ("--skip_latency", {"action": "store_true", "help": "quality only"}),
    ),
    "what is written": (
        ("--output_dir", {"metavar": "DIR", "default": "bench", "help": "a stopped sweep in it goes on (bench)"}),
        ("--overwrite", {"action": "store_true", "help": "make cells of another sweep in it again"}),
        ("--save_images", {"action": "store_true", "help": "keep all images, not the first 64 of each cell"}),
    ),
    "instead of a sweep": (
        ("--compare", {"metavar": "JSON", "nargs": 2, "help": "two results files, side by side"}),
        ("--fail_if", {"metavar": "RULE", "action": "append", "default": [],
                       "help": 'with --compare: exit with 1 where it holds, e.g. "fd>+5%%"; repeatable'}),
        ("--make_reference", {"metavar": "FILE", "help": "write the statistics of --data by --features at --resolution"}),
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Puts all flags on a parser."""
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag, how in flags:
            group.add_argument(flag, **how)


@dataclass(frozen=True)
class BenchOptions:
    """The flags of a sweep, checked; defaults that depend on others are filled in.

    Attributes are named as the flags are; lists are tuples; `steps` and `guidance` are empty where each student's own count.
    """

    teacher: str
    students: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    teacher_steps: int
    teacher_guidance: tuple[float, ...]
    variant: str | None
    dtype: str
    resolution: int | None
    prompts: str
    num_images: int | None
    data: str
    features: str
    metrics: tuple[str, ...]
    clip: str | None
    diversity: tuple[int, int]
    seed: int
    batch_size: int
    batch_sizes: tuple[int, ...]
    repeats: int
    skip_latency: bool
    output_dir: str
    overwrite: bool
    save_images: bool

    @classmethod
    def read(cls, flags: Mapping[str, Any]) -> BenchOptions:
        """From the flags as argparse has them. Raises InputError, which names the flag."""
        teacher = needed(flags, "teacher", "a folder, a hub id, a .safetensors file, or demo")
        own = {"prompts": "demo", "data": "demo"} if teacher == "demo" else {}
        given = {**own, **{name: value for name, value in flags.items() if value is not None}}
        prompts = needed(given, "prompts", "a file of prompts, or demo")
        found = cls(
            teacher=teacher,
            students=tuple(flags["student"]),
            steps=ints(flags, "steps") if flags["steps"] is not None else (),
            guidance=_scales(flags, "guidance") if flags["guidance"] is not None else (),
            teacher_steps=least(flags, "teacher_steps", 1),
            teacher_guidance=_scales({"teacher_guidance": GUIDANCE.get(teacher, USUAL), **given}, "teacher_guidance"),
            variant=flags["variant"],
            dtype=flags["dtype"],
            resolution=_side(flags["resolution"]),
            prompts=prompts,
            num_images=_images(flags["num_images"]) or (IMAGES if prompts == "demo" else None),
            data=needed(given, "data", "real images, or demo"),
            features=flags["features"],
            metrics=_metrics(flags["metrics"]),
            clip=flags["clip"],
            diversity=_diversity(flags),
            seed=flags["seed"],
            batch_size=least(flags, "batch_size", 1),
            batch_sizes=ints({"batch_sizes": "1", **given}, "batch_sizes"),
            repeats=least({"repeats": REPEATS, **given}, "repeats", 1),
            skip_latency=flags["skip_latency"],
            output_dir=flags["output_dir"],
            overwrite=flags["overwrite"],
            save_images=flags["save_images"],
        )
        found.check_files()
        return found

    def check_files(self) -> None:
        """Raises InputError for students, prompts, data or an output folder that can't be what they should."""
        for path in self.students:
            check_student(path, self.guidance)
        check_apart(self.teacher, self.students)
        if self.prompts != "demo" and not Path(self.prompts).expanduser().is_file():
            raise InputError(f"expected a file of prompts, got nothing at --prompts {self.prompts}; fix the path")
        check_data(self.data)
        if "fd_infinity" in self.metrics and self.num_images and self.num_images < 20:
            raise InputError(f"expected --num_images of 20 or more for fd_infinity, got {self.num_images}; raise it")
        check_folder(self.output_dir)


def reference_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `make_reference` takes, from the flags; InputError for wrong ones."""
    data = needed(flags, "data", "real images, or demo")
    check_data(data)
    path = str(flags["make_reference"])
    if Path(path).suffix != ".safetensors":
        raise InputError(f"expected a .safetensors file, got --make_reference {path}; rename it")
    resolution = _side(flags["resolution"])
    if resolution is None and "demo" not in (data, flags["features"]):
        raise InputError(
            "expected --resolution with --make_reference, the side of the images in pixels, got none; give it"
        )
    n = _images(flags["num_images"])
    return {"path": path, "data": data, "features": flags["features"], "resolution": resolution, "n": n}


def check_student(path: str, guidance: Sequence[float]) -> None:
    """InputError for a path without a student, or for one whose guidance nobody says."""
    folder = Path(path).expanduser()
    local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if local and not folder.is_dir():
        raise InputError(f"expected a student's folder, got nothing at --student {path}; fix the path")
    exports = rung_folders(folder) or [folder] * (folder / FACTS).is_file()
    for export in exports:
        if not {"takes", "weights"} <= read_facts(export).keys():
            raise InputError(
                f"expected {FACTS} of an export in --student {path}, got another file; stepdistill export {path}"
            )
    if exports:
        check_one_base(exports, f"--student {path}")
        return
    if local and not (folder / INDEX).is_file():
        found, fix = "neither", "give the --output_dir of a training that has ended"
        if (folder / "config.yaml").is_file():
            found, fix = "a training without an export", f"stepdistill export {path}"
        elif (folder / ADAPTER).is_file():
            found, fix = "an adapter of another tool", "merge it into its base model and save that pipeline"
        raise InputError(
            f"expected a student ({FACTS}) or a pipeline ({INDEX}) in --student {path}, got {found}; {fix}"
        )
    if not guidance and local:
        raise InputError(
            f"expected --guidance with --student {path}, a pipeline without {FACTS} that says which; give it, e.g. --guidance 1"
        )
    if not guidance:
        raise InputError(
            f"expected a student's folder, got nothing at --student {path}; fix the path, or where it is a pipeline on the hub "
            "say its --guidance, e.g. 1"
        )


def check_apart(teacher: str, students: Sequence[str]) -> None:
    """InputError for a student that is given twice, or is the teacher."""
    bare, seen = teacher if teacher == "demo" else _place(teacher), dict[str, str]()
    for path in students:
        place = _place(path)
        if place == bare:
            raise InputError(
                f"expected a student, got the teacher at --student {path}; drop it, the teacher is measured beside its students"
            )
        if place in seen:
            raise InputError(f"expected each student once, got --student {seen[place]} and --student {path}; drop one")
        seen[place] = path


def _place(path: str) -> str:
    """What a path leads to: a folder or file here, or else a name; of a run that is called demo its folder."""
    folder = Path(path).expanduser()
    named = path == "demo" and not (folder / FACTS).is_file()
    return str(folder.resolve()) if folder.exists() and not named else path


def check_data(path: str) -> None:
    """InputError for a local path with nothing there."""
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".safetensors")
    if local and "{" not in path and not Path(path).expanduser().exists():
        raise InputError(f"expected real images, got nothing at --data {path}; fix the path")


def needed(flags: Mapping[str, Any], name: str, what: str) -> str:
    """A flag's text; InputError where it wasn't given."""
    value = flags.get(name)
    if not value:
        raise InputError(f"expected --{name}: {what}, got none; give it")
    return str(value)


def ints(flags: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The whole numbers of a list, 1 or more, each once; InputError for others."""
    try:
        numbers = CommaList.parse(flags[name]).ints()
    except InputError as error:
        raise InputError(f"{error}; fix --{name}") from error
    if not numbers or min(numbers) < 1:
        raise InputError(f"expected numbers of 1 or more, separated by commas, got {flags[name]!r}; fix --{name}")
    return tuple(dict.fromkeys(numbers))


def _scales(flags: Mapping[str, Any], name: str) -> tuple[float, ...]:
    try:
        numbers = CommaList.parse(flags[name]).floats()
    except InputError as error:
        raise InputError(f"{error}; fix --{name}") from error
    if not numbers or min(numbers) < 0:
        raise InputError(f"expected guidance scales of 0 or more (1 is none), got {flags[name]!r}; fix --{name}")
    return tuple(dict.fromkeys(float(f"{number:g}") for number in numbers))  # as they are in the names of cells


def least(flags: Mapping[str, Any], name: str, bound: int) -> int:
    """A number; InputError where it is below `bound`."""
    if flags[name] < bound:
        raise InputError(f"expected {bound} or more, got --{name} {flags[name]}; raise it")
    return int(flags[name])


def _images(count: int | None) -> int | None:
    if count is not None and count < 2:
        raise InputError(f"expected 2 images or more, got --num_images {count}; raise it: a covariance needs many")
    return count


def _side(pixels: int | None) -> int | None:
    if pixels is not None and (pixels < 8 or pixels % 8):
        raise InputError(f"expected a positive multiple of 8 pixels, got --resolution {pixels}; fix it")
    return pixels


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(CommaList.parse(text)))
    if unknown := [name for name in names if name not in OPTIONAL]:
        raise InputError(f"expected --metrics out of {','.join(OPTIONAL)}, got {','.join(unknown)}; fix it")
    return names


def _diversity(flags: Mapping[str, Any]) -> tuple[int, int]:
    prompts, images = flags["diversity_prompts"], flags["diversity_images"]
    if images == 0:
        return 0, 0
    if prompts < 1 or images < 2:
        raise InputError(
            f"expected --diversity_prompts of 1 or more and --diversity_images of 2 or more, or 0 for none, got {prompts} and "
            f"{images}; raise what is too small"
        )
    return prompts, images
