"""GLM, run in this process on a text of a few kilobytes: it learns, it is saved whole, it resumes, and it refuses bad input."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import command_line, make_tokenizer

from recipes.common.blank_infilling import add_marks, answer_batch, batch_of, infill, write
from recipes.common.errors import UserError
from recipes.common.modeling_blank_infilling import BlankInfillingConfig, BlankInfillingModel
from recipes.pretraining import glm


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, blocks of 48 bytes."""
    model = {
        "model_type": "blank_infilling", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    values = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(model),
        "data.name": sources / "text.txt",
        "data.validation_fraction": 0.1,
        "glm.block_length": 48,
        "glm.longest_answer": 6,
        "glm.written": 4,
        "classification.data": sources / "classes.jsonl",
        "generation.data": sources / "pairs.jsonl",
        **{f"{task}.{key}": value for task in ("classification", "generation")
           for key, value in (("steps", 3), ("max_length", 48), ("eval_rows", 8))},
        "training.max_steps": 40,
        "training.per_device_train_batch_size": 8,
        "training.learning_rate": 2e-2,
        "training.lr_scheduler_type": "linear",
        "training.lr_scheduler_kwargs": "{}",
        "training.warmup_steps": 2,
        "training.save_steps": 20,
        "training.bf16": "false",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip
    return [*command_line(values), *more]


ELSEWHERE = """
import sys
sys.path.insert(0, ".")
import modeling_blank_infilling
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".").eval()
save_file({"logits": model(**load_file(sys.argv[1])).logits.detach()}, sys.argv[2])
assert not any(name.startswith("recipes") for name in sys.modules)
"""


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(
    run_in_process: Any, execute: Any, sources: Path, tmp_path: Path
) -> None:
    done = run_in_process(glm, tiny(sources), tmp_path)
    assert done.code == 0, done.err
    figures = done.figures
    assert figures["untrained_loss"] == pytest.approx(math.log(266), rel=0.1)  # it starts as a uniform guess
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    assert {
        "eval_loss_token", "eval_loss_sentence", "eval_loss_document", "classification_accuracy", "generation_loss",
        "baseline_classification_accuracy", "baseline_generation_loss", "generation_overlap", "tokens_per_second",
    } <= figures.keys()  # fmt: skip
    for name in ("README.md", "plots/loss.png", "samples/corrupted.txt", "samples/answers-pretrained.txt"):
        assert (done.folder / name).stat().st_size > 0, name

    assert "\nfrom recipes.common import modeling_blank_infilling" in (done.folder / "README.md").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    size = len(tokenizer)
    marks = add_marks(tokenizer)
    assert len(tokenizer) == size  # the saved tokenizer has the marks already
    ours, auto = (c.from_pretrained(done.folder / "model").eval() for c in (BlankInfillingModel, AutoModelForCausalLM))
    saved = load_file(done.folder / "model/model.safetensors")
    assert torch.equal(saved["span_positions.weight"], ours.span_positions.weight)
    ids = tokenizer("the cat sat by the dog", add_special_tokens=False)["input_ids"]
    batch = {**batch_of([infill(ids, [(4, 7), (12, 14)], [1, 0], marks)], marks.pad), "labels": None}
    with torch.no_grad():
        logits = ours(**batch).logits
        assert torch.equal(logits, auto(**batch).logits)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        place = int(batch["context_length"][0]) + 2
        changed["input_ids"][0, place] += 1
        assert torch.equal(
            ours(**changed).logits[0, :place], logits[0, :place]
        )  # the trained model sees no later token
        assert not torch.equal(ours(**changed).logits[0, place], logits[0, place])

    # and where this repository is not, with the file beside the weights: nothing needs trust_remote_code
    assert "auto_map" not in json.loads((done.folder / "model/config.json").read_text())
    paths = [str(tmp_path / name) for name in ("batch.safetensors", "logits.safetensors")]
    save_file({name: value.contiguous() for name, value in batch.items() if value is not None}, paths[0])
    elsewhere = execute([sys.executable, "-I", "-c", ELSEWHERE, *paths], cwd=done.folder / "model", timeout=600)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert torch.allclose(load_file(paths[1])["logits"], logits, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_are_one_batch(accumulates: Any, sources: Path) -> None:
    accumulates(glm, partial(tiny, sources))


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_losses(resumes_to_the_same_losses: Any, sources: Path) -> None:
    """The corruptions too are those of the run that was not stopped."""
    resumes_to_the_same_losses(glm, tiny(sources, training__max_steps=12, training__save_steps=5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"glm__mix": '{"token": 0.5, "paragraph": 0.5}'}, "glm.mix"),
        ({"glm__block_length": 63}, "glm.block_length"),
        (
            {"classification__data": "nowhere.jsonl"},
            "nowhere.jsonl",
        ),  # what comes after the pretraining is read before it
        ({"classification__max_length": 65}, "classification.max_length"),
        ({"glm__cloze": "import"}, "glm.cloze"),
        ({"glm__longest_answer": 25}, "glm.longest_answer"),
        ({"glm__mask_rate": 1.0}, "mask_rate"),
        ({"glm__mean_span": 1e30}, "glm.mean_span"),
        ({"glm__block_length": 1}, "glm.block_length"),
        ({"classification__max_length": 11}, "beside glm.cloze"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"glm__mask_rate": 0.0}, "mask_rate"),
        ({"model__config": '{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}'}, "blank_infilling"),
    ],
)
def test_bad_input_is_one_clear_error(refuses: Any, sources: Path, changes: dict[str, Any], said: str) -> None:
    refuses(glm, tiny(sources, **changes), said)


def test_a_dry_run_trains_nothing(dry_runs: Any, sources: Path) -> None:
    dry_runs(glm, tiny(sources))


# ----------------------------------------------------------------------------------------- classes and answers


def test_each_class_has_its_own_token() -> None:
    tokenizer = make_tokenizer()  # bytes: " cat" begins with a blank, as all do
    names = ["cat", "cow", "crow", "owl"]
    ids = glm.label_tokens(names, tokenizer)
    assert [tokenizer.decode([i]) for i in ids] == [" ", "c", "r", "o"]
    with pytest.raises(UserError, match="'a'"):
        glm.label_tokens(["aaa", "bbb", "a a", "a"], tokenizer)


def test_a_class_is_read_at_the_blank_and_among_the_classes_alone() -> None:
    tokenizer = make_tokenizer()
    marks = add_marks(tokenizer)
    torch.manual_seed(0)
    config = BlankInfillingConfig(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    model = BlankInfillingModel(config).eval()
    samples = glm.cloze_samples(["a text", "another, longer text"], tokenizer, marks, " is {mask}.", 16)
    assert tokenizer.decode(samples[0].tokens) == "a text is <|mask|>.<|start|>"
    assert (
        tokenizer.decode(samples[1].tokens) == "another, l is <|mask|>.<|start|>"
    )  # the text gives way, not the pattern
    batch = {**batch_of(samples, marks.pad), "labels": torch.tensor([1, 2])}
    words = [70, 80, 90]
    with torch.no_grad():
        out = glm.cloze_classifier(model, words)(**batch)
        for row in range(2):
            alone = {**batch_of([samples[row]], marks.pad), "labels": None}
            logits = model(**alone).logits[0, len(samples[row].tokens) - 1]
            torch.testing.assert_close(out.logits[row], logits[words])
        expected = -out.logits.log_softmax(-1)[torch.arange(2), batch["labels"]].mean()
        torch.testing.assert_close(out.loss, expected)


def test_an_answer_is_a_span_at_the_source_s_end() -> None:
    marks = add_marks(make_tokenizer())
    batch = answer_batch([[5, 6, 7]], [[8, 9]], marks, 20)
    m, s, e = marks[:3]
    assert batch["input_ids"][0].tolist() == [5, 6, 7, m, s, 8, 9, *[marks.pad] * 9]
    assert batch["labels"][0].tolist() == [-100] * 4 + [8, 9, e, *[-100] * 9]
    long = answer_batch([[5] * 50], [[8] * 50], marks, 20)
    assert long["input_ids"].shape[1] <= 32 and (long["labels"] != -100).sum() == 11


def test_writing_stops_at_the_stop_token_and_reads_what_it_wrote() -> None:
    """A stand-in for a model counts up from the source's last token, and stops after 14."""
    marks = add_marks(make_tokenizer())

    class Counter(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Any, context_length: Any, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, 300)
            for row, n in enumerate(context_length.tolist()):
                for i in range(n, input_ids.shape[1]):
                    seen = int(input_ids[row, n - 2]) if i == n else int(input_ids[row, i])
                    logits[row, i, marks.stop if seen == 14 else (seen + 1) % 300] = 1
            return type("O", (), {"logits": logits})()

    assert write(Counter(), [[9, 10], [13], [14], [1, 2, 3]], marks, 5) == [[11, 12, 13, 14], [14], [], [4, 5, 6, 7, 8]]


def test_the_corruption_of_a_draw_does_not_depend_on_the_batch() -> None:
    from recipes.common.draws import Numbered, generator

    rows = Numbered([{"input_ids": [i]} for i in range(3)], 8)
    assert [row["input_ids"][0] for row in (rows[i] for i in range(8))] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [rows[i]["draw"] for i in range(8)] == list(range(8))
    numbers = [generator(0, i).integers(0, 1 << 40) for i in (1, 2, 1)]
    assert numbers[0] == numbers[2] != numbers[1]
    assert np.unique([generator(s, 5).integers(0, 1 << 40) for s in range(50)]).size == 50
