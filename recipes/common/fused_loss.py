"""Next-token loss computed inside the model's forward, from the hidden states.

A library causal model's forward hands its logits out, and a Trainer under autocast copies them to fp32: (batch, seq,
vocabulary) numbers that nobody looks at. Here they live and die inside one function, which torch.compile can fuse.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
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

    @functools.wraps(plain)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        return CausalLMOutput(loss=model.compiled_loss(model, labels, **kwargs))

    model.forward = forward
