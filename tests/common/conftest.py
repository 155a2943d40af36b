"""What several of these files start from: an empty folder, and a builtin data set that stands in for a real one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.common.builtin import BUILTINS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> str:
    """A builtin set of conversations with a column of its own."""

    def load(split: str, seed: int) -> list[dict[str, Any]]:
        first = {"train": 0, "validation": 100, "test": 200}[split] + 1000 * seed
        return [
            {
                "messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": str(-i)}],
                "task": "negate",
            }
            for i in range(first, first + (20 if split == "train" else 5))
        ]

    monkeypatch.setitem(BUILTINS, "stub", SimpleNamespace(kind="conversation", load=load))
    return "stub"
