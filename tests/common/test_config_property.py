"""Whatever is done to a good config: loading it ends with a config or a UserError, running it with exit code 0 or 2.

Never with another exception, which is a traceback.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat import save_tokenizer_and_model

from recipes.common.config import Section, load_config, to_yaml
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run
from recipes.pretraining import llama

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
def mutated(draw: st.DrawFn, good: dict[str, Any]) -> tuple[bytes, list[str]]:
    """A good config, spoilt one to four times: a tree, a text, a command line."""
    where = draw(st.sampled_from(["tree", "text", "flags", "everywhere"]))
    tree = copy.deepcopy(good)
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
        section, name = draw(st.sampled_from([*good, "optional", "zzz"])), str(draw(KEYS))
        value = draw(st.one_of(st.text(max_size=6), st.sampled_from(ODD_TEXTS)))
        odd = [[f"--{section}.{name}", value], [f"--{section}.{name}={value}"], [f"--{name}", value], [value]]
        argv += draw(st.one_of(st.sampled_from(GOOD_FLAGS), st.sampled_from([*odd, [f"--{section}", value]])))
    return data, argv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spoilt=mutated(GOOD))
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


# A recipe's config: what is spoilt here goes on to the tokenizer, the data, the model, the trainer and the first batch.
RUN: dict[str, Any] = {
    "model": {"name": "model", "tokenizer": "tokenizer", "dtype": "float32"},
    "data": {"name": "text.txt", "max_samples": 10, "validation_fraction": 0.1, "seed": 1},
    "llama": {"block_length": 64, "optimizer": "adamw", "compare_with_xz": False, "prompts": ["the "]},
    "training": {
        "learning_rate": 3e-4,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "seed": 1,
    },
    "run": {"name": "x", "threads": 1},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model, the tokenizer and the text that RUN names."""
    folder = tmp_path_factory.mktemp("sources")
    save_tokenizer_and_model(folder)
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 200)
    yield folder
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a spoilt config may have asked for more


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spoilt=mutated(RUN))
def test_a_spoilt_config_of_a_recipe_ends_with_exit_code_0_or_2(
    spoilt: tuple[bytes, list[str]], sources: Path, folder: Path
) -> None:
    data, argv = spoilt
    (folder / "run.yaml").write_bytes(data)
    before = dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(sources), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_recipe(llama.main, llama.Config, ["--config", str(folder / "run.yaml"), "--dry-run", *argv])
    os.environ.clear()
    os.environ.update(before)
    assert code in (0, 2)
    assert (code == 2) == ("\nerror: " in "\n" + err.getvalue()), err.getvalue()
    assert "Traceback" not in err.getvalue() + out.getvalue()
    assert {path.relative_to(sources).parts[0] for path in sources.rglob("*") if path.is_file()} == {
        *("model", "tokenizer", "text.txt")
    }, "a dry run writes no file"


def test_the_good_config_is_good(folder: Path) -> None:
    (folder / "cpu.yaml").write_text(yaml.safe_dump(GOOD))
    config = load_config(Config, [], config_folder=folder).build()
    assert config.training.learning_rate == 3e-4
    assert isinstance(config.topic.pair, tuple)
    assert type(config.run.threads) is int
    assert PositiveInt(1) == config.run.threads
