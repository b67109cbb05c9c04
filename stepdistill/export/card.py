"""The model card of a run: what it is, how to load it, how it was made, what it looks like and how well it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..families import TeacherConfig
from ..families.loading import is_local, is_single_file, resolve

CARD, TABLE, SAMPLES = "README.md", "table.md", "samples"


def loading_lines(folder: str | Path, base: str | TeacherConfig, steps: int = 4, guidance_scale: float = 1.0) -> str:
    """Diffusers code that loads the base model and the adapter in `folder` and makes a picture; it runs as pasted."""
    base = TeacherConfig(base) if isinstance(base, str) else base
    path = resolve(base.path)
    options = {} if is_single_file(path) else {"revision": base.revision, "variant": base.variant}
    given = "".join(f', {key}="{value}"' for key, value in options.items() if value is not None)
    opener = "from_single_file" if is_single_file(path) else "from_pretrained"
    names = ["LCMScheduler", "StableDiffusionPipeline"] + (["AutoencoderKL"] if base.vae else [])
    lines = [f"from diffusers import {', '.join(sorted(names))}", ""]
    lines += [f"pipe = StableDiffusionPipeline.{opener}({_quoted(path)}{given})"]
    if base.vae:
        lines += [f"pipe.vae = AutoencoderKL.from_pretrained({_quoted(base.vae)}{_vae_subfolder(base.vae)})"]
    lines += [
        f"pipe.load_lora_weights({_quoted(folder)})",
        f'pipe.scheduler = LCMScheduler.from_pretrained({_quoted(folder)}, subfolder="scheduler")',
        f'image = pipe("PROMPT", num_inference_steps={steps}, guidance_scale={guidance_scale}).images[0]',
    ]
    return "\n".join(lines)


def _quoted(path: str | Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _vae_subfolder(path: str) -> str:
    return ', subfolder="vae"' if (Path(path) / "vae").is_dir() else ""


def base_model(teacher: TeacherConfig) -> str:
    """The base as a card names it: its hub id, or the name of its folder or file."""
    if teacher.path == "demo" or not is_local(teacher.path):
        return "stepdistill-demo-teacher" if teacher.path == "demo" else teacher.path
    return Path(teacher.path).expanduser().resolve().stem


def write_card(folder: Path, info: dict[str, Any], lines: str, run: Path) -> Path:
    """Writes `folder/README.md` from the facts in stepdistill.json, with the newest picture and the table of `run`."""
    path = folder / CARD
    path.write_text("\n\n".join([_front_matter(info), *_body(info, lines), *_shown(run)]) + "\n", encoding="utf-8")
    return path


def _front_matter(info: dict[str, Any]) -> str:
    tags = ["diffusers", "lora", info["method"], "stepdistill", "text-to-image"]
    return "\n".join(
        [
            "---",
            f"base_model: {_quoted(info['base_model']['name'])}",
            "base_model_relation: adapter",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
        ]
    )


def _body(info: dict[str, Any], lines: str) -> list[str]:
    student, trained = info["student"], info["trained"]
    counts = ", ".join(str(n) for n in info["steps"])
    rows = [
        f"- steps: {counts} (timesteps of {info['default_steps']}: {info['timesteps'][str(info['default_steps'])]})",
        f"- guidance_scale: {info['guidance_scale']:g} (up to 1.5 works too); the weights hold guidance w from "
        f"{trained['w_min']:g} to {trained['w_max']:g}, a guidance_scale of {trained['w_min'] + 1:g} to "
        f"{trained['w_max'] + 1:g} of the base model",
        f"- adapter: rank {student['rank']}, alpha {student['alpha']:g}, {student['modules']} modules, "
        f"{info['weights']['dtype']}",
        "- made with " + ", ".join(f"{name} {number}" for name, number in info["versions"].items()),
    ]
    if student["rank"] != student["alpha"]:
        strength = student["alpha"] / student["rank"]
        rows.insert(
            3,
            f"- strength: alpha / rank = {strength:g}, in the file's metadata; set it by hand in a tool that reads none",
        )
    return [
        f"# {info['method'].upper()}-LoRA of {info['base_model']['name']}",
        f"A latent-consistency adapter for {info['base_model']['name']}, made with stepdistill: pictures in "
        f"{info['steps'][0]} to {info['steps'][-1]} steps without classifier-free guidance.",
        f"```python\n{lines}\n```",
        "## Details",
        "\n".join(rows),
    ]


def _shown(run: Path) -> list[str]:
    parts: list[str] = []
    pictures = sorted((run / SAMPLES).glob("*.png"), key=lambda p: (p.stat().st_mtime, p.name))
    if pictures:
        parts += ["## Samples", f"![samples]({SAMPLES}/{pictures[-1].name})"]
    if (run / TABLE).is_file():
        parts += ["## Results", (run / TABLE).read_text(encoding="utf-8").strip()]
    return parts
