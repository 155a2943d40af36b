"""Where a run goes and how it ends: its folder, SIGTERM outside of the training, settings that a library's Trainer refuses."""

from __future__ import annotations

import json
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


def measures_nothing(config: Config, run: RunFolder) -> dict[str, Any]:
    assert Path(config.training.output_dir) == run.checkpoints.absolute()
    return {"loss": float("nan"), "mean": float("inf"), "accuracy": 0.5}


def test_the_home_folder_is_one_place_to_us_and_to_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_recipe(measures_nothing, Config, ["--run.root", "~/runs"]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


def test_figures_that_are_no_numbers_are_null_and_a_run_that_ended_holds_no_folder(tmp_path: Path) -> None:
    words = ["--run.root", str(tmp_path)]
    assert run_recipe(measures_nothing, Config, words) == 0
    folder = tmp_path / "test_recipe" / "default"
    figures = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert figures["loss"] is figures["mean"] is None and figures["accuracy"] == 0.5
    assert not (folder / ".lock").exists()
    assert run_recipe(measures_nothing, Config, [*words, "--run.overwrite", "true"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run.root", ""], "run.root is blank"),
        (["--run.root", "~nobody-here/runs"], "run.root '~nobody-here/runs'"),
        (["--run.root", "x" * 300], "File name too long"),
        (["--run.name", "x" * 300], "run.name: 300 bytes are more than a file system takes"),
    ],
)
def test_names_that_are_no_folders_are_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_recipe(measures_nothing, Config, words) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
