"""Rewards that a program can check: what is right, and which names there are."""

from __future__ import annotations

import pytest

from recipes.common.errors import UserError
from recipes.common.verifiable_rewards import final_number, find, tasks


def test_a_task_is_right_or_not() -> None:
    rows = [{"task": "sort", "answer": "1 3 5"}] * 4
    assert tasks(["1 3 5", "1, 3, 5.", "1 5 3", "1 3 5<|user|>"], rows) == [1.0, 1.0, 0.0, 0.0]


def test_the_last_number_counts_however_it_is_written() -> None:
    rows = [{"answer": "5 * 200 = 1000, so #### 1,000"}] * 5
    told = final_number(["So 1000.", "1,000.0 pounds", "1000 and then 3", "none", "-1000"], rows)
    assert told == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_function_of_ones_own_is_found_by_its_path() -> None:
    assert find("operator:concat", [])(["a"], [{}]) == ["a", {}]


def test_what_goes_wrong_in_a_function_of_ones_own_is_said_in_a_line_with_its_place() -> None:
    told = (
        r"the reward tests.alignment.reward_functions:careless failed with KeyError: 'goal' "
        r"\(.*reward_functions.py:15\); it was given 2 answers, the first of them 'a'"
    )
    with pytest.raises(UserError, match=told):
        find("tests.alignment.reward_functions:careless", ["prompt"])(["a", "b"], [{"prompt": []}] * 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("task", "no reward is called task: tasks, final_number"),
        ("tasks", "reads the column task, which the data lacks. Columns: prompt, answer"),
        ("nowhere:reward", "cannot be imported"),
        ("math:reward", "cannot be imported"),
        ("math:pi", "cannot be called with answers and their rows"),
        ("json:dumps", "cannot be called with answers and their rows: too many positional arguments"),
    ],
)
def test_what_is_not_there_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        find(name, ["prompt", "answer"])
