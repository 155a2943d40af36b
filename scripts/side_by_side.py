"""What the comparisons share: runs of recipes that are kept or go on, means over seeds, one word that must be known."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common.launch import environment_defaults  # noqa: E402

environment_defaults()

from recipes.common.errors import UserError  # noqa: E402
from recipes.common.run_folder import digest, write_atomically  # noqa: E402

ASKED = "asked.json"  # in a run's folder, once it is finished: what it was asked for


@dataclass
class Step:
    """One run of a recipe: <root>/<recipe>/<name>."""

    method: str
    chapter: str
    recipe: str
    name: str
    arguments: tuple[str, ...] = ()

    def folder(self, root: Path) -> Path:
        return root / self.recipe / self.name

    def command(self, root: Path, extra: Sequence[str]) -> list[str]:
        """The recipe's argv; a run that was interrupted goes on."""
        resume = ("--run.resume", "true") if (self.folder(root) / "config.yaml").exists() else ()
        return ["--run.root", str(root), "--run.name", self.name, *self.arguments, *extra, *resume]

    def figures(self, root: Path) -> dict[str, Any] | None:
        """metrics.json of the run; None until it is finished."""
        file = self.folder(root) / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None


def refuse_planned(steps: Sequence[Step], extra: Sequence[str]) -> None:
    """Raise UserError for arguments for every recipe that some run of the plan has one of its own of."""
    planned = {word for step in steps for word in step.arguments if word.startswith("--")}
    if clash := sorted({word.split("=")[0] for word in extra} & planned):
        raise UserError(f"{', '.join(clash)}: the comparison says it itself, a value for each run: leave it out")


def asked_for(words: Sequence[str], models: Sequence[Path]) -> list[str]:
    """What ASKED keeps of a run: its arguments, and what is in the models that it takes."""
    return [*words, *map(digest, models)]


def run_step(step: Step, root: Path, extra: Sequence[str]) -> int:
    """Run one recipe unless it is finished; gives its exit code. An interruption (130) ends the comparison.

    It has a process of its own: a process's peak memory is that of all it did, and what ends one recipe ends no other.
    Exits with 2 where what is finished was asked for otherwise, or of other models: it is not what is to be compared.
    """
    models = [Path(word) for word in step.arguments if (Path(word) / "config.json").exists()]
    asked, kept = asked_for([*step.arguments, *extra], models), step.folder(root) / ASKED
    if step.figures(root) is not None:
        before = json.loads(kept.read_text()) if kept.exists() else asked  # not there: it was stopped just before
        if before != asked:
            print(
                f"error: {step.folder(root)} is finished, and was asked for otherwise, or of another model: `{' '.join(before)}`, "
                f"not `{' '.join(asked)}`: give another --root, or delete it",
                file=sys.stderr,
            )
            sys.exit(2)
        return 0
    code = _in_a_process(step, step.command(root, extra))
    if code == 130:
        sys.exit(code)
    if code:
        print(f"{step.method}: {step.folder(root)} ended with exit code {code}: left out", file=sys.stderr)
    else:
        write_atomically(kept, json.dumps(asked) + "\n")
    return code


def _in_a_process(step: Step, argv: Sequence[str]) -> int:
    """The recipe's exit code. A signal is the recipe's to answer, with a checkpoint; this process waits for it."""
    script = ROOT / "recipes" / step.chapter / f"{step.recipe}.py"
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with subprocess.Popen([sys.executable, str(script), *argv], env={**os.environ, "PYTHONPATH": str(ROOT)}) as run:
            signal.signal(signal.SIGTERM, lambda *_: run.terminate())  # a terminal's Ctrl-C reaches it by itself
            code = run.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code  # -9: killed by signal 9, which a shell calls 137


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def told(values: Sequence[float | None], digits: int) -> str:
    """The mean, and from where to where it goes over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    shown = f"{mean(known):.{digits}f}"
    return shown if len(known) == 1 else f"{shown} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def check_words(option: str, words: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for words that are not known, each with the nearest that is."""
    problems = []
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(f"{option}: there is no `{word}`{meant} There are {', '.join(known)}")
    if problems:
        raise UserError(problems)
