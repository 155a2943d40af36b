"""T5, run in this process on a text of a few kilobytes: it learns, it is saved as a plain T5, it resumes, nothing leaks."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import command_line

from recipes.pretraining import t5

MODEL = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
}  # fmt: skip


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, inputs of 32 bytes."""
    values = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(MODEL),
        "data.name": sources / "text.txt",
        "data.validation_fraction": 0.1,
        "t5.input_length": 32,
        "t5.sentinels": 8,
        "translation.data": sources / "pairs.jsonl",
        "translation.rows": 16,
        "classification.data": sources / "classes.jsonl",
        "similarity.data": sources / "scores.jsonl",
        "summary.data": sources / "pairs.jsonl",
        "finetuning.steps": 3,
        "finetuning.eval_rows": 4,
        "finetuning.longest_answer": 4,
        "training.max_steps": 60,
        "training.per_device_train_batch_size": 16,
        "training.learning_rate": 2e-2,
        "training.lr_scheduler_type": "linear",
        "training.lr_scheduler_kwargs": "{}",
        "training.warmup_steps": 2,
        "training.save_steps": 30,
        "training.bf16": "false",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [*command_line(values), *more]


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    done = run_in_process(t5, tiny(sources), tmp_path)
    assert done.code == 0, done.err
    figures = done.figures
    assert figures["untrained_loss"] == pytest.approx(math.log(270), rel=0.15)  # it starts near a uniform guess
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    tasks = ("translation", "classification", "similarity", "summary")
    assert {f"{start}task_{task}" for task in tasks for start in ("", "baseline_")} <= figures.keys()
    for name in ("README.md", "plots/loss.png", "samples/spans.txt", "samples/answers-pretrained.txt"):
        assert (done.folder / name).stat().st_size > 0, name
    assert "translate English to Chinese: the" in (done.folder / "samples/answers-from-scratch.txt").read_text()

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(done.folder / "model").eval()
    assert tokenizer.convert_tokens_to_ids("<extra_id_7>") == len(tokenizer) - 1 == model.config.vocab_size - 1
    again = AutoModelForSeq2SeqLM.from_pretrained(done.folder / "model").eval()
    ids = torch.tensor([tokenizer("the cat sat by", add_special_tokens=False)["input_ids"]])
    labels = torch.tensor([tokenizer("the dog", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels).logits
        assert torch.equal(logits, again(input_ids=ids, labels=labels).logits)
        changed = labels.clone()
        changed[0, 4] += 1  # a target reaches the predictions behind it, and none before
        other = model(input_ids=ids, labels=changed).logits
    assert torch.equal(logits[0, :5], other[0, :5]) and not torch.equal(logits[0, 5], other[0, 5])
    # no tokens of what is cut out are left in the inputs, so there is nothing to leak on that side: test_span_corruption


def test_distances_are_all_that_the_attention_knows_of_positions() -> None:
    """Moving a text by padding before it changes nothing: T5 has no absolute positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    fields = {k: v for k, v in MODEL.items() if k != "model_type"}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **fields)).eval()
    ids = torch.randint(2, 50, (1, 10))
    moved, mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1), torch.tensor([[0] * 7 + [1] * 10])
    with torch.no_grad():
        here = model.get_encoder()(input_ids=ids).last_hidden_state
        there = model.get_encoder()(input_ids=moved, attention_mask=mask).last_hidden_state[:, 7:]
        assert torch.allclose(here, there, atol=1e-5)
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        shuffled = ids[:, torch.randperm(10)]
        pooled = [model.get_encoder()(input_ids=x).last_hidden_state.sum(1) for x in (ids, shuffled)]
    assert torch.allclose(*pooled, atol=1e-4)  # without the distances, a text is a bag of tokens


def test_queries_learn_slower_by_the_root_that_the_attention_leaves_out() -> None:
    """Every matrix is in one group, once; the queries' rate is the others' over sqrt(d_kv); the distances' table is AdamW's.

    The norms too are AdamW's, at the matrices' rate.
    """
    from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments

    fields = {k: v for k, v in MODEL.items() if k != "model_type"}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **fields))
    optimizer = t5.make_optimizer(model, TrainingArguments(learning_rate=0.05, use_cpu=True), 0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    others, queries = optimizer.muon.param_groups
    assert (others["lr"], queries["lr"]) == (0.02, 0.02 / 4)  # d_kv is 16
    assert {names[id(p)].split(".")[-2] for p in queries["params"]} == {"q"} and len(queries["params"]) == 6
    assert all("relative" not in names[id(p)] and ".q." not in names[id(p)] for p in others["params"])
    assert sum("relative" in names[id(p)] for g in optimizer.adamw.param_groups for p in g["params"]) == 2
    rates = {names[id(p)]: group["lr"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "norm" in name} == {0.02}
    assert {rate for name, rate in rates.items() if "norm" not in name} == {0.05}


@pytest.mark.slow
def test_micro_batches_are_one_batch(accumulates: Any, sources: Path) -> None:
    accumulates(t5, partial(tiny, sources))


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_losses(resumes_to_the_same_losses: Any, sources: Path) -> None:
    """The spans cut out too are those of the run that was not stopped."""
    resumes_to_the_same_losses(t5, tiny(sources, training__max_steps=12, training__save_steps=5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"t5__corruption_rate": 0.0}, "corruption_rate"),
        ({"t5__corruption_rate": 1.0}, "corruption_rate"),
        ({"t5__mean_span": 0}, "mean_span"),
        ({"translation__validation_split": "dev"}, "dev"),  # what comes after the pretraining is read before it
        ({"t5__input_length": 7}, "t5.input_length"),
        ({"t5__sentinels": 1}, "t5.sentinels"),
        ({"t5__mean_span": 1e30}, "t5.mean_span"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"t5__input_length": 100_000}, "t5.sentinels"),
        ({"summary__data": "null"}, "summary.data"),
        ({"finetuning__temperature": 0}, "temperature"),
        ({"model__config": '{"model_type": "bart", "d_model": 32}'}, "model_type"),
    ],
)
def test_bad_input_is_one_clear_error(refuses: Any, sources: Path, changes: dict[str, Any], said: str) -> None:
    refuses(t5, tiny(sources, **changes), said)


def test_a_dry_run_trains_nothing(dry_runs: Any, sources: Path) -> None:
    dry_runs(t5, tiny(sources))
