"""The model of GLM's blank infilling: GPT-2's blocks, a two-part attention mask, and a second position table.

    Part A  the corrupted text      every token sees all of Part A
    Part B  the spans, one by one   every token sees Part A and what precedes it in Part B

           A A A B B B
        A  x x x . . .
        A  x x x . . .
        A  x x x . . .
        B  x x x x . .
        B  x x x x x .
        B  x x x x x x

GPT-2's block is what the paper describes (section 2.3): layer norm before each sublayer, GELU, and one linear layer that
gives the tokens. transformers' own `Glm` classes are another model: the decoder-only GLM-4 with rotary positions.

Importing this file registers the model's type, and then `AutoModelForCausalLM.from_pretrained(folder)` loads what was saved.
It imports nothing of ours: the recipe puts a copy of it beside the weights, which serves where this repository is not. The
config does not name it, so transformers never runs it by itself, and nothing needs trust_remote_code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput


class BlankInfillingConfig(GPT2Config):
    """GPT-2's fields; n_positions is the size of both position tables."""

    model_type = "blank_infilling"


class BlankInfillingModel(GPT2LMHeadModel):
    """Predicts each token of Part B from Part A and from what precedes it in Part B."""

    config_class = BlankInfillingConfig
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, so that accumulation weighs each token alike

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.span_positions = nn.Embedding(config.n_positions, config.n_embd)  # 0 in Part A, from 1 in a span
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        span_position_ids: Tensor,
        context_length: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """input_ids, position_ids, span_position_ids, labels: (batch, seq); context_length: (batch,) tokens of Part A.

        Padding stands at the end, where nothing before it sees it. A label is the token that its position predicts
        (nothing is shifted), -100 where none is. With labels only the loss comes back; the logits stay inside.
        """
        embedded = self.transformer.wte(input_ids) + self.span_positions(span_position_ids)  # (batch, seq, hidden)
        mask = self._mask(part_mask(context_length, input_ids.shape[1]), embedded.dtype)
        hidden = self.transformer(
            inputs_embeds=embedded, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state  # (batch, seq, hidden)
        if labels is None:
            return CausalLMOutput(logits=self.lm_head(hidden))  # (batch, seq, vocabulary)
        # only the positions that predict, filled up to a round number with the batch's first, which is Part A's and has
        # label -100: tensors of many different sizes would fragment the memory
        predicts = (labels.flatten() != -100).nonzero()[:, 0]
        predicts = F.pad(predicts, (0, -len(predicts) % 256))
        targets = labels.flatten()[predicts]
        logits = self.lm_head(hidden.flatten(0, 1)[predicts]).float()  # (targets, vocabulary)
        loss: Any = F.cross_entropy(logits, targets, reduction="mean" if num_items_in_batch is None else "sum")
        return CausalLMOutput(loss=loss if num_items_in_batch is None else loss / num_items_in_batch)

    def _mask(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """The form that the attention kernel takes: sdpa a truth value, plain products something to add."""
        if self.config._attn_implementation == "sdpa":
            return allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def part_mask(context_length: Tensor, length: int) -> Tensor:
    """(batch, 1, seq, seq), true where a row's token may see a column's: all of Part A, and what is not after itself."""
    place = torch.arange(length, device=context_length.device)
    in_context = place[None, None, :] < context_length[:, None, None]  # (batch, 1, seq)
    return (in_context | (place[None, :] <= place[:, None]))[:, None]


AutoConfig.register(BlankInfillingConfig.model_type, BlankInfillingConfig)
AutoModelForCausalLM.register(BlankInfillingConfig, BlankInfillingModel)
