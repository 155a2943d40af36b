"""Full fine-tuning as a recipe: it learns, leaves what it should, resumes, and refuses what cannot work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_checks
import pytest
import torch
from tiny_chat import SHORT_RUN, command_line, make_model, make_tokenizer

from recipes.finetuning import full

Run = Callable[..., Any]
Changes = dict[str, Any]
FEW = SHORT_RUN | {
    "full.optimizer": "adamw",
    "training.learning_rate": 1e-2,  # AdamW's: with Muon it would be the embeddings' alone
}


def arguments(chat_model: Path, data: Path | str, changes: Changes | None = None) -> list[str]:
    """The command line of a short run."""
    return command_line({"model.name": chat_model, "data.name": data, **FEW, **(changes or {})})


@pytest.mark.slow
def test_it_learns_and_leaves_a_model_that_answers(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    done = run_in_process(full, arguments(chat_model, questions), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < 0.3 < done.figures["baseline_loss"]
    losses = [line["loss"] for line in done.history() if "loss" in line]
    assert losses[-1] < losses[0] / 3
    answers = (done.folder / "samples" / "answers.md").read_text()
    assert "| yes | yes |" in answers.replace(" |  |", " |").replace("  ", " ") or answers.count("yes") >= 16
    assert (done.folder / "plots" / "loss.png").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.common.generation import generate

    model = AutoModelForCausalLM.from_pretrained(done.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    prompts = [[{"role": "user", "content": f"Is it {n}?"}] for n in (3, 500)]
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == ["yes", "yes"]


@pytest.mark.slow
def test_the_questions_of_tasks_are_checked(run_in_process: Run, chat_model: Path, tmp_path: Path) -> None:
    few = {"data.max_samples": 200, "data.max_validation_samples": 40, "training.max_steps": 2}
    done = run_in_process(full, arguments(chat_model, "tasks", {**few, "training.max_length": 256}), tmp_path)
    assert done.code == 0, done.err
    expected = {"exact_match", "sampled_exact_match", "baseline_exact_match", "baseline_sampled_exact_match"}
    assert expected <= set(done.figures)
    assert done.figures["baseline_exact_match"] == 0
    assert any(name.startswith("exact_match_") for name in done.figures)
    assert (done.folder / "plots" / "exact_match_by_task.png").exists()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from recipes.common import training

    whole = run_in_process(full, arguments(chat_model, questions, {"run.name": "whole"}), tmp_path)
    asked = training.StopSignals.asked
    steps = iter(range(1000))
    monkeypatch.setattr(
        training.StopSignals, "asked", lambda self: next(steps) >= 24 and (setattr(self, "reason", "test") or True)
    )
    halted = run_in_process(full, arguments(chat_model, questions, {"run.name": "halted"}), tmp_path)
    assert halted.code == 130
    monkeypatch.setattr(training.StopSignals, "asked", asked)
    resumed = run_in_process(
        full, arguments(chat_model, questions, {"run.name": "halted", "run.resume": "true"}), tmp_path
    )
    assert resumed.code == 0, resumed.err
    ours, theirs = (load_file(done.folder / "model" / "model.safetensors") for done in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    for figure in ("eval_loss", "baseline_loss"):
        assert resumed.figures[figure] == pytest.approx(whole.figures[figure], abs=1e-4)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    done = run_in_process(full, [*arguments(chat_model, questions), "--dry-run"], tmp_path)
    assert done.code == 0
    assert "dry run: nothing was trained" in done.out
    assert "supervised" in done.out
    assert not [path for path in done.folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_an_encoder_learns_to_classify(run_in_process: Run, tmp_path: Path) -> None:
    base, rows = peft_checks.save_bert(tmp_path / "bert"), peft_checks.labelled_rows(tmp_path / "rows.jsonl")
    done = run_in_process(full, arguments(base, rows, {"full.task_type": "SEQ_CLS"}), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9 > done.figures["baseline_accuracy"]
    assert done.figures["trainable_parameters"] == done.figures["parameters"]

    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(done.folder / "model")
    assert model.config.id2label == {0: "cold", 1: "warm"}
    before = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).state_dict()
    kept = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert not [name for name in kept if name.endswith("weight")], "a weight that never moved"


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_packed_or_not_it_learns_the_same_task(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path, packing: str
) -> None:
    done = run_in_process(full, arguments(chat_model, questions, {"training.packing": packing}), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < 0.4


@pytest.mark.slow
def test_a_stream_is_trained_on_as_it_comes(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    done = run_in_process(full, arguments(chat_model, questions, {"data.streaming": "true"}), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < 0.4


@pytest.mark.slow
def test_compiled_training_compiles_one_shape(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last, short batch of an epoch and the evaluations must not compile anything anew."""
    from torch._dynamo.utils import counters

    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model=None, **options: original(model, **{**options, "backend": "eager"})
    )
    counters.clear()
    torch._dynamo.reset()
    epochs = {"training.torch_compile": "true", "training.max_steps": -1, "training.num_train_epochs": 2}
    done = run_in_process(full, arguments(chat_model, questions, epochs), tmp_path)
    assert done.code == 0, done.err
    assert 0 < counters["stats"]["unique_graphs"] <= 4, dict(counters["stats"])


# -------------------------------------------------------------------------------------------------------- bad input


def saved(folder: Path, tokenizer: Any, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def no_template(tmp_path: Path) -> Changes:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return {"model.name": str(saved(tmp_path / "bare", tokenizer, make_model(tokenizer)))}


def silent_stop(tmp_path: Path) -> Changes:
    tokenizer = make_tokenizer()
    template = tokenizer.chat_template.replace(
        "content ~ '<|end|>' -}}{% endgeneration %}", "content -}}{% endgeneration %}{{- '<|end|>' -}}"
    )
    (tmp_path / "template.jinja").write_text(template)
    return {"model.chat_template": tmp_path / "template.jinja"}


def other_vocabulary(tmp_path: Path) -> Changes:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_tokens([f"word{n}" for n in range(50)])
    return {"model.name": str(saved(tmp_path / "other", tokenizer, model))}


def all_masked(tmp_path: Path) -> Changes:
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "q" * 100, "completion": "a"})
        + "\n"
        + json.dumps({"prompt": "r" * 100, "completion": "a"})
        + "\n"
    )
    return {"data.name": tmp_path / "long.jsonl", "data.validation_fraction": 0.5}


BAD: dict[str, tuple[Callable[[Path], Changes], str]] = {
    "no chat template": (no_template, "no chat template"),
    "stop token outside the mask": (silent_stop, "outside the loss mask"),
    "another vocabulary": (other_vocabulary, "they do not belong together"),
    "nothing but masked labels": (
        all_masked,
        "is masked: no sample has any of its answer within training.max_length 64",
    ),
    "wrapped packing": (lambda _: {"training.packing_strategy": "wrapped"}, "use bfd"),
    "longer than the model": (lambda _: {"training.max_length": "4096"}, "the model has 256 positions"),
    "no such stop token": (lambda _: {"training.eos_token": "<eot>"}, "training.eos_token"),
    "a stream of unknown length": (lambda _: {"data.streaming": "true", "training.max_steps": -1}, "max_steps"),
    "no such template file": (lambda _: {"model.chat_template": "nowhere.jinja"}, "no such file"),
    "misspelt key": (lambda _: {"training.max_lenght": "64"}, "max_length"),
    "a made-up architecture": (
        lambda _: {"model.name": "null", "model.config": "{model_type: lama}", "model.tokenizer": "CHAT"},
        "llama",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    make, told = BAD[case]
    changes = {key: chat_model if value == "CHAT" else value for key, value in make(tmp_path).items()}
    done = run_in_process(full, arguments(chat_model, questions, changes), tmp_path / "runs")
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not list(done.folder.glob("checkpoints/*"))


def test_real_instructions_in_two_languages(
    run_in_process: Run, chat_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    """configs/finetuning/full/real.yaml, shortened: Alpaca in English and Chinese."""
    folder = shared_data / "llama_factory"
    files = f"[{folder / 'alpaca_en_demo.json'}, {folder / 'alpaca_zh_demo.json'}]"
    few = {
        "data.max_samples": 300,
        "training.max_steps": 12,
        "training.max_length": 256,
        "training.learning_rate": 5e-3,
    }
    done = run_in_process(
        full, ["--config", "real", "--run.name", "real", *arguments(chat_model, files, few)], tmp_path
    )
    assert done.code == 0, done.err
    assert "exact_match" not in done.figures
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.5
    assert "samples are longer than training.max_length 256" in done.out
    answers = (done.folder / "samples" / "answers.md").read_text().splitlines()
    assert len(answers) == 2 + 8


@pytest.mark.slow
def test_a_classifier_in_pieces_is_scored_by_its_trainer(execute: Callable[..., Any], tmp_path: Path) -> None:
    """ZeRO-3 leaves no process a model that it could run alone: the loss is told, before and after, and no accuracy."""
    base, rows = peft_checks.save_bert(tmp_path / "bert"), peft_checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"full.task_type": "SEQ_CLS", "full.optimizer": "adamw", "run.root": tmp_path}
    few = {"training.max_steps": 12, "training.learning_rate": 1e-2, "data.max_validation_samples": 16}
    line = [sys.executable, "tests/sharded_on_cpu.py", "zero3", "2", full.__file__]
    done = execute([*line, *peft_checks.arguments(base, rows, changes, few)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "full" / "default" / "metrics.json").read_text())
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.1
    assert "accuracy" not in figures
