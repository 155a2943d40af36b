"""The notebooks as they are committed, and the chapters' run again: no network, no finished run."""

from __future__ import annotations

import ast
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTER = ROOT / "notebooks/02_pretraining.ipynb"
FINE_TUNING = ROOT / "notebooks/03_fine_tuning.ipynb"
# What stands before the cells: a connection is an error, and a picture is counted instead of shown.
BEFORE = """
import socket
import matplotlib.pyplot as plt
def refuse(*_): raise OSError("the notebook asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
def show():
    assert all(axes.has_data() or axes.texts for figure in map(plt.figure, plt.get_fignums()) for axes in figure.axes)
    print("picture", len(plt.get_fignums()))
    plt.close("all")
plt.show = show
"""


def cells(notebook: Path, kind: str) -> list[Any]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: Any) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_from_top_to_bottom_and_names_no_machine(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    complaints = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stderr")  # progress bars are none
    assert not re.search("warning|error|deprecated", complaints, re.IGNORECASE), complaints
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5
    assert not re.search(r"[\"' ](/home|/work|/Users|/tmp|/root)/", notebook.read_text())
    for cell in code:
        ast.parse(source(cell))


def test_every_recipe_of_the_chapter_has_a_section_with_its_equation_and_a_picture() -> None:
    sections: dict[str, list[Any]] = {}
    for cell in json.loads(CHAPTER.read_text())["cells"]:
        if found := re.match(r"## \d\. (\w+)", source(cell)):
            title = found[1].lower()
        elif not sections and source(cell).startswith("# "):
            title = "opening"
        sections.setdefault(title, []).append(cell)
    for name in ("bert", "gpt", "bart", "t5", "unilm", "glm", "llama"):
        assert (ROOT / f"recipes/pretraining/{name}.py").exists()
        section = sections[name]
        assert any("$$" in source(cell) for cell in section if cell["cell_type"] == "markdown"), name
        code = [cell for cell in section if cell["cell_type"] == "code"]
        assert any("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"]), name
        assert any("from recipes.common" in source(cell) for cell in code), name


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What is committed and the notebook needs, and no runs/."""
    for name in ("recipes", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.fixture
def run(bare: Path, execute: Callable[..., Any]) -> Callable[[list[str]], str]:
    def of(sources: list[str]) -> str:
        script = bare / "notebooks" / "cells.py"
        script.write_text("\n".join([BEFORE, *sources]))
        quiet = {"MPLBACKEND": "agg", "PYTHONPATH": str(bare), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = execute([sys.executable, script], cwd=script.parent, timeout=600, **quiet)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return of


@pytest.mark.slow
def test_it_runs_without_network_or_runs(run: Any) -> None:
    code = cells(CHAPTER, "code")
    started = time.process_time()
    told = run([source(cell) for cell in code])
    assert time.process_time() - started < 180
    committed = sum("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"])
    assert told.count("picture 1") == told.count("picture") == committed
    assert "this machine's run" not in told and "bert: benchmarks/recipes.json" in told
    # what does not depend on a machine comes out as it is committed
    for line in (
        "rebuilt: Thank you for inviting me to your party last week",
        "a text of 568, Lengths(noise=85, spans=28",
    ):
        assert line in told and line in CHAPTER.read_text()


@pytest.mark.slow
def test_a_finished_run_s_figures_are_shown_before_the_stored_ones(bare: Path, run: Any) -> None:
    folder = bare / "runs/bart/default"
    folder.mkdir(parents=True)
    figures = {"untrained_loss": 9.0, "unigram_loss": 7.0, "eval_loss": 3.0}
    figures |= {"classification_accuracy": 0.5, "baseline_classification_accuracy": 0.25}
    (folder / "metrics.json").write_text(json.dumps(figures))
    sources = [source(cell) for cell in cells(CHAPTER, "code")]
    told = run([sources[0], sources[-1], "print(losses['bart'], packages['bart'])"])
    assert "bart: this machine's run" in told and "gpt: benchmarks/recipes.json" in told
    assert "{'untrained': 9.0, 'unigrams': 7.0, 'pretrained': 3.0} {'from scratch': 0.25, 'pretrained': 0.5}" in told


@pytest.mark.slow
def test_the_fine_tuning_chapter_runs_without_network_or_runs(run: Any) -> None:
    code = cells(FINE_TUNING, "code")
    told = run([source(cell) for cell in code])
    committed = sum("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"])
    assert told.count("picture 1") == told.count("picture") == committed
    assert "this machine's run" not in told and "lora: benchmarks/recipes.json" in told
    for line in ("by the formula 4.127", "'switch_max_logit_difference': 0.0"):  # on any machine
        assert line in told and line in FINE_TUNING.read_text()
