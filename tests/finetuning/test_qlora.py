"""QLoRA as a recipe: the four bits and their bytes, what learns, and a merge that keeps what was learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from recipes.finetuning import lora, qlora

FEW: checks.Changes = {
    "training.learning_rate": 2e-2,
    "lora.r": 8,
    "lora.lora_alpha": 32,
    "lora.target_modules": "[q_proj, v_proj, up_proj, down_proj]",
}
NUMBERS = 2 * 8 * ((32 + 32) + (32 + 16) + (32 + 64) + (64 + 32))
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(qlora, checks.arguments(chat_model, questions, FEW), root, patch)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the constants of the constants to count little."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden_size=256, intermediate_size=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def four_bit(folder: Path, double: bool = True) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    qlora.keep_the_gradient(model)  # evaluated as it is trained, whatever the processor
    return model


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.5
    assert figures["trainable_parameters"] == NUMBERS


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_a_weight_are_those_of_the_formula(wide_model: Path, double: bool, bits: float) -> None:
    weights, size = qlora.measured_bytes(four_bit(wide_model, double))
    assert weights == 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert 8 * size / weights == pytest.approx(bits, abs=2e-3)
    assert size == pytest.approx(qlora.expected_bytes(weights, double), rel=5e-4)


def test_nf4_is_the_nearest_of_16_values_in_each_block(wide_model: Path) -> None:
    """Dequantised by hand: the block's largest weight times the nearest value of the table."""
    import bitsandbytes.functional as bnb

    plain = AutoModelForCausalLM.from_pretrained(wide_model).model.layers[0].mlp.up_proj.weight.detach()
    layer = four_bit(wide_model, double=False).model.layers[0].mlp.up_proj
    values = layer.weight.quant_state.code.float()
    assert len(values) == 16
    assert (values.min(), values.max(), values.abs().min()) == (-1, 1, 0)
    blocks = plain.reshape(-1, qlora.BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = values[((blocks / largest)[..., None] - values).abs().argmin(-1)] * largest
    theirs = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, qlora.BLOCK)
    assert torch.allclose(theirs, nearest, atol=1e-6)


def test_the_four_bits_are_what_they_were_and_only_the_adapter_is_saved(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in kept)
    assert sum(tensor.numel() for tensor in kept.values()) == NUMBERS
    fresh = qlora.four_bit_layers(four_bit(chat_model))
    now = {
        name.replace(".base_layer", ""): layer for name, layer in qlora.four_bit_layers(model.get_base_model()).items()
    }
    assert now.keys() == fresh.keys()
    for name, layer in fresh.items():
        assert torch.equal(now[name].weight.data, layer.weight.data), name


def test_the_merged_model_is_what_was_trained_and_requantising_would_not_be(trained: Any) -> None:
    folder, figures, model = trained
    assert figures["merge_max_logit_difference"] < 1e-4
    assert figures["requantising_error"] > 0.01
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(saved) is LlamaForCausalLM
    assert getattr(saved.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.allclose(saved(**INPUTS).logits, model.eval()(**INPUTS).logits, atol=1e-4)


@pytest.mark.slow
def test_a_model_whose_layers_lie_the_other_way_round_is_merged(
    run_in_process: checks.Run, questions: Path, tmp_path: Path
) -> None:
    """GPT-2's Conv1D is [in, out], its four bits and what is learned [out, in]."""
    changes = {"lora.target_modules": "[c_attn, c_proj]", "training.max_steps": 8}
    line = checks.arguments(checks.save_gpt2(tmp_path / "gpt2"), questions, FEW, changes)
    done = run_in_process(qlora, line, tmp_path)
    assert done.code == 0, done.err
    assert done.figures["merge_max_logit_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"lora.use_dora": "true"}, {"lora.modules_to_save": "[model.norm]"}],
    ids=["DoRA", "a module trained whole"],
)
def test_all_that_learned_is_in_the_merged_model(
    changes: checks.Changes, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    done = run_in_process(
        qlora, checks.arguments(chat_model, questions, FEW, {"training.max_steps": 8}, changes), tmp_path
    )
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"]
    assert done.figures["merge_max_logit_difference"] < 1e-4


def test_a_base_that_was_saved_in_four_bits_is_refused(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """Merging into it would round what was learned away; peft would do it in place."""
    base = tmp_path / "four_bit"
    four_bit(chat_model).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    for recipe in (qlora, lora):
        line = checks.arguments(base, questions, FEW)
        checks.check_refused(recipe, line, "was saved quantised", run_in_process, tmp_path)


def test_the_adapter_goes_back_on_a_four_bit_base(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_reloads(folder, model, four_bit(chat_model), INPUTS, atol=1e-5)


def test_the_error_of_requantising_is_that_of_peft_s_own_merge(trained: Any, chat_model: Path) -> None:
    """peft's merge of the same adapter on a fresh base, matrix by matrix, against W + D."""
    import bitsandbytes.functional as bnb
    from peft import PeftModel

    folder, figures, _ = trained
    exact = load_file(folder / "model" / "model.safetensors")
    base = {
        name: bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in qlora.four_bit_layers(four_bit(chat_model)).items()
    }
    theirs = PeftModel.from_pretrained(four_bit(chat_model), folder / "adapter").merge_and_unload()
    error = learned = 0.0
    for name, layer in qlora.four_bit_layers(theirs).items():
        if name.rsplit(".", 1)[-1] in ("q_proj", "v_proj", "up_proj", "down_proj"):
            wanted = exact[f"{name}.weight"]
            error += (bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state) - wanted).square().sum().item()
            learned += (wanted - base[name]).square().sum().item()
    assert figures["requantising_error"] == pytest.approx((error / learned) ** 0.5, rel=1e-3)


def test_gradients_after_an_evaluation_are_those_before_it(wide_model: Path) -> None:
    """bitsandbytes' kernel for evaluation has none; where the processor has no such kernel, nothing is to be kept."""
    model = four_bit(wide_model)
    table = model.get_input_embeddings().weight  # below every quantised layer

    def gradient() -> torch.Tensor:
        model.train()
        table.grad = None
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        return table.grad.clone()

    before = gradient()
    with torch.no_grad():
        model.eval()(**INPUTS)
    assert before.abs().sum() > 0
    torch.testing.assert_close(gradient(), before)


@pytest.mark.slow
def test_a_paged_optimizer_falls_back_with_a_line(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    paged = {"training.optim": "paged_adamw_32bit", "training.max_steps": 2}
    done = run_in_process(qlora, checks.arguments(chat_model, questions, FEW, paged), tmp_path)
    assert done.code == 0, done.err
    assert "training.optim: adamw_torch_fused (a paged one" in done.out


def test_a_resumed_run_ends_with_the_adapter_of_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(qlora, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(qlora, line, run_in_process, tmp_path)


BAD: dict[str, tuple[checks.Changes, str]] = {
    "a target that is not there": ({"lora.target_modules": "[qproj]"}, "did you mean q_proj"),
    "a rank of 0": ({"lora.r": 0}, "lora.r"),
    "another kind of values": ({"qlora.quantisation": "int4"}, "qlora.quantisation"),
    "a classifier": ({"lora.task_type": "SEQ_CLS"}, "lora.task_type"),
    "tokens that learn alone": ({"lora.trainable_token_indices": "[5]"}, "they are not merged here"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    done = run_in_process(qlora, checks.arguments(chat_model, questions, FEW, changes), tmp_path)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


def test_without_bitsandbytes_it_says_what_is_missing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    done = run_in_process(qlora, checks.arguments(chat_model, questions, FEW), tmp_path)
    assert done.code == 2
    assert "four-bit weights need bitsandbytes" in done.err
