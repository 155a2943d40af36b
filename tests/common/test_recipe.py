"""How a run ends: SIGTERM outside of the training, and settings that a library's Trainer refuses."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from recipes.common.config import Section
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Run

if TYPE_CHECKING:
    import transformers


@dataclass
class Config:
    training: Section[transformers.TrainingArguments]
    run: Run


def is_told_to_stop(config: Config, run: RunFolder) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    return {}


def builds_a_trainer(config: Config, run: RunFolder) -> dict[str, Any]:
    from transformers import Trainer

    Trainer(torch.nn.Linear(1, 1), config.training)
    raise ValueError("a bug of ours")


def test_sigterm_outside_of_the_training_ends_as_ctrl_c_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_recipe(is_told_to_stop, Config, ["--run.root", str(tmp_path)]) == 130
    assert "goes on with --run.resume true" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_trainer_refuses_is_the_users_and_the_rest_is_a_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run.root", str(tmp_path), "--training.eval_strategy"]
    assert run_recipe(builds_a_trainer, Config, [*words, "epoch"]) == 2
    assert capsys.readouterr().err.startswith("error: training: You have set `args.eval_strategy`")
    with pytest.raises(ValueError, match="a bug of ours"):
        run_recipe(builds_a_trainer, Config, [*words, "no", "--run.name", "other"])
