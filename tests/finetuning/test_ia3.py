"""IA3 as a recipe: the vectors and what they multiply, that it starts as it was and merges, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from recipes.common.peft_models import with_adapter
from recipes.finetuning import ia3

LLAMA: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
FEW = {"training.learning_rate": 2e-1}
INNER = r"layer\.\d+\.output\.dense"  # of BERT
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model, which has been merged since."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(ia3, checks.arguments(chat_model, questions, FEW), root, patch)


def adapted_model(**changes: Any) -> Any:
    return with_adapter(make_model(make_tokenizer()), IA3Config(task_type="CAUSAL_LM", **{**LLAMA, **changes}))


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.2


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """l_k 16, l_v 16 (two heads of 8), l_ff 64, in each of 2 layers."""
    _, figures, _ = trained
    assert figures["trainable_parameters"] == 2 * (16 + 16 + 64)
    assert ia3.closed_form(adapted_model()) == (6, 2, 2 * (16 + 16 + 64))


def test_it_starts_as_it_was() -> None:
    with torch.no_grad():
        plain = make_model(make_tokenizer())(**INPUTS).logits
        assert torch.equal(adapted_model()(**INPUTS).logits, plain)


def test_the_equations() -> None:
    """l_k and l_v multiply the keys and values, l_ff what goes into W_down: the same as those rows and columns scaled."""
    adapted, plain = adapted_model().eval(), make_model(make_tokenizer()).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for i, layer in enumerate(adapted.get_base_model().model.layers):
            vectors = [
                part.ia3_l["default"].uniform_(0.5, 1.5)
                for part in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.down_proj)
            ]
            assert [tuple(vector.shape) for vector in vectors] == [(16, 1), (16, 1), (1, 64)]
            theirs = plain.model.layers[i]
            theirs.self_attn.k_proj.weight.copy_(torch.diag(vectors[0][:, 0]) @ theirs.self_attn.k_proj.weight)
            theirs.self_attn.v_proj.weight.copy_(torch.diag(vectors[1][:, 0]) @ theirs.self_attn.v_proj.weight)
            theirs.mlp.down_proj.weight.copy_(theirs.mlp.down_proj.weight @ torch.diag(vectors[2][0]))
        assert torch.allclose(adapted(**INPUTS).logits, plain(**INPUTS).logits, atol=1e-5)


def test_only_the_vectors_get_gradients_and_a_step_changes_the_output() -> None:
    adapted = adapted_model()
    vectors = {name for name, _ in adapted.named_parameters() if ".ia3_l." in name}
    assert len(vectors) == 6
    checks.check_gradients(adapted, {**INPUTS, "labels": INPUTS["input_ids"]}, vectors)
    checks.check_a_step_changes(adapted, INPUTS)


def test_the_adapter_is_small_and_merged_equals_unmerged(trained: Any, chat_model: Path) -> None:
    folder, figures, _ = trained
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * (16 + 16 + 64)
    assert 0 <= figures["merge_max_logit_difference"] < 1e-4
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    checks.check_base_untouched(saved, base, lambda name: "k_proj" in name or "v_proj" in name or "down_proj" in name)
    checks.check_reloads(folder, saved, base, INPUTS, atol=1e-5)
    assert type(saved) is LlamaForCausalLM


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(ia3, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(ia3, line, run_in_process, tmp_path)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


@pytest.mark.slow
def test_it_classifies_with_the_papers_three_vectors_a_layer(run_in_process: checks.Run, tmp_path: Path) -> None:
    """peft's own targets for BERT, `output.dense`, name the attention's output too."""
    base, rows = checks.save_bert(tmp_path / "bert"), checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {
        "ia3.task_type": "SEQ_CLS",
        "ia3.target_modules": rf".*({INNER}|self\.(key|value))",
        "ia3.feedforward_modules": rf".*{INNER}",
        "training.learning_rate": 1e-1,
    }
    done = run_in_process(ia3, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9 > done.figures["baseline_accuracy"]
    assert "6 vectors, 2 of them l_ff" in done.out
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    merged = AutoModelForSequenceClassification.from_pretrained(done.folder / "model")
    checks.check_reloads(done.folder, merged, fresh, INPUTS, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_decoder_writes(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = {
        "ia3.task_type": "SEQ_2_SEQ_LM",
        "ia3.target_modules": "[k, v, wo]",
        "ia3.feedforward_modules": "[wo]",
        "training.learning_rate": 1e-1,
    }
    done = run_in_process(ia3, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[checks.Changes, str]] = {
    "a target that is not there": ({"ia3.target_modules": "[kproj, v_proj, down_proj]"}, "is called kproj"),
    "a feed-forward module that is no target": ({"ia3.feedforward_modules": "[up_proj]"}, "subset of `target_modules`"),
    "a pattern of none of the targets": ({"ia3.feedforward_modules": r".*\.up_proj"}, "none of them is among"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "ia3 adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    checks.check_refused(ia3, checks.arguments(chat_model, questions, FEW, changes), told, run_in_process, tmp_path)
