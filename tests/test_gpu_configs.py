"""Every gpu.yaml takes its first steps, saves and scores, on tiny stand-ins for the hub's models and data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from first_steps import CONFIGS, write

MACHINES = ("--training.bf16", "false")  # which a GPU has, and this processor may emulate


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins are, and the runs: PPO takes what reward_model leaves."""
    return tmp_path_factory.mktemp("hub")


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(CONFIGS, key=lambda c: c.parent.name == "ppo"), ids=lambda c: c.parent.name)
def test_it_takes_its_first_steps(run_in_process: Callable[..., Any], hub: Path, config: Path) -> None:
    chapter, recipe = config.parts[-3:-1]
    line = ["--config", str(write(config, hub, full=False)), "--run.name", "gpu"]
    if recipe != "tokenizer":
        line += MACHINES
    done = run_in_process(importlib.import_module(f"recipes.{chapter}.{recipe}"), line, hub / "runs")
    assert done.code == 0, done.err
    assert done.figures and any(done.folder.rglob("*config.json"))  # a model, an adapter, or a tokenizer of each kind
