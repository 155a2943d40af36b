"""What `make lint` says of this checkout: the format, ruff's rules, and the types of what the recipes share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("words", ["ruff format --check .", "ruff check .", "mypy recipes/common"])
def test_nothing_is_left_to_say(words: str, execute: Callable[..., Any]) -> None:
    pytest.importorskip(words.split()[0])
    done = execute([sys.executable, "-m", *words.split()], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
