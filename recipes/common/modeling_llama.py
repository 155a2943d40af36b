"""LLaMA's architecture, written out to be read: its logits equal those of transformers' LlamaForCausalLM on the same weights.

    h = h + Attention(RMSNorm(h));   h = h + SwiGLU(RMSNorm(h))            a block: pre-norm, no biases
    logits = W_vocabulary RMSNorm(h)                                       after the last block

    LLaMA-1   multi-head: every query head has its own keys and values     num_key_value_heads = num_attention_heads
    LLaMA-2   grouped-query (34B, 70B): a group of query heads shares      1 < num_key_value_heads < num_attention_heads
              them; one group for all is multi-query attention             num_key_value_heads = 1

The modules carry the library's names, so `model.load_state_dict(library_model.state_dict())` loads its weights. There is no
cache and no fused kernel: recipes train the library's class. Touvron et al. 2023, https://arxiv.org/abs/2302.13971 and
https://arxiv.org/abs/2307.09288; tested with transformers 5.19.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """h / sqrt(mean(h^2) + eps) * g: layer norm without mean and bias (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, h: Tensor) -> Tensor:  # (batch, seq, hidden)
        return self.weight * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)


def rope_angles(positions: Tensor, head: int, theta: float) -> Tensor:
    """(batch, seq) positions m -> (batch, seq, head / 2) angles m * theta^(-2 i / head): pair i turns slower the larger i is."""
    speeds = theta ** (-torch.arange(0, head, 2, device=positions.device).float() / head)
    return positions[..., None].float() * speeds


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head/2}) by its angle; then q_m . k_n depends on m - n alone (Su et al. 2021).

    x: (batch, ..., seq, head); angles broadcast to (batch, ..., seq, head / 2). The paper pairs neighbours; the
    library's weights have their rows in an order that puts a pair's two halves head/2 apart.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head)) V, where the query heads of a group share one K and one V."""

    def __init__(self, config: Any):
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.groups, self.head, self.theta = groups, config.head_dim, config.rope_parameters["rope_theta"]
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head, bias=False)
        self.o_proj = nn.Linear(heads * self.head, config.hidden_size, bias=False)

    def forward(self, h: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """h: (batch, seq, hidden); positions: (batch, seq); allowed: (batch, seq, seq), true where a row sees a column."""

        def in_heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.groups, -1, self.head)).permute(0, 2, 3, 1, 4)

        query = in_heads(self.q_proj(h))  # (batch, groups, heads of a group, seq, head)
        key, value = in_heads(self.k_proj(h)), in_heads(self.v_proj(h))  # (batch, groups, 1, seq, head)
        angles = rope_angles(positions, self.head, self.theta)[:, None, None]
        scores = rotate(query, angles) @ rotate(key, angles).transpose(-1, -2) / self.head**0.5
        weights = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1)  # (.., seq, seq)
        mixed = (weights @ value).permute(0, 3, 1, 2, 4)  # (batch, seq, groups, heads of a group, head)
        return self.o_proj(mixed.flatten(2))  # (batch, seq, hidden)


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate h) * W_up h) (Shazeer 2020); LLaMA-1's inner size is 2/3 of 4 hidden, rounded up."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:  # (batch, seq, hidden)
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    """h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h))."""

    def __init__(self, config: Any):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, h: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), positions, allowed)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: Any):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        h = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        for layer in self.layers:
            h = layer(h, positions, allowed)
        return self.norm(h)


class Llama(nn.Module):
    """The language model: `Llama(config)(input_ids)` are the logits of each next token; `config` is a LlamaConfig."""

    def __init__(self, config: Any):
        super().__init__()
        rope, act = config.rope_parameters["rope_type"], config.hidden_act
        if (rope, act, config.attention_bias, config.mlp_bias) != ("default", "silu", False, False):
            raise ValueError(f"LLaMA-1 and -2 have plain RoPE, SiLU and no biases, not {rope} RoPE, {act} and biases")
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """All (batch, seq); attention_mask is 0 on padding, position_ids count from 0 where not given. (batch, seq, vocabulary)"""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = (place <= place[:, None]) & real[:, None].bool()  # (batch, seq, seq): nothing later, no padding
        allowed = seen | (place == place[:, None])  # padding sees itself: a row with nothing to see would be no number
        positions = place.expand_as(input_ids) if position_ids is None else position_ids
        return self.lm_head(self.model(input_ids, positions, allowed))
