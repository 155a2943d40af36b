"""What the machine is found to be able to do."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from recipes.common import machine
from recipes.common.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A CPU machine with a compiler and Python's headers; a test takes away what it is about."""
    tools, include = tmp_path / "tools", tmp_path / "include"
    tools.mkdir()
    include.mkdir()
    (tools / "g++").touch(mode=0o755)
    (include / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    return monkeypatch


def can_compile() -> machine.Choice:
    return machine.can_compile.__wrapped__()  # not what an earlier call found


def test_a_compiler_and_the_headers_are_enough(fresh: pytest.MonkeyPatch) -> None:
    assert can_compile() == machine.Choice(True, "C++ compiler g++")


def test_no_headers(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    found = can_compile()
    assert not found.value
    assert found.reason == (
        f"{tmp_path}/include/Python.h is not there (install python{sysconfig.get_python_version()}-dev)"
    )


def test_nothing_that_it_needs(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    fresh.setenv("CXX", "no-such-compiler")
    found = can_compile()
    assert not found.value
    assert "no C++ compiler was found (install g++); " in found.reason and "Python.h is not there" in found.reason
    assert "\n" not in found.reason


def test_threads_that_no_machine_has() -> None:
    assert machine.choose_threads(64) == machine.Choice(64, "run.threads")  # more than the cores is slow, and allowed
    with pytest.raises(UserError, match=r"run\.threads: 4000000000, and this machine has \d+ cores"):
        machine.choose_threads(4_000_000_000)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux forgets a peak")
def test_the_peak_of_memory_is_this_process_s_own_and_can_be_forgotten() -> None:
    before = machine.peak_memory_gib()
    block = bytearray(300_000_000)
    held = machine.peak_memory_gib()
    del block
    machine.forget_peak_memory()
    assert held > before and machine.peak_memory_gib() < held - 0.2
    told = subprocess.run(
        [sys.executable, "-c", "from recipes.common.machine import peak_memory_gib; print(peak_memory_gib())"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    assert float(told) < 0.1  # this process, which has torch, holds more
