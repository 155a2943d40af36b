"""Sources read as training goes: the same rows, the same held-out ones, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from recipes.common import formats
from recipes.common.data.readers import Row
from recipes.common.data.rows import Report, arrow_types, refuse_unseen, row_bytes, still_unseen
from recipes.common.data.sources import Part, Source
from recipes.common.data.splits import choose_splits, mixed
from recipes.common.data.words import each, say
from recipes.common.errors import UserError
from recipes.common.formats import Kind
from recipes.common.row_values import BadRow
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets


def load_streams(sources: list[Source], data: Data, kind: Kind) -> datasets.IterableDatasetDict:
    import datasets

    sides: dict[str, list[datasets.IterableDataset]] = {"train": [], "validation": [], "test": []}
    for found in each(sources, lambda source: _stream_source(source, data, kind)):
        for side, stream in found.items():
            sides[side].append(stream)
    streams = {side: _joined(found) for side, found in sides.items() if found}
    for side, limit in (("train", data.max_samples), ("validation", data.max_validation_samples)):
        if limit is not None:
            streams[side] = streams[side].take(limit)
    for side, stream in streams.items():  # what is wrong with the first row is wrong with the whole more often than not
        if next(iter(stream), None) is None:
            names = ", ".join(source.name for source in sources)
            raise UserError(f"{names}: the {side} stream is empty")
    return datasets.IterableDatasetDict(streams)


def _joined(streams: list[datasets.IterableDataset]) -> datasets.IterableDataset:
    import datasets

    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def _stream_source(source: Source, data: Data, kind: Kind) -> dict[str, datasets.IterableDataset]:
    import datasets
    import pyarrow as pa

    train, validation, test = choose_splits(source, data)
    sides: dict[str, tuple[str, bool | None]] = {"train": (train, None)}  # split, and which side of its cut (None: all)
    if validation is not None:
        sides["validation"] = (validation, None)
    else:
        if data.max_validation_samples is None and source.parts(train)[0].stream is not None:
            raise UserError(
                f"data.streaming: {source.name} has no split to hold out, so a fraction of the whole stream would be; "
                "set data.max_validation_samples, or name a split with data.validation_split"
            )
        sides = {"train": (train, False), "validation": (train, True)}
    if test is not None:
        sides["test"] = (test, None)
    types = arrow_types(kind) | ({"tools": pa.string()} if kind in formats.WITH_TOOLS else {})
    features = datasets.Features.from_arrow_schema(pa.schema(list(types.items())))
    streams = {}
    for side, (split, is_held_out) in sides.items():
        parts = source.parts(split)
        chosen = None if is_held_out is None else (is_held_out, data.validation_fraction, data.seed)
        if parts[0].stream is not None:
            raw = parts[0].stream()
            names = raw.column_names or list(next(iter(raw), {}))
            streams[side] = raw.map(
                _StreamBatch(parts[0], kind, data.columns, data.on_bad_row, chosen),
                batched=True,
                batch_size=100,
                with_indices=True,
                remove_columns=names,
                features=features,
            )
        else:
            streams[side] = datasets.IterableDataset.from_generator(
                _stream_rows,
                features=features,
                gen_kwargs={
                    "parts": parts,
                    "kind": kind,
                    "columns": data.columns,
                    "on_bad_row": data.on_bad_row,
                    "chosen": chosen,
                },
            )
    return streams


def _stream_rows(
    parts: list[Part],
    kind: Kind,
    columns: Mapping[str, str] | None,
    on_bad_row: Literal["error", "skip"],
    chosen: tuple[bool, float, int] | None,
) -> Iterator[Row]:
    """The canonical rows of some files, one after the other; datasets splits `parts` among workers."""
    for part in parts:
        turn = _StreamRow(part, kind, columns, on_bad_row, chosen)
        for number, row in part.read():
            result = turn(number, row)
            if result is not None:
                yield result
        turn.finish()


class _StreamRow:
    """One row at a time, with the counts of one pass over a part."""

    def __init__(
        self,
        part: Part,
        kind: Kind,
        columns: Mapping[str, str] | None,
        on_bad_row: Literal["error", "skip"],
        chosen: tuple[bool, float, int] | None,
    ):
        self.part, self.kind, self.columns, self.chosen = part, kind, columns, chosen
        self.report = Report(part.shown, on_bad_row)
        self.types = tuple(arrow_types(kind))
        self.unseen = dict(columns or {})

    def __call__(self, number: int, row: Row | BadRow) -> Row | None:
        """The canonical row; None where it is skipped, blank, or on the other side. Raises UserError."""
        self.report.total += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if self.unseen:
                self.unseen = still_unseen(self.unseen, row)
            result = formats.canonical_row(row, self.kind, self.columns)
            content = row_bytes(result, self.types)
        except BadRow as bad:
            self.report.add(self.part, number, str(bad))
            if self.report.on_bad_row == "error":
                raise UserError([*self.report.lines(), "data.on_bad_row: skip leaves bad rows out"]) from None
            if self.report.bad == self.report.total == 1_000:
                raise UserError(
                    [*self.report.lines(), f"{self.part.shown}: the first 1,000 rows are all bad"]
                ) from None
            return None
        if self.kind == "text" and not content.strip():
            return None
        if self.chosen is not None and self._is_held_out(content) != self.chosen[0]:
            return None
        if self.kind in formats.WITH_TOOLS:  # the features of a stream are fixed before its first row is read
            result.setdefault("tools", None)
        return result

    def _is_held_out(self, content: bytes) -> bool:
        import numpy as np

        assert self.chosen is not None
        hashes = np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), dtype=np.uint64)
        return int(mixed(hashes, self.chosen[2])[0]) < self.chosen[1] * 2**64

    def finish(self) -> None:
        self.report.finish()
        refuse_unseen(self.unseen, self.part.shown)


class _StreamBatch:
    """The same for datasets' batched map over a hub stream."""

    def __init__(self, part: Part, *how: Any):
        self.turn = _StreamRow(part, *how)

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        refuse_unseen(still_unseen(self.turn.unseen, batch), self.turn.part.shown)
        results = []
        bad = self.turn.report.bad
        for i, index in enumerate(indices):
            result = self.turn(index + 1, {name: batch[name][i] for name in names})
            if result is not None:
                results.append(result)
        if self.turn.report.bad > bad:  # a stream need not end, so what was skipped is said as it happens
            say(f"data: {self.turn.part.shown}: skipped {self.turn.report.bad} of {self.turn.report.total} rows so far")
        keys = dict.fromkeys([*self.turn.types, *(name for row in results for name in row)])
        if self.turn.kind in formats.WITH_TOOLS:
            keys["tools"] = None
        return {key: [row.get(key) for row in results] for key in keys}
