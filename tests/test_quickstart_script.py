"""`make quickstart`: each stage gets what the one before it left, goes on where it stopped, and the report tells what was measured.

The recipes have tests of their own; here a stand-in takes a stage's command line and leaves what the recipe would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import save_tokenizer_and_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import quickstart as script  # noqa: E402

STAGES = [stage.recipe for stage in script.STAGES]


def measured() -> dict[str, dict[str, Any]]:
    """metrics.json of every stage, each figure another number."""
    told: dict[str, dict[str, Any]] = {
        name: {"wall_seconds": 60.0, "peak_memory_gib": 1.0 + i} for i, name in enumerate(STAGES)
    }
    for i, (recipe, figure) in enumerate(script.SUMMARY.values()):
        told[recipe][figure] = 0.01 * (i + 1)
    told["llama"]["parameters"] = 1234
    told["reward_model"] |= {"head_accuracy": 0.91, "baseline_accuracy": 0.87}
    return told


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[list[str]]]]:
    """Run the script with stand-ins for the recipes: `chain(*argv, ends=...)` -> (exit code, the stages' command lines)."""

    def run(*argv: str, ends: dict[str, int] | None = None) -> tuple[int, list[list[str]]]:
        called: list[list[str]] = []

        def stand_in(main: Any, config_class: type, argv: list[str]) -> int:
            called.append(argv)
            recipe = Path(str(sys.modules[main.__module__].__file__)).stem
            folder = Path(argv[argv.index("--run.root") + 1]) / recipe / "default"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text("run: {}\n")
            if code := (ends or {}).get(recipe, 0):
                return code
            (folder / "metrics.json").write_text(json.dumps(measured()[recipe]))
            save_tokenizer_and_model(folder)
            (folder / "plots").mkdir(exist_ok=True)
            (folder / "plots" / "loss.png").write_bytes(b"a picture")
            return 0

        monkeypatch.setattr(script, "run_recipe", stand_in)
        try:
            code = script.main([*argv, "--root", str(tmp_path / "elsewhere")])
        except SystemExit as left:
            code = left.code
        return code, called

    return run


def test_each_stage_is_given_what_the_earlier_ones_left_in_the_same_root(chain: Any, tmp_path: Path) -> None:
    code, called = chain()
    assert code == 0 and len(called) == len(STAGES)
    made: set[str] = set()
    for stage, argv in zip(STAGES, called, strict=True):
        inputs = {word for word in argv if word.endswith("/model")}
        assert inputs <= made and (inputs or stage == "tokenizer")
        made.add(str(tmp_path / "elsewhere" / stage / "default" / "model"))


def test_no_stage_reads_from_the_usual_runs_when_the_root_is_another(chain: Any) -> None:
    """Whatever of a stage's config names another run is overridden on its command line."""
    import yaml

    _, called = chain()
    for stage, argv in zip(script.STAGES, called, strict=True):
        config = yaml.safe_load((ROOT / "configs" / stage.chapter / stage.recipe / "cpu.yaml").read_text())
        named = {
            f"{section}.{key}"
            for section, values in config.items()
            for key, value in values.items()
            if str(value).startswith("runs/")
        }
        assert named == set(stage.takes)
        assert all(f"--{key}" in argv for key in named)


def test_the_summary_and_the_report_hold_what_the_stages_measured(chain: Any, tmp_path: Path) -> None:
    assert chain()[0] == 0
    folder = tmp_path / "elsewhere" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    for i, key in enumerate(script.SUMMARY):
        assert summary[key] == pytest.approx(0.01 * (i + 1))
    assert summary["wall_seconds"] == 300.0 and summary["peak_memory_gib"] == 5.0
    text = (folder / "README.md").read_text()
    assert "5m00s on this machine, 5.0 GiB" in text and "1,234 parameters" in text
    assert "91.0% by its head alone | 87.0% |" in text
    assert text.count("✗") + text.count("✓") == 3 * 14  # 14 questions, answered by three models
    for stage in STAGES:
        assert (folder / "plots" / f"{stage}-loss.png").read_bytes() == b"a picture"
        assert f"(plots/{stage}-loss.png)" in text
        assert (folder / f"../{stage}/default").is_dir() and f"(../{stage}/default/README.md)" in text


def test_what_is_finished_is_kept_and_what_was_interrupted_goes_on(chain: Any) -> None:
    code, called = chain(ends={"full": 130})
    assert code == 130 and len(called) == 3
    code, called = chain()
    assert code == 0 and len(called) == 3  # full, reward_model, ppo
    assert ["--run.resume" in argv for argv in called] == [True, False, False]
    assert chain() == (0, [])


def test_what_other_arguments_or_other_models_made_is_not_kept(
    chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain()
    assert chain("--run.threads", "1") == (2, [])
    assert "tokenizer/default was made with other arguments" in capsys.readouterr().err
    root = tmp_path / "elsewhere"
    weights = next((root / "llama" / "default" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # as if llama had been made again
    assert chain() == (2, [])
    assert "full/default was made with other arguments, or of other models" in capsys.readouterr().err


def test_a_stage_that_was_run_by_itself_is_kept_and_told_of(
    chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain()
    (tmp_path / "elsewhere" / "tokenizer" / "default" / "asked.json").unlink()
    assert chain() == (0, [])
    assert "made by `make tokenizer`, as " in capsys.readouterr().out


def test_fresh_starts_again(chain: Any) -> None:
    chain()
    code, called = chain("--fresh")
    assert code == 0 and len(called) == len(STAGES)
    assert not any("--run.resume" in argv for argv in called)


def test_other_arguments_reach_every_stage(chain: Any) -> None:
    _, called = chain("--run.threads", "1")
    assert all(argv[-2:] == ["--run.threads", "1"] for argv in called)


def test_a_figure_that_is_missing_is_named(chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain()
    metrics = tmp_path / "elsewhere" / "ppo" / "default" / "metrics.json"
    kept = json.loads(metrics.read_text())
    del kept["kl"]
    metrics.write_text(json.dumps(kept))
    capsys.readouterr()
    assert chain()[0] == 2
    assert "error: ppo/default/metrics.json has no kl: run the stage again" in capsys.readouterr().err
