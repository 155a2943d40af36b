"""The comparison of the alignment methods: what runs in which order, what is kept, and the report of given scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import alignment_comparison as comparison


def test_all_methods_start_from_one_model_and_ppo_from_one_reward_model(tmp_path: Path) -> None:
    steps = comparison.plan(tmp_path, 3, None)
    assert [step.method for step in steps] == ["sft", "best_of_n", *["dpo", "ppo", "grpo"] * 3, "ppo_free"]
    made = str(tmp_path / "full" / "sft" / "model")
    for step in steps[1:]:
        assert step.arguments[:2] == ("--model.name", made)
    judged = [step for step in steps if step.recipe == "ppo"]
    assert all(str(tmp_path / "reward_model" / "judge" / "model") in step.arguments for step in judged)
    assert len({step.folder(tmp_path) for step in steps}) == len(steps), "two runs share a folder"


def test_another_sft_model_is_taken_as_it_is(tmp_path: Path) -> None:
    steps = comparison.plan(tmp_path, 1, Path("runs/full/default/model"))
    assert [step.method for step in steps] == ["best_of_n", "dpo", "ppo", "grpo", "ppo_free"]
    assert all("runs/full/default/model" in step.arguments for step in steps)


def test_every_key_of_the_plan_is_one_of_its_recipe(tmp_path: Path) -> None:
    import importlib

    from recipes.common.config import load_config

    for step in comparison.plan(tmp_path, 1, None):
        module = importlib.import_module(f"recipes.{step.chapter}.{step.recipe}")
        folder = ROOT / "configs" / step.chapter / step.recipe
        load_config(module.Config, step.command(tmp_path, []), config_folder=folder)


def test_what_is_finished_is_not_run_again_and_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    step = comparison.Step("dpo", "alignment", "dpo", "seed0")
    folder = step.folder(tmp_path)
    folder.mkdir(parents=True)
    assert "--run.resume" not in step.command(tmp_path, [])
    (folder / "config.yaml").write_text("")
    assert step.command(tmp_path, [])[-2:] == ["--run.resume", "true"]
    (folder / "metrics.json").write_text("{}")
    before = set(sys.modules)
    comparison.run_step(step, tmp_path, [])
    assert set(sys.modules) == before, "the finished run was started again"


def test_a_recipe_that_fails_gives_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step = comparison.Step("dpo", "alignment", "dpo", "seed0", ("--model.nam", "x"))
    assert comparison.run_step(step, tmp_path, []) == 2
    told = capfd.readouterr().err
    assert "model.name" in told and "ended with exit code 2: left out" in told


def test_one_that_fails_is_left_out_and_one_that_others_stand_on_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, ran = {"dpo": 1}, []

    def run(step: Any, root: Path, extra: list[str]) -> int:
        ran.append(step.recipe)
        return codes.get(step.recipe, 0)

    monkeypatch.setattr(comparison, "run_step", run)
    monkeypatch.setattr(comparison, "score_all", lambda *_: SCORES)
    monkeypatch.setattr(comparison, "draw", lambda *_: None)
    line = ["--root", str(tmp_path), "--seeds", "1"]
    assert comparison.main(line) == 1
    assert ran == ["full", "reward_model", "dpo", "ppo", "grpo", "ppo"]
    assert "Not in it, for they failed: dpo/seed0 (exit code 1)." in (tmp_path / "README.md").read_text()
    ran.clear()
    codes["reward_model"] = 2
    assert comparison.main(line) == 2 and ran == ["full", "reward_model"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--training.max_steps", "24"], "--training.max_steps: the comparison says it itself"),
        (["--training.seed=3"], "--training.seed: the comparison says it itself"),
        (["--model", "nowhere"], "--model: nowhere holds no config.json"),
        (["--questions", "2000"], "--questions: 2000 is more than 1000"),
    ],
)
def test_bad_words_end_with_2_before_anything_runs(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comparison.main([*words, "--root", str(tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_scores_are_those_of_the_models_that_are_there(tmp_path: Path) -> None:
    bench = comparison.Bench.__new__(comparison.Bench)
    policy, sft, judge = (tmp_path / name for name in ("policy", "sft", "judge"))
    bench.root, bench.rows, bench.of = tmp_path, [{}] * 3, (sft, judge)
    for folder in (policy, sft, judge):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"one")
    assert bench.kept("ppo-seed0", policy, lambda: {"reward": 1}) == {"reward": 1}
    assert bench.kept("ppo-seed0", policy, lambda: {"reward": 2}) == {"reward": 1}
    for i, folder in enumerate((policy, judge), 3):
        (folder / "model.safetensors").write_bytes(b"another")
        assert bench.kept("ppo-seed0", policy, lambda i=i: {"reward": i}) == {"reward": i}


def test_the_answers_that_each_method_samples_are_counted(tmp_path: Path) -> None:
    laptop = ROOT / "configs" / "alignment"
    counts = {}
    for recipe in ("dpo", "ppo", "grpo"):
        step = comparison.Step(recipe, "alignment", recipe, "seed0")
        step.folder(tmp_path).mkdir(parents=True)
        (step.folder(tmp_path) / "config.yaml").write_text((laptop / recipe / "cpu.yaml").read_text())
        counts[recipe] = comparison.answers_learned_from(step, tmp_path)
    assert counts == {"dpo": 4000 * 8, "ppo": 140 * 512, "grpo": 50 * 256}


SCORES: dict[str, list[dict[str, Any]]] = {
    "sft": [
        {"sampled_exact_match": 0.50, "exact_match": 0.60, "reward": -1.0, "kl": 0.0},
        {"sampled_exact_match": 0.52, "exact_match": 0.60, "reward": -1.1, "kl": 0.0},
    ],
    "best_of_n": [
        {
            "sampled_exact_match": 0.7,
            "reward": 0.1,
            "kl": 1.8,
            "curve": [
                {"n": 1, "kl": 0.0, "sampled_exact_match": 0.5, "reward": -1.0},
                {"n": 16, "kl": 1.8, "sampled_exact_match": 0.7, "reward": 0.1},
            ],
        }
    ]
    * 2,
    "ppo": [
        {"sampled_exact_match": 0.60, "exact_match": 0.61, "reward": -0.5, "kl": 0.3, "wall_seconds": 100.0},
        {"sampled_exact_match": 0.64, "exact_match": 0.63, "reward": -0.4, "kl": 0.4, "wall_seconds": 102.0},
    ],
    "ppo_free": [{"sampled_exact_match": 0.4, "exact_match": 0.45, "reward": 0.9, "kl": 3.0, "wall_seconds": 150.0}],
}


def test_the_table_takes_the_gain_seed_by_seed() -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in comparison.table(SCORES).splitlines()}
    assert "| 0.620 (0.600 to 0.640) | 0.110 (0.100 to 0.120) |" in rows["PPO"]
    assert "at most 1.80" in rows["best of 16"]
    assert "-0.100" in rows["PPO, KL left free"]


def test_pictures_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *to, **how: (figures.append(figure), savefig(figure, *to, **how))
    )
    steps = [step for step in comparison.plan(tmp_path, 1, Path("sft")) if step.recipe == "ppo"]
    for step in steps:
        folder = step.folder(tmp_path)
        folder.mkdir(parents=True)
        lines = [{"step": i, "kl": 0.1 * i, "reward": i / 10, "true_score": 0.5} for i in range(1, 21)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.json").write_text("{}")
    assert len(comparison.trajectory(steps[0].folder(tmp_path))["kl"]) == 4
    comparison.draw(tmp_path, steps, SCORES)
    (legend,) = figures[-1].legends  # over-optimisation has two axes: what is inside one lies over the other's lines
    assert len(legend.get_texts()) == 4
    assert legend.get_window_extent().y1 < min(axes.bbox.y0 for axes in figures[-1].axes)
    free = steps[-1].folder(tmp_path)
    told = comparison.report(SCORES, Path("sft"), 1000, free=free)
    assert "it was not over-optimised in these steps" in told
    lines = [{"step": i, "kl": 0.1 * i, "reward": i / 10, "true_score": 0.5 - 0.01 * i} for i in range(1, 21)]
    (free / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = comparison.over_optimised(free)
    assert (
        "was 0.485 at first, 0.485 at best and 0.305 in the end (means over tenths of the run): over-optimised." in said
    )
    for name in ("frontier", "reward_frontier", "over_optimisation"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5000
        assert f"plots/{name}.png" in told
