"""A stage of a run: what a resumed one takes up of the sitting before it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from recipes.common import adaptation, machine, stages
from recipes.common.errors import Interrupted
from recipes.common.run_folder import RunFolder
from recipes.common.run_opening import open_folder


class Squares(torch.nn.Module):
    """What a Trainer takes: it gives its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


def save(part: Any, trainer: Trainer, model: torch.nn.Module, stage: RunFolder, *_: Any) -> None:
    (stage.path / "adapter").mkdir()
    save_file(model.state_dict(), stage.path / "adapter" / "adapter_model.safetensors")


def make_trainer(part: Any, model: torch.nn.Module, args: TrainingArguments, stage: RunFolder) -> Trainer:
    return Trainer(model, args, train_dataset=part["train"])


def test_a_resumed_stage_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "peak_flops", lambda name: 1e9)
    monkeypatch.setattr(adaptation, "announce", lambda *_: None)
    monkeypatch.setattr(adaptation, "save", save)
    monkeypatch.setattr(stages, "replace", lambda task, data: data)
    log = RunFolder.log

    def sitting(name: str, resume: bool) -> RunFolder:
        run = open_folder(
            tmp_path / name, recipe="demo", fingerprint="a: 1\n", resume=resume, overwrite=False, dry=False, given=set()
        )
        run.started -= 100
        try:
            for stage in ("first", "second"):
                args = TrainingArguments(
                    "unused", report_to="none", use_cpu=True, save_steps=2, max_steps=6, logging_steps=1
                )
                stages.train_stage(
                    stage, None, {"train": rows}, Squares(), args, run, SimpleNamespace(time_limit_minutes=None),
                    method="", told={}, make_trainer=make_trainer,
                )  # fmt: skip
        finally:
            run.unlock()
        return run

    rows = [{"x": torch.randn(2)} for _ in range(64)]

    def die(stage: RunFolder, step: int, **figures: Any) -> None:
        log(stage, step, **figures)
        if stage.path.name == "second" and step == 3:
            raise RuntimeError("killed")

    def stop(stage: RunFolder, step: int, **figures: Any) -> None:
        log(stage, step, **figures)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    sitting("whole", resume=False)
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", stop)
        with pytest.raises(Interrupted, match="after step 6"):
            sitting("parts", resume=False)
    assert not (tmp_path / "parts" / "stages" / "first" / "adapter").exists()
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", die)
        with pytest.raises(RuntimeError, match="killed"):
            sitting("parts", resume=True)
    second = tmp_path / "parts" / "stages" / "second"
    told = json.loads((second / "checkpoints" / "checkpoint-2" / "complete").read_text())
    assert 200 < told["wall_seconds"] < 250
    capsys.readouterr()
    run = sitting("parts", resume=True)
    said = capsys.readouterr().out
    assert "stage first: trained before" in said and "resuming after step 2" in said and "afresh" not in said
    assert [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert 300 < run.wall_seconds() < 350
    ours, whole = (
        load_file(tmp_path / name / "stages" / "second" / "adapter" / "adapter_model.safetensors")
        for name in ("parts", "whole")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)
