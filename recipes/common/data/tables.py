"""Sources read whole: canonical rows as Arrow tables, in memory or on the disk, with nothing held out in the training rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipes.common import formats
from recipes.common.data.readers import SPLIT_NAMES, Row
from recipes.common.data.rows import Report, arrow_types, refuse_unseen, row_bytes, still_unseen
from recipes.common.data.sources import Source
from recipes.common.data.splits import choose_splits, cut_document, held_out
from recipes.common.data.words import counted, each, first_line, say
from recipes.common.errors import UserError
from recipes.common.formats import Kind
from recipes.common.row_values import BadRow
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

BATCH_ROWS = 5_000  # rows turned into Arrow at once ...
BATCH_CHARACTERS = 64_000_000  # ... or characters, whichever comes first (a text file is one row)
IN_MEMORY_BYTES = 512_000_000  # a larger table moves to the disk (HF_DATASETS_CACHE) and is memory-mapped
LONGEST_TEXT = 1_000_000_000  # characters of one row: Arrow's strings end at 2 GiB


class _Table:
    """Gathers canonical rows as Arrow batches, with a 64-bit hash of each row's content (its canonical columns)."""

    def __init__(self, kind: Kind, shown: str):
        self.types = arrow_types(kind)
        self.shown = shown
        self.rows: list[Row] = []
        self.characters = 0
        self.batches: list[pa.Table] = []
        self.hashes: list[bytes] = []
        self.file: Any = None  # the IPC writer of a table too large for memory
        self.path: Path | None = None

    def add(self, row: Row) -> None:
        """Raises BadRow where the row cannot be stored."""
        content = row_bytes(row, tuple(self.types))
        if len(content) > LONGEST_TEXT:
            raise BadRow(f"one row of {len(content)} bytes: cut it into several files or rows")
        self.hashes.append(hashlib.blake2b(content, digest_size=8).digest())
        self.rows.append(row)
        self.characters += len(content)
        if len(self.rows) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self.rows:
            return
        others = dict.fromkeys(name for row in self.rows for name in row if name not in self.types)
        columns = {name: pa.array([row[name] for row in self.rows], kind) for name, kind in self.types.items()}
        for name in others:
            try:
                columns[name] = pa.array([row.get(name) for row in self.rows])
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeEncodeError) as error:
                raise UserError(
                    f"{self.shown}: column {name!r} mixes types or cannot be stored: {first_line(error)}"
                ) from None
        self.batches.append(pa.table(columns))
        self.rows, self.characters = [], 0
        if self.file is not None or (not others and sum(batch.nbytes for batch in self.batches) > IN_MEMORY_BYTES):
            self._spill(bool(others))

    def _spill(self, others: bool) -> None:
        import datasets
        import pyarrow as pa

        if self.file is None:
            import tempfile

            folder = Path(datasets.config.HF_DATASETS_CACHE)
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(suffix=".arrow", dir=folder)
            os.close(handle)
            self.path = Path(path)
            self.file = pa.ipc.new_stream(path, self.batches[0].schema)
        if others:
            raise UserError(
                f"{self.shown}: rows beyond the first {IN_MEMORY_BYTES:,} bytes have columns that those had not"
            )
        for batch in self.batches:
            self.file.write_table(batch)
        self.batches = []

    def finish(self) -> tuple[pa.Table, np.ndarray]:
        """The table, and the hashes as uint64 [rows]."""
        import numpy as np
        import pyarrow as pa

        self._flush()
        hashes = np.frombuffer(b"".join(self.hashes), dtype=np.uint64)
        if self.file is not None:
            assert self.path is not None
            self.file.close()
            table = pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()
            self.path.unlink()  # the mapping keeps the data until the table goes
            return table, hashes
        return _concatenated(self.batches, self.shown), hashes


def _concatenated(tables: list[pa.Table], shown: str) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{shown}: a column has one type in some rows and another in others: {first_line(error)}"
        ) from None


def _canonical(row: Row, source_native: str | None, kind: Kind, columns: Mapping[str, str] | None) -> Row:
    return formats.convert(row, source_native, kind) if source_native else formats.canonical_row(row, kind, columns)


def _read(source: Source, split: str, kind: Kind, data: Data) -> tuple[pa.Table, np.ndarray]:
    """All rows of one split as (table, hashes uint64 [rows]). Raises UserError with what is wrong in it."""
    parts = source.parts(split)
    shown = parts[0].shown if len(parts) == 1 else source.name
    report = Report(shown, data.on_bad_row)
    table = _Table(kind, shown)
    blank = 0
    unseen = dict(data.columns or {})
    named: set[str] = set()  # what a column `split` says, where nobody asked for it
    try:
        for part in parts:
            for number, row in part.read():
                report.total += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    if "split" in row and "split" not in (data.columns or {}):
                        named.add(str(row["split"]).lower())
                    if unseen:
                        unseen = still_unseen(unseen, row)
                    result = _canonical(row, source.native, kind, data.columns)
                    if kind == "text" and not result["text"].strip():
                        blank += 1  # an empty line of a corpus teaches nothing and harms nothing
                        continue
                    table.add(result)
                except BadRow as bad:
                    report.add(part, number, str(bad))
        report.finish()
    except UserError as error:  # also a file that cannot be read to its end: what was wrong before that belongs to it
        raise UserError([*report.lines(), *(p for p in error.problems if p not in report.lines())]) from None
    refuse_unseen(unseen, shown)
    if report.total == blank + report.bad:
        raise UserError(f"{shown} holds {'only blank text' if blank else 'no rows'}")
    if len(named) > 1 and named <= SPLIT_NAMES.keys():
        say(
            f"data: {shown}: its column `split` names {', '.join(sorted(named))}, and all its rows are taken for {split}: to take "
            "them apart, data.columns: {split: split}"
        )
    if blank:
        say(f"data: {shown}: left out {blank} of {report.total} rows whose text is blank")
    return table.finish()


@dataclass
class _Side:
    """Row numbers of one side (train, validation or test) of one source, in its own table."""

    table: pa.Table
    hashes: np.ndarray
    rows: np.ndarray


def load_tables(sources: list[Source], data: Data, kind: Kind) -> datasets.DatasetDict:
    import datasets
    import numpy as np

    sides: dict[str, list[_Side]] = {"train": [], "validation": [], "test": []}
    for found in each(sources, lambda source: _load_source(source, data, kind)):
        for side, rows in found.items():
            sides[side].append(rows)
    splits = {}
    shown = ", ".join(source.name for source in sources)
    rows_of: dict[str, np.ndarray] = {}
    whole: dict[str, tuple[pa.Table, np.ndarray]] = {}
    for side, found_sides in sides.items():
        if not found_sides:
            continue
        rows = np.concatenate([one.rows + at for one, at in zip(found_sides, _offsets(found_sides), strict=True)])
        hashes = np.concatenate([one.hashes for one in found_sides])
        if len(found_sides) > 1:
            rows = np.random.default_rng(data.seed).permutation(rows)
        whole[side] = _concatenated([one.table for one in found_sides], shown), hashes
        rows_of[side] = rows
    kept = np.concatenate([whole[side][1][rows_of[side]] for side in ("validation", "test") if side in rows_of])
    leaks = np.isin(whole["train"][1][rows_of["train"]], kept)
    if leaks.all():
        raise UserError(f"{shown}: every training row also stands in the held-out rows; nothing is left to train on")
    if leaks.any():
        say(f"data: {shown}: left out {counted(int(leaks.sum()), 'training row')} that also stand in the held-out rows")
        rows_of["train"] = rows_of["train"][~leaks]
    for side, limit in (("train", data.max_samples), ("validation", data.max_validation_samples), ("test", None)):
        if side in rows_of:
            splits[side] = _dataset(*whole[side], rows_of[side][:limit])
    return datasets.DatasetDict(splits)


def _offsets(sides: list[_Side]) -> list[int]:
    ends = [0]
    for side in sides:
        ends.append(ends[-1] + len(side.table))
    return ends[:-1]


def _load_source(source: Source, data: Data, kind: Kind) -> dict[str, _Side]:
    """The sides of one source; everything that is wrong in any of its splits at once."""
    import numpy as np

    train, validation, test = choose_splits(source, data)
    wanted = {"train": train, "validation": validation, "test": test}
    names = [side for side, split in wanted.items() if split is not None]
    tables = each(names, lambda side: _read(source, cast(str, wanted[side]), kind, data))
    found = {
        side: _Side(table, hashes, np.arange(len(table))) for side, (table, hashes) in zip(names, tables, strict=True)
    }
    if validation is not None:
        return found
    parts = source.parts(train)
    try:
        if kind == "text" and len(parts) == 1 and parts[0].unit == "document":
            text = found["train"].table["text"][0].as_py()
            for side, piece in zip(("train", "validation"), cut_document(text, data.validation_fraction), strict=True):
                one = _Table(kind, source.name)
                one.add({"text": piece})
                table, hashes = one.finish()
                found[side] = _Side(table, hashes, np.arange(1))
            return found
        out = held_out(found["train"].hashes, data.validation_fraction, data.seed)
    except UserError as error:
        raise UserError([f"{source.name}: {problem}" for problem in error.problems]) from None
    rows = found["train"].rows
    whole = found["train"]
    return found | {
        "train": _Side(whole.table, whole.hashes, rows[~out]),
        "validation": _Side(whole.table, whole.hashes, rows[out]),
    }


def _dataset(table: pa.Table, hashes: np.ndarray, rows: np.ndarray) -> datasets.Dataset:
    import datasets
    import numpy as np
    from datasets.table import InMemoryTable

    fingerprint = None
    if table.nbytes > IN_MEMORY_BYTES:  # by default the whole table is pickled to get one
        fingerprint = hashlib.blake2b(hashes.tobytes() + str(table.schema).encode(), digest_size=8).hexdigest()
    whole = datasets.Dataset(InMemoryTable(table), fingerprint=fingerprint)
    if len(rows) == len(table) and (np.diff(rows) == 1).all():
        return whole
    return whole.select(rows)
