"""Every config in configs/<chapter>/<recipe>/ is accepted by its recipe, and survives being printed and read again."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.common.config import load_config, to_yaml
from recipes.common.training import training_defaults

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").glob("*/*.py")
    if path.parent.name != "common" and path.name != "__init__.py" and "run_recipe(main, Config)" in path.read_text()
)
CONFIGS = [config for recipe in RECIPES for config in sorted((ROOT / "configs").glob(f"*/{recipe.stem}/*.yaml"))]
PLACES = [str(config.relative_to(ROOT / "configs")) for config in CONFIGS]


def module_of(config: Path) -> Any:
    return importlib.import_module(f"recipes.{config.parents[1].name}.{config.parent.name}")


def defaults(section: str, section_class: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """What the frame fills in, less precision: whether a GPU config's bf16 or fp16 is possible is not this machine's to say."""
    from transformers import TrainingArguments

    if not issubclass(section_class, TrainingArguments):
        return {}
    machine_bound = ("bf16", "fp16", "torch_compile", "use_cpu")
    return training_defaults(Path("runs"), {key: v for key, v in given.items() if key not in machine_bound})


def load(config: Path, *argv: str) -> Any:
    module = module_of(config)
    return load_config(
        module.Config, ["--config", str(config), *argv], config_folder=config.parent, library_defaults=defaults
    )


def test_there_are_recipes_and_configs_to_test() -> None:
    assert {"llama", "full", "lora"} <= {recipe.stem for recipe in RECIPES}
    assert len(CONFIGS) >= 3 * len({config.parent for config in CONFIGS})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_a_laptop_a_gpu_and_a_cluster(recipe: Path) -> None:
    folder = ROOT / "configs" / recipe.parent.name / recipe.stem
    assert {"cpu.yaml", "gpu.yaml", "cluster.yaml"} <= {path.name for path in folder.glob("*.yaml")}


def test_no_config_is_without_its_recipe() -> None:
    recipes = {(path.parent.name, path.stem) for path in (ROOT / "recipes").glob("*/*.py")}
    chapters = {path.parent.name for path in RECIPES}
    orphans = [
        path for path in (ROOT / "configs").glob("*/*/*.yaml")
        if path.parents[1].name in chapters and (path.parents[1].name, path.parent.name) not in recipes
    ]  # fmt: skip
    assert not orphans


@pytest.mark.parametrize("config", CONFIGS, ids=PLACES)
def test_its_recipe_accepts_it(config: Path) -> None:
    loaded = load(config)
    given = yaml.safe_load(config.read_text())
    for section, values in given.items():
        for key, value in values.items():
            kept = loaded.values[section][key]
            if not isinstance(value, dict | list | float | str):
                assert kept == value, f"{section}.{key}"
            assert config.name in loaded.origin(f"{section}.{key}")


@pytest.mark.parametrize("config", CONFIGS, ids=PLACES)
def test_what_a_run_saves_of_it_reads_back_the_same(config: Path, tmp_path: Path) -> None:
    loaded = load(config)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(loaded.values))
    again = load_config(module_of(config).Config, ["--config", str(saved)], config_folder=None)
    assert again.values == loaded.values
    assert to_yaml(again.values) == saved.read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=PLACES)
def test_a_word_on_the_command_line_wins(config: Path) -> None:
    assert load(config, "--run.name", "mine").values["run"]["name"] == "mine"


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.stem == "cpu"], ids=[p for p in PLACES if "/cpu." in p])
def test_the_laptop_config_builds_here(config: Path) -> None:
    """Its library sections are constructed too; bf16 that this processor may lack is left to the machine."""
    built = load(config).build()
    training = getattr(built, "training", None)
    if training is not None:
        assert training.max_steps > 0 or training.num_train_epochs > 0


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.stem == "cpu"], ids=[p for p in PLACES if "/cpu." in p])
def test_the_laptop_config_needs_no_network(config: Path) -> None:
    """Models are fresh or another recipe's result, data is builtin or another run's file."""
    from recipes.common.builtin import BUILTINS

    values = yaml.safe_load(config.read_text())
    for key in ("name", "tokenizer"):
        name = values.get("model", {}).get(key)
        assert name is None or name.startswith("runs/"), f"model.{key}: {name}"
    data = values.get("data", {}).get("name", "pydocs")
    for name in [data] if isinstance(data, str) else data:
        assert name in BUILTINS or name.startswith(("runs/", "recipes/")), f"data.name: {name}"


@pytest.mark.parametrize("config", CONFIGS, ids=PLACES)
def test_no_config_names_a_path_of_somebodys_machine(config: Path) -> None:
    assert not re.search(r"[:\s\"'](/home|/work|/Users|/mnt|/tmp)/", config.read_text())
