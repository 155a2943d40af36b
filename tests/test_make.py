"""make and the set-up: one command does it all, the second run installs nothing, and every word is checked."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.common import launch
from recipes.common.config import load_config
from recipes.common.errors import UserError
from tests.conftest import ROOT, Checkout

Execute = Callable[..., "subprocess.CompletedProcess[str]"]


def make(execute: Execute, checkout: Checkout, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return execute(["make", *words], cwd=checkout.root, **environment)


@pytest.fixture
def bare(checkout: Checkout) -> Checkout:
    """A fresh clone: no .venv, and a python3 whose venv and pip only write down what they were asked for."""
    for file in (checkout.root / ".venv/bin/python", *(checkout.root / ".venv").glob(".*")):
        file.unlink()
    (checkout.root / ".venv/bin").rmdir()
    (checkout.root / ".venv").rmdir()
    fake = checkout.root / "python3"
    fake.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f'    "-m venv "*) echo "$*" >>"{checkout.calls_file}"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
        '    "-m pip --version") ;;\n'
        f'    "-m pip install "*) echo "$*" >>"{checkout.calls_file}"; eval "${{FAKE_PIP:-}}" ;;\n'
        '    *purelib*) mkdir -p .venv/lib/site-packages; echo "$PWD/.venv/lib/site-packages" ;;\n'
        f'    *) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    return checkout


PIP = "-m pip install --disable-pip-version-check --no-input"
BASE = [
    "-m venv --clear .venv",
    f"{PIP} -c requirements/constraints.txt torch==2.13.0",
    f"{PIP} -r requirements.txt",
]
DEV = f"{PIP} -r requirements/dev.txt"


def set_up(execute: Execute, bare: Checkout, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return execute(["make", *words], cwd=bare.root, PATH=f"{bare.root}:{os.environ['PATH']}", **environment)


def test_setup_installs_torch_first_and_only_once(bare: Checkout, execute: Execute) -> None:
    first = set_up(execute, bare, "setup")
    assert first.returncode == 0, first.stderr
    assert bare.calls() == BASE
    # `import recipes` works from any folder, and still does when the checkout is moved.
    link = bare.root / ".venv/lib/site-packages/recipes.pth"
    assert (link.parent / link.read_text().strip()).resolve() == bare.root.resolve()

    begun = time.monotonic()
    second = set_up(execute, bare, "setup")
    assert time.monotonic() - begun < 1
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert bare.calls() == BASE


def test_tests_need_the_second_layer(bare: Checkout, execute: Execute) -> None:
    assert set_up(execute, bare, "setup-dev").returncode == 0
    assert bare.calls() == [*BASE, DEV]
    assert set_up(execute, bare, "setup-dev").stdout == ""
    assert set_up(execute, bare, "setup").stdout == ""
    assert bare.calls() == [*BASE, DEV]


@pytest.mark.parametrize("changed", ["requirements.txt", "requirements/constraints.txt"])
def test_changed_requirements_are_installed(bare: Checkout, execute: Execute, changed: str) -> None:
    set_up(execute, bare, "setup")
    (bare.root / changed).touch()  # a new time alone, as git gives it on a checkout, is no change
    set_up(execute, bare, "setup")
    assert bare.calls() == BASE
    with (bare.root / changed).open("a") as file:
        file.write("# another line\n")
    assert set_up(execute, bare, "setup").returncode == 0
    assert bare.calls() == [*BASE, *BASE[1:]]  # .venv itself is kept


def test_an_install_that_failed_is_done_again(bare: Checkout, execute: Execute) -> None:
    failed = set_up(execute, bare, "setup", FAKE_PIP="false")
    assert failed.returncode != 0
    assert "error: pip could not install the base requirements" in failed.stderr
    assert not (bare.root / ".venv/.base").exists()
    assert set_up(execute, bare, "setup").returncode == 0
    assert bare.calls() == [*BASE[:2], *BASE[1:]]


def test_an_install_that_was_interrupted_is_done_again(bare: Checkout, clean_environment: dict[str, str]) -> None:
    """Ctrl-C or a kill in the middle of a second install: the first one's stamp must not stand for it."""
    environment = {**clean_environment, "PATH": f"{bare.root}:{os.environ['PATH']}"}
    subprocess.run(["make", "setup"], cwd=bare.root, env=environment, check=True, capture_output=True)
    with (bare.root / "requirements.txt").open("a") as file:
        file.write("# another line\n")
    environment["FAKE_PIP"] = "touch started; sleep 60"
    process = subprocess.Popen(["make", "setup"], cwd=bare.root, env=environment, start_new_session=True)
    while not (bare.root / "started").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (bare.root / ".venv/.base").exists()


def test_a_virtual_environment_without_pip_is_built_again(bare: Checkout, execute: Execute) -> None:
    """As an interrupted `python -m venv` leaves it."""
    (bare.root / ".venv/bin").mkdir(parents=True)
    (bare.root / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (bare.root / ".venv/bin/python").chmod(0o755)
    assert set_up(execute, bare, "setup").returncode == 0
    assert bare.calls() == BASE


def test_python_that_is_too_old(bare: Checkout, execute: Execute) -> None:
    old = bare.root / "python3.9"
    old.write_text('#!/bin/sh\ncase "$*" in *exit*) exit 1 ;; *) echo 3.9.18 ;; esac\n')
    old.chmod(0o755)
    done = set_up(execute, bare, "setup", PYTHON=str(old))
    assert done.returncode != 0
    assert f"error: {old} is Python 3.9.18, and 3.11 or newer is needed" in done.stderr
    assert not (bare.root / ".venv").exists()
    assert len(done.stderr.splitlines()) == 2  # that one, and make's own


def test_python_that_is_not_there(bare: Checkout, execute: Execute) -> None:
    done = set_up(execute, bare, "setup", PYTHON="no-such-python")
    assert done.returncode != 0
    assert "error: no-such-python was not found: install Python 3.11 or newer" in done.stderr


def test_another_python_than_the_one_in_use(checkout: Checkout, execute: Execute) -> None:
    other = checkout.root / "other"
    other.write_text("#!/bin/sh\necho 3.99.0\n")
    other.chmod(0o755)
    done = make(execute, checkout, "setup", f"PYTHON={other}")
    assert done.returncode != 0
    assert "is 3.99.0: delete .venv to build it anew" in done.stderr
    assert make(execute, checkout, "setup", f"PYTHON={sys.executable}").returncode == 0


def test_no_compiler_is_said_in_one_line(bare: Checkout, execute: Execute) -> None:
    tools = bare.root / "tools"
    tools.mkdir()
    for name in ("bash", "make", "cat", "cksum", "cp", "dirname", "env", "grep", "mkdir", "mv", "rm", "sh"):
        found = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        (tools / name).symlink_to(found)
    done = execute(["make", "setup"], cwd=bare.root, PATH=f"{bare.root}:{tools}", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler was found: torch.compile stays off") == 1
    assert (bare.root / ".venv/.base").exists()


def test_setup_script_says_how_it_is_used(checkout: Checkout, execute: Execute) -> None:
    done = execute(["scripts/setup.sh", "everything"], cwd=checkout.root)
    assert (done.returncode, done.stderr) == (2, "usage: scripts/setup.sh [base|dev|distributed]\n")


def test_the_real_setup_is_done_and_the_second_one_is_quick(execute: Execute) -> None:
    """`make test` came through it, so here it has nothing to do."""
    if not (ROOT / ".venv/.dev").exists():
        pytest.skip("the tests were not started with make, and .venv has no stamp")
    begun = time.monotonic()
    done = execute(["make", "setup-dev"])
    assert time.monotonic() - begun < 2
    assert (done.returncode, done.stdout) == (0, "")


# Recipes through make


def test_recipe_gets_its_words(checkout: Checkout, execute: Execute) -> None:
    done = make(execute, checkout, "tiny", "CONFIG=gpu", "ARGS=--quick --a.b 'two words'", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    config = checkout.root / "configs/demo/tiny/gpu.yaml"
    assert done.stdout == f"arguments ['--config', '{config}', '--quick', '--a.b', 'two words']\n"
    words = "tiny --config gpu --launch single --nproc 1 -- --quick --a.b two words"
    assert checkout.calls() == [f"-m recipes.common.launch {words}"]


def test_settings_may_come_from_the_environment(checkout: Checkout, execute: Execute) -> None:
    done = make(execute, checkout, "tiny", CONFIG="gpu", LAUNCH="zero3", NPROC="x", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "error: NPROC=x is not a whole number" in done.stderr
    assert "error: LAUNCH=zero3: there is no GPU here" in done.stderr


@pytest.mark.slow
def test_two_processes_through_make(checkout: Checkout, execute: Execute) -> None:
    done = make(execute, checkout, "tiny", "LAUNCH=ddp", "NPROC=2", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: total 3" in done.stdout
    assert "process 1 of 2: total 3" in done.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tinny", "did you mean tiny?"),
        ("quikstart", "did you mean quickstart?"),
        ("xyzzy", "among the 1 recipes (`make list` shows them all)"),
    ],
)
def test_unknown_word(checkout: Checkout, execute: Execute, word: str, said: str) -> None:
    done = make(execute, checkout, word, "CONFIG=gpu")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: there is no recipe called {word}")
    assert said in done.stderr


def test_list_shows_a_line_for_each_recipe(checkout: Checkout, execute: Execute) -> None:
    (checkout.root / "recipes/demo/other.py").write_text(
        '"""Other: more.\n\n    x = 1\n"""\nimport nothing_of_the_kind\n'
    )
    done = make(execute, checkout, "list")
    assert done.returncode == 0, done.stderr
    assert [line.split(maxsplit=2) for line in done.stdout.splitlines()] == [
        ["demo", "other", "Other: more."],
        ["demo", "tiny", "Tiny: the processes add up their numbers."],
    ]


def test_list_is_quick_and_complete_here(execute: Execute) -> None:
    begun = time.monotonic()
    done = execute(["make", "list"])
    assert time.monotonic() - begun < 2
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(launch.recipes())


def test_help_and_list_need_no_setup(bare: Checkout, execute: Execute) -> None:
    for word in ("help", "list"):
        assert set_up(execute, bare, word).returncode == 0
    assert not (bare.root / ".venv").exists()


def targets() -> list[str]:
    """The words of TARGETS in the Makefile."""
    found = re.search(r"^TARGETS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found.group(1).split()


def test_help_is_the_default_and_names_every_target(execute: Execute) -> None:
    told = execute(["make"]).stdout
    assert told == execute(["make", "help"]).stdout
    for word in targets():
        if word not in ("help", "setup-dev", "setup-distributed"):
            assert re.search(rf"\b{word}\b", told), word
    for launcher in launch.LAUNCHERS:
        assert re.search(rf"\b{launcher}\b", told), launcher


def test_no_recipe_has_a_target_s_name() -> None:
    assert not set(targets()) & set(launch.recipes())


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["quickstart"], ["scripts/quickstart.py"]),
        (["chat"], ["scripts/chat.py"]),
        (["chat", "MODEL=a b"], ["scripts/chat.py 'a b'"]),
        (["bench"], ["scripts/bench.py"]),
        (["results"], ["scripts/results.py"]),
        (["notebooks"], ["-m jupyter execute --inplace notebooks/*.ipynb"]),
        (["test"], ["-m pytest -n logical --maxprocesses 8 --dist loadfile"]),
        (["test-fast"], ['-m pytest -n logical --maxprocesses 8 --dist loadfile -m "not slow"']),
        (["lint"], ["-m ruff format --check .", "-m ruff check .", "-m mypy recipes/common"]),
    ],
)
def test_what_targets_run(checkout: Checkout, execute: Execute, words: list[str], lines: list[str]) -> None:
    """Everything runs .venv/bin/python, after the set-up."""
    done = make(execute, checkout, "-n", *words)
    told = [line.rstrip() for line in done.stdout.splitlines()]
    setup = [line for line in told if re.fullmatch(r"PYTHON='' scripts/setup.sh (base|dev|distributed)", line)]
    assert setup == told[: len(setup)] != []
    assert told[len(setup) :] == [f".venv/bin/python {line}" for line in lines]


def test_clean_keeps_runs_and_the_environment(checkout: Checkout, execute: Execute) -> None:
    for folder in ("runs/llama/__pycache__", ".venv/lib/__pycache__", "recipes/demo/__pycache__", ".mypy_cache"):
        (checkout.root / folder).mkdir(parents=True)
    assert make(execute, checkout, "clean").returncode == 0
    there = {
        folder for folder in ("runs/llama/__pycache__", ".venv/lib/__pycache__") if (checkout.root / folder).exists()
    }
    assert len(there) == 2
    assert not (checkout.root / "recipes/demo/__pycache__").exists()
    assert not (checkout.root / ".mypy_cache").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_ci_runs_the_tests_and_fails_with_them(checkout: Checkout, execute: Execute, code: int) -> None:
    python = checkout.root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\necho "$*" >>"{checkout.calls_file}"\nexit {code}\n')
    done = execute(["bash", checkout.root / ".ci/run"], cwd=checkout.root.parent)
    assert (done.returncode == 0) == (code == 0)
    assert done.stdout.startswith("ci: make test on")
    assert checkout.calls() == ["-m pytest -n logical --maxprocesses 8 --dist loadfile"]


# What the documentation tells a person to type

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "RESULTS.md")),
    *sorted(ROOT.glob("recipes/*/*.py")),
    *sorted(ROOT.glob("configs/*/*/*.yaml")),
    *sorted(ROOT.glob("scripts/*")),
]


def commands(document: Path) -> list[str]:
    """Its command lines: in backticks, in a code block, or on an indented line of a docstring or a comment."""
    if document.is_dir():
        return []
    text = document.read_text()
    starts = r"(?:make(?![\w(])|python recipes/|sbatch |scripts/\w+\.sh )"
    shown = re.findall(rf"`({starts}[^`\n]*)`", text) if document.suffix != ".sh" else []
    start = r"^" if document.suffix == ".md" else r"^(?:# {2,}|    )(?:echo .* \| )?"
    lines = re.findall(rf"{start}({starts}[^`\n]*?)(?: *#.*| {{2,}}.*)?$", text, re.MULTILINE)
    return [line for line in [*shown, *lines] if not re.search("[<{|]|RECIPE|=$|: ", line)]


def check_command(line: str) -> None:
    """It names things that are there: a target or recipe, its config, a launcher, keys of its config."""
    words = shlex.split(line)
    if words[0] != "make":
        assert (ROOT / (words[0] if "/" in words[0] else words[1])).is_file(), line
        return
    settings = dict(word.split("=", 1) for word in words[2:])  # nothing but settings after the target
    assert settings.keys() <= {"CONFIG", "LAUNCH", "NPROC", "ARGS", "MODEL", "PYTHON"}, line
    if len(words) == 1 or words[1] in targets():
        return
    script = launch.find_recipe(words[1])
    if not settings.get("CONFIG", "cpu").endswith(".yaml"):  # else a file of one's own
        config = launch.find_config(script, settings.get("CONFIG", "cpu"))
        module = importlib.import_module(f"recipes.{script.parent.name}.{script.stem}")
        arguments = ["--config", str(config), *shlex.split(settings.get("ARGS", ""))]
        load_config(module.Config, arguments, config_folder=None)
    assert settings.get("LAUNCH", "single") in launch.LAUNCHERS, line
    nproc = launch.process_count(settings.get("NPROC", "1"))
    launch.check_room(nproc, settings.get("LAUNCH", "single"), gpus=8, cores=64)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_commands_name_what_is_there(document: Path) -> None:
    for line in commands(document):
        check_command(line)


def test_commands_are_found_in_each_kind_of_document() -> None:
    for name, line in {
        "README.md": "make lora CONFIG=cluster LAUNCH=zero3 NPROC=8",
        "README.zh-CN.md": "make quickstart",
        "recipes/pretraining/llama.py": "make llama CONFIG=gpu",
        "configs/pretraining/tokenizer/multi30k.yaml": "make tokenizer CONFIG=multi30k",
        "scripts/chat.py": "make chat MODEL=runs/lora/default/adapter",
    }.items():
        assert line in commands(ROOT / name)


@pytest.mark.parametrize(
    "line",
    [
        "make lorra",
        "make lora CONFIG=gpuu",
        "make lora LAUNCH=zero4 NPROC=8",
        "make lora NPROC=2",
        "make lora EXTRA=1",
        'make lora ARGS="--training.max_step 10"',
        "python recipes/finetuning/lorra.py --help",
    ],
)
def test_a_command_that_names_what_is_not_there_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check_command(line)


# The requirements


def pins() -> dict[str, str]:
    """requirements/constraints.txt as {normalised name: version}."""
    lines = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in rows}


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    text = (ROOT / "requirements/constraints.txt").read_text()
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line  # no paths, hosts or local builds
    assert pins()["torch"] == "2.13.0"
    assert "torchvision" not in pins()


@pytest.mark.parametrize("file", ["requirements.txt", "requirements/dev.txt", "requirements/distributed.txt"])
def test_every_requirement_is_pinned(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    assert any(re.fullmatch(r"-c (requirements/)?constraints.txt", line) for line in lines)
    wanted = [line for line in lines if line and not line.startswith(("#", "-c"))]
    assert wanted
    for line in wanted:
        name, _, version = line.partition("==")
        pinned = pins()[re.sub(r"[-_.]+", "-", name).lower()]
        assert version in ("", pinned), line


def test_what_is_installed_is_what_is_pinned() -> None:
    """The tests pass with these versions, and with no others than these."""
    from importlib.metadata import distributions

    if not (ROOT / ".venv/.dev").exists() or Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not in the .venv that make builds")
    installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.split("+")[0] for d in distributions()}
    wrong = {name: (installed[name], pin) for name, pin in pins().items() if installed.get(name, pin) != pin}
    assert not wrong
