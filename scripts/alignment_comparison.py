"""The alignment chapter's methods side by side: one SFT model, the same held-out questions, a checker that nobody can fool.

    make alignment-comparison                    # 3 seeds; what is finished is kept, what was interrupted goes on
    make alignment-comparison ARGS="--seeds 1"
    make alignment-comparison ARGS="--model runs/full/default/model"   # another SFT model than the half-trained one

SFT, best-of-n against the reward model, DPO, PPO and GRPO, each by its recipe and its laptop config, on the same training
prompts (the reward model learns from ranked answers to others). Then the scores: the share of the builtin tasks' test
questions answered exactly right, the learned reward, and the KL from the SFT model. And PPO once more with its KL left
free (no penalty, no early stop, a rate that does not fall): what happens to the true score while the learned reward goes on rising.

The report is <root>/README.md, the figures <root>/comparison.json; a run that fails is left out and told of. Other arguments go
to every recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from side_by_side import Step, mean, positive, refuse_planned, run_step, told  # first: it makes `recipes` importable

from recipes.common.best_of_n import kl_bound, value_of_best
from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder, digest, write_atomically
from recipes.common.sections import Evaluation, Model

SFT_STEPS = 400  # of `make full`'s 1100: a model with something left to learn
# of PPO with nothing that holds its KL: nearly three times its laptop config's, at a rate that does not fall
FREE_STEPS = 400
QUESTIONS = 1000  # test questions that every model answers
DRAWS = 16  # best-of-n draws that many answers to each
EVALUATION = Evaluation(max_samples=QUESTIONS, batch_size=200, max_new_tokens=24)

METHODS = {  # name: what its row of the table is called, and what it learns from
    "sft": ("SFT", "demonstrations"),
    "best_of_n": (f"best of {DRAWS}", "nothing: the reward model picks"),
    "dpo": ("DPO", "its own answers, right against wrong"),
    "ppo": ("PPO", "the reward model"),
    "grpo": ("GRPO", "the checker"),
    "ppo_free": ("PPO, KL left free", "the reward model, no penalty"),
}


def plan(root: Path, seeds: int, model: Path | None) -> list[Step]:
    """All runs, in the order in which they stand on each other; the SFT model is `model`, or made first."""
    start = ("--model.name", str(model or root / "full" / "sft" / "model"))
    judge = ("--ppo.reward_model", str(root / "reward_model" / "judge" / "model"))
    steps = [] if model else [Step("sft", "finetuning", "full", "sft", ("--training.max_steps", str(SFT_STEPS)))]
    steps.append(Step("best_of_n", "alignment", "reward_model", "judge", start))
    for seed in range(seeds):
        seeded = (*start, "--training.seed", str(seed))
        steps += [
            Step("dpo", "alignment", "dpo", f"seed{seed}", seeded),
            Step("ppo", "alignment", "ppo", f"seed{seed}", (*seeded, *judge)),
            Step("grpo", "alignment", "grpo", f"seed{seed}", seeded),
        ]
    free = (
        "--ppo.kl_coefficient", "0", "--ppo.stop_kl", "null", "--training.lr_scheduler_type", "constant_with_warmup",
        "--training.max_steps", str(FREE_STEPS), "--training.save_steps", "100",
    )  # fmt: skip
    steps.append(Step("ppo_free", "alignment", "ppo", "free", (*start, *judge, *free)))
    return steps


# ---------------------------------------------------------------- scores


class Bench:
    """The SFT model, the reward model and the questions, and the scores of any policy against them."""

    def __init__(self, root: Path, sft: Path, questions: int):
        self.of = (sft, root / "reward_model" / "judge" / "model")
        from recipes.common.builtin import BUILTINS
        from recipes.common.models import load_model, load_tokenizer
        from recipes.common.own_answers import load_reward_model

        self.root, self.run = root, RunFolder(root, recipe="alignment_comparison")
        self.section = Model(str(sft))
        self.tokenizer = load_tokenizer(self.section, self.run, chat=True)
        self.start = load_model(self.section, self.tokenizer, self.run).requires_grad_(False).eval()
        self.judge = load_reward_model(str(self.of[1]), self.section, self.tokenizer, self.run, "reward_model")
        self.rows = BUILTINS["tasks"].load("test", 0)[:questions]

    def learned(self, rows: Any, answers: Sequence[Sequence[int]]) -> list[float]:
        """The learned reward of answers that are ids."""
        from recipes.common.generation import as_answers, stop_ids
        from recipes.common.own_answers import reward_scores

        alone = [[one] for one in as_answers(self.tokenizer, answers, stop_ids(self.start, self.tokenizer))]
        told = reward_scores(self.judge, self.tokenizer, rows, alone, EVALUATION.batch_size)
        return [one for (one,) in told]

    def policy(self, folder: Path, seed: int) -> dict[str, float]:
        """Exact match, greedy and sampled, learned reward, KL from the SFT model."""
        from recipes.common.models import load_model
        from recipes.common.policy_figures import measure

        policy = load_model(Model(str(folder)), self.tokenizer, self.run).eval()
        told = measure(policy, self.start, self.tokenizer, self.rows, EVALUATION, seed=seed, score=self.learned)
        return told.figures

    def best_of_n(self, seed: int) -> dict[str, Any]:
        """What to expect of the best of 1, 2, 4, ... answers; KL: the bound."""
        from recipes.common.own_answers import checker_scores, reward_scores, sample_answers

        answers = sample_answers(self.start, self.tokenizer, self.rows, DRAWS, EVALUATION, seed=seed)
        right = checker_scores(self.rows, answers)
        scores = reward_scores(self.judge, self.tokenizer, self.rows, answers, EVALUATION.batch_size)

        def mean(values: list[list[float]], n: int) -> float:
            return sum(value_of_best(s, v, n) for s, v in zip(scores, values, strict=True)) / len(scores)

        counts = [2**i for i in range(DRAWS.bit_length()) if 2**i <= DRAWS]
        curve = [
            {"n": n, "kl": kl_bound(n), "sampled_exact_match": mean(right, n), "reward": mean(scores, n)}
            for n in counts
        ]
        return {**curve[-1], "curve": curve}

    def kept(self, name: str, policy: Path, measure: Any) -> dict[str, Any]:
        """Scores from <root>/scores/<questions>/, or measured now and put there, by the names of the models: of one that was
        trained again since, or of another SFT or reward model, they are others."""
        models = "-".join(digest(folder) for folder in (policy, *self.of))
        path = self.root / "scores" / str(len(self.rows)) / f"{name}-{models}.json"
        if not path.exists():
            print(f"scoring {name}", flush=True)
            write_atomically(path, json.dumps(measure(), indent=2) + "\n")
        return json.loads(path.read_text())


def score_all(
    root: Path, steps: Sequence[Step], sft: Path, seeds: int, questions: int
) -> dict[str, list[dict[str, Any]]]:
    """The scores of every method, one a seed (one alone of PPO with its KL left free)."""
    bench = Bench(root, sft, questions)
    scores: dict[str, list[dict[str, Any]]] = {"sft": [], "best_of_n": []}
    for seed in range(seeds):
        scores["sft"].append(bench.kept(f"sft-{seed}", sft, lambda seed=seed: bench.policy(sft, seed)))
        scores["best_of_n"].append(bench.kept(f"best_of_n-{seed}", sft, lambda seed=seed: bench.best_of_n(seed)))
    for step in steps:
        figures = step.figures(root)
        if step.recipe not in ("full", "reward_model") and figures is not None:
            model, seed = step.folder(root) / "model", seed_of(step)
            found = bench.kept(f"{step.recipe}-{step.name}", model, lambda: bench.policy(model, seed))  # noqa: B023
            more = {"seed": seed, "wall_seconds": figures["wall_seconds"], "answers": answers_learned_from(step, root)}
            scores.setdefault(step.method, []).append(found | more)
    return scores


def seed_of(step: Step) -> int:
    """The seed of a run, as its name tells it; 0 of the one with its KL left free."""
    return int(step.name.removeprefix("seed")) if step.name.startswith("seed") else 0


def answers_learned_from(step: Step, root: Path) -> int:
    """How many answers a run sampled to learn from, by its config."""
    config = yaml.safe_load((step.folder(root) / "config.yaml").read_text())
    training = config["training"]
    if step.recipe == "dpo":
        return config["dpo"]["sampled_prompts"] * config["dpo"]["samples"]
    if step.recipe == "ppo":
        return training["max_steps"] * config["ppo"]["rollouts"]
    return training["max_steps"] // training["num_iterations"] * training["per_device_train_batch_size"]


# ---------------------------------------------------------------- report


def table(scores: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown row a method. The gain is over the SFT model's answers to the same questions, seed by seed."""
    lines = [
        "| method | learns from | right, sampled | gain | right, greedy | learned reward | KL, nats an answer | answers sampled | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, (name, source) in METHODS.items():
        rows = scores.get(method, [])
        if not rows:
            continue
        base = [row["sampled_exact_match"] for row in scores["sft"]]
        gains = [row["sampled_exact_match"] - base[row.get("seed", i)] for i, row in enumerate(rows)]
        cells = [
            told([row["sampled_exact_match"] for row in rows], 3),
            "" if method == "sft" else told(gains, 3),
            told([row.get("exact_match") for row in rows], 3),
            told([row["reward"] for row in rows], 2),
            ("at most " if method == "best_of_n" else "") + told([row["kl"] for row in rows], 2),
            told([row.get("answers") for row in rows], 0),
            told([row.get("wall_seconds") for row in rows], 0),
        ]
        lines.append(f"| {name} | {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trajectory(folder: Path, parts: int | None = None) -> dict[str, list[float]]:
    """KL an answer, reward and true score along a run: means over as many `parts` of it, or over five logged steps each."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("kl") is not None and row.get("true_score") is not None]
    for row in rows:  # trl's KL is that of a token
        row["kl"] *= row.get("completions/mean_length", 1.0)
    size = max(1, len(rows) // parts) if parts else 5
    cut = [rows[i : i + size] for i in range(0, len(rows), size)]
    return {key: [mean([row[key] for row in part]) for part in cut] for key in ("kl", "reward", "true_score")}


def draw(root: Path, steps: Sequence[Step], scores: dict[str, list[dict[str, Any]]]) -> None:
    """The frontier of true score (and of learned reward) and KL, and the over-optimisation picture."""
    run = RunFolder(root, recipe="alignment_comparison")
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    first = {step.method: step.folder(root) for step in reversed(steps) if step.figures(root) is not None}

    def frontier(axes: Any, along: str, figure: str) -> None:
        curves = [row["curve"] for row in scores["best_of_n"]]  # of each seed, at the same numbers of draws
        kl, reached = (
            [mean([p[key] for p in points]) for points in zip(*curves, strict=True)] for key in ("kl", figure)
        )
        axes.plot(
            kl, reached, "s--", color=colours["best_of_n"], markersize=4,
            label=f"best of 1 to {DRAWS} (KL: the bound)",
        )  # fmt: skip
        for method in ("ppo", "grpo", "ppo_free"):
            if method in first and not (method == "grpo" and along == "reward"):  # GRPO's reward is the checker
                path = trajectory(first[method])
                label = f"{METHODS[method][0]}, as it learns (its prompts)"
                axes.plot(path["kl"], path[along], "-", color=colours[method], alpha=0.4, label=label)
        for method, rows in scores.items():
            if method != "best_of_n":
                axes.plot(
                    [row["kl"] for row in rows], [row[figure] for row in rows], "o", color=colours[method], markersize=6,
                    label=METHODS[method][0],
                )  # fmt: skip
        axes.set_xlabel("KL from the SFT model, nats an answer")
        axes.legend(frameon=False, fontsize=8)

    def true_frontier(axes: Any) -> None:
        frontier(axes, "true_score", "sampled_exact_match")
        axes.set_ylabel("sampled answers that are right")

    def reward_frontier(axes: Any) -> None:
        frontier(axes, "reward", "reward")
        axes.set_ylabel("learned reward, standard deviations")

    def over_optimisation(axes: Any) -> None:
        other = axes.twinx()
        for method, style in (("ppo", "--"), ("ppo_free", "-")):
            path = trajectory(first[method])
            axes.plot(path["kl"], path["reward"], style, color="C0", label=f"learned reward: {METHODS[method][0]}")
            other.plot(path["kl"], path["true_score"], style, color="C1", label=f"true score: {METHODS[method][0]}")
        axes.set_xlabel("KL from the SFT model, nats an answer")
        axes.set_ylabel("learned reward, which is maximised", color="C0")
        other.set_ylabel("sampled answers that are right", color="C1")
        handles = [*axes.get_lines(), *other.get_lines()]
        axes.figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=2)

    run.plot("frontier", true_frontier)
    run.plot("reward_frontier", reward_frontier)
    if {"ppo", "ppo_free"} <= first.keys():
        run.plot("over_optimisation", over_optimisation)


def over_optimised(folder: Path) -> str:
    """What the run with its KL left free shows, said from its curve, by the means over its tenths: one step's is noise."""
    path = trajectory(folder, parts=10)
    true, reward = path["true_score"], path["reward"]
    best, end = max(true), true[-1]
    text = (
        f"With its KL left free PPO went to {path['kl'][-1]:.1f} nats an answer: the learned reward rose from {reward[0]:.2f} to "
        f"{reward[-1]:.2f}; the true score, on the prompts that it learns from, was {true[0]:.3f} at first, {best:.3f} at best and "
        f"{end:.3f} in the end (means over tenths of the run)"
    )
    fell = end < best - 0.03
    return text + (
        ": over-optimised." if fell else ": it was not over-optimised in these steps, so the picture shows no fall."
    )


def report(
    scores: dict[str, list[dict[str, Any]]],
    sft: Path,
    questions: int,
    failed: Sequence[str] = (),
    free: Path | None = None,
) -> str:
    """README.md of the comparison. `failed`: runs that ended otherwise than well; `free`: PPO's with its KL left free."""
    seeds = len(scores["sft"])
    return "\n\n".join(
        [
            "# Alignment methods side by side",
            *([f"**Not in it, for they failed: {', '.join(failed)}.**"] if failed else []),
            f"All start from {sft}; {questions} test questions of the builtin tasks, answered at temperature 1 "
            f"(and greedily); mean over {seeds} seed{'s' if seeds > 1 else ''}, and from where to where. Right is what the "
            "tasks' own checker says. The learned reward is in standard deviations, 0 for a good answer.",
            table(scores),
            "Best-of-n trains nothing, and pays with n answers for each that it gives. DPO and GRPO were told by the "
            "checker what is right, PPO by the reward model, which errs. The methods sample unlike numbers of answers to learn from, as "
            "their laptop configs have it, and seconds hold each recipe's own measurement before and after; the reward model's are not in them.",
            "![True score against KL](plots/frontier.png)",
            "![Learned reward against KL](plots/reward_frontier.png)",
            *([over_optimised(free), "![Over-optimisation](plots/over_optimisation.png)"] if free else []),
        ]
    ) + "\n"  # fmt: skip


def main(argv: list[str]) -> int:
    """Run what is missing, score it, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/alignment_comparison"), help="where all of it goes")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--model", type=Path, help="the SFT model (default: a half-trained one, made first)")
    parser.add_argument(
        "--questions",
        type=positive,
        default=QUESTIONS,
        help=f"test questions, at most {QUESTIONS}, that every model answers",
    )
    asked, extra = parser.parse_known_args(argv)
    steps = plan(asked.root, asked.seeds, asked.model)
    try:
        refuse_planned(steps, extra)
        if asked.model is not None and not (asked.model / "config.json").exists():
            raise UserError(f"--model: {asked.model} holds no config.json, so it is not a saved model")
        if asked.questions > QUESTIONS:
            raise UserError(f"--questions: {asked.questions} is more than {QUESTIONS}")
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    failed: list[str] = []
    for step in steps:
        if code := run_step(step, asked.root, extra):
            if step.recipe in ("full", "reward_model"):  # all others stand on it
                return code
            failed.append(f"{step.recipe}/{step.name} (exit code {code})")
    sft = asked.model or asked.root / "full" / "sft" / "model"
    scores = score_all(asked.root, steps, sft, asked.seeds, asked.questions)
    draw(asked.root, steps, scores)
    free = next(
        (step.folder(asked.root) for step in steps if step.method == "ppo_free" and step.figures(asked.root)), None
    )
    write_atomically(asked.root / "comparison.json", json.dumps(scores, indent=2) + "\n")
    write_atomically(asked.root / "README.md", report(scores, sft, asked.questions, failed, free))
    print(f"\n{table(scores)}\n\n  {asked.root / 'README.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
