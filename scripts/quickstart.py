"""From raw text to an aligned model you can chat with, offline: tokenizer, pretraining, SFT, reward model, PPO, report.

    make quickstart                      # all of it; what is finished is kept, what was interrupted goes on
    make quickstart ARGS=--fresh         # delete the five runs and start again

Each stage is a recipe with its own laptop config, so each can be run alone (`make llama`). The report is
runs/quickstart/README.md, the figures runs/quickstart/summary.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side import ASKED, asked_for  # first: it makes `recipes` importable

from recipes.common.errors import UserError
from recipes.common.models import MADE_WITH
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import write_atomically
from recipes.common.training import duration


@dataclass
class Stage:
    """One recipe of the chain. `minutes`: about what it takes on 2 cores with AVX512-BF16, for the time left."""

    recipe: str
    chapter: str
    title: str
    minutes: float
    arguments: tuple[str, ...] = ()
    takes: dict[str, str] = field(default_factory=dict)  # a key of its config <- the recipe that made what it names


STAGES = [
    Stage("tokenizer", "pretraining", "a tokenizer from the text", 0.3, MADE_WITH["tokenizer"]),
    Stage(
        "llama", "pretraining", "pretraining a small LLaMA from scratch", 4.9, takes={"model.tokenizer": "tokenizer"}
    ),
    Stage("full", "finetuning", "supervised fine-tuning on instructions", 2.3, takes={"model.name": "llama"}),
    Stage("reward_model", "alignment", "a reward model from ranked answers", 2.2, takes={"model.name": "full"}),
    Stage(
        "ppo",
        "alignment",
        "PPO against the reward model",
        3.4,
        takes={"model.name": "full", "ppo.reward_model": "reward_model"},
    ),
]

SUMMARY = {  # summary.json <- (recipe, figure of its metrics.json)
    "tokenizer_bytes_per_token": ("tokenizer", "bytes_per_token"),
    "pretrain_bits_per_byte": ("llama", "bits_per_byte"),
    "xz_bits_per_byte": ("llama", "xz_bits_per_byte"),
    "xz_primed_bits_per_byte": ("llama", "xz_primed_bits_per_byte"),
    "base_exact_match": ("full", "baseline_exact_match"),
    "sft_exact_match": ("ppo", "baseline_exact_match"),  # the SFT model on the questions that PPO's is measured on
    "sft_sampled_exact_match": ("ppo", "baseline_sampled_exact_match"),
    "reward_accuracy": ("reward_model", "reward_accuracy"),
    "ppo_exact_match": ("ppo", "exact_match"),
    "ppo_sampled_exact_match": ("ppo", "sampled_exact_match"),
    "ppo_reward_before": ("ppo", "reward_before"),
    "ppo_reward_after": ("ppo", "reward_after"),
    "ppo_kl": ("ppo", "kl"),
}


def folder_of(root: Path, recipe: str) -> Path:
    """Where a stage's run lives."""
    return root / recipe / "default"


def run_stage(stage: Stage, root: Path, extra: list[str]) -> None:
    """Run one recipe in this process, resuming what was interrupted. Exits with the recipe's code if it is not 0."""
    folder = folder_of(root, stage.recipe)
    module = importlib.import_module(f"recipes.{stage.chapter}.{stage.recipe}")
    resume = ["--run.resume", "true"] if (folder / "config.yaml").exists() else []
    takes = [
        word for key, made_by in stage.takes.items() for word in (f"--{key}", str(folder_of(root, made_by) / "model"))
    ]
    argv = ["--run.root", str(root), *stage.arguments, *takes, *resume, *extra]
    asked = asked_of(stage, root, extra)
    code = run_recipe(module.main, module.Config, argv)
    if code != 0:
        sys.exit(code)
    write_atomically(folder / ASKED, json.dumps(asked) + "\n")


def asked_of(stage: Stage, root: Path, extra: list[str]) -> list[str]:
    """What makes a stage's run: its arguments, and what is in the models that it takes."""
    return asked_for(
        [*stage.arguments, *extra], [folder_of(root, made_by) / "model" for made_by in stage.takes.values()]
    )


def check_kept(stage: Stage, root: Path, extra: list[str]) -> str:
    """How a finished stage's run came here. Raises UserError where this chain would make another."""
    folder = folder_of(root, stage.recipe)
    if not (folder / ASKED).exists():
        return f"made by `make {stage.recipe}`, as {folder / 'config.yaml'} has it: kept"
    if json.loads((folder / ASKED).read_text()) != asked_of(stage, root, extra):
        raise UserError(
            f"{folder} was made with other arguments, or of other models than those that are there now: make all of it again "
            "(`make quickstart ARGS=--fresh`), or give another --root"
        )
    return "done before, kept"


def figures(root: Path) -> dict[str, dict[str, Any]]:
    """metrics.json of every stage."""
    return {stage.recipe: json.loads((folder_of(root, stage.recipe) / "metrics.json").read_text()) for stage in STAGES}


def summarise(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The flat summary. Raises UserError if a stage did not leave a figure that it should have."""
    missing = [(recipe, name) for recipe, name in SUMMARY.values() if name not in measured[recipe]]
    if missing:
        raise UserError(
            [
                f"{recipe}/default/metrics.json has no {name}: run the stage again (`make quickstart ARGS=--fresh`: all of them)"
                for recipe, name in missing
            ]
        )
    summary: dict[str, Any] = {key: measured[recipe][name] for key, (recipe, name) in SUMMARY.items()}
    summary["wall_seconds"] = round(sum(m["wall_seconds"] for m in measured.values()), 1)
    summary["peak_memory_gib"] = max(m["peak_memory_gib"] for m in measured.values())
    return summary


def answers_by_stage(root: Path) -> str:
    """The same held-out questions put to the model after each stage: a Markdown table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.common.builtin import BUILTINS
    from recipes.common.builtin.tasks import check
    from recipes.common.generation import generate

    by_task: dict[tuple[str, str], dict[str, Any]] = {}
    for row in BUILTINS["tasks"].load("test", 0):
        by_task.setdefault((row["task"], row["language"]), row)
    rows = list(by_task.values())[:14]
    told = {}
    for name, recipe in (("pretrained", "llama"), ("SFT", "full"), ("PPO", "ppo")):
        folder = folder_of(root, recipe) / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompts = [row["messages"][:-1] for row in rows]
        told[name] = generate(model, tokenizer, prompts, max_new_tokens=16, batch_size=32, temperature=None, seed=0)
    lines = ["| question | right answer | " + " | ".join(told) + " |", "|---" * (2 + len(told)) + "|"]
    for i, row in enumerate(rows):
        cells = [row["messages"][0]["content"], row["answer"]]
        cells += [("✓ " if check(row, answers[i]) else "✗ ") + (answers[i] or "(nothing)") for answers in told.values()]
        lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ⏎ ")[:80] for c in cells) + " |")
    return "\n".join(lines)


def report(root: Path, summary: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    """runs/quickstart/README.md: what was done, what it reached, pictures, answers before and after."""
    folder = root / "quickstart"
    pictures = []
    for stage in STAGES:
        for plot in sorted((folder_of(root, stage.recipe) / "plots").glob("*.png")):
            copy = folder / "plots" / f"{stage.recipe}-{plot.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plot, copy)
            pictures.append(f"**{stage.recipe}: {plot.stem.replace('_', ' ')}**\n\n![{plot.stem}](plots/{copy.name})")
    s = summary
    speed, judged = measured["llama"], measured["reward_model"]
    stages = [
        "| stage | what it learned | figure | before / baseline |",
        "|---|---|---|---|",
        f"| tokenizer | byte-level BPE | {s['tokenizer_bytes_per_token']:.2f} bytes a token | 1 (raw bytes) |",
        f"| pretraining | {speed['parameters']:,} parameters, {speed.get('tokens_per_second', 0):,.0f} tokens/s, "
        f"MFU {speed.get('mfu', 0):.0%} | **{s['pretrain_bits_per_byte']:.3f}** bits a byte, held-out files | "
        f"xz -9 {s['xz_bits_per_byte']:.2f}; after the training text {s['xz_primed_bits_per_byte']:.2f} |",
        f"| SFT | answers on held-out tasks | **{s['sft_exact_match']:.1%}** exact (greedy), {s['sft_sampled_exact_match']:.1%} sampled | "
        f"{s['base_exact_match']:.1%} |",
        f"| reward model | which answer is better | **{s['reward_accuracy']:.1%}** of held-out pairs, "
        f"{judged['head_accuracy']:.1%} by its head alone | {judged['baseline_accuracy']:.1%} |",
        f"| PPO | the learned reward, nothing else | **{s['ppo_sampled_exact_match']:.1%}** exact sampled, {s['ppo_exact_match']:.1%} greedy | "
        f"{s['sft_sampled_exact_match']:.1%} sampled, {s['sft_exact_match']:.1%} greedy |",
    ]
    parts = [
        "# Quickstart: from raw text to an aligned model",
        f"{duration(s['wall_seconds'])} on this machine, {s['peak_memory_gib']:.1f} GiB at most. Talk to the result: `make chat`.",
        "\n".join(stages),
        f"PPO moved the learned reward from {s['ppo_reward_before']:.2f} to {s['ppo_reward_after']:.2f} at a KL of {s['ppo_kl']:.3f} nats "
        "an answer from the SFT model. Exact match is the tasks' own checker, which PPO never saw.",
        "## The same held-out questions after each stage",
        answers_by_stage(root),
        "## Pictures",
        "\n\n".join(pictures),
        "## Where everything is",
        "\n".join(f"- {stage.title}: [{stage.recipe}](../{stage.recipe}/default/README.md)" for stage in STAGES),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    """Run the chain; gives the exit code."""
    parser = argparse.ArgumentParser(description="From raw text to an aligned model, offline.")
    parser.add_argument("--fresh", action="store_true", help="delete the chain's runs first")
    parser.add_argument("--root", default="runs", help="folder of the runs")
    options, extra = parser.parse_known_args(argv)
    root = Path(options.root)
    if options.fresh:
        for stage in STAGES:
            if (folder_of(root, stage.recipe) / "config.yaml").exists():
                shutil.rmtree(folder_of(root, stage.recipe))
    started = time.perf_counter()
    taken = planned = 0.0  # minutes of the stages that were run from their beginning
    for number, stage in enumerate(STAGES, 1):
        so_far = time.perf_counter() - started
        pace = taken / planned if planned else 1.0  # of this machine
        left = pace * sum(s.minutes for s in STAGES[number - 1 :])
        head = f"[{number}/{len(STAGES)}] {stage.title}"
        if (folder_of(root, stage.recipe) / "metrics.json").exists():
            try:
                print(f"\n{head}: {check_kept(stage, root, extra)}", flush=True)
            except UserError as error:
                print(f"error: {error.problems[0]}", file=sys.stderr)
                return 2
            continue
        print(f"\n{head} · {duration(so_far)} so far · about {left:.0f} min left\n", flush=True)
        afresh = not (folder_of(root, stage.recipe) / "config.yaml").exists()
        run_stage(stage, root, extra)
        if afresh:
            taken += (time.perf_counter() - started - so_far) / 60
            planned += stage.minutes
    measured = figures(root)
    try:
        summary = summarise(measured)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    text = report(root, summary, measured)
    write_atomically(root / "quickstart" / "README.md", text)
    write_atomically(root / "quickstart" / "summary.json", json.dumps(summary, indent=2) + "\n")
    width = max(map(len, summary))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in summary.items()))
    print(f"\n  report: {root / 'quickstart' / 'README.md'}\n  make chat talks to it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
