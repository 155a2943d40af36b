"""Single values of a raw row: read as what they should be, or refused in words that say what they are instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any


class BadRow(ValueError):
    """One row cannot be used. The text says what is wrong with it and how to put it right."""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` may be a misspelling or the beginning of, or None."""
    others = [w for w in words if w != word]
    found = difflib.get_close_matches(word.lower(), others, n=1, cutoff=0.75)
    longer = [w for w in others if len(word) > 2 and w.startswith(word)]
    return next(iter([*found, *longer]), None)


def string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {shown_type(value)}, not text")
    return value


def numbers(value: Any, name: str, count: int) -> list[float]:
    value = unjson(value)
    if not isinstance(value, list):
        raise BadRow(f"{name} is {shown_type(value)}, not a list of numbers")
    if len(value) != count:
        raise BadRow(f"{name} has {len(value)} entries for {count} completions")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v == v for v in value):
        raise BadRow(f"{name} must hold numbers only; it holds {shown(json.dumps(value))}")
    return value


def unjson(value: Any) -> Any:
    """A list or object that CSV or Parquet carries as JSON in a string; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value  # then it is text, and whoever wanted a list says so
    return value


def shown_type(value: Any) -> str:
    """What a value is, in JSON's words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"a string ({shown(value)})" if value else "an empty string"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


def shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def listed(names: Iterable[str]) -> str:
    names = [str(name) for name in names] or ["none"]
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def one_of(words: Sequence[str]) -> str:
    return " or ".join(repr(word) for word in words)
