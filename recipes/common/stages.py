"""A recipe that trains several things one after the other: each in a run folder of its own, below the run's.

    runs/<recipe>/<name>/stages/<stage>/    checkpoints/   metrics.jsonl   adapter/

A run that is resumed goes on inside the stage where it was stopped, and reads those that were finished.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder
from recipes.common.run_opening import take_up
from recipes.common.sections import Run
from recipes.common.sharding import launched_with

if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch import Tensor, nn
    from trl import SFTConfig

    from recipes.common.adaptation import Task


def rows_where(rows: DatasetDict, column: str, value: str, key: str) -> DatasetDict:
    """The rows whose column says `value`; `key` is where the config does. Raises UserError where there are none."""
    import datasets
    import numpy as np

    chosen = datasets.DatasetDict()
    for split in ("train", "validation"):
        if column not in rows[split].column_names:
            raise UserError(f"{key}: the rows of data.name have no column `{column}` to choose {value!r} by")
        said = np.array(rows[split][column])
        chosen[split] = rows[split].select(np.flatnonzero(said == value))
        if not len(chosen[split]):
            raise UserError(
                f"{key}: no {split} row has the {column} {value!r}; there are {', '.join(sorted(set(said)))}"
            )
    return chosen


def refuse_shards() -> None:
    """Raise UserError under DeepSpeed and FSDP: accelerate makes one engine a process, and each stage needs its own."""
    if (library := launched_with()) is not None:
        raise UserError(
            f"launch: this recipe trains one thing after the other, and {library} takes one model a process: use LAUNCH=ddp"
        )


def train_stage(
    name: str,
    task: Task,
    rows: DatasetDict,
    model: nn.Module,
    training: SFTConfig,
    run: RunFolder,
    settings: Run,
    *,
    method: str,
    told: dict[str, Any],
    make_trainer: Any = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Train what has gradients in the model on the rows, and save it in the stage's adapter/; gives its numbers.

    `changes` are of `training`; `told` are the settings that go to adapter.json. A dry run ends here.
    """
    from safetensors.torch import load_file

    from recipes.common import adaptation
    from recipes.common.training import fit

    stage = run if run.dry else RunFolder(run.path / "stages" / name, recipe=run.recipe, given=run.given)
    file = stage.path / "adapter" / "adapter_model.safetensors"
    if file.exists():
        run.say(f"stage {name}: trained before, in {stage.path}")
        return load_file(file)
    run.say(f"stage {name}: {len(rows['train']):,} rows" + (", of which the estimates below are" if run.dry else ""))
    if not run.dry:
        stage.path.mkdir(parents=True, exist_ok=True)
        stage.started = run.started  # run.time_limit_minutes is the whole run's
        take_up(stage)
        stage.seconds_before = run.seconds_before  # those too
    args, part = copy.copy(training), replace(task, data=rows)
    for key, value in {"output_dir": str(stage.checkpoints), **changes}.items():
        setattr(args, key, value)
    trainer = (make_trainer or adaptation.make_trainer)(part, model, args, stage)
    adaptation.announce(part, trainer, stage)
    fit(trainer, stage, time_limit_minutes=settings.time_limit_minutes)
    adaptation.save(part, trainer, model, stage, method, told)
    return load_file(file)
