"""BERT, run in this process on small documents: it learns, it is saved as the library's own, it resumes."""

from __future__ import annotations

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import hub_stand_ins
import pytest
import torch
from tiny_chat import command_line, make_tokenizer

from recipes.pretraining import bert

MODEL = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes, documents that keep to one animal, classes and pairs, all of one small grammar."""
    folder = tmp_path_factory.mktemp("sources")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    nouns, verbs = ("cat", "dog", "owl", "fox"), ("sat", "ran", "hid", "lay")
    documents = [
        "".join(f"the {a} {verb} by the {b}. " for b in nouns for _ in range(1 + n))
        for a, verb, n in itertools.product(nouns, verbs, range(3))
    ]
    classes = [{"text": f"the {n} {v} by {i}", "label": n} for i in range(10) for n in nouns for v in verbs]
    pairs = [
        {"sentence1": f"the {n}", "sentence2": f"a {m}", "label": int(n == m)}
        for n, m in [*itertools.product(nouns, nouns), *zip(nouns, nouns, strict=True)]
    ]
    for name, rows in (("text", [{"text": text} for text in documents]), ("classes", classes), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, rows of 40 bytes."""
    values = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(MODEL),
        "data.name": sources / "text.jsonl",
        "data.validation_fraction": 0.2,
        "bert.row_length": 40,
        "classification.data": sources / "classes.jsonl",
        "pairs.data": sources / "pairs.jsonl",
        **{f"{task}.{key}": value for task in ("classification", "pairs")
           for key, value in (("steps", 3), ("max_length", 40), ("eval_rows", 8), ("labels", 64))},
        "training.max_steps": 60,
        "training.per_device_train_batch_size": 16,
        "training.learning_rate": 1e-2,
        "training.lr_scheduler_type": "linear",
        "training.lr_scheduler_kwargs": "{}",
        "training.warmup_steps": 2,
        "training.save_steps": 30,
        "training.bf16": "false",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip
    return [*command_line(values), *more]


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    done = run_in_process(bert, tiny(sources), tmp_path)
    assert done.code == 0, done.err
    figures = done.figures
    assert figures["untrained_loss"] == pytest.approx(math.log(263), rel=0.1)  # it starts as a uniform guess
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    assert {
        "eval_token_accuracy", "eval_next_sentence_accuracy", "classification_accuracy", "baseline_classification_accuracy",
        "pairs_accuracy", "baseline_pairs_accuracy", "tokens_per_second",
    } <= figures.keys()  # fmt: skip
    for name in ("README.md", "plots/loss.png", "samples/filled.txt"):
        assert (done.folder / name).stat().st_size > 0, name

    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    whole, cloze = (
        c.from_pretrained(done.folder / "model").eval() for c in (AutoModelForPreTraining, AutoModelForMaskedLM)
    )
    batch = tokenizer("the cat sat", "by the dog", return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id and int(batch["token_type_ids"].sum()) > 0
    with torch.no_grad():
        assert torch.equal(whole(**batch).prediction_logits, cloze(**batch).logits)


@pytest.mark.slow
def test_micro_batches_are_one_batch(accumulates: Any, sources: Path) -> None:
    accumulates(bert, partial(tiny, sources), rel=0.2)


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_losses(resumes_to_the_same_losses: Any, sources: Path) -> None:
    """The hidden words and the other documents' texts too are those of the run that was not stopped."""
    resumes_to_the_same_losses(bert, tiny(sources, training__max_steps=12, training__save_steps=5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bert__mask_rate": 0.0}, "mask_rate"),
        ({"bert__mask_rate": 1.0}, "mask_rate"),
        ({"bert__row_length": 49}, "bert.row_length"),
        ({"pairs__data": "nowhere.jsonl"}, "nowhere.jsonl"),  # what comes after the pretraining is read before it
        ({"bert__row_length": 10}, "bert.row_length"),
        ({"pairs__max_length": 49}, "pairs.max_length"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"data__streaming": "true"}, "data.streaming"),
        ({"model__config": json.dumps({**MODEL, "type_vocab_size": 1})}, "type_vocab_size"),
        ({"model__config": '{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}'}, "model_type"),
    ],
)
def test_bad_input_is_one_clear_error(refuses: Any, sources: Path, changes: dict[str, Any], said: str) -> None:
    refuses(bert, tiny(sources, **changes), said)


def test_rows_of_one_text_where_two_are_needed_or_of_both_kinds_are_refused(refuses: Any, sources: Path) -> None:
    refuses(bert, tiny(sources, pairs__data=sources / "classes.jsonl"), "pairs.data: its rows have one text")
    rows = (sources / "pairs.jsonl").read_text() + (sources / "classes.jsonl").read_text()
    mixed = [{**json.loads(line), "label": i % 2} for i, line in enumerate(rows.splitlines())]
    renamed = [
        {"text": row.get("text", row.get("sentence1")), "text_pair": row.get("sentence2"), "label": row["label"]}
        for row in mixed
    ]
    (sources / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    refuses(bert, tiny(sources, classification__data=sources / "mixed.jsonl"), "rows have a second text")


@pytest.mark.slow
def test_berts_own_tokenizer_which_has_no_end_of_text_will_do(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    hub_stand_ins.bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    changes = {"model__tokenizer": tmp_path / "tokenizer", "bert__whole_words": "true", "training__max_steps": 2}
    done = run_in_process(bert, tiny(sources, **changes), tmp_path / "runs")
    assert done.code == 0, done.err
    assert "[MASK]" in (done.folder / "samples/filled.txt").read_text()


def test_one_document_alone_is_refused(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("the cat sat by the dog. " * 200)
    done = run_in_process(bert, tiny(sources, data__name=text), tmp_path / "runs")
    assert done.code == 2 and "takes two documents" in done.err and "Traceback" not in done.err


def test_documents_that_are_shorter_than_a_row_are_refused_or_said(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    """Too short all of them: no row. Some of them: a line says how much is left out."""
    short = [{"text": f"the cat {i}"} for i in range(40)]
    long = [{"text": f"the owl {i} sat by the dog. " * 9} for i in range(20)]
    for name, rows in (("short", short), ("mixed", short + long)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_in_process(bert, tiny(sources, data__name=tmp_path / "short.jsonl"), tmp_path / "runs")
    assert done.code == 2 and "the train text gives 0 block(s) of 37 tokens, of 0 document(s)" in done.err, done.err
    done = run_in_process(bert, tiny(sources, "--dry-run", data__name=tmp_path / "mixed.jsonl"), tmp_path / "runs")
    assert done.code == 0, done.err
    (said,) = re.findall(r"data: (\d+)% of the documents are shorter than 37 tokens", done.out)
    assert 45 <= int(said) <= 85 and "bert.joined" in done.out  # two thirds, less what is held out


def test_a_dry_run_trains_nothing(dry_runs: Any, sources: Path) -> None:
    dry_runs(bert, tiny(sources))


def test_the_loss_of_the_hidden_tokens_alone_is_the_librarys_with_its_gradients() -> None:
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=99, **{k: v for k, v in MODEL.items() if k != "model_type"}))
    ids = torch.randint(5, 99, (3, 40))
    labels = torch.where(torch.rand(3, 40) < 0.2, torch.randint(5, 99, (3, 40)), -100)
    labels[:, 0] = -100  # [CLS]
    batch = {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
    found = []
    for _ in range(2):  # the library's, then ours
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        bert.predict_hidden(model)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert model(input_ids=ids).prediction_logits.shape == (3, 40, 99)  # without labels: the library's forward
