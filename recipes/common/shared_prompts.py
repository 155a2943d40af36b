"""One row for all answers to a prompt: the prompt is read once, and no answer sees another. Short ones share a row.

    row          x1 x2 x3 | a1 a2 | b1 b2 b3 | y1 y2 | c1       prompt x, answers a and b; prompt y, answer c
    positions     0  1  2 |  3  4 |  3  4  5 |  0  1 |  2       each answer comes right after its prompt
    prompt        0  0  0 |  0  0 |  0  0  0 |  1  1 |  1       a token sees its own prompt, branch 0,
    branch        0  0  0 |  1  1 |  2  2  2 |  0  0 |  1       and its own branch, up to itself

K answers to a prompt of P tokens, A tokens each, are P + K A tokens, where a row for each answer takes K (P + A). All that
is computed of an answer is what it would be alone: prefix sharing, Wang & Hegde 2024, https://arxiv.org/abs/2410.20305

Shapes: M rows of L tokens, B prompts, K answers at most to one of them, R tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Prompts, each with its answers behind it, one after the other in as few rows as they fit in; padded on the right."""

    input_ids: Tensor  # [M, L]
    position_ids: Tensor  # [M, L]
    prompt: Tensor  # [M, L]: which prompt's, -1 of padding
    branch: Tensor  # [M, L]: 0 of a prompt, k of its k-th answer, -1 of padding
    # of the token that each answer token follows, and of the answer token itself: its place among all M * L
    before: Tensor  # [B, K, R]
    at: Tensor  # [B, K, R]
    mask: Tensor  # [B, K, R]: 1 on the answers' tokens; padding has 0, and its prompt's last token in `before` and `at`


def share(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], fill: int, longest: int | None = None
) -> Rows:
    """Token ids of B prompts, and of the answers to each, as rows of one length, in which the least is padding.

    `longest`: R, by default the longest answer's. Raises ValueError for an empty prompt or answer.
    """
    import torch

    if not all(prompts) or not all(answer for some in answers for answer in some):
        raise ValueError("a prompt or an answer has no token")
    lengths = [len(prompt) + sum(map(len, some)) for prompt, some in zip(prompts, answers, strict=True)]
    length = row_length(lengths)
    places = first_fit(lengths, length)
    most = max(map(len, answers))
    longest = longest or max(len(answer) for some in answers for answer in some)
    input_ids = torch.full((1 + max(row for row, _ in places), length), fill)
    position_ids, branch = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    of = branch.clone()
    before = torch.zeros((len(prompts), most, longest), dtype=torch.long)
    at, mask = before.clone(), torch.zeros_like(before)
    for n, (prompt, some, (row, first)) in enumerate(zip(prompts, answers, places, strict=True)):
        start, flat = first + len(prompt), row * length
        of[row, first : first + lengths[n]] = n
        input_ids[row, first:start] = torch.tensor(prompt)
        position_ids[row, first:start] = torch.arange(len(prompt))
        branch[row, first:start] = 0
        before[n] = at[n] = flat + start - 1
        for k, answer in enumerate(some):
            end = start + len(answer)
            input_ids[row, start:end] = torch.tensor(answer)
            position_ids[row, start:end] = torch.arange(len(prompt), len(prompt) + len(answer))
            branch[row, start:end] = k + 1
            at[n, k, : len(answer)] = torch.arange(flat + start, flat + end)
            before[n, k, 1 : len(answer)] = torch.arange(flat + start, flat + end - 1)
            mask[n, k, : len(answer)] = 1
            start = end
    return Rows(input_ids, position_ids, of, branch, before, at, mask)


FREE = (
    512  # tokens up to which a row may be longer than its longest prompt with answers: attention costs a row's square
)


def row_length(lengths: Sequence[int]) -> int:
    """How long rows are to be, from the longest of what goes into them to twice that, for the fewest columns in all."""
    longest = max(lengths)
    tried = [longest + longest * part // 8 for part in range(9)]
    return min(
        (length for length in tried if length == longest or length <= FREE),
        key=lambda length: length * (1 + max(row for row, _ in first_fit(lengths, length))),
    )


def first_fit(lengths: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Where each goes, its row and first column, in rows of `length`: longest first, each into the first row that still has
    the room."""
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((row for row, left in enumerate(room) if left >= lengths[n]), len(room))
        if row == len(room):
            room.append(length)
        places[n] = row, length - room[row]
        room[row] -= lengths[n]
    return places


def visible(rows: Rows) -> Tensor:
    """What each token may look at: [M, 1, L, L]. Padding sees the padding before it, so that no softmax is over nothing."""
    import torch

    prompt, branch = rows.prompt, rows.branch
    here = torch.arange(branch.shape[1], device=branch.device)
    earlier = here[:, None] >= here[None, :]
    own = prompt[:, :, None] == prompt[:, None, :]
    reads = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (earlier & own & reads)[:, None]


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

    What the config tells comes first; then the model itself is asked, about rows of two short answers and each alone. Not
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
        prompts = [[3, 4, 5, 6, 7], [8, 9], [10]]  # the latter two share a row
        answers = [[[10, 11], [12, 13, 14]], [[15, 16], [18]], [[19, 20], [21, 22]]]
        rows = Rows(*(field.to(model.device) for field in share(prompts, answers, 0)))
        with inference(model):
            mask = attention_mask(rows, model.config)
            asked = {"use_cache": False, "output_hidden_states": True}
            told = model(rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, **asked)
            states = at_places(told.hidden_states[-1], rows.at).float()  # [B, K, R, H]
            alone = torch.zeros_like(states)
            for n, prompt in enumerate(prompts):
                for k, answer in enumerate(answers[n]):
                    ids = torch.tensor([[*prompt, *answer]], device=model.device)
                    alone[n, k, : len(answer)] = model(ids, **asked).hidden_states[-1][0, len(prompt) :]
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


def attention_mask(rows: Rows, config: Any) -> Tensor:
    """`visible`, [M, 1, L, L], in the form that the attention of a model with this config takes: "sdpa" a boolean,
    "eager" what is added to the scores. Raises UserError as `check_kernel`."""
    import torch

    check_kernel(config)
    see = visible(rows)
    if config._attn_implementation == "sdpa":
        return see
    return torch.zeros(see.shape, device=see.device).masked_fill(~see, torch.finfo(torch.float32).min)


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """What stands at some places of the rows: [M, L, ...] and [B, K, R] -> [B, K, R, ...]."""
    return x.flatten(0, 1)[places]
