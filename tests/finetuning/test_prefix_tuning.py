"""Prefix tuning as a recipe: the attention that it is, padding and caches, both sides of an encoder-decoder, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import prompt_checks
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from recipes.common import adaptation, prefixes, prompt_encoder
from recipes.common.length_groups import group_by_length
from recipes.finetuning import prefix_tuning

FEW: checks.Changes = {
    "training.learning_rate": 5e-2,
    "training.train_sampling_strategy": "group_by_length",
    "prefix_tuning.num_virtual_tokens": 5,
    "prefix_tuning.encoder_hidden_size": 16,
}
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}
MODELS = {"t5": checks.save_t5, "bart": checks.save_bart, "gpt2": checks.save_gpt2}


def with_prefix(model: Any, **changes: Any) -> Any:
    prefixes.put_in(model, PrefixTuningConfig(num_virtual_tokens=5, **changes))
    adaptation.freeze(model, prompt_encoder.learned_names(model))
    for place in prompt_encoder.PLACES:
        if hasattr(model, place):
            prompt_checks.spread(model, place)
    return model


def llama(**changes: Any) -> Any:
    return with_prefix(make_model(make_tokenizer()), **changes)


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(prefix_tuning, checks.arguments(chat_model, questions, FEW), root, patch)


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 5 * 2 * 2 * 16),  # 2 heads of 8 in each of 2 layers
        ({"prefix_projection": True}, 5 * 16 + (16 * 16 + 16) + (16 * 64 + 64)),
        ({"prefix_projection": True, "encoder_hidden_size": 7}, 5 * 16 + (16 * 7 + 7) + (7 * 64 + 64)),
    ],
)
def test_what_learns_is_the_closed_form(changes: dict[str, Any], expected: int) -> None:
    model = llama(**changes)
    settings = PrefixTuningConfig(num_virtual_tokens=5, **changes)
    assert prefixes.closed_form(settings, prefixes.shapes_of(model)) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_recipe_keeps_the_keys_and_values_alone(trained: Any) -> None:
    folder, figures, _ = trained
    assert figures["trainable_parameters"] == 5 * 16 + (16 * 16 + 16) + (16 * 64 + 64)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt.numbers": (5, 2 * 2 * 16)}


def test_the_equation() -> None:
    """softmax(q [P_K ; K]^T / sqrt(d)) [P_V ; V] in layer 0, from the layer's own projections."""
    model = llama().eval()
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    with torch.no_grad():
        model(**INPUTS)
        x, numbers = seen["x"], model.prompt().view(5, 2, 2, 2, 8)  # [tokens, layers, key or value, heads, d]
        q, k, v = (getattr(attention, f"{name}_proj")(x).view(4, 50, -1, 8).transpose(1, 2) for name in "qkv")
        cos, sin = model.model.rotary_emb(x, torch.arange(5, 55)[None])  # a row counts on from the prefix

        def turn(t: torch.Tensor) -> torch.Tensor:
            return t * cos[:, None] + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin[:, None]

        q, k = turn(q), turn(k)
        before_k, before_v = (numbers[:, 0, i].transpose(0, 1)[None].expand(4, -1, -1, -1) for i in (0, 1))
        keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((before_k, k), (before_v, v)))
        hidden = torch.ones(50, 55).triu(6).bool()  # the five of the prefix are seen by all
        scores = (q @ keys.transpose(2, 3) / math.sqrt(8)).masked_fill(hidden, -math.inf)
        expected = (scores.softmax(-1) @ values).transpose(1, 2).reshape(4, 50, 32)
    assert torch.allclose(seen["out"], expected, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_only_the_prefix_gets_gradients_and_a_step_changes_the_output(projection: bool) -> None:
    model = llama(prefix_projection=projection)
    base = copy.deepcopy({name: p for name, p in model.named_parameters() if "prompt" not in name})
    batch = {**INPUTS, "labels": INPUTS["input_ids"]}
    checks.check_gradients(model, batch, {name for name, _ in model.named_parameters() if "prompt" in name})
    checks.check_a_step_changes(model, INPUTS)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_learns_stays_float32_over_a_base_in_bf16(autocast: bool) -> None:
    model = with_prefix(make_model(make_tokenizer()).bfloat16(), prefix_projection=True)
    ids = INPUTS["input_ids"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids, labels=ids).loss.backward()
        assert model.eval().generate(ids, max_new_tokens=2, pad_token_id=0).shape == (4, 52)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_the_cache_of_a_decoder(attention: str) -> None:
    model = with_prefix(make_model(make_tokenizer(), attn_implementation=attention))
    prompt_checks.check_padding(model)
    prompt_checks.check_generation(model)


def test_padding_and_the_cache_of_a_decoder_with_learned_positions(tmp_path: Path) -> None:
    model = with_prefix(AutoModelForCausalLM.from_pretrained(checks.save_gpt2(tmp_path)))
    prompt_checks.check_padding(model)
    prompt_checks.check_generation(model)


def test_an_encoder_that_numbers_its_tokens_from_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa: what it makes of a mask of ones is what it makes of none, which is its own numbering."""
    torch.manual_seed(0)
    model = with_prefix(
        RobertaModel(RobertaConfig(vocab_size=300, **checks.SIZES, pad_token_id=1, is_decoder=True))
    ).eval()
    ids = torch.tensor([prompt_checks.ROWS[0]])
    with torch.no_grad():
        told = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(told, model(input_ids=ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_sides_of_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    """Each side's prefix moves what that side makes; the cache, padding and company of other rows do not."""
    model = with_prefix(AutoModelForSeq2SeqLM.from_pretrained(MODELS[name](tmp_path))).eval()
    shapes = prefixes.shapes_of(model)
    assert shapes == [prefixes.Shape(2, 4, 8), prefixes.Shape(2, 4, 8)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (5 * 2 * 2 * 32)
    batch = {**prompt_checks.batch_of(prompt_checks.ROWS, left=False), "labels": torch.tensor([[5, 6, 7], [8, 9, 1]])}
    checks.check_gradients(model, batch, {"prompt.encoder.embedding.weight", "encoder_prompt.encoder.embedding.weight"})
    prompt_checks.check_written(model.eval())
    sides = {"prompt": "decoder_hidden_states", "encoder_prompt": "encoder_hidden_states"}
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True)
        for place, side in sides.items():
            kept = copy.deepcopy(getattr(model, place).state_dict())
            prompt_checks.spread(model, place, scale=2.0)
            after = model(**batch, output_hidden_states=True)
            assert (after[side][-1] - before[side][-1]).abs().max() > 1e-2
            if place == "prompt":
                assert torch.equal(after.encoder_last_hidden_state, before.encoder_last_hidden_state)
            getattr(model, place).load_state_dict(kept)


def test_what_is_measured_has_the_prefix_in_it(trained: Any) -> None:
    """The held-out loss of metrics.json is the adapted model's."""
    _, figures, model = trained
    ids = make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Is it 3?"}, {"role": "assistant", "content": "yes"}], return_dict=True
    )["input_ids"]
    labels = torch.tensor([[-100] * (len(ids) - 4) + ids[-4:]])
    batch = {"input_ids": torch.tensor([ids])}
    with torch.no_grad():
        adapted = torch.nn.functional.cross_entropy(model.eval()(**batch).logits[0, :-1], labels[0, 1:])
    assert abs(adapted.item() - figures["eval_loss"]) < 0.05


def test_the_lines_of_its_card_load_it(trained: Any) -> None:
    folder, _, model = trained
    checks.check_card(folder, model, INPUTS)


def test_the_adapter_reloads_on_a_base_that_is_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    loaded = checks.check_reloads(folder, model, AutoModelForCausalLM.from_pretrained(chat_model), INPUTS)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {"prompt.numbers"}


def test_peft_reads_it_too(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    theirs = PeftModel.from_pretrained(base, folder / "adapter" / "peft").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**INPUTS).logits, model.eval()(**INPUTS).logits, atol=1e-5)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    """With the MLP: peft's own checkpoints hold its output alone, and cannot be resumed from."""
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(prefix_tuning, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_learns(name: str, run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = MODELS[name](tmp_path / name), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = {"prefix_tuning.task_type": "SEQ_2_SEQ_LM"}
    done = run_in_process(prefix_tuning, checks.arguments(base, rows, FEW, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt.numbers", "encoder_prompt.numbers"}


def test_rows_of_like_length_share_a_batch_in_an_order_that_says_nothing_of_length() -> None:
    arguments: Any = SimpleNamespace(seed=3, train_batch_size=8, gradient_accumulation_steps=1)
    lengths = torch.randint(1, 200, (1605,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(epoch: int) -> list[int]:
        trainer: Any = SimpleNamespace(args=arguments)
        group_by_length(trainer, lengths)
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0)
    assert sorted(first) == list(range(1605))
    assert first == order(0) != order(1), "a resumed run must find it again"
    assert lengths[first[0]] == max(lengths)
    batches = [[lengths[i] for i in first[n : n + 8]] for n in range(0, 1600, 8)]
    means = torch.tensor([sum(batch) / 8 for batch in batches])
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 10
    assert abs(torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]) < 0.3


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[checks.Changes, str]] = {
    "packing": ({"training.packing": "true"}, "a prefix stands before a row, not before each conversation in it"),
    "checkpointing": ({"training.gradient_checkpointing": "true"}, "the prefix is a cache"),
    "longer than the context": ({"prefix_tuning.num_virtual_tokens": 256}, "is longer than the context"),
    "no room for a row": (
        {"prefix_tuning.num_virtual_tokens": 200, "training.max_length": 64},
        "but the model has 56 positions",
    ),
    "no tokens": ({"prefix_tuning.num_virtual_tokens": 0}, "prefix_tuning.num_virtual_tokens"),
    "what follows from the model": ({"prefix_tuning.num_layers": 3}, "prefix_tuning.num_layers follows from the model"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    line = checks.arguments(chat_model, questions, FEW, changes)
    checks.check_refused(prefix_tuning, line, told, run_in_process, tmp_path)
