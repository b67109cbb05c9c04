"""The flags of `stepdistill bench`: defaults, and that every wrong one is told before torch is imported."""

from __future__ import annotations

import argparse
import json
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
    for name in ("run", "pipe", "photos", "empty", "stopped", "adapter"):
        (tmp_path / name).mkdir()
    facts = {"takes": "prompt", "weights": {}}
    (tmp_path / "run" / "stepdistill.json").write_text(json.dumps(facts))
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "stopped" / "config.yaml").write_text("")
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return tmp_path


def test_the_demo_needs_a_teacher_alone(place: Path) -> None:
    found = read("--teacher", "demo", "--student", "./run", "--student", "./run")
    assert (found.prompts, found.data, found.features, found.num_images) == ("demo", "demo", "demo", 1200)
    assert found.students == ("./run", "./run") and found.steps == (1, 2, 4, 8) and found.guidance == ()
    assert (found.teacher_steps, found.teacher_guidance) == (50, (2.0,))
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
        (["--output_dir", "prompts.txt"], "got a file at --output_dir"),
        (["--student", "./none"], "got nothing at --student ./none"),
        (["--student", "./prompts.txt"], "got nothing at --student"),
        (
            ["--student", "./empty"],
            r"a student \(stepdistill.json\) or a pipeline .* in --student ./empty, got neither",
        ),
        (["--student", "./stopped"], "got a training without an export; stepdistill export ./stopped"),
        (["--student", "./adapter"], "an adapter of another tool"),
        (["--student", "./pipe"], "expected --guidance with --student ./pipe"),
        (["--student", "org/turbo"], "expected --guidance with --student org/turbo"),
    ],
)
def test_wrong_flags(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read("--teacher", "demo", *words)


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
