"""UniLM, run in this process on a text of a few kilobytes: it learns, it is saved as a plain BERT, it resumes."""

from __future__ import annotations

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import command_line

from recipes.common.errors import UserError
from recipes.common.prefix_masks import LEFT_TO_RIGHT, add_marks, batch_of, encode, pretraining_sample, write
from recipes.pretraining import unilm


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, blocks of 45 bytes."""
    model = {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 48, "type_vocab_size": 6, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    values = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(model),
        "data.name": sources / "text.txt",
        "data.validation_fraction": 0.1,
        "unilm.block_length": 45,
        "unilm.longest_answer": 6,
        "unilm.written": 4,
        "classification.data": sources / "classes.jsonl",
        "generation.data": sources / "pairs.jsonl",
        **{f"{task}.{key}": value for task in ("classification", "generation")
           for key, value in (("steps", 3), ("max_length", 40), ("eval_rows", 8))},
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


ELSEWHERE = """
import json, sys
sys.path.insert(0, ".")
from prefix_masks import add_marks, write
from transformers import AutoModelForPreTraining, AutoTokenizer
model, tokenizer = AutoModelForPreTraining.from_pretrained("."), AutoTokenizer.from_pretrained(".")
print(json.dumps(write(model, [json.loads(sys.argv[1])], add_marks(tokenizer), 5)))
assert not any(name.startswith("recipes") for name in sys.modules)
"""


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(
    run_in_process: Any, execute: Any, sources: Path, tmp_path: Path
) -> None:
    done = run_in_process(unilm, tiny(sources), tmp_path)
    assert done.code == 0, done.err
    figures = done.figures
    assert figures["untrained_loss"] == pytest.approx(math.log(264), rel=0.1)  # it starts as a uniform guess
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    assert {
        "eval_loss_left_to_right", "eval_loss_right_to_left", "eval_loss_bidirectional", "eval_loss_sequence_to_sequence",
        "next_sentence_accuracy", "classification_accuracy", "baseline_classification_accuracy", "generation_loss",
        "baseline_generation_loss", "generation_overlap", "baseline_generation_overlap", "tokens_per_second",
    } <= figures.keys()  # fmt: skip
    for name in ("README.md", "plots/loss.png", "samples/answers-pretrained.txt", "samples/answers-from-scratch.txt"):
        assert (done.folder / name).stat().st_size > 0, name
    assert "from prefix_masks import add_marks, write" in (done.folder / "README.md").read_text()

    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    size = len(tokenizer)
    marks = add_marks(tokenizer)
    assert len(tokenizer) == size  # the saved tokenizer has the marks already
    whole, cloze = (
        c.from_pretrained(done.folder / "model").eval() for c in (AutoModelForPreTraining, AutoModelForMaskedLM)
    )
    ids = tokenizer("the cat sat by the dog", add_special_tokens=False)["input_ids"]
    sample = pretraining_sample(ids, ids, marks, np.random.default_rng(0), kind=LEFT_TO_RIGHT)
    batch = batch_of([sample], marks)
    with torch.no_grad():
        states = [encode(model, **batch) for model in (whole, cloze)]
        assert torch.equal(*states)
        assert torch.equal(whole.cls.predictions(states[0]), cloze.cls.predictions(states[1]))
        batch["input_ids"][0, 9] += 1
        assert torch.equal(encode(whole, **batch)[0, :9], states[0][0, :9])  # the trained model sees no later token
        assert not torch.equal(encode(whole, **batch)[0, 9], states[0][0, 9])

    # and where this repository is not, with the file beside the weights
    source, expected = ids[:8], write(whole, [ids[:8]], marks, 5)
    elsewhere = execute(
        [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(source)], cwd=done.folder / "model", timeout=600
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert json.loads(elsewhere.stdout.splitlines()[-1]) == expected


@pytest.mark.slow
def test_micro_batches_are_one_batch(accumulates: Any, sources: Path) -> None:
    accumulates(unilm, partial(tiny, sources), rel=0.2)


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_losses(resumes_to_the_same_losses: Any, sources: Path) -> None:
    """The masks, the maskings and the wrong next segments too are those of the run that was not stopped."""
    resumes_to_the_same_losses(unilm, tiny(sources, training__max_steps=12, training__save_steps=5))


@pytest.mark.slow
def test_sharded_over_two_processes_it_is_scored_with_its_own_loss(
    run_in_process: Any, execute: Any, sources: Path, tmp_path: Path
) -> None:
    """The copy that is scored holds all the weights, which no process does, and the cloze loss."""
    pytest.importorskip("deepspeed")
    changes = {"unilm__optimizer": "adamw", "training__max_steps": 2}
    one = run_in_process(unilm, tiny(sources, "--run.name", "one", **changes), tmp_path)
    assert one.code == 0, one.err
    half = tiny(sources, "--run.name", "two", **changes, training__per_device_train_batch_size=8)
    line = [sys.executable, "tests/sharded_on_cpu.py", "fsdp", "2", unilm.__file__, *half]
    done = execute([*line, "--run.root", str(tmp_path)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    figures = [json.loads((one.folder.with_name(name) / "metrics.json").read_text()) for name in ("one", "two")]
    assert figures[1]["untrained_loss"] == pytest.approx(figures[0]["untrained_loss"], rel=1e-3)
    # each process has other wrong next segments than one process with both halves would have
    assert figures[1]["eval_loss"] == pytest.approx(figures[0]["eval_loss"], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unilm__mask_rate": 0.0}, "mask_rate"),
        ({"unilm__mask_rate": 1.0}, "mask_rate"),
        ({"unilm__block_length": 46}, "unilm.block_length"),
        ({"generation__data": "nowhere.jsonl"}, "nowhere.jsonl"),  # what comes after the pretraining is read before it
        ({"generation__max_length": 49}, "generation.max_length"),
        ({"training__per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ({"unilm__longest_answer": 21}, "longest_answer"),
        ({"unilm__block_length": 7}, "block_length"),
        ({"classification__max_length": 7}, "classification.max_length"),
        ({"generation__max_length": 4, "unilm__longest_answer": 2}, "generation.max_length"),
        ({"model__attention": "flex_attention"}, "model.attention"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"model__config": '{"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}'}, "type_vocab_size"),
        ({"model__config": '{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}'}, "model_type"),
    ],
)
def test_bad_input_is_one_clear_error(refuses: Any, sources: Path, changes: dict[str, Any], said: str) -> None:
    refuses(unilm, tiny(sources, **changes), said)


def test_a_batch_padded_beyond_the_positions_is_refused_before_the_training(refuses: Any, sources: Path) -> None:
    """47 tokens and their marks are 50, as many as there are positions; a batch of them is padded to 64."""
    line = tiny(sources, unilm__block_length=47)
    shape = line.index("--model.config") + 1
    line[shape] = json.dumps(json.loads(line[shape]) | {"max_position_embeddings": 50})
    refuses(unilm, line, "50 tokens, 64 with their padding")


def test_a_dry_run_trains_nothing(dry_runs: Any, sources: Path) -> None:
    dry_runs(unilm, tiny(sources))


def test_held_out_blocks_are_asked_in_random_company_an_even_number_at_once() -> None:
    """In the files' order the wrong next segment would be of the same text."""
    for blocks in (2, 3, 33, 64, 97):
        batches = unilm.random_batches(blocks, 32)
        seen = [i for some in batches for i in some]
        assert len(seen) == len(set(seen)) == blocks // 2 * 2 and set(seen) <= set(range(blocks))
        assert all(len(some) % 2 == 0 and 2 <= len(some) <= 32 for some in batches)
    followers = [b - a for some in unilm.random_batches(400, 32) for a, b in itertools.pairwise(some)]
    assert followers.count(1) < 8  # of 387; one of 400 by chance
    assert unilm.random_batches(97, 32) == unilm.random_batches(97, 32)


@pytest.mark.parametrize(("size", "expected"), [(4, 4), (1000, None)])
def test_no_batch_is_one_text_alone(
    size: int, expected: int | None, sources: Any, run_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be its own wrong next segment; fewer texts than a batch are one batch still."""
    seen: list[int] = []

    def stop(trainer: Any, *_: Any, **__: Any) -> None:
        rows = trainer.train_dataset
        rows.draws = 4 * (len(rows) // 4) + 1  # one is left over
        seen.extend(len(batch["input_ids"]) for batch in trainer.get_train_dataloader())
        assert len(rows) > 4
        raise UserError("enough")

    monkeypatch.setattr("recipes.common.draws.pretrain_and_score", stop)
    more = {"training__max_steps": -1, "training__num_train_epochs": 1, "training__per_device_train_batch_size": size}
    done = run_in_process(unilm, tiny(sources, **more), tmp_path)
    assert "enough" in done.err, done.err
    assert set(seen) == {expected} if expected else len(seen) == 1 and seen[0] > 1
