"""DPO: learn from preferences directly; the policy's own log-probabilities are the reward model.

    r(x, y) = beta log( pi(y|x) / pi_ref(y|x) )                                  the implicit reward, DPO eq. (5)
    loss    = - E log sigmoid( r(x, y_w) - r(x, y_l) )                           DPO eq. (7)

The reference pi_ref is the model as it was. Pairs (y_w better than y_l) come from ranked answers: those of the data, or
the model's own, put in order by the task's checker or by a reward model. The second is what works: pairs of made-up
mistakes teach to tell them from right answers (see the held-out accuracy), not to stop making one's own.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; IPO (training.loss_type: [ipo]): Azar et al. 2023,
https://arxiv.org/abs/2310.12036; own answers: Xu et al. 2024, https://arxiv.org/abs/2404.10719; the chosen answer's own
likelihood beside it (training.loss_type: [sigmoid, sft], as on the laptop): Pang et al. 2024, https://arxiv.org/abs/2404.19733

    make dpo                                       # laptop, offline, after `make full`
    make dpo CONFIG=gpu                            # one GPU, a public model and preference set
    make dpo CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Laptop result: RESULTS.md#dpo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveInt, Run

if TYPE_CHECKING:
    import peft
    import trl
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOTrainer


@dataclass
class DPO:
    """Where the pairs come from; beta, the loss and its smoothing are trl's own keys, in `training`."""

    candidates: Literal["given", "sampled", "both"] = (
        "given"  # the data's ranked answers, the model's own, both together
    )
    pairs_per_prompt: PositiveInt | None = (
        None  # drawn from a prompt's untied pairs; default: all, K (K - 1) / 2 at most
    )
    sampled_prompts: PositiveInt = 4000  # training prompts that the model answers itself, if candidates are sampled
    samples: PositiveInt = 8  # answers that it gives to each
    judge: str = "checker"  # of the sampled answers: the tasks' own checker, or a reward model (folder or hub id)


@dataclass
class Config:
    model: Model
    data: Data
    dpo: DPO
    training: Section[trl.DPOConfig]
    evaluation: Evaluation
    run: Run
    lora: Section[peft.LoraConfig] | None = None  # learn an adapter; the reference is the model without it


Row = dict[str, Any]

# ---------------------------------------------------------------- pairs


def with_room(rows: list[Row], tokenizer: Any, model: PreTrainedModel, config: Config, run: RunFolder) -> list[Row]:
    """The rows whose prompt leaves room for an answer within the model's context; see `check_room`."""
    from recipes.common.generation import prompt_ids
    from recipes.common.policy_figures import check_room

    asked = [row["prompt"] for row in rows]
    kept = check_room(asked, prompt_ids(tokenizer, asked), model, 1, None, config.data, run)
    return [rows[i] for i in kept]


def rank_own(
    rows: list[Row], policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, run: RunFolder
) -> list[Row]:
    """Comparisons of the policy's own answers. The checker: right ones tie, and so do wrong ones, below them; a prompt
    with answers of one kind alone is left out. A reward model: the answers that it likes best and least. One that was cut at
    evaluation.max_new_tokens is never the better one, and "ended" says that it has no stop token to learn from.

    With candidates `both`, the data's best answer is judged among the policy's. UserError if nothing is left.
    """
    from recipes.common.generation import Answer
    from recipes.common.own_answers import checker_scores, load_reward_model, reward_scores, sample_answers

    dpo, args, evaluation = config.dpo, config.training, config.evaluation
    if dpo.judge == "checker":
        checker_scores(rows[:1], [[]])  # refuses rows that cannot be checked before they are answered
    answers = sample_answers(
        policy.to(args.device), tokenizer, rows, dpo.samples, evaluation, seed=args.seed, bf16=args.bf16
    )
    if dpo.candidates == "both":  # the data's best answer is judged as the others are
        answers = [[Answer(row["completions"][0]), *some] for row, some in zip(rows, answers, strict=True)]
    answers = [
        [answer for answer in dict.fromkeys(some) if answer.text.strip()] for some in answers
    ]  # an empty one teaches nothing
    if dpo.judge == "checker":
        told = checker_scores(rows, answers)
        scores = [
            [score * one.ended for score, one in zip(*pair, strict=True)] for pair in zip(told, answers, strict=True)
        ]
    else:
        judge = load_reward_model(dpo.judge, config.model, tokenizer, run, "dpo.judge").to(args.device)
        scores = reward_scores(judge, tokenizer, rows, answers, evaluation.batch_size, bf16=args.bf16)
        orders = [sorted(range(len(some)), key=some.__getitem__) for some in scores]
        bests = [[k for k in order if some[k].ended][-1:] for order, some in zip(orders, answers, strict=True)]
        ends = [[*best, order[0]] if best else [] for best, order in zip(bests, orders, strict=True)]
        answers = [[some[k] for k in kept] for some, kept in zip(answers, ends, strict=True)]
        scores = [[some[k] for k in kept] for some, kept in zip(scores, ends, strict=True)]
    found = []
    for row, some, values in zip(rows, answers, scores, strict=True):
        ranks = [float(max(values, default=0.0) - value) for value in values]
        if len(set(ranks)) > 1:
            texts, ended = map(list, zip(*some, strict=True))
            found.append({"prompt": row["prompt"], "completions": texts, "ranks": ranks, "ended": ended})
    if not found:
        raise UserError("dpo.candidates: no prompt got answers of which one is better: there is nothing to prefer")
    run.say(f"  sampled {dpo.samples} answers to {len(rows)} prompts: {len(found)} of them have something to prefer")
    return found


def pairs_of(rows: list[Row], per_prompt: int | None, seed: int) -> list[Row]:
    """K ranked answers -> every untied pair, the better as chosen; or `per_prompt` of them, drawn by the seed.

    "ended": whether the rejected one has its stop token; the chosen one always has.
    """
    import random

    rng, pairs = random.Random(seed), []
    for number, row in enumerate(rows, 1):
        ended = row.get("ended") or [True] * len(row["ranks"])  # the data's answers are whole
        ranked = list(zip(row["completions"], row["ranks"], ended, strict=True))
        found = [(good, bad, end) for good, a, _ in ranked for bad, b, end in ranked if a < b]
        if per_prompt is not None and len(found) > per_prompt:
            found = rng.sample(found, per_prompt)
        same = {"row": number, "prompt": row["prompt"]}
        pairs += [{**same, "chosen": good, "rejected": bad, "ended": end} for good, bad, end in found]
    return pairs


def encode(pairs: list[Row], tokenizer: Any, model: PreTrainedModel, config: Config, run: RunFolder) -> list[Row]:
    """The pairs as trl's DPOTrainer encodes them: prompt_ids, chosen_ids, rejected_ids; no stop token where there was none.

    Those that training.max_length (or the model) has no room for are left out and counted; trl would cut their answers.
    Raises UserError, with the row, for two answers that the chat template makes one.
    """
    from trl.data_utils import common_prefix_length

    from recipes.common.generation import model_positions, prompt_ids, turn_end

    prompts = prompt_ids(tokenizer, [pair["prompt"] for pair in pairs])
    sides = {}
    for side in ("chosen", "rejected"):
        turns = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}] for pair in pairs]
        sides[side] = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    limit = min(length for length in (config.training.max_length, model_positions(model), 2**30) if length)
    end = turn_end(tokenizer)
    for pair, ids in zip(pairs, sides["rejected"], strict=True):
        if not pair["ended"] and ids[-len(end) :] == end:
            del ids[-len(end) :]
    kept = []
    for pair, prompt, chosen, rejected in zip(pairs, prompts, sides["chosen"], sides["rejected"], strict=True):
        if chosen == rejected:
            text = pair["prompt"][-1]["content"]
            raise UserError(
                f"data: row {pair['row']} ({text[:40]!r}): chosen equals rejected once the chat template has written "
                f"them ({pair['chosen'][:40]!r}): there is nothing to prefer"
            )
        start = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
        if max(len(chosen), len(rejected)) <= limit:
            ids = {"prompt_ids": prompt[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
            kept.append({**pair, **ids})
    if not kept:
        raise UserError(f"training.max_length: every one of {len(pairs)} pairs is longer than {limit} tokens")
    if len(kept) < len(pairs):
        run.say(f"  {len(pairs) - len(kept)} of {len(pairs)} pairs are longer than {limit} tokens: left out")
    return kept


# ---------------------------------------------------------------- training

SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # the losses that label_smoothing does anything to
LOSSES = {
    "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft",
    "sigmoid_norm", *SMOOTHED,
}  # fmt: skip


def check_settings(config: Config) -> None:
    """Raise UserError for what trl would ignore without a word, or stumble over once the training runs."""
    args, problems = config.training, []
    if config.model.name is None:
        problems.append(
            "model.name: DPO improves a model that answers already; a fresh one (model.config) prefers nothing"
        )
    if unknown := sorted(set(args.loss_type) - LOSSES):
        problems.append(f"training.loss_type: no loss is called {unknown[0]}: {', '.join(sorted(LOSSES))}")
    if args.label_smoothing and not SMOOTHED & set(args.loss_type):
        problems.append(
            f"training.label_smoothing: {args.label_smoothing} does nothing to {args.loss_type}: use training.loss_type "
            "[robust], DPO with that share of the preferences taken for flipped"
        )
    if args.padding_free:
        problems.append("training.padding_free: trl has it switched off for now: leave it out")
    if problems:
        raise UserError(problems)


def make_trainer(
    model: Any, reference: Any, tokenizer: Any, train: list[Row], held_out: list[Row], config: Config
) -> DPOTrainer:
    """trl's DPOTrainer on encoded pairs. `reference` None: the model without its adapter; UserError if that would learn."""
    import copy

    from datasets import Dataset
    from trl import DPOTrainer

    from recipes.common.peft_models import check_ranks, names_layers
    from recipes.common.rlhf import check_adapter_off
    from recipes.common.sft import plain_logits, project_only_labels

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # type: ignore[no-untyped-def]
            return dataset  # `encode` has done it

    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    args = copy.copy(config.training)
    args.logging_first_step = True  # where the gradient is looked at
    ref_model = (
        None if args.precompute_ref_log_probs else copy.deepcopy(reference) if args.sync_ref_model else reference
    )
    base = list(model.parameters())
    named = config.lora is not None and names_layers(config.lora)
    trainer = Prepared(
        model, ref_model, args=args, processing_class=tokenizer, peft_config=config.lora,
        train_dataset=Dataset.from_list([{c: pair[c] for c in columns} for pair in train]),
        eval_dataset=Dataset.from_list([{c: pair[c] for c in columns} for pair in held_out]),
    )  # fmt: skip
    if config.lora is not None:
        check_adapter_off(base, trainer.model, config.lora.bias)
        check_ranks(trainer.model, "lora", named)
    if args.device.type == "cpu" and plain_logits(trainer.model) and not args.use_weighting:
        for scored in filter(None, (trainer.model, trainer.ref_model)):
            project_only_labels(scored)
    trainer.add_callback(gradient_check())
    return trainer


def gradient_check() -> Any:
    """A callback that raises UserError where the first step's gradient is 0: a loss that stays at log 2 is the classic."""
    from transformers import TrainerCallback

    class GradientCheck(TrainerCallback):
        seen = False

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not self.seen and "grad_norm" in (logs or {}):
                self.seen = True
                if not logs["grad_norm"] > 0:
                    raise UserError(
                        f"the gradient of step {state.global_step} is {logs['grad_norm']}: nothing learns. An adapter "
                        "that is not active, a frozen model, or a reference that is the policy itself does that"
                    )

    return GradientCheck()


# ---------------------------------------------------------------- evaluation


def log_probabilities(model: Any, pairs: list[Row], batch_size: int, fill: int) -> Tensor:
    """log pi(chosen | prompt), log pi(rejected | prompt), of the whole answers: [N, 2]."""
    import torch

    from recipes.common.policy_figures import response_logprobs

    found = torch.zeros(len(pairs), 2)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt_ids"]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [pairs[i]["prompt_ids"] for i in rows]
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            logprobs, mask = response_logprobs(model, prompts, [pairs[i][name] for i in rows], fill)
            found[rows, side] = (logprobs * mask).sum(dim=1).cpu()
    return found


def judge_pairs(trainer: Any, reference: Any, pairs: list[Row], config: Config, run: RunFolder) -> dict[str, float]:
    """Held-out pairs ranked by the implicit reward, beside rankings that need no preferences: the start model's
    likelihood, and length (whichever of longer and shorter is right more often)."""
    from recipes.common.generation import inference, pad_id
    from recipes.common.policy_figures import start_model

    fill, size, bf16 = pad_id(trainer.processing_class), config.evaluation.batch_size, config.training.bf16
    with inference(trainer.model, bf16=bf16) as model:
        ours = log_probabilities(model, pairs, size, fill)
    with start_model(trainer.model, reference) as model, inference(model, bf16=bf16) as base:
        theirs = log_probabilities(base, pairs, size, fill)
    rewards = config.training.beta * (ours - theirs)  # [N, 2]
    margins = rewards[:, 0] - rewards[:, 1]
    longer = sum(len(p["chosen_ids"]) > len(p["rejected_ids"]) for p in pairs) / len(pairs)
    shorter = sum(len(p["chosen_ids"]) < len(p["rejected_ids"]) for p in pairs) / len(pairs)
    likelier = (theirs[:, 0] > theirs[:, 1]).float().mean().item()

    def histogram(axes: Any) -> None:
        axes.hist(margins.tolist(), bins=40, color="C0", alpha=0.7)
        axes.axvline(0, color="grey", linestyle="--")
        axes.set_xlabel("implicit reward of chosen - of rejected, held-out pairs")
        axes.set_ylabel("pairs")

    run.plot("margins", histogram)
    return {
        "reward_accuracy": (margins > 0).float().mean().item(),
        "baseline_accuracy": max(0.5, likelier, longer, shorter),
        "baseline_likelihood_accuracy": likelier,
        "baseline_length_accuracy": max(longer, shorter),
        "reward_margin": margins.mean().item(),
        "chosen_logp_change": (ours - theirs)[:, 0].mean().item(),
        "rejected_logp_change": (ours - theirs)[:, 1].mean().item(),
    }


def loss_figures(loss: float, kinds: list[str]) -> dict[str, float]:
    """The held-out loss that was trained with, and DPO's own at the start, where every margin is 0: log 2."""
    return {"eval_loss": loss, **({"baseline_loss": math.log(2)} if kinds == ["sigmoid"] else {})}


def shown(pairs: list[Row], count: int = 40) -> str:
    """Some pairs, to read."""
    return "".join(f"{p['prompt'][-1]['content']}\n  + {p['chosen']!r}\n  - {p['rejected']!r}\n" for p in pairs[:count])


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Model, pairs, reference; measure, train, measure again, save."""
    from recipes.common import policy_figures, sharding
    from recipes.common.data import load_data
    from recipes.common.generation import check_turn_end
    from recipes.common.models import load_model, load_tokenizer, refuse_quantised
    from recipes.common.peft_models import check_low_rank
    from recipes.common.preflight import preflight
    from recipes.common.rlhf import check_fresh_adapter, disable_dropout
    from recipes.common.training import fit, total_steps

    check_settings(config)
    dpo, args, evaluation = config.dpo, config.training, config.evaluation
    tokenizer = load_tokenizer(config.model, run, chat=True)
    model = load_model(config.model, tokenizer, run)
    refuse_quantised(model)
    check_turn_end(model, tokenizer)
    data = load_data(config.data, "prompt" if dpo.candidates == "sampled" else "preference")
    rows = with_room(data["train"].to_list(), tokenizer, model, config, run)
    held_out = data["validation"].select(range(min(len(data["validation"]), evaluation.max_samples))).to_list()
    held_out = with_room(held_out, tokenizer, model, config, run)
    compared, held_out_compared = rows, held_out
    if dpo.candidates != "given" and not run.dry:
        with sharding.loaded_whole():  # it writes, and learns nothing
            policy = load_model(config.model, tokenizer, run)
        compared = rank_own(rows[: dpo.sampled_prompts], policy, tokenizer, config, run)
        held_out_compared = rank_own(held_out, policy, tokenizer, config, run)
        del policy
    elif dpo.candidates == "sampled":  # a dry run answers nothing: pairs of the right shape
        compared = held_out_compared = [{**row, "completions": ["1", "2"], "ranks": [0, 1]} for row in rows[:256]]
    train = encode(pairs_of(compared, dpo.pairs_per_prompt, args.seed), tokenizer, model, config, run)
    pairs = encode(pairs_of(held_out_compared, dpo.pairs_per_prompt, args.seed), tokenizer, model, config, run)
    run.say(f"  {len(train):,} pairs to learn from, {len(pairs):,} held out")
    run.sample("pairs.txt", shown(train))

    reference = None
    if config.lora is None:
        reference = load_model(config.model, tokenizer, run).requires_grad_(False).eval()
        disable_dropout(reference)
    else:
        check_low_rank(model, config.lora, run)
        config.lora.task_type = config.lora.task_type or "CAUSAL_LM"
    run.choose("torch.compile", False, "every batch has another shape")
    run.given.add("training.torch_compile")
    if args.world_size > 1:  # the last batch is filled up with rows that were there before, inside a process's mean
        run.choose("training.per_device_eval_batch_size", 1, "several processes: each held-out pair counts once")
        args.per_device_eval_batch_size = 1
    trainer = make_trainer(model, reference, tokenizer, train, pairs, config)
    batch = next(iter(trainer.get_train_dataloader()))
    frozen = [reference] if reference is not None else []
    preflight(run, trainer.model, batch, args=trainer.args, total_steps=total_steps(trainer), frozen=frozen)
    if sharding.sharded(trainer):  # no process holds the whole model: the trainer's own figures alone
        fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
        told = trainer.evaluate()
        policy_figures.save(trainer, tokenizer, run)
        return {
            "reward_accuracy": told["eval_rewards/accuracies"],
            "reward_margin": told["eval_rewards/margins"],
            **loss_figures(told["eval_loss"], args.loss_type),
        }

    def measure(when: str) -> policy_figures.Measured:
        told = policy_figures.measure(
            trainer.model, reference, tokenizer, held_out, evaluation, seed=args.seed, bf16=args.bf16
        )
        policy_figures.say(run, when, told)
        return told

    if reference is not None:
        reference.to(args.device)
    before = measure("before")
    if config.lora is not None:
        check_fresh_adapter(before.figures["kl"], model.dtype)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    policy_figures.save_learned(trainer, tokenizer, run)  # before the figures: these may need more memory than there is
    after = measure("after")
    figures = judge_pairs(trainer, reference, pairs, config, run)
    figures |= loss_figures(trainer.evaluate()["eval_loss"], args.loss_type)
    policy_figures.save_merged(trainer, tokenizer, run)
    run.plot_curve("loss", "loss", label="training loss")
    run.plot_curve("accuracy", "rewards/accuracies", label="training pairs ranked right by the implicit reward")
    run.plot_curve("log_probabilities", "logps/chosen", "logps/rejected", label="log-probability of an answer, nats")
    return {**policy_figures.report(run, before, after), **figures, "pairs": len(train)}


if __name__ == "__main__":
    run_recipe(main, Config)
