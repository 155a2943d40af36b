"""A reward function of one's own, as a user names it: module:function."""

from __future__ import annotations

from typing import Any


def letters(answers: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward function of one's own: the share of "k" in an answer."""
    return [text.count("k") / max(1, len(text)) for text in answers]


def careless(answers: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """One that reads a column which the rows do not have."""
    return [float(text == row["goal"]) for text, row in zip(answers, rows, strict=True)]


def alike(answers: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """One that tells nothing apart."""
    return [0.5] * len(answers)
