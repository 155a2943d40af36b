"""One canonical row: its Arrow types, its content as bytes, and the report of the rows that are bad."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from recipes.common.data.readers import Row
from recipes.common.data.sources import Part
from recipes.common.data.words import PROBLEMS_SHOWN, counted, say, some_of
from recipes.common.errors import UserError
from recipes.common.row_values import BadRow

if TYPE_CHECKING:
    import pyarrow as pa


VALUE = re.compile(r" \(-?\d[\d.e+-]*\)")  # a number that stands in a row, as `shown_type` shows it


@dataclass
class Report:
    """Counts rows and collects what is wrong with the bad ones, equal complaints together."""

    name: str
    on_bad_row: Literal["error", "skip"]
    total: int = 0
    bad: int = 0
    places: dict[str, list[tuple[Part, int]]] = field(default_factory=dict)  # complaint -> where, the first few
    counts: dict[str, int] = field(default_factory=dict)
    unlisted: int = 0

    def add(self, part: Part, number: int, complaint: str) -> None:
        self.bad += 1
        alike = VALUE.sub("", complaint)  # the first of those that differ in a number alone speaks for all
        complaint = next((other for other in self.places if VALUE.sub("", other) == alike), complaint)
        if complaint not in self.places and len(self.places) == PROBLEMS_SHOWN:
            self.unlisted += 1
            return
        self.counts[complaint] = self.counts.get(complaint, 0) + 1
        places = self.places.setdefault(complaint, [])
        if len(places) < 4:
            places.append((part, number))

    def lines(self) -> list[str]:
        """One text a complaint: where it was first met, what it is, where else."""
        found = []
        for complaint, places in self.places.items():
            more = self.counts[complaint] - 1
            (part, number), others = places[0], places[1:]
            if more and all(other is part for other, _ in others):
                elsewhere = f"{part.unit}s " + some_of([str(other) for _, other in others], more)
            else:
                elsewhere = some_of([_place(*other) for other in others], more)
            also = f" (and {counted(more, f'more {part.unit}')}: {elsewhere})" if more else ""
            found.append(f"{_place(part, number)}: {complaint}{also}")
        return found

    def finish(self) -> None:
        """Raise what has to be raised, print what was skipped."""
        if not self.bad:
            return
        rest = [f"... and {counted(self.unlisted, 'more bad row')}"] if self.unlisted else []
        if self.bad == self.total:
            all_bad = "its only row is bad" if self.total == 1 else f"all {self.total:,} rows are bad"
            raise UserError([*self.lines(), *rest, f"{self.name}: {all_bad}, so nothing is left to use"])
        if self.on_bad_row == "error":
            advice = "correct the source, or set data.on_bad_row: skip to leave them out"
            some_bad = f"{self.bad:,} of {self.total:,} rows {'is' if self.bad == 1 else 'are'} bad"
            raise UserError([*self.lines(), *rest, f"{self.name}: {some_bad}: {advice}"])
        say(f"data: {self.name}: skipped {self.bad:,} of {self.total:,} rows (data.on_bad_row: skip)")
        for line in [*self.lines(), *rest]:
            say(f"  {line}")


def _place(part: Part, number: int) -> str:
    if part.unit == "document":
        return part.shown
    if part.unit == "line":
        return f"{part.shown}:{number}"
    line = part.line_of(number) if part.line_of else None
    return f"{part.shown}: row {number}" if line is None else f"{part.shown}:{line}: row {number}"


def arrow_types(kind: str) -> dict[str, pa.DataType]:
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return {
        "text": {"text": pa.string()},
        "conversation": {"messages": messages},
        "preference": {"prompt": messages, "completions": pa.list_(pa.string()), "ranks": pa.list_(pa.int64())},
        "prompt": {"prompt": messages},
        "classification": {"text": pa.string(), "text_pair": pa.string(), "label": pa.string()},
        "scored_pair": {"text": pa.string(), "text_pair": pa.string(), "label": pa.float64()},
        "pair": {"source": pa.string(), "target": pa.string()},
    }[kind]


def row_bytes(row: Row, columns: Sequence[str]) -> bytes:
    """What makes two rows equal: the content of these columns. Raises BadRow where it is not valid Unicode."""
    try:
        if columns == ("text",):
            return row["text"].encode()
        return json.dumps([row[name] for name in columns], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"holds half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no text"
        ) from None


def still_unseen(unseen: Mapping[str, str], row: Row) -> dict[str, str]:
    return {ours: theirs for ours, theirs in unseen.items() if theirs not in row}


def refuse_unseen(unseen: Mapping[str, str], shown: str) -> None:
    """A map to a column that a row may lack, and that every row lacks, is a misspelling."""
    if unseen:
        raise UserError(
            [f"data.columns: no row of {shown} has {theirs!r} (mapped to {ours})" for ours, theirs in unseen.items()]
        )
