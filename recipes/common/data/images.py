"""Images with their class or caption: builtin sets, folders, hub data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipes.common import formats
from recipes.common.data.sources import IMAGE_FILES, Source, existing_path, files_below, open_hub
from recipes.common.data.splits import choose_splits, held_out
from recipes.common.data.words import PROBLEMS_SHOWN, each, first_line, say
from recipes.common.errors import UserError
from recipes.common.formats import Kind
from recipes.common.row_values import BadRow
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets
    import numpy as np


def load_images(names: list[str], data: Data, kind: Kind) -> datasets.DatasetDict:
    """Images with their class (kind image) or caption (image_caption): builtin sets, folders, hub data sets.

    A folder is read by datasets' imagefolder: class subfolders, or metadata.csv / metadata.jsonl with file_name and a
    caption (or text) column.
    """
    import datasets

    found = each(names, lambda name: _load_image_source(name, data, kind))
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

    path = existing_path(name)
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
        files = [file for file in files_below(path) if file.suffix.lower() in IMAGE_FILES]
        if not files:
            raise UserError(f"data.name: folder {name!r} holds no image ({', '.join(sorted(IMAGE_FILES))})")
        bad = _bad_images(name, path, files, data)
        try:
            whole = datasets.load_dataset("imagefolder", data_dir=str(path))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"data.name: folder {name!r}: {first_line(cause)}") from None
        loaded = {str(split): partial(_without, rows, bad) for split, rows in whole.items()}
        source = Source(name, tuple(loaded), lambda split: [])
    elif path is not None:
        raise UserError(
            f"data.name: {name}: images come in a folder (class subfolders, or metadata.csv) or from the hub"
        )
    else:
        source = open_hub(name, data)
        loaded = {}
    get = source.load or (lambda split: loaded[split]())
    train, validation, test = choose_splits(source, data)
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


def _bad_images(name: str, folder: Path, files: list[Path], data: Data) -> set[Path]:
    """Files that are called images and are none, or are cut short, which would fail in the middle of training: counted and listed.

    Raises UserError for them unless data.on_bad_row is skip, and where no good one is left.
    """
    from PIL import Image, UnidentifiedImageError

    bad: dict[Path, str] = {}
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()  # a download that broke off has its header
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "is empty" if file.stat().st_size == 0 else f"is not a whole image: {first_line(error)}"
            bad[file.resolve()] = f"{os.path.join(name, file.relative_to(folder))} {reason}"
    if not bad:
        return set()
    lines = list(bad.values())[:PROBLEMS_SHOWN]
    lines += [f"... and {len(bad) - PROBLEMS_SHOWN} more"] if len(bad) > PROBLEMS_SHOWN else []
    if data.on_bad_row == "error" or len(bad) == len(files):
        advice = "remove them, or set data.on_bad_row: skip to leave them out"
        if len(bad) == len(files):
            advice = "nothing is left to use"
        raise UserError([*lines, f"{name}: {len(bad)} of {len(files)} images are bad: {advice}"])
    say(f"data: {name}: skipped {len(bad):,} of {len(files):,} images (data.on_bad_row: skip)")
    for line in lines:
        say(f"  {line}")
    return set(bad)


def _without(rows: datasets.Dataset, bad: set[Path]) -> datasets.Dataset:
    """The rows whose image is none of these files."""
    import datasets

    if not bad:
        return rows
    images = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    kept = [i for i, row in enumerate(images) if Path(cast(dict[str, Any], row)["image"]["path"]).resolve() not in bad]
    return rows.select(kept)
