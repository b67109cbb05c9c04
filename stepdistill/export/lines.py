"""The Diffusers code that loads an export and makes a picture. It runs as pasted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..families.loading import is_local, is_single_file, resolve

PLACE = "PATH/TO/{}"  # of what lies on this machine, for readers at others


def loading_lines(folder: str | Path, info: dict[str, Any], elsewhere: bool = False) -> str:
    """Diffusers code that loads the base model and the student in `folder` and makes a picture; it runs as pasted.

    Args:
        folder: the export, or the hub id that it is uploaded to.
        info: its stepdistill.json.
        elsewhere: for readers at other machines, who must fill in paths of this one.
    """
    write = {"prompt": _from_a_prompt, "class": _from_a_class, "nothing": _from_nothing}[info["takes"]]
    return "\n".join(write(quoted(folder), info, elsewhere))


def quoted(path: str | Path) -> str:
    """As a Python, JSON or YAML string."""
    return json.dumps(str(path), ensure_ascii=False)


def _from_a_prompt(place: str, info: dict[str, Any], elsewhere: bool) -> list[str]:
    pipeline, network, base = info["pipeline"], info["weights"]["network"], info["base_model"]
    path, vae = resolve(base["path"]), base["vae"]
    options = {} if is_single_file(path) else {key: base[key] for key in ("revision", "variant")}
    given = "".join(f", {key}={quoted(value)}" for key, value in options.items() if value is not None)
    opener = "from_single_file" if is_single_file(path) else "from_pretrained"
    given += "".join(f", {part}=None" for part in base.get("without", ()))
    names = [info["scheduler"], pipeline, *(["AutoencoderKL"] if vae else []), *([network["class"]] if network else [])]
    lines = [f"from diffusers import {', '.join(sorted(names))}", ""]
    if network:
        lines += [_network(place, network)]
        given += f", {network['folder']}={network['folder']}"
    lines += [f"pipe = {pipeline}.{opener}({_shown(path, elsewhere)}{given})"]
    if vae:
        subfolder = ', subfolder="vae"' if (Path(vae) / "vae").is_dir() else ""
        lines += [f"pipe.vae = AutoencoderKL.from_pretrained({_shown(vae, elsewhere)}{subfolder})"]
    if not network:
        lines += [f"pipe.load_lora_weights({place})"]
    call = f'"PROMPT", num_inference_steps={info["default_steps"]}, guidance_scale={info["guidance_scale"]}'
    if info["sigmas"]:
        call += f", sigmas={info['sigmas'][str(info['default_steps'])]}"
    if info.get("size"):
        call += ", height={0}, width={0}".format(info["size"])
    return [*lines, f"pipe.scheduler = {_scheduler(place, info)}", f"image = pipe({call}).images[0]"]


def _from_nothing(place: str, info: dict[str, Any], elsewhere: bool) -> list[str]:
    pipeline = info["pipeline"]
    return [
        f"from diffusers import {pipeline}",
        "",
        f"pipe = {pipeline}.from_pretrained({place})",
        f"image = pipe(num_inference_steps={info['default_steps']}).images[0]",
    ]


def _from_a_class(place: str, info: dict[str, Any], elsewhere: bool) -> list[str]:
    """By hand: no stock pipeline of few steps passes labels on."""
    network = info["weights"]["network"]
    unet = network["folder"]
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted((info['scheduler'], network['class'])))}",
        "",
        _network(place, network),
        f"scheduler = {_scheduler(place, info)}",
        f"scheduler.set_timesteps({info['default_steps']})",
        f"size, label = {unet}.config.sample_size, torch.tensor([0])",
        f"image = torch.randn(1, {unet}.config.in_channels, size, size)",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        f"        image = scheduler.step({unet}(image, t, class_labels=label).sample, t, image).prev_sample",
    ]


def _network(place: str, network: dict[str, str]) -> str:
    return f"{network['folder']} = {network['class']}.from_pretrained({place}, subfolder={quoted(network['folder'])})"


def _scheduler(place: str, info: dict[str, Any]) -> str:
    return f'{info["scheduler"]}.from_pretrained({place}, subfolder="scheduler")'


def _shown(path: str, elsewhere: bool) -> str:
    return quoted(PLACE.format(Path(path).name) if elsewhere and is_local(path) else path)
