"""Figures of held-out rows: means over labels, shared words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recipes.common.held_out import mean_loss, word_overlap


def test_the_mean_over_batches_of_different_numbers_of_labels_is_over_the_labels() -> None:
    class Told(torch.nn.Module):
        def forward(self, labels: torch.Tensor, loss: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=loss)

    batches = [
        {"labels": torch.tensor([[1, 2, 3]]), "loss": torch.tensor(1.0)},
        {"labels": torch.tensor([[-100, -100, 4]]), "loss": torch.tensor(5.0)},
    ]
    args: object = SimpleNamespace(device=torch.device("cpu"), bf16=False)
    assert mean_loss(Told(), batches, args) == pytest.approx((3 * 1 + 1 * 5) / 4)  # type: ignore[arg-type]


def test_word_overlap_by_hand() -> None:
    """F1: 2 of 2 written and 2 of 4 wanted are 2 2 / (2 + 4); a word written thrice counts once where it is wanted once."""
    assert word_overlap(["The cat"], ["the cat sat down"]) == pytest.approx(4 / 6)
    assert word_overlap(["a a a", "x"], ["a b c", "y"]) == pytest.approx((2 / 6 + 0) / 2)
    assert word_overlap([""], [""]) == 0
