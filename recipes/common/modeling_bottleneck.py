"""The modules of bottleneck adapters: one adapter, several under an attention, and what puts them after a layer's part."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN


class Bottleneck(nn.Module):
    """A(x) = s (W_up f(W_down x + b_down) + b_up), [..., d] -> [..., d]; zero at first, since W_up and b_up are."""

    def __init__(self, width: int, size: int, nonlinearity: str, scale: float = 1.0):
        super().__init__()
        self.down = nn.Linear(width, size)  # [m, d]
        self.up = nn.Linear(size, width)  # [d, m]
        self.nonlinearity, self.scale = ACT2FN[nonlinearity], scale
        self.start()

    def start(self) -> None:
        """As before any training: W_down random, the rest zero."""
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        for other in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.nonlinearity(self.down(x.to(self.down.weight.dtype)))  # [..., m]
        return (self.scale * self.up(inner)).to(x.dtype)


class Fusion(nn.Module):
    """Attention of a layer's output h over what N frozen adapters make of it, [..., d] -> [..., d].

        s = softmax_n((Q h) . (K A_n(h)))        F(h) = sum_n s_n V A_n(h)        Q, K, V [d, d]

    Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, equation 4; h itself is added outside, as for one adapter.
    V = I as in the paper, and Q = 0: it starts as the mean of the adapters, where no softmax is saturated.
    """

    def __init__(self, adapters: list[Bottleneck]):
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        width = adapters[0].up.out_features
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        nn.init.eye_(self.value.weight)
        nn.init.zeros_(self.query.weight)
        self.weights: list[torch.Tensor] | None = None  # a list: the attention of each call is put into it, [..., N]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = h.to(self.value.weight.dtype)
        made = torch.stack([adapter(x) for adapter in self.adapters], dim=-2)  # [..., N, d]
        scores = (self.query(x)[..., None, :] * self.key(made)).sum(-1)  # [..., N]
        attention = scores.softmax(-1)
        if self.weights is not None:
            self.weights.append(attention.detach().float().cpu())
        return (attention[..., None] * self.value(made)).sum(-2).to(h.dtype)


# -------------------------------------------------------------------------------------------------- put in place
# The hooks find the adapter by its name in the layer, so that it can be replaced; they are partials of functions, not
# closures, so that a deep copy of the model has hooks on the copy.


def serial(layer: nn.Module, name: str, part: nn.Module) -> None:
    """h = part(x) becomes h + A(h); `layer.name` is A."""
    part.register_forward_hook(partial(_add_of_output, layer, name))


def parallel(layer: nn.Module, name: str, first: nn.Module, last: nn.Module) -> None:
    """h = last(...first(x)) becomes h + A(x)."""
    first.register_forward_pre_hook(partial(_keep_input, layer, name))
    last.register_forward_hook(partial(_add_of_input, layer, name))


def _add_of_output(layer: Any, name: str, part: nn.Module, args: Any, output: Any) -> Any:
    h = output[0] if isinstance(output, tuple) else output  # attention gives its weights too
    return _with_first(output, h + getattr(layer, name)(h))


def _keep_input(layer: Any, name: str, part: nn.Module, args: Any) -> None:
    getattr(layer, name).seen = args[0]


def _add_of_input(layer: Any, name: str, part: nn.Module, args: Any, output: Any) -> Any:
    h, adapter = output[0] if isinstance(output, tuple) else output, getattr(layer, name)
    x, adapter.seen = adapter.seen, None  # not kept: it would hold the graph until the next step
    return _with_first(output, h + adapter(x))


def _with_first(output: Any, changed: torch.Tensor) -> Any:
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


# ------------------------------------------------------------------------------------------------------------- MAD-X


class LanguageAndTask(nn.Module):
    """The active language's adapter, L(h), or a task's on top of it, T(h + L(h)), [..., d] -> [..., d]; h is added outside."""

    def __init__(self, languages: dict[str, Bottleneck], task: Bottleneck):
        super().__init__()
        self.languages, self.task = nn.ModuleDict(languages), task
        self.active: str | None = None
        self.with_task = True

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        spoken = torch.zeros_like(h) if self.active is None else self.languages[self.active](h)
        return self.task(h + spoken) if self.with_task else spoken


class Invertible(nn.Module):
    """NICE's additive coupling of the two halves of an embedding, [..., d] -> [..., d], and its exact inverse.

    Dinh et al. 2015, https://arxiv.org/abs/1410.8516
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.f, self.g = (Bottleneck(width // 2, size, "relu") for _ in range(2))

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        first, second = e.chunk(2, dim=-1)
        first = first + self.f(second)
        return torch.cat([first, second + self.g(first)], dim=-1)

    def inverse(self, o: torch.Tensor) -> torch.Tensor:
        first, second = o.chunk(2, dim=-1)
        second = second - self.g(first)
        return torch.cat([first - self.f(second), second], dim=-1)


class Inverses(nn.Module):
    """An invertible adapter a language."""

    def __init__(self, languages: dict[str, Invertible]):
        super().__init__()
        self.languages = nn.ModuleDict(languages)
        self.active: str | None = None


def invert_around(model: Any, languages: dict[str, Invertible]) -> None:
    """The active language's coupling after the embedding, its inverse on what the backbone gives to the output layer."""
    model.add_module("inverses", Inverses(languages).to(model.device))
    model.get_input_embeddings().register_forward_hook(partial(_couple, model.inverses))
    model.base_model.register_forward_hook(partial(_uncouple, model.inverses))


def _couple(inverses: Any, embedding: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
    return embedded if inverses.active is None else inverses.languages[inverses.active](embedded)


def _uncouple(inverses: Any, backbone: nn.Module, args: Any, output: Any) -> Any:
    if inverses.active is not None:
        output.last_hidden_state = inverses.languages[inverses.active].inverse(output.last_hidden_state)
    return output
