"""Bottleneck adapters as a recipe: where they stand in which architecture, what they compute, and what is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import make_model, make_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
)

from recipes.common import adaptation, bottleneck
from recipes.common.adapter_files import load_adapter
from recipes.common.bottleneck import Adapter
from recipes.common.errors import UserError
from recipes.finetuning import adapter

KINDS = ("houlsby", "pfeiffer", "parallel")
FEW = {"adapter.kind": "houlsby", "adapter.bottleneck": 8, "training.learning_rate": 3e-2}
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}
PAIR = {**INPUTS, "decoder_input_ids": INPUTS["input_ids"][:, :7].contiguous()}


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(adapter, checks.arguments(chat_model, questions, FEW), root, patch)


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """2 m d + m + d for two adapters in each of 2 layers, d 32 and m 8."""
    _, figures, _ = trained
    assert figures["trainable_parameters"] == 2 * 2 * (2 * 8 * 32 + 8 + 32)


def test_the_base_is_bit_for_bit_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    assert all("_adapter." in name for name in tensors)


def test_the_saved_adapter_gives_the_logits_of_the_trained_model(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_reloads(folder, model, AutoModelForCausalLM.from_pretrained(chat_model), INPUTS)
    assert f'model = load_adapter(base, "{folder}/adapter")' in (folder / "README.md").read_text()


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(adapter, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, kind: str
) -> None:
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS, {"adapter.kind": kind})
    checks.check_checkpointing_and_packing(adapter, line, run_in_process, tmp_path)


@pytest.mark.parametrize("wrong", ["a matrix less", "another width"])
def test_a_file_that_does_not_fit_is_not_loaded(trained: Any, chat_model: Path, tmp_path: Path, wrong: str) -> None:
    folder, _, _ = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    numbers = load_file(file)
    name = next(name for name in numbers if name.endswith("up.weight"))
    whole = numbers.pop(name)
    if wrong == "another width":
        numbers[name] = whole[:, :-1].contiguous()
    save_file(numbers, file)
    told = "its file has no " if wrong == "a matrix less" else r"is \[32, 7\] there, and \[32, 8\] in the model"
    with pytest.raises(UserError, match=told):
        load_adapter(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path / "adapter")


@pytest.mark.slow
def test_a_decoder_that_pads_on_the_left_counts_no_padding(tmp_path: Path) -> None:
    """GPT-2's positions are learned and its classifier does not read them off the mask."""
    base = AutoModelForSequenceClassification.from_pretrained(checks.save_gpt2(tmp_path), num_labels=2).eval()
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    base.config.pad_token_id = tokenizer.pad_token_id
    task: Any = SimpleNamespace(type="SEQ_CLS", base=base, tokenizer=tokenizer, classes=["a", "b"])
    rows = [
        {"text": "short", "text_pair": None, "label": "a"},
        {"text": "a longer one", "text_pair": None, "label": "b"},
    ]
    args: Any = SimpleNamespace(max_length=64)
    with torch.no_grad():
        together, alone = (base(**adaptation.collate(task, some, args)).logits[0] for some in (rows, rows[:1]))
    assert torch.allclose(together, alone, atol=1e-6)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


# ------------------------------------------------------------------------------------- every kind in every architecture


def save_llama(folder: Path) -> Path:
    make_model(make_tokenizer()).save_pretrained(folder)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], Any, int, dict[str, torch.Tensor]]] = {  # and how many layers
    "llama": (save_llama, AutoModelForCausalLM, 2, INPUTS),
    "gpt2": (checks.save_gpt2, AutoModelForCausalLM, 2, INPUTS),
    "bert": (checks.save_bert, AutoModelForSequenceClassification, 2, INPUTS),
    "bart": (checks.save_bart, AutoModelForSeq2SeqLM, 4, PAIR),
    "t5": (checks.save_t5, AutoModelForSeq2SeqLM, 4, PAIR),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of each architecture, in evaluation mode, to be copied."""
    root = tmp_path_factory.mktemp("bases")
    return {name: auto.from_pretrained(save(root / name)).eval() for name, (save, auto, _, _) in MODELS.items()}


def randomise(model: nn.Module) -> None:
    """As after training: the adapters compute something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "_adapter." in name:
            parameter.data.normal_(std=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_it_starts_as_it_was_and_every_adapter_counts(name: str, kind: Any, bases: dict[str, Any]) -> None:
    """Fresh adapters change nothing at all; each of them alone changes the output; only they get gradients."""
    _, _, layers, inputs = MODELS[name]
    model = copy.deepcopy(bases[name])
    with torch.no_grad():
        before = model(**inputs).logits
        count = bottleneck.put_in(model, Adapter(kind=kind, bottleneck=4))
        assert count == layers * (2 if kind == "houlsby" else 1)
        assert torch.equal(model(**inputs).logits, before)
    learned = bottleneck.adapter_names(model)
    assert adaptation.freeze(model, learned) == count * bottleneck.closed_form(32, 4) == count * (2 * 4 * 32 + 4 + 32)
    labels = (
        torch.zeros(4, dtype=torch.long) if name == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
    )
    checks.check_gradients(model, {**inputs, "labels": labels}, learned)
    model.eval()
    for place in {n.removesuffix(".up.bias") for n in learned if n.endswith(".up.bias")}:
        bias = model.get_submodule(place).up.bias.data
        with torch.no_grad():
            bias.copy_(torch.linspace(-1, 1, len(bias)))
            assert (model(**inputs).logits - before).abs().max() > 1e-5, place
            bias.zero_()


def test_the_equations_in_a_llama(bases: dict[str, Any]) -> None:
    """Written out beside the layer's own parts: norm, attention, adapter, residual, norm, feed-forward, adapter, residual."""
    for kind in KINDS:
        model = copy.deepcopy(bases["llama"])
        bottleneck.put_in(model, Adapter(kind=kind, bottleneck=4, scale=2.0))
        randomise(model)
        seen = inner_states(model)
        layer = model.model.layers[0]

        def a(name: str, x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            one = getattr(layer, name)
            return 2.0 * (torch.relu(x @ one.down.weight.T + one.down.bias) @ one.up.weight.T + one.up.bias)

        plain = bases["llama"].model.layers[0]
        h, attention = seen["in"], seen["plain attention"]
        attention = attention + a("attention_adapter", attention) if kind == "houlsby" else attention
        h = h + attention
        x = plain.post_attention_layernorm(h)
        made = plain.mlp(x)
        made = made + (a("feed_forward_adapter", x) if kind == "parallel" else a("feed_forward_adapter", made))
        assert torch.allclose(h + made, seen["out"], atol=1e-5), kind


def inner_states(model: Any) -> dict[str, torch.Tensor]:
    """Of the first layer: its input, its output, and its attention before any adapter."""
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.__setitem__("in", args[0])),
        layer.register_forward_hook(lambda module, args, out: seen.__setitem__("out", out)),
        layer.self_attn.o_proj.register_forward_hook(lambda m, args, out: seen.__setitem__("plain attention", out)),
    ]
    with torch.no_grad():
        model(**INPUTS)
    for handle in handles:
        handle.remove()
    return seen


def test_in_a_bert_they_stand_before_the_residuals_sum_and_its_norm(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["bert"])
    bottleneck.put_in(model, Adapter(kind="houlsby", bottleneck=4))
    randomise(model)
    layer = model.bert.encoder.layer[0]
    hidden = torch.randn(2, 5, 32)
    with torch.no_grad():
        got = layer(hidden)
        got = got[0] if isinstance(got, tuple) else got
        attention = layer.attention.output.dense(layer.attention.self(hidden)[0])
        attention = attention + layer.attention_adapter(attention)
        x = layer.attention.output.LayerNorm(hidden + attention)
        made = layer.output.dense(layer.intermediate(x))
        expected = layer.output.LayerNorm(x + made + layer.feed_forward_adapter(made))
    assert torch.allclose(got, expected, atol=1e-5)


def test_generation_with_the_cache_equals_without(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["llama"])
    bottleneck.put_in(model, Adapter(kind="parallel", bottleneck=4))
    randomise(model)
    ids = INPUTS["input_ids"][:, :9]
    told = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*told)


def test_a_copy_of_the_model_has_adapters_of_its_own(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["llama"])
    bottleneck.put_in(model, Adapter(bottleneck=4))
    other = copy.deepcopy(model)
    randomise(other)
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, bases["llama"](**INPUTS).logits)
        assert not torch.allclose(other(**INPUTS).logits, model(**INPUTS).logits, atol=1e-2)


def test_only_the_chosen_layers_have_adapters(bases: dict[str, Any]) -> None:
    for name, where in (("llama", ["model.layers.1"]), ("t5", ["encoder.block.1", "decoder.block.1"])):
        model = copy.deepcopy(bases[name])
        assert bottleneck.put_in(model, Adapter(bottleneck=4, layers=[1])) == len(where)
        assert {n.split(".feed_forward_adapter")[0] for n in bottleneck.adapter_names(model)} == set(where)


def test_a_base_in_16_bits_has_adapters_in_32(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["llama"]).to(torch.bfloat16)
    bottleneck.put_in(model, Adapter(bottleneck=4))
    randomise(model)
    assert {model.get_parameter(name).dtype for name in bottleneck.adapter_names(model)} == {torch.float32}
    with torch.no_grad():
        assert model(**INPUTS).logits.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- task types


@pytest.mark.slow
def test_it_classifies(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_bert(tmp_path / "bert"), checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"adapter.task_type": "SEQ_CLS", "training.learning_rate": 1e-2}
    done = run_in_process(adapter, checks.arguments(base, rows, FEW, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9 > done.figures["baseline_accuracy"]
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert {name for name in tensors if "_adapter." not in name} == checks.BERT_HEAD
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    loaded = load_adapter(fresh, done.folder / "adapter")
    ids = make_tokenizer()(["red 1", "blue 2"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert loaded(**ids).logits.argmax(-1).tolist() == [1, 0]  # classes in order: cold, warm


@pytest.mark.slow
def test_an_encoder_decoder_writes(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = {"adapter.task_type": "SEQ_2_SEQ_LM"}
    done = run_in_process(adapter, checks.arguments(base, rows, FEW, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.5


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_architecture_that_is_not_known_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "vocab_size": 30}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(UserError, match="the layers of GPTNeoForCausalLM is not known; known are Llama"):
        bottleneck.put_in(model, Adapter())


BAD: dict[str, tuple[checks.Changes, str]] = {
    "a bottleneck of 0": ({"adapter.bottleneck": 0}, "adapter.bottleneck"),
    "a reduction that leaves nothing": (
        {"adapter.bottleneck": "null", "adapter.reduction": 64},
        "adapter.reduction: 64 leaves no number in the middle: the model's width is 32",
    ),
    "a layer that is not there": ({"adapter.layers": "[0, 2]"}, "there are the layers 0 to 1"),
    "no layer": ({"adapter.layers": "[]"}, "there are the layers 0 to 1"),
    "an unknown kind": ({"adapter.kind": "pfeifer"}, "pfeiffer"),
    "a fresh model": (
        {"model.name": "null", "model.config": "{model_type: llama}"},
        "adapter adapts a pretrained model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    checks.check_refused(adapter, checks.arguments(chat_model, questions, FEW, changes), told, run_in_process, tmp_path)


def test_in_a_t5_houlsbys_attention_adapter_stands_after_the_self_attention(tmp_path: Path) -> None:
    """And not after the cross-attention of a decoder's layer; the other one after the feed-forward."""
    model = AutoModelForSeq2SeqLM.from_pretrained(checks.save_t5(tmp_path)).eval()
    plain = copy.deepcopy(model)
    bottleneck.put_in(model, Adapter(kind="houlsby", bottleneck=4))
    torch.manual_seed(0)
    x = torch.randn(1, 5, 32)
    for side in ("encoder", "decoder"):
        block, own = getattr(model, side).block[0], getattr(plain, side).block[0]
        for one in (block.attention_adapter, block.feed_forward_adapter):
            nn.init.normal_(one.up.weight)
        with torch.no_grad():
            h = own.layer[0].SelfAttention(x)[0]
            assert torch.allclose(block.layer[0].SelfAttention(x)[0], h + block.attention_adapter(h), atol=1e-5)
            h = own.layer[-1].DenseReluDense(x)
            assert torch.allclose(block.layer[-1].DenseReluDense(x), h + block.feed_forward_adapter(h), atol=1e-5)
