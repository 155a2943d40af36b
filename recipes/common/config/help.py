"""`--help`: the keys of a config, what they mean, their types in words and their defaults."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import re
import shutil
import textwrap
import tokenize
import typing
from pathlib import Path
from typing import Any

from recipes.common.config.arguments import config_names
from recipes.common.config.reading import flow, plain
from recipes.common.config.schema import Field, Library, keys_of
from recipes.common.config.values import narrowed, words
from recipes.common.config.walk import Part
from recipes.common.errors import UserError


def help_text(config_class: type, module_doc: str | None, recipe_path: str, section: str | None = None) -> str:
    """The text of `--help` (imports no library), or of `--help SECTION` (imports that section's).

    Raises UserError for an unknown section.
    """
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    if section:
        return _section_help(config_class, recipe_path, section, width)
    names = config_names(Path("configs", *Path(recipe_path).with_suffix("").parts[-2:]))
    one_of = f", or one of {', '.join(names)}" if names else ""
    lines = [module_doc.strip()] if module_doc else []
    lines += ["", f"usage: python {recipe_path} [--config FILE] [--section.key value ...]", ""]
    lines += _table(
        [
            ("--config FILE", f"a YAML file{one_of}; several are layered, the last wins (default: cpu)"),
            ("--print-config", "show every value and where it comes from, as a config file; run nothing"),
            ("--dry-run", "check config, data and model; estimate memory, steps and time; train nothing"),
            ("--help [SECTION]", "this text, or the keys of one section"),
        ],
        width,
    )
    for field in keys_of(config_class).values():
        lines += ["", *_section_lines(field, field.name, width, brief=True)]
    return "\n".join(lines).strip() + "\n"


def _section_help(config_class: type, recipe_path: str, section: str, width: int) -> str:
    cls: type = config_class
    field: Field | None = None
    for depth, name in enumerate(section.split(".")):
        fields = keys_of(cls)
        known = [n for n, f in fields.items() if f.section]
        if name not in known:
            above = ".".join(section.split(".")[:depth])
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"--help {section}: "
                + (f"`{above}` has no section `{name}`" if above else f"there is no section `{name}`")
                + (f"; did you mean {near[0]}?" if near else "")
                + (f" The sections are: {', '.join(known)}" if known else "")
            )
        field = fields[name]
        cls = field.section.load() if isinstance(field.section, Library) else typing.cast(type, field.section)
    assert field is not None
    usage = f"usage: python {recipe_path} [--{section}.KEY VALUE ...]"
    return "\n".join([usage, "", *_section_lines(field, section, width, brief=False)]).strip() + "\n"


def _section_lines(field: Field, path: str, width: int, brief: bool, library: bool = False) -> list[str]:
    default = field.default()
    if field.section is None:
        return _table([_entry(field, path, default, {}, library)], width)
    note = " Optional: left out unless a key of it is given." if field.optional else ""
    if isinstance(field.section, Library) and brief:
        text = f"{path}: {field.section.path}, the library's own.{note} `--help {path}` lists its keys."
        if isinstance(default, dict) and default:
            text += f" This recipe sets {', '.join(f'{k} = {flow(plain(v))}' for k, v in default.items())}."
        return textwrap.wrap(text, width)
    part = Part.of(field, path, default, library)
    cls = part.load()
    what = f"{part.source.path}." if isinstance(part.source, Library) else " ".join(_own_docstring(cls).split())
    lines = textwrap.wrap(f"{path}: {what}{note}", width)
    for inner in keys_of(cls).values():
        if inner.section is not None and not part.library:
            lines += _section_lines(inner, part.key(inner.name), width, brief)
        else:
            row = _entry(inner, part.key(inner.name), part.below(inner), _comments(cls), part.library)
            lines += _table([row], width)
    return lines


def _entry(field: Field, path: str, default: Any, comments: dict[str, str], library: bool) -> tuple[str, str]:
    text = comments.get(field.name) or _first_sentence(field.help)
    kind = words(narrowed(field.name, field.hint) if library else field.hint)
    if field.section is not None:
        kind = "a mapping" + (" or null" if field.optional else "")
    shown = "must be given" if default is dataclasses.MISSING else f"default: {flow(plain(default))}"
    return f"--{path}", f"{text} [{kind}; {shown}]".strip()


def _table(rows: list[tuple[str, str]], width: int) -> list[str]:
    column = 34
    lines: list[str] = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
        head = f"  {name}"
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        lines += [f"{head:<{column}}{wrapped[0]}", *(" " * column + line for line in wrapped[1:])]
    return lines


def _own_docstring(cls: type) -> str:
    """A class's first paragraph; not the signature that `dataclass` puts where there is none."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc.split("\n\n")[0]


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """What the source says about each key: the comment on a field's own line, or the docstring's entry for it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is object:
            continue
        for name in keys_of(cls):
            entry = re.search(
                rf"^([ \t]*){name}\s*(?:\(.*\))?\s*:[ \t]*(.*(?:\n\1[ \t]+\S.*)*)", base.__doc__ or "", re.MULTILINE
            )
            if entry:
                found[name] = _first_sentence(entry[2])
        try:
            source = textwrap.dedent(inspect.getsource(base))
            body = ast.parse(source).body[0]
        except (OSError, TypeError, SyntaxError):  # a class without a readable source: built in, or typed into a shell
            continue
        lines = {
            t.start[0]: t.string.lstrip("# ")
            for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type == tokenize.COMMENT
        }
        for statement in body.body if isinstance(body, ast.ClassDef) else ():
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                comment = lines.get(statement.lineno) or lines.get(statement.end_lineno or 0)
                if comment:
                    found[statement.target.id] = comment
    return {k: v for k, v in found.items() if not v.startswith(("noqa", "type:"))}


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s+(?=[A-Z`\[])", " ".join(text.split()), maxsplit=1)[0]
