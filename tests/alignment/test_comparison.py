"""The comparison of the methods: what they have to have in common for it to be one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import alignment_comparison as comparison


def test_every_policy_learns_from_the_same_prompts_and_starts_from_the_same_model(tmp_path: Path) -> None:
    from recipes.common.config import load_config

    seen = []
    for step in comparison.plan(tmp_path, 2, None):
        if step.recipe in ("dpo", "ppo", "grpo"):
            module = importlib.import_module(f"recipes.{step.chapter}.{step.recipe}")
            folder = ROOT / "configs" / step.chapter / step.recipe
            values = load_config(module.Config, step.command(tmp_path, []), config_folder=folder).values
            seen.append((values["model"]["name"], values["data"]["name"], values["data"]["seed"]))
    assert len(seen) == 7 and set(seen) == {(str(tmp_path / "full" / "sft" / "model"), "tasks_prompts", 0)}
