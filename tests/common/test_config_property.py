"""Whatever is done to a good config, loading it ends with a config or a UserError: never with another exception."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.common.config import Section, load_config, to_yaml
from recipes.common.errors import UserError
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers


@dataclass
class Topic:
    """A recipe's own knobs, of many types."""

    subset: Literal["all", "some"] = "all"
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    pair: tuple[float, float] = (0.9, 0.95)
    names: str | list[str] = "x"
    table: dict[str, dict[str, int]] | None = None
    rate: PositiveFloat | Literal["auto"] = "auto"


@dataclass
class Config:
    model: Model
    data: Data
    topic: Topic
    training: Section[transformers.TrainingArguments]
    evaluation: Evaluation
    run: Run
    optional: Section["transformers.TrainingArguments"] | None = None  # noqa: UP037  both spellings


GOOD: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "rope": {"theta": 1e4}}, "dtype": "float32"},
    "data": {"name": ["tasks", "pydocs_qa"], "columns": {"prompt": "question"}, "max_samples": 10, "seed": 1},
    "topic": {"subset": "some", "sizes": [3, 4], "table": {"a": {"b": 1}}, "rate": 0.5},
    "training": {
        "learning_rate": 3e-4,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"x": 1},
        "eval_strategy": "no",
        "bf16": False,
        "label_names": ["labels"],
        "optim": "adamw_torch",
    },
    "evaluation": {"max_samples": 5},
    "run": {"name": "x", "threads": 1},
}
ODD_VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 1.0, 0.5, 1e4, 10**30, -(10**400), float("nan"), float("inf")]),
    st.sampled_from(["", " ", "no", "5", "null", "1e4", "a: b", "[", "\t", "中文", "\x07", "x" * 300]),
    st.sampled_from(["cosine", "steps", "epoch", "auto"]),
    st.sampled_from(
        [[], {}, [None], [[1]], [{"a": 1}], [1, "a", 2.5], {"a": {"b": {}}}, {1: 2}, {None: 1}, {"a.b": 1}]
    ),
    st.just({"class_path": "os.system", "init_args": {}}),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
KEYS = st.one_of(
    st.sampled_from([k for section in [GOOD, *GOOD.values()] for k in section]),
    st.sampled_from(
        ["lerning_rate", "warmup_ratio", "a.b", "training.max_steps", "no", "1", "", "<<", "optional", "sizes"]
    ),
    st.text(max_size=5),
    st.sampled_from([1, 1.5, None, True]),
)
ODD_TEXTS = ["null", "1", "{a: 1}", "[", "-1", "1e400", "*a", "{a: &a [*a]}"]
GOOD_FLAGS = [
    ["--run.name", "y"],
    ["--training.max_steps=3"],
    ["--optional.seed", "3"],
    ["--optional", "null"],
    ["--model.config.layers", "[1, 2]"],
    ["--topic.pair", "[1, 2]"],
]
PIECES = ["\t", "\n", "  ", ":", "- ", "{", "}", "[", "]", "'", '"', "&a ", "*a", "!!int ", "!x ", "#", "|\n"]
PIECES += [">\n", "---\n", "%", "<<: ", "\x00"]


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, dict):
        for key in tree:
            yield (*path, key)
            yield from _places(tree[key], (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A good config, spoilt one to four times: a tree, a text, a command line."""
    where = draw(st.sampled_from(["tree", "text", "flags", "everywhere"]))
    tree = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3)) if where in ("tree", "everywhere") else 0):
        places = list(_places(tree))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        parent = tree
        for step in above:
            parent = parent[step]
        how = draw(st.sampled_from(["drop", "drop", "drop", "rename", "replace", "nest", "list", "move", "add"]))
        if how == "rename":
            parent[draw(KEYS)] = parent.pop(key)
        elif how == "drop":
            del parent[key]
        elif how == "replace":
            parent[key] = copy.deepcopy(draw(ODD_VALUES))  # drawn lists are shared
        elif how == "nest":
            parent[key] = {draw(KEYS): parent[key]}
        elif how == "list":
            parent[key] = [parent[key]]
        elif how == "move":
            tree[draw(KEYS)] = parent.pop(key)
        else:
            parent[draw(KEYS)] = copy.deepcopy(draw(ODD_VALUES))  # drawn lists are shared
    lines = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).split("\n")
    for _ in range(1 if where in ("text", "everywhere") else 0):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["duplicate", "delete", "insert", "indent"]))
        if how == "duplicate":
            lines.insert(at, lines[at])
        elif how == "delete":
            del lines[at]
        elif how == "indent":
            lines[at] = draw(st.sampled_from([" ", "\t", "    "])) + lines[at]
        else:
            column = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:column] + draw(st.sampled_from(PIECES)) + lines[at][column:]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if where == "text" and draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=3))
    argv: list[str] = []
    for _ in range(draw(st.integers(1, 2)) if where in ("flags", "everywhere") else 0):
        section, name = draw(st.sampled_from([*GOOD, "optional", "zzz"])), str(draw(KEYS))
        value = draw(st.one_of(st.text(max_size=6), st.sampled_from(ODD_TEXTS)))
        odd = [[f"--{section}.{name}", value], [f"--{section}.{name}={value}"], [f"--{name}", value], [value]]
        argv += draw(st.one_of(st.sampled_from(GOOD_FLAGS), st.sampled_from([*odd, [f"--{section}", value]])))
    return data, argv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spoilt=mutated())
def test_a_spoilt_config_loads_or_is_refused(spoilt: tuple[bytes, list[str]], folder: Path) -> None:
    data, argv = spoilt
    (folder / "cpu.yaml").write_bytes(data)

    def frame(section: str, cls: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
        return {"use_cpu": (True, "machine"), "output_dir": (str(folder), "frame"), "report_to": ("none", "frame")}

    try:
        loaded = load_config(Config, argv, config_folder=folder, library_defaults=frame)
        if loaded.help is not None:
            return
        config = loaded.build()
    except UserError as error:
        assert error.problems
        assert all(problem.strip() and "\n" not in problem for problem in error.problems), error.problems
        return
    assert isinstance(config, Config)
    loaded.print()
    written = to_yaml(loaded.values)
    (folder / "again.yaml").write_text(written, encoding="utf-8")
    again = load_config(Config, ["--config", str(folder / "again.yaml")], config_folder=folder, library_defaults=frame)
    assert to_yaml(again.values) == written
    assert isinstance(again.build(), Config)


def test_the_good_config_is_good(folder: Path) -> None:
    (folder / "cpu.yaml").write_text(yaml.safe_dump(GOOD))
    config = load_config(Config, [], config_folder=folder).build()
    assert config.training.learning_rate == 3e-4
    assert isinstance(config.topic.pair, tuple)
    assert type(config.run.threads) is int
    assert PositiveInt(1) == config.run.threads
