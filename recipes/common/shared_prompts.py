"""One row for all answers to a prompt: the prompt is read once, and no answer sees another.

    row          x1 x2 x3 | a1 a2 | b1 b2 b3       prompt x, answers a and b
    positions     0  1  2 |  3  4 |  3  4  5       each answer comes right after the prompt
    branch        0  0  0 |  1  1 |  2  2  2       a token sees branch 0 and its own, up to itself

K answers to a prompt of P tokens, A tokens each, are P + K A tokens, where a row for each answer takes K (P + A). All that
is computed of an answer is what it would be alone: prefix sharing, Wang & Hegde 2024, https://arxiv.org/abs/2410.20305

Shapes: B prompts, K answers at most to one of them, L tokens a row, R tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Prompts padded on the left and their answers behind them, padded on the right."""

    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    branch: Tensor  # [B, L]: 0 of the prompt, k of its k-th answer, -1 of padding
    before: Tensor  # [B, K, R]: the column of the token that each answer token follows
    at: Tensor  # [B, K, R]: the column of the answer token itself
    mask: (
        Tensor  # [B, K, R]: 1 on the answers' tokens; padding has 0, and the prompt's last column in `before` and `at`
    )


def share(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], fill: int) -> Rows:
    """Token ids of B prompts, and of the answers to each, as rows. Raises ValueError for an empty prompt or answer."""
    import torch

    if not all(prompts) or not all(answer for some in answers for answer in some):
        raise ValueError("a prompt or an answer has no token")
    width = max(map(len, prompts))
    length = width + max(sum(map(len, some)) for some in answers)
    most, longest = max(map(len, answers)), max(len(answer) for some in answers for answer in some)
    input_ids = torch.full((len(prompts), length), fill)
    position_ids, branch = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    before = torch.full((len(prompts), most, longest), width - 1)
    at, mask = before.clone(), torch.zeros_like(before)
    for b, (prompt, some) in enumerate(zip(prompts, answers, strict=True)):
        place = slice(width - len(prompt), width)
        input_ids[b, place] = torch.tensor(prompt)
        position_ids[b, place] = torch.arange(len(prompt))
        branch[b, place] = 0
        start = width
        for k, answer in enumerate(some):
            end = start + len(answer)
            input_ids[b, start:end] = torch.tensor(answer)
            position_ids[b, start:end] = torch.arange(len(prompt), len(prompt) + len(answer))
            branch[b, start:end] = k + 1
            at[b, k, : len(answer)] = torch.arange(start, end)
            before[b, k, 1 : len(answer)] = torch.arange(start, end - 1)
            mask[b, k, : len(answer)] = 1
            start = end
    return Rows(input_ids, position_ids, branch, before, at, mask)


def take(rows: Rows, chosen: Tensor) -> Rows:
    """Some of the prompts, without the columns that are padding in all of them."""
    some = Rows(*(field[chosen] for field in rows))
    used = (some.branch >= 0).any(dim=0).nonzero()  # columns
    first, end = int(used[0]), int(used[-1]) + 1
    ids, positions, branch = (field[:, first:end] for field in some[:3])
    return Rows(ids, positions, branch, some.before - first, some.at - first, some.mask)


def batches(rows: Rows, answers: int) -> Iterator[Rows]:
    """The prompts in order, with at most so many answers at a time (one prompt's, if it has more)."""
    import torch

    for chosen in torch.arange(len(rows.mask)).split(max(1, answers // rows.mask.shape[1])):
        yield take(rows, chosen)


def visible(branch: Tensor) -> Tensor:
    """What each token may look at: [B, L] -> [B, 1, L, L]. Padding sees itself, so that no softmax is over nothing."""
    import torch

    looks, seen = branch[:, :, None], branch[:, None, :]
    here = torch.arange(branch.shape[1], device=branch.device)
    earlier = here[:, None] >= here[None, :]
    return (earlier & ((seen == 0) | (seen == looks)) & (seen >= 0) | (here[:, None] == here[None, :]))[:, None]


def check_kernel(config: Any) -> None:
    """Raise UserError for a model whose attention takes no mask of one's own."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"model.attention: {config._attn_implementation} takes no mask that keeps the answers to one prompt apart: "
            "use sdpa, or eager"
        )


# Layers in which a token takes in what the mask lets it look at, and nothing else.
ATTENTION = {"full_attention", "attention", "sliding_attention", "chunked_attention"}


def check_apart(model: Any) -> None:
    """Raise UserError for a model in which an answer is not what it would be alone: attention is told by a mask what not to
    look at, a recurrence or a convolution runs over all that stands in the row.

    What the config tells comes first; then the model itself is asked, about a row of two short answers and each alone. Not
    where no process holds its weights.
    """
    import inspect

    import torch

    from recipes.common.generation import inference
    from recipes.common.sharding import launched_with

    check_kernel(model.config)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not kinds and takes_positions:
        weights = list(model.parameters())
        if launched_with() == "FSDP" or any(weight.is_meta or hasattr(weight, "ds_id") for weight in weights):
            return
        prompts, answers = [[3, 4, 5, 6, 7], [8, 9]], [[[10, 11], [12, 13, 14]], [[15, 16, 17], [18, 19]]]
        rows = Rows(*(field.to(model.device) for field in share(prompts, answers, 0)))
        with inference(model):
            mask = attention_mask(rows.branch, model.config)
            asked = {"use_cache": False, "output_hidden_states": True}
            told = model(rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, **asked)
            states = at_columns(told.hidden_states[-1], rows.at).float()  # [B, K, R, H]
            alone = torch.zeros_like(states)
            for b, prompt in enumerate(prompts):
                for k, answer in enumerate(answers[b]):
                    ids = torch.tensor([[*prompt, *answer]], device=model.device)
                    alone[b, k, : len(answer)] = model(ids, **asked).hidden_states[-1][0, len(prompt) :]
        states = states * rows.mask[..., None]
        if (states - alone).norm() < (1e-3 if model.dtype == torch.float32 else 0.1) * alone.norm():
            return
    why = f"its layers are {', '.join(sorted(kinds))}" if kinds else "its positions cannot be given"
    if not kinds and takes_positions:
        why = "two short answers in one row come out otherwise than each alone"
    raise UserError(
        f"model.name: {type(model).__name__} does not keep the answers to one prompt apart, which are read in one row ({why}): "
        "give a model of full attention with positions of its own, such as Llama, Qwen2.5 or GPT-2"
    )


def windows_below(config: Any, longest: int) -> list[int]:
    """How far the layers of a model look back that do not see all of a row of `longest` tokens."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
        "local": getattr(config, "window_size", None) if "local" in getattr(config, "attention_layers", ()) else None,
    }
    return [size for kind, size in windows.items() if size and (kinds is None or kind in kinds) and size < longest]


def check_window(config: Any, longest: int) -> None:
    """Raise UserError where a model's layers look back less far than a row of `longest` tokens is long: the mask of a shared
    row takes the window's place."""
    if bites := windows_below(config, longest):
        raise UserError(
            f"model.name: layers of this model look back {min(bites)} tokens, and a prompt with its answers is a row of up to "
            f"{longest}, in which they would see all of it: take shorter prompts or answers, fewer answers to a prompt, or a "
            "model of full attention"
        )


def attention_mask(branch: Tensor, config: Any) -> Tensor:
    """`visible`, [B, 1, L, L], in the form that the attention of a model with this config takes: "sdpa" a boolean,
    "eager" what is added to the scores. Raises UserError as `check_kernel`."""
    import torch

    check_kernel(config)
    see = visible(branch)
    if config._attn_implementation == "sdpa":
        return see
    return torch.zeros(see.shape, device=see.device).masked_fill(~see, torch.finfo(torch.float32).min)


def at_columns(x: Tensor, columns: Tensor) -> Tensor:
    """What stands at some columns of each row: [B, L, ...] and [B, K, R] -> [B, K, R, ...]."""
    import torch

    return x[torch.arange(len(x), device=x.device)[:, None, None], columns]
