"""The parameter-efficient methods side by side with full fine-tuning: one base, the same rows, steps and seeds.

    make peft-comparison                      # 3 seeds on two bases; what is finished is kept, what was interrupted goes on
    make peft-comparison ARGS="--base llama --seeds 1 --methods full lora ia3"
    make peft-comparison ARGS="--steps 200"   # a shorter look; its runs are kept apart from those of other lengths

    llama    what `make llama` left learns to answer: exact match, by the tasks' own checker
    bert     what `make bert` left learns which package a docstring is from: accuracy

Each run is a recipe with its own laptop config, rates and sizes included, in a process of its own, since its peak memory
is compared. Full fine-tuning is the measure: a method's share is how much of full's gain over the base it reaches.
adapter_fusion, madx and multi_adapter are left out: they put adapters of several tasks or languages together, which is
another question.

The report is <root>/README.md, written anew after every method, the figures <root>/comparison.json. Other arguments go to
every recipe: give them a --root of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from side_by_side import (
    ROOT,
    Step,
    check_words,
    mean,
    positive,
    refuse_planned,
    run_step,
    told,
)  # first: it makes `recipes` importable

from recipes.common.errors import UserError
from recipes.common.models import ensure_made
from recipes.common.run_folder import RunFolder, write_atomically

GOAL = 0.6  # of full fine-tuning's gain
Arguments = Mapping[str, Any]
Found = dict[str, list[dict[str, Any]]]  # method -> the figures of its finished runs, by seed


@dataclass(frozen=True)
class Base:
    """A pretrained model and the task that all methods teach it."""

    title: str
    task: str
    task_type: str
    score: str  # the figure of metrics.json that is compared
    steps: int
    arguments: Arguments


# The same kernel for all, and nothing compiled, which a recipe may decide halfway: the times of a step stand side by side.
# Scored on the test rows: the recipes' rates and sizes were chosen on those of validation.
ALIKE = {"model.attention": "eager", "training.torch_compile": "false", "data.validation_split": "test"}
BASES = {
    "llama": Base(
        "LLaMA", "questions that can be checked, and questions about the standard library", "CAUSAL_LM", "exact_match", 1100,
        ALIKE | {
            "model.name": "runs/llama/default/model", "data.name": "[tasks, pydocs_qa]", "data.max_validation_samples": 1000,
            "evaluation.max_samples": 800, "evaluation.batch_size": 100, "evaluation.max_new_tokens": 24,
        },
    ),
    "bert": Base(
        "BERT", "which of 8 packages a docstring is from", "SEQ_CLS", "accuracy", 600,
        ALIKE | {
            "model.name": "runs/bert/default/model", "data.name": "pydocs_package", "training.max_length": 128,
            "training.packing": "false", "training.per_device_train_batch_size": 16,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A recipe's row. Arguments are what a base needs that the recipe's laptop config, made for LLaMA, does not say."""

    title: str
    family: str
    good_for: str
    section: str | None = None  # of the config, which holds task_type; default: the recipe's name
    llama: Arguments = field(default_factory=dict)
    bert: Arguments | None = field(default_factory=dict)  # None: the recipe does not take it


WHOLE, PART, PROMPT, LOW_RANK, ADDED = "all weights", "a part", "prompts", "low rank", "added modules"
BERT_LINEAR = "[query, key, value, dense]"
BERT_INNER = r"layer\.\d+\.output\.dense"  # `output.dense` alone names the attention's too
METHODS = {  # the order of the table
    "full": Method(
        "full fine-tuning", WHOLE,
        "the most that can be learned, where memory for every weight's gradient and moments and a copy a task are no matter",
        bert={"full.optimizer": "adamw", "training.learning_rate": 3e-4},  # as `make bert` fine-tunes it
    ),
    "bitfit": Method(
        "BitFit", PART,
        "little data on a model that has biases; nothing is added at inference",
        bert={"bitfit.add_biases": "false", "training.learning_rate": 1e-2},
    ),
    "prefix_tuning": Method(
        "prefix tuning", PROMPT, "generation by one frozen model that serves many tasks in one batch; takes room in the cache"
    ),
    "prompt_tuning": Method(
        "prompt tuning", PROMPT, "very large models, where it comes near full; tiny files; learns slowly and is weak on small ones"
    ),
    "p_tuning": Method(
        "P-tuning", PROMPT, "understanding with a template, where hand-written prompts are brittle; a prompt's cost at inference"
    ),
    "p_tuning_v2": Method(
        "P-tuning v2", PROMPT, "classification and tagging with a frozen model, small ones too; sensitive to prompt length",
        llama={
            "training.max_length": 64, "training.train_sampling_strategy": "group_by_length",
            "training.per_device_train_batch_size": 64, "training.per_device_eval_batch_size": 32,
        },  # as prefix_tuning: its laptop config is for tagging
    ),
    "lora": Method(
        "LoRA", LOW_RANK, "the first to try: near full, merges into the weights or is swapped and served by the hundred",
        bert={"lora.target_modules": BERT_LINEAR},
    ),
    "adalora": Method(
        "AdaLoRA", LOW_RANK, "a tight budget of rank, spent where it matters; a schedule to set and slower steps for it",
        bert={"adalora.target_modules": BERT_LINEAR},
    ),
    "qlora": Method(
        "QLoRA", LOW_RANK, "a model that does not fit otherwise: weights in about a quarter of 16 bits' room, for slower steps",
        section="lora", bert=None,
    ),
    "ia3": Method(
        "IA3", ADDED, "a few examples of what the model nearly knows; the smallest that merges to no cost",
        bert={"ia3.target_modules": rf".*({BERT_INNER}|self\.(key|value))", "ia3.feedforward_modules": rf".*{BERT_INNER}"},
    ),
    "adapter": Method(
        "adapters", ADDED, "many tasks on one base, stacked or fused; layers that stay at inference and cannot be merged"
    ),
}  # fmt: skip


# ---------------------------------------------------------------- runs


def there(base: str | None = None) -> list[str]:
    """The methods of which there is a recipe (that takes the base), in the order of the table."""
    found = [method for method in METHODS if (ROOT / "recipes" / "finetuning" / f"{method}.py").exists()]
    return [method for method in found if base != "bert" or METHODS[method].bert is not None]


def arguments(base: str, method: str, steps: int) -> dict[str, Any]:
    """What a run says besides its laptop config: the base and the task, and what the method needs to meet them."""
    about, model = METHODS[method], BASES[base]
    own = about.llama if base == "llama" else about.bert
    said = {**model.arguments, f"{about.section or method}.task_type": model.task_type, "training.max_steps": steps}
    if method == "adalora":  # its schedule of 1100 steps, in proportion
        said |= {"adalora.tinit": steps * 160 // 1100, "adalora.tfinal": steps * 400 // 1100}
    return said | dict(own or {})


def plan(base: str, method: str, seeds: int, steps: int | None = None) -> list[Step]:
    """A method's runs on a base, one a seed; their names tell another number of steps than the base's own."""
    words = arguments(base, method, steps or BASES[base].steps)
    name = f"{base}-{steps}steps" if steps not in (None, BASES[base].steps) else base
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [
        Step(method, "finetuning", method, f"{name}-seed{seed}", (*line, "--training.seed", str(seed)))
        for seed in range(seeds)
    ]


def figures_of(step: Step, root: Path, score: str) -> dict[str, Any] | None:
    """What is compared of a run; None until it is finished. Full fine-tuning's file is the whole model."""
    figures = step.figures(root)
    if figures is None:
        return None
    weights = (step.folder(root) / "model").glob("*.safetensors")
    file = figures["adapter_bytes"] if "adapter_bytes" in figures else sum(part.stat().st_size for part in weights)
    names = ("eval_loss", "baseline_loss", "trainable_parameters", "peak_memory_gib", "wall_seconds")
    return {
        "run": str(step.folder(root)), score: figures[score], f"baseline_{score}": figures[f"baseline_{score}"],
        **{name: figures[name] for name in names},
        "step_seconds": figures.get("step_seconds"),  # not known of a run of a few steps
        "adapter_bytes": file,
    }  # fmt: skip


def finished(root: Path, seeds: int, steps: int | None) -> dict[str, Found]:
    """The figures of every finished run of these seeds and steps, those of earlier calls too: base -> method -> runs."""
    found: dict[str, Found] = {}
    for base, method in product(BASES, METHODS):
        if method in there(base):
            told_of = [figures_of(step, root, BASES[base].score) for step in plan(base, method, seeds, steps)]
            if rows := [row for row in told_of if row is not None]:
                found.setdefault(base, {})[method] = rows
    return found


# ---------------------------------------------------------------- report


def start_of(found: Found, score: str) -> float | None:
    """The base's score: full's before it learns. A prompt method's base has a random prompt before it."""
    return mean([row[f"baseline_{score}"] for row in found["full"]]) if "full" in found else None


def shares(found: Found, score: str) -> dict[str, list[float]]:
    """By method and seed, the gain over the base as a share of full fine-tuning's mean gain; empty where that is not above 0."""
    start = start_of(found, score)
    if start is None or (gain := mean([row[score] for row in found["full"]]) - start) <= 0:
        return {}
    return {method: [(row[score] - start) / gain for row in rows] for method, rows in found.items()}


def size(count: float) -> str:
    """`3840` -> `3.8 k`; bytes and numbers alike, by thousands."""
    for unit, much in (("M", 1e6), ("k", 1e3)):
        if count >= much:
            return f"{count / much:.{2 if unit == 'M' else 1}f} {unit}"
    return f"{count:.0f}"


def mean_of(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    """Of the runs that know it."""
    known = [row[name] for row in rows if row[name] is not None]
    return f"{mean(known):.{digits}f}" if known else ""


def table(found: Found, score: str) -> str:
    """A Markdown row a method, the base before them."""
    lines = [
        f"| method | {score.replace('_', ' ')} | % of full's gain | held-out loss | numbers that learn | file, bytes | seconds a step | peak GiB "
        "| seconds in all | good for, by the literature |",
        "|---" * 10 + "|",
    ]
    part, start = shares(found, score), start_of(found, score)
    if start is not None:
        loss = mean_of(found["full"], "baseline_loss", 3)
        lines.append(f"| the base | {start:.3f} | 0 | {loss} | | | | | | |")
    for method, rows in found.items():
        cells = [
            told([row[score] for row in rows], 3),
            told([100 * share for share in part.get(method, [])], 0),
            mean_of(rows, "eval_loss", 3),
            size(rows[0]["trainable_parameters"]),
            size(mean([row["adapter_bytes"] for row in rows])),
            mean_of(rows, "step_seconds", 3),
            mean_of(rows, "peak_memory_gib", 2),
            mean_of(rows, "wall_seconds", 0),
            METHODS[method].good_for,
        ]
        lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def below_goal(found: Found, score: str) -> str:
    """One sentence on the methods that miss the goal."""
    part = {method: mean(values) for method, values in shares(found, score).items()}
    if not part:
        return "Full fine-tuning has no finished run with a gain here, so there is nothing to take a share of."
    below = [f"{METHODS[method].title} ({share:.0%})" for method, share in part.items() if share < GOAL]
    if not below:
        return f"No method is below {GOAL:.0%} of full fine-tuning's gain."
    return f"Below {GOAL:.0%} of full fine-tuning's gain: {', '.join(below)}."


def report(found: dict[str, Found], steps: int | None, failed: Sequence[str] = ()) -> str:
    """README.md of the comparison. `failed`: the runs that ended otherwise than well."""
    parts = [
        "# Parameter-efficient methods side by side",
        *([f"**Not in it, for they failed: {', '.join(failed)}.**"] if failed else []),
        "Mean over the seeds, and from where to where, on the builtin sets' test rows, on which nothing was chosen. Each method has the same base, rows, steps and seeds, and otherwise its "
        "own recipe's laptop config: its learning rate and sizes are those that the recipe was settled with, on LLaMA, and its "
        "optimizer, which is Muon for LLaMA's full fine-tuning and AdamW for all others. On BERT full fine-tuning and BitFit have "
        "rates of their own. How LLaMA's rows are laid out is part of a recipe too: prefixes stand before padded rows, prompts in "
        "longer packed ones, with about as many conversations a step. A row's length decides which long conversations are left "
        "out, so held-out losses may differ a little in what they are taken over; the questions that are checked are the same.",
        "Peak memory is that of the whole process, Python and the libraries included; a file is what a task adds to the base: "
        "the adapter, or for full fine-tuning the model. The last column is what the literature says of a method, not a result "
        "of this run. adapter_fusion, madx and multi_adapter put adapters of several tasks or languages together, another question.",
    ]
    for base, rows in found.items():
        about = BASES[base]
        seeds = max(map(len, rows.values()))
        untrained = (
            " Before training its head is random, and every method trains the head too: part of each gain is the head's alone."
            if about.task_type == "SEQ_CLS"
            else ""
        )
        parts += [
            f"## {about.title}: {about.task}",
            f"`{about.arguments['model.name']}`, {steps or about.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}.{untrained}",
            table(rows, about.score),
            below_goal(rows, about.score),
            f"![{about.score.replace('_', ' ')} against numbers that learn](plots/score_{base}.png)",
            f"![Memory, time and file size](plots/costs_{base}.png)",
        ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- pictures

COLOURS = {WHOLE: "0.35", PART: "C3", PROMPT: "C0", LOW_RANK: "C1", ADDED: "C2"}


def draw_scores(axes: Any, found: Found, score: str) -> None:
    """Held-out score against how many numbers learn; full fine-tuning and the base are lines."""
    points, seen = [], set()
    for method, rows in found.items():
        if method == "full":
            continue
        about, values = METHODS[method], [row[score] for row in rows]
        x, y, low, high = rows[0]["trainable_parameters"], mean(values), min(values), max(values)
        label = None if about.family in seen else about.family
        seen.add(about.family)
        axes.errorbar(
            x, y, [[y - low], [high - y]], fmt="o", color=COLOURS[about.family], capsize=3, markersize=6, label=label
        )
        points.append((x, y, low, high, about.title, COLOURS[about.family]))
    if "full" in found:
        best, start = mean([row[score] for row in found["full"]]), start_of(found, score)
        learned = size(found["full"][0]["trainable_parameters"])
        axes.axhline(best, color=COLOURS[WHOLE], label=f"full fine-tuning, {learned}")
        axes.axhline(start, color=COLOURS[WHOLE], linestyle="--", label="the base")
        if best > start:
            axes.axhline(start + GOAL * (best - start), color="0.75", linestyle=":", label=f"{GOAL:.0%} of full's gain")
    axes.set_xscale("log")
    axes.set_xmargin(0.12)
    axes.set_ymargin(0.1)
    axes.set_xlabel("numbers that learn")
    axes.set_ylabel(f"held-out {score.replace('_', ' ')}")
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    name_points(axes, points)


def name_points(axes: Any, points: Sequence[tuple[float, float, float, float, str, str]]) -> None:
    """A label beside each point (x, y, from, to, name, colour), in its colour, where it covers no point and no other label
    and no other point is nearer to it, if there is such a place; from farther away a line leads to the point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # settles where the axes are
    places = axes.transData.transform([point[:2] for point in points])
    taken = []
    for x, _, low, high, _, _ in points:
        ends = axes.transData.transform([(x, low), (x, high)])
        taken.append(Bbox(ends).padded(5))
    for i, (x, y, _, _, name, colour) in enumerate(points):
        tried = []
        for dx, dy, horizontal, vertical in SIDES:
            line = {"arrowstyle": "-", "color": colour, "lw": 0.6} if abs(dx) + abs(dy) > 15 else None
            text = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=horizontal, va=vertical, fontsize=8,
                color=colour, arrowprops=line,
            )  # fmt: skip
            text.get_window_extent()  # puts it in its place; this extent has the line in it, the next has not
            box = Text.get_window_extent(text)
            outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            strange = (nearest(box, places) != i) * (0.5 if line else 1)  # a line tells whose it is all the same
            tried.append((box.count_overlaps(taken) + 2 * outside + strange, text, box))
        best = min(tried, key=lambda one: one[0])
        for one in tried:
            if one is not best:
                one[1].remove()
        taken.append(best[2])


SIDES = [  # how far a label is from its point, in points, and by which of its sides it is held there
    (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    (7, 8, "left", "bottom"), (-7, 8, "right", "bottom"), (7, -8, "left", "top"), (-7, -8, "right", "top"),
    (20, 12, "left", "center"), (20, -12, "left", "center"), (-20, 12, "right", "center"), (-20, -12, "right", "center"),
    (20, 26, "left", "center"), (20, -26, "left", "center"), (-20, 26, "right", "center"), (-20, -26, "right", "center"),
    (0, 22, "center", "bottom"), (0, -22, "center", "top"),
]  # fmt: skip


def nearest(box: Any, places: Sequence[Sequence[float]]) -> int:
    """Which of the places (x, y) is nearest to a box."""
    away = [math.hypot(max(box.x0 - x, x - box.x1, 0.0), max(box.y0 - y, y - box.y1, 0.0)) for x, y in places]
    return away.index(min(away))


def draw_costs(axes: Any, found: Found) -> None:
    """Bars of memory, seconds a step and file size, a panel each."""
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(9, 1.4 + 0.28 * len(found))
    colours = [COLOURS[METHODS[method].family] for method in found]
    panels = figure.subplots(1, 3, sharey=True)
    columns = (
        ("peak_memory_gib", "peak memory of the process, GiB", 1, "{:.2f}"),
        ("step_seconds", "seconds a step", 1, "{:.3f}"),
        ("adapter_bytes", "file, kB", 1e-3, "{:,.0f}"),
    )
    for panel, (name, label, unit, shown) in zip(panels, columns, strict=True):
        known = [[row[name] for row in rows if row[name] is not None] for rows in found.values()]
        widths = [unit * mean(values) if values else float("nan") for values in known]
        bars = panel.barh(range(len(found)), widths, color=colours)
        panel.bar_label(
            bars, ["" if math.isnan(width) else shown.format(width) for width in widths], padding=3, fontsize=7
        )
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.2)
    panels[2].set_xscale("log")
    panels[2].set_xlim(left=1)  # a bar starts at 1 kB
    panels[0].set_yticks(range(len(found)), [METHODS[method].title for method in found])
    panels[0].invert_yaxis()


def write(root: Path, seeds: int, steps: int | None, failed: Sequence[str] = ()) -> dict[str, Found]:
    """README.md, comparison.json and the pictures, of what is finished; gives that."""
    found, run = finished(root, seeds, steps), RunFolder(root, recipe="peft_comparison")
    for base, rows in found.items():
        score = BASES[base].score
        run.plot(f"score_{base}", lambda axes: draw_scores(axes, rows, score))  # noqa: B023
        run.plot(f"costs_{base}", lambda axes: draw_costs(axes, rows))  # noqa: B023
    figures = {
        base: {
            "base": start_of(rows, BASES[base].score), "steps": steps or BASES[base].steps, "runs": rows,
            "share_of_full_gain": shares(rows, BASES[base].score),
        }
        for base, rows in found.items()
    }  # fmt: skip
    write_atomically(root / "comparison.json", json.dumps(figures, indent=2) + "\n")
    write_atomically(root / "README.md", report(found, steps, failed))
    return found


def main(argv: list[str]) -> int:
    """Run what is missing, method by method, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/peft_comparison"), help="where all of it goes")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    own = ", ".join(f"{base.steps} for {name}" for name, base in BASES.items())
    parser.add_argument("--steps", type=positive, help=f"of every run (default: {own})")
    parser.add_argument("--base", choices=[*BASES, "both"], default="both")
    asked, extra = parser.parse_known_args(argv)
    try:
        check_words("--methods", asked.methods or [], there())
        bases = list(BASES) if asked.base == "both" else [asked.base]
        chosen = [
            (base, m) for base, m in product(bases, METHODS) if m in there(base) and m in (asked.methods or METHODS)
        ]
        refuse_planned([step for base, method in chosen for step in plan(base, method, 1, asked.steps)], extra)
        for base in bases:  # now, not inside of the first run, whose time and memory are measured
            ensure_made(BASES[base].arguments["model.name"], RunFolder(asked.root, recipe="peft_comparison"))
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    failed: list[str] = []
    for base, method in chosen:
        for step in plan(base, method, asked.seeds, asked.steps):
            if code := run_step(step, asked.root, extra):
                failed.append(f"{step.recipe}/{step.name} (exit code {code})")
        found = write(asked.root, asked.seeds, asked.steps, failed)
    for base, rows in found.items():
        print(f"\n{BASES[base].title}\n{table(rows, BASES[base].score)}\n{below_goal(rows, BASES[base].score)}")
    print(f"\n  {asked.root / 'README.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
