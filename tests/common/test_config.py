"""The config loader: what is read, what beats what, and where each value comes from."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from recipes.common.config import Section, defaults, help_text, load_config, to_yaml
from recipes.common.errors import UserError
from tests.common.config_examples import Config, Library, Light, Run, Schedule, load, problems

if TYPE_CHECKING:
    import transformers

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("folder")


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("run.rate", "3e-4", 3e-4),
        ("run.rate", "1e5", 1e5),
        ("run.rate", "-.5", -0.5),
        ("run.rate", "1", 1.0),
        ("run.rate", ".inf", math.inf),
        ("run.seed", "1_000", 1000),
        ("run.seed", "1e4", 10000),
        ("run.seed", "0x10", 16),
        ("run.seed", "010", 10),
        ("run.steps", "null", None),
        ("run.steps", "7", 7),
        ("run.verbose", "true", True),
        ("run.tags", "[a, b]", ["a", "b"]),
        ("run.tags", "[]", []),
        ("run.tags", "[1, 2.50]", ["1", "2.50"]),
        ("run.sizes", "[1, 2e1]", [1, 20]),
        ("run.either", "a", "a"),
        ("run.either", "[a, b]", ["a", "b"]),
        ("run.name", "no", "no"),
        ("run.name", "on", "on"),
        ("run.name", "007", "007"),
        ("run.name", "2024-01-01", "2024-01-01"),
        ("run.name", "1:30", "1:30"),
        ("run.name", '"true"', "true"),
        ("run.name", '""', ""),
        ("run.schedule", "cosine", Schedule.COSINE),
        ("run.root", "elsewhere/runs", Path("elsewhere/runs")),
        ("model.name", "null", None),
        ("model.name", '"null"', "null"),
        ("model.config", "{a: 1, b: {c: [x]}, 'd.e': '5', f: 1e4}", {"a": 1, "b": {"c": ["x"]}, "d.e": "5", "f": 1e4}),
        ("model.config", "{class_path: os.system, init_args: {x: 'true'}}", None),
        ("model.columns", "{prompt: question, 1: 2}", {"prompt": "question", "1": "2"}),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.inner.depth", "5", 5),
        ("training.schedule", "cosine", "cosine"),
        ("training.bf16", "null", None),
        ("training.warmup_steps", "0.1", 0.1),
        ("training.warmup_steps", "1", 1),
        ("training.max_grad_norm", ".inf", math.inf),
        ("training.max_steps", "-1", -1),
        ("training.max_steps", "-1.0", -1),
        ("training.inner.depth", "3", 3),
    ],
)
@pytest.mark.parametrize("where", ["file", "command line", "command line with ="])
def test_a_value_is_read_alike_everywhere(key: str, written: str, value: Any, where: str) -> None:
    if where == "file":
        *sections, name = key.split(".")
        lines = [f"{'  ' * i}{section}:" for i, section in enumerate(sections)]
        Path("cpu.yaml").write_text("\n".join([*lines, f"{'  ' * len(sections)}{name}: {written}"]))
        config = load().build()
    else:
        argv = [f"--{key}={written}"] if "=" in where else [f"--{key}", written]
        config = load(None, *argv).build()
    for part in key.split("."):
        config = getattr(config, part)
    if value is None and "class_path" in written:
        value = {"class_path": "os.system", "init_args": {"x": "true"}}
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    "written", ["a: b", "[a", "@x", "# not a comment", "*x", "{a: b}", "%", "", "x #y", "-1e", "!!x", "'"]
)
def test_any_text_on_the_command_line_is_good_where_text_is_expected(written: str) -> None:
    assert load(None, f"--run.name={written}").build().run.name == (written if written != "x #y" else "x")


def test_command_line_nested_keys_merge_into_the_files_mapping() -> None:
    text = """
        model:
          config: {model_type: llama, hidden_size: 32, rope: {theta: 1e4, kind: x}}
    """
    config = load(text, "--model.config.hidden_size", "64", "--model.config.rope.theta=5").build()
    assert config.model.config == {"model_type": "llama", "hidden_size": 64, "rope": {"theta": 5, "kind": "x"}}


def test_a_mapping_written_whole_on_the_command_line_replaces() -> None:
    loaded = load("model:\n  config: {model_type: llama, hidden_size: 32}", "--model.config", "{model_type: bert}")
    assert loaded.build().model.config == {"model_type": "bert"}


def test_flags() -> None:
    loaded = load(None, "--dry-run", "--run.seed", "3", "--print-config")
    assert (loaded.dry_run, loaded.print_config, loaded.help) == (True, True, None)
    assert load(None, "--help").help == ""
    assert load(None, "--help", "run").help == "run"
    assert load(None, "--help=run").help == "run"
    assert load(None, "-h", "--dry-run").help == ""
    assert load(None, "--local_rank=3").build().run == Run()  # DeepSpeed's launcher adds it


def test_yaml_anchors_and_merge_keys() -> None:
    text = """
        model:
          config: &base {a: 1, b: 2}
          columns: {<<: *base, b: 3}
    """
    assert load(text).build().model.columns == {"a": "1", "b": "3"}


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert load(b"\xef\xbb\xbfrun: {seed: 3}").build().run.seed == 3


# ------------------------------------------------------------------------------------------------ what beats what


def machine(section: str, cls: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    if section != "training":
        return {}
    return {
        "bf16": (True, "machine: has bf16"),
        "output_dir": ("there", "frame"),
        "max_steps": (7, "frame: 7"),
        "learning_rate": (1.0, "frame"),
    }


def test_precedence_and_origins() -> None:
    Path("a.yaml").write_text("training:\n  learning_rate: 0.2\n  max_length: 2\nrun: {seed: 1}\n")
    Path("b.yaml").write_text("training:\n  max_length: 3\nrun:\n  seed: 2\n  rate: 2\n")
    argv = ["--config", "a.yaml", "--config", "b.yaml", "--run.rate", "3", "--model.config.x", "1"]
    loaded = load(None, *argv, library_defaults=machine)
    config = loaded.build()
    training = config.training
    assert training.num_train_epochs == 3.0  # the library's
    assert loaded.origin("training.num_train_epochs") == "default"
    assert training.max_steps == 7  # the recipe says 100, the frame knows this machine
    assert loaded.origin("training.max_steps") == "frame: 7"
    assert training.bf16 is True
    assert loaded.origin("training.bf16") == "machine: has bf16"
    assert training.learning_rate == 0.2  # the file beats the frame
    assert loaded.origin("training.learning_rate") == "a.yaml:2"
    assert training.max_length == 3
    assert loaded.origin("training.max_length") == "b.yaml:2"
    assert (config.run.seed, loaded.origin("run.seed")) == (2, "b.yaml:4")
    assert (config.run.rate, loaded.origin("run.rate")) == (3.0, "command line")
    assert loaded.origin("model.config.x") == "command line"
    assert loaded.origin("run.name") == "default"
    assert {"training.max_length", "run.seed", "run.rate", "model.config.x"} <= loaded.given
    assert not {"training.max_steps", "training.bf16", "run.name"} & loaded.given
    with pytest.raises(KeyError):
        loaded.origin("nothing")


def test_the_recipes_default_beats_the_librarys() -> None:
    assert load().build().training.max_steps == 100


def test_library_defaults_sees_the_class_and_what_the_user_set() -> None:
    seen = {}

    def ask(section: str, cls: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
        seen[section] = (cls.__name__, given)
        return {}

    load("training: {max_steps: 3, inner: {depth: 4}}\nextra: {}", library_defaults=ask).build()
    assert seen == {"training": ("Library", {"max_steps": 3, "inner": {"depth": 4}}), "extra": ("NotADataclass", {})}


def test_a_default_for_a_key_that_is_not_there_is_our_bug() -> None:
    with pytest.raises(TypeError, match=r"training\.nothing"):
        load(
            library_defaults=lambda section, cls, given: {"nothing": (1, "x")} if section == "training" else {}
        ).build()


def test_a_recipe_may_put_a_subclass_or_other_defaults_in_place_of_a_section() -> None:
    @dataclass
    class Bigger(Run):
        more: int = 1  # what this recipe adds

    @dataclass
    class Own:
        run: Run = field(default_factory=lambda: Bigger(seed=5))

    config = load("run: {rate: 2, more: 3}", config_class=_named(Own)).build()
    assert (config.run.seed, config.run.rate, config.run.more) == (5, 2.0, 3)
    assert "--run.more" in help_text(Own, None, "x.py")


def _named(cls: type) -> type:
    cls.__annotations__ = {"run": Run}  # text cannot name a class inside of a function
    return cls


def test_an_optional_section() -> None:
    assert load().build().extra is None
    assert load("extra: {}").build().extra.bits == 8
    assert load("extra: {bits: 4}").build().extra.bits == 4
    assert load("extra: {bits: 4}", "--extra", "null").build().extra is None
    assert load("extra:", "--extra.bits", "3").build().extra.bits == 3
    loaded = load("extra: {load_in_4bit: true}", "--extra.bits=2")
    assert loaded.values["extra"] == {"load_in_4bit": True, "bits": 2}


def test_configs_are_found_by_name(folder: Path) -> None:
    Path("here").mkdir()
    Path("here/gpu.yaml").write_text("run: {seed: 4}")
    Path("here/cpu.yaml").write_text("run: {seed: 5}")
    loaded = load_config(Light, ["--config", "gpu"], config_folder=Path("here"))
    assert loaded.build().run.seed == 4
    assert loaded.origin("run.seed") == "here/gpu.yaml:1"
    assert load_config(Light, [], config_folder=folder / "here").build().run.seed == 5
    assert load_config(Light, [], config_folder=None).build().run.seed == 0


def test_quoted_and_unquoted_section_names() -> None:
    @dataclass
    class Quoted:
        training: Section["json.JSONDecoder"]  # noqa: F821, UP037
        other: Section[json.JSONEncoder] | None = None  # noqa: F821  what ruff makes of it under TYPE_CHECKING

    loaded = load("training: {strict: false}\nother: {indent: 3}", config_class=Quoted)
    assert loaded.build().other.indent == 3
    assert loaded.build().training.strict is False


# ------------------------------------------------------------------------------------------------ what is written


def test_round_trip() -> None:
    text = """
        model:
          name: "null"
          config: {a: 3e-4, b: [1, "2", null, "3e-4", "no"], c: {d: 1e300, 3: x}, e: "line\\nbreak \\u4e2d", f: 0.1}
        run:
          name: "007"
          rate: 3e-4
          schedule: cosine
          tags: ["true", "1_0", " x ", "a: b", "# c", "", "~", "0o7", "1e3", ".5", "2024-01-01"]
        training: {learning_rate: 3e-05, warmup_steps: 1, schedule: cosine, extra: {x: 1}, inner: {depth: 3}}
        extra: null
    """
    first = load(text, "--run.share=1e-7", library_defaults=machine)
    config = first.build()
    written = to_yaml(first.values)
    Path("again.yaml").write_text(written)
    second = load(None, "--config", "again.yaml", library_defaults=machine)
    assert second.build() == config
    assert to_yaml(second.values) == written
    assert yaml.safe_load(written)["run"]["tags"] == config.run.tags  # an older reader of YAML reads the texts alike
    assert "machine" not in written
    assert not {"bf16", "output_dir", "max_steps"} & set(first.values["training"])  # this machine's, not the user's
    assert first.values["run"]["schedule"] == "cosine"
    assert first.values["extra"] is None


def test_values_hold_the_recipes_own_defaults() -> None:
    values = load().values
    assert values["training"] == {"max_steps": 100}
    assert values["run"]["sizes"] == [1, 2]
    assert list(values) == ["model", "training", "extra", "run"]


def test_values_are_copies() -> None:
    loaded = load("model: {config: {a: [1]}}")
    loaded.values["model"]["config"]["a"].append(2)
    config = loaded.build()
    config.model.config["a"].append(3)
    assert loaded.values["model"]["config"] == {"a": [1]}


def test_print_shows_every_value_and_its_origin_and_is_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "training:\n  learning_rate: 3e-4\nmodel:\n  config:\n    hidden: 3\nextra:\n"
    loaded = load(text, "--run.seed", "4", library_defaults=machine)
    with monkeypatch.context() as patch:
        patch.setattr(Library, "__init__", None)  # printing constructs nothing
        shown = loaded.print()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for line in [
        "learning_rate: 0.0003 # cpu.yaml:2",
        "# bf16: true # machine: has bf16",
        "# max_steps: 7 # frame: 7",
        "# num_train_epochs: 3.0 # default",
        "hidden: 3 # cpu.yaml:5",
        "seed: 4 # command line",
        "rate: 0.1 # default",
        "extra: null # cpu.yaml:6",
    ]:
        assert line in lines, f"{line} is not in\n{shown}"
    training = shown[shown.index("training:") : shown.index("\n\nextra:")]
    assert training.index("learning_rate") < training.index("bf16") < training.index("num_train_epochs")
    assert len({line.index("# ", 8) for line in training.splitlines()[1:] if line.strip()}) == 1  # aligned
    Path("printed.yaml").write_text(shown)
    assert load(None, "--config", "printed.yaml", library_defaults=machine).build() == loaded.build()


# ------------------------------------------------------------------------------------------------ --help


def test_help_lists_every_key_with_type_default_and_comment() -> None:
    text = " ".join(help_text(Config, "What it is.\n\n    y = x\n", "recipes/a/b.py").split())
    assert text.startswith("What it is. y = x usage: python recipes/a/b.py")
    for said in [
        "--run.name the run's folder [text; default: default]",
        "--run.share [a number above 0 and below 1; default: 0.05]",
        "--run.tags [a list of texts; default: []]",
        "--model.name hub id or local folder [text or null; default: null]",
        "--model.dtype [one of `float32`, `bfloat16`; default: float32]",
        "--model.inner.depth how deep [a whole number above 0; default: 2]",
        "`--help training` lists its keys. This recipe sets max_steps = 100.",
        "Optional: left out unless a key of it is given.",
    ]:
        assert said in text, f"{said} is not in {text}"


def test_help_of_a_section() -> None:
    text = " ".join(help_text(Config, None, "recipes/a/b.py", "training").split())
    assert (
        "--training.per_device_train_batch_size The batch size per device. [a whole number above 0; default: 8]" in text
    )
    assert "--training.max_steps [a whole number above 0 or `-1`; default: 100]" in text
    assert "--run" not in text
    text = " ".join(help_text(Config, None, "recipes/a/b.py", "extra").split())
    assert "--extra.load_in_4bit Store weights in 4 bits. [true or false; default: false]" in text
    assert "--model.inner.depth" in help_text(Config, None, "x.py", "model.inner")
    with pytest.raises(UserError, match=r"no section `runn`; did you mean run\? .*model, training, extra, run"):
        help_text(Config, None, "recipes/a/b.py", "runn")


RECIPE = '''
"""What it is."""
from __future__ import annotations
import sys
from dataclasses import dataclass
from pathlib import Path
from recipes.common.config import Section, help_text, load_config
from recipes.common.sections import Data, Evaluation, Model, Run

@dataclass
class Config:
    model: Model
    data: Data
    lora: Section["peft.LoraConfig"]
    training: Section["trl.SFTConfig"]
    evaluation: Evaluation
    run: Run

loaded = load_config(Config, sys.argv[1:], config_folder=None)
if loaded.help is not None:
    print(help_text(Config, __doc__, sys.argv[0], loaded.help))
heavy = {"torch", "numpy", "transformers", "trl", "peft", "datasets", "accelerate", "omegaconf"} & set(sys.modules)
print("heavy:", sorted(heavy))
'''


@pytest.mark.parametrize("argv", [["--help"], ["--help", "data"], [], ["--run.name", "x"]])
def test_no_library_is_imported_before_it_is_needed(argv: list[str]) -> None:
    Path("recipe.py").write_text(RECIPE)
    command = [sys.executable, "recipe.py", *argv]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-300:] + done.stderr


def test_loading_is_quick() -> None:
    sections = "\n".join(f"    key_{i}: {i}e-3" for i in range(50))
    text = f"run:\n  seed: 3\n  rate: 3e-4\nmodel:\n  dtype: bfloat16\n  config:\n{sections}\n"
    load(text, config_class=Light).build()
    started = time.process_time()
    for _ in range(5):
        load(None, "--run.name", "x", config_class=Light).build()
    assert (time.process_time() - started) / 5 < 0.05


# ------------------------------------------------------------------------------------------------ a real library


@dataclass
class Real:
    training: Section[transformers.TrainingArguments] = field(default_factory=defaults(logging_steps=1))
    run: Run = field(default_factory=Run)


def test_transformers_training_arguments() -> None:
    frame = {"use_cpu": (True, "machine"), "output_dir": ("out", "frame"), "report_to": ("none", "frame")}
    text = """
        training:
          learning_rate: 3e-4
          max_steps: 1e2
          lr_scheduler_type: cosine
          eval_strategy: no
          lr_scheduler_kwargs: {x: 1}
    """
    loaded = load(text, config_class=Real, library_defaults=lambda section, cls, given: frame)
    training = loaded.build().training
    assert (training.learning_rate, training.max_steps, training.lr_scheduler_type.value) == (3e-4, 100, "cosine")
    assert training.logging_steps == 1
    assert training.use_cpu is True
    assert "use_cpu" not in to_yaml(loaded.values)
    found = problems(
        "max_steps: 1\ntraining: {learnin_rate: 1, lr_scheduler_type: cosin, optim: adamw, bf16: yes, "
        "save_strategy: epochs}",
        config_class=Real,
    )
    for said in [
        "training.learning_rate",
        "`cosine`?",
        "`adamw_torch`?",
        "write `true`",
        "`epoch`?",
        "training.max_steps",
    ]:
        assert any(said in p for p in found), f"{said} is not in {found}"
    (refused,) = problems("training: {load_best_model_at_end: true}", config_class=Real)
    assert refused.startswith("training: ")
    assert "eval" in refused
