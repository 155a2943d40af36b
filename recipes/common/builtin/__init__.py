"""Data sets that are always there: real where they can be, offline, deterministic for a seed, with disjoint splits.

Importing this is light; a set is made when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.common.builtin import pydocs, tasks


@dataclass(frozen=True)
class Builtin:
    """A builtin set: `load(split, seed)` gives the canonical rows of its kind for "train", "validation" or "test"."""

    kind: str  # text | conversation | preference
    load: Callable[[str, int], list[dict[str, Any]]]
    description: str


BUILTINS: dict[str, Builtin] = {
    "pydocs": Builtin("text", pydocs.load, "the running Python's manual and standard library: 10 MB of text and code"),
    "tasks": Builtin("conversation", tasks.load, "questions with one right answer, English and Chinese, 12 families"),
}
