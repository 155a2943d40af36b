"""Real text and code on every machine that can run us: the running Python's own manual pages and standard library.

The manual is `pydoc_data.topics` (what `help("for")` shows); the code is every .py file of the standard library that a
person wrote. About 10 MB on Python 3.11. Nothing is copied or cached: it is read anew each time, in under a second.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.common.builtin.split import check_split, split_of
from recipes.common.errors import UserError

HELD_OUT = 4  # percent of the documents in validation, and as many in test
LEAST_BYTES = 1_000_000  # with less than this there is nothing to train on

# Not the library: what was installed beside it, its caches, its tests (as large, and of another kind), and its codecs
# (tables, and one short file forty times over).
LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
}
LEFT_OUT_FILES = re.compile(r"_sysconfigdata_.*|sitecustomize|usercustomize")  # written by the build or by the user
LARGEST_FILE = 400_000  # bytes; a larger source file is data
TABLE_CHARACTERS = 5_000  # files shorter than this are too short to tell
TABLE_SHARE = (
    0.10  # the least share of digits or escapes that makes a file a table (code: under 0.06; codecs: over 0.11)
)
DIGITS = re.compile(r"[0-9]")
ESCAPES = re.compile(r"0x[0-9a-fA-F]+|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}")
TOPIC_REPEATED = (
    0.8  # a topic with at least this share of its text in one longer topic is left out: "for" in "compound"
)


def load(split: str, seed: int) -> list[dict[str, Any]]:
    """The documents of one split as rows {"text", "path"}, in an order given by the seed.

    A document's split depends on its path alone. Raises UserError when this Python came without its source.
    """
    check_split(split)
    rows = [{"text": text, "path": path} for path, text in documents() if split_of(path, HELD_OUT) == split]
    random.Random(seed).shuffle(rows)
    return rows


def documents() -> list[tuple[str, str]]:
    """All documents as (path, text), sorted by path, no text twice. Raises UserError when under 1 MB was found."""
    unique: dict[str, str] = {}  # text -> the first path that has it: the same text never lies in two splits
    for path, text in sorted([*topics(), *sources()]):
        unique.setdefault(text, path)
    found = sum(map(len, unique))
    if found < LEAST_BYTES:
        folder = sysconfig.get_path("stdlib")
        raise UserError(
            f"data.name: pydocs reads the source of the standard library, and {folder} holds only {found:,} characters "
            "of it. Run a Python that comes with its source (python.org, pyenv, uv, conda, or a distribution's full "
            "python3 package), or point data.name at a text file"
        )
    return [(path, text) for text, path in unique.items()]


def topics() -> Iterator[tuple[str, str]]:
    """The manual's topics, less those that a longer topic holds nearly whole (they would leak over the splits)."""
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions package it apart
        return
    from pydoc_data.topics import topics as texts  # type: ignore[import-untyped]

    held: dict[str, set[str]] = defaultdict(set)  # paragraph -> the kept topics that have it
    for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        shared: dict[str, int] = defaultdict(int)  # kept topic -> characters that it shares with this one
        for paragraph in paragraphs:
            for other in held.get(paragraph, ()):
                shared[other] += len(paragraph)
        if max(shared.values(), default=0) >= TOPIC_REPEATED * sum(map(len, paragraphs)):
            continue
        for paragraph in paragraphs:
            held[paragraph].add(name)
        yield f"topics/{name}", text.strip() + "\n"


def sources() -> Iterator[tuple[str, str]]:
    """The standard library's source files as (path below the library's folder, text with \\n line ends)."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(set(inner) - LEFT_OUT_FOLDERS)
        for name in files:
            path = Path(folder, name)
            if path.suffix != ".py" or LEFT_OUT_FILES.fullmatch(path.stem) or path.stat().st_size > LARGEST_FILE:
                continue
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:  # a few files are in another encoding on purpose
                continue
            text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
            if text and not is_table(text):
                yield path.relative_to(root).as_posix(), text + "\n"


def is_table(text: str) -> bool:
    """Whether a source file is mostly numbers: a codec's map, a unicode table."""
    if len(text) < TABLE_CHARACTERS:
        return False
    escaped = sum(map(len, ESCAPES.findall(text)))
    return max(len(DIGITS.findall(text)), escaped) >= TABLE_SHARE * len(text)
