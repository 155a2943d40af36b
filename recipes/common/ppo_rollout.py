"""PPO's rollouts: answers sampled from the policy, the scores that they get, and what the models say of their tokens.

    answer       prompts -> texts, with the policy as it is
    scores       texts -> the reward model's scores
    most_spread  which prompts' answers differ enough to teach something
    read         answers -> log-probabilities, values, entropy: what the update needs, without gradients

The objective and the loop are in recipes/alignment/ppo.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from recipes.common.rlhf import ActorCritic
    from recipes.common.shared_prompts import Rows

Row = dict[str, Any]


@dataclass
class Models:
    """What learns, together in `learner`, and what is frozen."""

    learner: ActorCritic  # policy and critic, as accelerate prepared them
    reference: PreTrainedModel | None  # the policy as it was, the SFT model; None: the policy without its adapter
    reward_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase  # of all four
    reward_function: Callable[[Sequence[str], Sequence[Row]], Sequence[float]] | None = None
    engine: Any = None  # vLLM, which answers in the policy's place


@dataclass
class Answers:
    """One answer to each of N prompts."""

    rows: list[Row]  # of the prompts, with the data's other columns
    prompts: list[list[int]]
    ids: list[list[int]]  # the stop token included
    texts: list[str]  # without it
    stopped: Tensor  # [N], whether it ended, or ran out of tokens
    lengths: Tensor  # [N], in tokens
    rewards: Tensor  # [N], what is maximised
    seconds: dict[str, float] = field(default_factory=dict)  # that it took: rollout, score, read


@dataclass
class Rollout:
    """The B answers that are learned from. R: tokens of the longest one."""

    answers: int  # to each prompt: K; the answers 0 to K - 1 are to the first
    mask: Tensor  # [B, R], 1 on an answer's real tokens, its stop token included
    logprobs: Tensor  # [B, R], under the policy that answered, pi_old
    reference: Tensor  # [B, R], under the reference
    values: Tensor  # [B, R], the critic's value before each token
    entropy: Tensor  # [B, R], of the distribution that each token was drawn from
    rewards: Tensor  # [B]
    all: Answers  # those that are not learned from, too
    kept: list[int]  # which of them these are


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the wall time of its body to seconds[what]."""
    import torch

    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was asked of it is done, too
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started


# ---------------------------------------------------------------- answers


def answer(
    models: Models,
    rows: list[Row],
    prompts: list[list[int]],
    args: TrainingArguments,
    accelerator: Accelerator,
    *,
    longest: int,
    at_once: int,
    seed: int,
) -> Answers:
    """Sample an answer of at most `longest` tokens to each prompt, `at_once` at a time; rewards are 0 as yet."""
    import torch

    from recipes.common.generation import as_answers, generate_ids, stop_ids

    fill = models.tokenizer.pad_token_id
    stop = stop_ids(accelerator.unwrap_model(models.learner).policy, models.tokenizer)
    seconds: dict[str, float] = {}
    with timed(seconds, "rollout"):
        if models.engine is not None:
            ids = answer_with_vllm(models.engine, prompts, longest, stop)
        else:
            with whole_policy(models.learner, accelerator) as policy:
                ids = generate_ids(
                    policy, prompts, stop=stop, pad=fill, max_new_tokens=longest, batch_size=at_once,  # type: ignore[arg-type]
                    temperature=1.0, seed=seed, bf16=args.bf16,
                )  # fmt: skip
    device, written = accelerator.device, as_answers(models.tokenizer, ids, stop)
    return Answers(
        rows=rows,
        prompts=prompts,
        ids=ids,
        texts=[one.text for one in written],
        stopped=torch.tensor([one.ended for one in written], device=device),
        lengths=torch.tensor([float(len(one)) for one in ids], device=device),
        rewards=torch.zeros(len(ids), device=device),
        seconds=seconds,
    )


@contextmanager
def whole_policy(learner: ActorCritic, accelerator: Accelerator) -> Iterator[PreTrainedModel]:
    """The bare policy, ready to generate. ZeRO-3 holds it in pieces: they are gathered for the time being."""
    bare, plugin = accelerator.unwrap_model(learner), accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        yield bare.policy
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(bare.policy.parameters())):
        remove_hooks(learner)
        yield bare.policy
        add_hooks(learner)


def start_vllm(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Any:
    """vLLM beside the training processes, by trl, which also carries the weights over."""
    from trl.generation.vllm_generation import VLLMGeneration

    from recipes.common.generation import model_positions

    return VLLMGeneration(
        policy, accelerator, tokenizer, gpu_memory_utilization=0.3, max_model_length=model_positions(policy)
    )


def answer_with_vllm(engine: Any, prompts: list[list[int]], longest: int, stop: list[int]) -> list[list[int]]:
    """The policy's answers by vLLM, once it has the policy's weights. Not the same ones when a run is resumed: a seed of a
    request's own would give all answers to a prompt the same tokens."""
    engine.sync_weights()
    engine.max_completion_length = longest
    engine.generation_kwargs = {"stop_token_ids": stop}
    return [list(ids) for ids in engine.generate(prompts=prompts, images=None, num_generations=1)[1]]


# ---------------------------------------------------------------- rewards


def rows_of(
    models: Models, answers: Answers, chosen: list[int], count: int, device: Any, longest: int | None = None
) -> Rows:
    """Some of the answers with their prompts, `count` to each, as shared rows; those to one prompt stand next to each other."""
    from recipes.common.shared_prompts import Rows, share

    prompts = [answers.prompts[i] for i in chosen[::count]]
    theirs = [[answers.ids[i] for i in chosen[start : start + count]] for start in range(0, len(chosen), count)]
    rows = share(prompts, theirs, models.tokenizer.pad_token_id, longest)  # type: ignore[arg-type]
    return Rows(*(field.to(device) for field in rows))


def tokens_of(rollout: Rollout) -> int:
    """Of the answers that are learned from and their prompts, each once."""
    prompts = sum(len(rollout.all.prompts[i]) for i in rollout.kept[:: rollout.answers])
    return prompts + sum(len(rollout.all.ids[i]) for i in rollout.kept)


def whole_prompts(chosen: list[int], count: int, answers: int) -> Iterator[list[int]]:
    """The answers in order, `answers` of them at a time at most, none parted from the `count` to its prompt."""
    size = max(1, answers // count) * count
    yield from (chosen[start : start + size] for start in range(0, len(chosen), size))


def model_scores(
    models: Models, answers: Answers, count: int, args: TrainingArguments, accelerator: Accelerator
) -> Tensor:
    """The reward model's scores, [N], in its standard deviations above a good held-out answer. UserError for nan or inf.

    count: answers to each prompt, which stand next to each other
    """
    import torch

    from recipes.common.rlhf import answer_scores, shared_states
    from recipes.common.verifiable_rewards import checked

    assert models.reward_model is not None
    reward_model = accelerator.unwrap_model(models.reward_model)
    with timed(answers.seconds, "score"), torch.no_grad(), accelerator.autocast():
        parts = []
        for some in whole_prompts(list(range(len(answers.ids))), count, args.per_device_train_batch_size):
            rows = rows_of(models, answers, some, count, accelerator.device)
            parts.append(answer_scores(reward_model, shared_states(reward_model, rows), rows).flatten())
        scores = torch.cat(parts)
        checked(scores.tolist(), len(scores), "ppo.reward_model")
    scale = reward_model.config
    return (scores - getattr(scale, "reward_mean", 0.0)) / getattr(scale, "reward_std", 1.0)


def function_scores(models: Models, answers: Answers) -> Tensor:
    """What the reward function says of each answer, [N]. UserError for nan, inf, or another number of them."""
    from recipes.common.verifiable_rewards import checked

    assert models.reward_function is not None
    with timed(answers.seconds, "score"):
        told = models.reward_function(answers.texts, answers.rows)
    return answers.rewards.new_tensor(checked(told, len(answers.texts), "ppo.reward_function"))


def spread_of(rewards: Tensor, answers: int) -> Tensor:
    """Standard deviation of the rewards of each prompt's answers, which stand next to each other: [N] -> [N / answers]."""
    return rewards.view(-1, answers).std(dim=1, correction=0)


def most_spread(rewards: Tensor, answers: int, count: int) -> list[int]:
    """The answers to the `count` prompts whose rewards differ most, in the order in which they were asked.

    Where all answers to a prompt get the same reward, none is better than expected, and nothing is learned (DAPO's
    dynamic sampling leaves such prompts out). Of equal spread, the one that was asked first.
    """
    spread = spread_of(rewards, answers)
    best = sorted(range(len(spread)), key=lambda prompt: -spread[prompt].item())[:count]
    return [prompt * answers + k for prompt in sorted(best) for k in range(answers)]


# ---------------------------------------------------------------- what the models say of them


def read(
    models: Models, answers: Answers, kept: list[int], count: int, args: TrainingArguments, accelerator: Accelerator
) -> Rollout:
    """All that PPO needs of the answers that are kept, `count` to each prompt.

    The log-probabilities are not those of `generate` but of the forward that training runs, on the rows and in the
    shapes of the first pass's minibatches: so the first minibatch's ratio is exactly 1, also in bf16.
    """
    import torch

    from recipes.common.policy_figures import start_model
    from recipes.common.rlhf import answers_told

    parts: list[tuple[Any, ...]] = []
    longest = max(len(answers.ids[i]) for i in kept)
    policy = accelerator.unwrap_model(models.learner).policy
    apart = accelerator.unwrap_model(models.reference) if models.reference is not None else None
    with timed(answers.seconds, "read"), torch.no_grad(), accelerator.autocast():
        for some in whole_prompts(kept, count, args.per_device_train_batch_size):
            rows = rows_of(models, answers, some, count, accelerator.device, longest)
            told = models.learner(rows, with_entropy=True)
            with start_model(policy, apart) as reference:
                _, logprobs, _ = answers_told(reference, rows)
            parts.append((rows.mask.flatten(0, 1), told.logprobs, logprobs.flatten(0, 1), told.values, told.entropy))
    mask, logprobs, reference, values, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rollout(
        answers=count,
        mask=mask,
        logprobs=logprobs,
        reference=reference,
        values=values,
        entropy=entropy,
        rewards=answers.rewards[kept],
        all=answers,
        kept=kept,
    )


# ---------------------------------------------------------------- which rows come when


def rows_of_step(step: int, count: int, rows: int, seed: int) -> list[int]:
    """Which rows a step takes: pieces of a fresh permutation every epoch. A function of the step, so resumable."""
    import torch

    chosen: list[int] = []
    position = step * count
    while len(chosen) < count:
        epoch, offset = divmod(position + len(chosen), rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        chosen += order[offset : offset + count - len(chosen)]
    return chosen
