"""The labelled sets made of installed packages: disjoint by file, nothing of the answer in the question."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from recipes.common.builtin import packages
from recipes.common.builtin.split import SPLITS


@pytest.mark.slow
def test_functions_of_packages_are_split_by_file_and_no_docstring_stands_in_two_splits() -> None:
    splits = {split: packages.shuffled(split, 0) for split in SPLITS}
    for one, other in combinations(splits.values(), 2):
        assert not {(thing.package, thing.path) for thing in one} & {(thing.package, thing.path) for thing in other}
        assert not {thing.summary for thing in one} & {thing.summary for thing in other}
        assert not {thing.code for thing in one} & {thing.code for thing in other}
    assert len(splits["train"]) > 3_000 and min(map(len, splits.values())) > 400
    for things in splits.values():
        classes = Counter(thing.package for thing in things)
        assert set(classes) == set(packages.PACKAGES)
        assert max(classes.values()) < 0.25 * len(things)  # so guessing the largest class is no good


def test_code_has_no_docstring_left_in_it_and_a_docstring_no_package_name() -> None:
    things = packages.shuffled("train", 0)
    assert not any(thing.summary in thing.code for thing in things)
    assert not any(packages.OWN_NAMES.search(row["text"]) for row in packages.load_package("train", 0))


def test_half_of_the_matches_match() -> None:
    summary_of = {thing.code: thing.summary for thing in packages.shuffled("validation", 0)}
    found = packages.load_match("validation", 0)
    assert abs(sum(row["label"] == "yes" for row in found) / len(found) - 0.5) < 0.01
    assert all((summary_of[row["text"]] == row["text_pair"]) == (row["label"] == "yes") for row in found)
