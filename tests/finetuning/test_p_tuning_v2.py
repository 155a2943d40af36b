"""P-tuning v2 as a recipe: deep prompts under a classifier's and a labeller's head, on an encoder and on a decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import prompt_checks
import pytest
import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from recipes.common import adaptation, labelling, prefixes, prompt_encoder
from recipes.common.builtin import pydocs, python_tokens
from recipes.common.errors import UserError
from recipes.common.sections import Data
from recipes.finetuning import p_tuning_v2

FEW: checks.Changes = {"training.learning_rate": 5e-2, "training.max_steps": 80, "p_tuning_v2.num_virtual_tokens": 5}
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}
LLAMA, BERT = 5 * 2 * 2 * 16, 5 * 2 * 2 * 32  # tokens x (keys, values) x layers x width of the keys


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines: a number is `n`, or `year` behind the word "in": which one, no word tells by itself."""
    file = tmp_path_factory.mktemp("data") / "words.jsonl"
    rows = []
    for n in range(400):
        before, tag = (" in", "year") if n % 2 else (" at", "n")
        rows.append({"words": ["it", " is", before, f" {n % 7}"], "tags": ["o", "o", "o", tag]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(chat_model: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run of labelling that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(p_tuning_v2, checks.arguments(chat_model, words, FEW), root, patch)


def deep(model: Any, **changes: Any) -> Any:
    prefixes.put_in(model, PrefixTuningConfig(num_virtual_tokens=5, **changes))
    adaptation.freeze(model, prompt_encoder.learned_names(model))
    prompt_checks.spread(model)
    return model


def classifiers(folder: Path) -> Iterator[Any]:
    config = make_model(make_tokenizer()).config
    config.num_labels = 3
    bert = checks.save_bert(folder)
    for model_class in (LlamaForSequenceClassification, LlamaForTokenClassification):
        yield deep(model_class(config)), LLAMA
    for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        yield deep(auto_class.from_pretrained(bert, num_labels=3)), BERT


def test_what_learns_is_the_closed_form_and_the_head(tmp_path: Path) -> None:
    for model, expected in classifiers(tmp_path):
        names = [n for n, _ in model.named_parameters()]
        head = {n for n in names if n.split(".")[0] in ("score", "classifier") or ".pooler." in n}
        assert prompt_encoder.learned_names(model) == head | {"prompt.encoder.embedding.weight"}
        size = sum(p.numel() for n, p in model.named_parameters() if n in head)
        assert size in (3 * 32, 3 * 32 + 3, 3 * 32 + 3 + 32 * 32 + 32)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + size
        labels = torch.zeros(4, dtype=torch.long) if "Sequence" in type(model).__name__ else torch.zeros(4, 50).long()
        checks.check_gradients(model, {**INPUTS, "labels": labels}, head | {"prompt.encoder.embedding.weight"})


def test_padding_of_classifiers_and_labellers(tmp_path: Path) -> None:
    for model, _ in classifiers(tmp_path):
        if "Sequence" not in type(model).__name__:
            prompt_checks.check_padding(model)
        else:  # BERT judges a row by its first place, so nobody pads it on the left
            prompt_checks.check_class_padding(
                model, sides=(False,) if "Bert" in type(model).__name__ else (False, True)
            )


def test_every_word_of_an_encoder_sees_the_prompt(tmp_path: Path) -> None:
    """Layer 0: the same as BERT's own attention with five more keys and values, which no mask hides."""
    model = deep(BertModel.from_pretrained(checks.save_bert(tmp_path))).eval()
    seen: dict[str, Any] = {}
    attention = model.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda _, args, kw, out: seen.update(x=args[0], out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(**prompt_checks.batch_of(prompt_checks.ROWS, left=False))
        x, numbers = seen["x"], model.prompt().view(5, 2, 2, 4, 8)  # [tokens, layers, key or value, heads, d]
        q, k, v = (getattr(attention, n)(x).view(2, 12, 4, 8).transpose(1, 2) for n in ("query", "key", "value"))
        before = [numbers[:, 0, i].transpose(0, 1)[None].expand(2, -1, -1, -1) for i in (0, 1)]
        scores = q @ torch.cat([before[0], k], 2).transpose(2, 3) / 8**0.5
        scores[1, :, :, 5 + 7 :] = -torch.inf  # the second row has seven tokens
        expected = (scores.softmax(-1) @ torch.cat([before[1], v], 2)).transpose(1, 2).reshape(2, 12, 32)
    assert torch.allclose(seen["out"][0], expected[0], atol=1e-5)
    assert torch.allclose(seen["out"][1, :7], expected[1, :7], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- labelling


def test_it_tells_by_context_what_no_word_tells(trained: Any) -> None:
    _, figures, _ = trained
    assert figures["accuracy"] > 0.9 > figures["majority_accuracy"] > figures["baseline_accuracy"]
    assert figures["macro_f1"] > 0.85 > figures["majority_macro_f1"]
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.5


def test_the_lines_of_its_card_load_it(trained: Any) -> None:
    folder, _, model = trained
    checks.check_card(folder, model, INPUTS)


def test_the_adapter_reloads_on_a_base_that_is_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, figures, model = trained
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt.numbers", "score.weight", "score.bias"}
    assert figures["trainable_parameters"] == LLAMA + 3 * 32 + 3
    fresh = AutoModelForTokenClassification.from_pretrained(chat_model, num_labels=3)
    backbone = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    assert all(torch.equal(model.model.state_dict()[name], tensor) for name, tensor in backbone.items())
    checks.check_reloads(folder, model, fresh, INPUTS)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, words: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, words, FEW)
    checks.check_resume(p_tuning_v2, line, run_in_process, tmp_path, trained[0], monkeypatch)


def test_a_word_s_tag_stands_at_its_last_token() -> None:
    ids, labels = labelling.encode(make_tokenizer(), ["ab", " c"], [2, 1], 100)
    assert make_tokenizer().decode(ids) == "ab c"
    assert labels == [-100, 2, -100, 1]
    assert labelling.encode(make_tokenizer(), ["ab", " c"], [2, 1], 3)[1] == [-100, 2, -100]


def test_python_s_own_tokenizer_says_what_a_word_is() -> None:
    source = 'import re  # for all\n\ndef f(x):\n    """Return for x."""\n    return x + 1.5\n'
    rows = list(python_tokens.rows_of(source))
    assert len(rows) == 1
    found = [(w.strip(), t) for w, t in zip(rows[0]["words"], rows[0]["tags"], strict=True)]
    assert found[:6] == [
        ("import", "keyword"), ("re", "name"), ("#", "comment"), ("for", "comment"), ("all", "comment"), ("def", "keyword"),
    ]  # fmt: skip
    assert ("for", "string") in found
    assert found[-5:] == [("x", "name"), ("+", "operator"), ("1", "number"), (".", "number"), ("5", "number")]
    assert "".join(rows[0]["words"]).replace("\n\n", "\n") in source.replace("\n\n", "\n")


def test_a_table_of_words_cannot_know_the_context() -> None:
    rows = [
        {"words": ["a", " b"], "tags": ["x", "y"]},
        {"words": ["a", " b"], "tags": ["y", "y"]},
        {"words": ["a"], "tags": ["x"]},
    ]
    from datasets import Dataset, DatasetDict

    held_out = [{"words": ["a", " b", " new"], "tags": ["x", "y", "y"]}]
    data = DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(held_out))
    assert labelling.majority(data)["majority_accuracy"] == 1.0  # x for a; y for b, and for what it never saw
    assert labelling.tags_of(data) == ["x", "y"]


def test_the_builtin_rows_are_of_files_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [(f"m{i}.py", f"def f{i}(a):\n    return a + {i}  # adds\n" * 30) for i in range(60)]
    monkeypatch.setattr(pydocs, "documents", lambda: documents)
    rows = {split: python_tokens.load(split, 0) for split in ("train", "validation")}
    assert rows["train"] == python_tokens.load("train", 0)
    numbers = [{w.strip() for row in rows[s] for w in row["words"] if w.strip().startswith("f")} for s in rows]
    assert not numbers[0] & numbers[1]
    assert all(len(row["words"]) <= python_tokens.WORDS_A_ROW for s in rows for row in rows[s])


def test_columns_are_mapped_and_numbered_tags_get_their_names(tmp_path: Path) -> None:
    file = tmp_path / "ner.jsonl"
    file.write_text("".join(json.dumps({"tokens": ["in", "Rome"], "ner": [0, n % 2]}) + "\n" for n in range(40)))
    rows = labelling.load_rows(Data(name=str(file), columns={"words": "tokens", "tags": "ner"}))
    assert rows["train"][0]["words"] == ["in", " Rome"]
    assert labelling.tags_of(rows) == ["0", "1"]


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    for split, word in (("train", "in"), ("validation", "Rome")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"words": [word], "tags": ["x"]}) + "\n")
    rows = labelling.load_rows(Data(name=str(tmp_path)))
    assert [rows[split]["words"][0] for split in ("train", "validation")] == [["in"], ["Rome"]]


# --------------------------------------------------------------------------------------------------- classification


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_classifies(kind: str, run_in_process: checks.Run, chat_model: Path, tmp_path: Path) -> None:
    rows = checks.labelled_rows(tmp_path / "rows.jsonl")
    base = checks.save_bert(tmp_path / "bert") if kind == "bert" else chat_model
    done = run_in_process(
        p_tuning_v2, checks.arguments(base, rows, FEW, {"p_tuning_v2.task_type": "SEQ_CLS"}), tmp_path
    )
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2


@pytest.mark.slow
def test_an_encoder_labels(run_in_process: checks.Run, words: Path, tmp_path: Path) -> None:
    line = checks.arguments(checks.save_bert(tmp_path / "bert"), words, FEW)
    done = run_in_process(p_tuning_v2, line, tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2


@pytest.mark.slow
def test_a_decoder_answers(run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path) -> None:
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS, {"p_tuning_v2.task_type": "CAUSAL_LM"})
    done = run_in_process(p_tuning_v2, line, tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"]


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[checks.Changes, str]] = {
    "packing": (
        {"p_tuning_v2.task_type": "CAUSAL_LM", "training.packing": "true"},
        "stands before a row, not before each conversation in it",
    ),
    "checkpointing": ({"training.gradient_checkpointing": "true"}, "the prefix is a cache"),
    "longer than the context": ({"p_tuning_v2.num_virtual_tokens": 256}, "is longer than the context"),
    "no such source": ({"data.name": "python_words"}, "not `python_tokens`"),
    "no such split": ({"data.validation_split": "dev"}, "has no 'dev'; it has train"),
    "no such column": ({"data.columns": "{words: tokens}"}, "there is no column 'tokens', only words, tags"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, words: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    rows = questions if changes.get("p_tuning_v2.task_type") == "CAUSAL_LM" else words
    line = checks.arguments(chat_model, rows, FEW, changes)
    checks.check_refused(p_tuning_v2, line, told, run_in_process, tmp_path)


def test_rows_that_teach_nothing_are_refused() -> None:
    from datasets import Dataset, DatasetDict

    def data(train: list[str], held_out: list[str]) -> Any:
        made = {
            s: Dataset.from_list([{"words": t, "tags": t}]) for s, t in (("train", train), ("validation", held_out))
        }
        return DatasetDict(made)

    with pytest.raises(UserError, match="less than two different tags"):
        labelling.tags_of(data(["a"], ["a"]))
    with pytest.raises(UserError, match="no training row has the tag 'c'"):
        labelling.tags_of(data(["a", "b"], ["c"]))
