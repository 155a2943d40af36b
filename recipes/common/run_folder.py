"""The run folder: one place, the same for every recipe, for all that a run leaves behind. Everything is written atomically.

runs/<recipe>/<name>/
  config.yaml        resolved; `--config` on it reproduces the run
  environment.json   versions, hardware, commit
  metrics.jsonl      a line a logged step          metrics.json   final figures, flat
  plots/*.png        samples/*                     checkpoints/   resumable state
  model/             loads with from_pretrained    README.md      model card
  .lock              while a process runs in it: its pid
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from recipes.common import run_lock
from recipes.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# How a full disk is reported: by safetensors in Rust's words, by torch in those of its zip writer, which forgets why.
NOT_WRITTEN = re.compile(
    r"Error while serializing.*\(os error (\d+)\)|iostream error|unexpected pos|PytorchStreamWriter failed"
)


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Say that `path` could not be written in one UserError, whatever the library that wrote there calls it.

    An OSError passes: `run_recipe` explains those itself.
    """
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, OSError) else NOT_WRITTEN.search(str(error))
        if found is None:
            raise
        reason = os.strerror(int(found[1])) if found[1] else "the write failed half-way"
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        raise UserError(
            f"cannot write {path}: {reason} ({shutil.disk_usage(there).free / 2**20:,.0f} MiB are free there); free space and "
            "go on with --run.resume true, or choose another --run.root"
        ) from error


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o755)
        with write_errors_explained(path):
            yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class RunFolder:
    """A run's folder and its voice. Only rank 0 writes and speaks; the other ranks' calls do nothing."""

    def __init__(self, path: Path, *, recipe: str, dry: bool = False, given: set[str] | None = None):
        self.path = path
        self.recipe = recipe
        self.dry = dry
        self.given = given or set()  # dotted keys that the user set, in a file or on the command line
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.choices: dict[str, str] = {}  # what the machine decided, with reasons; printed and kept in the model card
        self.resume_from: Path | None = None  # the last complete checkpoint, when resuming
        self.replaced: Path | None = None  # what --run.overwrite put aside, until this run has begun
        self.started = time.perf_counter()  # this sitting of the run
        self.seconds_before = 0.0  # what the sittings before it took, up to the checkpoint that this one goes on from
        self.share_read = 1.0  # of the training text: a dry run need not read all
        self.figures: dict[str, Any] = {}  # what the training helpers measured: tokens_per_second, mfu, ...
        self._paragraphs: list[str] = []
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Hold the folder until `unlock`, or until the process ends, killed or not. UserError if another process holds it."""
        self._lock = run_lock.take(self.path)

    def unlock(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            run_lock.release(self._lock)
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        """Where resumable state goes."""
        return self.path / "checkpoints"

    def wall_seconds(self) -> float:
        """What the run has taken until now, all sittings of it."""
        return self.seconds_before + time.perf_counter() - self.started

    def mark_complete(self, checkpoint: Path, speed: dict[str, float]) -> None:
        """Put into a checkpoint, last, what says that it was written to its end, and what a later sitting cannot measure.

        By the main process, when all have written theirs.
        """
        files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file != checkpoint / COMPLETE]
        told = {
            "wall_seconds": round(self.wall_seconds(), 1),
            "speed": speed,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "files": {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in files},
        }
        write_atomically(checkpoint / COMPLETE, json.dumps(told) + "\n")

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.is_main:
            print(text, flush=True)

    def choose(self, what: str, value: object, reason: str) -> None:
        """Say, once, what was chosen for this machine and why; it ends up in the model card too."""
        line = f"{value} ({reason})"
        if self.choices.get(what) != line:
            self.choices[what] = line
            self.say(f"  {what}: {line}")

    def log(self, step: int, **figures: Any) -> None:
        """Append a line to metrics.jsonl. Not-a-number becomes null: JSON has none."""
        if not self.is_main or self.dry:
            return
        self.forget_replaced()
        row = {"step": step, **{k: plain(v) for k, v in figures.items()}}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line that a killed process left half-written at the end is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            lines = path.read_text().split("\n")
            rows = [json.loads(line) for line in lines[:-1] if line]
            if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
                raise ValueError("a line is no object with a step")
        except ValueError as error:
            raise UserError(
                f"{path} is damaged, or not a run's: {error}; mend it, or start again with --run.overwrite true"
            ) from error
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will do again."""
        if self.is_main and (self.path / "metrics.jsonl").exists():
            kept = [row for row in self.history() if row["step"] <= step]
            write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def plot(self, name: str, draw: Callable[[Axes], None]) -> None:
        """Draw on one axes and save it as plots/<name>.png."""
        if not self.is_main or self.dry:
            return
        import io

        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        write_atomically(self.path / "plots" / f"{name}.png", buffer.getvalue())

    def plot_curve(self, name: str, *keys: str, label: str | None = None, goal: str | None = None) -> None:
        """Plot logged figures against the step, in one picture.

        goal: one more figure, which the others are to follow: dotted on top of them, since it may lie under them
        """
        history = self.history()

        def draw(axes: Axes) -> None:
            for key in keys:
                if points := points_of(history, key):
                    draw_curve(axes, *points, key.replace("_", " "))
            if goal and (points := points_of(history, goal)):
                axes.plot(*points, "k:", label=goal.replace("_", " "))
            axes.set_xlabel("step")
            axes.set_ylabel(label or name.replace("_", " "))
            if axes.has_data():
                axes.legend(frameon=False)

        self.plot(name, draw)

    def plot_panels(self, name: str, *keys: str) -> None:
        """Plot logged figures against the step, each on axes of its own: of unlike size, one would flatten the others."""
        history = self.history()
        found = {key: points for key in keys if (points := points_of(history, key))}

        def draw(axes: Axes) -> None:
            for panel, (key, points) in zip(panels_below(axes, len(found)), found.items(), strict=True):
                draw_curve(panel, *points, key.replace("_", " "))
                panel.legend(frameon=False, fontsize=8)
                panel.set_xlabel("step")
                panel.label_outer()

        if found:
            self.plot(name, draw)

    def sample(self, name: str, text: str) -> None:
        """Keep generated text (or a table of it) as samples/<name>."""
        if self.is_main and not self.dry:
            write_atomically(self.path / "samples" / name, text)

    def save_model(self, model: Any, tokenizer: Any = None, folder: str = "model") -> Path:
        """Save with `save_pretrained` (safetensors), atomically, from rank 0; gives the folder."""
        path = self.path / folder
        if self.is_main:
            with folder_written_atomically(path) as temporary:
                model.save_pretrained(temporary)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
        wait_for_everyone()
        return path

    def save_code(self, module: ModuleType) -> None:
        """A module's file beside the weights, for whoever loads them without this repository; transformers never runs it."""
        code = Path(str(module.__file__))
        if self.is_main:
            write_atomically(self.path / "model" / code.name, code.read_bytes())

    def leave_if_unused(self) -> None:
        """Remove the folder if nothing ran in it: after a refusal or a dry run it would pass for an unfinished run.

        The run that it was to overwrite is put back.
        """
        if not self.is_main or not self.path.is_dir():
            return
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()  # a Trainer makes it as it is built
        # a dry run writes none: it belongs to a run that is starting
        ours = set() if self.dry else {"config.yaml", run_lock.NAME}
        if {entry.name for entry in self.path.iterdir()} <= ours:
            shutil.rmtree(self.path)
            if self.replaced is not None:
                os.replace(self.replaced, self.path)
                return
            with suppress(OSError):  # it holds other runs, or one that ended beside this one has removed it
                self.path.parent.rmdir()

    def put_aside(self) -> None:
        """Make room for a run that overwrites the one here, which is kept until the new one has begun."""
        aside = self.path.with_name(f".{self.path.name}.overwritten")
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed before it began
        os.replace(self.path, aside)
        self.unlock()  # what was held went with it
        (aside / run_lock.NAME).unlink()
        self.replaced = aside
        self.path.mkdir()
        self.lock()

    def forget_replaced(self) -> None:
        """Delete the run that this one overwrites: it has begun."""
        if self.replaced is not None:
            shutil.rmtree(self.replaced)
            self.replaced = None

    def card(self, text: str) -> None:
        """Add a paragraph to the model card."""
        self._paragraphs.append(text)

    @property
    def paragraphs(self) -> list[str]:
        """What the recipe wants said in the model card."""
        return self._paragraphs


def points_of(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]] | None:
    """The steps at which a figure was logged and what it was, or None if it never was."""
    rows = [row for row in history if row.get(key) is not None]
    return ([row["step"] for row in rows], [row[key] for row in rows]) if rows else None


def panels_below(axes: Axes, count: int) -> list[Axes]:
    """So many panels, one below the other, in the place of the axes that `RunFolder.plot` gives."""
    figure: Any = axes.figure
    axes.remove()
    figure.set_size_inches(7, 0.6 + 1.7 * count)
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return list(panels)


def draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, **style: Any) -> None:
    """A few points with their marks, or a line; many points jump about, so theirs is faint, with their mean on top."""
    import numpy as np

    window = len(values) // (40 if len(values) >= 200 else 8)  # the mean of so many points, up to each
    if window < 5:
        axes.plot(steps, values, "o-", markersize=3, label=label, **style)
        return
    (faint,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3, **style)
    mean = np.convolve(values, np.full(window, 1 / window), "valid")
    axes.plot(steps[window - 1 :], mean, color=faint.get_color(), label=f"{label}, mean of {window}")


def digest(folder: Path) -> str:
    """A name for what a saved model's folder holds, its weights and its tokenizer: the same name, the same model."""
    told = hashlib.blake2b(digest_size=8)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        told.update(file.name.encode() + file.read_bytes())
    return told.hexdigest()


def wait_for_everyone() -> None:
    """Barrier, when there is more than one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def plain(value: Any) -> Any:
    """A figure for JSON: a Python number, and null for what is not a number or infinite, which JSON has not."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


COMPLETE = "complete"  # a file that is put into a checkpoint last: without it the folder is a half-written one


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Those that were written to their end, by their step."""
    found = [p for p in checkpoints.glob("checkpoint-*") if (p / COMPLETE).exists() and p.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def last_complete_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step that was written to its end, or None."""
    return next(reversed(complete_checkpoints(checkpoints)), None)


def drop_half_written_checkpoints(checkpoints: Path) -> None:
    """Delete what a killed process left of a checkpoint: it would be counted among the ones to keep, in a good one's place."""
    for left in checkpoints.glob("checkpoint-*"):
        if not left.is_dir():
            left.unlink()  # in the way of a checkpoint of that name
        elif not (left / COMPLETE).exists():
            shutil.rmtree(left)
