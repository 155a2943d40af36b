"""How the door speaks: one line on rank 0, counts and lists in words, and everything that is wrong at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from recipes.common.errors import UserError

PROBLEMS_SHOWN = 10  # different things that are wrong, before the rest is only counted


def each(items: Sequence[Any], do: Callable[[Any], Any]) -> list[Any]:
    """`do` for each item; the UserErrors of all of them raised as one."""
    results, problems = [], []
    for item in items:
        try:
            results.append(do(item))
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(problems)
    return results


def say(text: str) -> None:
    """One line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stdout, flush=True)


def counted(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def some_of(words: Sequence[str], count: int | None = None) -> str:
    """The first three of them, and dots where there are more (`count` of them in all)."""
    count = len(words) if count is None else count
    return ", ".join(words[:3]) + (", ..." if count > min(3, len(words)) else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
