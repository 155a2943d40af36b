"""BitFit as a recipe: which biases learn, what is saved, what a model without biases is given, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from recipes.common import adaptation
from recipes.common.adapter_files import load_adapter
from recipes.common.errors import UserError
from recipes.finetuning import bitfit

FEW = {"bitfit.add_biases": "true", "training.learning_rate": 2e-1}
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(bitfit, checks.arguments(chat_model, questions, FEW), root, patch)


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """q 32, k 16, v 16, o 32, gate 64, up 64, down 32, in each of 2 layers."""
    _, figures, _ = trained
    assert figures["trainable_parameters"] == 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)


def test_the_weights_are_bit_for_bit_what_they_were(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 14
    assert all(name.endswith(".bias") and tensor.any() for name, tensor in tensors.items())


def test_base_and_adapter_and_the_plain_model_give_the_same_logits(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_reloads(folder, model, AutoModelForCausalLM.from_pretrained(chat_model), INPUTS)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(plain) is LlamaForCausalLM
    assert plain.config.attention_bias
    assert plain.config.mlp_bias
    with torch.no_grad():
        assert torch.equal(plain(**INPUTS).logits, model.eval()(**INPUTS).logits)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(bitfit, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(bitfit, line, run_in_process, tmp_path)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


# ------------------------------------------------------------------------------------------------ which biases learn


def test_zero_biases_change_nothing(chat_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    before = model(**INPUTS).logits
    bitfit.put_in(model, {"add_biases": True})
    assert len(bitfit.biases_of(model)) == 14
    assert torch.equal(model(**INPUTS).logits, before)


def test_only_the_chosen_biases_get_gradients(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checks.save_bert(tmp_path), num_labels=2)
    head = checks.BERT_HEAD
    assert adaptation.head_names(model) == head
    layers = [f"bert.encoder.layer.{i}." for i in range(2)]
    ends = ("attention.self.query.bias", "intermediate.dense.bias")
    paper = {layer + end for layer in layers for end in ends}
    assert bitfit.biases_of(model, "query_and_mlp") == paper
    every = {n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1}
    assert bitfit.biases_of(model, "all") == every
    batch = {**INPUTS, "labels": torch.tensor([0, 1, 0, 1])}
    for biases, expected in ((paper, 2 * (32 + 64)), (every, sum(model.get_parameter(n).numel() for n in every))):
        rest = sum(model.get_parameter(name).numel() for name in head - biases)
        assert adaptation.freeze(model, biases | head) == expected + rest
        checks.check_gradients(model, batch, biases | head)


def test_a_step_changes_the_output(chat_model: Path) -> None:
    model = bitfit.put_in(AutoModelForCausalLM.from_pretrained(chat_model), {"add_biases": True})
    adaptation.freeze(model, bitfit.biases_of(model))
    before = model(**INPUTS).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    optimizer.step()
    assert (model(**INPUTS).logits - before).abs().max() > 1e-3


def test_a_gated_mlp_has_two_first_layers(chat_model: Path) -> None:
    model = bitfit.put_in(AutoModelForCausalLM.from_pretrained(chat_model), {"add_biases": True})
    ends = {name.removeprefix("model.layers.0.") for name in bitfit.biases_of(model, "query_and_mlp") if ".0." in name}
    assert ends == {"self_attn.q_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias"}


@pytest.mark.slow
def test_it_classifies(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_bert(tmp_path / "bert"), checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"bitfit.add_biases": "false", "bitfit.task_type": "SEQ_CLS", "training.learning_rate": 2e-2}
    done = run_in_process(bitfit, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9 > done.figures["baseline_accuracy"]
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    plain = AutoModelForSequenceClassification.from_pretrained(done.folder / "model").eval()
    with torch.no_grad():
        ours = load_adapter(fresh, done.folder / "adapter")(**INPUTS).logits
        assert torch.allclose(ours, plain(**INPUTS).logits, atol=1e-6)
    assert plain.config.id2label == {0: "cold", 1: "warm"}


@pytest.mark.slow
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_micro_batches_are_one_batch(run_in_process: checks.Run, tmp_path: Path, task_type: str) -> None:
    """The losses of BERT's and BART's classes do not know how many micro-batches there are."""
    if task_type == "SEQ_CLS":
        base, rows = checks.save_bert(tmp_path / "base"), checks.labelled_rows(tmp_path / "rows.jsonl")
    else:
        base, rows = checks.save_bart(tmp_path / "base"), checks.pair_rows(tmp_path / "rows.jsonl")
    first = []
    for size, count in ((8, 1), (2, 4)):
        changes = {
            "bitfit.add_biases": "false", "bitfit.task_type": task_type, "training.max_steps": 1, "run.name": f"of-{size}",
            "training.per_device_train_batch_size": size, "training.gradient_accumulation_steps": count,
        }  # fmt: skip
        done = run_in_process(bitfit, checks.arguments(base, rows, changes), tmp_path)
        assert done.code == 0, done.err
        first.append(next(row for row in done.history() if "loss" in row))
    for name in ("loss", "grad_norm"):
        assert first[1][name] == pytest.approx(first[0][name], rel=0.1), name


@pytest.mark.slow
def test_an_encoder_decoder_writes(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_bart(tmp_path / "bart"), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = {"bitfit.add_biases": "false", "bitfit.task_type": "SEQ_2_SEQ_LM", "training.learning_rate": 5e-2}
    done = run_in_process(bitfit, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.3
    pair = {**INPUTS, "decoder_input_ids": INPUTS["input_ids"][:, :7]}
    with torch.no_grad():
        ours = load_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), done.folder / "adapter")(**pair).logits
        plain = AutoModelForSeq2SeqLM.from_pretrained(done.folder / "model").eval()(**pair).logits
    assert torch.allclose(ours, plain, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_model_without_biases_is_told_how_to_get_some() -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no biases to learn; bitfit.add_biases: true gives it"):
        bitfit.biases_of(make_model(make_tokenizer()))


def test_a_model_whose_class_knows_no_biases_is_refused() -> None:
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(UserError, match="T5Config has no switch for any"):
        bitfit.biases_of(t5)
    with pytest.raises(UserError, match="no linear layer that could be given a bias"):
        bitfit.put_in(t5, {"add_biases": True})
    with pytest.raises(UserError, match="T5ForSequenceClassification has no biases to learn"):  # but for its head's
        bitfit.biases_of(T5ForSequenceClassification(t5.config))


def test_a_subset_that_is_not_there_alone_is_refused(tmp_path: Path) -> None:
    gpt2 = AutoModelForCausalLM.from_pretrained(checks.save_gpt2(tmp_path))
    assert len(bitfit.biases_of(gpt2)) == 2 * 6 + 1
    with pytest.raises(UserError, match="has no bias of the queries alone"):
        bitfit.biases_of(gpt2, "query_and_mlp")
    sizes = {**checks.SIZES, "num_key_value_heads": 2, "vocab_size": 30}
    with pytest.raises(UserError, match="no bias of the MLP's first layer alone; subset: all learns the 6"):
        bitfit.biases_of(Qwen2ForCausalLM(Qwen2Config(**sizes)), "query_and_mlp")


BAD: dict[str, tuple[checks.Changes, str]] = {
    "no biases": ({"bitfit.add_biases": "false"}, "bitfit.add_biases: true gives it zero ones"),
    "a fresh model": (
        {"model.name": "null", "model.config": "{model_type: llama}"},
        "bitfit adapts a pretrained model",
    ),
    "an unknown subset": ({"bitfit.subset": "half"}, "bitfit.subset"),
    "biases in 16 bits": ({"model.dtype": "bfloat16"}, "model.dtype: a bias learned in 16 bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    checks.check_refused(bitfit, checks.arguments(chat_model, questions, FEW, changes), told, run_in_process, tmp_path)
