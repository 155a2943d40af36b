"""The sections that recipes share. A recipe adds its own topic's dataclass and the library's own dataclasses beside these.

This file is imported for `--help`, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt

from recipes.common.config.values import UpToOne

__all__ = [
    "ClosedUnitInterval", "Data", "Evaluation", "Model", "NonNegativeInt", "OpenUnitInterval", "PositiveFloat", "PositiveInt",
    "Run", "UpToOne",
]  # fmt: skip


@dataclass
class Model:
    """Which model: a hub id or a local folder (`name`), or a fresh one (`config`). Exactly one of the two."""

    name: str | None = None  # hub id or local folder with pretrained weights
    config: dict[str, Any] | None = None  # from scratch: model_type and the fields of that library's config class
    tokenizer: str | None = None  # hub id or local folder; default: the same as name
    revision: str | None = None  # hub branch, tag or commit
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"  # of the weights; autocast is training.bf16
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"  # attention kernel
    chat_template: str | None = None  # Jinja file that replaces the tokenizer's chat template


@dataclass
class Data:
    """One door for all data: a builtin name, a local file or folder, or a hub id."""

    name: str | list[str] = "pydocs"  # builtin name, path, or hub id; a list concatenates
    subset: str | None = None  # the hub data set's configuration name
    split: str = "train"  # which split trains
    validation_split: str | None = (
        None  # which split is held out; default: validation, else test, else a fraction of train
    )
    validation_fraction: OpenUnitInterval = 0.05  # held out of train when the source has no other split
    columns: dict[str, str] | None = None  # ours -> theirs, e.g. {prompt: question, completion: answer}
    max_samples: PositiveInt | None = None  # keep the first n of the training split
    max_validation_samples: PositiveInt | None = None  # keep the first n of the held-out split
    on_bad_row: Literal["error", "skip"] = "error"  # skip: count and list what was skipped
    streaming: bool = False  # read as it trains: text and conversations larger than the disk
    seed: int = 0  # of the builtin generators and of the held-out fraction


@dataclass
class Evaluation:
    """How the held-out figures are measured."""

    max_samples: PositiveInt = 400  # rows generated from, a measurement
    batch_size: PositiveInt = 100  # rows generated at once
    max_new_tokens: PositiveInt = 32  # longest answer, in tokens
    temperature: PositiveFloat = 1.0  # of the sampled figures; the greedy ones are measured beside them


@dataclass
class Run:
    """Where the run goes and how it uses this machine."""

    name: str = "default"  # the run's folder: <root>/<recipe>/<name>
    root: str = "runs"  # folder that holds all runs
    resume: bool = False  # go on from the last complete checkpoint of this run
    overwrite: bool = False  # delete what a run of this name left
    threads: PositiveInt | None = None  # torch threads a process; default: this process's share of the cores
    time_limit_minutes: PositiveFloat | None = None  # stop cleanly (checkpoint, exit 130) after this long
