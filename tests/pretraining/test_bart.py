"""BART, run in this process on a text of a few kilobytes: it learns, it is saved as a plain BART, it resumes, nothing leaks."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import command_line

from recipes.pretraining import bart

MODEL = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 48,
    "dropout": 0.0,
}  # fmt: skip


def tiny(sources: Path, *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, blocks of 46 bytes."""
    values = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(MODEL),
        "data.name": sources / "text.txt",
        "data.validation_fraction": 0.1,
        "bart.block_length": 46,
        "bart.longest_answer": 4,
        "bart.written": 4,
        "bart.source_layers": 1,
        "bart.first_stage_steps": 2,
        "classification.data": sources / "classes.jsonl",
        "generation.data": sources / "pairs.jsonl",
        "translation.data": sources / "pairs.jsonl",
        **{f"{task}.{key}": value for task in ("classification", "generation", "translation")
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


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run_folder(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    done = run_in_process(bart, tiny(sources), tmp_path)
    assert done.code == 0, done.err
    figures = done.figures
    assert figures["untrained_loss"] == pytest.approx(math.log(264), rel=0.1)  # it starts as a uniform guess
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    figures_of = {
        "classification": ("accuracy",),
        "generation": ("loss", "overlap", "exact"),
        "translation": ("first_stage_loss", "loss", "overlap", "exact"),
    }
    wanted = {
        f"{s}{task}_{figure}" for task, names in figures_of.items() for figure in names for s in ("", "baseline_")
    }
    kinds = ("token_masking", "token_deletion", "text_infilling", "sentence_permutation", "document_rotation")
    assert wanted | {f"eval_loss_{kind}" for kind in kinds} <= figures.keys()
    for name in (
        "README.md",
        "plots/loss.png",
        "samples/generation-pretrained.txt",
        "samples/translation-from-scratch.txt",
    ):
        assert (done.folder / name).stat().st_size > 0, name

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(done.folder / "model").eval()
    assert tokenizer.mask_token_id is not None and len(tokenizer) == model.config.vocab_size
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


def small_model(vocabulary: int = 60) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    fields = {k: v for k, v in MODEL.items() if k != "model_type"}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, pad_token_id=0, **fields))


def test_translations_first_stage_learns_what_the_paper_says() -> None:
    """The source encoder, BART's positions, and queries, keys and values of the first encoder layer; nothing else moves."""
    model = small_model()
    bart.put_source_encoder(model, 1)
    learned = bart.learn_first_stage_only(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in names if not name.startswith("model.encoder.source.")}
    assert own == {
        "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight",
        *(f"model.encoder.layers.0.self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
    }  # fmt: skip
    assert learned == sum(p.numel() for p in model.parameters() if p.requires_grad)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, labels = torch.randint(3, 60, (4, 9)), torch.randint(3, 60, (4, 7))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= names and {"model.encoder.layers.0.self_attn.q_proj.weight"} <= moved
    assert any(name.startswith("model.encoder.source.layers") for name in moved)
    assert "model.encoder.source.embed_tokens.weight" in moved  # the new language has a table of its own
    assert "model.shared.weight" not in moved


def test_the_source_encoder_stands_where_the_tokens_were_looked_up() -> None:
    """BART reads its states as embeddings, padding changes nothing, and generate() goes through it."""
    model = small_model().eval()
    bart.put_source_encoder(model, 1)
    model.eval()
    ids = torch.randint(3, 60, (1, 9))
    labels = torch.randint(3, 60, (1, 7))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
        states = model.model.encoder.source(input_ids=ids).last_hidden_state
        plain = type(model.model.encoder).forward
        encoded = plain(model.model.encoder, inputs_embeds=states)
        by_hand = model(encoder_outputs=encoded, labels=labels).logits
        assert torch.allclose(logits, by_hand, atol=1e-6)
        padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
        mask = (torch.arange(13) < 9).long()[None]
        assert torch.allclose(model(input_ids=padded, attention_mask=mask, labels=labels).logits, logits, atol=1e-5)
        model.model.encoder.source.embed_tokens.weight.normal_()
        assert not torch.allclose(
            model(input_ids=ids, attention_mask=mask[:, :9], labels=labels).logits, logits, atol=1e-3
        )
    out = model.generate(ids, attention_mask=mask[:, :9], max_new_tokens=3, do_sample=False, num_beams=1)
    assert out.shape[0] == 1


@pytest.mark.slow
def test_micro_batches_are_one_batch(accumulates: Any, sources: Path) -> None:
    accumulates(bart, partial(tiny, sources))


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_losses(resumes_to_the_same_losses: Any, sources: Path) -> None:
    """The corruptions too are those of the run that was not stopped."""
    resumes_to_the_same_losses(bart, tiny(sources, training__max_steps=12, training__save_steps=5))


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(
    run_in_process: Any, execute: Any, sources: Path, tmp_path: Path, launch: str
) -> None:
    """Of a stream, whose corrupted texts have other lengths in each process; under FSDP with the tables that the encoder and
    the decoder share."""
    if launch == "fsdp":
        pytest.importorskip("deepspeed")
    changes = {"bart__tasks": "[]", "bart__optimizer": "adamw", "training__max_steps": 3}
    if launch == "ddp":
        lines = [json.dumps({"text": line}) for line in (sources / "text.txt").read_text().splitlines()]
        (sources / "lines.jsonl").write_text("\n".join(lines))
        changes |= {"data__name": sources / "lines.jsonl", "data__streaming": "true"}
    one = run_in_process(bart, tiny(sources, "--run.name", "one", **changes), tmp_path)
    assert one.code == 0, one.err
    half = tiny(sources, "--run.name", "two", **changes, training__per_device_train_batch_size=8)
    start = {
        "ddp": [sys.executable, "-m", "recipes.common.launch", "bart", "--launch", "ddp", "--nproc", "2", "--"],
        "fsdp": [sys.executable, "tests/sharded_on_cpu.py", "fsdp", "2", bart.__file__],
    }[launch]
    done = execute([*start, *half, "--run.root", str(tmp_path)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    folders = [one.folder, one.folder.with_name("two")]
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    scores = [json.loads((f / "metrics.json").read_text())["eval_loss"] for f in folders]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bart__rate": 0.0}, "rate"),
        ({"bart__rate": 1.0}, "rate"),
        ({"bart__mean_span": 0}, "mean_span"),
        ({"translation__validation_split": "dev"}, "dev"),  # what comes after the pretraining is read before it
        ({"bart__corruptions": "[token_masking, shuffling]"}, "shuffling"),
        ({"bart__corruptions": "[]"}, "bart.corruptions"),
        ({"bart__block_length": 47}, "bart.block_length"),
        ({"bart__block_length": 7}, "bart.block_length"),
        ({"translation__max_length": 49}, "translation.max_length"),
        ({"bart__longest_answer": 48}, "longest_answer"),
        ({"bart__mean_span": 1e30}, "bart.mean_span"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"model__config": '{"model_type": "t5", "d_model": 32}'}, "model_type"),
    ],
)
def test_bad_input_is_one_clear_error(refuses: Any, sources: Path, changes: dict[str, Any], said: str) -> None:
    refuses(bart, tiny(sources, **changes), said)


def test_a_dry_run_trains_nothing(dry_runs: Any, sources: Path) -> None:
    dry_runs(bart, tiny(sources))
