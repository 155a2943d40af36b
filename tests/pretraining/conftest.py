"""What the tests of the pretraining recipes share: a small grammar to learn, and what is asked of every run."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_chat import make_tokenizer

from recipes.common.run_folder import RunFolder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes, text.txt, labelled rows, scored pairs and pairs, all of one small grammar."""
    folder = tmp_path_factory.mktemp("sources")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    nouns, verbs = ("cat", "dog", "owl", "fox"), ("sat", "ran", "hid", "lay")
    lines = [f"the {a} {verb} by the {b} again and again." for a, verb, b in itertools.product(nouns, verbs, nouns)]
    (folder / "text.txt").write_text("\n".join(lines * 4) + "\n")
    for name, rows in (
        ("classes", [{"text": f"the {n} {v} by", "label": n} for n in nouns for v in verbs]),
        ("scores", [{"text": n, "text_pair": v, "label": str(i)} for i, n in enumerate(nouns) for v in verbs]),
        ("pairs", [{"source": f"the {n} {v}", "target": f"{v} {n}"} for n in nouns for v in verbs]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    return folder


@pytest.fixture
def stop_and_resume(
    run_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ModuleType, Sequence[str], int], tuple[Any, Any, Any]]:
    """Run a recipe whole, and once more with an interrupt at a step and then resumed: (whole, stopped, resumed)."""

    def run(recipe: ModuleType, argv: Sequence[str], step: int) -> tuple[Any, Any, Any]:
        whole = run_in_process(recipe, [*argv, "--run.name", "whole"], tmp_path)
        assert whole.code == 0, whole.err
        plain = RunFolder.log

        def log_and_stop(self: RunFolder, at: int, **figures: Any) -> None:
            plain(self, at, **figures)
            if at == step:
                os.kill(os.getpid(), signal.SIGINT)

        parts = [*argv, "--run.name", "parts"]
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "log", log_and_stop)
            stopped = run_in_process(recipe, parts, tmp_path)
        assert stopped.code == 130, stopped.err
        assert not stopped.figures and not (stopped.folder / "model").exists()
        resumed = run_in_process(recipe, [*parts, "--run.resume", "true"], tmp_path)
        assert resumed.code == 0, resumed.err
        return whole, stopped, resumed

    return run


@pytest.fixture
def resumes_to_the_same_losses(stop_and_resume: Any) -> Callable[[ModuleType, Sequence[str]], None]:
    """A command line of 12 steps, interrupted after 6: every loss is that of the run that was not stopped."""

    def check(recipe: ModuleType, argv: Sequence[str]) -> None:
        whole, _, resumed = stop_and_resume(recipe, argv, 6)
        losses = [[row["loss"] for row in run.history()] for run in (whole, resumed)]
        assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert resumed.figures["eval_loss"] == pytest.approx(whole.figures["eval_loss"], abs=1e-5)
        assert resumed.figures["unigram_loss"] == whole.figures["unigram_loss"]

    return check


@pytest.fixture
def accumulates(run_in_process: Any, tmp_path: Path) -> Callable[..., None]:
    """Quarters of a batch give the loss and the gradient of the whole; `rel`: how near, where a mean of means is not the mean.

    line: makes the command line from changes, keyed as section__key
    """

    def check(recipe: ModuleType, line: Callable[..., list[str]], rel: float = 1e-3) -> None:
        rows = []
        for size, count in ((16, 1), (4, 4)):
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
            changes = {f"training__{key}": value for key, value in sizes.items()}
            argv = line(training__max_steps=2, training__warmup_steps=0, **changes)
            done = run_in_process(recipe, [*argv, "--run.name", f"of-{size}"], tmp_path)
            assert done.code == 0, done.err
            rows.append(done.history())
        assert len(rows[0]) == len(rows[1]) == 2
        for name in ("loss", "grad_norm"):
            assert rows[1][0][name] == pytest.approx(rows[0][0][name], rel=rel), name

    return check


@pytest.fixture
def refuses(run_in_process: Any, tmp_path: Path) -> Callable[[ModuleType, Sequence[str], str], None]:
    """The command line is answered with one clear error that says this, exit code 2, and nothing is written."""

    def check(recipe: ModuleType, argv: Sequence[str], said: str) -> None:
        done = run_in_process(recipe, argv, tmp_path)
        assert done.code == 2
        assert said in done.err and "Traceback" not in done.err
        assert not list(tmp_path.iterdir())

    return check


@pytest.fixture
def dry_runs(run_in_process: Any, tmp_path: Path) -> Callable[[ModuleType, Sequence[str]], None]:
    """A dry run of the command line succeeds and writes nothing."""

    def check(recipe: ModuleType, argv: Sequence[str]) -> None:
        done = run_in_process(recipe, [*argv, "--dry-run"], tmp_path)
        assert done.code == 0, done.err
        assert "dry run" in done.out and not list(tmp_path.iterdir())

    return check
