"""The rule of the house: a module imports its own floor and lower ones, and the objectives know no backbone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "stepdistill"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "diffusion": 0,
    "networks": 1, "families": 1, "data": 1,
    "methods": 2, "kd": 2,
    "training": 3,
    "export": 4, "bench": 4, "demo": 4, "cli": 4, "doctor": 4,
}  # fmt: skip
ROOT = ("method", "batch", "randomness", "errors", "config")  # everything speaks these
# single modules that stand lower than their folder: a drawn world is data, and its judge a network
LOWER = {"demo.world": 1, "demo.shapes": 1}
# floor 0 is pure functions on tensors
FLOOR_0_IMPORTS = {"torch", *sys.stdlib_module_names}


def name_of(path: Path) -> str:
    """`diffusion.schedule` for stepdistill/diffusion/schedule.py; `families` for families/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _runs(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements but those under `if TYPE_CHECKING:`, inside functions too: a late import is an import."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.stmt):
            yield node
        stack.extend(ast.iter_child_nodes(node))


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """What `module` imports: `.diffusion.schedule` for our own, `torch` for others; names of modules are resolved."""
    here = module.split(".") if module else []
    found: set[str] = set()
    for node in _runs(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["stepdistill", *here[: len(here) - node.level + (1 if is_package else 0)], *base]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return {"." + n.removeprefix("stepdistill").strip(".") if n.split(".")[0] == "stepdistill" else n for n in found}


def part(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int | None:
    """The floor of one of our modules (or of a name in one); None for the root's, which everything may import."""
    for lower, at in LOWER.items():
        if name == lower or name.startswith(f"{lower}."):
            return at
    first = part(name)
    return None if first in ("", "__version__", *ROOT) else FLOORS[first]


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What breaks the rule in one module."""
    found = []
    for imported in sorted(imports(source, module, is_package)):
        own, target = imported.startswith("."), imported.removeprefix(".")
        here, there = floor(module), floor(target) if own else None
        if part(target) == "recipes" or part(target) == "benchmarks":
            found.append(f"{module} imports {target}: nothing imports recipes")
        elif own and here is None and there is not None and not _root_may(module, target):
            found.append(f"{module}, at the root, imports {target}")
        elif own and here is not None and there is not None and there > here:
            found.append(f"{module} (floor {here}) imports {target} (floor {there})")
        elif here == 0 and own and there is None and part(target) != "errors":
            found.append(f"{module} (floor 0) imports {target}: only errors, of the root")
        elif here == 0 and not own and part(target) not in FLOOR_0_IMPORTS:
            found.append(f"{module} (floor 0) imports {target}: only torch and the standard library")
        elif own and part(module) in ("methods", "kd") and part(target) == "families":
            found.append(f"{module} imports {target}: an objective knows no backbone")
        elif own and part(module) == "training" and part(target) in ("methods", "kd", "families"):
            found.append(f"{module} imports {target}: the loop knows Method and Network")
    return found


def _root_may(module: str, target: str) -> bool:
    """method.py speaks of networks, the one class that it hands to the loop."""
    return module == "method" and target.startswith("networks.network")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: name_of(p) or "stepdistill")
def test_a_module_imports_its_own_floor_and_lower_ones(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py") == []


def test_every_module_has_a_place() -> None:
    """A new folder must say here on which floor it stands."""
    assert {part(name_of(p)) for p in MODULES} <= {"", *ROOT, *FLOORS}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("diffusion.solver", "from ..networks.lora import Adapters", "floor 1"),
        ("diffusion.solver", "from .. import batch", "only errors"),
        ("diffusion.solver", "def f():\n    import numpy as np", "only torch"),
        ("methods.lcm", "from ..families.unet import UNet", "no backbone"),
        ("kd.hinton", "from stepdistill import families", "no backbone"),
        ("methods.lcm", "import stepdistill.training.loop", "floor 3"),
        ("training.loop", "from ..methods.lcm import LCM", "knows Method"),
        ("training.loop", "try:\n    from ..families import load\nexcept ImportError:\n    pass", "knows Method"),
        ("training.loop", "from ..export import lora", "floor 4"),
        ("networks.lora", "from ..methods import lcm", "floor 2"),
        ("batch", "from .networks.network import Network", "at the root"),
        ("cli", "import recipes.lcm_lora", "nothing imports recipes"),
        ("data.images", "from ..demo.teacher import unet", "floor 4"),
    ],
)
def test_the_rule_sees_what_breaks_it(module: str, source: str, fault: str) -> None:
    (found,) = faults(source, module)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "diffusion.solver",
            "import math, torch\nfrom torch import Tensor\nfrom .schedule import expand\nfrom ..errors import E",
        ),
        ("training.loop", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..methods.lcm import LCM"),
        (
            "training.loop",
            "from ..networks.ema import EMA\nfrom ..data.order import indices\nfrom .state import split_state",
        ),
        ("bench.table", "from ..demo.world import World\nfrom ..methods.lcm import LCM\nfrom ..families import load"),
        ("data.images", "from ..demo.world import World"),
        ("families.unet", "import diffusers\nfrom .. import __version__\nfrom .model import Model"),
    ],
)
def test_the_rule_allows_what_keeps_it(module: str, source: str) -> None:
    assert faults(source, module) == []
