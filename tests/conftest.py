"""What every test stands on: one thread a process, no network, no telemetry, and the helpers that several files use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Before torch is imported: the tests run in as many processes as there are cores; more threads only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nothing here may need a network; without these a hub id that does not exist costs 20 seconds of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# On a machine with a GPU too: the recipes under test are then as fast, as precise and as lucky everywhere.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# What whoever starts the tests may have around them must not reach the recipes under test.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RECIPES_WORLD_SIZE", "ACCELERATE_USE_CPU"):
    os.environ.pop(_name, None)

from recipes.common.launch import environment_defaults  # noqa: E402

environment_defaults()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that looks at a finished run of its recipe takes seconds, whichever test of the file makes the run."""
    for item in items:
        if {"trained", "with_everything"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; a test that needs it is skipped where it is not there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("module")


@dataclass
class Finished:
    """How a run ended: exit code, run folder, final figures (empty unless it finished), what it printed."""

    code: int
    folder: Path
    figures: dict[str, Any]
    out: str
    err: str

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _forget_accelerate() -> None:
    """accelerate keeps one state a process, which would carry one run's precision into the next."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def run_in_process(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Finished]]:
    """Run a recipe in this process: `run_in_process(module, argv, folder)` -> Finished; the run goes below `folder`.

    Environment, signal handlers, threads and accelerate's state are put back, so that one run does not reach another.
    """
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(recipe: ModuleType, argv: Sequence[str], folder: Path) -> Finished:
        from recipes.common.recipe import run_recipe

        _forget_accelerate()
        capfd.readouterr()
        code = run_recipe(recipe.main, recipe.Config, argv=[*argv, "--run.root", str(folder)])
        out, err = capfd.readouterr()
        words = list(argv)
        name = words[words.index("--run.name") + 1] if "--run.name" in words else "default"
        path = folder / Path(str(recipe.__file__)).stem / name
        figures = path / "metrics.json"
        return Finished(code, path, json.loads(figures.read_text()) if figures.exists() else {}, out, err)

    yield run
    os.environ.clear()
    os.environ.update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _forget_accelerate()
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """An environment for a subprocess: this one, less what pytest, its workers and the `make` above them put there."""
    made = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "CONFIG", "LAUNCH", "NPROC", "ARGS", "MODEL", "PYTHON"}
    return {name: value for name, value in os.environ.items() if name not in made and not name.startswith("PYTEST_")}


@pytest.fixture
def execute(clean_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command to its end: `execute([...], cwd=, timeout=, **environment)`; stdout and stderr as text."""

    def run(
        line: Sequence[str | Path], *, cwd: Path = ROOT, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in line]
        return subprocess.run(
            words,
            cwd=cwd,
            env={**clean_environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@dataclass
class Checkout:
    """A small copy of this repository: one recipe of the tests' own, a .venv whose python writes down its arguments."""

    root: Path
    calls_file: Path

    def calls(self) -> list[str]:
        """The command lines that .venv/bin/python was started with."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def stamp(self, layer: str = "base") -> None:
        """Say that this layer is installed, as scripts/setup.sh does."""
        requirements = "requirements.txt" if layer == "base" else f"requirements/{layer}.txt"
        line = f"cat {requirements} requirements/constraints.txt | cksum >.venv/.{layer}"
        subprocess.run(line, shell=True, cwd=self.root, check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A repository in `tmp_path` that is set up; its recipe `demo/tiny` prints its arguments and forms a group."""
    root = tmp_path / "checkout"
    for folder in ("recipes/common", "recipes/demo", "configs/demo/tiny", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    for file in ("__init__.py", "common/__init__.py", "common/errors.py", "common/launch.py", "common/machine.py"):
        shutil.copy(ROOT / "recipes" / file, root / "recipes" / file)
    for name in (
        "Makefile",
        "requirements.txt",
        "requirements",
        "scripts",
        "configs/accelerate",
        "configs/deepspeed",
        ".ci",
    ):
        source = ROOT / name
        shutil.copytree(source, root / name) if source.is_dir() else shutil.copy(source, root / name)
    (root / "recipes/demo/__init__.py").touch()
    (root / "recipes/demo/tiny.py").write_text(TINY_RECIPE)
    for config in ("cpu", "gpu"):
        (root / f"configs/demo/tiny/{config}.yaml").write_text("run: {}\n")
    made = Checkout(root, tmp_path / "calls")
    python = root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\necho "$*" >>"{made.calls_file}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for layer in ("base", "dev", "distributed"):
        made.stamp(layer)
    return made


TINY_RECIPE = '''"""Tiny: the processes add up their numbers.

More words.
"""

import os
import sys

from recipes.common.errors import UserError
from recipes.common.launch import check_world_size, environment_defaults, launcher_arguments

environment_defaults()
try:
    check_world_size()
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)



def say(line: str) -> None:
    """In one piece, since the workers share one pipe."""
    os.write(1, f"{line}\\n".encode())


say(f"arguments {launcher_arguments(sys.argv[1:])}")
if "--quick" not in sys.argv:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    check_world_size(accelerator.num_processes)
    total = int(accelerator.reduce(torch.tensor([1 + accelerator.process_index])).item())
    place = f"process {accelerator.process_index} of {accelerator.num_processes}"
    say(f"{place}: total {total}, threads {os.environ.get('OMP_NUM_THREADS')}")
    accelerator.end_training()
'''
