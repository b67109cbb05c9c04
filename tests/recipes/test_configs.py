"""The shipped settings are ones that the recipes take."""

from pathlib import Path

import pytest
from recipe_runs import ROOT, load_recipe

from stepdistill.config import parse

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_is_one_of_its_recipe(path: Path) -> None:
    named = [r.stem for r in (ROOT / "recipes").glob("*.py") if path.stem.startswith(r.stem)]
    recipe = load_recipe(*(named or ["lcm_lora"]))  # lcm_full_sd15.yaml is of lcm_lora.py too
    parsed = parse(recipe.Recipe, ["--config", str(path)])
    assert parsed.recipe.output_dir.startswith("out/")
    assert (parsed.recipe.teacher.path == "demo") == path.stem.endswith("_demo")
