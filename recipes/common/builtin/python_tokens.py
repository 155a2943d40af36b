"""The standard library's code with what each word of it is: a keyword, a name, an operator, a string, a number, a comment.

The files and splits of `pydocs`; the tags are what the standard library's own `tokenize` module says of each place in a
file. The same word may be a keyword in one place and in a comment in another.
"""

from __future__ import annotations

import io
import keyword
import random
import re
import token as kinds
import tokenize
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from recipes.common.builtin import pydocs

WORD = re.compile(r"\s*(?:\w+|[^\w\s])")
WORDS_A_ROW = 40  # at most; a row is whole lines
ROWS_A_FILE = 12  # at most, from all over the file
TAGS = {
    kinds.NAME: "name",
    kinds.OP: "operator",
    kinds.STRING: "string",
    kinds.NUMBER: "number",
    kinds.COMMENT: "comment",
}


def load(split: str, seed: int) -> list[dict[str, Any]]:
    """Rows of code, a few from each file of the split."""
    rows: list[dict[str, Any]] = []
    draw = random.Random(f"python_tokens {split} {seed}")
    for document in pydocs.load(split, seed):
        if document["path"].endswith(".py"):
            of_file = list(rows_of(document["text"]))
            rows += draw.sample(of_file, min(ROWS_A_FILE, len(of_file)))
    draw.shuffle(rows)
    return rows


def rows_of(source: str) -> Iterator[dict[str, Any]]:
    """Whole lines of a file, up to 40 words a row, with their tags; a file that Python cannot tokenize gives none."""
    try:
        spans = list(_spans(source))
    except (tokenize.TokenError, SyntaxError):  # code for another version of Python
        return
    starts = [start for start, _, _ in spans]
    words: list[str] = []
    tags: list[str] = []
    for line in re.finditer(r"[^\n]*\n", source):
        found = []
        for match in WORD.finditer(source, line.start(), line.end()):
            place = match.end() - 1  # a word's last character: its first may be a space
            span = bisect_right(starts, place) - 1
            if span >= 0 and place < spans[span][1]:
                found.append((match[0], spans[span][2]))
        if words and len(words) + len(found) > WORDS_A_ROW:
            yield {"words": words, "tags": tags}
            words, tags = [], []
        for i, (word, tag) in enumerate(found[:WORDS_A_ROW]):
            words.append("\n" + word if i == 0 and words else word)
            tags.append(tag)
    if words:
        yield {"words": words, "tags": tags}


def _spans(source: str) -> Iterator[tuple[int, int, str]]:
    """The tokens of a file as (first character, character behind, tag), in order."""
    lines = [0]
    for line in io.StringIO(source):  # splitlines would also split at form feeds, and tokenize does not
        lines.append(lines[-1] + len(line))
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        # Python 3.12 gives an f-string in parts: its literal ones are FSTRING_*
        name = "string" if tokenize.tok_name[found.type].startswith("FSTRING") else TAGS.get(found.type)
        if name == "name" and keyword.iskeyword(found.string):
            name = "keyword"
        if name is not None:
            yield lines[found.start[0] - 1] + found.start[1], lines[found.end[0] - 1] + found.end[1], name
