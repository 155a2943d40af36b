"""A policy beside the model that it started from: how often it is right, how far it has gone, what it says now.

KL(pi || pi_start) = E_{y ~ pi} sum_t log pi(y_t) - log pi_start(y_t)        nats an answer, sampled at temperature 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS = 2**28  # at once, where only log-probabilities are wanted: 1 GiB of float32
Score = Callable[
    [Sequence[dict[str, Any]], Sequence[list[int]]], Sequence[float]
]  # rows, their answers' ids -> rewards


@dataclass
class Measured:
    """What a policy does on held-out prompts: flat figures, and its answers."""

    figures: dict[str, float]  # kl, response_length, reward if asked; with a checker exact_match, sampled_exact_match
    answers: list[dict[str, Any]]  # prompt, greedy, sampled; with a checker expected, right, sampled_right


@contextmanager
def start_model(policy: Any, reference: Any) -> Iterator[Any]:
    """The model that the policy started from: the frozen copy, or, where that is None, the policy without its adapter."""
    if reference is not None:
        yield reference
        return
    with policy.disable_adapter():
        yield policy.get_base_model()


def response_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Any:
    """A causal model's output with logits at the response only: [B, P+R] -> logits [B, R, V].

    The logits at position t are for token t+1: those of the R response tokens stand at P-1 .. P+R-2. So the last token
    is not fed at all, and the first P-1 positions, most of a short answer's sequence, never reach the vocabulary.
    """
    from recipes.common.generation import positions_of

    ids, mask = input_ids[:, :-1], attention_mask[:, :-1]
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask),
        logits_to_keep=input_ids.shape[1] - prompt_length,
        use_cache=False,
    )


def response_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], fill: int
) -> tuple[Tensor, Tensor]:
    """log p of each token of each answer, and which entries are tokens: [B, R] both, R the longest answer.

    Of a large vocabulary a few rows at a time: 32 answers of 900 tokens have 4 billion logits under Qwen's.
    """
    import torch

    from recipes.common.rlhf import pad, token_logprobs

    device = next(model.parameters()).device
    (left, left_mask), (right, mask) = pad(prompts, fill, "left"), pad(answers, fill, "right")
    ids = torch.cat([left, right], dim=1).to(device)  # [B, P+R]
    attention = torch.cat([left_mask, mask], dim=1).to(device)
    right, mask = right.to(device), mask.to(device)
    at_once = max(1, LOGITS // (right.shape[1] * model.get_input_embeddings().num_embeddings))
    parts = [
        token_logprobs(response_logits(model, some, seen, left.shape[1]).logits, tokens)  # of [b, R, V]
        for some, seen, tokens in zip(*(x.split(at_once) for x in (ids, attention, right)), strict=True)
    ]
    return torch.cat(parts), mask


def distance(
    policy: Any,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    evaluation: Evaluation,
    *,
    seed: int = 0,
    bf16: bool = False,
    score: Score | None = None,
) -> dict[str, float]:
    """KL from the start, mean length and, with `score`, mean reward of sampled answers; several processes share the rows."""
    import torch
    import torch.distributed as dist

    from recipes.common.generation import generate_ids, inference, pad_id, prompt_ids, prompt_of, stop_ids

    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    mine, fill = rows[rank::world], pad_id(tokenizer)
    prompts = prompt_ids(tokenizer, [prompt_of(row) for row in mine])
    answers = generate_ids(
        policy, prompts, stop=stop_ids(policy, tokenizer), pad=fill, max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size, temperature=1.0, seed=seed + rank, bf16=bf16,
    )  # fmt: skip
    sums = torch.zeros(4, dtype=torch.float64, device=policy.device)  # KL, tokens, answers, rewards
    sums[3] = sum(score(mine, answers)) if score else 0.0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), evaluation.batch_size):
        chosen = order[start : start + evaluation.batch_size]
        batch = [prompts[i] for i in chosen], [answers[i] for i in chosen], fill
        with inference(policy, bf16=bf16) as model:
            ours, mask = response_logprobs(model, *batch)
        with start_model(policy, reference) as model, inference(model, bf16=bf16) as base:
            theirs, _ = response_logprobs(base, *batch)
        sums[0] += ((ours - theirs) * mask).sum()
        sums[1] += mask.sum()
        sums[2] += len(chosen)
    if several:
        dist.all_reduce(sums)
    kl, tokens, count, reward = sums.tolist()
    return {"kl": kl / count, "response_length": tokens / count, **({"reward": reward / count} if score else {})}


def measure(
    policy: Any,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    evaluation: Evaluation,
    *,
    seed: int = 0,
    bf16: bool = False,
    score: Score | None = None,
) -> Measured:
    """Exact match, greedy and sampled, where the rows can be checked; what `distance` tells; and the answers."""
    from recipes.common.generation import exact_match, generate, is_checkable, prompt_of

    figures = distance(policy, reference, tokenizer, rows, evaluation, seed=seed, bf16=bf16, score=score)
    if is_checkable(rows[0]):
        told = exact_match(policy, tokenizer, rows, evaluation, seed=seed, bf16=bf16)
        return Measured(
            figures | {name: told[name] for name in ("exact_match", "sampled_exact_match")}, told["answers"]
        )
    prompts = [prompt_of(row) for row in rows[:20]]
    options = {"max_new_tokens": evaluation.max_new_tokens, "batch_size": evaluation.batch_size, "bf16": bf16}
    greedy = generate(policy, tokenizer, prompts, **options)
    answers = [{"prompt": p[-1]["content"], "greedy": text} for p, text in zip(prompts, greedy, strict=True)]
    return Measured(figures, answers)


def say(run: RunFolder, when: str, measured: Measured) -> None:
    """One line of figures."""
    run.say(f"{when}  " + "  ".join(f"{name} {value:.4g}" for name, value in measured.figures.items()))


def report(run: RunFolder, before: Measured, after: Measured) -> dict[str, float]:
    """Keeps the answers of both; gives the flat figures: kl, exact match and its baseline, length (and reward) before and after."""
    run.sample("before_and_after.txt", side_by_side(before.answers, after.answers, run.recipe.upper()))
    moved = [name for name in ("response_length", "reward") if name in after.figures]
    return {
        **{name: value for name, value in after.figures.items() if name not in moved},
        **{f"baseline_{name}": before.figures[name] for name in before.figures if "exact_match" in name},
        **{f"{name}_{when}": m.figures[name] for name in moved for when, m in (("before", before), ("after", after))},
    }


def side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]], name: str, count: int = 60) -> str:
    """Greedy answers to held-out prompts, of the start and of now, those that changed first."""
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: pair[0]["greedy"] == pair[1]["greedy"])
    changed = sum(a["greedy"] != b["greedy"] for a, b in pairs)
    lines = [f"{changed} of {len(pairs)} greedy answers changed"]
    for old, new in pairs[:count]:
        lines += ["", old["prompt"]]
        for who, told in (("start", old), (name, new)):
            mark = {True: "right", False: "wrong", None: "     "}[told.get("right")]
            lines.append(f"  {who:<6}{mark}  {told['greedy']!r}")
    return "\n".join(lines) + "\n"


def check_room(
    conversations: Sequence[list[dict[str, str]]],
    prompts: Sequence[Sequence[int]],
    model: PreTrainedModel,
    answer: int,
    key: str | None,
    data: Data,
    run: RunFolder,
) -> list[int]:
    """Rows whose prompt and an answer of `answer` tokens (given as `key`, if it was) fit the model's positions.

    Raises UserError, with the first row that does not, or, with data.on_bad_row: skip, leaves them out and counts them.
    """
    from recipes.common.generation import model_positions

    places = model_positions(model) or 2**30
    room = f"no room for {key} {answer}" if key else "no room for an answer"
    bad = [i for i, prompt in enumerate(prompts) if len(prompt) + answer > places]
    if bad and (data.on_bad_row == "error" or len(bad) == len(prompts)):
        first, length = bad[0], len(prompts[bad[0]])
        why = f"{length} tokens, longer than the context of {places}"
        if length < places:
            why = f"{length} tokens long, which leaves {room} within the context of {places}"
        raise UserError(
            f"data: the prompt of row {first + 1} ({conversations[first][-1]['content'][:40]!r}) is {why}"
            + (f"; so are {len(bad) - 1} more" if len(bad) > 1 else "")
            + f": {f'lower {key}, ' if key else ''}take a model with more positions, or leave such rows out (data.on_bad_row: skip)"
        )
    if bad:
        run.say(f"  {len(bad)} of {len(prompts)} prompts leave {room}: left out")
    out = set(bad)
    return [i for i in range(len(prompts)) if i not in out]


def save(trainer: Any, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
    """The model to model/; of a LoRA run the adapter to adapter/ and the merged model to model/."""
    save_learned(trainer, tokenizer, run)
    save_merged(trainer, tokenizer, run)


def save_learned(trainer: Any, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
    """The model to model/; of a LoRA run the adapter to adapter/. The trainer's model stays as it is."""
    from recipes.common import sft

    if hasattr(trainer.model, "peft_config"):
        run.save_model(trainer.model, tokenizer, folder="adapter")
    else:
        sft.save(trainer, tokenizer, run)


def save_merged(trainer: Any, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
    """Of a LoRA run, the merged model to model/; the trainer's model has no adapter afterwards, so this comes last."""
    from recipes.common import sharding

    if hasattr(trainer.model, "peft_config") and not sharding.sharded(trainer):
        whole = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        run.save_model(whole.merge_and_unload(), tokenizer)
