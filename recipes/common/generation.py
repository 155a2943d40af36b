"""Answers from a causal language model: batched generation, and the share of answers that are exactly right.

A batch is left-padded, so that every prompt ends where its answer begins:

    <pad> <pad> <|user|> 2 + 2 ? <|end|> <|assistant|>  ->  4 <|end|>
    <|user|> Add 17 and 25 . <|end|> <|assistant|>      ->  42 <|end|>

Padding is masked and positions count from a prompt's own first token, so a prompt gets the answer that it would get
alone. Only what the caller asks for shapes the choice of tokens: a checkpoint's own generation defaults (top_k,
repetition penalty, ...) are set aside. transformers would fill them in silently, `top_k=50` even where none is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from recipes.common.builtin import tasks
from recipes.common.errors import UserError
from recipes.common.sections import Evaluation

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
FIRST_PART = 2  # tokens


class Answer(NamedTuple):
    """What a model wrote."""

    text: str  # without its stop token
    ended: bool = True  # with a stop token; else it was cut, and what would have followed nobody knows


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 100,
    temperature: float | None = None,
    seed: int = 0,
    bf16: bool = False,
) -> list[str]:
    """The assistant's answer to each conversation, in the order of the prompts.

    `temperature=None` takes the likeliest token each time (greedy); otherwise tokens are sampled from the whole
    distribution, the same ones for the same seed, prompts and batch size. The stop token is left out of the answer;
    any other special token that the model wrote stays in it, so that a run-on answer is seen for what it is.
    Raises UserError for a prompt that leaves no room for an answer within the model's positions.
    """
    stops = stop_ids(model, tokenizer)
    answers = generate_ids(
        model, prompt_ids(tokenizer, prompts), stop=stops, pad=pad_id(tokenizer), max_new_tokens=max_new_tokens,
        batch_size=batch_size, temperature=temperature, seed=seed, bf16=bf16,
    )  # fmt: skip
    return [answer.text for answer in as_answers(tokenizer, answers, stops)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """The ids that each conversation is asked with: rendered by the chat template, ready for the assistant's words."""
    if not prompts:
        return []
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def as_answers(
    tokenizer: PreTrainedTokenizerBase, written: Iterable[Sequence[int]], stops: Sequence[int]
) -> list[Answer]:
    """What each list of new tokens says, and whether it ends in one of the tokens `stops`."""
    ended = [(ids, bool(ids) and ids[-1] in stops) for ids in written]
    return [Answer(decode(tokenizer, ids[:-1] if end else ids), end) for ids, end in ended]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, special tokens shown."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    pad: int,
    max_new_tokens: int,
    batch_size: int = 100,
    temperature: float | None = None,
    seed: int = 0,
    bf16: bool = False,
) -> list[list[int]]:
    """Continue each list of token ids; gives the new ids only, the stop token that ended them included.

    Long prompts first, and prompts of like length together: the least padding, and if memory is too small it shows at
    once. A prompt that is near the model's last position gets fewer new tokens, alone or in company alike.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    from recipes.common.sharding import launched_with

    positions = model_positions(model)
    rooms = [max_new_tokens if positions is None else min(max_new_tokens, positions - len(p)) for p in prompts]
    too_long = [len(p) for p, room in zip(prompts, rooms, strict=True) if room < 1]
    if too_long:
        raise UserError(
            f"{len(too_long)} prompt(s) leave no room for an answer: the longest has {max(too_long)} tokens and the "
            f"model {positions} positions; shorten the prompts, or take a model with more positions"
        )
    device, engine = next(model.parameters()).device, cast(Any, model)  # the stubs take `generate` for a tensor
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], -len(prompts[i])))
    answers: list[list[int]] = [[] for _ in prompts]
    cuda = [device.index or 0] if device.type == "cuda" else []
    # processes that hold a part of the weights each have to make the same calls: the library waits for all in each
    in_step = is_deepspeed_zero3_enabled() or launched_with() == "FSDP"
    with torch.random.fork_rng(devices=cuda), inference(model, bf16=bf16) as base:
        torch.manual_seed(seed)
        for chosen in _batches(order, rooms, batch_size):
            batch = [list(prompts[i]) for i in chosen]
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
            cache = None if in_step else _read_once(base, ids, mask)
            for count in [rooms[chosen[0]]] if in_step else _parts(rooms[chosen[0]]):
                with plain_choices(base):
                    out = engine.generate(
                        input_ids=ids, attention_mask=mask,
                        generation_config=_choices(temperature, count, stop, pad),
                        **({} if cache is None else {"past_key_values": cache}),
                    )  # fmt: skip
                for i, row in zip(chosen, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
                    answers[i] += _until_stop(row, stop)
                going = [n for n, i in enumerate(chosen) if answers[i][-1] not in stop]
                if not going:
                    break
                chosen, kept = [chosen[n] for n in going], torch.tensor(going, device=device)
                ids = out.sequences[kept]
                mask = torch.nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
                cache = _rows_of(out.past_key_values, kept, ids.shape[1] - 1)
    return answers


def _parts(room: int) -> Iterator[int]:
    """New tokens a call: a few, then as many as there are, until there is no room.

    The library carries each finished answer along until the longest of the batch ends; between two calls they are left out.
    """
    done = 0
    while done < room:
        count = min(done or FIRST_PART, room - done)
        done += count
        yield count


def _read_once(base: Any, ids: Tensor, mask: Tensor) -> Any:
    """The cache of all but the last of `ids` (rows, width), each prompt read once; None where few are asked repeatedly.

    The library reads a prompt as often as it is asked, which is most of what short answers cost.
    """
    import inspect

    import torch
    from transformers import DynamicCache

    width, stack = ids.shape[1], base.base_model  # without the head: nobody looks at a prompt's logits
    distinct, which = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
    if 2 * len(distinct) > len(ids) or width == 1 or "position_ids" not in inspect.signature(stack.forward).parameters:
        return None
    asked, there = distinct[:, : width - 1], distinct[:, width:-1]  # (prompts, width - 1) each
    cache = DynamicCache(config=base.config)
    stack(
        input_ids=asked, attention_mask=there, position_ids=positions_of(there), past_key_values=cache, use_cache=True
    )
    return _rows_of(cache, which, width - 1)


def _rows_of(cache: Any, rows: Tensor, length: int) -> Any:
    """The cache of these rows; None for a kind that has none to take, or that holds more than the `length` tokens: a learned
    prefix. The library reads all tokens again then."""
    if not hasattr(cache, "batch_select_indices") or cache.get_seq_length() != length:
        return None
    cache.batch_select_indices(rows)
    return cache


def _choices(temperature: float | None, room: int, stop: Sequence[int], pad: int) -> GenerationConfig:
    from transformers import GenerationConfig

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature is not None else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=room, eos_token_id=list(stop), pad_token_id=pad, use_cache=True, return_dict_in_generate=True,
        **sampling,
    )  # fmt: skip


def _batches(order: Sequence[int], rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Runs of at most `batch_size` that have the same room for new tokens."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or rooms[i] != rooms[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _until_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    """What comes up to the first stop token, itself included; after it there is only padding."""
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]


@contextmanager
def inference(model: nn.Module, *, bf16: bool = False) -> Iterator[Any]:
    """Evaluation mode, no gradients, not compiled, bf16 autocast on request; gives the model under any adapter.

    A compiled forward pass would be compiled anew for every length of the growing batch. All is put back afterwards.
    """
    import torch

    device = next(model.parameters()).device.type
    modes = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    autocast = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
    model.eval()
    for module, _, _ in modes:
        module._compiled_call_impl = None
    try:
        with torch.no_grad(), autocast:
            yield cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    finally:
        for module, training, compiled in modes:
            module.training, module._compiled_call_impl = training, compiled


@contextmanager
def plain_choices(base: Any) -> Iterator[None]:
    """Set the checkpoint's own generation defaults aside for a while."""
    from transformers import GenerationConfig

    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = 60
) -> str:
    """Sampled continuations (top-p 0.9, temperature 0.8), to read while it learns.

    They are drawn beside the run's own random numbers, which a checkpoint holds as they were before.
    """
    import torch

    shown = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(0)
        for prompt in prompts:
            batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
            out = cast(Any, model).generate(**batch, max_new_tokens=tokens, do_sample=True, top_p=0.9, temperature=0.8)
            shown.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return "\n\n".join(f"--- {text}" for text in shown)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the checkpoint names (some have two)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    both = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return [int(token) for token in dict.fromkeys(both) if token is not None]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes behind the assistant's words, the stop token first: `<|end|>`, or `<|im_end|>` and a
    line break. Blanks before the stop token are left out; of a template that writes none it is the tokenizer's own."""
    user = {"role": "user", "content": "?"}
    one, other = (
        tokenizer.apply_chat_template([user, {"role": "assistant", "content": answer}], return_dict=False)
        for answer in ("a", "7")
    )
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    end = [int(token) for token, _ in alike][::-1]
    while end and not decode(tokenizer, end[:1]).strip():
        end = end[1:]
    return end or [int(tokenizer.eos_token_id)]


def check_turn_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where the chat template ends the assistant's turn with none of `stop_ids`: no answer would ever be seen to
    end as it was taught to. (A special token is one of them: `load_model` sees to that.)"""
    end, stops = turn_end(tokenizer)[0], stop_ids(model, tokenizer)
    if end not in stops:
        named = ", ".join(repr(decode(tokenizer, [token])) for token in stops)
        raise UserError(
            f"model: the chat template ends the assistant's turn with {decode(tokenizer, [end])!r}, which is none of the stop "
            f"tokens ({named}) and no special token, so that an answer which ends so would not be seen to: give another "
            f"model.chat_template, or add its id {end} to eos_token_id in the checkpoint's generation_config.json"
        )


def positions_of(attention_mask: Tensor) -> Tensor:
    """[B, L] -> [B, L], each real token's position counted from its row's first real token (padding gets 0)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a batch; masked, so any token will do."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def model_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has for a row; None where it names no limit. A learned prefix takes some of them."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    taken = getattr(getattr(model, "prompt", None), "positions", 0)
    return None if positions is None else positions - taken


# -------------------------------------------------------------------------------------------- exactly right, or not


def is_checkable(row: dict[str, Any]) -> bool:
    """Whether a row has an answer that `tasks.check` can judge (the builtin sets `tasks` and `tasks_preferences`)."""
    return row.get("task") is not None and row.get("answer") is not None


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    evaluation: Evaluation,
    *,
    seed: int = 0,
    bf16: bool = False,
) -> dict[str, Any]:
    """Share of held-out task rows that the model answers exactly right, judged by the task's own checker.

    `rows` are canonical conversations or prompts with "task", "language" and "answer"; the first
    `evaluation.max_samples` that can be checked count. Gives
        exact_match            greedy                      exact_match_<task>   greedy, by task
        sampled_exact_match    at evaluation.temperature   answers              a dict a row: task, prompt, expected,
                                                                                greedy, sampled, right, sampled_right
    Several processes share the rows, and all get the same result. Raises UserError when no row can be checked.
    """
    checkable = []
    for row in rows:
        if is_checkable(row):
            checkable.append(row)
        if len(checkable) == evaluation.max_samples:
            break
    if not checkable:
        raise UserError("exact match needs rows with a task and its answer, such as those of the builtin set `tasks`")
    rank, world = _place()
    # every process gets equally many, the first ones twice if need be: sharded models compute in step
    share = [checkable[i % len(checkable)] for i in range(rank, -(-len(checkable) // world) * world, world)]
    prompts = [prompt_of(row) for row in share]
    options = {"max_new_tokens": evaluation.max_new_tokens, "batch_size": evaluation.batch_size, "bf16": bf16}
    greedy = generate(model, tokenizer, prompts, **options)
    sampled = generate(model, tokenizer, prompts, temperature=evaluation.temperature, seed=seed + rank, **options)
    answers = [
        {
            "task": row["task"],
            "language": row.get("language"),
            "prompt": prompt[-1]["content"],
            "expected": row["answer"],
            "greedy": likeliest,
            "sampled": drawn,
            "right": tasks.check(row, likeliest),
            "sampled_right": tasks.check(row, drawn),
        }
        for row, prompt, likeliest, drawn in zip(share, prompts, greedy, sampled, strict=True)
    ]
    answers = _interleaved(_gathered(answers))[: len(checkable)]
    by_task: dict[str, list[bool]] = {}
    for answer in answers:
        by_task.setdefault(answer["task"], []).append(answer["right"])
    return {
        "exact_match": _mean([answer["right"] for answer in answers]),
        "sampled_exact_match": _mean([answer["sampled_right"] for answer in answers]),
        **{f"exact_match_{task}": _mean(right) for task, right in sorted(by_task.items())},
        "answers": answers,
    }


def prompt_of(row: dict[str, Any]) -> Messages:
    """What precedes the answer in a canonical conversation or prompt row."""
    messages = row["prompt"] if row.get("prompt") is not None else row["messages"]
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def _place() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gathered(answers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Every process's answers, on every process."""
    import torch.distributed as dist

    _, world = _place()
    if world == 1:
        return [answers]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, answers)
    return shares


def _interleaved(shares: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Back in the order of the rows: they were dealt out like cards."""
    return [answer for deal in zip(*shares, strict=True) for answer in deal]
