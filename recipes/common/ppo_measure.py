"""PPO before and after: held-out reward, KL and exact match, and the pictures of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recipes.common.ppo_rollout import Models, Rollout, whole_policy
from recipes.common.run_folder import RunFolder, draw_curve
from recipes.common.sections import Evaluation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import TrainingArguments


def measure(
    collect: Callable[..., Rollout],
    models: Models,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    text: Tensor | None,
    evaluation: Evaluation,
    args: TrainingArguments,
    accelerator: Accelerator,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out reward, KL and length of sampled answers; where answers can be checked, exact match and the answers.

    collect(rows, prompts, longest=, seed=): samples and reads answers; text: [T, S], held-out blocks of plain text, or None
    """
    import torch

    from recipes.common.generation import exact_match, is_checkable

    parts = []
    for start in range(0, len(prompts), evaluation.batch_size):
        batch = slice(start, start + evaluation.batch_size)
        rollout = collect(rows[batch], prompts[batch], longest=evaluation.max_new_tokens, seed=args.seed + start)
        kl = ((rollout.logprobs - rollout.reference) * rollout.mask).sum(dim=1)
        parts.append(torch.stack([rollout.rewards, kl, rollout.mask.sum(dim=1).float()]))
    means = torch.cat(parts, dim=1).mean(dim=1).tolist()
    figures = dict(zip(("reward", "kl", "response_length"), means, strict=True))
    if text is not None:
        figures["text_loss"] = text_loss(models, text, args, accelerator)
    if not is_checkable(rows[0]):
        return figures, []
    with whole_policy(models.learner, accelerator) as policy:
        told = exact_match(policy, models.tokenizer, rows, evaluation, seed=args.seed, bf16=args.bf16)
    return figures | {name: told[name] for name in ("exact_match", "sampled_exact_match")}, told["answers"]


def text_loss(models: Models, text: Tensor, args: TrainingArguments, accelerator: Accelerator) -> float:
    """Nats a token of plain text, [T, S], under the policy: what PPO-ptx keeps from rising."""
    import torch

    from recipes.common.rlhf import next_token_loss

    policy = accelerator.unwrap_model(models.learner).policy
    with torch.no_grad(), accelerator.autocast():
        losses = [
            next_token_loss(policy, part.to(accelerator.device)) * len(part)
            for part in text.split(args.per_device_train_batch_size)
        ]
    return (torch.stack(losses).sum() / len(text)).item()


def draw(run: RunFolder, learned: bool) -> None:
    """Reward beside true score, the frontier of reward and KL, the health of policy and critic, and where the time goes.

    learned: whether the true score is something else than what is maximised
    """
    history = [row for row in run.history() if row.get("reward") is not None]
    steps = [row["step"] for row in history]
    reward, score = ("learned reward", "true score: never trained on") if learned else ("reward", "true score")

    def rewards(axes: Any) -> None:
        draw_curve(axes, steps, [row["reward"] for row in history], f"{reward}: what is maximised", color="C0")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{reward}, standard deviations" if learned else reward)
        handles = axes.get_legend_handles_labels()[0]
        if history[0].get("true_score") is not None:
            other = axes.twinx()
            draw_curve(other, steps, [row["true_score"] for row in history], score, color="C1")
            other.set_ylabel("sampled answers that are right")
            handles += other.get_legend_handles_labels()[0]
        # below the axes: what it would lie over, nobody knows before
        axes.figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2)

    def frontier(axes: Any) -> None:
        kl, gained = [row["kl"] for row in history], [row["reward"] for row in history]
        axes.figure.colorbar(axes.scatter(kl, gained, c=steps, cmap="viridis", s=18), label="step")
        axes.set_xlabel("KL from the SFT model, nats a response")
        axes.set_ylabel(reward)

    run.plot("reward_and_true_score", rewards)
    run.plot("frontier", frontier)
    run.plot_curve("kl", "kl", "kl_k3", label="KL from the SFT model, nats a response")
    if history[-1].get("explained_variance") is not None:
        run.plot_curve("critic", "explained_variance", "value_loss")
    if history[-1].get("informative") is not None:
        run.plot_curve("groups", "informative", label="prompts whose answers got different rewards")
    run.plot_panels("policy", "entropy", "clip_fraction", "update_kl")
    spent = seconds_of(history)
    if len(spent) > 1:
        run.plot("time", lambda axes: time_bars(axes, spent))


PARTS = {  # of a step, in its order
    "rollout": "answering",
    "score": "scoring the answers",
    "read": "log-probabilities, values",
    "train": "learning",
}


def seconds_of(history: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds a step of each of PARTS that was timed; the first step, which warms up, is left out if there are more."""
    rows = history[1:] or history
    timed = [part for part in PARTS if all(row.get(f"{part}_seconds") is not None for row in rows)]
    return {part: sum(row[f"{part}_seconds"] for row in rows) / len(rows) for part in timed}


def time_bars(axes: Any, spent: dict[str, float]) -> None:
    """Where a step's time goes."""
    whole = sum(spent.values())
    bars = axes.barh([PARTS[part] for part in spent], list(spent.values()), color="C0")
    axes.bar_label(bars, [f"{value:.2f} s, {value / whole:.0%}" for value in spent.values()], padding=4)
    axes.set_xlim(0, 1.25 * max(spent.values()))
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, mean over the run")


def sampled(rollout: Rollout, count: int = 20) -> str:
    """Some of a step's prompts, each with one of its sampled answers and its reward."""
    shown = []
    for i in rollout.kept[:: rollout.answers][:count]:
        value, text = rollout.all.rewards[i].item(), rollout.all.texts[i]
        shown.append(f"{rollout.all.rows[i]['prompt'][-1]['content']}\n  {value:+.2f}  {text!r}\n")
    return "".join(shown)
