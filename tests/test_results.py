"""The tables made from benchmarks/*.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import results

pytestmark = pytest.mark.slow

MEASURED = {
    "row": "ppo",
    "what": "PPO, 3.4M llama",
    "unit": "samples/s",
    "figures": {"TRL": 20.0, "ours": 40.0},
    "ours_is_better_by": {"TRL": {"median": 2.0, "min": 1.9, "max": 2.2}},
    "measured_at": "2026-11-24T14:00:00+00:00",
    "machine": {"processor": "AMD EPYC", "gpu": None, "cores": 2, "versions": {"torch": "2.13.0"}},
}


def test_ratios_say_what_where_and_when() -> None:
    line = results.ratios([MEASURED]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "PPO, 3.4M llama", results.show(40.0), f"{results.show(20.0)}: TRL", "**2.00** x (1.90 to 2.20)", "samples/s",
        "AMD EPYC, 2 cores, torch 2.13.0", "2026-11-24",
    ]  # fmt: skip


def test_figures_without_a_peer_are_shown_beside_their_goal() -> None:
    alone = {
        "what": "waiting for data",
        "unit": "% of a step",
        "goal": 5.0,
        "figures": {"bert": 1.5},
        "ours_is_better_by": {},
    }
    line = results.ratios([MEASURED | alone]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == [
        "waiting for data, bert", results.show(1.5), f"goal: below {results.show(5.0)}", "", "% of a step",
    ]  # fmt: skip


def test_rows_keep_the_order_of_the_benchmark_and_the_recipes_are_no_row(tmp_path: Path) -> None:
    for name in ("help", "ppo", "llama", "recipes"):
        (tmp_path / f"{name}.json").write_text(json.dumps(MEASURED | {"row": name}))
    assert [row["row"] for row in results.benchmarks(tmp_path)] == ["llama", "ppo", "help"]


def test_nothing_measured_is_said() -> None:
    assert "make bench" in results.ratios([])


def test_put_replaces_between_marks_and_refuses_without(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nkept\n")
    with pytest.raises(SystemExit):
        results.put(page, "bench", "new")
    page.write_text("# Page\n\n<!-- bench --><!-- /bench -->\n\nkept\n")
    for content in ("first", r"second \1"):
        results.put(page, "bench", content)
    assert page.read_text() == "# Page\n\n<!-- bench -->\n\nsecond \\1\n\n<!-- /bench -->\n\nkept\n"


def test_the_chinese_readme_says_in_chinese_what_every_recipe_is() -> None:
    assert results.CHINESE.keys() == results.recipes().keys()


def test_runs_on_real_data_have_a_table_of_their_own(tmp_path: Path) -> None:
    machine = dict.fromkeys(("processor", "cores", "memory_gib", "gpu", "gpus", "commit"))
    for run, loss in (("default", 1.1), ("real", 2.2), ("mine", 3.3)):
        folder = tmp_path / "t5" / run
        folder.mkdir(parents=True)
        figures = {"task_translation_bleu": loss, "eval_loss": loss, "wall_seconds": 9}
        (folder / "metrics.json").write_text(json.dumps(figures))
        (folder / "environment.json").write_text(json.dumps(machine))
    stored = results.collect(tmp_path)
    assert stored.keys() == {"t5", "t5 real"}
    assert "**1.1**" in results.table(stored) and "2.2" not in results.table(stored)
    assert "`make t5 CONFIG=real` | **2.2** BLEU" in results.real_table(stored) and "1.1" not in results.real_table(
        stored
    )
