"""The builtin sets of the running Python's documentation and source: the text, and the questions about it."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from recipes.common.builtin import pydocs, pydocs_qa
from recipes.common.builtin.split import SPLITS
from recipes.common.errors import UserError
from tests.common.test_builtin import Row, prompt, rows

# --------------------------------------------------------------------------------------------------------- pydocs


def test_pydocs_is_real_text_of_the_size_it_claims() -> None:
    documents = dict(pydocs.documents())
    assert 7e6 < sum(len(text.encode()) for text in documents.values()) < 16e6
    for path in ("shutil.py", "json/decoder.py", "asyncio/events.py", "topics/compound", "topics/assignment"):
        assert len(documents[path]) > 1_000, path
    assert not any("\r" in text for text in documents.values())


def test_pydocs_leaves_out_tests_tables_and_what_is_not_the_library() -> None:
    paths = [path for path, _ in pydocs.documents()]
    folders = {folder for path in paths for folder in path.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
    assert not {"stringprep.py", "html/entities.py"} & set(paths)
    assert not any("_sysconfigdata" in path for path in paths)
    assert {"locale.py", "statistics.py", "stat.py"} <= set(paths)  # code with many numbers is still code


def test_pydocs_splits_are_disjoint_by_path_and_by_text_and_complete() -> None:
    splits = {split: {row["path"]: row["text"] for row in rows("pydocs", split)} for split in SPLITS}
    for one, other in combinations(splits.values(), 2):
        assert not one.keys() & other.keys()
        assert not set(one.values()) & set(other.values())
    assert sum(map(len, splits.values())) == len(pydocs.documents())
    bytes_of = {split: sum(map(len, texts.values())) for split, texts in splits.items()}
    assert bytes_of["train"] > 0.85 * sum(bytes_of.values())
    assert min(bytes_of.values()) > 150_000  # enough to measure bits per byte on


def test_held_out_pydocs_are_not_repeated_in_the_training_text() -> None:
    def passages(texts: list[Row]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for row in texts:
            lines = [line for line in map(str.strip, row["text"].splitlines()) if len(line) > 12]
            found.update(zip(lines, lines[1:], lines[2:], strict=False))
        return found

    train = passages(rows("pydocs", "train"))
    for split in ("validation", "test"):
        held_out = passages(rows("pydocs", split))
        assert len(held_out & train) < 0.03 * len(held_out)


def test_pydocs_loads_fast() -> None:
    start = time.process_time()
    pydocs.load("train", 0)
    assert time.process_time() - start < 2


def test_a_python_without_its_source_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"holds only [\d,]+ characters"):
        pydocs.load("train", 0)


def test_sources_normalise_line_ends_and_skip_what_they_cannot_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "dos.py").write_bytes("\ufeffx = 1\r\ny = 2\r\n\r\n".encode())
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# Zürich\n".encode("latin-1"))
    (tmp_path / "table.py").write_text("table = [" + "0x4e00, " * 2_000 + "]\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "inner.py").write_text("pass\n")
    assert list(pydocs.sources()) == [("dos.py", "x = 1\ny = 2\n")]


# ------------------------------------------------------------------------------------------------------ pydocs_qa


@pytest.mark.slow
def test_questions_lie_in_the_split_of_their_file() -> None:
    for split in SPLITS:
        files = {row["path"] for row in rows("pydocs", split)}
        assert {row["path"] for row in rows("pydocs_qa", split)} <= files


def test_questions_are_many_and_spread() -> None:
    train = rows("pydocs_qa", "train")
    assert 2_000 < len(train) < 10_000
    assert min(len(rows("pydocs_qa", split)) for split in ("validation", "test")) >= 80
    assert len({prompt(row) for row in train}) == len(train)
    assert max(Counter(row["path"] for row in train).values()) <= pydocs_qa.MOST_OF_A_FILE
    assert len({row["path"] for row in train}) > 150
    openings = Counter(" ".join(prompt(row).split()[:2]) for row in train)
    assert max(openings.values()) < 0.4 * len(train)


def test_answers_stand_in_the_file_they_name() -> None:
    """Every word of an answer is in the file, and a sentence from a docstring is there as it is but for its markup."""

    def plain(text: str) -> str:
        for pattern, replacement in pydocs_qa.MARKUP:
            text = pattern.sub(replacement, " ".join(text.split()))
        return text

    sources = {row["path"]: plain(row["text"]) for row in rows("pydocs", "validation")}
    for row in rows("pydocs_qa", "validation"):
        answer, source = row["messages"][1]["content"], sources[row["path"]]
        assert len(answer) <= pydocs_qa.LONGEST
        if answer.startswith("`") and prompt(row).count("`") == 2:  # a name or a list of parameters
            if answer != f"`{row['name']}`":
                assert all(f"{name.strip('`')}" in source for name in answer.split(", "))
        else:
            assert plain(answer).removesuffix(".") in source, row


def test_a_docstring_becomes_the_questions_it_can_answer() -> None:
    text = '''
"""Ways to copy a thing."""

def copy_thing(source, target, *, links=False):
    """Put the first thing where the :class:`Second` is.

    If links is true, *source* is not followed into target.
    Returns the place as a string.  Raises ``KeyError`` if there is no such place.
    """

def _hidden(): """Nobody asks about what is private."""

class Box:
    """Holds the things of somebody."""
    def size(self): """Return how many things are inside."""
    def tbd(self): """XXX to be written, if ever."""
'''
    found = {thing.name: thing for thing in pydocs_qa.documented("things/__init__.py", text)}
    assert {name: thing.kind for name, thing in found.items()} == {
        "things": "module",
        "things.copy_thing": "function",
        "things.Box": "class",
        "things.Box.size": "method",
        "things.Box.tbd": "method",
    }
    summaries = {name: pydocs_qa.summary(thing) for name, thing in found.items()}
    assert summaries == {
        "things": "Ways to copy a thing.",
        "things.copy_thing": "Put the first thing where the `Second` is.",
        "things.Box": "Holds the things of somebody.",
        "things.Box.size": "Return how many things are inside.",
        "things.Box.tbd": "",
    }
    pairs = {
        pair
        for seed in range(20)
        for pair in pydocs_qa.ask(found["things.copy_thing"], summaries["things.copy_thing"], random.Random(seed))
    }
    assert {answer for _, answer in pairs} == {
        "Put the first thing where the `Second` is.",
        "`things.copy_thing`",
        "`source`, `target`, `links`",
        "Returns the place as a string.",
        "Raises `KeyError` if there is no such place.",
    }
    assert ("When does `things.copy_thing` raise `KeyError`?", "Raises `KeyError` if there is no such place.") in pairs
