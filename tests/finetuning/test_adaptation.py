"""What the parameter-efficient recipes share: what is measured, what a row becomes, what of a base is learned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from recipes.common import adaptation, labelling
from recipes.common.adapter_files import fingerprint, load_adapter
from recipes.common.errors import UserError
from recipes.finetuning import p_tuning_v2


class Always(torch.nn.Linear):
    """Says the first of two classes, whatever is asked: (rows, ...) -> logits (rows, ..., 2)."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.tensor([1.0, 0.0]).expand(*x.shape, 2))


def trainer_of(model: Any) -> Any:
    return SimpleNamespace(model=model, args=SimpleNamespace(bf16=False), _prepare_inputs=lambda batch: batch)


def test_what_is_measured_is_the_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of classes that are right three times in four in the training rows, and once in eight in the held-out ones."""

    def rows(labels: str) -> Dataset:
        return Dataset.from_list([{"text": label, "text_pair": None, "label": label} for label in labels])

    def collate(task: Any, some: list[Any], _: Any) -> dict[str, torch.Tensor]:
        labels = torch.tensor([task.classes.index(row["label"]) for row in some])
        return {"x": torch.zeros(len(some)), "labels": labels}

    data = DatasetDict(train=rows("aaab"), validation=rows("abbbbbbb"))
    task: Any = SimpleNamespace(type="SEQ_CLS", classes=["a", "b"], data=data)
    monkeypatch.setattr(adaptation, "collate", collate)
    measured = adaptation._classified(task, trainer_of(Always()), SimpleNamespace(batch_size=3))  # type: ignore[arg-type]
    assert measured.figures["accuracy"] == 0.125
    one, other = -torch.tensor([1.0, 0.0]).log_softmax(-1)
    assert measured.loss == pytest.approx(((one + 7 * other) / 8).item(), abs=1e-4)  # the last batch has two rows
    assert {answer["expected"] for answer in measured.answers} == {"a", "b"}


def test_a_word_that_was_cut_off_is_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a shorter training.max_length would look better, and a table that has all words would be what it is compared with."""
    rows = Dataset.from_list([{"words": ["x"] * 4, "tags": ["a", "a", "b", "a"]}])
    task: Any = SimpleNamespace(classes=["a", "b"], data=DatasetDict(train=rows, validation=rows))

    def collate(_: Any, some: list[Any], longest: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(len(some), longest), "labels": torch.tensor([[0, 0, 1, 0][:longest]])}

    monkeypatch.setattr(labelling, "collate", collate)
    evaluation: Any = SimpleNamespace(batch_size=2)
    whole, cut = (labelling.measure(task, trainer_of(Always()), evaluation, longest).figures for longest in (4, 2))
    assert whole["accuracy"] == 0.75 and "words_cut" not in whole
    assert cut["accuracy"] == 0.5 and cut["words_cut"] == 0.5
    assert cut["macro_f1"] == pytest.approx((2 * 2 / (2 + 3) + 0) / 2, abs=1e-4)  # a: 2 of 3 found, 2 told; b: none


def test_rows_of_one_text_among_rows_of_two_are_refused() -> None:
    def rows(pairs: list[str | None]) -> Dataset:
        return Dataset.from_list(
            [{"text": "x", "text_pair": pair, "label": "ab"[i % 2]} for i, pair in enumerate(pairs)]
        )

    mixed = DatasetDict(train=rows(["y", "y", None]), validation=rows(["y", "y"]))
    with pytest.raises(UserError, match="4 of 5 rows have a second text"):
        adaptation._classes(mixed)
    assert adaptation._classes(DatasetDict(train=rows(["y", "y"]), validation=rows(["y", "y"]))) == ["a", "b"]


def test_a_bert_without_a_pooler_keeps_the_one_that_it_learned(tmp_path: Path, run_in_process: Any) -> None:
    """BertForMaskedLM has none: it is drawn anew whenever the base is opened, so it learns and is saved with the head."""
    folder = checks.save_bert(tmp_path)
    tokens = AutoModelForMaskedLM.from_pretrained(folder)
    tokens.save_pretrained(folder)
    torch.manual_seed(1)
    one = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    torch.manual_seed(2)
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert not torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert fingerprint(one) == fingerprint(other)
    assert "bert.pooler.dense.weight" in adaptation.head_names(one)
    few = {"p_tuning_v2.task_type": "SEQ_CLS", "training.learning_rate": 1e-2, "training.packing": "false"}
    done = run_in_process(
        p_tuning_v2, checks.arguments(folder, checks.labelled_rows(tmp_path / "rows.jsonl"), few), tmp_path / "runs"
    )
    assert done.code == 0, done.err
    again = load_adapter(other, done.folder / "adapter")
    names = json.loads((done.folder / "adapter" / "base.json").read_text())["label_names"]
    assert [again.config.id2label[i] for i in range(len(names))] == names and len(names) == 2  # type: ignore[union-attr]
