"""The loss on a processor is TRL's own, and the held-out figures are what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_chat import conversation, make_model
from torch.nn import functional as F

from recipes.common import sft
from recipes.common.sections import Evaluation
from recipes.common.sft_packing import IGNORED, PackedRows, prepare

Arguments = Callable[..., Any]
ROWS = [conversation(f"q{n}" * (1 + n % 5), "a" * (1 + n % 9)) for n in range(30)]


def trainer_of(model: Any, tokenizer: Any, args: Any, run: Any, **options: Any) -> Any:
    data = DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:7])})
    return sft.make_trainer(model, tokenizer, prepare(data, tokenizer, model, args, run), args, **options)


def loss_and_gradient(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor, dict[str, Any]]:
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(50))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), metrics


def test_scoring_only_the_answers_gives_trls_loss_gradient_and_metrics(
    tokenizer: Any, model: Any, arguments: Arguments, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer_of(model, tokenizer, arguments(), run)
    monkeypatch.setattr(sft, "score_only_answers", lambda trainer: None)
    theirs = trainer_of(make_model(tokenizer), tokenizer, arguments(), run)
    batch = next(iter(ours.get_train_dataloader()))
    loss, gradient, metrics = loss_and_gradient(ours, batch)
    expected_loss, expected_gradient, expected_metrics = loss_and_gradient(theirs, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(metrics)


def test_models_that_cap_their_logits_keep_trls_way(tokenizer: Any, model: Any, arguments: Arguments, run: Any) -> None:
    trainer = trainer_of(model, tokenizer, arguments(), run)
    assert trainer.model.forward.__func__.__module__ == sft.__name__
    model = make_model(tokenizer)
    model.config.final_logit_softcapping = 30.0
    trainer = trainer_of(model, tokenizer, arguments(), run)
    assert trainer.model.forward.__func__.__module__ != sft.__name__


def test_generation_after_training_uses_the_logits(tokenizer: Any, model: Any, arguments: Arguments, run: Any) -> None:
    """The patched forward pass must be the model's own for everybody but the trainer."""
    ids = torch.tensor([[10, 11, 12]])
    expected = model(input_ids=ids).logits
    trainer = trainer_of(model, tokenizer, arguments(), run)
    assert torch.equal(trainer.model(input_ids=ids).logits, expected)
    labelled = trainer.model(input_ids=ids, labels=ids)
    assert torch.isclose(labelled.loss, F.cross_entropy(expected[0, :-1], ids[0, 1:]), atol=1e-6)


def test_flash_attention_gets_trls_single_row(tokenizer: Any, model: Any, arguments: Arguments, run: Any) -> None:
    """FlashAttention takes documents apart in a batch of one row only."""
    model.config._attn_implementation = "flash_attention_2"
    trainer = trainer_of(model, tokenizer, arguments(), run)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    model.config._attn_implementation = "sdpa"
    assert isinstance(trainer_of(model, tokenizer, arguments(), run).data_collator, PackedRows)


@pytest.mark.parametrize("packing", [True, False])
def test_the_held_out_loss_is_the_mean_over_the_learned_tokens(
    tokenizer: Any, model: Any, arguments: Arguments, run: Any, packing: bool
) -> None:
    trainer = trainer_of(model, tokenizer, arguments(packing=packing, per_device_eval_batch_size=2), run)
    total, count = 0.0, 0
    for row in ROWS[:7]:
        text = f"<|user|>{row['messages'][0]['content']}<|end|><|assistant|>"
        answer = f"{row['messages'][1]['content']}<|end|>"
        prompt, learned = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + learned])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(learned), reduction="sum").item()
        count += len(learned)
    assert sft.held_out_loss(trainer) == pytest.approx(total / count, abs=1e-4)


def test_measuring_reports_the_rows_that_can_be_checked_and_shows_the_others(
    tokenizer: Any, model: Any, arguments: Arguments, run: Any
) -> None:
    trainer = trainer_of(model, tokenizer, arguments(), run)
    checkable = [{**row, "task": "echo", "language": "en", "answer": "a"} for row in ROWS[:5]]
    found = sft.measure(
        trainer, tokenizer, [*checkable, *ROWS[5:20]], Evaluation(max_samples=4, max_new_tokens=3), run, "before"
    )
    assert set(found.figures) == {"exact_match", "sampled_exact_match", "exact_match_echo"}
    assert [answer.get("task") for answer in found.answers] == ["echo"] * 4 + [None] * sft.SHOWN
    assert "before: held-out loss" in run.said
    assert sft.measure(trainer, tokenizer, ROWS, Evaluation(max_new_tokens=3), run, "before").figures == {}


def test_the_figures_do_not_count_products_that_are_saved(
    tokenizer: Any, model: Any, arguments: Arguments, run: Any
) -> None:
    run.dry = False
    trainer = trainer_of(model, tokenizer, arguments(), run)
    batch = sft.announce(trainer, run)
    from recipes.common.preflight import flops_per_token

    head = model.lm_head.weight.numel()
    saved = (batch["labels"] == IGNORED).float().mean().item()
    assert run.figures["flops_per_token"] == pytest.approx(flops_per_token(model, 64) - 6 * head * saved)


def test_answers_side_by_side_are_one_line_each() -> None:
    before = sft.Measured(1.0, {}, [{"prompt": "p|q", "expected": "e\nf", "greedy": "<|user|>"}])
    after = sft.Measured(1.0, {}, [{"prompt": "p|q", "expected": "e\nf", "greedy": "x" * 500}])
    lines = sft.side_by_side(before, after).splitlines()
    assert len(lines) == 3
    assert "p\\|q" in lines[2]
    assert "&lt;\\|user\\|>" in lines[2]
    assert len(lines[2]) < 350
