"""Muon for the hidden matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of every matrix:

    O_t = NewtonSchulz(mu B_{t-1} + G_t),    W_t = W_{t-1} - lr O_t

Embeddings, the output head, norms and biases are no matrices that map hidden to hidden: they take AdamW.

It needs each matrix whole, so it runs in one process or under DDP, and is refused under DeepSpeed and FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


class MuonWithAdamW(Optimizer):
    """Two optimizers behind the interface of one, so that a Trainer, a scheduler and a checkpoint see a single optimizer."""

    def __init__(self, muon: Muon, adamw: AdamW):
        self.muon, self.adamw = muon, adamw
        self.defaults: dict[str, Any] = {}
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        return {**self.muon.state, **self.adamw.state}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Both step; there is no closure to evaluate again."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def refuse_muon_on_shards(args: TrainingArguments) -> None:
    """Raise UserError where a library would hand Muon something else than whole matrices, without a word.

    ZeRO flattens all parameters into one fp32 vector and gives each process a piece of it: no matrix is left, at any
    stage; with offload DeepSpeed puts its own AdamW in this optimizer's place. Under FSDP transformers' Trainer takes no
    optimizer that was built before the parameters were sharded.
    """
    for name, library in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
        asked = os.environ.get(f"ACCELERATE_USE_{library.upper()}", "").lower() in ("true", "1")
        if asked or getattr(args, name, None):
            raise UserError(
                f"optimizer: muon needs whole matrices, and {library} hands the optimizer pieces of them: set the "
                "recipe's `optimizer: adamw`, or keep Muon and launch with LAUNCH=ddp or LAUNCH=single"
            )


def muon_with_adamw(model: Any, args: TrainingArguments, muon_learning_rate: float) -> MuonWithAdamW:
    """Muon on every hidden 2-D weight, fused AdamW on embeddings, head, norms and biases. Each group keeps its own rate under
    one schedule. Raises UserError where the matrices would be sharded."""
    refuse_muon_on_shards(args)
    tables = {id(t.weight) for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None}
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.ndim == 2 and id(p) not in tables]
    rest = [p for p in learned if p.ndim != 2 or id(p) in tables]
    decayed = [p for p in rest if p.ndim == 2]
    plain = [p for p in rest if p.ndim != 2]
    adamw = AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    muon = Muon(matrices, lr=muon_learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)
