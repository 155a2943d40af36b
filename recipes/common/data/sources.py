"""What a name in data.name stands for: a builtin set, a file, a folder, or a data set of the hub, with its splits."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.common import formats
from recipes.common.data.readers import (
    FILE_READERS,
    SPLIT_NAMES,
    Row,
    Rows,
    dataset_rows,
    json_row_line,
    json_splits,
    numbered_rows,
    read_parallel,
)
from recipes.common.data.words import first_line, say, some_of
from recipes.common.errors import UserError
from recipes.common.formats import Kind
from recipes.common.hub import is_cached, why_not_on_hub
from recipes.common.row_values import BadRow, listed, nearest
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets

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
# train.en, val.pt-BR.gz
PARALLEL = re.compile(r"(?P<split>[^.]+)\.(?P<language>[a-z]{2,3}([-_][A-Za-z]{2,4})?)(\.gz)?")
NOT_DATA = re.compile(r"(readme|licen[sc]e|copying|changelog)(\.\w+)?|dataset_infos?\.json", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Rows that come from one place: a file, a split of a builtin set or of a hub data set."""

    shown: str  # how messages name the place
    read: Callable[[], Rows]
    unit: Literal["line", "row", "document"] = "row"  # what a number counts; a document is a text file, one row
    stream: Callable[[], datasets.IterableDataset] | None = None  # the hub's own stream
    line_of: Callable[[int], int | None] | None = None  # where a row begins, in a file that people read


@dataclass(frozen=True)
class Source:
    """What one entry of data.name names: its splits, each of one or more parts."""

    name: str
    splits: tuple[str, ...]
    parts: Callable[[str], list[Part]]  # of a split, or of a slice of it where the source knows slices: "train[:10%]"
    native: str | None = None  # a builtin set's kind: its rows are canonical already
    load: Callable[[str], datasets.Dataset] | None = None  # a split as the hub has it; it knows slices
    streams: bool = False  # can be read piece by piece


def open_source(name: str, data: Data, kind: Kind, few: bool = False) -> Source:
    from recipes.common.builtin import BUILTINS

    if name in BUILTINS:
        builtin = BUILTINS[name]
        if reason := formats.misfit(builtin.kind, kind):
            raise UserError(f"data.name: builtin set {name!r} {reason}")
        if data.columns:
            raise UserError(
                f"data.columns: builtin set {name!r} needs no map, its columns are ours already; leave it out"
            )
        load = (builtin.load_few if few else None) or builtin.load
        source = Source(
            name,
            ("train", "validation", "test"),
            lambda split: [Part(f"{name} ({split})", partial(numbered_rows, partial(load, split, data.seed)))],
            native=builtin.kind,
        )
    elif (path := existing_path(name)) is not None:
        as_text = kind == "text" and not data.columns
        source = _open_folder(name, path, as_text) if path.is_dir() else _open_file(name, path)
    else:
        source = open_hub(name, data)
    if data.subset is not None and source.load is None:
        raise UserError(f"data.subset: {data.subset!r} picks a configuration of a hub data set; {name!r} has none")
    column = (data.columns or {}).get("split")
    return source if column is None else _split_by(source, column)


def _split_by(source: Source, column: str) -> Source:
    """The same rows in the splits that a column of theirs names."""
    splits: dict[str, dict[Part, list[tuple[int, Row | BadRow]]]] = {}
    for part in (part for split in source.splits for part in source.parts(split)):
        for number, row in part.read():
            # a bad one is reported with the training rows
            named = "train" if isinstance(row, BadRow) else row.get(column)
            if not isinstance(named, str) or not named.strip():
                has = listed(row) if not isinstance(row, BadRow) and column not in row else f"{column!r} is {named!r}"
                raise UserError(
                    f"data.columns: split is mapped to {column!r}, and row {number} of {part.shown} names none: {has}"
                )
            named = SPLIT_NAMES.get(named.lower(), named)
            splits.setdefault(named, {}).setdefault(part, []).append((number, row))

    def parts(split: str) -> list[Part]:
        return [Part(f"{part.shown} ({split})", partial(iter, rows), part.unit) for part, rows in splits[split].items()]

    return Source(source.name, tuple(splits), parts)


def existing_path(name: str) -> Path | None:
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
        splits = json_splits(name, path)
        if splits is not None:
            return Source(
                name,
                tuple(splits),
                lambda split: [
                    Part(
                        name if len(splits) == 1 else f"{name} ({split})",
                        partial(numbered_rows, lambda: splits[split]),
                        line_of=partial(json_row_line, path, split),
                    )
                ],
            )
        file_format = "jsonl"  # JSON lines that are called .json, as many on the hub are
    part = _file_part(name, path, file_format)
    return Source(name, ("train",), lambda split: [part], streams=file_format != "text")


def _open_folder(name: str, path: Path, as_text: bool) -> Source:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # Dataset.save_to_disk
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.name: {name}: a damaged folder of save_to_disk: {first_line(error)}") from None
        whole = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return Source(
            name,
            tuple(str(split) for split in whole),
            lambda split: [Part(f"{name} ({split})", partial(dataset_rows, lambda: whole[split]))],
        )
    files = [file for file in files_below(path) if not NOT_DATA.fullmatch(file.name)]
    by_format: dict[str, list[Path]] = {}
    unknown = []
    for file in files:
        if file_format := _format_of(file):
            by_format.setdefault(file_format, []).append(file)
        else:
            unknown.append(str(file.relative_to(path)))
    if not by_format and (parallel := _parallel_text(name, path, files, as_text)):
        return parallel
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
        say(f"data: {name}: left out, for no reader knows them: {some_of(unknown)}")
    ((file_format, files),) = by_format.items()
    splits: dict[str, list[Part]] = {}
    insides = [file.relative_to(path) for file in files]
    for file, inside, split in zip(files, insides, _splits_of(name, insides, file_format == "text"), strict=True):
        shown = os.path.join(name, inside)
        _check_readable(shown, file)
        if file_format == "json":
            by_split = json_splits(shown, file)
            if by_split is None:
                part = _file_part(shown, file, "jsonl")
            elif len(by_split) > 1:
                raise UserError(
                    f"data.name: {shown} holds splits of its own ({', '.join(by_split)}): name the file itself"
                )
            else:
                line_of = partial(json_row_line, file, next(iter(by_split)))
                part = Part(shown, partial(numbered_rows, partial(_first_value, by_split)), line_of=line_of)
        else:
            part = _file_part(shown, file, file_format)
        splits.setdefault(split, []).append(part)
    there = tuple(split for split in ("train", "validation", "test") if split in splits)
    if len(there) > 1:
        served = [f"{split}: {some_of([part.shown for part in splits[split]])}" for split in there]
        say(f"data: {name}: by their names, {'; '.join(served)}")
    return Source(
        name,
        there,
        splits.__getitem__,
        streams=file_format not in ("text", "json"),
    )


def _parallel_text(name: str, path: Path, files: list[Path], as_text: bool) -> Source | None:
    """A folder of train.en, train.de, val.en, ...: the same lines in several languages. None where it is no such folder."""
    splits: dict[str, dict[str, Path]] = {}
    for file in files:
        found = PARALLEL.fullmatch(file.name)
        if found is None or file.parent != path:
            return None
        split = SPLIT_NAMES.get(found["split"].lower(), found["split"])
        splits.setdefault(split, {})[found["language"]] = file
    languages = {language for of_split in splits.values() for language in of_split}
    if len(languages) < 2:
        return None
    if lacking := [f"{split}.{one}" for split, found in splits.items() for one in sorted(languages - set(found))]:
        raise UserError(f"data.name: {name}: parallel text in {listed(sorted(languages))} lacks {listed(lacking)}")
    for file in files:
        _check_readable(os.path.join(name, file.name), file)

    def parts(split: str) -> list[Part]:
        shown = f"{name} ({split})"
        return [Part(shown, partial(read_parallel, shown, splits[split], as_text), "line")]

    return Source(name, tuple(splits), parts)


def files_below(folder: Path) -> list[Path]:
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
    return Part(shown, partial(FILE_READERS[file_format], shown, path), units.get(file_format, "line"))


def _format_of(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return FILE_FORMATS.get(os.path.splitext(name)[1])


def _unknown_format(path: Path) -> str:
    return (
        f"no reader for files called {path.name!r}; known endings are {', '.join(FILE_FORMATS)}, each also with .gz. "
        "Rename the file if its content is one of these"
    )


def _splits_of(name: str, insides: list[Path], documents: bool) -> list[str]:
    """The split of each file of a folder, by the words of its name and of the folders above it; train where none has any.

    gsm_train.jsonl, test-00000-of-00002-a1b2.parquet, dev/a.jsonl. A document's name is its title too (test_utils.py): unless
    every document names one split, only train.txt and the like do, and only where some train and some are held out: a tree of code
    has a folder test/, or a train.py.
    Raises UserError for files of no split beside some of train: they may be more training rows, or anything else.
    """
    named = [_splits_in_words(inside) for inside in insides]
    if documents and any(len(splits) != 1 for splits in named):
        titles = [str(inside) for inside, splits in zip(insides, named, strict=True) if splits]
        named = [_split_that_is_the_name(inside) for inside in insides]
        there = {split for splits in named for split in splits}
        if not all(named) and not ("train" in there and len(there) > 1):
            named = [[] for _ in insides]
        if titles and not any(named):
            say(f"data: {name}: one pile of documents, for not all are called after a split: {some_of(titles)}")
    problems = [
        f"data.name: folder {name!r}: {inside} names several splits ({', '.join(splits)}): call it after one"
        for inside, splits in zip(insides, named, strict=True)
        if len(splits) > 1
    ]
    without = [str(inside) for inside, splits in zip(insides, named, strict=True) if not splits]
    if without and any("train" in splits for splits in named):
        of_split = [f"{inside} ({splits[0]})" for inside, splits in zip(insides, named, strict=True) if splits]
        problems.append(
            f"data.name: folder {name!r}: some files are named after a split, as {some_of(of_split)}, and others are not: "
            f"{some_of(without)}. Put each below a folder called train, validation or test, or list in data.name what trains"
        )
    if problems:
        raise UserError(problems)
    return [splits[0] if splits else "train" for splits in named]


def _splits_in_words(inside: Path) -> list[str]:
    """All splits that the words of a path name: gsm_train.jsonl, train_sft/0.jsonl. The ending is none of its words."""
    path = os.path.splitext(str(inside).lower().removesuffix(".gz"))[0]
    return list(dict.fromkeys(SPLIT_NAMES[word] for word in re.split(r"[\W\d_]+", path) if word in SPLIT_NAMES))


def _split_that_is_the_name(inside: Path) -> list[str]:
    """The split that a folder or the file is called, numbers aside: test/a.txt, train-00000-of-00002.txt. The folder goes first."""
    stem = re.sub(r"[-_]\d+(-of-\d+)?(-[0-9a-f]+)?$", "", inside.name.split(".")[0].lower())
    words = (*(folder.lower() for folder in inside.parts[:-1]), stem)
    return [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES][:1]


def open_hub(name: str, data: Data) -> Source:
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
            Part(f"{name} ({split})", partial(dataset_rows, partial(load, split)), stream=partial(load, split, True))
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

    near = nearest(name, BUILTINS)
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
    while existing_path(str(folder)) is None and folder != folder.parent:
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


def _first_value(rows: dict[str, list[Any]]) -> list[Any]:
    return next(iter(rows.values()))
