"""The real.yaml of the recipes that start from another's model: on the data beside the checkout, each takes its first steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import command_line, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FEW: dict[str, dict[str, Any]] = {
    "finetuning.full": {"evaluation.max_new_tokens": 4},
    "finetuning.lora": {"lora.r": 4, "lora.lora_alpha": 8, "evaluation.max_new_tokens": 4},
    "finetuning.p_tuning_v2": {"data.max_samples": "null"},  # a class must have been seen
    "alignment.reward_model": {"reward.max_length": 1000},
}
POSITIONS = {"alignment.reward_model": 1024}  # a conversation is long in bytes; default: those of `make llama`'s model
FIGURES = {
    "finetuning.full": ("eval_loss", "baseline_loss"),
    "finetuning.lora": ("eval_loss", "baseline_loss", "adapter_bytes"),
    "finetuning.p_tuning_v2": ("accuracy", "baseline_accuracy"),
    "alignment.reward_model": ("reward_accuracy", "baseline_words_accuracy", "length_correlation"),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FEW)
def test_it_takes_its_first_steps_and_scores_them(
    shared_data: Path, run_in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str
) -> None:
    monkeypatch.chdir(ROOT)  # the configs name the data relative to the checkout
    tokenizer = make_tokenizer()
    for part in (tokenizer, make_model(tokenizer, max_position_embeddings=POSITIONS.get(recipe, 256))):
        part.save_pretrained(tmp_path / "model")
    chapter, name = recipe.split(".")
    steps = {"training.max_steps": 2, "training.per_device_train_batch_size": 2, "training.warmup_steps": 0}
    fewer = {
        "data.max_samples": 300,
        "data.max_validation_samples": 60,
        "evaluation.max_samples": 8,
        **FEW[recipe],
        **steps,
    }
    config = ROOT / "configs" / chapter / name / "real.yaml"
    line = command_line({"config": config, "model.name": tmp_path / "model", "run.name": "real", **fewer})
    done = run_in_process(importlib.import_module(f"recipes.{recipe}"), line, tmp_path)
    assert done.code == 0, done.err
    assert set(FIGURES[recipe]) <= done.figures.keys()
    assert not (ROOT / "runs" / name / "real").exists()
