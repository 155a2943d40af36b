"""LLaMA, run in this process on a text of a few kilobytes: it learns, it is scored honestly, and it resumes to the same weights."""

from __future__ import annotations

import collections
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer

from recipes.pretraining import llama


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes: 263 tokens."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a saved tokenizer and text.txt, lines of a small grammar."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer.save_pretrained(folder / "tokenizer")
    nouns, verbs, places = ("cat", "dog", "owl", "fox"), ("sat", "ran", "hid"), ("on", "under", "by")
    lines = [
        f"the {a} {verb} {place} the {b} again and again"
        for a, verb, place, b in itertools.product(nouns, verbs, places, nouns)
    ]
    (folder / "text.txt").write_text("\n".join(lines * 3) + "\n")
    return folder


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, blocks of 64 bytes."""
    model = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    words = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(model),
        "data.name": sources / "text.txt",
        "llama.block_length": 64,
        "llama.compare_with_xz": "false",
        "llama.prompts": '["the "]',
        "training.max_steps": 25,
        "training.per_device_train_batch_size": 8,
        "training.learning_rate": 2e-2,
        "training.lr_scheduler_type": "linear",
        "training.lr_scheduler_kwargs": "{}",
        "training.warmup_steps": 2,
        "training.save_steps": 10,
        "training.bf16": "false",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [*(word for key, value in words.items() for word in (f"--{key}", str(value))), *more]


def unigram_entropy(text: str) -> float:
    """Nats a byte of the best model that sees no context."""
    counts = collections.Counter(text.encode())
    return -sum(n * math.log(n / counts.total()) for n in counts.values()) / counts.total()


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    done = run_in_process(llama, tiny(sources, training__max_steps=40), tmp_path)
    assert done.code == 0, done.err
    losses = [row["loss"] for row in done.history()]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(263), rel=0.1)  # it starts as a uniform guess
    assert losses[-1] < unigram_entropy((sources / "text.txt").read_text())  # so it uses what came before
    unigram = unigram_entropy((sources / "text.txt").read_text()) / math.log(2)
    assert done.figures["unigram_bits_per_byte"] == pytest.approx(unigram, rel=0.05)  # a token is a byte here
    assert done.figures["untrained_bits_per_byte"] == pytest.approx(math.log2(263), rel=0.1)
    assert done.figures["bits_per_byte"] < unigram < done.figures["untrained_bits_per_byte"]
    assert {
        "bits_per_byte", "eval_bytes", "tokens_per_second", "mfu", "step_seconds", "parameters", "trainable_parameters",
        "flops_per_token", "wall_seconds", "peak_memory_gib",
    } <= done.figures.keys()  # fmt: skip
    for name in ("config.yaml", "environment.json", "README.md", "plots/loss.png", "samples/step-000010.txt"):
        assert (done.folder / name).stat().st_size > 0, name
    assert sorted(path.name for path in (done.folder / "checkpoints").iterdir()) == ["checkpoint-30", "checkpoint-40"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    assert sum(p.numel() for p in model.parameters()) == done.figures["parameters"]
    ids = torch.tensor([tokenizer("the cat sat on the dog again and again\n")["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss.item() < unigram_entropy((sources / "text.txt").read_text())


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_weights(stop_and_resume: Any, sources: Path) -> None:
    """Stopped where the uninterrupted run saves, and writes samples, too; dropout draws random numbers in every step."""
    line = tiny(sources, training__max_steps=20, training__save_steps=7)
    config = line.index("--model.config") + 1
    line[config] = json.dumps(json.loads(line[config]) | {"attention_dropout": 0.2})
    whole, stopped, resumed = stop_and_resume(llama, line, 13)
    assert "SIGINT" in stopped.err and "--run.resume true" in stopped.err and "Traceback" not in stopped.err
    assert (stopped.folder / "checkpoints/checkpoint-14/complete").exists()
    assert "resuming after step 14" in resumed.out
    assert [row["step"] for row in resumed.history()] == list(range(1, 21))
    ours, theirs = ([row["loss"] for row in run.history()] for run in (resumed, whole))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert resumed.figures["bits_per_byte"] == pytest.approx(whole.figures["bits_per_byte"], abs=1e-5)

    from safetensors.torch import load_file

    weights = [load_file(run.folder / "model/model.safetensors") for run in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=0, msg=name)


def test_a_dry_run_says_what_would_run_and_writes_nothing(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    done = run_in_process(llama, tiny(sources, "--dry-run"), tmp_path)
    assert done.code == 0, done.err
    assert "dry run" in done.out and "input_ids (8, 64)" in done.out and "25 x 512 tokens" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_micro_batches_are_one_batch(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    """Accumulation weighs every token alike, so halves of a batch give the losses of the whole."""
    options = {"training__max_steps": 4, "llama__optimizer": "adamw"}
    one = run_in_process(llama, tiny(sources, "--run.name", "one", **options), tmp_path)
    halves = {"training__per_device_train_batch_size": 4, "training__gradient_accumulation_steps": 2}
    two = run_in_process(llama, tiny(sources, "--run.name", "two", **options, **halves), tmp_path)
    assert one.code == two.code == 0, one.err + two.err
    losses = [[row["loss"] for row in run.history()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_take_the_steps_of_one(
    run_in_process: Any, execute: Any, sources: Path, tmp_path: Path, optimizer: str
) -> None:
    """LAUNCH=ddp NPROC=2, each process with half of the batch: the losses and the weights of one process with all of it."""
    options = {"training__max_steps": 6, "llama__optimizer": optimizer}
    one = run_in_process(llama, tiny(sources, "--run.name", "one", **options), tmp_path)
    assert one.code == 0, one.err
    half = tiny(sources, "--run.name", "two", **options, training__per_device_train_batch_size=4)
    launcher = [sys.executable, "-m", "recipes.common.launch", "llama", "--launch", "ddp", "--nproc", "2", "--"]
    done = execute([*launcher, *half, "--run.root", str(tmp_path)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr

    folders = [one.folder, one.folder.with_name("two")]
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    losses = [[row["loss"] for row in found] for found in rows]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(f / "model" / "model.safetensors") for f in folders]
    apart = {"muon": 0.03, "adamw": 1e-3}[optimizer]  # Muon orthogonalises in bf16, which makes more of a rounding
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() < apart * weight.norm(), name
    bits = [json.loads((f / "metrics.json").read_text())["bits_per_byte"] for f in folders]
    assert bits[1] == pytest.approx(bits[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["fsdp", "zero2", "zero3"])
def test_a_sharded_run_takes_the_steps_of_one_process_and_saves_the_whole_model(
    run_in_process: Any, execute: Any, sources: Path, tokenizer: Any, tmp_path: Path, launch: str
) -> None:
    """Two processes that hold half of the weights each: the losses, the saved weights and the score of one with all."""
    pytest.importorskip("deepspeed")
    make_model(tokenizer).save_pretrained(tmp_path / "start")  # ZeRO-3 draws fresh weights in another order
    tokenizer.save_pretrained(tmp_path / "start")
    options = {"model__config": "null", "model__tokenizer": "null", "model__name": tmp_path / "start"}
    options |= {"training__max_steps": 4, "llama__optimizer": "adamw"}
    one = run_in_process(llama, tiny(sources, "--run.name", "one", **options), tmp_path)
    assert one.code == 0, one.err
    half = tiny(sources, "--run.name", "two", **options, training__per_device_train_batch_size=4)
    line = [sys.executable, "tests/sharded_on_cpu.py", launch, "2", llama.__file__, *half]
    done = execute([*line, "--run.root", str(tmp_path)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr

    folders = [one.folder, one.folder.with_name("two")]
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(f / "model" / "model.safetensors") for f in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() < 1e-3 * weight.norm(), name
    figures = [json.loads((f / "metrics.json").read_text()) for f in folders]
    for name in ("bits_per_byte", "untrained_bits_per_byte"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-4), name
    assert figures[1]["parameters"] == figures[0]["parameters"]
    assert figures[1]["flops_per_token"] == figures[0]["flops_per_token"]


def test_blocks_longer_than_the_positions_are_refused(refuses: Any, sources: Path) -> None:
    refuses(llama, tiny(sources, llama__block_length=65), "llama.block_length is 65, but the model has 64 positions")


# ---------------------------------------------------------------------------------------------- bits per byte


class Guess(torch.nn.Module):
    """Stands in for a model: uniform over the vocabulary, or sure of the token that follows in `ids` order."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(vocabulary))
        self.config = type("C", (), {"dtype": torch.float64})()
        self.seen: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.seen.append(input_ids.shape[1])
        logits = self.table.expand(*input_ids.shape, -1)
        return type("O", (), {"logits": logits})()


TEXTS = ["a", "The quick brown fox jumps over the lazy dog. " * 3, "größer → ✓ " * 5, "x" * 64, "y" * 65]


@pytest.mark.parametrize("stride", [0.25, 0.5, 0.99])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_a_uniform_model_needs_log2_v_a_token_and_each_token_counts_once(
    tokenizer: Any, length: int, stride: float
) -> None:
    tokens = sum(len(ids) for ids in llama.encode_plain(tokenizer, TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    guess = Guess(len(tokenizer))
    scored = llama.bits_per_byte(guess, tokenizer, TEXTS, length, stride)
    assert scored == pytest.approx(math.log2(len(tokenizer)) * tokens / size, rel=1e-5)
    assert max(guess.seen) <= length  # no window is longer than what the model was trained on


@pytest.mark.parametrize("stride", [0.1, 0.5, 0.9])
def test_where_a_text_fits_a_window_the_stride_changes_nothing(tokenizer: Any, stride: float) -> None:
    model = make_model(tokenizer, torch_dtype="float32").eval()
    text = "def first(items):\n    return items[0]\n"
    model.config.dtype = torch.float64  # turns autocast off
    ids = torch.tensor([[tokenizer.eos_token_id, *llama.encode_plain(tokenizer, [text])[0]]])
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss.item()
    expected = mean * (ids.shape[1] - 1) / math.log(2) / len(text.encode())
    assert llama.bits_per_byte(model, tokenizer, [text], 200, stride) == pytest.approx(expected, rel=1e-4)


def test_a_token_is_scored_in_the_first_window_that_holds_it(tokenizer: Any) -> None:
    """By hand: length 8, stride 4; token i of the document sees the window that starts at 4 * max(0, ceil((i - 8) / 4))."""
    model = make_model(tokenizer).eval()
    model.config.dtype = torch.float64
    text = "abcdefghijklmnopqrstuvw"
    document = [tokenizer.eos_token_id, *llama.encode_plain(tokenizer, [text])[0]]
    total = 0.0
    for i in range(1, len(document)):
        start = 4 * max(0, math.ceil((i - 8) / 4))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([document[start:i]])).logits[0, -1]
        total -= torch.log_softmax(logits.float(), -1)[document[i]].item()
    expected = total / math.log(2) / len(text)
    assert llama.bits_per_byte(model, tokenizer, [text], 8, 0.5) == pytest.approx(expected, rel=1e-4)


def test_the_unigram_bits_are_those_of_the_training_blocks_frequencies(tokenizer: Any) -> None:
    """Counts 3 and 1 and one more for each of 263 tokens; two bytes a letter of the second text."""
    a, b = llama.encode_plain(tokenizer, ["ab"])[0]
    blocks = [{"input_ids": [a, a]}, {"input_ids": [a, b]}]
    size = 4 + len(tokenizer)
    assert llama.unigram_bits_per_byte(blocks, tokenizer, ["aab"]) == pytest.approx(
        -(2 * math.log2(4 / size) + math.log2(2 / size)) / 3
    )
    assert llama.unigram_bits_per_byte(blocks, tokenizer, ["ß"]) == pytest.approx(-2 * math.log2(1 / size) / 2)


def test_xz_knows_what_it_has_seen() -> None:
    text = "".join(f"line {i * i % 977} of a text without end\n" for i in range(400))
    figures = llama.xz_bits_per_byte([text], [text])
    assert 0 <= figures["xz_primed_bits_per_byte"] < figures["xz_bits_per_byte"] / 5
    assert figures["xz_bits_per_byte"] < 8
