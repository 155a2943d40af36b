"""GRPO: reinforcement learning without a critic; an answer is measured against the other answers to its prompt.

    A_i  = (r_i - mean r) / std r                           over the G answers to a prompt, DeepSeekMath section 4.1.1
    loss = - mean_t min( rho_t A_i, clip(rho_t, 1 - eps, 1 + eps_high) A_i ) + beta KL(pi || pi_ref),  rho = pi / pi_old

The reward is a program's verdict: no model to train for it, none to fool. Three details that the library has keys for:
  - clip-higher, training.epsilon_high (DAPO: 0.28): an unlikely token may rise further than the usual 0.2 lets it.
  - length bias, training.loss_type: `grpo` divides each answer's loss by its own length, so a long wrong answer is
    punished less a token than a short one, and answers grow. `dapo` and `bnpo` divide by all tokens of the batch,
    `dr_grpo` by a constant; none of them does that.
  - difficulty bias, training.scale_rewards: dividing by the group's std weighs prompts that are nearly always, or
    nearly never, answered right most. `none` leaves it out (Dr. GRPO).

GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300; DAPO: Yu et al. 2025, https://arxiv.org/abs/2503.14476;
Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783

    make grpo                                       # laptop, offline, after `make full`
    make grpo CONFIG=gpu                            # one GPU, a public model and grade-school mathematics
    make grpo CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node, vLLM answers; scripts/ has SLURM

Laptop result: RESULTS.md#grpo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeFloat

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import trl
    from transformers import PreTrainedTokenizerBase, TrainerCallback


@dataclass
class GRPO:
    """What is rewarded; groups, clipping and loss are trl's own keys, in `training`."""

    # names of recipes/common/verifiable_rewards.py, module:function of your own, or reward models (folder or hub id);
    # several are added up, by training.reward_weights
    rewards: list[str] = field(default_factory=lambda: ["tasks"])
    missing_stop_penalty: NonNegativeFloat = 1.0  # taken off the reward of an answer that does not end, as in ppo


@dataclass
class Config:
    model: Model
    data: Data
    grpo: GRPO
    training: Section[trl.GRPOConfig]
    evaluation: Evaluation
    run: Run
    lora: Section[peft.LoraConfig] | None = None  # learn an adapter; the reference is the model without it


TAKEN = {
    "prompts",
    "completion",
    "completions",
    "ranks",
    "image",
    "images",
    "completion_ids",
    "log_metric",
    "log_extra",
    "trainer_state",
    "environment",
    "tools",
}  # mean something to trl

# ---------------------------------------------------------------- rewards


def load_rewards(
    config: Config, columns: list[str], tokenizer: PreTrainedTokenizerBase, stops: list[int], run: RunFolder
) -> list[Callable[..., list[float]]]:
    """Each reward as trl calls it: (prompts, completions, completion_ids, and the rows' columns) -> one number an answer.

    The penalty of an answer that does not end is the last of them, with a weight of 1 whatever those of the others are.
    """
    from recipes.common.own_answers import load_reward_model, reward_scores
    from recipes.common.verifiable_rewards import REWARDS, find

    args, named, penalty = config.training, len(config.grpo.rewards), config.grpo.missing_stop_penalty
    if not named:
        raise UserError("grpo.rewards: nothing is rewarded: name one, such as tasks")
    if args.reward_weights is not None and len(args.reward_weights) != named:
        raise UserError(f"training.reward_weights: {len(args.reward_weights)} weights for {named} grpo.rewards")
    found = []
    for name in config.grpo.rewards:
        if name in REWARDS or ":" in name or "/" not in name:
            found.append(as_trl(of_texts(find(name, columns)), name, tokenizer, stops))
            continue
        judge = load_reward_model(name, config.model, tokenizer, run, "grpo.rewards").to(config.training.device)

        def learned(answers, rows, judge=judge):  # type: ignore[no-untyped-def]
            told = reward_scores(
                judge, tokenizer, rows, [[answer] for answer in answers], config.evaluation.batch_size,
                bf16=config.training.bf16,
            )  # fmt: skip
            return [one for (one,) in told]

        found.append(as_trl(learned, "learned", tokenizer, stops))
    if penalty:
        found.append(missing_stop(stops, penalty))
        args.reward_weights = [*(args.reward_weights or [1.0] * named), 1.0]
    return found


def missing_stop(stops: list[int], penalty: float) -> Callable[..., list[float]]:
    """- penalty for an answer that ends in none of the tokens `stops`, else 0, as trl calls it."""

    def missing_stop(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        return [0.0 if ids and ids[-1] in stops else -penalty for ids in completion_ids]

    return missing_stop


def of_texts(function: Any) -> Any:
    """A function of texts and rows as `as_trl` calls it: with the answers, of which it need not know whether they ended."""
    return lambda answers, rows: function([answer.text for answer in answers], rows)


def as_trl(
    function: Any, name: str, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> Callable[..., list[float]]:
    """A reward of ours, of `Answer`s and rows, as trl calls it. The answers are decoded again: trl leaves special tokens
    out, so that a run-on answer, `4<|user|>` say, would pass for `4`. What it saw last is kept in `.latest`, to be read in
    samples/. Raises UserError for nan, inf, or another number of rewards than answers: trl would leave such answers out
    without a word."""
    from recipes.common.builtin.tasks import check
    from recipes.common.generation import as_answers, is_checkable
    from recipes.common.verifiable_rewards import checked

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, log_metric: Any = None, **columns: Any
    ) -> list[float]:
        kept = {
            key: values for key, values in columns.items() if isinstance(values, list) and len(values) == len(prompts)
        }
        rows = [{"prompt": p, **{key: values[i] for key, values in kept.items()}} for i, p in enumerate(prompts)]
        answers = as_answers(tokenizer, completion_ids, stops)
        texts = [answer.text for answer in answers]
        values = checked(function(answers, rows), len(answers), f"grpo.rewards: {name}")
        if log_metric is not None and is_checkable(rows[0]):
            log_metric("true_score", sum(check(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows))
        reward.latest = list(zip(rows, texts, values, strict=True))  # type: ignore[attr-defined]
        return values

    reward.__name__ = name.replace(":", ".")
    return reward


# ---------------------------------------------------------------- what the frame needs of trl's trainer


def frame_callback(trainer: Any, run: RunFolder) -> TrainerCallback:
    """Puts the answers that are still to be learned from into every checkpoint, and samples of them into samples/.

    trl learns from a batch of answers in steps_per_generation x num_iterations passes, and forgets it when it is
    interrupted in between: a resumed run would answer anew, other prompts than the uninterrupted one.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from recipes.common.rlhf import FLAT_REWARDS

    name = f"answers-{trainer.accelerator.process_index}.safetensors"

    class Frame(TrainerCallback):
        flat = False  # whether rewards that are all alike were said

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            parts = {
                f"{i}.{key}": value.clone().contiguous()
                for i, part in enumerate(trainer._buffered_inputs)
                for key, value in part.items()
                if value is not None
            }
            save_file(parts, folder / name, metadata={"step": str(trainer._step)})

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not run.resume_from:
                return
            with safe_open(run.resume_from / name, "pt", device=str(args.device)) as kept:
                trainer._step = int(kept.metadata()["step"])
                buffered: dict[int, dict[str, Any]] = {}
                for key in kept.keys():  # noqa: SIM118  (no dictionary)
                    i, _, column = key.partition(".")
                    buffered.setdefault(int(i), {})[column] = kept.get_tensor(key)
            trainer._buffered_inputs = [buffered[i] for i in range(len(buffered))]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not self.flat and (logs or {}).get("frac_reward_zero_std") == 1:
                self.flat = True
                run.say(FLAT_REWARDS.format(step=state.global_step))
            latest = getattr(trainer.reward_funcs[0], "latest", None)
            if latest and state.global_step % max(1, state.max_steps // 8) < args.logging_steps:
                lines = [
                    f"{row['prompt'][-1]['content']}\n  {value:+.2f}  {text!r}\n" for row, text, value in latest[:24]
                ]
                run.sample(f"step_{state.global_step:05d}.txt", "".join(lines))

    return Frame()


def check_settings(config: Config) -> None:
    """Raise UserError for what cannot work, before the model is loaded."""
    args, problems = config.training, []
    if config.model.name is None:
        problems.append(
            "model.name: GRPO improves a model that answers already; a fresh one (model.config) is never right"
        )
    if args.use_vllm:
        import importlib.util

        if importlib.util.find_spec("vllm") is None:
            problems.append("training.use_vllm: vllm is not installed here: install it, or set it to false")
    if args.fsdp:
        problems.append("grpo: launch with ddp, zero2 or zero3; answers between updates are not tried under FSDP here")
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Model, prompts, rewards; measure, answer and learn, measure again, save."""
    from trl import GRPOTrainer

    from recipes.common import policy_figures, rlhf, sft, sharding
    from recipes.common.data import load_data
    from recipes.common.generation import check_turn_end, prompt_ids, stop_ids
    from recipes.common.models import load_model, load_tokenizer, refuse_quantised
    from recipes.common.peft_models import check_low_rank, check_ranks, names_layers
    from recipes.common.preflight import preflight
    from recipes.common.training import fit, total_steps

    check_settings(config)
    args, evaluation = config.training, config.evaluation
    tokenizer = load_tokenizer(config.model, run, chat=True)
    model = load_model(config.model, tokenizer, run)
    refuse_quantised(model)
    check_turn_end(model, tokenizer)
    data = load_data(config.data, "prompt")
    train = data["train"].select_columns([c for c in data["train"].column_names if c not in TAKEN])
    held_out = data["validation"].select(range(min(len(data["validation"]), evaluation.max_samples)))
    held_out = held_out.select_columns(train.column_names).to_list()
    prompts = prompt_ids(tokenizer, train["prompt"])
    room = policy_figures.check_room
    kept = room(
        train["prompt"], prompts, model, args.max_completion_length, "training.max_completion_length", config.data, run
    )
    train, prompts = train.select(kept), [prompts[i] for i in kept]
    asked = [row["prompt"] for row in held_out]
    longest = evaluation.max_new_tokens
    kept = room(asked, prompt_ids(tokenizer, asked), model, longest, "evaluation.max_new_tokens", config.data, run)
    held_out = [held_out[i] for i in kept]
    rewards = load_rewards(config, train.column_names, tokenizer, stop_ids(model, tokenizer), run)

    if config.lora is not None:
        check_low_rank(model, config.lora, run)
        config.lora.task_type = config.lora.task_type or "CAUSAL_LM"
    run.choose("torch.compile", False, "answers are of every length")
    run.given.add("training.torch_compile")
    args.include_num_input_tokens_seen = "no"  # trl counts them itself, as it answers
    base = list(model.parameters())
    named = config.lora is not None and names_layers(config.lora)
    trainer = GRPOTrainer(
        model, rewards, args=args, train_dataset=train, processing_class=tokenizer, peft_config=config.lora
    )
    if config.lora is not None:
        rlhf.check_adapter_off(base, trainer.model, config.lora.bias)
        check_ranks(trainer.model, "lora", named)
    if args.device.type == "cpu" and sft.plain_logits(model) and args.temperature == 1.0:
        for scored in filter(None, (trainer.model, trainer.ref_model)):
            sft.project_only_labels(scored)
    trainer.add_callback(frame_callback(trainer, run))
    fake = [
        p + [tokenizer.eos_token_id] * args.max_completion_length for p in prompts[: args.per_device_train_batch_size]
    ]
    ids, mask = rlhf.pad(fake, tokenizer.pad_token_id, "left")
    batch = {"input_ids": ids, "attention_mask": mask}
    frozen = [trainer.ref_model] if trainer.ref_model is not None else []
    preflight(run, trainer.model, batch, args=args, total_steps=total_steps(trainer), frozen=frozen)
    if sharding.sharded(trainer):  # no process holds the whole model: the rewards of the rollouts alone
        fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
        policy_figures.save(trainer, tokenizer, run)
        history = [row["reward"] for row in run.history() if row.get("reward") is not None]
        return {"reward_before": history[0], "reward_after": history[-1]}

    reference = trainer.ref_model if not args.sync_ref_model else None
    if reference is None and config.lora is None:
        reference = load_model(config.model, tokenizer, run).requires_grad_(False).eval().to(args.device)

    def score(rows: Any, answers: Any) -> list[float]:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        told = [function(columns["prompt"], None, completion_ids=answers, **columns) for function in rewards]
        weights = args.reward_weights or [1.0] * len(rewards)
        return [sum(w * value for w, value in zip(weights, values, strict=True)) for values in zip(*told, strict=True)]

    def measure(when: str) -> policy_figures.Measured:
        told = policy_figures.measure(
            trainer.model, reference, tokenizer, held_out, evaluation, seed=args.seed, bf16=args.bf16, score=score
        )
        policy_figures.say(run, when, told)
        return told

    before = measure("before")
    if config.lora is not None:
        rlhf.check_fresh_adapter(before.figures["kl"], model.dtype)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    after = measure("after")
    policy_figures.save(trainer, tokenizer, run)
    run.plot_curve("reward", "reward", label="reward of the step's answers, sampled")
    run.plot_curve("groups", "frac_reward_zero_std", label="groups whose answers are all alike: nothing to learn")
    run.plot_panels("policy", "entropy", "clip_ratio/region_mean", "kl")
    run.plot_curve("length", "completions/mean_length", label="tokens an answer")
    return policy_figures.report(run, before, after)


if __name__ == "__main__":
    run_recipe(main, Config)
