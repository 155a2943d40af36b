"""Sections of every kind, a library's stand-ins, and what loads a config of them: for the tests of the loader."""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from recipes.common.config import Loaded, Section, defaults, load_config
from recipes.common.errors import UserError


class Schedule(enum.Enum):
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass
class Inner:
    """A section inside of a section."""

    depth: PositiveInt = 2  # how deep
    name: str = "inner"


@dataclass
class Model:
    """Which model."""

    name: str | None = None  # hub id or local folder
    config: dict[str, Any] | None = None  # from scratch
    dtype: Literal["float32", "bfloat16"] = "float32"
    columns: dict[str, str] | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass
class Run:
    name: str = "default"  # the run's folder
    seed: NonNegativeInt = 0
    rate: float = 0.1
    share: OpenUnitInterval = 0.05
    steps: PositiveInt | None = None
    verbose: bool = False
    tags: list[str] = field(default_factory=list)
    kinds: list[Literal["linear", "cosine"]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    either: str | list[str] = "one"
    schedule: Schedule = Schedule.LINEAR
    root: Path = Path("runs")


@dataclass
class Library:
    """Stands for a library's dataclass: light, and as careless about bounds."""

    learning_rate: float = 5e-5
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = field(default=8, metadata={"help": "The batch size per device. More follows."})
    warmup_steps: float = 0
    max_length: int | None = 1024
    lora_dropout: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Schedule | str = "linear"
    bf16: bool | None = None
    output_dir: str | None = None
    inner: Inner | None = None
    extra: dict | str | None = None

    def __post_init__(self):
        if self.max_steps == 13:
            raise ValueError("13 steps bring bad luck")
        if self.max_steps == 14:
            raise ImportError("this needs the package `luck`")
        if self.max_steps == 15:
            raise AttributeError("'int' object has no attribute 'luck'")


class NotADataclass:
    """Like BitsAndBytesConfig: its constructor says what its keys are.

    Args:
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Store weights in 4 bits.
            More.
    """

    def __init__(self, load_in_4bit=False, bits: int = 8, **kwargs):
        self.load_in_4bit, self.bits = load_in_4bit, bits


@dataclass(kw_only=True)
class Config:
    model: Model
    training: Section[f"{__name__}.Library"] = field(default_factory=defaults(max_steps=100))
    extra: Section[f"{__name__}.NotADataclass"] | None = None
    run: Run


@dataclass
class Light:
    """No library section."""

    model: Model
    run: Run


def load(text: str | bytes | None = None, *argv: str, config_class: type = Config, **more: Any) -> Loaded:
    """Load `text` as cpu.yaml, which is taken when no --config is given."""
    if text is not None:
        data = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        Path("cpu.yaml").write_bytes(data)
    return load_config(config_class, argv, config_folder=Path(), **more)


def problems(text: str | bytes | None = None, *argv: str, **more: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *argv, **more).build()
    return caught.value.problems
