"""PPO: improve a chat model against a learned reward, without straying far from where it started.

    objective = E_{x, y ~ pi} [ r(x, y) - beta log( pi(y|x) / pi_SFT(y|x) ) ]              InstructGPT eq. (2)
                + gamma E_{x ~ pretraining} [ log pi(x) ]                                  PPO-ptx, off by default
    A_t       = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t            GAE eq. (16)
    loss      = - E_t min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ),  rho_t = pi / pi_old     PPO eq. (7)

A step answers a batch of prompts with the current policy, scores the answers with the frozen reward model, a function
that can check them, or both, spreads score and KL penalty over the tokens, turns these and the critic's values into
advantages, and takes a few passes of clipped updates over them. The true score, where the task has a checker, is
reported, and trained on only where it is named as the reward function.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; InstructGPT: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155;
RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; dynamic sampling: DAPO, Yu et al. 2025,
https://arxiv.org/abs/2503.14476; details as in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
https://arxiv.org/abs/2403.17031

    make ppo                                       # laptop, offline, 3 to 5 minutes, after `make full`, `make reward_model`
    make ppo CONFIG=verifiable                     # laptop: the tasks' checker is the reward, after `make full`; 5 minutes
    make ppo CONFIG=gpu                            # one GPU, a public model and a reward model from it
    make ppo CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Laptop result: RESULTS.md#ppo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import ClosedUnitInterval, Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import peft
    import transformers
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel

    from recipes.common.ppo_rollout import Answers, Models, Rollout


@dataclass
class PPO:
    """PPO's own knobs; a minibatch is training.per_device_train_batch_size x gradient_accumulation_steps a process."""

    # folder or hub id: sequence classification with one label; null: the reward is the function alone
    reward_model: str | None = "runs/reward_model/default/model"
    # a name of recipes/common/verifiable_rewards.py, or module:function of your own; added to the reward model's score
    reward_function: str | None = None
    rollouts: PositiveInt = 512  # answers in a step, over all processes (InstructGPT)
    answers: PositiveInt = 1  # to each prompt of a step
    oversample: PositiveInt = (
        1  # times as many prompts are answered; learned from: those with the largest spread of reward
    )
    engine: Literal["transformers", "vllm"] = (
        "transformers"  # what answers; vllm needs a GPU, and is not resumed exactly
    )
    max_prompt_length: PositiveInt = 512  # tokens; longer prompts are left out (Huang 2024)
    max_new_tokens: PositiveInt = 53  # longest answer, in tokens (Huang 2024)
    epochs: PositiveInt = 4  # passes over a step's answers (Huang 2024; InstructGPT: 1)
    kl_coefficient: NonNegativeFloat = 0.02  # beta: reward lost for a nat away from the reference (InstructGPT)
    # of the penalty, a token at a time; k1's gradient as a reward is KL's, the others' is not: recipes/common/rlhf.py
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: PositiveFloat | None = None  # nats a response that beta is steered to (Ziegler 2019); default: fixed
    gamma: ClosedUnitInterval = 1.0  # no discount (InstructGPT)
    lam: ClosedUnitInterval = 0.95  # GAE's lambda (InstructGPT)
    clip: PositiveFloat = 0.2  # of the ratio, eps of PPO eq. (7) (InstructGPT)
    value_clip: PositiveFloat = 0.2  # of a value's change in a step (InstructGPT)
    value_coefficient: PositiveFloat = 0.1  # weight of the value loss (Huang 2024)
    entropy_coefficient: NonNegativeFloat = 0.0  # weight of an entropy bonus (Huang 2024: none)
    reward_clip: PositiveFloat = 5.0  # of the normalised score, in standard deviations
    missing_stop_penalty: NonNegativeFloat = 1.0  # taken off the reward of an answer that does not end (Huang 2024)
    length_penalty: NonNegativeFloat = 0.0  # taken off the reward for each token of an answer
    whitening: Literal["global", "prompt", "none"] = (
        "global"  # advantages to variance 1, over the step or each prompt's
    )
    stop_kl: PositiveFloat | None = 0.05  # nats a token from pi_old at which a step's passes end; default: measured
    # its own model, from the reward model (InstructGPT); a head on the policy; or none: an answer is measured against the
    # prompt's other answers (RLOO), which takes several answers to a prompt
    critic: Literal["separate", "shared", "others"] = "separate"
    critic_learning_rate: PositiveFloat | None = None  # default: training.learning_rate, which is the policy's
    critic_warmup: NonNegativeInt = 0  # first steps in which the critic learns alone, the policy being as it was
    pretraining_coefficient: NonNegativeFloat = 0.0  # gamma of PPO-ptx, whose text the section `pretraining` names
    pretraining_length: PositiveInt = 128  # tokens of a block of that text; there are as many blocks as answers


@dataclass
class Config:
    model: Model
    data: Data
    ppo: PPO
    training: Section[transformers.TrainingArguments]
    evaluation: Evaluation
    run: Run
    lora: Section[peft.LoraConfig] | None = None  # the policy learns an adapter; without it, it is the reference
    pretraining: Data | None = None  # plain text of PPO-ptx


# ---------------------------------------------------------------- rollouts


def collect(
    models: Models,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    config: Config,
    accelerator: Accelerator,
    *,
    longest: int,
    seed: int,
    answers: int = 1,
    oversample: int = 1,
) -> Rollout:
    """Answer the prompts, reward the answers, and read what PPO needs of those that it learns from: one in `oversample`.

    `answers` prompts next to each other are the same one.
    """
    from recipes.common.ppo_rollout import answer, most_spread, read

    args, keep = config.training, len(prompts) // oversample
    given = answer(models, rows, prompts, args, accelerator, longest=longest, at_once=keep, seed=seed)
    given.rewards = reward(models, given, answers, config, accelerator)
    kept = list(range(keep))
    if oversample > 1:
        kept = most_spread(given.rewards, answers, keep // answers)
    return read(models, given, kept, answers, args, accelerator)


def reward(models: Models, answers: Answers, count: int, config: Config, accelerator: Accelerator) -> Tensor:
    """r(x, y), what is maximised, [N]: the model's score, normalised and clipped, and the function's; less for an answer
    that does not end, and for each token. `count` answers next to each other are to one prompt."""
    from recipes.common.ppo_rollout import function_scores, model_scores

    ppo, total = config.ppo, answers.rewards  # 0 as yet
    if models.reward_model is not None:
        scores = model_scores(models, answers, count, config.training, accelerator)
        total = total + scores.clamp(-ppo.reward_clip, ppo.reward_clip)
    if models.reward_function is not None:
        total = total + function_scores(models, answers)
    return total - ppo.missing_stop_penalty * (~answers.stopped).float() - ppo.length_penalty * answers.lengths


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
    text: Tensor | None = None,
) -> dict[str, float]:
    """A step's passes over its answers, and over `text` [T, S], blocks of plain text, a micro-batch of each at a time.

    Returns what was seen, over the minibatches and all processes.
    """
    import torch

    from recipes.common import rlhf
    from recipes.common.ppo_rollout import rows_of

    ppo, args, processes, k = config.ppo, config.training, accelerator.num_processes, rollout.answers
    reduce = (lambda x: accelerator.reduce(x, "sum")) if processes > 1 else None
    mask = rollout.mask.float()  # [B, R]
    rewards = rlhf.token_rewards(
        rollout.rewards, rollout.logprobs, rollout.reference, rollout.mask, beta, ppo.kl_estimator
    )  # [B, R]
    if ppo.critic == "others":  # nothing to fit: the values are 0 and stay 0
        advantages, returns = rlhf.leave_one_out_advantages(rewards, mask, k), rollout.values  # [B, R]
    else:
        advantages, returns = rlhf.generalized_advantages(rewards, rollout.values, mask, ppo.gamma, ppo.lam)  # [B, R]
    if ppo.whitening == "global":
        advantages = rlhf.whiten(advantages, mask, reduce=reduce)  # [B, R]
    elif ppo.whitening == "prompt":
        advantages = rlhf.whiten_groups(advantages, mask, k)

    def theirs(prompts: Tensor) -> Tensor:
        return (prompts[:, None] * k + torch.arange(k)).flatten()  # which of the B answers are to these prompts

    kept = torch.tensor(rollout.kept)  # [B]
    micro = args.per_device_train_batch_size // k  # prompts
    blocks = iter(text.split(args.per_device_train_batch_size)) if text is not None and not critic_only else None
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []  # SEEN of each minibatch
    text_losses: list[Tensor] = []
    ratio_error = 0.0
    for minibatch in minibatches(len(mask) // k, micro * args.gradient_accumulation_steps, ppo.epochs, generator):
        tokens = mask[theirs(minibatch)].sum()
        tokens = reduce(tokens) / processes if reduce else tokens  # of a process: DDP averages over the processes
        sums = torch.zeros(len(SEEN), device=mask.device)
        for prompts in minibatch.split(micro):
            rows = theirs(prompts)  # [b]
            m = mask[rows]  # [b, R]
            with accelerator.accumulate(models.learner):
                logprobs, values, entropy, text_loss = models.learner(
                    rows_of(models, rollout.all, kept[rows].tolist(), k, mask.device, mask.shape[1]),
                    with_entropy=ppo.entropy_coefficient > 0,
                    text=next(blocks) if blocks else None,
                    critic_only=critic_only,
                )  # [b, R] each, and []
                policy, clipped = rlhf.policy_loss(logprobs, rollout.logprobs[rows], advantages[rows], ppo.clip)
                value, value_clipped = rlhf.value_loss(values, rollout.values[rows], returns[rows], ppo.value_clip)
                # 0 times rather than without: DDP waits for a gradient of every weight
                loss = ppo.value_coefficient * value + (0.0 if critic_only else 1.0) * policy  # [b, R]
                if entropy is not None and not critic_only:
                    loss = loss - ppo.entropy_coefficient * entropy
                # the minibatch's mean over tokens: accelerate divides by the accumulation steps, the sum must not be
                total = (loss * m).sum() / tokens * args.gradient_accumulation_steps
                if text_loss is not None:
                    total = total + ppo.pretraining_coefficient * text_loss
                    text_losses.append(text_loss.detach())
                accelerator.backward(total)
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
    if text_losses:
        figures["text_loss"] = accelerator.reduce(torch.stack(text_losses).mean(), "mean").item()
    if ppo.critic != "others":
        figures["explained_variance"] = rlhf.explained_variance(rollout.values, returns, mask, reduce).item()
    return figures


def minibatches(prompts: int, size: int, epochs: int, generator: Any) -> Iterator[Tensor]:
    """The prompts of each minibatch, pass after pass: first in the order in which `collect` took them, then shuffled."""
    import torch

    for epoch in range(epochs):
        yield from (torch.randperm(prompts, generator=generator) if epoch else torch.arange(prompts)).split(size)


# ---------------------------------------------------------------- putting it together


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
    import importlib.util

    from recipes.common.generation import model_positions

    ppo, args, problems = config.ppo, config.training, []
    minibatch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if ppo.rollouts % minibatch:
        problems.append(
            f"ppo.rollouts: {ppo.rollouts} is not a multiple of the minibatch of {minibatch}: "
            f"per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {processes} process(es)"
        )
    if args.per_device_train_batch_size % ppo.answers:
        problems.append(
            f"training.per_device_train_batch_size: {args.per_device_train_batch_size} is not a multiple of ppo.answers, "
            f"{ppo.answers}: all answers to a prompt are in one micro-batch"
        )
    if ppo.rollouts % (ppo.answers * processes):
        problems.append(
            f"ppo.answers: {ppo.rollouts} rollouts cannot be {ppo.answers} answers to each prompt on {processes} process(es)"
        )
    if ppo.reward_model is None and ppo.reward_function is None:
        problems.append("ppo.reward_model: null, and no ppo.reward_function: nothing is rewarded")
    if ppo.reward_model is None and ppo.critic == "separate":
        problems.append("ppo.critic: separate starts from the reward model, and there is none: take shared or others")
    if ppo.answers < 2 and (ppo.oversample > 1 or ppo.whitening == "prompt"):
        key = "ppo.oversample" if ppo.oversample > 1 else "ppo.whitening"
        problems.append(f"{key}: it looks at how the answers to one prompt differ: give ppo.answers of 2 or more")
    if (ppo.pretraining_coefficient > 0) != (config.pretraining is not None):
        problems.append(
            "ppo.pretraining_coefficient: PPO-ptx takes a coefficient above 0 and a section `pretraining` that names its text"
        )
    if config.lora is not None and config.lora.lora_dropout:
        problems.append(
            f"lora.lora_dropout: {config.lora.lora_dropout} has no say here: a token's log-probability is the same whenever it is "
            "computed, so nothing is dropped; leave it out"
        )
    if ppo.kl_target is not None and ppo.kl_coefficient == 0:
        problems.append(
            "ppo.kl_target: it steers ppo.kl_coefficient by factors, and that is 0: give it a start, such as 0.05"
        )
    if ppo.critic == "others" and (ppo.answers < 2 or ppo.critic_warmup):
        problems.append("ppo.critic: others has nothing to warm up, and needs ppo.answers of 2 or more to compare")
    if ppo.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        problems.append("ppo.engine: vllm is not installed here: install it, or take transformers")
    places = model_positions(policy)
    for section, longest in (("ppo", ppo.max_new_tokens), ("evaluation", config.evaluation.max_new_tokens)):
        if places and longest_prompt + longest > places:
            problems.append(
                f"{section}.max_new_tokens: {longest} after a prompt of {longest_prompt} tokens is more than the "
                f"model's {places} positions: lower it, or ppo.max_prompt_length"
            )
    if problems:
        raise UserError(problems)


def adapted(policy: PreTrainedModel, config: Config) -> Any:
    """The policy with a fresh adapter. Raises UserError where it would not leave the reference, the rest, as it is."""
    from recipes.common.peft_models import with_adapter
    from recipes.common.rlhf import check_adapter_off

    assert config.lora is not None
    config.lora.task_type = config.lora.task_type or "CAUSAL_LM"
    base = list(policy.parameters())
    wrapped = with_adapter(policy, config.lora)
    check_adapter_off(base, wrapped, config.lora.bias)
    if config.training.gradient_checkpointing:
        wrapped.enable_input_require_grads()  # a frozen embedding gives the checkpointed layers nothing to differentiate
    return wrapped


def load_reward_model(config: Config, tokenizer: Any, run: RunFolder) -> PreTrainedModel | None:
    """The reward model, if there is one. Raises UserError if it is none, or reads other tokens than the policy writes."""
    from recipes.common import own_answers

    name = config.ppo.reward_model
    return own_answers.load_reward_model(name, config.model, tokenizer, run, "ppo.reward_model") if name else None


def plain_text(config: Config, tokenizer: Any, run: RunFolder) -> tuple[Tensor, Tensor]:
    """Blocks of the text of PPO-ptx, to learn from [T, S] and held out."""
    import torch

    from recipes.common.data import load_data
    from recipes.common.packing import pack_texts

    assert config.pretraining is not None
    data, length = load_data(config.pretraining, "text"), config.ppo.pretraining_length
    train, held_out = (
        torch.tensor(pack_texts(data[split], tokenizer, length)["input_ids"]) for split in ("train", "validation")
    )
    return train, held_out[: config.evaluation.max_samples]


def save(models: Models, batch: dict[str, Tensor], run: RunFolder, accelerator: Accelerator) -> None:
    """The policy to model/; of a LoRA policy the adapter to adapter/, and the merged model to model/."""
    from recipes.common.peft_models import merge
    from recipes.common.ppo_rollout import whole_policy

    plugin = accelerator.state.deepspeed_plugin
    with whole_policy(models.learner, accelerator) as policy:
        if models.reference is not None:
            run.save_model(policy, models.tokenizer)
            return
        run.save_model(policy, models.tokenizer, folder="adapter")
        if plugin is not None and plugin.zero_stage == 3:
            run.say("  the model is sharded, so it is not merged here: adapter/ is the result")
            return
        merged, _ = merge(policy, {name: value.to(accelerator.device) for name, value in batch.items()})
        run.save_model(merged, models.tokenizer)


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
    """Data, models, measure, answer and learn step by step, measure again, save."""
    import functools

    import torch
    from transformers import Trainer, get_scheduler

    from recipes.common import ppo_measure, ppo_rollout, rlhf
    from recipes.common.data import load_data
    from recipes.common.generation import check_turn_end, is_checkable
    from recipes.common.models import load_model, load_tokenizer, refuse_quantised
    from recipes.common.peft_models import check_low_rank
    from recipes.common.policy_figures import side_by_side
    from recipes.common.preflight import enough_rows, preflight
    from recipes.common.shared_prompts import check_apart, check_window
    from recipes.common.training import Loop, make_accelerator, refuse_unused
    from recipes.common.verifiable_rewards import find, tasks

    ppo, args, evaluation = config.ppo, config.training, config.evaluation
    if args.fsdp:
        raise UserError("ppo: FSDP cannot generate between updates; use LAUNCH=ddp, zero2 or zero3")
    refuse_unused(args, {
        "torch_compile": (False, "every batch has another shape"),
        "label_smoothing_factor": (0.0, "no loss here has labels to smooth"),
        "data_seed": (None, "training.seed decides the order of the rows"),
        "per_device_eval_batch_size": (8, "evaluation.batch_size is what it measures with"),
    })  # fmt: skip
    accelerator = count_accumulation(make_accelerator(args))
    rank, processes = accelerator.process_index, accelerator.num_processes

    # prompts, and for a reward function their other columns
    tokenizer = load_tokenizer(config.model, run, chat=True)
    data = load_data(config.data, "prompt")
    rows, prompts = encode(enough_rows(data["train"], args, run), tokenizer, config, run)
    held_out = data["validation"].select(range(min(len(data["validation"]), evaluation.max_samples)))
    held_out, held_out_prompts = encode(held_out, tokenizer, config, run)
    function = find(ppo.reward_function, rows.column_names) if ppo.reward_function else None

    policy = load_model(config.model, tokenizer, run)
    refuse_quantised(policy)
    check_turn_end(policy, tokenizer)
    check_apart(policy)
    longest_prompt = max(map(len, prompts + held_out_prompts))
    check(config, longest_prompt, policy, processes)
    text, held_out_text = plain_text(config, tokenizer, run) if config.pretraining else (None, None)
    if config.lora is not None:
        check_low_rank(policy, config.lora, run)
        policy = adapted(policy, config)
    reward_model = load_reward_model(config, tokenizer, run)
    longest_row = longest_prompt + max(ppo.answers * ppo.max_new_tokens, evaluation.max_new_tokens)
    for model in filter(None, (policy, reward_model)):
        check_window(model.config, longest_row)
    critic = load_reward_model(config, tokenizer, run) if ppo.critic == "separate" else None
    reference = load_model(config.model, tokenizer, run) if config.lora is None else None
    learner = rlhf.ActorCritic(policy, critic and critic.requires_grad_(True), getattr(reward_model, "config", None))
    if ppo.critic == "others":
        learner.head.requires_grad_(False)  # stays 0: there is no critic
    rlhf.disable_dropout(learner)
    learner.train()  # a layer is checkpointed in training mode only; nothing else that it does is left, without dropout
    if args.gradient_checkpointing:
        for model in filter(None, (policy, critic)):
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    asked_a_step = ppo.rollouts // ppo.answers * ppo.oversample
    steps = args.max_steps if args.max_steps > 0 else max(1, round(args.num_train_epochs * len(prompts) / asked_a_step))
    few = prompts[: args.per_device_train_batch_size]
    asked = [prompt + [tokenizer.eos_token_id] * ppo.max_new_tokens for prompt in few]
    ids, mask = rlhf.pad(asked, tokenizer.pad_token_id, "left")
    batch = {"input_ids": ids, "attention_mask": mask}
    frozen = [model for model in (reference, reward_model) if model is not None]
    preflight(run, learner, batch, args=args, total_steps=steps, frozen=frozen)

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)
    policy_rate, critic_rate = options.pop("lr"), ppo.critic_learning_rate or args.learning_rate
    learned = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in learned if name.startswith("policy.")], "lr": policy_rate},
        {"params": [p for name, p in learned if not name.startswith("policy.")], "lr": critic_rate},
    ]
    optimizer = optimizer_class([g for g in groups if g["params"]], **{"weight_decay": args.weight_decay, **options})
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    if (plugin := accelerator.state.deepspeed_plugin) is not None:  # what accelerate would read off a DataLoader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    learner, optimizer = accelerator.prepare(learner, optimizer)
    beta = rlhf.KLCoefficient(ppo.kl_coefficient, ppo.kl_target)
    accelerator.register_for_checkpointing(scheduler, beta)
    models = ppo_rollout.Models(learner, None, None, tokenizer, function)
    if reference is not None:
        models.reference = freeze(reference, accelerator)
        rlhf.check_frozen(list(models.reference.parameters()), learner, "load it anew")
    if reward_model is not None:
        models.reward_model = freeze(reward_model, accelerator)
    if ppo.engine == "vllm":
        models.engine = ppo_rollout.start_vllm(accelerator.unwrap_model(learner).policy, tokenizer, accelerator)
    answer = functools.partial(collect, models, config=config, accelerator=accelerator)
    measure = functools.partial(
        ppo_measure.measure,
        answer,
        models,
        held_out.to_list(),
        held_out_prompts,
        held_out_text,
        evaluation,
        args,
        accelerator,
    )

    before, answers_before = measure()
    run.say("before  " + "  ".join(f"{name} {value:.4g}" for name, value in before.items()))
    if config.lora is not None:
        rlhf.check_fresh_adapter(before["kl"], policy.dtype)

    loop = Loop(run, args, accelerator, total_steps=steps, time_limit_minutes=config.run.time_limit_minutes)
    flat = False
    for step in loop:
        chosen = ppo_rollout.rows_of_step(step, asked_a_step, len(prompts), args.seed)[rank::processes]
        chosen = [i for i in chosen for _ in range(ppo.answers)]
        seed = args.seed + processes * step + rank
        rollout = answer(
            rows.select(chosen).to_list(), [prompts[i] for i in chosen],
            longest=ppo.max_new_tokens, seed=seed, answers=ppo.answers, oversample=ppo.oversample,
        )  # fmt: skip
        blocks = None
        if text is not None:
            mine = ppo_rollout.rows_of_step(step, ppo.epochs * ppo.rollouts, len(text), args.seed)[rank::processes]
            blocks = text[mine].to(accelerator.device)
        answers, mask = rollout.all, rollout.mask.float()
        warming_up = step < ppo.critic_warmup
        optimizer.param_groups[0]["weight_decay"] = 0.0 if warming_up else args.weight_decay  # nothing moves the policy
        with ppo_rollout.timed(answers.seconds, "train"):
            figures = update(
                models, optimizer, rollout, beta.value, config, accelerator,
                seed=seed, critic_only=warming_up, text=blocks,
            )  # fmt: skip
        figures |= {f"{part}_seconds": seconds for part, seconds in answers.seconds.items()}

        kl, kl_k3 = (rlhf.kl_estimate(rollout.logprobs, rollout.reference, kind) * mask for kind in ("k1", "k3"))
        seen = {
            "reward": answers.rewards.mean(),  # of all answers, not only those that are learned from
            "kl": kl.sum(dim=1).mean(),
            "kl_k3": kl_k3.sum(dim=1).mean(),
            "entropy": rlhf.masked_mean(rollout.entropy, mask),
            "response_length": answers.lengths.mean(),
        }
        if ppo.answers > 1:  # prompts of those that are learned from whose answers differ in reward
            seen["informative"] = (ppo_rollout.spread_of(rollout.rewards, ppo.answers) > 1e-6).float().mean()
        if is_checkable(answers.rows[0]):
            seen["true_score"] = mask.new_tensor(tasks(answers.texts, answers.rows)).mean()
        means = accelerator.reduce(torch.stack(list(seen.values())), "mean").tolist()
        figures |= dict(zip(seen, means, strict=True))
        figures |= {"kl_coefficient": beta.value, "learning_rate": scheduler.get_last_lr()[0]}
        if not flat and figures.get("informative") == 0:
            flat = True
            run.say(rlhf.FLAT_REWARDS.format(step=step + 1))
        if not warming_up:
            beta.update(figures["kl"])
        scheduler.step()
        if step % max(1, steps // 8) == 0:
            run.sample(f"step_{step + 1:05d}.txt", ppo_measure.sampled(rollout))
            run.say(ppo_measure.sampled(rollout, 3).rstrip())
        loop.log(figures.pop("loss"), ppo_rollout.tokens_of(rollout), **figures)

    after, answers_after = measure()
    save(models, batch, run, accelerator)
    ppo_measure.draw(run, learned=function is None)
    if answers_after:
        run.sample("before_and_after.txt", side_by_side(answers_before, answers_after, "PPO"))
    return {
        **{name: value for name, value in after.items() if name not in ("reward", "response_length")},
        **{
            f"baseline_{name}": before[name]
            for name in ("exact_match", "sampled_exact_match", "text_loss")
            if name in before
        },
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "response_length_before": before["response_length"],
        "response_length_after": after["response_length"],
    }


if __name__ == "__main__":
    run_recipe(main, Config)
