"""Every gpu.yaml and cluster.yaml takes its first steps, saves and scores, on tiny stand-ins for the hub's models and data.

What a single process on a processor cannot show is left out: vLLM, flash attention, and the launchers, which
tests/pretraining/test_llama.py and others run in two processes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from first_steps import CLUSTER, GPU, write

from recipes.common import machine

CONFIGS = sorted([*GPU, *CLUSTER], key=lambda config: config.parent.name == "ppo")  # it takes what reward_model leaves


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins are, and the runs."""
    return tmp_path_factory.mktemp("hub")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.parent.name}-{config.stem}")
def test_it_takes_its_first_steps(run_in_process: Callable[..., Any], hub: Path, config: Path) -> None:
    chapter, recipe, kind = *config.parts[-3:-1], config.stem
    line = ["--config", str(write(config, hub, full=False)), "--run.name", kind]
    if recipe != "tokenizer":
        line += ["--training.bf16", "false"]
        if not machine.choose_bf16().value:  # emulated, a bf16 product takes a hundred times as long
            line += ["--model.dtype", "float32"]
    done = run_in_process(importlib.import_module(f"recipes.{chapter}.{recipe}"), line, hub / "runs")
    assert done.code == 0, done.err
    assert done.figures and any(done.folder.rglob("*config.json"))  # a model, an adapter, or a tokenizer of each kind
