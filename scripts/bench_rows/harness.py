"""How a row is measured: contestants in turns, a figure a round of each, ratios taken within a round; what is stored.

Beside that, what rows share that run a contestant: a clock on a Trainer, a process of its own.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes.common import machine
from recipes.common.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 2  # steps of a round that are left out: the first compiles or allocates


class Skipped(Exception):
    """A row that cannot be measured here, with the reason."""


class Failed(Exception):
    """A row that should have been measured and was not, with the reason."""


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let each contestant run once a round, every other round in the opposite order; gives a figure a round of each."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            found[name].append(contestants[name]())
            print(f"  round {turn + 1}/{rounds}  {name}: {found[name][-1]:,.2f}", file=sys.stderr, flush=True)
    return found


def compare(found: dict[str, list[float]], higher_is_better: bool = True) -> dict[str, dict[str, float]]:
    """How many times better "ours" is than each other contestant: above 1 is better, whatever the unit.

    Nothing where no contestant is "ours": the figures are then all ours, and stand beside a goal.
    """
    if "ours" not in found:
        return {}
    ratios = {
        name: [a / b if higher_is_better else b / a for a, b in zip(found["ours"], theirs, strict=True)]
        for name, theirs in found.items()
        if name != "ours"
    }
    return {
        name: {"median": round(statistics.median(r), 3), "min": round(min(r), 3), "max": round(max(r), 3)}
        for name, r in ratios.items()
    }


def result(
    row: str, what: str, unit: str, found: dict[str, list[float]], higher_is_better: bool, **more: Any
) -> dict[str, Any]:
    """What benchmarks/<row>.json holds."""
    return {
        "row": row,
        "what": what,
        "unit": unit,
        "figures": {name: round(statistics.median(values), 3) for name, values in found.items()},
        "ours_is_better_by": compare(found, higher_is_better),
        "rounds": {name: [round(value, 3) for value in values] for name, values in found.items()},
        **more,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line a contestant."""
    lines = ["| row | contestant | figure | unit | ours is better by |", "|---|---|---|---|---|"]
    for found in results:
        for name, value in found["figures"].items():
            ratio = found["ours_is_better_by"].get(name)
            shown = "" if ratio is None else f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            lines.append(f"| {found['row']} | {name} | {value:,.2f} | {found['unit']} | {shown} |")
    return "\n".join(lines)


def fresh_state() -> None:
    """accelerate keeps one state a process, which would carry one contestant's precision into the next."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    gc.collect()


def clock_callback(stop_after: int | None = None) -> Any:
    """A Trainer callback whose `seconds` are those from each step's begin to the next's; it may end the training early."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begins: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if machine.has_gpu():  # what a GPU was told is not yet done, unless somebody asked for the loss
                torch.cuda.synchronize()
            self.begins.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if len(self.begins) == stop_after:
                control.should_training_stop = True

        @property
        def seconds(self) -> list[float]:
            return [b - a for a, b in pairwise(self.begins)]

    return Clock()


def quiet_run(folder: Path) -> RunFolder:
    run = RunFolder(folder, recipe="bench", given={"training.torch_compile"})  # compiled here, not when it pays
    run.say = lambda text: None  # type: ignore[method-assign]
    return run


def environment_of_own(**more: str) -> dict[str, str]:
    """Of a contestant in a process of its own: offline, as many threads as the others, nothing of ours on its path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ACCELERATE_MIXED_PRECISION")}
    threads = str(machine.choose_threads(None).value)
    return kept | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run to the end. Failed, with the last lines that it said, if it does not end well."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")


def seconds_until(command: list[str], sign: str, environment: dict[str, str]) -> float:
    """Seconds until the process says a line that matches; then it is stopped. Failed if it ends without."""
    started, said = time.perf_counter(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if re.search(sign, line):
                return time.perf_counter() - started
            said.append(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise Failed(f"{' '.join(command)} ended before its first step:\n{''.join(said[-15:])}")
