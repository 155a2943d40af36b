"""`kill -9` at any moment: what was checkpointed is whole, and the resumed run ends as one that nobody touched."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import TINY_LLAMA, make_tokenizer
from transformers import Trainer

from recipes.common.run_folder import RunFolder
from recipes.pretraining import llama


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of twelve steps with a checkpoint after each four."""
    folder = tmp_path_factory.mktemp("sources")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("".join(f"the cat sat on mat {n} and slept\n" for n in range(300)))
    values = {
        "model.tokenizer": folder / "tokenizer",
        "model.config": json.dumps(TINY_LLAMA),
        "data.name": folder / "text.txt",
        "llama.block_length": 64,
        "llama.compare_with_xz": "false",
        "training.max_steps": 12,
        "training.per_device_train_batch_size": 2,
        "training.save_steps": 4,
        "training.bf16": "false",
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step_six(patch: pytest.MonkeyPatch) -> None:
    log = RunFolder.log
    patch.setattr(RunFolder, "log", lambda run, step, **figures: die() if step == 6 else log(run, step, **figures))


def while_the_second_checkpoint_is_written(patch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer are there, what comes after them is not."""
    save = Trainer._save_rng_state
    patch.setattr(Trainer, "_save_rng_state", lambda self, to: die() if to.endswith("checkpoint-8") else save(self, to))


def while_the_finished_model_is_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunFolder, "save_model", die)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "after"),
    [(at_step_six, 4), (while_the_second_checkpoint_is_written, 4), (while_the_finished_model_is_written, 12)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_killed_run_loses_the_steps_since_its_last_checkpoint_and_nothing_else(
    run_in_process: Any,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: Callable[[pytest.MonkeyPatch], None],
    after: int,
) -> None:
    whole = run_in_process(llama, [*words, "--run.name", "whole"], tmp_path)
    assert whole.code == 0, whole.err
    if (child := os.fork()) == 0:
        try:
            signal.alarm(900)  # a child that hangs is no child that was killed
            moment(monkeypatch)
            run_in_process(llama, [*words, "--run.name", "killed"], tmp_path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    resumed = run_in_process(llama, [*words, "--run.name", "killed", "--run.resume", "true"], tmp_path)
    assert resumed.code == 0, resumed.err
    assert f"resuming after step {after}" in resumed.out
    assert [row["step"] for row in resumed.history()] == list(range(1, 13))
    losses = [[row["loss"] for row in run.history()] for run in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    ours, theirs = (load_file(run.folder / "model" / "model.safetensors") for run in (resumed, whole))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)
    names = {path.name for path in (resumed.folder / "checkpoints").iterdir()}
    assert names == {"checkpoint-8", "checkpoint-12"}
