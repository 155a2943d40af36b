"""Texts and tokenizers that an objective can do nothing with: each recipe says so before it trains."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import make_tokenizer

from recipes.common.blank_infilling import START_TOKEN

WORDS = "\u0e01 \u0e02 \u0e04 \u0e07 \u0e08 "  # Thai letters


@pytest.fixture(scope="module")
def thai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl, of long documents, and a tokenizer that knows English alone: all of the text is <|unk|> to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("thai")
    rows = [{"text": WORDS * (120 + i)} for i in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {word: i for i, word in enumerate(("<|pad|>", "<|end|>", "<|unk|>", "the", "cat"))}
    engine = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"}
    PreTrainedTokenizerFast(tokenizer_object=engine, **marks).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("name", ["bert", "gpt", "bart", "t5", "unilm", "glm", "llama"])
def test_a_text_that_is_unknown_to_the_tokenizer_is_refused(refuses: Any, thai: Path, name: str) -> None:
    """With the recipe's laptop config otherwise."""
    words = {"model.tokenizer": thai / "tokenizer", "data.name": thai / "text.jsonl", "training.bf16": "false"}
    words["data.validation_fraction"] = 0.3
    words |= {"gpt.tasks": "{}"} if name == "gpt" else {}
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    refuses(importlib.import_module(f"recipes.pretraining.{name}"), line, "special tokens alone (")


@pytest.mark.parametrize(
    ("name", "mark"),
    [("bert", "[MASK]"), ("bart", "<|mask|>"), ("t5", "<extra_id_0>"), ("unilm", "<|mask|>"), ("glm", START_TOKEN)],
)
def test_a_pretrained_model_whose_tokenizer_lacks_the_marks_is_refused(
    refuses: Any, tmp_path_factory: pytest.TempPathFactory, name: str, mark: str
) -> None:
    """Said with the lines that add them."""
    folder = tmp_path_factory.mktemp("theirs")
    make_tokenizer().save_pretrained(folder)
    words = {"model.name": folder, "model.config": "null", "model.tokenizer": "null", "training.bf16": "false"}
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    recipe = importlib.import_module(f"recipes.pretraining.{name}")
    refuses(recipe, line, mark)
    refuses(recipe, line, "model.resize_token_embeddings(len(tokenizer))")


def test_whole_words_need_a_tokenizer_that_cuts_words(refuses: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One that does not would hide a single token of a row."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from recipes.pretraining import bert

    folder = tmp_path_factory.mktemp("no_words")
    letters = {letter: i for i, letter in enumerate(("<|pad|>", "<|end|>", *pre_tokenizers.ByteLevel.alphabet()))}
    engine = Tokenizer(models.BPE(vocab=letters, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} cats sat. " * 40}) + "\n" for i in range(12)))
    words = {"model.tokenizer": folder / "tokenizer", "data.name": folder / "text.jsonl", "training.bf16": "false"}
    words["data.validation_fraction"] = 0.3
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    refuses(bert, [*line, "--bert.whole_words", "true"], "bert.whole_words: this tokenizer does not cut")
