"""The shipped settings are ones that the recipes take."""

from pathlib import Path

import pytest
from recipe_runs import ROOT, load_recipe

from stepdistill.config import parse

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_is_one_of_its_recipe(path: Path) -> None:
    recipe = load_recipe("progressive" if path.stem.startswith("progressive") else "lcm_lora")
    parsed = parse(recipe.Recipe, ["--config", str(path)])
    assert parsed.recipe.output_dir.startswith("out/")
    assert (parsed.recipe.teacher.path == "demo") == path.stem.endswith("_demo")
