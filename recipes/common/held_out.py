"""What a pretrained model is held against: its loss on held-out text, the unigrams that see no context, words written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from recipes.common.chat import encode_plain
from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


def held_out_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[list[int]], float]:
    """The texts in blocks of `length` tokens, each text ended by the eos token, and how many tokens a character has.

    Raises UserError if there is no whole block.
    """
    ids = [token for text in encode_plain(tokenizer, texts) for token in (*text, tokenizer.eos_token_id)]
    blocks = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise UserError(
            f"the held-out text is {len(ids)} tokens long, shorter than one block of {length}: raise "
            "data.validation_fraction, give more text, or a smaller block length"
        )
    return blocks, len(ids) / sum(map(len, texts))


def loss_by_position(model: PreTrainedModel, blocks: list[list[int]], bf16: bool, batch_size: int = 16) -> np.ndarray:
    """Mean next-token loss at each place of the blocks, nats: (block_length - 1,)."""
    ids = torch.tensor(blocks)  # (blocks, block_length)
    total = torch.zeros(ids.shape[1] - 1, dtype=torch.float64)
    device = model.device
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for rows in ids.split(batch_size):
            batch = rows.to(device)
            logits = model(input_ids=batch[:, :-1]).logits  # (batch, seq, vocabulary)
            loss = F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")
            total += loss.sum(dim=0).double().cpu()
    model.train()
    return (total / len(ids)).numpy()


def draw_by_position(axes: Any, losses: np.ndarray) -> None:
    """The loss against how many tokens came before, mean over neighbouring places on a log scale."""
    edges = np.unique(np.geomspace(1, len(losses) + 1, 24).astype(int))
    means = [losses[a - 1 : b - 1].mean() for a, b in pairwise(edges)]
    axes.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, "o-", markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel("tokens seen before")
    axes.set_ylabel("held-out loss, nats a token")


def mean_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], args: TrainingArguments) -> float:
    """Mean over the label positions of all batches, of a model that gives a batch's own mean as `.loss`."""
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
    total = 0.0
    for ours, theirs in zip(written, wanted, strict=True):
        a, b = Counter(ours.lower().split()), Counter(theirs.lower().split())
        shared = (a & b).total()
        total += 2 * shared / max(a.total() + b.total(), 1)
    return total / len(wanted)
