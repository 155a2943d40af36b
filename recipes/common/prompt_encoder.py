"""The part of a prompt method that learns, wherever its numbers go: one of peft's encoders, until the training is over.

    prompt() = encoder(0 .. tokens - 1)        [tokens, numbers a token]

Then it is settled: the numbers alone stay; what made them (an MLP, an LSTM) is dropped, and costs nothing at inference.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

PLACES = ("prompt", "encoder_prompt")  # attributes of a model: the decoder's (or only) prompt, and the encoder's


class Prompt(nn.Module):
    """The numbers of a prompt, learned through `encoder`."""

    numbers: nn.Parameter

    def __init__(self, encoder: nn.Module, tokens: int):
        super().__init__()
        self.encoder: nn.Module | None = encoder
        self.tokens = tokens
        self.positions = 0  # how many of the model's positions it takes before each row
        self.last_id = -1  # the last token id that stands for it in a row

    def forward(self) -> torch.Tensor:
        """[tokens, numbers a token]."""
        if self.encoder is None:
            return self.numbers
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):  # few numbers, and not every processor has an LSTM in bf16
            return self.encoder(torch.arange(self.tokens, device=device)[None]).squeeze(0)

    def settle(self) -> None:
        """Keep the numbers and drop the encoder."""
        with torch.no_grad():
            self.numbers = nn.Parameter(self().detach().clone())
        self.encoder = None


def learned_names(model: PreTrainedModel) -> set[str]:
    """The parameters that learn: the prompt's, and those of the task's head."""
    from recipes.common.adaptation import head_names

    ours = {name for name, _ in model.named_parameters() if name.partition(".")[0] in PLACES}
    return ours | head_names(model)


def settle(model: Any) -> set[str]:
    """Settle all prompts of a trained model; gives the names to save."""
    model.eval()
    for place in PLACES:
        if (prompt := getattr(model, place, None)) is not None:
            prompt.settle()
    return learned_names(model)


def check_room(model: PreTrainedModel, tokens: int, longest: int | None = None) -> None:
    """Raise UserError where a prompt of so many tokens leaves the model no position for a row, or a row of `longest` no token."""
    from recipes.common.generation import model_positions

    positions = model_positions(model)
    if tokens < 1:
        raise UserError(f"a prompt of {tokens} virtual tokens is none: give num_virtual_tokens, 1 or more")
    if positions is not None and tokens >= positions:
        raise UserError(
            f"a prompt of {tokens} virtual tokens is longer than the context: the model has {positions} positions; "
            "take fewer"
        )
    if longest is not None and tokens >= longest:
        raise UserError(
            f"a prompt of {tokens} virtual tokens leaves a row of training.max_length, {longest} tokens, no room for its "
            "text: take fewer, or raise training.max_length"
        )


def check_encoder(settings: Any, section: str) -> None:
    """Raise UserError for what peft's config takes and these recipes do not do."""
    if settings.inference_mode:
        raise UserError(f"{section}.inference_mode: true would learn nothing; leave it out")
    for name in ("num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim", "modules_to_save"):
        if getattr(settings, name, None) is not None:
            raise UserError(f"{section}.{name} follows from the model (its task's head always learns): leave it out")


def refuse_shards(args: TrainingArguments, method: str) -> None:
    """Raise UserError where no process would hold the whole model: what a prompt is made of is taken from it at the end."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") or bool(getattr(args, "fsdp", None))
    if fsdp or stage == "3":
        raise UserError(
            f"{method} learns too little to shard it, and the frozen model is not sharded here: launch with LAUNCH=ddp "
            "or LAUNCH=zero2"
        )
