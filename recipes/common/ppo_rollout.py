"""PPO's rollouts: answers sampled from the policy, the scores that they get, and what the models say of their tokens.

    answer       prompts -> texts, with the policy as it is
    scores       texts -> the reward model's scores
    most_spread  which prompts' answers differ enough to teach something
    read         answers -> log-probabilities, values, entropy: what the update needs, without gradients

The objective and the loop are in recipes/alignment/ppo.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from recipes.common.rlhf import ActorCritic

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


@dataclass
class Rollout:
    """The B answers that are learned from. P: tokens of the longest prompt, R: of the longest answer."""

    input_ids: Tensor  # [B, P+R], prompts padded on the left, answers on the right
    attention_mask: Tensor  # [B, P+R], 1 on real tokens
    prompt_length: int  # P
    mask: Tensor  # [B, R], 1 on an answer's real tokens, its stop token included
    logprobs: Tensor  # [B, R], under the policy that answered, pi_old
    reference: Tensor  # [B, R], under the reference
    values: Tensor  # [B, R], the critic's value before each token
    entropy: Tensor  # [B, R], of the distribution that each token was drawn from
    rewards: Tensor  # [B]
    all: Answers  # those that are not learned from, too
    kept: list[int]  # which of them these are


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

    from recipes.common.generation import generate_ids

    stop, fill = models.tokenizer.eos_token_id, models.tokenizer.pad_token_id
    if models.engine is not None:
        ids = answer_with_vllm(models.engine, prompts, longest, stop)  # type: ignore[arg-type]
    else:
        with whole_policy(models.learner, accelerator) as policy:
            ids = generate_ids(
                policy, prompts, stop=[stop], pad=fill, max_new_tokens=longest, batch_size=at_once,  # type: ignore[list-item,arg-type]
                temperature=1.0, seed=seed, bf16=args.bf16,
            )  # fmt: skip
    device = accelerator.device
    return Answers(
        rows=rows,
        prompts=prompts,
        ids=ids,
        texts=[models.tokenizer.decode(one[:-1] if one[-1] == stop else one) for one in ids],  # type: ignore[misc]
        stopped=torch.tensor([one[-1] == stop for one in ids], device=device),
        lengths=torch.tensor([float(len(one)) for one in ids], device=device),
        rewards=torch.zeros(len(ids), device=device),
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


def answer_with_vllm(engine: Any, prompts: list[list[int]], longest: int, stop: int) -> list[list[int]]:
    """The policy's answers by vLLM, once it has the policy's weights. Not the same ones when a run is resumed: a seed of a
    request's own would give all answers to a prompt the same tokens."""
    engine.sync_weights()
    engine.max_completion_length = longest
    engine.generation_kwargs = {"stop_token_ids": [stop]}
    return [list(ids) for ids in engine.generate(prompts=prompts, images=None, num_generations=1)[1]]


# ---------------------------------------------------------------- rewards


def padded(models: Models, answers: Answers, rows: list[int], device: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """input_ids and attention_mask [B, P+R], the answers' mask [B, R], and P, of some of the answers."""
    import torch

    from recipes.common.rlhf import pad

    fill: Any = models.tokenizer.pad_token_id
    left, left_mask = pad([answers.prompts[i] for i in rows], fill, "left")  # [B, P]
    right, mask = pad([answers.ids[i] for i in rows], fill, "right")  # [B, R]
    ids, attention = torch.cat([left, right], dim=1), torch.cat([left_mask, mask], dim=1)
    return ids.to(device), attention.to(device), mask.to(device), left.shape[1]


def model_scores(models: Models, answers: Answers, args: TrainingArguments, accelerator: Accelerator) -> Tensor:
    """The reward model's scores, [N], in its standard deviations above a good held-out answer. UserError for nan or inf."""
    import torch

    from recipes.common.rlhf import sequence_scores

    assert models.reward_model is not None
    everyone = list(range(len(answers.ids)))
    ids, attention, _, _ = padded(models, answers, everyone, accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        scores = torch.cat(
            [
                sequence_scores(models.reward_model, ids[rows], attention[rows])
                for rows in torch.arange(len(ids)).split(args.per_device_train_batch_size)
            ]
        )
    finite(scores, "ppo.reward_model: it")
    scale = models.reward_model.config
    return (scores - getattr(scale, "reward_mean", 0.0)) / getattr(scale, "reward_std", 1.0)


def function_scores(models: Models, answers: Answers) -> Tensor:
    """What the reward function says of each answer, [N]. UserError for nan, inf, or another number of them."""
    assert models.reward_function is not None
    told = list(models.reward_function(answers.texts, answers.rows))
    if len(told) != len(answers.texts):
        raise UserError(f"ppo.reward_function: it gave {len(told)} numbers for {len(answers.texts)} answers")
    scores = answers.rewards.new_tensor([float(score) for score in told])
    finite(scores, "ppo.reward_function: it")
    return scores


def finite(scores: Tensor, who: str) -> None:
    """Raise UserError for the first score that is not a number."""
    bad = scores[~scores.isfinite()]
    if len(bad):
        raise UserError(f"{who} gave an answer the score {bad[0].item()}")


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
    models: Models, answers: Answers, kept: list[int], args: TrainingArguments, accelerator: Accelerator
) -> Rollout:
    """All that PPO needs of the answers that are kept.

    The log-probabilities are not those of `generate` but of the forward that training runs, on the rows and in the
    shapes of the first pass's minibatches: so the first minibatch's ratio is exactly 1, also in bf16.
    """
    import torch

    from recipes.common.policy_figures import start_model
    from recipes.common.rlhf import response_logits, token_logprobs

    ids, attention, mask, length = padded(models, answers, kept, accelerator.device)
    parts = []
    with torch.no_grad(), accelerator.autocast():
        for rows in torch.arange(len(ids)).split(args.per_device_train_batch_size):
            told = models.learner(ids[rows], attention[rows], length, with_entropy=True)
            with start_model(accelerator.unwrap_model(models.learner).policy, models.reference) as reference:
                logits = response_logits(reference, ids[rows], attention[rows], length).logits
            parts.append((told.logprobs, token_logprobs(logits, ids[rows, length:]), told.values, told.entropy))
    logprobs, reference, values, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rollout(
        input_ids=ids,
        attention_mask=attention,
        prompt_length=length,
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
