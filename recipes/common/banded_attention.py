"""Locally banded causal attention, computed in blocks, for the local layers of transformers' GPT-Neo.

    token i sees tokens i - w + 1 ... i          w: the width of the band

    seq in blocks of w:      keys of block b:  [ block b-1 | block b ]      2 w scores a query instead of seq
    the band in a block:       . x x | x . .
                               . . x | x x .
                               . . . | x x x

GPT-3 alternates dense and locally banded layers (Brown et al. 2020, section 2.1, after Child et al. 2019); the paper does
not say how wide its band is. GPT-Neo's architecture is that alternation, and its own code computes all seq x seq scores
of a local layer before it masks them. This class has the same weights and gives the same outputs, so what is saved loads
in plain transformers.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention


def band(length: int, window: int) -> Tensor:
    """The mask of a local layer, whole: (length, length), True where row i may see column j."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (j <= i) & (j > i - window)


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, seen: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T, inside the band) V, from 2 * window scores a query. There is no 1 / sqrt(head): the caller's matter.

    query, key, value: (batch, heads, seq, head). seen: (batch, seq), False where a key is padding.
    """
    batch, heads, length, head = query.shape
    window = min(window, length)
    blocks = math.ceil(length / window)
    fill = blocks * window - length

    def in_blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, fill)).view(batch, -1, blocks, window, x.shape[-1])

    def with_block_before(x: Tensor) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)  # (batch, heads, blocks, 2 window, head)

    i = torch.arange(window, device=query.device)[:, None]  # place in the block
    j = torch.arange(2 * window, device=query.device)[None, :] - window  # below 0: in the block before
    allowed = (j <= i) & (j > i - window)  # (window, 2 window)
    exists = torch.arange(blocks, device=query.device)[:, None, None] * window + j >= 0  # nothing precedes block 0
    allowed = (allowed & exists)[None, None]  # (1, 1, blocks, window, 2 window)
    if seen is not None:
        keys = with_block_before(in_blocks(seen[:, None, :, None].float()))  # (batch, 1, blocks, 2 window, 1)
        allowed = allowed & (keys.transpose(-1, -2) > 0)
    scores = in_blocks(query) @ with_block_before(in_blocks(key)).transpose(-1, -2)
    scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    mixed = weights @ with_block_before(in_blocks(value))  # (batch, heads, blocks, window, head)
    return mixed.reshape(batch, heads, blocks * window, head)[:, :, :length]


class FastSelfAttention(GPTNeoSelfAttention):
    """A layer of GPT-Neo: a local one computes the band alone, a global one takes torch's fused attention.

    With a cache (generation) the library's way is as cheap.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, layer_past: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if layer_past is not None or options.get("output_attentions"):
            return super().forward(hidden_states, attention_mask, layer_past, **options)
        query, key, value = (
            self._split_heads(project(hidden_states), self.num_heads, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.attn_dropout.p if self.training else 0.0
        if self.attention_type == "local":
            # the last row of the library's (batch, 1, seq, seq) causal mask hides padding and nothing else
            seen = None if attention_mask is None else attention_mask[:, 0, -1] == 0
            mixed = banded_attention(query, key, value, self.config.window_size, seen, dropout)
        else:
            mask = attention_mask
            if mask is not None:
                mask = mask.clamp(min=torch.finfo(query.dtype).min).to(
                    query.dtype
                )  # never -inf: a row may be all masked
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=1.0)
        out = self.out_proj(self._merge_heads(mixed, self.num_heads, self.head_dim))
        return self.resid_dropout(out), None


def use_fast_attention(model: nn.Module) -> None:
    """Make a GPT-Neo's layers FastSelfAttention. Their weights and what they compute stay as they are."""
    for layer in model.modules():
        if isinstance(layer, GPTNeoSelfAttention):
            layer.__class__ = FastSelfAttention


def start_like_gpt3(model: PreTrainedModel) -> None:
    """GPT-2's start, which GPT-3 keeps, on fresh GPT-Neo weights.

    Residual projections have 1 / sqrt(2 layers) of the others' spread (GPT-2, section 2.3: N residual layers, two a
    block). GPT-Neo leaves out attention's 1 / sqrt(head), so its queries start with it instead: the same function.
    """
    residual = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "c_proj.weight")):
                parameter.mul_(residual)
            if name.endswith("q_proj.weight"):
                parameter.mul_((model.config.hidden_size // model.config.num_attention_heads) ** -0.5)


def banded_speedup(
    window: int, length: int, heads: int, head: int, device: torch.device | str = "cpu", repeats: int = 3
) -> float:
    """How many times faster the band is than torch's fused attention under its mask, forward and backward, on this device."""
    q, k, v = (torch.randn(1, heads, length, head, device=device, requires_grad=True) for _ in range(3))
    mask = band(length, window).to(device)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)

    def seconds(attend: Any) -> float:
        best = math.inf
        for _ in range(repeats):
            started = time.perf_counter()  # the first, which warms up, is not the best
            attend().sum().backward()
            if q.is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(dense) / seconds(lambda: banded_attention(q, k, v, window))
