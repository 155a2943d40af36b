"""Data sets that are always there: real where they can be, offline, deterministic for a seed, with disjoint splits.

Importing this is light; a set is made when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from recipes.common.builtin import packages, pydocs, pydocs_qa, python_tokens, tasks


@dataclass(frozen=True)
class Builtin:
    """A builtin set: `load(split, seed)` gives the canonical rows of its kind for "train", "validation" or "test".

    The seed sets order and wording, never the split. Another split's name is a UserError.
    """

    kind: str  # text | conversation | preference | prompt | classification | pair | labelling
    load: Callable[[str, int], list[dict[str, Any]]]
    description: str
    load_few: Callable[[str, int], list[dict[str, Any]]] | None = None  # fewer rows of each class, where all take long


BUILTINS: dict[str, Builtin] = {
    "pydocs": Builtin("text", pydocs.load, "the running Python's manual and standard library, 10 MB of text and code"),
    "pydocs_qa": Builtin("conversation", pydocs_qa.load, "questions answered from the standard library's docstrings"),
    "tasks": Builtin(
        "conversation", tasks.load, "questions with one right answer, English and Chinese, eleven families"
    ),
    "tasks_prompts": Builtin(
        "prompt", tasks.load_prompts, "questions of tasks that no other set asks, for a policy to answer"
    ),
    "tasks_preferences": Builtin(
        "preference", tasks.load_preferences, "4 to 6 ranked answers to the questions of tasks"
    ),
    "tasks_translation": Builtin("pair", tasks.load_translation, "the questions of tasks, English to Chinese"),
    "pydocs_package": Builtin(
        "classification",
        packages.load_package,
        "a docstring and which of 8 packages it is from",
        partial(packages.load_package, most=packages.FEW_OF_A_PACKAGE),
    ),
    "pydocs_match": Builtin(
        "classification",
        packages.load_match,
        "whether a docstring describes a function's code",
        partial(packages.load_match, most=packages.FEW_OF_A_PACKAGE),
    ),
    "pydocs_summary": Builtin(
        "pair",
        packages.load_summary,
        "a function's code and the first sentence of its docstring",
        partial(packages.load_summary, most=packages.FEW_OF_A_PACKAGE),
    ),
    "python_tokens": Builtin(
        "labelling",
        python_tokens.load,
        "words of the standard library's code, and whether each is a keyword, a name, ...",
    ),
}
