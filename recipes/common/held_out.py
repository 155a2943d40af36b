"""Held-out loss of a causal language model on packed blocks, and the baseline that sees no context."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from recipes.common.chat import encode_plain
from recipes.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def unigram_loss(training: list[list[int]], held_out: list[list[int]], vocabulary: int) -> float:
    """Nats a token of the held-out targets under the training tokens' frequencies, each count one more than it is."""
    counts = np.bincount(np.asarray(training).ravel(), minlength=vocabulary) + 1
    return float(-np.log(counts / counts.sum())[np.asarray(held_out)[:, 1:]].mean())
