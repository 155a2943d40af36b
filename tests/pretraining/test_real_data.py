"""The real.yaml of the pretraining recipes: on the data beside the checkout each takes its first steps, and scores them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("bert", "gpt", "llama", "t5", "bart")
TINY: dict[str, dict[str, Any]] = {
    "bert": {
        "model.config.hidden_size": 16,
        "model.config.intermediate_size": 32,
        "model.config.num_hidden_layers": 1,
        "model.config.num_attention_heads": 2,
        "classification.steps": 2,
        "classification.eval_rows": 200,
        "data.max_samples": 400,
        "data.max_validation_samples": 200,
    },
    "gpt": {
        "model.config.n_embd": 16,
        "model.config.n_layer": 1,
        "model.config.n_head": 2,
    },
    "llama": {
        "model.config.hidden_size": 16,
        "model.config.intermediate_size": 32,
        "model.config.num_hidden_layers": 1,
        "model.config.num_attention_heads": 2,
        "model.config.num_key_value_heads": 2,
    },
    "t5": {
        "model.config.d_model": 16,
        "model.config.d_kv": 8,
        "model.config.d_ff": 32,
        "model.config.num_layers": 1,
        "model.config.num_heads": 2,
        "data.max_samples": 400,
        "data.max_validation_samples": 200,
        "finetuning.steps": 2,
        "finetuning.batch_size": 4,
        "finetuning.eval_rows": 4,
        "finetuning.longest_answer": 4,
        "translation.rows": 40,
        "similarity.rows": 20,
    },
    "bart": {
        "model.config.d_model": 16,
        "model.config.encoder_layers": 1,
        "model.config.decoder_layers": 1,
        "model.config.encoder_attention_heads": 2,
        "model.config.decoder_attention_heads": 2,
        "model.config.encoder_ffn_dim": 32,
        "model.config.decoder_ffn_dim": 32,
        "data.max_samples": 400,
        "data.max_validation_samples": 200,
        "bart.first_stage_steps": 1,
        "bart.written": 4,
        "bart.longest_answer": 4,
        "translation.labels": 40,
        "translation.steps": 2,
        "translation.batch_size": 4,
        "translation.eval_rows": 4,
    },
}
FIGURES = {
    "bert": ("classification_accuracy",),
    "t5": ("task_translation_bleu", "task_translation", "task_similarity"),
    "bart": ("translation_bleu", "translation_loss"),
    "llama": ("bits_per_byte", "xz_primed_bits_per_byte", "untrained_bits_per_byte"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bytes: the runs' own tokenizers are made by another recipe."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


def line(recipe: str, tokenizer: Path, **changes: Any) -> list[str]:
    values = {"config": ROOT / f"configs/pretraining/{recipe}/real.yaml", "run.name": "real"}
    values |= {"model.tokenizer": tokenizer, **changes}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def beside(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs name the data relative to the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_accepts_it(beside: None, dry_runs: Any, tokenizer: Path, recipe: str) -> None:
    dry_runs(importlib.import_module(f"recipes.pretraining.{recipe}"), line(recipe, tokenizer))


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_takes_its_first_steps_and_scores_them(
    beside: None, run_in_process: Any, tmp_path: Path, tokenizer: Path, recipe: str
) -> None:
    steps = {
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.warmup_steps": 0,
        "training.lr_scheduler_kwargs": "{num_decay_steps: 1}",
    }
    module = importlib.import_module(f"recipes.pretraining.{recipe}")
    done = run_in_process(module, line(recipe, tokenizer, **TINY[recipe], **steps), tmp_path)
    assert done.code == 0, done.err
    if recipe == "gpt":
        assert (
            0 < done.figures["eval_loss_per_character"] == pytest.approx(done.figures["eval_loss"], rel=0.05)
        )  # bytes
    for figure in FIGURES.get(recipe, ()):
        assert {figure, figure if recipe == "llama" else f"baseline_{figure}"} <= done.figures.keys()
    if recipe in ("t5", "bart"):
        (sample,) = (done.folder / "samples").glob("*-pretrained.txt")
        assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in sample.read_text() and "tok:13a" in done.out


def test_short_documents_are_joined_in_an_order_of_the_seed_and_none_is_lost() -> None:
    from datasets import Dataset

    from recipes.pretraining.bert import blocks_of, join_documents

    rows = Dataset.from_dict({"text": [f"text {i:02d}" for i in range(25)]})
    assert join_documents(rows, 1, 0) is rows
    joined = join_documents(rows, 10, 0)["text"]
    lines = [document.split("\n") for document in joined]
    assert [len(some) for some in lines] == [10, 10, 5]
    assert sorted(sum(lines[1:], lines[0])) == rows["text"] and lines[0] != sorted(lines[0])
    assert joined == join_documents(rows, 10, 0)["text"] != join_documents(rows, 10, 1)["text"]
    blocks = blocks_of(join_documents(rows, 10, 0), make_tokenizer(), 20)  # none of them is as long by itself
    assert {len(ids) for ids in blocks["input_ids"]} == {20} and set(blocks["document"]) == {0, 1, 2}


@pytest.mark.parametrize("variant", ["multi30k", "shakespeare", "utterances"])
def test_the_tokenizers_that_they_stand_on_have_a_config(variant: str) -> None:
    used = [
        path
        for path in (ROOT / "configs").glob("*/*/real.yaml")
        if f"runs/tokenizer/{variant}/model" in path.read_text()
    ]
    assert used and (ROOT / f"configs/pretraining/tokenizer/{variant}.yaml").exists()
