"""Losses computed inside the model's forward, from the hidden states: of the next token, and of smoothed targets.

A library causal model's forward hands its logits out, and a Trainer under autocast copies them to fp32: (batch, seq,
vocabulary) numbers that nobody looks at. Here they live and die inside one function, which torch.compile can fuse.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def next_token_loss(
    model: PreTrainedModel, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any
) -> Tensor:
    """Cross-entropy of labels[:, 1:] given what precedes them; label -100 is left out.

    labels: (batch, seq). The mean over the labels, or, given `num_items_in_batch`, their sum over it: the Trainer passes
    the number of labels in all micro-batches of a step, so that accumulation weighs each token alike.
    """
    from torch.nn import functional as F

    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (batch, seq, hidden)
    head = model.get_output_embeddings()
    logits = head(hidden[:, :-1]).flatten(0, 1).float()  # (batch * (seq - 1), vocabulary)
    targets = labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def fuse_next_token_loss(model: Any) -> None:
    """Make `model(..., labels=...)` return only the loss, computed by `next_token_loss`; without labels nothing changes.

    `model.compiled_loss` may be set to a compiled version of it (training.compile_if_it_pays does), which leaves
    generation and evaluation, whose shapes change all the time, uncompiled.
    """
    from transformers.modeling_outputs import CausalLMOutput

    plain = model.forward
    model.compiled_loss = next_token_loss
    # tells the Trainer that the first label is not predicted, so not counted either; GPT-1's and GPT-2's classes do not say it
    model.loss_type = "ForCausalLM"

    @functools.wraps(plain)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        return CausalLMOutput(loss=model.compiled_loss(model, labels, **kwargs))

    model.forward = forward


class SmoothedCrossEntropy(torch.autograd.Function):
    """Mean of -log p(y) under targets of which a share is spread over the whole vocabulary; -100 is left out.

    With z the logits of a position and V of them,  loss = log sum exp z - (1 - share) z_y - share mean(z)  and
    d loss / d z = softmax(z) - (1 - share) [y] - share / V: both are made a few rows at a time, so that the (tokens, vocabulary)
    numbers, which a small model spends half of its step on, are never written out whole.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, share: float) -> Tensor:
        """states: (tokens, hidden), of the dtype to compute in; weight: (vocabulary, hidden); labels: (tokens,)."""
        table, counted = weight.to(states.dtype), labels != -100
        to_states, to_weight = torch.empty_like(states), torch.zeros_like(weight)
        total = torch.zeros((), device=states.device)
        for h, y, real, out in zip(
            *(x.split(256) for x in (states, labels.clamp(min=0), counted, to_states)), strict=True
        ):
            z = (h @ table.T).float()  # (rows, vocabulary)
            norm = z.logsumexp(1, keepdim=True)
            loss = norm[:, 0] - (1 - share) * z.gather(1, y[:, None])[:, 0] - share * z.mean(1)
            total += (loss * real).sum()
            z = z.sub_(norm).exp_().sub_(share / len(table))
            z.scatter_add_(1, y[:, None], torch.full_like(norm, share - 1))
            slope = (z * (real / counted.sum())[:, None]).to(states.dtype)
            out.copy_(slope @ table)
            to_weight.add_(slope.T @ h)
        ctx.save_for_backward(to_states, to_weight)
        return total / counted.sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        """Of the loss's own gradient, a number."""
        to_states, to_weight = ctx.saved_tensors
        return to_states * slope, to_weight * slope, None, None


def smoothed_loss(model: Any, batch: dict[str, Tensor], share: float) -> Tensor:
    """An encoder-decoder's loss on a batch of `batch_of`, its targets smoothed by `share`; the library's own is share 0.

    The head is shown one position alone, and the loss reads what it would have read. (BART's bias of the logits is 0.)
    """
    head, caught = model.get_output_embeddings(), []

    def first_alone(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        caught.append(inputs[0])  # (batch, seq, hidden), what the head reads
        return (inputs[0][:1, :1],)

    labels = batch["labels"]
    hook = head.register_forward_pre_hook(first_alone)
    try:
        given = {name: value for name, value in batch.items() if name != "labels"}
        model(**given, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels), use_cache=False)
    finally:
        hook.remove()
    states = caught[0].flatten(0, 1)
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    loss: Tensor = SmoothedCrossEntropy.apply(states, head.weight, labels.flatten(), share)
    return loss
