"""Documented functions of the installed packages of the stack: labelled data that pretraining on `pydocs` never saw.

`pydocs` is the standard library; these functions are numpy's, torch's and six others', so what a pretrained model brings
to them is knowledge of code and of English, not of the rows. Splits go by file.

    pydocs_package   a docstring, the packages' own names blanked out  ->  which package it is from, 8 classes
    pydocs_match     a function's code and a docstring's first sentence  ->  whether they belong together
    pydocs_summary   a function's code  ->  its docstring's first sentence

The packages are pinned in requirements/, and their files are read, not imported.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from recipes.common.builtin.pydocs_qa import SENTENCE_END, Function, fit, paragraphs
from recipes.common.builtin.split import check_split, split_of
from recipes.common.errors import UserError

Row: TypeAlias = dict[str, Any]

PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch")
OWN_NAMES = re.compile(
    r"\b(matplotlib|mpl|pyplot|plt|networkx|nx|numpy|np|pandas|pd|scipy|sklearn|scikit-learn|sympy|pytorch|torch)\b",
    re.IGNORECASE,
)
HELD_OUT = 12  # percent of the files in validation, and as many in test
MOST_OF_A_FILE, MOST_OF_A_PACKAGE = 12, 700  # functions
FEW_OF_A_PACKAGE = 80  # functions; a dry run has all of the classes in a tenth of the time
SHORTEST_CODE, LONGEST_CODE, LONGEST_DOCSTRING = 60, 600, 300  # characters
LEFT_OUT = re.compile(r"test|_generated|_vendor|externals|__pycache__")


class Described(NamedTuple):
    """A function, what its docstring says, and where it is from."""

    package: str
    path: str  # below the package's folder
    code: str  # without the docstring
    summary: str  # the docstring's first sentence
    docstring: str  # its first paragraphs of plain prose


def load_package(split: str, seed: int, most: int = MOST_OF_A_PACKAGE) -> list[Row]:
    """Rows {"text": docstring, "text_pair": None, "label": package}, in an order given by the seed."""
    rows = []
    for thing in shuffled(split, seed, most):
        rows.append({"text": OWN_NAMES.sub("_", thing.docstring), "text_pair": None, "label": thing.package})
    return rows


def load_match(split: str, seed: int, most: int = MOST_OF_A_PACKAGE) -> list[Row]:
    """Rows {"text": code, "text_pair": summary, "label": "yes" | "no"}, in equal parts; "no" is a summary from the same package."""
    things = shuffled(split, seed, most)
    rng = random.Random(f"pydocs_match {split} {seed}")
    by_package: dict[str, list[str]] = {}
    for thing in things:
        by_package.setdefault(thing.package, []).append(thing.summary)
    rows = []
    for i, thing in enumerate(things):
        others = [summary for summary in by_package[thing.package] if summary != thing.summary]
        matches = i % 2 == 0 or not others
        summary = thing.summary if matches else rng.choice(others)
        rows.append({"text": thing.code, "text_pair": summary, "label": "yes" if matches else "no"})
    return rows


def load_summary(split: str, seed: int, most: int = MOST_OF_A_PACKAGE) -> list[Row]:
    """Rows {"source": code, "target": the first sentence of its docstring}, in an order given by the seed."""
    return [{"source": thing.code, "target": thing.summary} for thing in shuffled(split, seed, most)]


def shuffled(split: str, seed: int, most: int = MOST_OF_A_PACKAGE) -> list[Described]:
    check_split(split)
    things = [thing for thing in described(most) if split_of(f"{thing.package}/{thing.path}", HELD_OUT) == split]
    random.Random(f"packages {split} {seed}").shuffle(things)
    return things


@lru_cache(maxsize=1)
def described(most: int = MOST_OF_A_PACKAGE) -> tuple[Described, ...]:
    """All functions, at most so many of a package, no summary and no code twice. Raises UserError where a package is not installed."""
    found: dict[str, Described] = {}
    codes: set[str] = set()
    for package in PACKAGES:
        kept = 0
        for thing in functions(package):
            if thing.summary not in found and thing.code not in codes:
                found[thing.summary] = thing
                codes.add(thing.code)
                kept += 1
                if kept == most:
                    break
    return tuple(found.values())


def functions(package: str) -> Iterator[Described]:
    """The described functions of a package, its files in an order that mixes its folders."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.name: {package} is not installed, which `make setup` does")
    root = Path(next(iter(spec.submodule_search_locations)))
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    paths = sorted(path for path in paths if not LEFT_OUT.search(path))
    random.Random(package).shuffle(paths)
    for path in paths:
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        if len(text) > 400_000:
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, not Python
            continue
        of_file = 0
        for node in functions_below(tree):
            thing = describe(package, path, node)
            if thing is not None:
                yield thing
                of_file += 1
                if of_file == MOST_OF_A_FILE:
                    break


def functions_below(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a file in the order of `ast.walk`, which would also look into every expression: no function is in one."""
    level: list[ast.AST] = [tree]
    while level:
        below: list[ast.AST] = []
        for node in level:
            if isinstance(node, Function):
                yield node
            for field in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = getattr(node, field, None)
                below += inner if isinstance(inner, list) else []
        level = below


def describe(package: str, path: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Described | None:
    """What is kept of a function; None without a docstring that starts with a plain sentence, or without code to read."""
    prose = paragraphs(node)
    summary = fit(SENTENCE_END.split(prose[0])[0]) if prose[0] else ""
    if not summary or len(node.body) < 2:
        return None
    docstring = summary
    for paragraph in prose[1:]:
        if not paragraph or len(docstring) + len(paragraph) > LONGEST_DOCSTRING:
            break
        docstring += " " + paragraph
    bare = type(node)(**{field: getattr(node, field) for field in node._fields} | {"body": node.body[1:]})
    code = ast.unparse(ast.copy_location(bare, node))
    return Described(package, path, code, summary, docstring) if SHORTEST_CODE <= len(code) <= LONGEST_CODE else None
