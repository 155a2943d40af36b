"""Objectives that corrupt a text anew each time it is seen, so that a stopped run resumes to the very same corruptions.

Every training sample has a number, and its randomness comes from that number alone: `generator(seed, row["draw"])`. Which
process, worker or resumed run makes it does not matter. Beside that, the two losses that a trained one is held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments


class Numbered(TorchDataset):  # type: ignore[type-arg]
    """`draws` items from a map-style data set, again and again from its start, each with its number as "draw"."""

    def __init__(self, rows: Any, draws: int):
        self.rows, self.draws = rows, draws

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i % len(self.rows)], "draw": i}


def numbered(rows: Any, args: TrainingArguments) -> Any:
    """Rows with a "draw" each, as many as args.max_steps (or else num_train_epochs) will take; a stream is numbered as it comes."""
    args.remove_unused_columns = False  # the collator wants the number, which is no argument of the model
    if not hasattr(rows, "__len__"):
        return rows.map(lambda row, i: {**row, "draw": i}, with_indices=True)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps > 0:
        return Numbered(rows, args.max_steps * a_step)
    draws = math.ceil(len(rows) * args.num_train_epochs)
    args.num_train_epochs = 1  # they are in the numbers now
    return Numbered(rows, draws)


def generator(seed: int, draw: int) -> np.random.Generator:
    """The randomness of one draw."""
    return np.random.default_rng([seed, draw])


def mean_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], args: TrainingArguments) -> float:
    """Mean over the label positions of all batches, of a model that gives a batch's own mean as `.loss`."""
    import torch

    total, targets = 0.0, 0
    model.to(args.device).eval()
    with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for batch in batches:
            n = int((batch["labels"] != -100).sum())
            loss = model(**{name: value.to(args.device) for name, value in batch.items()}).loss
            total, targets = total + loss.item() * n, targets + n
    model.train()
    return total / targets


def unigram_loss(seen: Iterable[Tensor], held_out: Iterable[Tensor], vocabulary: int) -> float:
    """Cross-entropy of the held-out labels under the add-one frequencies of the seen ones; -100 is left out."""

    def counts(labels: Iterable[Tensor]) -> np.ndarray:
        found = np.zeros(vocabulary)
        for some in labels:
            found += np.bincount(some[some != -100].numpy(), minlength=vocabulary)
        return found

    probabilities = counts(seen) + 1
    probabilities /= probabilities.sum()
    target = counts(held_out)
    return float(-(target * np.log(probabilities)).sum() / target.sum())


def word_overlap(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F1 of the words that a written text shares with the wanted one (ROUGE-1 without stemming), 0 to 1."""
    from collections import Counter

    total = 0.0
    for ours, theirs in zip(written, wanted, strict=True):
        a, b = Counter(ours.lower().split()), Counter(theirs.lower().split())
        shared = (a & b).total()
        total += 2 * shared / max(a.total() + b.total(), 1)
    return total / len(wanted)
