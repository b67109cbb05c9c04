"""The model card of a run: what it is, how to load it, how it was made, what it looks like and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..families import Model, TeacherConfig
from ..families.loading import is_local
from .kohya import KOHYA
from .lines import quoted
from .part import absent

CARD, TABLE, SAMPLES = "README.md", "table.md", "samples"
TASKS = {"prompt": "text-to-image", "nothing": "unconditional-image-generation", "class": "image-generation"}


def base_model(teacher: TeacherConfig) -> str:
    """The base as a card names it: its hub id, or the name of its folder or file."""
    if teacher.path == "demo" or not is_local(teacher.path):
        return "stepdistill-demo-teacher" if teacher.path == "demo" else teacher.path
    return Path(teacher.path).expanduser().resolve().stem


def base_facts(model: Model, teacher: TeacherConfig) -> dict[str, Any]:
    """What stepdistill.json says of the base: which checkpoint it was, and whose weights, which know it again elsewhere."""
    return {
        "name": base_model(teacher),
        "path": teacher.path,
        "revision": teacher.revision,
        "variant": teacher.variant,
        "vae": teacher.vae,
        "hash": model.denoiser_hash(),
        "without": absent(model.pipeline()),
    }


def write_card(folder: Path, info: dict[str, Any], lines: str, run: Path) -> Path:
    """Writes :func:`card` as `folder/README.md`."""
    path = folder / CARD
    path.write_text(card(info, lines, run), encoding="utf-8")
    return path


def card(info: dict[str, Any], lines: str, run: Path, elsewhere: bool = False) -> str:
    """The card from the facts in stepdistill.json, with the newest picture and the table of `run`.

    Args:
        elsewhere: for the hub, which takes no other base_model than one that is there.
    """
    return "\n\n".join([_front_matter(info, elsewhere), *_body(info, lines), *_shown(run)]) + "\n"


def _front_matter(info: dict[str, Any], elsewhere: bool) -> str:
    base, adapter, task = info["base_model"], info["weights"]["network"] is None, TASKS[info["takes"]]
    fields = {
        "base_model": base["name"],
        "base_model_relation": "adapter" if adapter else "finetune",
        **info["licence"],
        "library_name": "diffusers",
        "pipeline_tag": task,
    }
    if elsewhere and (base["path"] == "demo" or is_local(base["path"])):
        del fields["base_model"], fields["base_model_relation"]
    tags = ["diffusers", *(["lora"] if adapter else []), info["method"], "stepdistill", task]
    rows = [*(f"{field}: {quoted(value)}" for field, value in fields.items()), "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *rows, "---"])


def _body(info: dict[str, Any], lines: str) -> list[str]:
    base, steps = info["base_model"]["name"], info["steps"]
    adapter = info["weights"]["network"] is None
    thing = "adapter" if adapter else "model"
    return [
        f"# {info['title']}{'-LoRA' * adapter} of {base}",
        f"A {info['kind']} {thing} {'for' if adapter else 'distilled from'} {base}, made with stepdistill: pictures in "
        f"{_reach(steps)}{' without classifier-free guidance' * (info['takes'] == 'prompt')}.",
        f"```python\n{lines}\n```",
        "## Details",
        "\n".join(f"- {row}" for row in [*_sampling_rows(info), *_student_rows(info), *_origin_rows(info)]),
    ]


def _reach(steps: list[int]) -> str:
    """E.g. "1 to 8 steps"."""
    return f"{steps[0]} to {steps[-1]} steps" if len(steps) > 1 else f"{steps[0]} step{'s' * (steps[0] > 1)}"


def _sampling_rows(info: dict[str, Any]) -> list[str]:
    counts, default = ", ".join(str(n) for n in info["steps"]), str(info["default_steps"])
    what = "sigmas" if info["sigmas"] else "timesteps"
    visited = ", ".join(f"{value:.6g}" for value in info[what].get(default, ()))
    rows = [f"steps: {counts}" + (f" ({what} of {default}: [{visited}])" if visited else "")]
    scale = info["guidance_scale"]
    if info["guidance_range"]:
        low, high = info["guidance_range"]
        others = f", or another from {low:g} to {high:g}" if low < high else ""
        rows += [f"guidance_scale: {scale:g}{others}: the network reads it, and runs once a step whatever it is"]
    elif info["takes"] == "prompt":
        rows += [f"guidance_scale: {scale:g}{info['guidance_note']}"]
    return rows


def _student_rows(info: dict[str, Any]) -> list[str]:
    student, weights = info["student"], info["weights"]
    if student["kind"] == "full":
        return [f"network: {student['parameters']:,} weights of its own, {weights['dtype']}"]
    size = f"rank {student['rank']}, alpha {student['alpha']:g}, {student['modules']} modules, {weights['dtype']}"
    if weights["network"]:
        return [f"network: the base with an adapter merged into its weights ({size}); no adapter can be loaded into it"]
    rows = [f"adapter: {size}"]
    if student["rank"] != student["alpha"]:
        strength = student["alpha"] / student["rank"]
        rows += [
            f"strength: alpha / rank = {strength:g}, in the file's metadata; set it by hand in a tool that reads none"
        ]
    if KOHYA in weights["files"]:
        rows += [f"`{KOHYA}`: the same adapter for tools that read kohya's layout"]
    return rows


def _origin_rows(info: dict[str, Any]) -> list[str]:
    made = "made with " + ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    return [made] if info["licence"] else [made, "licence: see the base model"]


def _shown(run: Path) -> list[str]:
    parts: list[str] = []
    pictures = sorted((run / SAMPLES).glob("*.png"), key=lambda p: (p.stat().st_mtime, p.name))
    if pictures:
        parts += ["## Samples", f"![samples]({SAMPLES}/{pictures[-1].name})"]
    if (run / TABLE).is_file():
        parts += ["## Results", (run / TABLE).read_text(encoding="utf-8").strip()]
    return parts
