"""The comparison of the parameter-efficient methods: what runs, what is kept, the arithmetic of the table, the pictures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "tests" / "finetuning"))
import peft_checks
import peft_comparison as comparison
import side_by_side

BOTH = [(base, method) for base in comparison.BASES for method in comparison.there(base)]


# ------------------------------------------------------------------------------------------------------ what runs


def test_every_recipe_of_the_chapter_is_a_method_or_left_out_with_a_reason() -> None:
    recipes = {path.stem for path in (ROOT / "recipes" / "finetuning").glob("*.py")} - {"__init__"}
    assert recipes - set(comparison.METHODS) == {"adapter_fusion", "madx", "multi_adapter"}
    assert all(name in (comparison.__doc__ or "") for name in ("adapter_fusion", "madx", "multi_adapter"))
    assert set(comparison.there()) == recipes & set(comparison.METHODS)


@pytest.mark.parametrize(("base", "method"), BOTH)
def test_every_key_is_one_of_the_recipe_and_all_have_the_same_task(base: str, method: str, tmp_path: Path) -> None:
    from recipes.common.config import load_config

    [step] = comparison.plan(base, method, 1)
    module = importlib.import_module(f"recipes.finetuning.{step.recipe}")
    folder = ROOT / "configs" / "finetuning" / step.recipe
    values = load_config(module.Config, step.command(tmp_path, []), config_folder=folder).values
    about = comparison.BASES[base]
    assert values["model"]["name"] == f"runs/{base}/default/model"
    assert values["training"]["max_steps"] == about.steps
    assert values["data"]["name"] == {"llama": ["tasks", "pydocs_qa"], "bert": "pydocs_package"}[base]
    assert values[comparison.METHODS[method].section or method]["task_type"] == about.task_type
    assert base == "bert" or "--training.learning_rate" not in step.arguments, "on LLaMA a rate is the recipe's own"


def test_runs_of_other_seeds_steps_and_bases_are_kept_apart(tmp_path: Path) -> None:
    steps = [
        step for base in comparison.BASES for length in (None, 50) for step in comparison.plan(base, "lora", 3, length)
    ]
    assert len({step.folder(tmp_path) for step in steps}) == 12
    assert comparison.plan("llama", "lora", 1, 1100) == comparison.plan("llama", "lora", 1)


def test_adalora_s_schedule_fits_any_number_of_steps() -> None:
    for steps in (10, 150, 600, 1100):
        said = comparison.arguments("llama", "adalora", steps)
        assert said["adalora.tinit"] < steps - said["adalora.tfinal"]
    assert (said["adalora.tinit"], said["adalora.tfinal"]) == (160, 400)


@pytest.mark.parametrize("words", [["--methods", "lroa"], ["--methods", "full", "adaptor"], ["--seeds", "0"]])
def test_bad_words_end_with_2_before_anything_runs(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "peft_comparison.py"), *words, "--root", str(tmp_path / "runs")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    near = {"lroa": "did you mean `lora`?", "adaptor": "did you mean `adapter`?", "0": "is not at least 1"}[words[-1]]
    assert near in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- a recipe in its own process

SCRIPT = """
import signal, sys, time
from pathlib import Path
root = Path(sys.argv[sys.argv.index("--run.root") + 1])
def stop(number, frame):
    (root / "checkpoint").write_text(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(root / "started").write_text(" ".join(sys.argv[1:]))
code = int(sys.argv[sys.argv.index("--code") + 1])
time.sleep(60 if code == 130 else 0)
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> side_by_side.Step:
    """A recipe that ends with the code that it is told, or waits for a signal."""
    script = tmp_path / "recipes" / "finetuning" / "fake.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    monkeypatch.setattr(side_by_side, "ROOT", tmp_path)
    return side_by_side.Step("fake", "finetuning", "fake", "seed0")


def test_what_is_finished_is_kept_and_what_was_interrupted_goes_on(fake: side_by_side.Step, tmp_path: Path) -> None:
    folder = fake.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    assert (tmp_path / "started").read_text().endswith("--run.name seed0 --code 0 --run.resume true")
    (tmp_path / "started").unlink()
    (folder / "metrics.json").write_text("{}")
    side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    assert not (tmp_path / "started").exists(), "the finished run was started again"


def test_a_finished_run_of_other_arguments_is_not_taken_for_this_one(
    fake: side_by_side.Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    (fake.folder(tmp_path) / "metrics.json").write_text("{}")
    fake.arguments = ("--model.name", "another")
    with pytest.raises(SystemExit) as ended:
        side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    assert ended.value.code == 2
    assert "`--code 0`, not `--model.name another --code 0`" in capsys.readouterr().err


def test_a_recipe_that_fails_gives_its_exit_code(
    fake: side_by_side.Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert side_by_side.run_step(fake, tmp_path, ["--code", "2"]) == 2
    assert "ended with exit code 2: left out" in capsys.readouterr().err


def test_a_finished_run_of_another_model_is_not_taken_for_this_one(
    fake: side_by_side.Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"one")
    fake.arguments = ("--model.name", str(base))
    side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    (fake.folder(tmp_path) / "metrics.json").write_text("{}")
    assert side_by_side.run_step(fake, tmp_path, ["--code", "0"]) == 0
    (base / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit):
        side_by_side.run_step(fake, tmp_path, ["--code", "0"])
    assert "or of another model" in capsys.readouterr().err


def test_a_method_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path, "bert", "full", 1)
    monkeypatch.setattr(comparison, "ensure_made", lambda *_: None)
    monkeypatch.setattr(comparison, "run_step", lambda step, *_, **__: 1 if step.method == "lora" else 0)
    words = "--base bert --seeds 1 --methods full lora --root"
    assert comparison.main([*words.split(), str(tmp_path)]) == 1
    assert "Not in it, for they failed: lora/bert-seed0 (exit code 1)." in (tmp_path / "README.md").read_text()
    assert comparison.main([*words.split(), str(tmp_path), "--training.seed", "3"]) == 2


def test_a_stopped_comparison_lets_the_recipe_write_its_checkpoint(fake: side_by_side.Step, tmp_path: Path) -> None:
    driver = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}]\n"
        "import side_by_side; from pathlib import Path\n"
        f"side_by_side.ROOT = Path({str(tmp_path)!r})\n"
        "step = side_by_side.Step('fake', 'finetuning', 'fake', 'seed0')\n"
        "side_by_side.run_step(step, side_by_side.ROOT, ['--code', '130'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver])
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the recipe did not start"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "checkpoint").read_text() == "SIGTERM"


# ---------------------------------------------------------------------------------------------------- table, pictures


def row(score: float, learned: int, **more: Any) -> dict[str, Any]:
    return {
        "exact_match": score,
        "baseline_exact_match": 0.1,
        "eval_loss": 2.0,
        "baseline_loss": 4.0,
        "trainable_parameters": learned,
        "peak_memory_gib": 1.25,
        "wall_seconds": 100.0,
        "step_seconds": 0.2,
        "adapter_bytes": 4 * learned,
        **more,
    }


FOUND = {
    "full": [row(0.5, 3_500_000), row(0.7, 3_500_000)],
    "bitfit": [row(0.2, 16_000), row(0.3, 16_000)],
    "prompt_tuning": [row(0.05, 3840, baseline_exact_match=0.0, step_seconds=None)],  # its base has a random prompt
    "lora": [row(0.4, 780_000), row(0.5, 780_000)],
    "qlora": [row(0.41, 780_000), row(0.5, 780_000)],
}


def test_a_share_is_of_full_s_mean_gain_over_the_plain_base() -> None:
    """The base 0.1, full 0.6 on average: a gain of 0.5."""
    found = comparison.shares(FOUND, "exact_match")
    assert found["full"] == pytest.approx([0.8, 1.2])
    assert found["lora"] == pytest.approx([0.6, 0.8])
    assert found["bitfit"] == pytest.approx([0.2, 0.4])
    assert found["prompt_tuning"] == pytest.approx([-0.1])


def test_the_table() -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in comparison.table(FOUND, "exact_match").splitlines()}
    assert "| 0.100 | 0 | 4.000 |" in lines["the base"]
    assert "| 0.450 (0.400 to 0.500) | 70 (60 to 80) | 2.000 | 780.0 k | 3.12 M | 0.200 | 1.25 | 100 |" in lines["LoRA"]
    assert "| 0.050 | -10 | 2.000 | 3.8 k | 15.4 k |  | 1.25 |" in lines["prompt tuning"]
    assert len({line.count("|") for line in lines.values()}) == 1, "rows of different lengths"
    for method in FOUND:
        about = comparison.METHODS[method]
        assert lines[about.title].endswith(f" {about.good_for} |")
    told = comparison.below_goal(FOUND, "exact_match")
    assert "BitFit (30%)" in told and "prompt tuning (-10%)" in told and "LoRA" not in told


def test_without_full_or_its_gain_there_is_no_share() -> None:
    for found in ({"lora": FOUND["lora"]}, {"full": [row(0.1, 9)], "lora": FOUND["lora"]}):
        assert comparison.shares(found, "exact_match") == {}
        assert "| 0.450 (0.400 to 0.500) |  | 2.000 |" in comparison.table(found, "exact_match")
        assert "nothing to take a share of" in comparison.below_goal(found, "exact_match")


def finish(root: Path, base: str, method: str, seeds: int, **figures: Any) -> None:
    """Runs that look finished."""
    score = comparison.BASES[base].score
    for step in comparison.plan(base, method, seeds):
        folder = step.folder(root)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(b"0" * 1000)
        told = row(0.3, 5000, **{score: 0.3, f"baseline_{score}": 0.1}, **figures)
        if method == "full":
            del told["adapter_bytes"]
        (folder / "metrics.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_what_is_finished_is_reported_whoever_asked_for_it(tmp_path: Path) -> None:
    for base, method in BOTH:
        finish(tmp_path, base, method, 2 if method == "lora" else 1)
    found = comparison.write(tmp_path, 3, None)
    assert [(base, method) for base in found for method in found[base]] == BOTH
    assert len(found["llama"]["lora"]) == 2
    assert found["bert"]["full"][0]["adapter_bytes"] == 1000  # the model is the file
    assert comparison.finished(tmp_path, 3, 50) == {}, "runs of another length were taken"
    told, figures = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "comparison.json").read_text())
    for name in ("score_llama", "costs_llama", "score_bert", "costs_bert"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 10_000
        assert f"plots/{name}.png" in told
    assert figures["bert"]["base"] == 0.1
    assert figures["llama"]["share_of_full_gain"]["lora"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("apart", "step"), [(0.02, 100), (0.008, 1)])
def test_labels_do_not_cover_each_other_and_tell_whose_they_are(apart: float, step: int) -> None:
    """Five points in a heap, one far away: each label has its point's colour, and no other point is nearer or a line leads to
    its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(comparison.METHODS)[1:7]
    found = {name: [row(0.4 + apart * i, 10_000 + step * i)] for i, name in enumerate(names)}
    found[names[-1]] = [row(0.5, 10**6)]
    comparison.draw_scores(axes, {"full": FOUND["full"], **found}, "exact_match")
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert [text.get_text() for text in axes.texts] == [comparison.METHODS[name].title for name in names]
    assert all(not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert [text.get_color() for text in axes.texts] == [
        comparison.COLOURS[comparison.METHODS[name].family] for name in names
    ]
    places = axes.transData.transform([text.xy for text in axes.texts])
    strange = [text for i, text in enumerate(axes.texts) if comparison.nearest(boxes[i], places) != i]
    assert all(text.arrow_patch is not None for text in strange)
    assert bool(strange) == (apart < 0.01)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_two_methods_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Full fine-tuning and BitFit on a tiny encoder and rows that one word tells apart, each in its own process."""
    small = {
        "model.name": str(peft_checks.save_bert(tmp_path / "bert")),
        "data.name": peft_checks.labelled_rows(tmp_path / "rows.jsonl"),
        "training.bf16": "false",
    }
    told = comparison.BASES["bert"].arguments | small | {"data.validation_split": "null"}  # a file has one split
    base = dataclasses.replace(comparison.BASES["bert"], steps=20, arguments=told)
    monkeypatch.setitem(comparison.BASES, "bert", base)
    fast = {"full.optimizer": "adamw", "training.learning_rate": 1e-2}
    monkeypatch.setitem(comparison.METHODS, "full", dataclasses.replace(comparison.METHODS["full"], bert=fast))
    words = "--base bert --seeds 1 --methods bitfit full --run.threads 1 --root"
    line = [*words.split(), str(tmp_path / "runs")]
    assert comparison.main(line) == 0, capfd.readouterr().err
    figures = json.loads((tmp_path / "runs" / "comparison.json").read_text())["bert"]
    assert list(figures["runs"]) == ["full", "bitfit"]
    [full], [bitfit] = figures["runs"].values()
    assert full["trainable_parameters"] > bitfit["trainable_parameters"] > 0
    assert bitfit["eval_loss"] < bitfit["baseline_loss"] == full["baseline_loss"] > full["eval_loss"]
    assert full["accuracy"] > 0.9 > full["baseline_accuracy"] == figures["base"]
    assert figures["share_of_full_gain"]["full"] == [1]
    assert full["adapter_bytes"] == (tmp_path / "runs/full/bert-seed0/model/model.safetensors").stat().st_size
    assert bitfit["adapter_bytes"] > 4 * bitfit["trainable_parameters"]
    assert (tmp_path / "runs" / "plots" / "costs_bert.png").exists()
    finished = [tmp_path / "runs" / method / "bert-seed0" / "metrics.json" for method in ("full", "bitfit")]
    written = [file.stat().st_mtime_ns for file in finished]
    assert comparison.main(line) == 0
    assert written == [file.stat().st_mtime_ns for file in finished], "what was finished ran again"
    assert "| BitFit |" in capfd.readouterr().out
