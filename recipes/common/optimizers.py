"""Muon for the hidden matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of every matrix, as torch has it:

    B_t = mu B_{t-1} + (1 - mu) G_t,    O_t = NewtonSchulz(mu B_t + (1 - mu) G_t)          (Nesterov's momentum)
    W_t = (1 - lr decay) W_{t-1} - lr 0.2 sqrt(max(rows, columns)) O_t

The factor gives an update the root mean square of AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that both take
like rates. Embeddings, heads, norms and biases are no matrices that map hidden to hidden: they take AdamW.

It needs each matrix whole, so it runs in one process or under DDP, and is refused under DeepSpeed and FSDP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.optim import AdamW, Muon, Optimizer
from torch.optim._muon import _adjust_lr

from recipes.common import machine
from recipes.common.errors import UserError
from recipes.common.sharding import launched_with

if TYPE_CHECKING:
    from transformers import TrainingArguments


class BatchedMuon(Muon):
    """torch.optim.Muon, with the matrices of one shape (or of its transpose) orthogonalised together.

    The same numbers as torch's loop over the matrices, up to bf16 rounding. A small model's products are tiny, and the
    loop's calls cost more than they do.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; there is no closure to evaluate again."""
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            if not params:
                continue
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])  # B_t
            updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for i, param in enumerate(params):
                by_shape[tuple(sorted(param.shape))].append(i)
            for members in by_shape.values():
                wide = torch.stack([_wide(updates[i]) for i in members])  # (matrices, rows <= columns, columns)
                wide = wide.to(_dtype_of_products(wide.device))
                made = orthogonalized(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for i, update in zip(members, made.unbind(), strict=True):
                    rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], params[i].shape)
                    _wide(params[i]).add_(update, alpha=-rate)


def _dtype_of_products(device: torch.device) -> torch.dtype:
    """bf16, which Muon stands, where it is faster: a processor without bf16 products emulates them, 100 times slower."""
    return torch.float32 if device.type == "cpu" and not machine.choose_bf16().value else torch.bfloat16


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalized(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz: about U V^T of each matrix U S V^T; (batch, rows <= columns, columns)."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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


def check_muon(args: TrainingArguments) -> None:
    """Raise UserError where Muon with AdamW cannot be what was asked for: another optimizer is, or a library would hand Muon
    something else than whole matrices, without a word.

    ZeRO flattens all parameters into one fp32 vector and gives each process a piece of it: no matrix is left, at any
    stage; with offload DeepSpeed puts its own AdamW in this optimizer's place. Under FSDP transformers' Trainer takes no
    optimizer that was built before the parameters were sharded.
    """
    if args.optim not in ("adamw_torch_fused", "adamw_torch"):
        raise UserError(
            f"training.optim: {getattr(args.optim, 'value', args.optim)} would do nothing where the recipe's `optimizer: muon` "
            "makes the optimizer: leave it out, or set `optimizer: adamw`"
        )
    for library in ("DeepSpeed", "FSDP"):
        if launched_with() == library or getattr(args, library.lower(), None):
            raise UserError(
                f"optimizer: muon needs whole matrices, and {library} hands the optimizer pieces of them: set the "
                "recipe's `optimizer: adamw`, or keep Muon and launch with LAUNCH=ddp or LAUNCH=single"
            )


def muon_with_adamw(model: Any, args: TrainingArguments, muon_learning_rate: float) -> MuonWithAdamW:
    """Muon on every hidden 2-D weight, fused AdamW on the embedding tables, heads, norms and biases. Each group keeps its own rate
    under one schedule. Raises UserError where the matrices would be sharded."""
    check_muon(args)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}  # positions' too
    if (head := model.get_output_embeddings()) is not None:
        tables.add(id(head.weight))
    learned = [p for p in model.parameters() if p.requires_grad]
    # behind the backbone, what maps hidden to anything else is a head: to classes, a reward, whether a sentence is the next one
    backbone, square = {id(p) for p in model.base_model.parameters()}, (model.config.get_text_config().hidden_size,) * 2
    hidden = {id(p) for p in learned if id(p) in backbone or p.shape == square} - tables
    matrices = [p for p in learned if p.ndim == 2 and id(p) in hidden]
    by_muon = {id(p) for p in matrices}
    rest = [p for p in learned if id(p) not in by_muon]
    decayed = [p for p in rest if p.ndim == 2]
    plain = [p for p in rest if p.ndim != 2]
    adamw = AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    muon = BatchedMuon(matrices, lr=muon_learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


def slow_queries(optimizer: MuonWithAdamW, queries: list[Tensor], head_size: int) -> None:
    """Give the queries' matrices 1 / sqrt(head_size) of Muon's rate: in an attention that does not divide q k^T by that root
    (T5, GPT-Neo) they start that much smaller instead, so they have to learn that much slower too, or it saturates."""
    apart = {id(p) for p in queries}
    (group,) = optimizer.muon.param_groups
    group["params"] = [p for p in group["params"] if id(p) not in apart]
    optimizer.muon.add_param_group({**group, "params": queries, "lr": group["lr"] / head_size**0.5})
