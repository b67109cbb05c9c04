"""The flags of `stepdistill bench`: defaults, and that every wrong one is told before torch is imported."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.options import BenchOptions, add_arguments, reference_flags
from stepdistill.errors import InputError


def flags(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return vars(parser.parse_args(words))


def read(*words: str) -> BenchOptions:
    return BenchOptions.read(flags(*words))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a student, a pipeline, prompts and pictures, where commands are run."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "pipe", "photos", "empty", "stopped", "adapter"):
        (tmp_path / name).mkdir()
    facts = {"takes": "prompt", "weights": {}}
    for name in ("run", "other"):
        (tmp_path / name / "stepdistill.json").write_text(json.dumps(facts))
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "stopped" / "config.yaml").write_text("")
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return tmp_path


def test_the_demo_needs_a_teacher_alone(place: Path) -> None:
    found = read("--teacher", "demo", "--student", "./run", "--student", "./other")
    assert (found.prompts, found.data, found.features, found.num_images) == ("demo", "demo", "demo", 1200)
    assert found.students == ("./run", "./other") and found.steps == () and found.guidance == ()
    assert (found.teacher_steps, found.teacher_guidance) == (50, (1.5,))
    assert (found.diversity, found.batch_sizes, found.output_dir) == ((40, 8), (1,), "bench")


def test_another_teacher_needs_prompts_and_data(place: Path) -> None:
    given = ["--teacher", "org/name", "--prompts", "prompts.txt", "--data", "./photos"]
    found = read(*given)
    assert found.teacher_guidance == (7.5,) and found.num_images is None and found.students == ()
    for name in ("prompts", "data"):
        words = [w for i, w in enumerate(given) if f"--{name}" not in (w, given[i - 1])]
        with pytest.raises(InputError, match=f"expected --{name}: .*, got none"):
            read(*words)
    with pytest.raises(InputError, match="expected --teacher"):
        read("--student", "./run")


def test_lists_and_numbers(place: Path) -> None:
    words = [
        "--steps",
        "4, 2,4",
        "--guidance",
        "1,1.5",
        "--teacher_guidance",
        "3,1",
        "--batch_sizes",
        "2,1",
        "--seed",
        "7",
    ]
    words += ["--metrics", "cmmd,coverage,cmmd", "--diversity_images", "0", "--resolution", "96", "--num_images", "20"]
    found = read("--teacher", "demo", *words)
    assert (found.steps, found.guidance, found.teacher_guidance) == ((4, 2), (1.0, 1.5), (3.0, 1.0))
    assert (found.batch_sizes, found.metrics, found.diversity) == ((2, 1), ("cmmd", "coverage"), (0, 0))
    assert (found.seed, found.resolution, found.num_images) == (7, 96, 20)
    # what a cell's name doesn't tell apart is one cell
    assert read("--teacher", "demo", "--guidance", "1,1.0000001,1.23456789").guidance == (1.0, 1.23457)


def test_a_folder_that_is_no_ones_to_write_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return mode == os.R_OK

    monkeypatch.setattr(os, "access", access)
    for given in ("photos/new/one", "photos"):
        with pytest.raises(
            InputError, match=rf"to write to, got .*photos in --output_dir {given}; fix its permissions"
        ):
            read("--teacher", "demo", "--output_dir", given)
    assert asked == [place / "photos"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0,1"], "fix --steps"),
        (["--steps", ""], "fix --steps"),
        (["--steps", "two"], "fix --steps"),
        (["--steps", "1.5"], "fix --steps"),
        (["--guidance", "-1"], "fix --guidance"),
        (["--guidance", "nan"], "fix --guidance"),
        (["--guidance", ","], "fix --guidance"),
        (["--teacher_steps", "0"], "got --teacher_steps 0"),
        (["--teacher_guidance", "x"], "fix --teacher_guidance"),
        (["--num_images", "1"], "2 images or more, got --num_images 1"),
        (["--num_images", "0"], "2 images or more, got --num_images 0"),
        (["--num_images", "19", "--metrics", "fd_infinity"], "--num_images of 20 or more for fd_infinity"),
        (["--batch_size", "0"], "got --batch_size 0"),
        (["--batch_sizes", "1,0"], "fix --batch_sizes"),
        (["--repeats", "0"], "got --repeats 0"),
        (["--diversity_images", "1"], "--diversity_images of 2 or more, or 0"),
        (["--diversity_prompts", "0"], "--diversity_prompts of 1 or more"),
        (["--resolution", "60"], "multiple of 8 pixels, got --resolution 60"),
        (["--metrics", "fid"], "--metrics out of fd_infinity,cmmd,coverage, got fid"),
        (["--prompts", "none.txt"], "got nothing at --prompts none.txt"),
        (["--data", "./none"], "got nothing at --data ./none"),
        (["--data", "none.safetensors"], "got nothing at --data"),
        (["--output_dir", "prompts.txt"], "got a file at .*prompts.txt in --output_dir prompts.txt"),
        (["--output_dir", "prompts.txt/x/y"], "got a file at .*prompts.txt in --output_dir prompts.txt/x/y"),
        (["--student", "./none"], "got nothing at --student ./none"),
        (["--student", "./prompts.txt"], "got nothing at --student"),
        (
            ["--student", "./empty"],
            r"a student \(stepdistill.json\) or a pipeline .* in --student ./empty, got neither",
        ),
        (["--student", "./stopped"], "got a training without an export; stepdistill export ./stopped"),
        (["--student", "./adapter"], "an adapter of another tool"),
        (["--student", "./pipe"], "expected --guidance with --student ./pipe"),
        (["--student", "org/turbo"], "got nothing at --student org/turbo; fix the path, or .* hub say its --guidance"),
        (
            ["--student", "./run", "--student", "photos/../run/"],
            "student once, got --student ./run and --student photos/",
        ),
        (["--student", "org/a", "--student", "org/a", "--guidance", "1"], "each student once"),
        (["--student", "demo", "--guidance", "1"], "expected a student, got the teacher at --student demo"),
    ],
)
def test_wrong_flags(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read("--teacher", "demo", *words)


def test_what_is_the_teacher_and_what_is_a_run_of_its_name(place: Path) -> None:
    given = ["--prompts", "prompts.txt", "--data", "demo", "--guidance", "1", "--teacher"]
    with pytest.raises(InputError, match="got the teacher at --student pipe"):
        read(*given, "./pipe", "--student", "pipe")
    with pytest.raises(InputError, match="got the teacher at --student org/sd"):
        read(*given, "org/sd", "--student", "org/sd")
    (place / "demo").mkdir()  # as the teacher that ships is called
    (place / "demo" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="got the teacher at --student demo"):
        read(*given, "demo", "--student", "demo")
    (place / "demo" / "stepdistill.json").write_text(json.dumps({"takes": "prompt", "weights": {}}))
    for path in ("demo", "./demo"):
        assert read(*given, "demo", "--student", path).students == (path,)


def test_facts_that_are_none(place: Path) -> None:
    for text in ("{}", "[]", "{"):
        (place / "run" / "stepdistill.json").write_text(text)
        with pytest.raises(InputError, match="stepdistill.json of an export"):
            read("--teacher", "demo", "--student", "./run")


def test_pipelines_with_a_guidance_said(place: Path) -> None:
    assert read("--teacher", "demo", "--student", "./pipe", "--student", "org/turbo", "--guidance", "0").guidance == (
        0.0,
    )


def test_statistics_of_real_images(place: Path) -> None:
    found = reference_flags(flags("--make_reference", "r.safetensors", "--data", "demo"))
    assert found == {"path": "r.safetensors", "data": "demo", "features": "demo", "resolution": None, "n": None}
    words = ["--make_reference", "r.safetensors", "--data", "./photos", "--features", "org/dino"]
    with pytest.raises(InputError, match="--resolution with --make_reference"):
        reference_flags(flags(*words))
    assert reference_flags(flags(*words, "--resolution", "64", "--num_images", "50"))["n"] == 50
    with pytest.raises(InputError, match=r"a .safetensors file, got --make_reference r.npz"):
        reference_flags(flags("--make_reference", "r.npz", "--data", "demo"))
    with pytest.raises(InputError, match="expected --data"):
        reference_flags(flags("--make_reference", "r.safetensors"))


@pytest.mark.parametrize(
    "words",
    [
        ["--teacher", "demo", "--steps", "0"],
        ["--teacher", "demo", "--student", "."],
        ["--make_reference", "x.npz", "--data", "demo"],
        ["--fail_if", "fd>+5%"],
        [],
    ],
)
def test_a_wrong_flag_is_told_before_torch_is_imported(tmp_path: Path, words: list[str]) -> None:
    code = (
        "import sys; from stepdistill import cli\n"
        f"try: cli.main({['bench', *words]!r})\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'jsonargparse') if m in sys.modules])"
    )
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=path, check=True
    )
    assert done.stdout.splitlines() == ["2", "[]"]
    assert done.stderr.startswith("error: expected") and list(tmp_path.iterdir()) == []
