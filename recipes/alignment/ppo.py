"""PPO: improve a chat model against a learned reward, without straying far from where it started.

    objective = E_{x, y ~ pi} [ r(x, y) - beta log( pi(y|x) / pi_SFT(y|x) ) ]              InstructGPT eq. (2)
    A_t       = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t            GAE eq. (16)
    loss      = - E_t min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ),  rho_t = pi / pi_old     PPO eq. (7)

A step answers a batch of prompts with the current policy, scores the answers with the frozen reward model, spreads
score and KL penalty over the tokens, turns these and the critic's values into advantages, and takes a few passes of
clipped updates over them. The true score, where the task has a checker, is reported and never trained on.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; InstructGPT: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155;
RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740;
details as in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031

    make ppo                                       # laptop, offline, 3 minutes, after `make full`, `make reward_model`
    make ppo CONFIG=gpu                            # one GPU, a public model and a reward model from it
    make ppo CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Laptop result: RESULTS.md#ppo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes.common.rlhf import ActorCritic


@dataclass
class PPO:
    """PPO's own knobs; a minibatch is training.per_device_train_batch_size x gradient_accumulation_steps a process."""

    reward_model: str = "runs/reward_model/default/model"  # folder or hub id: sequence classification with one label
    rollouts: PositiveInt = 512  # answers in a step, over all processes (InstructGPT)
    answers: PositiveInt = 1  # to each prompt of a step
    max_prompt_length: PositiveInt = 512  # tokens; longer prompts are left out (Huang 2024)
    max_new_tokens: PositiveInt = 53  # longest answer, in tokens (Huang 2024)
    epochs: PositiveInt = 4  # passes over a step's answers (Huang 2024; InstructGPT: 1)
    kl_coefficient: NonNegativeFloat = 0.02  # beta: reward lost for a nat away from the reference (InstructGPT)
    kl_target: PositiveFloat | None = None  # nats a response that beta is steered to (Ziegler 2019); default: fixed
    gamma: NonNegativeFloat = 1.0  # no discount (InstructGPT)
    lam: NonNegativeFloat = 0.95  # GAE's lambda (InstructGPT)
    clip: PositiveFloat = 0.2  # of the ratio, eps of PPO eq. (7) (InstructGPT)
    value_clip: PositiveFloat = 0.2  # of a value's change in a step (InstructGPT)
    value_coefficient: PositiveFloat = 0.1  # weight of the value loss (Huang 2024)
    entropy_coefficient: NonNegativeFloat = 0.0  # weight of an entropy bonus (Huang 2024: none)
    reward_clip: PositiveFloat = 5.0  # of the normalised score, in standard deviations
    missing_stop_penalty: NonNegativeFloat = 1.0  # taken off the reward of an answer that does not end (Huang 2024)
    stop_kl: PositiveFloat | None = 0.05  # nats a token from pi_old at which a step's passes end; default: measured
    # its own model, from the reward model (InstructGPT); a head on the policy; or none: an answer is measured against the
    # prompt's other answers (RLOO), which takes several answers to a prompt
    critic: Literal["separate", "shared", "others"] = "separate"
    critic_learning_rate: PositiveFloat | None = None  # default: training.learning_rate, which is the policy's
    critic_warmup: NonNegativeInt = 0  # first steps in which the critic learns alone, the policy being as it was


@dataclass
class Config:
    model: Model
    data: Data
    ppo: PPO
    training: Section[transformers.TrainingArguments]
    evaluation: Evaluation
    run: Run


@dataclass
class Models:
    """Two learn, together in `learner`, and two are frozen."""

    learner: ActorCritic  # policy and critic, as accelerate prepared them
    reference: PreTrainedModel  # the policy as it was: the SFT model
    reward_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # of all four


@dataclass
class Rollout:
    """A step's B answers and what is known about them. P: tokens of the longest prompt, R: of the longest answer."""

    input_ids: Tensor  # [B, P+R], prompts padded on the left, answers on the right
    attention_mask: Tensor  # [B, P+R], 1 on real tokens
    prompt_length: int  # P
    mask: Tensor  # [B, R], 1 on an answer's real tokens, its stop token included
    logprobs: Tensor  # [B, R], under the policy that answered, pi_old
    reference: Tensor  # [B, R], under the reference
    values: Tensor  # [B, R], the critic's value before each token
    entropy: Tensor  # [B, R], of the distribution that each token was drawn from
    rewards: Tensor  # [B], normalised, clipped, penalised: what is maximised
    answers: list[str]  # B texts


# ---------------------------------------------------------------- rollouts


def collect(
    models: Models, prompts: list[list[int]], config: Config, accelerator: Accelerator, *, longest: int, seed: int
) -> Rollout:
    """Sample an answer of at most `longest` tokens to each prompt, and take all that PPO needs, without gradients.

    The log-probabilities are not those of `generate` but of the forward that training runs, on the rows and in the
    shapes of the first pass's minibatches: so the first minibatch's ratio is exactly 1, also in bf16.
    """
    import torch

    from recipes.common.generation import generate_ids
    from recipes.common.rlhf import pad, response_logits, sequence_scores, token_logprobs

    tokenizer, stop, fill = models.tokenizer, models.tokenizer.eos_token_id, models.tokenizer.pad_token_id
    with whole_policy(models.learner, accelerator) as policy:
        answers = generate_ids(
            policy, prompts, stop=[stop], pad=fill, max_new_tokens=longest, batch_size=len(prompts),
            temperature=1.0, seed=seed, bf16=config.training.bf16,
        )  # fmt: skip
    (left, left_mask), (right, mask) = pad(prompts, fill, "left"), pad(answers, fill, "right")  # [B, P], [B, R]
    ids = torch.cat([left, right], dim=1).to(accelerator.device)  # [B, P+R]
    attention = torch.cat([left_mask, mask], dim=1).to(accelerator.device)
    length, parts = left.shape[1], []
    with torch.no_grad(), accelerator.autocast():
        for rows in torch.arange(len(ids)).split(config.training.per_device_train_batch_size):
            logprobs, values, entropy = models.learner(ids[rows], attention[rows], length, with_entropy=True)
            logits = response_logits(models.reference, ids[rows], attention[rows], length).logits
            scores = sequence_scores(models.reward_model, ids[rows], attention[rows])
            parts.append((logprobs, token_logprobs(logits, ids[rows, length:]), values, entropy, scores))
    logprobs, reference, values, entropy, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(torch.isfinite(scores).all()):
        bad = scores[~torch.isfinite(scores)][0].item()
        raise UserError(f"ppo.reward_model: {config.ppo.reward_model} gave an answer the score {bad}")
    stopped = torch.tensor([answer[-1] == stop for answer in answers], device=ids.device)
    return Rollout(
        input_ids=ids,
        attention_mask=attention,
        prompt_length=length,
        mask=mask.to(ids.device),
        logprobs=logprobs,
        reference=reference,
        values=values,
        entropy=entropy,
        rewards=reward(scores, stopped, models.reward_model.config, config.ppo),
        answers=[tokenizer.decode(answer[:-1] if answer[-1] == stop else answer) for answer in answers],
    )


def reward(scores: Tensor, stopped: Tensor, scale: Any, ppo: PPO) -> Tensor:
    """What is maximised, [B]: standard deviations above held-out good answers, clipped; less if unfinished."""
    mean, std = getattr(scale, "reward_mean", 0.0), getattr(scale, "reward_std", 1.0)
    clipped = ((scores - mean) / std).clamp(-ppo.reward_clip, ppo.reward_clip)
    return clipped - ppo.missing_stop_penalty * (~stopped).float()


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


# ---------------------------------------------------------------- learning

SEEN = ("loss", "policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl")  # means over tokens


def update(
    models: Models,
    optimizer: Any,
    rollout: Rollout,
    beta: float,
    config: Config,
    accelerator: Accelerator,
    *,
    seed: int,
    critic_only: bool = False,
) -> dict[str, float]:
    """A step's passes over its answers. Returns what was seen, over the minibatches and all processes."""
    import torch

    from recipes.common import rlhf

    ppo, args, processes = config.ppo, config.training, accelerator.num_processes
    reduce = (lambda x: accelerator.reduce(x, "sum")) if processes > 1 else None
    mask = rollout.mask.float()  # [B, R]
    rewards = rlhf.token_rewards(rollout.rewards, rollout.logprobs, rollout.reference, rollout.mask, beta)  # [B, R]
    if ppo.critic == "others":  # nothing to fit: the values are 0 and stay 0
        advantages, returns = rlhf.leave_one_out_advantages(rewards, mask, ppo.answers), rollout.values  # [B, R]
    else:
        advantages, returns = rlhf.generalized_advantages(rewards, rollout.values, mask, ppo.gamma, ppo.lam)  # [B, R]
    advantages = rlhf.whiten(advantages, mask, reduce=reduce)  # [B, R]

    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []  # SEEN of each minibatch
    ratio_error = 0.0
    for minibatch in minibatches(len(mask), config, generator):
        tokens = mask[minibatch].sum()
        tokens = reduce(tokens) / processes if reduce else tokens  # of a process: DDP averages over the processes
        sums = torch.zeros(len(SEEN), device=mask.device)
        for rows in minibatch.split(args.per_device_train_batch_size):
            m = mask[rows]  # [b, R]
            with accelerator.accumulate(models.learner):
                logprobs, values, entropy = models.learner(
                    rollout.input_ids[rows],
                    rollout.attention_mask[rows],
                    rollout.prompt_length,
                    with_entropy=ppo.entropy_coefficient > 0,
                )  # [b, R] each
                policy, clipped = rlhf.policy_loss(logprobs, rollout.logprobs[rows], advantages[rows], ppo.clip)
                value, value_clipped = rlhf.value_loss(values, rollout.values[rows], returns[rows], ppo.value_clip)
                loss = ppo.value_coefficient * value + (0 if critic_only else policy)  # [b, R]
                if entropy is not None and not critic_only:
                    loss = loss - ppo.entropy_coefficient * entropy
                # the minibatch's mean over tokens: accelerate divides by the accumulation steps, the sum must not be
                accelerator.backward((loss * m).sum() / tokens * args.gradient_accumulation_steps)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(models.learner.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                moved = rlhf.kl_estimate(rollout.logprobs[rows], logprobs, "k3")  # KL(pi_old || pi)
                sums += torch.stack([(x * m).sum() for x in (loss, policy, value, clipped, value_clipped, moved)])
                if not seen:
                    ratio = torch.exp(logprobs - rollout.logprobs[rows])
                    ratio_error = max(ratio_error, ((ratio - 1) * m).abs().max().item())
        seen.append(accelerator.reduce(sums / tokens, "mean"))
        if ppo.stop_kl is not None and seen[-1][SEEN.index("update_kl")] > ppo.stop_kl:
            break
    figures = dict(zip(SEEN, torch.stack(seen).mean(dim=0).tolist(), strict=True)) | {
        "update_kl": seen[-1][SEEN.index("update_kl")].item(),  # of the last minibatch: how far the step went
        "minibatches": len(seen),
        "ratio_error": ratio_error,  # largest |rho - 1| of the first minibatch: 0, or training is not what answered
    }
    if ppo.critic != "others":
        figures["explained_variance"] = rlhf.explained_variance(rollout.values, returns, mask, reduce).item()
    return figures


def minibatches(answers: int, config: Config, generator: Any) -> Iterator[Tensor]:
    """Rows of each minibatch, pass after pass: first in the order in which `collect` took them, then shuffled."""
    import torch

    size = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    for epoch in range(config.ppo.epochs):
        yield from (torch.randperm(answers, generator=generator) if epoch else torch.arange(answers)).split(size)


def prompts_of_step(step: int, count: int, prompts: int, seed: int) -> list[int]:
    """Which prompts a step answers: pieces of a fresh permutation every epoch. A function of the step, so resumable."""
    import torch

    chosen, position = [], step * count
    while len(chosen) < count:
        epoch, offset = divmod(position + len(chosen), prompts)
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        chosen += order[offset : offset + count - len(chosen)]
    return chosen


# ---------------------------------------------------------------- before and after


def measure(
    models: Models, rows: list[dict[str, Any]], prompts: list[list[int]], config: Config, accelerator: Accelerator
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out reward, KL and length of sampled answers; where answers can be checked, exact match and the answers."""
    import torch

    from recipes.common.generation import exact_match, is_checkable

    evaluation, parts = config.evaluation, []
    for start in range(0, len(prompts), evaluation.batch_size):
        batch = prompts[start : start + evaluation.batch_size]
        rollout = collect(
            models, batch, config, accelerator, longest=evaluation.max_new_tokens, seed=config.training.seed + start
        )
        kl = ((rollout.logprobs - rollout.reference) * rollout.mask).sum(dim=1)
        parts.append(torch.stack([rollout.rewards, kl, rollout.mask.sum(dim=1).float()]))
    means = torch.cat(parts, dim=1).mean(dim=1).tolist()
    figures, answers = dict(zip(("reward", "kl", "response_length"), means, strict=True)), []
    if is_checkable(rows[0]):
        seed, bf16 = config.training.seed, config.training.bf16
        with whole_policy(models.learner, accelerator) as policy:
            right = exact_match(policy, models.tokenizer, rows, evaluation, seed=seed, bf16=bf16)
        answers = right["answers"]
        figures |= {name: right[name] for name in ("exact_match", "sampled_exact_match")}
    return figures, answers


def draw(run: RunFolder) -> None:
    """Reward beside true score, the frontier of reward and KL, and the health of policy and critic."""
    history = [row for row in run.history() if row.get("reward") is not None]
    steps = [row["step"] for row in history]

    def rewards(axes: Any) -> None:
        axes.plot(steps, [row["reward"] for row in history], "C0", label="learned reward: what is maximised")
        axes.set_xlabel("step")
        axes.set_ylabel("learned reward, standard deviations")
        lines = axes.get_lines()
        if history[0].get("true_score") is not None:
            other = axes.twinx()
            other.plot(steps, [row["true_score"] for row in history], "C1", label="true score: never trained on")
            other.set_ylabel("sampled answers that are right")
            lines = [*lines, *other.get_lines()]
        axes.legend(handles=lines, frameon=False, loc="lower right")

    def frontier(axes: Any) -> None:
        kl, learned = [row["kl"] for row in history], [row["reward"] for row in history]
        axes.figure.colorbar(axes.scatter(kl, learned, c=steps, cmap="viridis", s=18), label="step")
        axes.set_xlabel("KL from the SFT model, nats a response")
        axes.set_ylabel("learned reward")

    run.plot("reward_and_true_score", rewards)
    run.plot("frontier", frontier)
    run.plot_curve("kl", "kl", "kl_k3", label="KL from the SFT model, nats a response")
    if history[-1].get("explained_variance") is not None:
        run.plot_curve("critic", "explained_variance", "value_loss")
    run.plot_curve("policy", "entropy", "clip_fraction", "update_kl")


def side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int = 60) -> str:
    """Greedy answers to held-out prompts, SFT and PPO, those that changed first."""
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: pair[0]["greedy"] == pair[1]["greedy"])
    changed = sum(a["greedy"] != b["greedy"] for a, b in pairs)
    lines = [f"{changed} of {len(pairs)} greedy answers changed"]
    for old, new in pairs[:count]:
        lines += ["", old["prompt"]]
        for who, told in (("SFT", old), ("PPO", new)):
            lines.append(f"  {who}  {'right' if told['right'] else 'wrong'}  {told['greedy']!r}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- putting it together


def load_reward_model(config: Config, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> PreTrainedModel:
    """The reward model. Raises UserError if it is none, or if it reads other tokens than the policy writes."""
    from transformers import AutoModelForSequenceClassification

    from recipes.common.models import load_model, load_tokenizer

    name = config.ppo.reward_model
    section = Model(name=name, dtype=config.model.dtype, attention=config.model.attention)
    if load_tokenizer(section, run).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"ppo.reward_model: {name} has another tokenizer than the policy {config.model.name}, so it would score "
            "other text than was written; train one from the same base (recipes/alignment/reward_model.py)"
        )
    model = load_model(section, tokenizer, run, auto_class=AutoModelForSequenceClassification)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise UserError(
            f"ppo.reward_model: {name} gives {model.config.num_labels} labels; a reward model is a decoder with a "
            "`score` head of one, as recipes/alignment/reward_model.py makes"
        )
    return model


def encode(rows: Any, tokenizer: Any, config: Config, run: RunFolder) -> tuple[Any, list[list[int]]]:
    """Rows and the ids of their prompts, without those longer than ppo.max_prompt_length. UserError if none is left."""
    from recipes.common.rlhf import prompt_ids

    prompts, limit = [prompt_ids(tokenizer, messages) for messages in rows["prompt"]], config.ppo.max_prompt_length
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
    if not kept:
        raise UserError(f"ppo.max_prompt_length: every one of {len(prompts)} prompts is longer than {limit} tokens")
    if len(kept) < len(prompts):
        run.say(f"  {len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {limit} tokens: left out")
    return rows.select(kept), [prompts[i] for i in kept]


def check(config: Config, longest_prompt: int, policy: PreTrainedModel, processes: int) -> None:
    """Raise UserError where the batch sizes do not divide, or a prompt and its answer do not fit the model."""
    from recipes.common.generation import model_positions

    ppo, args, problems = config.ppo, config.training, []
    minibatch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if ppo.rollouts % minibatch:
        problems.append(
            f"ppo.rollouts: {ppo.rollouts} is not a multiple of the minibatch of {minibatch}: "
            f"per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {processes} process(es)"
        )
    if ppo.rollouts % (ppo.answers * processes):
        problems.append(
            f"ppo.answers: {ppo.rollouts} rollouts cannot be {ppo.answers} answers to each prompt on {processes} process(es)"
        )
    if ppo.critic == "others" and (ppo.answers < 2 or ppo.critic_warmup):
        problems.append("ppo.critic: others has nothing to warm up, and needs ppo.answers of 2 or more to compare")
    places = model_positions(policy)
    for section, longest in (("ppo", ppo.max_new_tokens), ("evaluation", config.evaluation.max_new_tokens)):
        if places and longest_prompt + longest > places:
            problems.append(
                f"{section}.max_new_tokens: {longest} after a prompt of {longest_prompt} tokens is more than the "
                f"model's {places} positions: lower it, or ppo.max_prompt_length"
            )
    if problems:
        raise UserError(problems)


def freeze(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Ready to be asked, never to learn; under DeepSpeed in an engine of its own, which ZeRO-3 shards."""
    model.requires_grad_(False).eval()
    if accelerator.state.deepspeed_plugin is None:
        return model.to(accelerator.device)
    from trl.models.utils import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


def count_accumulation(accelerator: Accelerator) -> Accelerator:
    """Accumulate by count alone: no DataLoader drives this loop, nor may one that a Trainer left in this process."""
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return accelerator


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Data, four models, measure, answer and learn step by step, measure again, save."""
    import torch
    from transformers import Trainer, get_scheduler

    from recipes.common import rlhf
    from recipes.common.data import load_data
    from recipes.common.generation import is_checkable
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.preflight import preflight
    from recipes.common.training import Loop, make_accelerator

    ppo, args = config.ppo, config.training
    if args.fsdp:
        raise UserError("ppo: FSDP cannot generate between updates; use LAUNCH=ddp, zero2 or zero3")
    accelerator = count_accumulation(make_accelerator(args))
    rank, processes = accelerator.process_index, accelerator.num_processes

    # prompts only: answers that stand beside them in the data are not looked at
    tokenizer = load_tokenizer(config.model, run, chat=True)
    data = load_data(config.data, "prompt")
    rows, prompts = encode(data["train"], tokenizer, config, run)
    held_out = data["validation"].select(range(min(len(data["validation"]), config.evaluation.max_samples)))
    held_out, held_out_prompts = encode(held_out, tokenizer, config, run)

    policy = load_model(config.model, tokenizer, run)
    check(config, max(map(len, prompts + held_out_prompts)), policy, processes)
    reward_model = load_reward_model(config, tokenizer, run)
    critic = load_reward_model(config, tokenizer, run) if ppo.critic == "separate" else None
    learner = rlhf.ActorCritic(policy, critic, reward_model.config)
    if ppo.critic == "others":
        learner.head.requires_grad_(False)  # stays 0: there is no critic
    rlhf.disable_dropout(learner)
    if args.gradient_checkpointing:
        for model in filter(None, (policy, critic)):
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    asked_a_step = ppo.rollouts // ppo.answers
    steps = args.max_steps if args.max_steps > 0 else max(1, round(args.num_train_epochs * len(prompts) / asked_a_step))
    asked = [prompt + [tokenizer.eos_token_id] * ppo.max_new_tokens for prompt in prompts[: ppo.rollouts // processes]]
    ids, mask = rlhf.pad(asked, tokenizer.pad_token_id, "left")
    preflight(run, learner, {"input_ids": ids, "attention_mask": mask}, args=args, total_steps=steps)

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)
    policy_rate, critic_rate = options.pop("lr"), ppo.critic_learning_rate or args.learning_rate
    critics = [p for name, p in learner.named_parameters() if p.requires_grad and not name.startswith("policy.")]
    groups = [{"params": policy.parameters(), "lr": policy_rate}, {"params": critics, "lr": critic_rate}]
    groups = groups if critics else groups[:1]
    optimizer = optimizer_class(groups, **{"weight_decay": args.weight_decay, **options})
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:  # what accelerate would read off a DataLoader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    learner, optimizer = accelerator.prepare(learner, optimizer)
    beta = rlhf.KLCoefficient(ppo.kl_coefficient, ppo.kl_target)
    accelerator.register_for_checkpointing(scheduler, beta)
    reference = load_model(config.model, tokenizer, run)
    models = Models(learner, freeze(reference, accelerator), freeze(reward_model, accelerator), tokenizer)

    before, answers_before = measure(models, held_out.to_list(), held_out_prompts, config, accelerator)
    run.say("before  " + "  ".join(f"{name} {value:.4g}" for name, value in before.items()))

    loop = Loop(run, args, accelerator, total_steps=steps, time_limit_minutes=config.run.time_limit_minutes)
    for step in loop:
        chosen = prompts_of_step(step, ppo.rollouts // ppo.answers, len(prompts), args.seed)[rank::processes]
        chosen = [i for i in chosen for _ in range(ppo.answers)]
        seed = args.seed + processes * step + rank
        rollout = collect(
            models, [prompts[i] for i in chosen], config, accelerator, longest=ppo.max_new_tokens, seed=seed
        )
        figures = update(
            models, optimizer, rollout, beta.value, config, accelerator, seed=seed, critic_only=step < ppo.critic_warmup
        )

        mask = rollout.mask.float()
        kl, kl_k3 = (rlhf.kl_estimate(rollout.logprobs, rollout.reference, kind) * mask for kind in ("k1", "k3"))
        seen = {
            "reward": rollout.rewards.mean(),
            "kl": kl.sum(dim=1).mean(),
            "kl_k3": kl_k3.sum(dim=1).mean(),
            "entropy": rlhf.masked_mean(rollout.entropy, mask),
            "response_length": mask.sum(dim=1).mean(),
        }
        if is_checkable(rows[0]):
            right = [tasks_check(rows[i], text) for i, text in zip(chosen, rollout.answers, strict=True)]
            seen["true_score"] = mask.new_tensor(right).mean()
        means = accelerator.reduce(torch.stack(list(seen.values())), "mean").tolist()
        figures |= dict(zip(seen, means, strict=True))
        figures |= {"kl_coefficient": beta.value, "learning_rate": scheduler.get_last_lr()[0]}
        beta.update(figures["kl"])
        scheduler.step()
        if step % max(1, steps // 8) == 0:
            run.sample(f"step_{step + 1:05d}.txt", sampled(rows.select(chosen[:20]), rollout))
        loop.log(figures.pop("loss"), rollout.input_ids.numel(), **figures)

    after, answers_after = measure(models, held_out.to_list(), held_out_prompts, config, accelerator)
    with whole_policy(learner, accelerator) as policy:
        run.save_model(policy, tokenizer)
    draw(run)
    if answers_after:
        run.sample("before_and_after.txt", side_by_side(answers_before, answers_after))
    return {
        **{name: value for name, value in after.items() if name not in ("reward", "response_length")},
        **{f"baseline_{name}": before[name] for name in ("exact_match", "sampled_exact_match") if name in before},
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "response_length_before": before["response_length"],
        "response_length_after": after["response_length"],
    }


def tasks_check(row: dict[str, Any], text: str) -> bool:
    """Whether an answer to a builtin task is right. Only ever reported."""
    from recipes.common.builtin.tasks import check

    return check(row, text)


def sampled(rows: Any, rollout: Rollout) -> str:
    """Some of a step's prompts with their sampled answers and rewards."""
    return "".join(
        f"{row['prompt'][-1]['content']}\n  {value:+.2f}  {text!r}\n"
        for row, value, text in zip(rows, rollout.rewards.tolist(), rollout.answers, strict=False)
    )


if __name__ == "__main__":
    run_recipe(main, Config)
