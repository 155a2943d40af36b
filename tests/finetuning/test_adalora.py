"""AdaLoRA as a recipe: that ranks really change and meet the budget, which triplets go, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import pytest
import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from recipes.common import sharding
from recipes.common.peft_models import with_adapter
from recipes.finetuning import adalora, lora

FEW: checks.Changes = {
    "training.learning_rate": 2e-2,
    "adalora.target_modules": "[q_proj, v_proj, down_proj]",
    "adalora.init_r": 6,
    "adalora.target_r": 2,
    "adalora.tinit": 5,
    "adalora.tfinal": 10,
    "adalora.lora_alpha": 16,
}
NUMBERS = 2 * 6 * ((32 + 32 + 1) + (32 + 16 + 1) + (64 + 32 + 1))  # r (in + out + 1) of q, v and down, in 2 layers
INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model, which has been merged since."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(adalora, checks.arguments(chat_model, questions, FEW), root, patch)


def adapted_model(**changes: Any) -> Any:
    settings = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "total_step": 10, "target_modules": ["q_proj"]}
    return with_adapter(make_model(make_tokenizer()), AdaLoraConfig(task_type="CAUSAL_LM", **{**settings, **changes}))


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3


def test_ranks_change_and_the_budget_is_met_at_the_end(trained: Any) -> None:
    folder, figures, _ = trained
    assert figures["rank_before"] == 6 * 6
    assert figures["rank_after"] == figures["rank_budget"] == 2 * 6
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    ranks = [tensor.shape[0] for name, tensor in kept.items() if name.endswith("lora_E")]
    assert sum(ranks) == 12
    assert len(set(ranks)) > 1, "every matrix kept the same rank: nothing was allocated"
    assert (folder / "plots" / "rank_by_layer.png").exists()


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    _, figures, _ = trained
    assert figures["trainable_parameters"] == NUMBERS
    assert adalora.closed_form(adapted_model()) == 2 * 4 * (32 + 32 + 1)


def test_the_budget_falls_along_a_cubic() -> None:
    """Eq. (12): r_0 until tinit, then target + (r_0 - target) (1 - (t - tinit) / (T - tinit - tfinal))^3, then the target."""
    allocator = adapted_model(tinit=10, tfinal=20, total_step=100).base_model.rankallocator
    budgets = [allocator.budget_schedule(step)[0] for step in (0, 10, 45, 80, 100)]
    assert budgets == [8, 8, int(2 + 6 * 0.5**3), 2, 2]


def test_the_triplets_that_matter_least_are_the_ones_that_go() -> None:
    """Gradients by hand: of each matrix's four triplets, all but the second of layer 0 and the third of layer 1 are idle."""
    model = adapted_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
            index = 1 if "layers.0" in name else 2
            if ".lora_E." in name:
                parameter.grad[index] = 1.0
    for step in range(1, 10):
        model.base_model.update_and_allocate(step)
    singular = {name: p.flatten().tolist() for name, p in model.named_parameters() if ".lora_E." in name}
    assert [values for name, values in sorted(singular.items())] == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_only_the_triplets_get_gradients_and_it_starts_as_it_was() -> None:
    adapted, plain = adapted_model(), make_model(make_tokenizer())
    with torch.no_grad():
        assert torch.equal(adapted(**INPUTS).logits, plain(**INPUTS).logits)
    triplets = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    checks.check_gradients(adapted, {**INPUTS, "labels": INPUTS["input_ids"]}, triplets)


def test_the_loss_has_the_orthogonal_term() -> None:
    """Eq. (4): what the loss gains is the mean, over P and Q of all matrices, of |P^T P - I| in Frobenius' norm."""
    batch = {**INPUTS, "labels": INPUTS["input_ids"]}
    with torch.no_grad():
        with_term, without = (adapted_model(orth_reg_weight=weight) for weight in (0.5, 0.0))
        without.load_state_dict(with_term.state_dict())
        distances = [
            (p @ p.T - torch.eye(4) if ".lora_A." in name else p.T @ p - torch.eye(4)).norm()
            for name, p in with_term.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        gained = with_term(**batch).loss - without(**batch).loss
    assert gained.item() == pytest.approx(0.5 * (sum(distances) / len(distances)).item(), rel=1e-5)


@pytest.mark.slow
def test_the_trainer_s_loss_has_that_term_too(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """TRL makes its loss of log-probabilities and would leave it out: P and Q would be what they are without."""
    rest, few = {}, {**FEW, **checks.FOUR_STEPS, "adalora.tinit": 1, "adalora.tfinal": 1}
    for weight in (0.0, 1.0):
        line = checks.arguments(chat_model, questions, few, {"adalora.orth_reg_weight": weight})
        done = run_in_process(adalora, [*line, "--run.name", str(weight)], tmp_path)
        assert done.code == 0, done.err
        saved = load_file(done.folder / "adapter" / "adapter_model.safetensors")
        lengths = [p.norm(dim=1 if "lora_A" in name else 0) for name, p in saved.items() if name.endswith(("_A", "_B"))]
        rest[weight] = (
            (torch.cat(lengths) - 1).abs().mean().item()
        )  # triplets of unit length, where P and Q are orthogonal
    assert rest[1.0] < 0.8 * rest[0.0]


def test_its_term_is_one_a_step_however_many_micro_batches() -> None:
    model = adapted_model().train()
    trainer: Any = SimpleNamespace(compute_loss=lambda *_: torch.tensor(2.0), current_gradient_accumulation_steps=4)
    adalora.keep_orthogonal(trainer, model, 0.5)
    term = 0.5 * adalora.unorthogonal(model).item()
    assert trainer.compute_loss(model, {}, num_items_in_batch=80).item() == pytest.approx(2 + term / 4)
    assert trainer.compute_loss(model, {}).item() == pytest.approx(2 + term)
    assert trainer.compute_loss(model.eval(), {}).item() == 2


@pytest.mark.slow
def test_an_encoder_decoder_s_held_out_loss_is_without_that_term(run_in_process: checks.Run, tmp_path: Path) -> None:
    """It starts as the base: its loss is the base's own, which LoRA measures too."""
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    targets = {"adalora": "[q, v, wo]", "lora": "[q, v, wo]"}
    found = {}
    for recipe, own in ((adalora, FEW), (lora, {"lora.r": 4, "lora.lora_alpha": 8})):
        name = recipe.__name__.rsplit(".", 1)[-1]
        changes = {f"{name}.task_type": "SEQ_2_SEQ_LM", f"{name}.target_modules": targets[name]}
        done = run_in_process(recipe, checks.arguments(base, rows, own, changes), tmp_path)
        assert done.code == 0, done.err
        assert done.figures["eval_loss"] < done.figures["baseline_loss"]
        found[name] = done.figures["baseline_loss"]
    assert found["adalora"] == found["lora"]


def test_merged_equals_unmerged_and_the_rest_is_untouched(trained: Any, chat_model: Path) -> None:
    folder, figures, _ = trained
    assert 0 <= figures["merge_max_logit_difference"] < 1e-4
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    checks.check_base_untouched(saved, base, lambda name: any(t in name for t in ("q_proj", "v_proj", "down_proj")))
    checks.check_reloads(folder, saved, base, INPUTS, atol=1e-4)
    assert type(saved) is LlamaForCausalLM


def test_a_resumed_run_prunes_what_an_uninterrupted_one_prunes(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(adalora, line, run_in_process, tmp_path, trained[0], monkeypatch)


BAD: dict[str, tuple[checks.Changes, str]] = {
    "no steps to prune in": ({"adalora.tinit": 35, "adalora.tfinal": 10}, "leave none of the"),
    "a target above the start": ({"adalora.target_r": 6}, "nothing would be pruned"),
    "another number of steps": ({"adalora.total_step": 77}, "leave it out"),
    "a rank above the layer": (
        {"adalora.init_r": 500, "adalora.target_modules": "all-linear"},
        "adalora.init_r: 500 is above what",
    ),
    "a target that is not there": ({"adalora.target_modules": "[qproj]"}, "did you mean q_proj"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    done = run_in_process(adalora, checks.arguments(chat_model, questions, FEW, changes), tmp_path)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


def test_deepspeed_is_refused_for_it_keeps_the_gradients(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "launched_with", lambda: "DeepSpeed")
    done = run_in_process(adalora, checks.arguments(chat_model, questions, FEW), tmp_path)
    assert done.code == 2 and "launch with ddp, or single" in done.err


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """The importance of a triplet is taken from gradients, which are the same."""
    few = {**FEW, **checks.FOUR_STEPS, "adalora.tinit": 1, "adalora.tfinal": 1}
    checks.check_checkpointing_and_packing(
        adalora, checks.arguments(chat_model, questions, few), run_in_process, tmp_path
    )
