"""How much of its data a dry run reads: counted, since what it takes depends on the machine."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import make_tokenizer
from transformers import PreTrainedTokenizerBase

from recipes.common.builtin import BUILTINS, packages
from recipes.pretraining import tokenizer

LINE = "def f(x):  # a line of forty characters\n"


@pytest.fixture(scope="module")
def much(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl: 3 million characters in 600 documents; tokenizer: of bytes."""
    folder = tmp_path_factory.mktemp("much")
    rows = [{"text": f"# {i}\n" + LINE * 125} for i in range(600)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("name", ["bert", "gpt", "bart", "t5", "unilm", "glm", "llama"])
def test_a_dry_run_reads_a_part_of_the_text_and_of_the_packages(
    run_in_process: Any, much: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the recipe's laptop config otherwise. Its steps are those of all of the text: here two epochs."""
    read: list[int] = []
    plain, kept = PreTrainedTokenizerBase.__call__, packages.described

    def counted(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        read.append(sum(map(len, text)))
        return plain(self, text, *args, **options)

    def few(most: int = packages.MOST_OF_A_PACKAGE) -> Any:
        assert most == packages.FEW_OF_A_PACKAGE
        return kept(most)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    monkeypatch.setattr(packages, "described", few)
    words = {"model.tokenizer": much / "tokenizer", "data.name": much / "text.jsonl", "training.bf16": "false"}
    words |= {"training.max_steps": -1, "training.num_train_epochs": 2, "training.warmup_steps": 0}
    words |= {"training.lr_scheduler_type": "constant", "training.lr_scheduler_kwargs": "null"}
    words |= {"data.validation_fraction": 0.2}
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    done = run_in_process(importlib.import_module(f"recipes.pretraining.{name}"), [*line, "--dry-run"], tmp_path)
    assert done.code == 0, done.err
    assert 400_000 < sum(read) < 1_000_000
    assert "of the text)" in done.out and "the rest of the text comes to it" in done.out


def test_fewer_functions_of_packages_have_all_of_the_classes() -> None:
    rows = packages.load_package("train", 0, packages.FEW_OF_A_PACKAGE)
    assert {row["label"] for row in rows} == set(packages.PACKAGES)
    assert {row["label"] for row in packages.load_match("train", 0, packages.FEW_OF_A_PACKAGE)} == {"yes", "no"}


def test_a_dry_run_of_the_tokenizer_makes_no_conversations(
    run_in_process: Any, much: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that is not there, or holds none, is refused all the same."""
    for name in ("tasks", "pydocs_qa"):
        monkeypatch.setitem(BUILTINS, name, replace(BUILTINS[name], load=None))
    line = ["--data.name", str(much / "text.jsonl"), "--dry-run"]
    done = run_in_process(tokenizer, line, tmp_path)
    assert done.code == 0, done.err
    assert "tasks and pydocs_qa add at most 1.2 MB each" in done.out
    for wrong in ("pydocs_package", "nowhere.jsonl"):
        done = run_in_process(tokenizer, [*line, "--tokenizer.conversations", f"[tasks, {wrong}]"], tmp_path)
        assert done.code == 2 and wrong in done.err and "tokenizer.conversations" in done.err
