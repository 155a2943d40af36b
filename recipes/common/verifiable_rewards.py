"""Rewards that a program can check, chosen by name in a config: answers and their rows in, one number an answer out.

tasks           1 for the right answer to a builtin task, nothing beside it; else 0
final_number    1 where the last number of the answer is the last one of the row's `answer` (GSM8K); else 0
module:function one of your own, on Python's path: function(answers: list[str], rows: list[dict]) -> list[float]
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from recipes.common.errors import UserError

Row = dict[str, Any]
Reward = Callable[[Sequence[str], Sequence[Row]], Sequence[float]]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def tasks(answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The builtin tasks' own checker."""
    from recipes.common.builtin.tasks import check

    return [float(check(row, text)) for row, text in zip(rows, answers, strict=True)]


def final_number(answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Whether a worked answer ends in the number that the row's `answer` ends in: 1,000 and 1000.0 are the same."""

    def last(text: str) -> float | None:
        found = NUMBER.findall(text)
        return float(found[-1].replace(",", "")) if found else None

    return [
        float((n := last(text)) is not None and n == last(row["answer"]))
        for row, text in zip(rows, answers, strict=True)
    ]


REWARDS: dict[str, tuple[Reward, tuple[str, ...]]] = {  # by name: the function, and the columns that it reads
    "tasks": (tasks, ("task", "answer")),
    "final_number": (final_number, ("answer",)),
}


def find(name: str, columns: Sequence[str]) -> Reward:
    """The reward called `name`, for rows with these columns. Raises UserError if there is none, or a column is missing; one of
    the user's own, whatever it raises, does too.
    """
    if name in REWARDS:
        function, needs = REWARDS[name]
        if missing := [column for column in needs if column not in columns]:
            raise UserError(
                f"the reward {name} reads the column {missing[0]}, which the data lacks. Columns: {', '.join(columns)}"
            )
        return function
    module, _, function_name = name.partition(":")
    if not (module and function_name):
        raise UserError(f"no reward is called {name}: {', '.join(REWARDS)}, or module:function")
    try:
        function = getattr(importlib.import_module(module), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the reward {name} cannot be imported: {error}") from error
    try:
        with suppress(ValueError):  # written in C, it may not say what it takes
            inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"the reward {name} cannot be called with answers and their rows: {error}") from error

    @functools.wraps(function)
    def reward(answers: Sequence[str], rows: Sequence[Row]) -> Sequence[float]:
        try:
            return function(answers, rows)
        except Exception as error:  # whatever its author did not think of
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the reward {name} failed with {type(error).__name__}: {error} ({at.filename}:{at.lineno}); "
                f"it was given {len(answers)} answers, the first of them {answers[0]!r}"
            ) from error

    return reward


def checked(told: Sequence[float], count: int, key: str) -> list[float]:
    """What a reward, given as `key`, says of `count` answers. Raises UserError unless it is `count` finite numbers."""
    try:
        scores = [float(score) for score in told]
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: it gave something else than a list of numbers: {error}") from error
    if len(scores) != count:
        raise UserError(f"{key}: it gave {len(scores)} numbers for {count} answers")
    if bad := [score for score in scores if not math.isfinite(score)]:
        raise UserError(f"{key}: it gave an answer the score {bad[0]}")
    return scores
