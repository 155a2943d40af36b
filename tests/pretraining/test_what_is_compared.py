"""What the figures of the pretraining recipes are of: text that was not learned, and a start that was."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from recipes.common.errors import UserError


@pytest.mark.parametrize("name", ["bart", "t5", "glm", "unilm"])
def test_what_is_scored_is_the_held_out_text_and_what_is_learned_is_not(
    name: str, sources: Any, run_in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, letters in (("train", "abcdefgh "), ("validation", "stuvwxyz ")):
        rows = [{"text": "".join(np.random.default_rng(i).choice(list(letters), 300))} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {}

    def stop(trainer: Any, tokenizer: Any, held_out: Any, run: Any, **_: Any) -> None:
        for side, batches in (("held_out", held_out), ("train", [next(iter(trainer.get_train_dataloader()))])):
            labels = [i for batch in batches for i in batch["labels"].flatten().tolist() if i != -100]
            seen[side] = set(tokenizer.decode(labels, skip_special_tokens=True))
        raise UserError("enough")

    monkeypatch.setattr("recipes.common.draws.pretrain_and_score", stop)
    tests, recipe = importlib.import_module(f"test_{name}"), importlib.import_module(f"recipes.pretraining.{name}")
    done = run_in_process(recipe, tests.tiny(sources, data__name=folder), tmp_path / "runs")
    assert "enough" in done.err, done.err
    assert seen["held_out"] & set("stuvwxyz") and not seen["held_out"] & set("abcdefgh")
    assert seen["train"] & set("abcdefgh") and not seen["train"] & set("stuvwxyz")


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_the_classifier_starts_from_the_start_that_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Any = importlib.import_module(f"recipes.pretraining.{name}")
    caught: dict[str, Any] = {}

    def catch(starts: Any, split: Any, classifier: Any, *_: Any) -> dict[str, float]:
        caught.update(starts=starts, classifier=classifier)
        return {}

    monkeypatch.setattr("recipes.common.downstream.compare_classifiers", catch)
    torch.manual_seed(1)
    args = SimpleNamespace(seed=0)
    model: Any
    if name == "bert":
        sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=20, **sizes))
        recipe.compare("x", ([], []), None, model, None, args, None)
    else:
        of_a_side = (("layers", 1), ("attention_heads", 1), ("ffn_dim", 8))
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in of_a_side}
        config = transformers.BartConfig(vocab_size=20, d_model=8, max_position_embeddings=8, **sizes)
        model = transformers.BartForConditionalGeneration(config)
        settings = SimpleNamespace(classification=None, training=args)
        recipe.compare_classification(settings, None, None, None, model, ([], []))
    told = model.base_model.state_dict()
    drawn = [
        key for key in told if "weight" in key and not any(part in key for part in ("norm", "Norm", "pooler", "embed"))
    ]
    for start, is_pretrained in zip(caught["starts"], (True, False), strict=True):
        made = caught["classifier"](start, ["a", "b", "c"])
        own = made.base_model.state_dict()
        assert made.config.num_labels == 3
        assert {torch.equal(own[key], told[key]) for key in drawn} == {is_pretrained}
