"""How a run folder is opened: new, resumed, or in place of the run that is there. Two runs are never mixed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recipes.common import run_lock
from recipes.common.errors import UserError
from recipes.common.run_folder import COMPLETE, RunFolder, last_complete_checkpoint, write_atomically


def open_folder(
    path: Path, *, recipe: str, fingerprint: str, resume: bool, overwrite: bool, dry: bool, given: set[str]
) -> RunFolder:
    """Open the folder of a run, new, resumed or overwritten. Rank 0 does the work.

    `fingerprint` is the resolved config as YAML; resuming under another config is refused with the first difference.
    Raises UserError when the folder belongs to another run, cannot be written, or has nothing to resume.
    """
    run = RunFolder(path, recipe=recipe, dry=dry, given=given)
    if dry:
        return run
    if resume and overwrite:
        raise UserError(
            "run.resume and run.overwrite contradict each other: the one goes on with what is there, the other deletes it"
        )
    try:
        if run.is_main:
            _prepare(run, fingerprint, resume, overwrite)
        if resume:
            take_up(run)
            _count_stages(run)
    except BaseException:
        run.unlock()
        raise
    return run


def take_up(run: RunFolder) -> None:
    """Where a resumed run, or a stage of one, goes on, and what the sittings before it took.

    Raises UserError where its last checkpoint cannot be gone on from.
    """
    run.resume_from = last_complete_checkpoint(run.checkpoints)
    if run.resume_from is not None:
        told = _told_of(run.resume_from)
        run.seconds_before = told["wall_seconds"]
        run.figures |= told["speed"]  # until this sitting has taken enough steps to measure its own
    run.forget_after(int(run.resume_from.name.split("-")[-1]) if run.resume_from else -1)


def _count_stages(run: RunFolder) -> None:
    """What a run's stages took before (stages.py): their seconds are the whole run's, up to their last checkpoint."""
    last = [last_complete_checkpoint(folder) for folder in sorted((run.path / "stages").rglob("checkpoints"))]
    stages = [checkpoint for checkpoint in last if checkpoint is not None]
    run.seconds_before = max([run.seconds_before, *(_told_of(checkpoint)["wall_seconds"] for checkpoint in stages)])
    if run.resume_from is None and not stages:
        run.say(f"{run.path} holds no complete checkpoint to go on from: starting afresh")


def _told_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError if it is damaged, or of another number of processes."""
    way_out = f"delete {checkpoint} to go on from the checkpoint before it"
    now = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        told = json.loads((checkpoint / COMPLETE).read_text())
        told = {"processes": now, "files": {}, **told}  # older ones do not say
        told |= {"wall_seconds": float(told["wall_seconds"]), "speed": dict(told["speed"])}
        sizes = {checkpoint / name: size for name, size in told["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{checkpoint / COMPLETE} is damaged: {way_out}") from error
    if damaged := [file for file, size in sizes.items() if not file.is_file() or file.stat().st_size != size]:
        raise UserError([f"{file} is damaged or missing: {way_out}" for file in damaged])
    if told["processes"] != now:
        processes = f"{told['processes']} process{'es' if told['processes'] != 1 else ''}"
        raise UserError(
            f"{checkpoint.parent.parent} was run with {processes}, now {now}: batches and their order would be others; launch "
            "it with as many, or give another --run.name"
        )
    return told


def _what_decides(config: str) -> list[str]:
    """The lines of a config that decide how a run ends: how long one sitting of it may take does not."""
    return [line for line in config.splitlines() if not line.startswith("  time_limit_minutes:")]


def _prepare(run: RunFolder, fingerprint: str, resume: bool, overwrite: bool) -> None:
    """Make the folder ready and hold it; a run that is to be overwritten is put aside until the new one has begun."""
    path, config = run.path, run.path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run folder: choose another --run.name or --run.root")
    taken = path.is_dir() and any(entry.name != run_lock.NAME for entry in path.iterdir())
    if taken and not config.exists():
        refused = "not deleting it" if overwrite else "not writing into it"
        raise UserError(
            f"{path} holds files but no config.yaml, so no recipe made it: {refused}; choose another --run.name"
        )
    # a job put back may not have got this far
    if resume and not taken and int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        raise UserError(
            f"nothing to resume: {path} does not exist or is empty; leave out --run.resume, or check --run.name"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.lock()
        if config.exists() and overwrite:
            run.put_aside()
        elif config.exists() and resume:
            _check_same_config(path, config.read_text(), fingerprint)
        elif config.exists():
            done = (path / "metrics.json").exists()
            raise UserError(
                f"{path} already holds {'a finished' if done else 'an unfinished'} run: choose another --run.name, "
                "--run.resume true to go on with it, or --run.overwrite true to delete it"
            )
        write_atomically(config, fingerprint)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {path}: {error.strerror}; choose another --run.root"
        ) from error


def _check_same_config(path: Path, written: str, fingerprint: str) -> None:
    """Raise UserError with the first line in which a run's config differs from the one that is to go on with it."""
    before, now = _what_decides(written), _what_decides(fingerprint)
    if not before:
        raise UserError(
            f"cannot resume {path}: its config.yaml is empty, so nothing says what was run; put it back, or start again with "
            "--run.overwrite true"
        )
    if before != now:
        changed = [
            f"`{new.strip()}` (was `{old.strip()}`)" for old, new in zip(before, now, strict=False) if old != new
        ] or ["its length"]
        raise UserError(
            f"cannot resume {path}: its config was another one: {changed[0]}; give the same config, or a new --run.name"
        )
