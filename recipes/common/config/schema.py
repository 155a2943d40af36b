"""What a section of a config is: which keys it has, of which types, with which defaults."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin


@dataclasses.dataclass(frozen=True)
class Library:
    """A class named by its path, imported only when something needs it."""

    path: str

    def load(self) -> type:
        """Import the class. Raises ImportError when its library is not there."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


class Dotted:
    """A module imported under TYPE_CHECKING only: ruff turns `Section["a.B"]` into `Section[a.B]` where it can."""

    def __init__(self, path: str):
        self.path = path

    def __getattr__(self, name: str) -> Dotted:
        return Dotted(f"{self.path}.{name}")

    def __str__(self) -> str:
        return self.path


if TYPE_CHECKING:
    _T = typing.TypeVar("_T")
    Section = Annotated[_T, "section"]  # for a type checker the section simply is an instance of that class
else:

    class Section:
        """`Section["trl.SFTConfig"]`: a library's dataclass as a section; `| None = None` makes it optional."""

        def __class_getitem__(cls, path: str | Dotted) -> Any:
            return Annotated[Any, Library(str(path))]


def defaults(**values: Any) -> Callable[[], Any]:
    """A recipe's own defaults for a library section.

    `lora: Section["peft.LoraConfig"] = field(default_factory=defaults(r=16, lora_alpha=32))`
    """
    return lambda: dict(values)


@dataclasses.dataclass(frozen=True)
class Field:
    """A key of a section."""

    name: str
    hint: Any  # its annotation, evaluated; without what `section` says
    make_default: Callable[[], Any] | None  # None: the key must be given
    section: type | Library | None  # the class, where the key is a section of its own
    optional: bool  # takes null
    help: str = ""

    def default(self) -> Any:
        """A fresh default; MISSING when there is none."""
        return self.make_default() if self.make_default else dataclasses.MISSING


@functools.cache
def keys_of(cls: type) -> dict[str, Field]:
    """The keys of a class: a dataclass's fields, any other's (BitsAndBytesConfig) constructor arguments."""
    signature = inspect.signature(cls)
    arguments = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    declared = {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}
    found = {}
    if declared.keys() == arguments.keys():
        hints = _hints(cls, cls)
        for f in declared.values():
            make: Callable[[], Any] | None = None
            if f.default_factory is not dataclasses.MISSING:
                make = f.default_factory
            elif f.default is not dataclasses.MISSING:
                make = functools.partial(lambda value: value, f.default)
            found[f.name] = _field(f.name, hints.get(f.name, Any), make, str(f.metadata.get("help", "")))
        return found
    hints = _hints(vars(cls).get("__init__", cls), cls)
    for name, p in arguments.items():
        given = p.default is not p.empty
        guess = type(p.default) if type(p.default) in (bool, int, float) else Any
        make = functools.partial(lambda value: value, p.default) if given else None
        found[name] = _field(name, hints.get(name, guess), make, "")
    return found


def _hints(thing: Any, cls: type) -> dict[str, Any]:
    """The annotations of a class or of its constructor, evaluated."""
    raw = [a for base in cls.__mro__ for a in vars(base).get("__annotations__", {}).values() if isinstance(a, str)]
    names = {name: Dotted(name) for a in raw for name in re.findall(r"\bSection\[(\w+)", a)}
    try:
        return typing.get_type_hints(thing, localns=names or None, include_extras=True)
    except NameError:
        if cls.__module__.startswith(("recipes.", "__main__", "test")):
            raise  # a mistake of ours
    # A library names a type that exists for its type checker only: its own constructor judges that key alone.
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__) if thing is cls else [thing]:
        for name, hint in getattr(base, "__annotations__", {}).items():
            try:
                hints[name] = eval(hint, vars(sys.modules[base.__module__])) if isinstance(hint, str) else hint
            except NameError:
                hints[name] = Any
    return hints


def _field(name: str, hint: Any, make_default: Callable[[], Any] | None, help: str) -> Field:
    members = alternatives(hint)
    optional = type(None) in members or Any in members
    section: type | Library | None = None
    for member in members:
        if get_origin(member) is Annotated:
            section = next((m for m in member.__metadata__ if isinstance(m, Library)), section)
            if section is not None:
                optional = type(None) in members
        elif isinstance(member, type) and dataclasses.is_dataclass(member) and dict not in members:
            section = member
    rest = [m for m in members if not (section and (get_origin(m) is Annotated or m is section or m is type(None)))]
    return Field(name, union(rest) if rest else None, make_default, section, optional, help)


def union(members: Sequence[Any]) -> Any:
    """The Union of these types."""
    return functools.reduce(operator.or_, members)


def alternatives(hint: Any) -> list[Any]:
    """The alternatives of a Union; of anything else the thing itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return list(get_args(hint))
    return [hint]
