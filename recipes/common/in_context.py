"""In-context learning: a task told by examples in the prompt, with no gradient step (Brown et al. 2020, section 2.4).

    Text: <example 1>        the K examples are drawn at random from the training rows
    Answer: <its class>
    ...
    Text: <the question>
    Answer:                  ->  the class c with the largest  log p(c | prompt) - log p(c | "Answer:")

The second term is the paper's normalisation by how likely a class is without any question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recipes.common.chat import encode_plain
from recipes.common.downstream import Downstream, class_names, load_rows
from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

ANSWER = "\nAnswer:"


def prompt(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]], question: dict[str, Any], room: int
) -> list[int]:
    """Ids of the examples with their answers and the question without; each text is cut so that all fit in `room` tokens."""
    shown = [*examples, question]

    def encode(*texts: str) -> list[list[int]]:
        return encode_plain(tokenizer, list(texts))

    start, answer, end = encode("Text: ", ANSWER, "\n\n")
    labels = encode(*(f" {row['label']}" for row in examples)) if examples else []
    fixed = len(shown) * (len(start) + len(answer)) + sum(map(len, labels)) + len(examples) * len(end)
    each = max(1, (room - fixed) // len(shown))
    ids: list[int] = []
    for row, label in zip(shown, [*labels, None], strict=True):
        words = row["text"] if row.get("text_pair") is None else f"{row['text']}\n{row['text_pair']}"
        ids += [*start, *encode(words)[0][:each], *answer]
        if label is not None:
            ids += [*label, *end]
    return ids


def log_likelihoods(model: PreTrainedModel, context: list[int], endings: list[list[int]], bf16: bool) -> Tensor:
    """log p(ending | context) of each ending, the sum over its tokens: (endings,). The context is read once."""
    device = model.device
    longest = max(map(len, endings))
    ids = torch.tensor([[*ending, *[0] * (longest - len(ending))] for ending in endings], device=device)
    real = torch.arange(longest) < torch.tensor([[len(ending)] for ending in endings])  # (endings, longest)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        read = model.base_model(input_ids=torch.tensor([context], device=device), use_cache=True)
        hidden = read.last_hidden_state[:, -1:].expand(len(endings), -1, -1)
        if longest > 1:
            read.past_key_values.batch_repeat_interleave(len(endings))
            more = model.base_model(input_ids=ids[:, :-1], past_key_values=read.past_key_values, use_cache=True)
            hidden = torch.cat([hidden, more.last_hidden_state], dim=1)  # (endings, longest, hidden): each predicts ids
        logits = model.get_output_embeddings()(hidden)
    words = logits.float().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    return (words.cpu() * real).sum(dim=1)


def in_context_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    shots: int,
    length: int,
    bf16: bool,
    seed: int = 0,
) -> float:
    """Share of the questions whose class is the likeliest after `shots` examples drawn from `pool`; prompts of `length` tokens."""
    names = sorted({row["label"] for row in pool})
    endings = encode_plain(tokenizer, [f" {name}" for name in names])
    alone = log_likelihoods(model, encode_plain(tokenizer, [ANSWER])[0], endings, bf16)
    rng = np.random.default_rng(seed)
    room = length - max(map(len, endings))
    right = 0
    for question in questions:
        examples = [pool[i] for i in rng.choice(len(pool), shots, replace=False)]
        likely = log_likelihoods(model, prompt(tokenizer, examples, question, room), endings, bf16) - alone
        right += names[int(likely.argmax())] == question["label"]
    return right / len(questions)


def load_questions(settings: Downstream, few: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that examples are drawn from and the held-out questions. Raises UserError for rows that do not fit."""
    pool, questions = load_rows(settings, "classification", "downstream", few)
    class_names(pool, questions, f"downstream.labels ({settings.data})")
    return pool, questions


def check_room(tokenizer: PreTrainedTokenizerBase, pool: list[dict[str, Any]], shots: int, length: int) -> None:
    """Raise UserError if `shots` examples are more than `pool` has, or leave no token for each text in a prompt of `length`."""
    if shots > len(pool):
        raise UserError(f"gpt.shots: {shots} examples of {len(pool)} rows: ask for fewer, or raise downstream.labels")
    longest = max(encode_plain(tokenizer, [f" {name}" for name in sorted({row["label"] for row in pool})]), key=len)
    frame = {"text": "", "text_pair": None, "label": str(tokenizer.decode(longest)).strip()}
    taken = len(prompt(tokenizer, [frame] * shots, frame, length)) + len(longest) + shots + 1
    if taken > length:
        raise UserError(
            f"gpt.shots: a prompt with {shots} examples takes {taken} tokens at least, and gpt.block_length is {length}: "
            "ask for fewer, or raise gpt.block_length"
        )


def ask_in_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    shots: tuple[int, ...],
    length: int,
    args: TrainingArguments,
    run: RunFolder,
) -> dict[str, float]:
    """Accuracy on the held-out rows with each number of examples in the prompt, and of the most common class."""
    pool, questions = rows
    figures = {}
    model.eval()
    for count in shots:
        scored = in_context_accuracy(model, tokenizer, pool, questions, count, length, args.bf16, args.seed)
        figures[f"in_context_accuracy_{count}_shot"] = scored
        run.say(f"  {count} examples in the prompt: accuracy {scored:.3f}")
    shown = prompt(tokenizer, pool[: max(shots)], questions[0], length)
    run.sample("prompt.txt", str(tokenizer.decode(shown)))
    labels = [row["label"] for row in questions]
    return {**figures, "in_context_most_common": max(map(labels.count, labels)) / len(labels)}
