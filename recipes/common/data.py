"""One door for all data: a builtin set, a local file or folder, or a hub data set, as canonical rows in splits.

    load_data(config.data, "conversation") -> DatasetDict with "train" and "validation" ("test" where the source has it)

What a canonical row is, and which schemas are recognised, is in formats.py. Where the rows come from is here: reading
files with errors that name the line, choosing the splits, holding rows out, and putting it all in Arrow.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from recipes.common import formats
from recipes.common.errors import UserError
from recipes.common.formats import BadRow, Kind
from recipes.common.hub import is_cached, why_not_on_hub
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

FILE_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")  # tried in this order
NOT_DATA = re.compile(r"(readme|licen[sc]e|copying|changelog)(\.\w+)?|dataset_infos?\.json", re.IGNORECASE)

PROBLEMS_SHOWN = 10  # different things that are wrong, before the rest is only counted
BATCH_ROWS = 5_000  # rows turned into Arrow at once ...
BATCH_CHARACTERS = 64_000_000  # ... or characters, whichever comes first (a text file is one row)
IN_MEMORY_BYTES = 512_000_000  # a larger table moves to the disk (HF_DATASETS_CACHE) and is memory-mapped
LONGEST_TEXT = 1_000_000_000  # characters of one row: Arrow's strings end at 2 GiB

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | BadRow]]  # (number in the source from 1, the raw row or why there is none)


def load_data(data: Data, kind: Kind) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load what the `data` section names, as canonical rows of `kind`.

    Returns a DatasetDict (IterableDatasetDict with data.streaming) with "train" and "validation", and "test" where
    the source has one that is not held out already. The columns are
        text: text (str)                    conversation: messages [, tools]
        preference: prompt, completions, ranks [, tools]
        prompt: prompt [, tools], and all the other columns of the source
        image: image, label                 image_caption: image, caption
    and those that a builtin set adds of its own. "tools" is there where the source has any (in a stream: always), a
    JSON list in a string, null where a row has none.

    What is held out: data.validation_split, else the source's validation (or valid, val, dev, eval) split, else its
    test split, else data.validation_fraction of the training rows, chosen by data.seed and the rows' content; of a
    single text file, its end. No training row also stands, word for word, in a held-out split: such rows are left out
    and counted (streams with a validation split of their own cannot be checked so).

    A list in data.name is each of them, one after the other, each with its own held-out rows, then shuffled together
    by data.seed, so that data.max_samples takes from all of them (a stream is not shuffled).

    Rows are held in memory as Arrow, above 512 MB in an unnamed file that is memory-mapped. Raises UserError with
    everything that is wrong (up to 10 different problems, the rest counted).
    """
    names = [data.name] if isinstance(data.name, str) else list(data.name)
    problems = formats.check_columns(data.columns)
    if not names:
        problems.append("data.name: the list is empty")
    problems += ["data.name: is blank"] * any(not name.strip() for name in names)
    if data.validation_split is not None and data.validation_split == data.split:
        problems.append(
            f"data.validation_split: {data.split!r} is the training split too; name another, "
            "or leave it out to hold out data.validation_fraction"
        )
    if problems:
        raise UserError(problems)
    if kind in ("image", "image_caption"):
        return _load_images(names, data, kind)
    sources = _each(names, lambda name: _open_source(name, data, kind))
    streams = [source.streams for source in sources]
    if data.streaming and all(streams):
        return _load_streams(sources, data, kind)
    if data.streaming and any(streams):
        whole = ", ".join(source.name for source in sources if not source.streams)
        raise UserError(
            f"data.streaming: {whole} has to be read whole and cannot stand beside streams; make it JSON lines"
        )
    splits = _load_tables(sources, data, kind)
    if data.streaming:  # whatever has to be read whole anyhow: a text file, a JSON array, a builtin set
        import datasets

        return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return splits


# --- sources --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows that come from one place: a file, a split of a builtin set or of a hub data set."""

    shown: str  # how messages name the place
    read: Callable[[], Rows]
    unit: Literal["line", "row", "document"] = "row"  # what a number counts; a document is a text file, one row
    stream: Callable[[], datasets.IterableDataset] | None = None  # the hub's own stream


@dataclass(frozen=True)
class Source:
    """What one entry of data.name names: its splits, each of one or more parts."""

    name: str
    splits: tuple[str, ...]
    parts: Callable[[str], list[Part]]  # of a split, or of a slice of it where the source knows slices: "train[:10%]"
    native: str | None = None  # a builtin set's kind: its rows are canonical already
    load: Callable[[str], datasets.Dataset] | None = None  # a split as the hub has it; it knows slices
    streams: bool = False  # can be read piece by piece


def _open_source(name: str, data: Data, kind: Kind) -> Source:
    from recipes.common.builtin import BUILTINS

    if name in BUILTINS:
        builtin = BUILTINS[name]
        if reason := formats.misfit(builtin.kind, kind):
            raise UserError(f"data.name: builtin set {name!r} {reason}")
        if data.columns:
            raise UserError(
                f"data.columns: builtin set {name!r} needs no map, its columns are ours already; leave it out"
            )
        source = Source(
            name,
            ("train", "validation", "test"),
            lambda split: [Part(f"{name} ({split})", partial(_numbered, partial(builtin.load, split, data.seed)))],
            native=builtin.kind,
        )
    elif (path := _existing(name)) is not None:
        source = _open_folder(name, path) if path.is_dir() else _open_file(name, path)
    else:
        return _open_hub(name, data)
    if data.subset is not None:
        raise UserError(f"data.subset: {data.subset!r} picks a configuration of a hub data set; {name!r} has none")
    return source


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, no such user's home
        return None


def _open_file(name: str, path: Path) -> Source:
    file_format = _format_of(path)
    if file_format is None:
        raise UserError(f"data.name: {name}: {_unknown_format(path)}")
    _check_readable(name, path)
    if file_format == "json":
        splits = _json_splits(name, path)
        if splits is not None:
            return Source(
                name,
                tuple(splits),
                lambda split: [
                    Part(name if len(splits) == 1 else f"{name} ({split})", partial(_numbered, lambda: splits[split]))
                ],
            )
        file_format = "jsonl"  # JSON lines that are called .json, as many on the hub are
    part = _file_part(name, path, file_format)
    return Source(name, ("train",), lambda split: [part], streams=file_format != "text")


def _open_folder(name: str, path: Path) -> Source:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # Dataset.save_to_disk
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.name: {name}: a damaged folder of save_to_disk: {_first_line(error)}") from None
        whole = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return Source(
            name,
            tuple(str(split) for split in whole),
            lambda split: [Part(f"{name} ({split})", partial(_dataset_rows, lambda: whole[split]))],
        )
    files = [file for file in _files(path) if not NOT_DATA.fullmatch(file.name)]
    by_format: dict[str, list[Path]] = {}
    unknown = []
    for file in files:
        if file_format := _format_of(file):
            by_format.setdefault(file_format, []).append(file)
        else:
            unknown.append(str(file.relative_to(path)))
    if not by_format:
        found = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
        raise UserError(
            f"data.name: folder {name!r} holds no data file ({', '.join(FILE_FORMATS)}, each also .gz)"
            + (f"; it holds {', '.join(found[:8])}" if found else "; it is empty")
            + (". A folder of images serves recipes that learn from images" if set(found) & IMAGE_FILES else "")
        )
    if len(by_format) > 1:
        counts = ", ".join(f"{len(found)} of {file_format}" for file_format, found in by_format.items())
        raise UserError(
            f"data.name: folder {name!r} mixes formats ({counts}); say which files to read, e.g. "
            f"data.name: [{os.path.join(name, files[0].relative_to(path))}, ...]"
        )
    if unknown:
        say(f"data: {name}: left out, for no reader knows them: {_some(unknown)}")
    ((file_format, files),) = by_format.items()
    splits: dict[str, list[Part]] = {}
    unnamed: list[Part] = []
    for file in files:
        inside = file.relative_to(path)
        shown = os.path.join(name, inside)
        _check_readable(shown, file)
        split = _split_of(inside)
        if file_format == "json":
            json_splits = _json_splits(shown, file)
            if json_splits is None:
                part = _file_part(shown, file, "jsonl")
            elif len(json_splits) > 1:
                raise UserError(
                    f"data.name: {shown} holds splits of its own ({', '.join(json_splits)}): name the file itself"
                )
            else:
                part = Part(shown, partial(_numbered, partial(_first_value, json_splits)))
        else:
            part = _file_part(shown, file, file_format)
        (splits.setdefault(split, []) if split else unnamed).append(part)
    if "train" not in splits and unnamed:
        if splits:
            say(f"data: {name}: no file is named train, so these are: {_some([part.shown for part in unnamed])}")
        splits["train"] = unnamed
    elif unnamed:
        say(f"data: {name}: files named after a split are read; left out: {_some([part.shown for part in unnamed])}")
    return Source(
        name,
        tuple(split for split in ("train", "validation", "test") if split in splits),
        splits.__getitem__,
        streams=file_format not in ("text", "json"),
    )


def _files(folder: Path) -> list[Path]:
    """All files below a folder, less hidden ones, in order."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data.name: {error.filename} cannot be read: {error.strerror}")

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _file_part(shown: str, path: Path, file_format: str) -> Part:
    units: dict[str, Literal["row", "document"]] = {"text": "document", "parquet": "row"}
    return Part(shown, partial(_FILE_READERS[file_format], shown, path), units.get(file_format, "line"))


def _format_of(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return FILE_FORMATS.get(os.path.splitext(name)[1])


def _unknown_format(path: Path) -> str:
    return (
        f"no reader for files called {path.name!r}; known endings are {', '.join(FILE_FORMATS)}, each also with .gz. "
        "Rename the file if its content is one of these"
    )


def _split_of(inside: Path) -> str | None:
    """The split that a file's name or a folder above it says: train.jsonl, test-00000-of-00002.parquet, dev/a.txt."""
    stem = re.sub(r"[-_]\d+(-of-\d+)?$", "", inside.name.split(".")[0].lower())
    words = (stem, *(folder.lower() for folder in inside.parts[:-1]))
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _open_hub(name: str, data: Data) -> Source:
    import datasets

    if _format_of(Path(name)):  # train.jsonl could be a hub id by its form, and is a file by its ending
        raise UserError(_not_found(name, "it has not the form of a hub id (owner/name)"))
    if not is_cached(name, "dataset") and (reason := why_not_on_hub(name, "dataset")):
        raise UserError(_not_found(name, reason))
    try:
        splits = tuple(str(split) for split in datasets.get_dataset_split_names(name, data.subset))
    except _hub_errors() as error:
        raise UserError(_hub_problem(name, data.subset, error)) from None
    load = partial(_load_hub, name, data.subset)

    def parts(split: str) -> list[Part]:
        return [
            Part(f"{name} ({split})", partial(_dataset_rows, partial(load, split)), stream=partial(load, split, True))
        ]

    return Source(name, splits, parts, load=load, streams=True)


def _load_hub(name: str, subset: str | None, split: str, streaming: bool = False) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except _hub_errors() as error:
        raise UserError(_hub_problem(name, subset, error)) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    import datasets

    return (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)


def _hub_problem(name: str, subset: str | None, error: Exception) -> str:
    key = "data.subset" if "config" in str(error).lower() and "available" in str(error).lower() else "data.name"
    given = f"{subset!r} of {name}" if key == "data.subset" else repr(name)
    return f"{key}: {given} cannot be loaded from the hub: {' '.join(str(error).split())[:600] or type(error).__name__}"


def _not_found(name: str, hub_reason: str) -> str:
    from recipes.common.builtin import BUILTINS

    near = formats.nearest(name, BUILTINS)
    builtin = f"not a builtin set ({', '.join(BUILTINS)}{f'; did you mean {near!r}?' if near else ''})"
    return (
        f"data.name: {name!r} is {builtin}, not a file or folder ({_nearest_path(name)}), and {hub_reason}. "
        "Give a builtin name, a path that exists, or the id of a data set that this machine can reach"
    )


def _nearest_path(name: str) -> str:
    """What there is where a path leads nowhere: the nearest name in the deepest folder on the way that exists."""
    path = Path(os.path.expanduser(name))
    folder = path.parent
    missing = path.name
    while _existing(str(folder)) is None and folder != folder.parent:
        folder, missing = folder.parent, folder.name
    try:
        entries = [entry.name for entry in folder.iterdir()]
    except PermissionError:
        return f"{str(folder)!r} may not be read"
    near = difflib.get_close_matches(missing, entries, n=1, cutoff=0.6)
    if near:
        return f"nearest is {str(folder / near[0])!r}"
    return f"there is no {missing!r} in {'this folder' if str(folder) == '.' else repr(str(folder))}"


def _check_readable(shown: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"data.name: {shown} cannot be read: {error.strerror or error}") from None
    if path.stat().st_size == 0:
        raise UserError(f"data.name: {shown} is empty")


# --- readers: raw rows, or what is wrong at which line --------------------------------------------


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
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
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
        yield (
            number,
            row
            if isinstance(row, dict)
            else BadRow(f"a row must be an object with named columns; this is {formats.shown_type(row)}"),
        )


def _json_splits(shown: str, path: Path) -> dict[str, list[Any]] | None:
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


def _squad_rows(entries: list[Any]) -> list[Any]:
    """SQuAD's files nest questions in paragraphs in articles; other lists are as they are."""
    if not all(isinstance(entry, dict) and isinstance(entry.get("paragraphs"), list) for entry in entries):
        return entries
    return [
        {
            "id": question.get("id"),
            "title": article.get("title"),
            "context": paragraph.get("context"),
            "question": question.get("question"),
            "answers": {"text": [answer.get("text") for answer in question.get("answers", [])]},
        }
        for article in entries
        for paragraph in article["paragraphs"]
        for question in paragraph.get("qas", [])
    ]


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
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise UserError(f"{shown}:{begins}: the header names {', '.join(map(repr, twice))} twice")
            continue
        if len(fields) != len(header):
            other = ";" if dialect == "csv" and len(header) == 1 and ";" in header[0] else None
            hint = f"; its fields seem to be separated by {other!r}" if other else ""
            yield begins, BadRow(f"{_count(len(fields), 'field')} where the header has {len(header)}{hint}")
            continue
        yield begins, dict(zip(header, fields, strict=True))


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
            for batch in file.iter_batches(batch_size=1_000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{shown}: not a Parquet file, or a damaged one: {_first_line(error)}") from None


_FILE_READERS: dict[str, Callable[[str, Path], Rows]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": partial(_read_table, "csv"),
    "tsv": partial(_read_table, "tsv"),
    "parquet": _read_parquet,
}


def _numbered(rows: Callable[[], Sequence[Any]]) -> Rows:
    for number, row in enumerate(rows(), 1):
        yield (
            number,
            row
            if isinstance(row, dict)
            else BadRow(f"a row must be an object with named columns; this is {formats.shown_type(row)}"),
        )


def _first_value(rows: dict[str, list[Any]]) -> list[Any]:
    return next(iter(rows.values()))


def _dataset_rows(load: Callable[[], datasets.Dataset]) -> Rows:
    number = 0
    for table in load().with_format("arrow").iter(batch_size=1_000):
        for row in cast("pa.Table", table).to_pylist():
            number += 1
            yield number, row


# --- from rows to Arrow ---------------------------------------------------------------------------


@dataclass
class _Report:
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
                elsewhere = f"{part.unit}s " + _some([str(other) for _, other in others], more)
            else:
                elsewhere = _some([_place(*other) for other in others], more)
            also = f" (and {_count(more, f'more {part.unit}')}: {elsewhere})" if more else ""
            found.append(f"{_place(part, number)}: {complaint}{also}")
        return found

    def finish(self) -> None:
        """Raise what has to be raised, print what was skipped."""
        if not self.bad:
            return
        rest = [f"... and {_count(self.unlisted, 'more bad row')}"] if self.unlisted else []
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
    return f"{part.shown}:{number}" if part.unit == "line" else f"{part.shown}: row {number}"


def _arrow_types(kind: str) -> dict[str, pa.DataType]:
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return {
        "text": {"text": pa.string()},
        "conversation": {"messages": messages},
        "preference": {"prompt": messages, "completions": pa.list_(pa.string()), "ranks": pa.list_(pa.int64())},
        "prompt": {"prompt": messages},
    }[kind]


class _Table:
    """Gathers canonical rows as Arrow batches, with a 64-bit hash of each row's content (its canonical columns)."""

    def __init__(self, kind: Kind, shown: str):
        self.types = _arrow_types(kind)
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
                    f"{self.shown}: column {name!r} mixes types or cannot be stored: {_first_line(error)}"
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


def _concatenated(tables: list[pa.Table], shown: str) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{shown}: a column has one type in some rows and another in others: {_first_line(error)}"
        ) from None


def _canonical(row: Row, source_native: str | None, kind: Kind, columns: Mapping[str, str] | None) -> Row:
    return formats.convert(row, source_native, kind) if source_native else formats.canonical_row(row, kind, columns)


def _read(source: Source, split: str, kind: Kind, data: Data) -> tuple[pa.Table, np.ndarray]:
    """All rows of one split as (table, hashes uint64 [rows]). Raises UserError with what is wrong in it."""
    parts = source.parts(split)
    shown = parts[0].shown if len(parts) == 1 else source.name
    report = _Report(shown, data.on_bad_row)
    table = _Table(kind, shown)
    blank = 0
    unseen = dict(data.columns or {})
    try:
        for part in parts:
            for number, row in part.read():
                report.total += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    if unseen:
                        unseen = _still_unseen(unseen, row)
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
    _refuse_unseen(unseen, shown)
    if report.total == blank + report.bad:
        raise UserError(f"{shown} holds {'only blank text' if blank else 'no rows'}")
    if blank:
        say(f"data: {shown}: left out {blank} of {report.total} rows whose text is blank")
    return table.finish()


def _still_unseen(unseen: Mapping[str, str], row: Row) -> dict[str, str]:
    return {ours: theirs for ours, theirs in unseen.items() if theirs not in row}


def _refuse_unseen(unseen: Mapping[str, str], shown: str) -> None:
    """A map to a column that a row may lack, and that every row lacks, is a misspelling."""
    if unseen:
        raise UserError(
            [f"data.columns: no row of {shown} has {theirs!r} (mapped to {ours})" for ours, theirs in unseen.items()]
        )


# --- splits ---------------------------------------------------------------------------------------


def _choose_splits(source: Source, data: Data) -> tuple[str, str | None, str | None]:
    """Names of the splits that (train, are held out, are the test); None where there is none. Raises UserError."""
    problems = []
    bases = {}
    for key, wanted in (("split", data.split), ("validation_split", data.validation_split)):
        if wanted is None:
            continue
        base = wanted.split("[")[0] if source.load else wanted
        bases[key] = base
        if base not in source.splits:
            near = formats.nearest(base, source.splits)
            problems.append(
                f"data.{key}: {source.name} has no split {base!r}; it has {', '.join(source.splits)}"
                f"{f' (did you mean {near!r}?)' if near else ''}"
            )
    if problems:
        raise UserError(problems)
    held_out = data.validation_split or next(
        (name for name in HELD_OUT_SPLITS if name in source.splits and name != bases["split"]), None
    )
    used = (bases["split"], bases.get("validation_split", held_out))
    return data.split, held_out, "test" if "test" in source.splits and "test" not in used else None


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: bool [rows], about `fraction` of them, chosen by their content and the seed alone.

    hashes: uint64 [rows]; rows of equal content have equal hashes and go to the same side
    Raises UserError where one side would be empty.
    """
    import numpy as np

    unique, counts = np.unique(hashes, return_counts=True)
    if len(unique) < 2:
        raise UserError(
            f"only {_count(len(hashes), 'row')}{' (all equal)' if len(hashes) > 1 else ''}: nothing can be held out; "
            "add rows, or name another split with data.validation_split"
        )
    order = np.argsort(_mixed(unique, seed), kind="stable")
    wanted = max(1, round(len(hashes) * fraction))
    taken = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
    if taken >= len(unique):
        taken = len(unique) - 1
        if round(len(hashes) * (1 - fraction)) < 1:
            raise UserError(
                f"data.validation_fraction: {fraction} of {len(hashes)} rows leaves nothing to train on; lower it"
            )
    return np.isin(hashes, unique[order[:taken]])


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another hash of each hash, as good as independent for each seed (splitmix64)."""
    import numpy as np

    with np.errstate(over="ignore"):
        x = hashes + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def cut_document(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text in (what trains, what is held out): about its last `fraction`, whole lines. Raises UserError."""
    at = len(text) - round(len(text) * fraction)
    cut = text.rfind("\n", 0, at) + 1 or text.find("\n", at) + 1
    if cut in (0, len(text)):
        cut = at  # one line only
    head, tail = text[:cut], text[cut:]
    if not head.strip() or not tail.strip():
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(text)} characters leaves nothing on one side; "
            "give more text, or another fraction"
        )
    return head, tail


@dataclass
class _Side:
    """Row numbers of one side (train, validation or test) of one source, in its own table."""

    table: pa.Table
    hashes: np.ndarray
    rows: np.ndarray


def _load_tables(sources: list[Source], data: Data, kind: Kind) -> datasets.DatasetDict:
    import datasets
    import numpy as np

    sides: dict[str, list[_Side]] = {"train": [], "validation": [], "test": []}
    for found in _each(sources, lambda source: _load_source(source, data, kind)):
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
        say(f"data: {shown}: left out {_count(int(leaks.sum()), 'training row')} that also stand in the held-out rows")
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

    train, validation, test = _choose_splits(source, data)
    wanted = {"train": train, "validation": validation, "test": test}
    names = [side for side, split in wanted.items() if split is not None]
    tables = _each(names, lambda side: _read(source, cast(str, wanted[side]), kind, data))
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


# --- streams --------------------------------------------------------------------------------------


def _load_streams(sources: list[Source], data: Data, kind: Kind) -> datasets.IterableDatasetDict:
    import datasets

    sides: dict[str, list[datasets.IterableDataset]] = {"train": [], "validation": [], "test": []}
    for found in _each(sources, lambda source: _stream_source(source, data, kind)):
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

    train, validation, test = _choose_splits(source, data)
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
    # a prompt keeps whatever columns the source has, so its types are known only once it is read
    features = None
    if kind != "prompt":
        types = _arrow_types(kind) | ({} if kind == "text" else {"tools": pa.string()})
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
        self.report = _Report(part.shown, on_bad_row)
        self.types = tuple(_arrow_types(kind))
        self.unseen = dict(columns or {})

    def __call__(self, number: int, row: Row | BadRow) -> Row | None:
        """The canonical row; None where it is skipped, blank, or on the other side. Raises UserError."""
        self.report.total += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if self.unseen:
                self.unseen = _still_unseen(self.unseen, row)
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
        if self.kind not in ("text", "prompt"):  # the features of a stream are fixed before its first row is read
            result.setdefault("tools", None)
        return result

    def _is_held_out(self, content: bytes) -> bool:
        import numpy as np

        assert self.chosen is not None
        hashes = np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), dtype=np.uint64)
        return int(_mixed(hashes, self.chosen[2])[0]) < self.chosen[1] * 2**64

    def finish(self) -> None:
        self.report.finish()
        _refuse_unseen(self.unseen, self.part.shown)


class _StreamBatch:
    """The same for datasets' batched map over a hub stream."""

    def __init__(self, part: Part, *how: Any):
        self.turn = _StreamRow(part, *how)

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        _refuse_unseen(_still_unseen(self.turn.unseen, batch), self.turn.part.shown)
        results = []
        bad = self.turn.report.bad
        for i, index in enumerate(indices):
            result = self.turn(index + 1, {name: batch[name][i] for name in names})
            if result is not None:
                results.append(result)
        if self.turn.report.bad > bad:  # a stream need not end, so what was skipped is said as it happens
            say(f"data: {self.turn.part.shown}: skipped {self.turn.report.bad} of {self.turn.report.total} rows so far")
        keys = dict.fromkeys([*self.turn.types, *(name for row in results for name in row)])
        if self.turn.kind not in ("text", "prompt"):
            keys["tools"] = None
        return {key: [row.get(key) for row in results] for key in keys}


# --- images ---------------------------------------------------------------------------------------


def _load_images(names: list[str], data: Data, kind: Kind) -> datasets.DatasetDict:
    """Images with their class (kind image) or caption (image_caption): builtin sets, folders, hub data sets.

    A folder is read by datasets' imagefolder: class subfolders, or metadata.csv / metadata.jsonl with file_name and a
    caption (or text) column.
    """
    import datasets

    if data.streaming:
        raise UserError("data.streaming: images are not streamed by this door; leave it out")
    found = _each(names, lambda name: _load_image_source(name, data, kind))
    splits: dict[str, list[datasets.Dataset]] = {}
    for one in found:
        for side, rows in one.items():
            splits.setdefault(side, []).append(rows)
    result = {}
    limits = {"train": data.max_samples, "validation": data.max_validation_samples}
    for side, parts in splits.items():
        if any(part.features.type != parts[0].features.type for part in parts):
            raise UserError(f"data.name: the columns of {', '.join(names)} differ in type and cannot be put together")
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts).shuffle(seed=data.seed)
        result[side] = rows.select(range(min(limits.get(side) or len(rows), len(rows))))
    return datasets.DatasetDict(result)


def _load_image_source(name: str, data: Data, kind: Kind) -> dict[str, datasets.Dataset]:
    import datasets

    from recipes.common.builtin import BUILTINS

    path = _existing(name)
    loaded: Mapping[str, Callable[[], datasets.Dataset]]
    if name in BUILTINS:
        builtin = BUILTINS[name]
        if reason := formats.misfit(builtin.kind, kind):
            raise UserError(f"data.name: builtin set {name!r} {reason}")
        loaded = {
            split: partial(lambda split: datasets.Dataset.from_list(builtin.load(split, data.seed)), split)
            for split in ("train", "validation", "test")
        }
        source = Source(name, tuple(loaded), lambda split: [])
    elif path is not None and path.is_dir():
        files = [file for file in _files(path) if file.suffix.lower() in IMAGE_FILES]
        if not files:
            raise UserError(f"data.name: folder {name!r} holds no image ({', '.join(sorted(IMAGE_FILES))})")
        _check_images(name, path, files)
        try:
            whole = datasets.load_dataset("imagefolder", data_dir=str(path))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"data.name: folder {name!r}: {_first_line(cause)}") from None
        loaded = {str(split): partial(lambda rows: rows, rows) for split, rows in whole.items()}
        source = Source(name, tuple(loaded), lambda split: [])
    elif path is not None:
        raise UserError(
            f"data.name: {name}: images come in a folder (class subfolders, or metadata.csv) or from the hub"
        )
    else:
        source = _open_hub(name, data)
        loaded = {}
    get = source.load or (lambda split: loaded[split]())
    train, validation, test = _choose_splits(source, data)
    sides = {"train": train, "validation": validation, "test": test}
    result = {side: _picked(get(split), name, kind, data) for side, split in sides.items() if split is not None}
    if validation is None:
        hashes = _image_hashes(result["train"])
        try:
            out = held_out(hashes, data.validation_fraction, data.seed)
        except UserError as error:
            raise UserError([f"{name}: {problem}" for problem in error.problems]) from None
        whole_train = result["train"]
        result["train"], result["validation"] = (
            whole_train.select((~out).nonzero()[0]),
            whole_train.select(out.nonzero()[0]),
        )
    return result


def _picked(rows: datasets.Dataset, name: str, kind: Kind, data: Data) -> datasets.Dataset:
    """Our columns of `kind` under our names; a builtin set's own further columns stay."""
    from recipes.common.builtin import BUILTINS

    if name in BUILTINS:
        return rows
    try:
        names = formats.picked_columns(rows.column_names, kind, data.columns)
    except BadRow as bad:
        raise UserError(f"data.name: {name}: {bad}") from None
    rows = rows.select_columns(list(names.values()))
    return rows.rename_columns({theirs: ours for ours, theirs in names.items() if ours != theirs})


def _image_hashes(rows: datasets.Dataset) -> np.ndarray:
    """uint64 [rows], of the bytes of the image files."""
    import datasets
    import numpy as np

    digests = []
    for row in rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)):
        image = cast(dict[str, Any], row)["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        digests.append(hashlib.blake2b(content, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _check_images(name: str, folder: Path, files: list[Path]) -> None:
    """Raise UserError for files that are called images and are none: they would fail in the middle of training."""
    from PIL import Image, UnidentifiedImageError

    bad = []
    for file in files:
        try:
            with Image.open(file):
                pass
        except (UnidentifiedImageError, OSError) as error:
            reason = "is empty" if file.stat().st_size == 0 else f"is not an image: {_first_line(error)}"
            bad.append(f"{os.path.join(name, file.relative_to(folder))} {reason}")
    if bad:
        rest = [f"... and {len(bad) - PROBLEMS_SHOWN} more"] if len(bad) > PROBLEMS_SHOWN else []
        raise UserError(
            [*bad[:PROBLEMS_SHOWN], *rest, f"{name}: {len(bad)} of {len(files)} images are bad: remove them"]
        )


# --- small things ---------------------------------------------------------------------------------


def _each(items: Sequence[Any], do: Callable[[Any], Any]) -> list[Any]:
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


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _some(words: Sequence[str], count: int | None = None) -> str:
    count = len(words) if count is None else count
    return ", ".join(words[:3]) + (", ..." if count > min(3, len(words)) else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
