"""Files and data sets as raw rows, each numbered, or what is wrong at which line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from recipes.common.data.words import counted, first_line
from recipes.common.errors import UserError
from recipes.common.row_values import BadRow, shown_type

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how its files begin
BLANK = re.compile(r"[ \t\r\n]*")
Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | BadRow]]  # (number in the source from 1, the raw row or why there is none)


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(shown: str, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset where it begins, the line with its end)."""
    offset = 0
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                yield number, offset, line
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{shown}: {_bad_gzip(error)}") from None


def _whole_text(shown: str, path: Path) -> str:
    try:
        with _open_bytes(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{shown}: {_bad_gzip(error)}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown}:{line}: {_not_utf8(content, error.start, error.start)}") from None


def _bad_gzip(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the gzip file is cut short (an unfinished download?); fetch it again"
    return f"not a gzip file, or a damaged one ({error}): fetch it again, or drop .gz from its name if it is none"


def _not_utf8(content: bytes, at: int, offset: int) -> str:
    hint = ""
    if content[:2] in UTF_16:
        hint = "; it looks like UTF-16"
    elif content[:2] == b"\x1f\x8b":
        hint = "; it looks like gzip: end its name with .gz"
    return f"not UTF-8: byte 0x{content[at]:02x} at offset {offset}{hint}. Save the file as UTF-8 (iconv -t UTF-8)"


def _read_text(shown: str, path: Path) -> Rows:
    yield 1, {"text": _whole_text(shown, path)}


def _read_jsonl(shown: str, path: Path) -> Rows:
    loads = json.loads
    for number, offset, line in _lines(shown, path):
        try:
            row = loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            if line[:2] in UTF_16 and number == 1:  # no line of it can be read
                raise UserError(f"{shown}: {_not_utf8(line, error.start, offset + error.start)}") from None
            yield number, BadRow(_not_utf8(line, error.start, offset + error.start))
            continue
        except json.JSONDecodeError as error:
            if not line.strip():
                continue  # a blank line is nobody's row
            hint = ""
            if number == 1 and line.lstrip()[:1] == b"[":
                hint = " (it looks like one JSON array: call the file .json)"
            yield number, BadRow(f"broken JSON: {error.msg} at column {error.colno}{hint}")
            continue
        except RecursionError:
            yield number, BadRow("broken JSON: nested too deeply")
            continue
        except ValueError as error:  # a number of more digits than Python reads
            yield number, BadRow(f"broken JSON: {error}")
            continue
        yield number, _with_columns(row)


def _with_columns(row: Any) -> Row | BadRow:
    """A row of JSON with named columns; those of a list are its places: ["hello", "greet"] is {"0": "hello", "1": "greet"}."""
    if isinstance(row, list):
        return {str(place): value for place, value in enumerate(row)}
    if isinstance(row, dict):
        return row
    return BadRow(f"a row must be an object with named columns; this is {shown_type(row)}")


def json_splits(shown: str, path: Path) -> dict[str, list[Any]] | None:
    """The rows of a .json file by split: a list, {"data": [...]} or {split: [...]}; None where it holds JSON lines."""
    text = _whole_text(shown, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{"):
            return None
        if not text.strip():
            raise UserError(f"data.name: {shown} is empty") from None
        raise UserError(f"{shown}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{shown}: broken JSON: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{shown}: broken JSON: {error}") from None
    if isinstance(content, list):
        return {"train": content}
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return {"train": _squad_rows(content["data"])}
    if isinstance(content, dict) and content and all(isinstance(v, list) for v in content.values()):
        ours = [SPLIT_NAMES.get(name.lower()) or str(name) for name in content]
        splits = dict(zip(ours if len(set(ours)) == len(ours) else content, content.values(), strict=True))
        # {"prompt": ["...", ...], "completion": [...]} is a table by columns, not by splits
        if any(rows and isinstance(rows[0], dict | list) for rows in splits.values()):
            return splits
    raise UserError(
        f'{shown}: must be a list of rows, {{"data": [rows]}}, or {{"train": [rows], "validation": [rows]}}'
    )


def json_row_line(path: Path, split: str, number: int) -> int | None:
    """The line on which row `number` (from 1) of a split of `json_splits` begins; None for SQuAD's nested rows."""
    text = _whole_text(str(path), path)
    decode = json.JSONDecoder().raw_decode

    def skipped(at: int) -> int:
        blank = BLANK.match(text, at)
        return blank.end() if blank else at

    at = skipped(0)
    if text[at] == "{":  # go to the split's list
        key = ""
        while not (split in (key, SPLIT_NAMES.get(key.lower())) or (key == "data" and split == "train")):
            if key:
                at = skipped(decode(text, at)[1])
            key, at = decode(text, skipped(at + 1))
            at = skipped(skipped(at) + 1)
    for _ in range(number - 1):
        row, at = decode(text, skipped(at + 1))
        at = skipped(at)
        if isinstance(row, dict) and "paragraphs" in row:
            return None
    return text.count("\n", 0, skipped(at + 1)) + 1


def _squad_rows(entries: list[Any]) -> list[Any]:
    """SQuAD's files nest questions in paragraphs in articles; other lists are as they are."""
    nested = all(isinstance(entry, dict) and isinstance(entry.get("paragraphs"), list) for entry in entries)
    if not nested or not all(isinstance(p, dict) for entry in entries for p in entry["paragraphs"]):
        return entries
    return [
        question
        if not isinstance(question, dict)  # no row: its check says so
        else {
            "id": question.get("id"),
            "title": article.get("title"),
            "context": paragraph.get("context"),
            "question": question.get("question"),
            "answers": _squad_answers(question.get("answers")),
        }
        for article in entries
        for paragraph in article["paragraphs"]
        for question in paragraph.get("qas") or []
    ]


def _squad_answers(answers: Any) -> Any:
    """[{"text": ...}, ...] as the hub's SQuAD has it, {"text": [...]}; anything else is left to the row's own check."""
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return {"text": [answer.get("text") for answer in answers]}
    return answers


def _read_table(dialect: Literal["csv", "tsv"], shown: str, path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)

    def decoded() -> Iterator[str]:
        for number, offset, line in _lines(shown, path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{shown}:{number}: {_not_utf8(line, error.start, offset + error.start)}") from None

    # A tab-separated file has no quotes: a quotation mark in it is one.
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if dialect == "tsv" else {"strict": True}
    reader = csv.reader(decoded(), **how)
    header: list[str] | None = None
    while True:
        begins = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begins, BadRow(f"broken CSV: {error} (a quotation mark inside a field is written twice)")
            continue
        if not fields:
            continue
        if header is None:
            header = [column.strip() for column in fields]
            if len(header) == 1 and (other := next((mark for mark in (";", "\t") if mark in header[0]), None)):
                raise UserError(
                    f"{shown}:{begins}: the header is one field, {header[0][:60]!r}: its fields seem to be separated by "
                    f"{other!r}; separate them by commas" + (", or call the file .tsv" if other == "\t" else "")
                )
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise UserError(f"{shown}:{begins}: the header names {', '.join(map(repr, twice))} twice")
            continue
        if len(fields) != len(header):
            yield begins, BadRow(f"{counted(len(fields), 'field')} where the header has {len(header)}")
            continue
        yield begins, dict(zip(header, fields, strict=True))


def read_parallel(shown: str, files: Mapping[str, Path], as_text: bool) -> Rows:
    """Line i of each file as row i, a column for each language; as text a row each, translations after one another."""
    sides = {language: _whole_text(str(path), path).removesuffix("\n").split("\n") for language, path in files.items()}
    if len({len(lines) for lines in sides.values()}) > 1:
        counts = ", ".join(f"{counted(len(lines), 'line')} of {language}" for language, lines in sides.items())
        raise UserError(f"{shown}: {counts}: parallel text has the same number, line by line")
    for number, lines in enumerate(zip(*sides.values(), strict=True), 1):
        row = {language: line.removesuffix("\r") for language, line in zip(sides, lines, strict=True)}
        if as_text:
            yield from ((number, {"text": line}) for line in row.values())
        else:
            yield number, row


def _read_parquet(shown: str, path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = path
    if path.suffix.lower() == ".gz":
        try:
            with _open_bytes(path) as file:
                source = pa.BufferReader(file.read())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{shown}: {_bad_gzip(error)}") from None
    number = 0
    try:
        with pq.ParquetFile(source) as file:
            names = names_of_classes(_features_of(file.schema_arrow))
            for batch in file.iter_batches(batch_size=1_000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, with_class_names(row, names)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{shown}: not a Parquet file, or a damaged one: {first_line(error)}") from None


def _features_of(schema: pa.Schema) -> Any:
    """The columns' features as `datasets` wrote them into a Parquet file; None in anybody else's."""
    import datasets

    return datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else None


FILE_READERS: dict[str, Callable[[str, Path], Rows]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": partial(_read_table, "csv"),
    "tsv": partial(_read_table, "tsv"),
    "parquet": _read_parquet,
}


def numbered_rows(rows: Callable[[], Sequence[Any]]) -> Rows:
    for number, row in enumerate(rows(), 1):
        yield number, _with_columns(row)


def dataset_rows(load: Callable[[], datasets.Dataset]) -> Rows:
    number, rows = 0, load()
    names = names_of_classes(rows.features)
    for table in rows.with_format("arrow").iter(batch_size=1_000):
        for row in cast("pa.Table", table).to_pylist():
            number += 1
            yield number, with_class_names(row, names)


def names_of_classes(features: Any) -> dict[str, list[str]]:
    """The columns that hold the number of a class, as many of the hub do, with the names of the classes."""
    import datasets

    return {
        column: feature.names
        for column, feature in (features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }


def with_class_names(row: Row, names: dict[str, list[str]]) -> Row:
    """The row with the class's name in place of its number; -1 is none (GLUE's test rows)."""
    return {**row, **{column: of[i] for column, of in names.items() if isinstance(i := row[column], int) and i >= 0}}
