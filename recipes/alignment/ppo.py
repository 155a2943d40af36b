"""PPO: improve a chat model against a learned reward, without straying far from where it started.

    objective(pi) = E_{x, y ~ pi} [ r(x, y) - beta log( pi(y|x) / pi_SFT(y|x) ) ]           InstructGPT eq. (2)
    A_t           = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t         GAE eq. (16)
    loss          = - E_t min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ),  rho_t = pi / pi_old    PPO eq. (7)

Each step answers a batch of prompts with the current policy (rollout), scores the answers with the frozen reward model, makes
token rewards of score and KL penalty, advantages of rewards and the critic's values, and takes a few passes of clipped
updates over them. The true score, where the task has a checker, is reported and never trained on.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; the details
follow Huang et al. 2024, "The N+ implementation details of RLHF with PPO", https://arxiv.org/abs/2403.17031

    make ppo                                       # laptop, offline, 3 minutes, from `make full` and `make reward_model`
    make ppo CONFIG=gpu                            # one GPU, a public model and reward model
    make ppo CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node

Laptop result: RESULTS.md#ppo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes.common.rlhf import ActorCritic


@dataclass
class PPO:
    """PPO's own knobs; a minibatch is training.per_device_train_batch_size x gradient_accumulation_steps a process."""

    reward_model: str = "runs/reward_model/default/model"  # folder or hub id: sequence classification, one label
    rollouts: PositiveInt = 512  # prompts answered in a step, over all processes (InstructGPT)
    max_prompt_length: PositiveInt = 512  # tokens; longer prompts are left out
    max_new_tokens: PositiveInt = 53  # longest answer, in tokens (Stiennon 2020; Huang 2024)
    epochs: PositiveInt = 4  # passes over the rollouts of a step (Huang 2024; InstructGPT 1)
    kl_coefficient: NonNegativeFloat = 0.02  # beta: reward lost per nat from the reference (InstructGPT)
    kl_target: PositiveFloat | None = (
        None  # nats a response that beta is steered to (Ziegler 2019); None: beta is fixed
    )
    gamma: float = 1.0  # no discount (InstructGPT)
    lam: float = 0.95  # GAE's lambda (InstructGPT, Huang 2024)
    clip: PositiveFloat = 0.2  # the ratio's, eps of PPO eq. (7) (InstructGPT, Huang 2024)
    value_clip: PositiveFloat = 0.2  # of the critic's change in a step (InstructGPT, Huang 2024)
    value_coefficient: PositiveFloat = 0.1  # weight of the value loss (Huang 2024)
    entropy_coefficient: NonNegativeFloat = 0.0  # weight of an entropy bonus (Huang 2024: none)
    reward_clip: PositiveFloat = 5.0  # of the normalised reward, in standard deviations (Ziegler 2019)
    missing_stop_penalty: NonNegativeFloat = 1.0  # taken off the reward of an answer that does not end (Huang 2024)
    stop_kl: PositiveFloat | None = (
        0.1  # end a step's passes once pi is this far from pi_old, nats a token; None: never
    )
    critic: Literal["separate", "shared"] = "separate"  # a model started from the reward model, or a head on the policy


@dataclass
class Config:
    model: Model
    data: Data
    ppo: PPO
    training: Section["transformers.TrainingArguments"]  # noqa: F821, UP037
    evaluation: Evaluation
    run: Run


@dataclass
class Rollout:
    """Answers of one step and what is known about them. B responses, P prompt tokens, R response tokens."""

    input_ids: Tensor  # [B, P+R], the prompt padded on the left, the response on the right
    attention_mask: Tensor  # [B, P+R], 1 on real tokens
    prompt_length: int  # P
    mask: Tensor  # [B, R], 1 on the response's real tokens, its stop token included
    logprobs: Tensor  # [B, R], of the policy that answered: pi_old
    reference: Tensor  # [B, R], the same tokens' log-probabilities under the frozen SFT model
    values: Tensor  # [B, R], the critic's value before each token
    entropy: Tensor  # [B, R], of the policy's distribution each token was drawn from
    scores: Tensor  # [B], normalised, clipped, penalised: what is maximised
    answers: list[str]  # B texts, without special tokens


class KLController:
    """beta, fixed or steered to a target (Ziegler section 2.2); checkpointed with the run."""

    def __init__(self, coefficient: float, target: float | None):
        self.coefficient, self.target = coefficient, target

    def update(self, kl: float) -> None:
        """`kl`: mean nats a response of the step that was just taken."""
        from recipes.common.rlhf import next_kl_coefficient

        if self.target is not None:
            self.coefficient = next_kl_coefficient(self.coefficient, kl, self.target)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


# ---------------------------------------------------------------- rollouts


def answer(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    sample: bool,
) -> tuple[Tensor, Tensor, int]:
    """Continue the prompts, all at once and with the KV cache: input_ids, attention_mask [B, P+R], and P.

    Samples from the policy's own distribution (temperature 1, no top-k, no top-p), since that is the one whose
    log-probabilities are taken; or, for an evaluation, greedily.
    """
    import torch
    from transformers import GenerationConfig

    from recipes.common.rlhf import pad, response_mask

    ids, mask = (t.to(policy.device) for t in pad(prompts, tokenizer.pad_token_id, "left"))
    plain = GenerationConfig(
        do_sample=sample,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
    )
    own, policy.generation_config = policy.generation_config, plain  # generate fills what is unset from the model's own
    try:
        sequences = policy.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
    finally:
        policy.generation_config = own
    prompt_length = ids.shape[1]
    answered = response_mask(sequences[:, prompt_length:], tokenizer.eos_token_id)
    return sequences, torch.cat([mask, answered.long()], dim=1), prompt_length


def collect(
    model: ActorCritic,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    accelerator: Accelerator,
    max_new_tokens: int,
) -> Rollout:
    """Answer the prompts, then take everything that PPO needs to know about the answers, without gradients.

    The log-probabilities are not those of `generate` but of the forward that training uses, on the same rows in the same
    shape as the first pass's minibatches: so the first minibatch's ratio is 1 exactly, also in bf16.
    """
    import torch

    from recipes.common.rlhf import response_logits, sequence_scores, token_logprobs

    model.eval()
    with torch.no_grad(), accelerator.autocast():
        with policy_for_generation(model, accelerator) as policy:
            ids, attention, length = answer(policy, prompts, tokenizer, max_new_tokens, sample=True)
        parts = []
        for rows in torch.arange(len(ids)).split(config.training.per_device_train_batch_size):
            logprobs, values, entropy = model(ids[rows], attention[rows], length, with_entropy=True)
            logits = response_logits(reference, ids[rows], attention[rows], length).logits
            scores = sequence_scores(reward_model, ids[rows], attention[rows])
            parts.append((logprobs, token_logprobs(logits, ids[rows, length:]), values, entropy, scores))
    model.train()
    logprobs, reference_logprobs, values, entropy, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(torch.isfinite(scores).all()):
        raise UserError(
            f"ppo.reward_model: {config.ppo.reward_model} scored an answer as {scores[~scores.isfinite()][0]}"
        )
    mask = attention[:, length:]
    stopped = (ids[:, length:] == tokenizer.eos_token_id).any(dim=1)
    return Rollout(
        input_ids=ids,
        attention_mask=attention,
        prompt_length=length,
        mask=mask,
        logprobs=logprobs,
        reference=reference_logprobs,
        values=values,
        entropy=entropy,
        scores=normalised(scores, stopped, reward_model.config, config.ppo),
        answers=decode(tokenizer, ids[:, length:], mask),
    )


def normalised(scores: Tensor, stopped: Tensor, reward_config: Any, ppo: PPO) -> Tensor:
    """The reward that is maximised: (score - mean) / std of the reward model's held-out answers, clipped; less if unfinished."""
    mean, std = getattr(reward_config, "reward_mean", 0.0), getattr(reward_config, "reward_std", 1.0)
    clipped = ((scores - mean) / std).clamp(-ppo.reward_clip, ppo.reward_clip)
    return clipped - ppo.missing_stop_penalty * (~stopped).float()


@contextmanager
def policy_for_generation(model: ActorCritic, accelerator: Accelerator) -> Iterator[PreTrainedModel]:
    """The bare policy, ready to generate; under ZeRO-3 its weights are gathered meanwhile."""
    policy = accelerator.unwrap_model(model).policy
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        yield policy
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(policy.parameters())):
        yield policy


# ---------------------------------------------------------------- learning


def update(
    model: ActorCritic,
    optimizer: Any,
    rollout: Rollout,
    beta: float,
    config: Config,
    accelerator: Accelerator,
    generator: Any,
) -> dict[str, float]:
    """A step's passes over its rollouts; returns the means of what was seen, over minibatches and processes."""
    import torch

    from recipes.common import rlhf

    ppo, args = config.ppo, config.training
    several = accelerator.num_processes > 1
    reduce = (lambda x: accelerator.reduce(x, "sum")) if several else None
    mask = rollout.mask.float()  # [B, R]

    rewards = rlhf.token_rewards(rollout.scores, rollout.logprobs, rollout.reference, rollout.mask, beta)  # [B, R]
    advantages, returns = rlhf.generalized_advantages(rewards, rollout.values, mask, ppo.gamma, ppo.lam)  # [B, R]
    whitened = rlhf.whiten(advantages, mask, reduce=reduce)  # [B, R]

    micro, minibatch_size = (
        args.per_device_train_batch_size,
        args.per_device_train_batch_size * args.gradient_accumulation_steps,
    )
    seen: list[Tensor] = []  # a row of STATISTICS a minibatch
    ratio_error = 0.0
    for epoch in range(ppo.epochs):
        # The first pass goes through the rollouts in the order, and so in the shapes, that `collect` went through them.
        order = torch.arange(len(mask)) if epoch == 0 else torch.randperm(len(mask), generator=generator)
        for minibatch in order.split(minibatch_size):
            count = mask[minibatch].sum()  # tokens of the minibatch ...
            count = reduce(count) / accelerator.num_processes if reduce else count  # ... a process: DDP takes the mean
            totals = torch.zeros(len(STATISTICS), device=mask.device)
            for rows in minibatch.split(micro):
                m = mask[rows]  # [b, R]
                with accelerator.accumulate(model):
                    logprobs, values, entropy = model(
                        rollout.input_ids[rows],
                        rollout.attention_mask[rows],
                        rollout.prompt_length,
                        with_entropy=ppo.entropy_coefficient > 0,
                    )  # [b, R] each
                    policy, clipped = rlhf.policy_loss(logprobs, rollout.logprobs[rows], whitened[rows], ppo.clip)
                    value, value_clipped = rlhf.value_loss(values, rollout.values[rows], returns[rows], ppo.value_clip)
                    loss = policy + ppo.value_coefficient * value  # [b, R]
                    if entropy is not None:
                        loss = loss - ppo.entropy_coefficient * entropy
                    # accelerate divides by the accumulation steps, but the sum over the minibatch is divided already
                    accelerator.backward((loss * m).sum() / count * args.gradient_accumulation_steps)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    # KL(pi_old || pi), since the tokens were drawn from pi_old
                    moved = rlhf.kl_estimate(rollout.logprobs[rows], logprobs, "k3")
                    totals += torch.stack([(x * m).sum() for x in (loss, policy, value, clipped, value_clipped, moved)])
                    if not seen:
                        ratio_error = max(
                            ratio_error, ((logprobs - rollout.logprobs[rows]).exp() - 1).mul(m).abs().max().item()
                        )
            means = totals / count
            seen.append(accelerator.reduce(means, "mean") if several else means)
            if ppo.stop_kl is not None and seen[-1][STATISTICS.index("update_kl")] > ppo.stop_kl:
                break
        else:
            continue
        break
    figures = dict(zip(STATISTICS, torch.stack(seen).mean(dim=0).tolist(), strict=True))
    return figures | {
        "update_kl": seen[-1][STATISTICS.index("update_kl")].item(),  # of the last minibatch: how far the step went
        "minibatches": len(seen),
        "ratio_error": ratio_error,  # |rho - 1| of the first minibatch: 0, or rollout and training disagree
        "explained_variance": rlhf.explained_variance(rollout.values, returns, mask, reduce).item(),
    }


STATISTICS = (
    "loss",
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "update_kl",
)  # means over tokens


def prompts_of_step(step: int, count: int, prompts: int, seed: int) -> list[int]:
    """Which prompts a step answers: successive pieces of a fresh permutation every epoch. A function of the step alone."""
    import torch

    def place(position: int) -> int:
        epoch, offset = divmod(position, prompts)
        return int(torch.randperm(prompts, generator=torch.Generator().manual_seed(seed + epoch))[offset])

    return [place(position) for position in range(step * count, (step + 1) * count)]


# ---------------------------------------------------------------- evaluation


def measure(
    model: ActorCritic,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    accelerator: Accelerator,
) -> tuple[dict[str, float], list[str]]:
    """Reward, KL and length of sampled answers, the true score of sampled and of greedy ones; and the greedy answers."""
    import torch

    def mean(parts: list[Tensor]) -> float:
        return torch.cat(parts).mean().item()

    sampled: list[str] = []
    greedy: list[str] = []
    rewards, kl, lengths = [], [], []
    size, longest = config.evaluation.batch_size, config.evaluation.max_new_tokens
    with torch.random.fork_rng():  # training goes on with the random numbers that it would have had
        torch.manual_seed(config.training.seed)
        for start in range(0, len(held_out.prompts), size):
            prompts = held_out.prompts[start : start + size]
            rollout = collect(model, reference, reward_model, prompts, tokenizer, config, accelerator, longest)
            sampled += rollout.answers
            rewards.append(rollout.scores)
            kl.append(((rollout.logprobs - rollout.reference) * rollout.mask).sum(dim=1))
            lengths.append(rollout.mask.sum(dim=1).float())
            with torch.no_grad(), accelerator.autocast(), policy_for_generation(model, accelerator) as policy:
                ids, attention, length = answer(policy, prompts, tokenizer, longest, sample=False)
            greedy += decode(tokenizer, ids[:, length:], attention[:, length:])
    figures = {"reward": mean(rewards), "kl": mean(kl), "response_length": mean(lengths)}
    if held_out.check is not None:
        figures["exact_match"] = sum(map(held_out.check, held_out.rows, greedy)) / len(greedy)
        figures["sampled_exact_match"] = sum(map(held_out.check, held_out.rows, sampled)) / len(sampled)
    return figures, greedy


@dataclass
class HeldOut:
    """Prompts that PPO never trains on, and how to check an answer to them, if it can be checked."""

    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    check: Callable[[dict[str, Any], str], bool] | None


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor) -> list[str]:
    """Texts of the real tokens of each row, without special tokens."""
    real = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(real, skip_special_tokens=True)


# ---------------------------------------------------------------- models, data, plots


def load_reward_model(config: Config, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> PreTrainedModel:
    """The frozen reward model. Raises UserError if it is none, or if it reads other tokens than the policy writes."""
    from transformers import AutoModelForSequenceClassification

    from recipes.common.models import load_model, load_tokenizer

    section = Model(name=config.ppo.reward_model, dtype=config.model.dtype, attention=config.model.attention)
    if load_tokenizer(section, run).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"ppo.reward_model: {section.name} has another tokenizer than the policy {config.model.name}: it would score other "
            "text than was written. Train a reward model from the same base (recipes/alignment/reward_model.py)"
        )
    model = load_model(section, tokenizer, run, auto_class=AutoModelForSequenceClassification)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise UserError(
            f"ppo.reward_model: {section.name} gives {model.config.num_labels} labels; a reward model is a decoder with a `score` "
            "head of 1 (recipes/alignment/reward_model.py makes one)"
        )
    return model


def encode_prompts(
    rows: Any, tokenizer: PreTrainedTokenizerBase, config: Config, run: RunFolder
) -> tuple[Any, list[list[int]]]:
    """Rows and their prompts' ids, without those that are longer than ppo.max_prompt_length."""
    from recipes.common.rlhf import prompt_ids

    prompts = [prompt_ids(tokenizer, messages) for messages in rows["prompt"]]
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= config.ppo.max_prompt_length]
    if not kept:
        raise UserError(
            f"ppo.max_prompt_length: every one of {len(prompts)} prompts is longer than {config.ppo.max_prompt_length} tokens"
        )
    if len(kept) < len(prompts):
        run.say(
            f"  {len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {config.ppo.max_prompt_length} tokens: left out"
        )
    return rows.select(kept), [prompts[i] for i in kept]


def check_sizes(config: Config, longest_prompt: int, model_config: Any, processes: int) -> None:
    """Raise UserError where the batch sizes do not divide, or a prompt and its answer do not fit the model."""
    ppo, args, problems = config.ppo, config.training, []
    minibatch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if ppo.rollouts % minibatch:
        problems.append(
            f"ppo.rollouts: {ppo.rollouts} is not a multiple of the minibatch of {minibatch} (training.per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x {processes} processes)"
        )
    for name, longest in (("ppo", ppo.max_new_tokens), ("evaluation", config.evaluation.max_new_tokens)):
        if (places := getattr(model_config, "max_position_embeddings", None)) and longest_prompt + longest > places:
            problems.append(
                f"{name}.max_new_tokens: {longest} after a prompt of {longest_prompt} tokens is more than the model's {places} "
                "positions: lower it, or ppo.max_prompt_length"
            )
    if config.evaluation.temperature != 1:
        problems.append("evaluation.temperature: leave it at 1: KL and reward are measured on the policy's own samples")
    if problems:
        raise UserError(problems)


def draw_plots(run: RunFolder) -> None:
    """Reward beside true score, KL, the frontier of the two, and the health of the optimisation."""
    history = [row for row in run.history() if row.get("reward") is not None]
    steps = [row["step"] for row in history]

    def reward(axes: Any) -> None:
        axes.plot(steps, [row["reward"] for row in history], "C0", label="learned reward (what is maximised)")
        axes.set_xlabel("step")
        axes.set_ylabel("learned reward, standard deviations")
        handles = axes.get_lines()
        if history and history[0].get("true_score") is not None:
            other = axes.twinx()
            other.plot(steps, [row["true_score"] for row in history], "C1", label="true score (never trained on)")
            other.set_ylabel("share of sampled answers that are right")
            handles = [*handles, *other.get_lines()]
        axes.legend(handles=handles, frameon=False, loc="lower right")

    def frontier(axes: Any) -> None:
        points = axes.scatter(
            [row["kl"] for row in history], [row["reward"] for row in history], c=steps, cmap="viridis", s=18
        )
        axes.figure.colorbar(points, label="step")
        axes.set_xlabel("KL from the SFT model, nats a response")
        axes.set_ylabel("learned reward")

    run.plot("reward_and_true_score", reward)
    run.plot("frontier", frontier)
    run.plot_curve("kl", "kl", "kl_k3", label="KL from the SFT model, nats a response")
    run.plot_curve("critic", "explained_variance", "value_loss")
    run.plot_curve("policy", "entropy", "clip_fraction", "update_kl")


def before_and_after(held_out: HeldOut, before: list[str], after: list[str], count: int = 40) -> str:
    """Held-out prompts with the greedy answers of both models, where they differ first; + right, - wrong."""

    def mark(row: dict[str, Any], text: str) -> str:
        return "" if held_out.check is None else "+ " if held_out.check(row, text) else "- "

    order = sorted(range(len(before)), key=lambda i: before[i] == after[i])[:count]
    lines = [f"{sum(a != b for a, b in zip(before, after, strict=True))} of {len(before)} greedy answers changed\n"]
    for i in order:
        row = held_out.rows[i]
        lines += [
            row["prompt"][-1]["content"],
            f"  SFT  {mark(row, before[i])}{before[i]!r}",
            f"  PPO  {mark(row, after[i])}{after[i]!r}",
        ]
    return "\n".join(lines) + "\n"


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Train the policy; held-out figures before and after."""
    import torch
    from transformers import Trainer, get_scheduler

    from recipes.common.data import load_data
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.preflight import preflight
    from recipes.common.rlhf import ActorCritic, disable_dropout, kl_estimate, masked_mean
    from recipes.common.training import Loop, make_accelerator

    ppo, args = config.ppo, config.training
    accelerator = count_accumulation(make_accelerator(args))
    rank, processes = accelerator.process_index, accelerator.num_processes

    # data: prompts only; what answers stand beside them is not looked at
    tokenizer = load_tokenizer(config.model, run, chat=True)
    data = load_data(config.data, "prompt")
    rows, prompts = encode_prompts(data["train"], tokenizer, config, run)
    held_out_rows = data["validation"].select(range(min(len(data["validation"]), config.evaluation.max_samples)))
    held_out_rows, held_out_prompts = encode_prompts(held_out_rows, tokenizer, config, run)
    check = checker(held_out_rows)
    held_out = HeldOut(held_out_rows.to_list(), held_out_prompts, check)

    # four models: policy and critic learn, reference and reward model are frozen
    policy = load_model(config.model, tokenizer, run)
    check_sizes(config, max(map(len, prompts + held_out_prompts)), policy.config, processes)
    reference = load_model(config.model, tokenizer, run)
    reward_model = load_reward_model(config, tokenizer, run)
    critic = load_reward_model(config, tokenizer, run) if ppo.critic == "separate" else None
    mean, std = getattr(reward_model.config, "reward_mean", 0.0), getattr(reward_model.config, "reward_std", 1.0)
    model = ActorCritic(policy, critic, mean, std)
    disable_dropout(model)
    for frozen in (reference, reward_model):
        frozen.requires_grad_(False).eval().to(accelerator.device)
    if args.gradient_checkpointing:
        for learner in (policy, critic):
            if learner is not None:
                learner.gradient_checkpointing_enable()

    steps = args.max_steps if args.max_steps > 0 else max(1, round(args.num_train_epochs * len(prompts) / ppo.rollouts))
    batch = check_batch_of(prompts[: args.per_device_train_batch_size], tokenizer, ppo.max_new_tokens)
    preflight(run, model, batch, args=args, total_steps=steps)

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)
    optimizer = kind(model.parameters(), weight_decay=args.weight_decay, **options)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:  # what it would read off a DataLoader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    controller = KLController(ppo.kl_coefficient, ppo.kl_target)
    accelerator.register_for_checkpointing(scheduler, controller)

    before, answers_before = measure(model, reference, reward_model, held_out, tokenizer, config, accelerator)
    run.say("before: " + "  ".join(f"{name} {value:.4f}" for name, value in before.items()))

    loop = Loop(run, args, accelerator, total_steps=steps, time_limit_minutes=config.run.time_limit_minutes)
    for step in loop:
        chosen = prompts_of_step(step, ppo.rollouts, len(prompts), args.seed)[rank::processes]
        rollout = collect(
            model,
            reference,
            reward_model,
            [prompts[i] for i in chosen],
            tokenizer,
            config,
            accelerator,
            ppo.max_new_tokens,
        )
        generator = torch.Generator().manual_seed(args.seed + step)
        figures = update(model, optimizer, rollout, controller.coefficient, config, accelerator, generator)
        scheduler.step()

        mask = rollout.mask.float()
        seen = {
            "reward": rollout.scores.mean(),
            "kl": (kl_estimate(rollout.logprobs, rollout.reference, "k1") * mask).sum(dim=1).mean(),
            "kl_k3": (kl_estimate(rollout.logprobs, rollout.reference, "k3") * mask).sum(dim=1).mean(),
            "entropy": masked_mean(rollout.entropy, mask),
            "response_length": mask.sum(dim=1).mean(),
        }
        if check is not None:
            right = [check(rows[i], text) for i, text in zip(chosen, rollout.answers, strict=True)]
            seen["true_score"] = mask.new_tensor(right).mean()
        seen = dict(zip(seen, accelerator.reduce(torch.stack(list(seen.values())), "mean").tolist(), strict=True))
        if step % max(1, steps // 10) == 0:
            run.sample(f"step_{step + 1:05d}.txt", rollout_sample(rows.select(chosen[:16]), rollout))
        loop.log(
            figures.pop("loss"), rollout.input_ids.numel(), **seen, **figures,
            kl_coefficient=controller.coefficient, learning_rate=scheduler.get_last_lr()[0],
        )  # fmt: skip
        controller.update(seen["kl"])

    after, answers_after = measure(model, reference, reward_model, held_out, tokenizer, config, accelerator)
    run.save_model(accelerator.unwrap_model(model).policy, tokenizer)
    draw_plots(run)
    run.sample("before_and_after.txt", before_and_after(held_out, answers_before, answers_after))
    return {
        "reward_before": before.pop("reward"),
        "reward_after": after.pop("reward"),
        "kl": after.pop("kl"),
        "kl_before": before.pop("kl"),
        **after,
        **{f"baseline_{name}": value for name, value in before.items()},
    }


def count_accumulation(accelerator: Accelerator) -> Accelerator:
    """Accumulate gradients by count alone: no DataLoader drives this loop, nor may one that a Trainer left in this process."""
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return accelerator


def checker(rows: Any) -> Callable[[dict[str, Any], str], bool] | None:
    """The exact checker of the builtin tasks, where the rows are such; None for data whose answers cannot be checked."""
    from recipes.common.builtin.tasks import check

    return check if {"task", "answer"} <= set(rows.column_names) else None


def check_batch_of(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Tensor]:
    """A batch in the shape that training will see, for the preflight: prompts, then room for the longest answers."""
    import torch

    from recipes.common.rlhf import pad

    ids, mask = pad([prompt + [tokenizer.eos_token_id] * longest for prompt in prompts], tokenizer.pad_token_id, "left")
    return {"input_ids": ids, "attention_mask": torch.as_tensor(mask)}


def rollout_sample(rows: Any, rollout: Rollout) -> str:
    """Some of a step's prompts and sampled answers, with their reward."""
    return "".join(
        f"{row['prompt'][-1]['content']}\n  {score:+.2f}  {text!r}\n"
        for row, score, text in zip(rows, rollout.scores.tolist(), rollout.answers, strict=False)
    )


if __name__ == "__main__":
    run_recipe(main, Config)
