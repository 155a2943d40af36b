"""The config loader: every way of getting a config wrong, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonargparse.typing import PositiveInt

from recipes.common.config import Section, schema
from recipes.common.errors import UserError
from tests.common.config_examples import load, problems

pytestmark = pytest.mark.usefixtures("folder")


MISTAKES: list[tuple[str, str | bytes | None, list[str], list[str]]] = [
    # name, cpu.yaml, argv, what one problem says: what, where, fix
    (
        "key of another section",
        "max_steps: 3",
        [],
        ["`max_steps`", "top level", "belongs under `training`", "training.max_steps", "cpu.yaml:1"],
    ),
    ("misspelt, of another section", "\nlerning_rate: 3", [], ["did you mean `training.learning_rate`?", "cpu.yaml:2"]),
    (
        "misspelt key",
        "run:\n  sed: 3",
        [],
        ["`run.sed` is not a key of `run`", "did you mean `run.seed`?", "cpu.yaml:2"],
    ),
    (
        "misspelt library key",
        "training:\n  lerning_rate: 3",
        [],
        ["did you mean `training.learning_rate`?", "cpu.yaml:2"],
    ),
    (
        "misspelt deep key",
        "model:\n  inner:\n    dept: 3",
        [],
        ["`model.inner.dept`", "did you mean `model.inner.depth`?", "cpu.yaml:3"],
    ),
    (
        "misspelt deep library key",
        "training: {inner: {dept: 3}}",
        [],
        ["did you mean `training.inner.depth`?", "cpu.yaml:1"],
    ),
    (
        "misspelt section",
        "traning:\n  max_steps: 3",
        [],
        ["`traning` is not a section", "did you mean `training`?", "cpu.yaml:1"],
    ),
    (
        "misspelt section, flag",
        None,
        ["--traning.max_steps", "3"],
        ["did you mean `--training.max_steps`?", "(--traning.max_steps)"],
    ),
    (
        "flag of another section",
        None,
        ["--max_steps", "3"],
        ["belongs under `training`", "`--training.max_steps`", "(--max_steps)"],
    ),
    ("dashes in a flag", None, ["--training.max-steps", "3"], ["did you mean `--training.max_steps`?"]),
    ("nothing like it", "model: {zzz: 1}", [], ["`model.zzz`", "there are: name, config", "cpu.yaml:1"]),
    (
        "dotted key in a file",
        "training.max_steps: 3",
        [],
        ["dotted keys are for the command line", "`max_steps` under `training`", "cpu.yaml:1"],
    ),
    (
        "old key",
        "training: {warmup_ratio: 0.1}",
        [],
        ["here it is called `training.warmup_steps`, a share", "cpu.yaml:1"],
    ),
    ("number as key", "3: 4", [], ["`3` is not a key of the top level"]),
    (
        "text for a number",
        "run: {rate: fast}",
        [],
        ["`run.rate` must be a number, not `fast`", "default is 0.1", "cpu.yaml:1"],
    ),
    ("quoted number", "run: {seed: '5'}", [], ['a whole number of at least 0, not the text `"5"`', "without quotes"]),
    ("fraction for a count", "run: {seed: 1.5}", [], ["a whole number of at least 0, not `1.5`"]),
    ("switch for a number", "run: {rate: true}", [], ["must be a number, not `true`"]),
    ("switch for a count", "training: {max_steps: true}", [], ["must be a whole number above 0 or `-1`, not `true`"]),
    ("number for a switch", "run: {verbose: 1}", [], ["must be true or false, not `1`"]),
    ("yes for a switch", "run: {verbose: yes}", [], ["must be true or false, not `yes`", "write `true`"]),
    ("off for a switch", None, ["--run.verbose", "off"], ["write `false`", "(--run.verbose)"]),
    ("switch for text", "run: {name: true}", [], ["must be text, not `true`", 'in quotes: "true"']),
    ("null for text", "run:\n  name:", [], ["must be text, not null", "cpu.yaml:2"]),
    ("list for text", "run: {name: [a]}", [], ["must be text, not a list"]),
    ("text for a list", "run: {tags: a}", [], ["must be a list of texts, not `a`", "write `[a]`"]),
    ("wrong item", "run: {sizes: [1, x]}", [], ["must be a list of whole numbers, not `[1, x]`"]),
    (
        "wrong choice in a list",
        "run:\n  kinds:\n    - linear\n    - cosin",
        [],
        ["`run.kinds[1]` must be one of `linear`, `cosine`, not `cosin`", "did you mean `cosine`?", "cpu.yaml:4"],
    ),
    (
        "wrong choice in a list, flag",
        None,
        ["--run.kinds", "[linaer, cosine]"],
        ["`run.kinds[0]` must be one of `linear`, `cosine`, not `linaer`", "did you mean `linear`?", "(--run.kinds)"],
    ),
    (
        "number in a list of choices",
        "run: {kinds: [3]}",
        [],
        ["`run.kinds[0]` must be one of", "not `3`", "cpu.yaml:1"],
    ),
    ("text for a mapping", "model: {config: llama}", [], ["must be a mapping or null, not `llama`"]),
    ("mapping for a number", "run: {rate: {a: 1}}", [], ["must be a number, not a mapping"]),
    ("key inside of a number", None, ["--run.rate.x", "1"], ["must be a number, not a mapping", "(--run.rate.x)"]),
    (
        "wrong choice",
        "model: {dtype: bfloat}",
        [],
        ["one of `float32`, `bfloat16`, not `bfloat`", "did you mean `bfloat16`?"],
    ),
    ("wrong Enum", "run: {schedule: cosin}", [], ["one of `linear`, `cosine`", "did you mean `cosine`?"]),
    ("wrong Enum or text", "training: {schedule: cosin}", [], ["one of `linear`, `cosine`", "did you mean `cosine`?"]),
    ("outside an interval", "run: {share: 1.0}", [], ["a number above 0 and below 1, not `1.0`"]),
    ("not a number", "run: {rate: .nan}", [], ["must be a number, not `.nan`"]),
    ("huge number", f"run: {{rate: {'9' * 400}}}", [], ["must be a number, not `9999"]),
    (
        "negative batch",
        "training: {per_device_train_batch_size: 0}",
        [],
        ["a whole number above 0, not `0`", "default is 8"],
    ),
    (
        "negative rate",
        None,
        ["--training.learning_rate", "-1"],
        ["a number above 0, not `-1`", "(--training.learning_rate)"],
    ),
    ("endless rate", "training: {learning_rate: .inf}", [], ["a number above 0, not `.inf`"]),
    ("no steps", "training: {max_steps: 0}", [], ["a whole number above 0 or `-1`, not `0`"]),
    ("length of nothing", "training: {max_length: 0}", [], ["a whole number above 0 or null"]),
    ("dropout of all", "training: {lora_dropout: 1.0}", [], ["a number of at least 0 and below 1, not `1.0`"]),
    (
        "all of the warm-up",
        "training: {warmup_steps: 1.0}",
        [],
        ["ONE step, not the whole run", "below 1 is a share", "write `1`"],
    ),
    ("broken warm-up", "training: {warmup_steps: 1.5}", [], ["counts steps", "share of all steps", "write `2`"]),
    (
        "negative warm-up",
        "training: {warmup_steps: -1}",
        [],
        ["a number of at least 0, not `-1`", "share of all steps"],
    ),
    (
        "section is a value",
        "training: 5",
        [],
        ["`training` is a section, a mapping of keys, not `5`", "--help training", "cpu.yaml:1"],
    ),
    ("section is a list", None, ["--model", "[a]"], ["`model` is a section", "not a list", "(--model)"]),
    ("library section is null", "training:", [], ["`training` is null", "leave the line out", "cpu.yaml:1"]),
    ("section is null", "run:", [], ["`run` is null", "leave the line out", "cpu.yaml:1"]),
    ("refused by the class", "training: {max_steps: 13}", [], ["training: 13 steps bring bad luck"]),
    ("class needs a package", "training: {max_steps: 14}", [], ["training: this needs the package `luck`"]),
    (
        "class breaks",
        "training: {max_steps: 15}",
        [],
        ["training: AttributeError: 'int' object has no attribute 'luck'"],
    ),
    (
        "duplicate key",
        "run:\n  seed: 1\n  rate: 2\n  seed: 3",
        [],
        ["cpu.yaml:4", "`seed` is written twice", "line 2 and line 4", "keep one"],
    ),
    ("duplicate section", "run: {seed: 1}\nrun: {rate: 2}", [], ["cpu.yaml:2", "`run` is written twice"]),
    ("empty file", "", [], ["cpu.yaml: is empty", "leave out --config"]),
    ("only comments", "# nothing\n", [], ["cpu.yaml: is empty"]),
    ("list file", "- a\n- b", [], ["cpu.yaml:1", "a mapping of sections, not a list"]),
    ("text file", "hello", [], ["cpu.yaml:1", "a mapping of sections, not `hello`"]),
    ("no space after colon", "run:seed", [], ["a colon needs a space after it"]),
    ("broken YAML", "run:\n  seed: [1, 2\nmodel: 3", [], ["cpu.yaml:3", "not valid YAML"]),
    ("unclosed quote", "run:\n  name: 'x\n", [], ["cpu.yaml:", "not valid YAML"]),
    ("tab", "run:\n\tseed: 3", [], ["cpu.yaml:2: a tab; YAML indents with spaces"]),
    ("two documents", "run: {}\n---\nmodel: {}", [], ["cpu.yaml:2", "not valid YAML", "document"]),
    (
        "not UTF-8",
        "run:\n  name: Jos\u00e9".encode("latin-1"),
        [],
        ["cpu.yaml:2", "0xe9 is not UTF-8", "save the file as UTF-8"],
    ),
    ("control character", "run:\n  name: a\x07", [], ["cpu.yaml:2", "is not allowed in YAML"]),
    ("Python tag", "run: {name: !!python/name:os.system x}", [], ["cpu.yaml:1", "plain YAML only"]),
    ("wrong tag", "run: {seed: !!int x}", [], ["cpu.yaml:1", "`x` cannot be read as `!!int`"]),
    ("alias of itself", "model: {config: &a {b: *a}}", [], ["cpu.yaml:1", "alias"]),
    ("a list as key", "? [a]\n: 3", [], ["cpu.yaml:1", "cannot be a key"]),
    ("merge of no mapping", "run: {<<: 3}", [], ["cpu.yaml:1", "`<<` merges mappings"]),
    ("nested too deeply", "[" * 5000, [], ["cpu.yaml:1", "nested too deeply"]),
    (
        "missing file",
        None,
        ["--config", "cpuu.yaml"],
        ["--config cpuu.yaml: there is no such file", "did you mean cpu.yaml?"],
    ),
    (
        "missing folder",
        None,
        ["--config", "no/such.yaml"],
        ["--config no/such.yaml: there is no such file", "did you mean cpu.yaml?"],
    ),
    (
        "unknown name",
        None,
        ["--config", "gpu"],
        ["--config gpu: there is no such config", "has cpu", "did you mean cpu?"],
    ),
    ("a folder", None, ["--config", "."], ["--config .: is a folder"]),
    ("no config", None, ["--config"], ["`--config` has no value"]),
    ("flag without value", None, ["--run.seed"], ["`--run.seed` has no value", "write `--run.seed VALUE`"]),
    ("flag before a flag", None, ["--run.seed", "--dry-run"], ["`--run.seed` has no value"]),
    (
        "given twice",
        None,
        ["--run.seed", "1", "--run.seed", "2"],
        ["`--run.seed` is given twice", "leave one of them out"],
    ),
    ("mapping and key of it", None, ["--run", "{seed: 1}", "--run.seed", "2"], ["`--run.seed` is given twice"]),
    (
        "value and key of it",
        None,
        ["--extra", "null", "--extra.bits", "2"],
        ["`--extra.bits` contradicts `--extra null`"],
    ),
    ("positional", None, ["hello"], ["`hello` stands alone", "--section.key value"]),
    ("positional config", None, ["cpu"], ["`cpu` stands alone", "did you mean `--config cpu`?"]),
    ("positional file", None, ["x/gpu.yaml"], ["did you mean `--config x/gpu.yaml`?"]),
    ("positional assignment", None, ["run.seed=3"], ["did you mean `--run.seed=3`?"]),
    ("single dash", None, ["-run.seed", "3"], ["did you mean `--run.seed`?"]),
    ("underscores in a switch", None, ["--dry_run"], ["did you mean `--dry-run`?"]),
    ("switch with a value", None, ["--dry-run=true"], ["`--dry-run` is a switch", "leave out `=true`"]),
    ("no key", None, ["--run..seed", "3"], ["`--run..seed` is no key"]),
    ("broken value", None, ["--run.seed", "[1"], ["not `[1`; not valid YAML", "(--run.seed)"]),
    ("newline in a flag", None, ["--run.a\nb", "1"], ["`run.a\\nb` is not a key of `run`", "(--run.a\\nb)"]),
    ("duplicate in a value", None, ["--model.config", "{a: 1, a: 2}"], ["`a` is written twice", "(--model.config)"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "argv", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_said_with_place_and_fix(text: str | bytes | None, argv: list[str], said: list[str]) -> None:
    found = problems("run: {seed: 1}" if text is None else text, *argv)
    best = max(found, key=lambda p: sum(s in p for s in said))
    assert all(s in best for s in said), f"{said} are not all in {found}"
    assert len(found) == (2 if argv[:1] == ["-run.seed"] else 1), found  # its value stands alone too
    assert "\n" not in best


def test_all_mistakes_are_said_at_once() -> None:
    text = """
        learning_rate: 3e-4
        model:
          nmae: x
          dtype: half
        training:
          max_steps: 13
        run:
          seed: -1
          seed: 2
    """
    found = problems(text, "--run.rate", "fast", "--extra.bits", "many", "gpu")
    wanted = [
        "training.learning_rate",
        "model.nmae",
        "model.dtype",
        "bad luck",
        "written twice",
        "run.rate",
        "extra.bits",
    ]
    for what in [*wanted, "run.seed", "`gpu` stands alone"]:
        assert any(what in p for p in found), f"{what} is not said in {found}"
    assert len(found) == 9


def test_mistakes_in_model_config_are_said_with_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model_type that transformers knows; another is refused later, by what makes the model."""
    from recipes.common.recipe import run_recipe
    from recipes.pretraining import bert

    text = "model:\n  config:\n    model_type: {}\n    hiden_size: 32\n    num_hidden_layers: 0\ntraining:\n  max_step: 3\n"
    line = ["--config", "mine.yaml", "--model.config.num_heads", "2"]
    for kind, count in (("bert", 4), ("bertt", 1)):
        Path("mine.yaml").write_text(text.format(kind))
        assert run_recipe(bert.main, bert.Config, line) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == count and any("max_step" in problem and "mine.yaml:7" in problem for problem in said)
        for wanted in (
            "hiden_size is not a field of BertConfig; did you mean `hidden_size`? (mine.yaml:4)",
            "model.config.num_hidden_layers is 0: it must be above 0 (mine.yaml:5)",
            "(--model.config.num_heads)",
        ):
            assert any(wanted in problem for problem in said) == (kind == "bert"), said
    line = ["--model.config", "{model_type: bert, hiden_size: 32}", "--print-config"]
    assert run_recipe(bert.main, bert.Config, line) == 2
    assert "did you mean `hidden_size`? (--model.config.hiden_size)" in capsys.readouterr().err


def test_problems_of_library_defaults_are_added() -> None:
    def ask(section: str, cls: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
        raise UserError([f"{section}: bf16 was asked for, and this machine has none"])

    found = problems("run: {seed: x}", "--training.bf16", "true", library_defaults=ask)
    assert any("this machine has none" in p for p in found)
    assert any("run.seed" in p for p in found)


def test_annotations_that_only_a_type_checker_can_read() -> None:
    """A library's key of such a type is left to the library; the others are checked all the same; ours are a bug."""

    @dataclass
    class Theirs:
        size: int = 1
        policy: no_such_name.Policy | None = None  # noqa: F821

    Theirs.__module__ = "json"
    (found,) = problems("training: {size: x, policy: 3}", config_class=_with(Theirs))
    assert "training.size" in found
    assert load("training: {policy: 3}", config_class=_with(Theirs)).build().training.policy == 3
    Theirs.__module__ = __name__
    schema.keys_of.cache_clear()
    with pytest.raises(NameError):
        load("training: {policy: 3}", config_class=_with(Theirs))


def _with(cls: type) -> type:
    @dataclass
    class Own:
        training: Any

    Own.__annotations__ = {"training": cls}
    return Own


def test_keys_that_must_be_given_and_our_own_refusals() -> None:
    @dataclass
    class Needs:
        size: PositiveInt
        other: int = 1

        def __post_init__(self) -> None:
            if self.size == 1:
                raise UserError(["`size` and `other` contradict each other", "and more"])
            if self.size == 2:
                raise ValueError("2 is refused")
            if self.size == 3:
                raise KeyError("a bug of ours")

    @dataclass
    class Own:
        run: Needs

    Own.__annotations__ = {"run": Needs}
    Needs.__annotations__ = {"size": PositiveInt, "other": int}
    assert problems(config_class=Own) == ["`run.size` must be given: a whole number above 0 (--run.size VALUE)"]
    two = ["run: `size` and `other` contradict each other", "run: and more"]
    assert problems(None, "--run.size", "1", config_class=Own) == two
    assert problems(None, "--run.size", "2", config_class=Own) == ["run: 2 is refused"]
    with pytest.raises(KeyError):
        load(None, "--run.size", "3", config_class=Own).build()


def test_a_library_that_is_not_installed() -> None:
    @dataclass
    class Own:
        quantization: Section["no_such_library.Config"] | None = None  # noqa: F821, UP037

    assert load(config_class=Own).build().quantization is None
    (found,) = problems("quantization: {bits: 4}", config_class=Own)
    assert "quantization: needs no_such_library.Config" in found
    assert "install" in found
