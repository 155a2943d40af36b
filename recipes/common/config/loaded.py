"""A loaded config: its values, where they come from, and the instances that are made of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from recipes.common.config.arguments import Arguments
from recipes.common.config.reading import DEFAULT, flow, plain
from recipes.common.config.schema import Library, keys_of
from recipes.common.config.values import words
from recipes.common.config.walk import Part, no_library
from recipes.common.errors import UserError

LibraryDefaults = Callable[[str, type, dict[str, Any]], Mapping[str, tuple[Any, str]]]


def refuse(problems: list[str]) -> None:
    """Raise UserError with the problems, if there are any: each once, each on one line whatever was typed."""
    if problems:
        shown = (re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda m: repr(m[0])[1:-1], text) for text in problems)
        raise UserError(list(dict.fromkeys(shown)))


class Loaded:
    """What the command line and the files say, checked. `build()` makes the config; nothing is constructed before.

    `help` is None, "" (`--help`) or a section's name (`--help lora`); with it set nothing was read, and only
    `help_text` makes sense. `given` holds the dotted keys that the user set, in a file or on the command line.
    """

    def __init__(
        self,
        config_class: type,
        root: Part | None,
        origins: dict[str, str],
        library_defaults: LibraryDefaults | None,
        arguments: Arguments,
    ):
        self.config_class = config_class
        self.dry_run = arguments.dry_run
        self.print_config = arguments.print_config
        self.help = arguments.help
        self.given: set[str] = {key for key, origin in origins.items() if origin != DEFAULT}
        self._root = root
        self._origins = origins
        self._library_defaults = library_defaults

    @functools.cached_property
    def config(self) -> Any:
        """The config, an instance of the recipe's class. Raises UserError with all that its sections refuse."""
        problems: list[str] = []
        config = self._construct(self._whole, problems)
        refuse(problems)
        return config

    def build(self) -> Any:
        """The config, an instance of the recipe's class. Raises UserError with all that its sections refuse."""
        return self.config

    @property
    def values(self) -> dict[str, Any]:
        """What the user set and the recipe's own defaults, as plain data; `to_yaml` of it reproduces the run.

        Of library sections only what the user or the recipe set: what `library_defaults` chose for this machine is left
        out (also where it took the place of a recipe's default, once `build` or `print` has asked it).
        """
        return self._values(self._whole)

    def origin(self, key: str) -> str:
        """Where a dotted key's value is from: "default", "configs/x.yaml:12", "command line", or the frame's text."""
        if key in self._origins:
            return self._origins[key]
        part: Part | None = self._whole
        *sections, name = key.split(".")
        for section in sections:
            part = part.inside.get(section) if part else None
        if not sections and name not in keys_of(self.config_class):
            raise KeyError(key)
        return part.filled[name][1] if part and name in part.filled else DEFAULT

    def print(self) -> str:
        """Every value and its origin, as YAML: what `to_yaml` would write stands as it is, the rest as comments.

        Of a library section first what was set, then what the frame chose, then the library's defaults.
        """
        problems: list[str] = []
        for part in _parts(self._whole):
            self._fill(part, problems)
        refuse(problems)
        rows = list(self._rows(self._whole, 0))
        width = min(max((len(text) for text, origin in rows if origin), default=0), 60)
        return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows) + "\n"

    @property
    def _whole(self) -> Part:
        if self._root is None:
            raise RuntimeError("with --help nothing was read: use help_text")
        return self._root

    def _fill(self, part: Part, problems: list[str]) -> type | None:
        """Import the section's class and ask the frame for what the user left unset."""
        try:
            cls = part.load()
        except ImportError as error:
            problems.append(no_library(part, error))
            return None
        if isinstance(part.source, Library) and self._library_defaults and not part.filled:
            try:
                chosen = self._library_defaults(part.path, cls, self._given(part))
            except UserError as error:
                problems.extend(error.problems)
                return None
            part.filled = {k: v for k, v in chosen.items() if k not in part.given and k not in part.inside}
        own = part.default if isinstance(part.default, dict) else {}
        if stray := (own.keys() | part.filled.keys()) - keys_of(cls).keys():
            # A mistake of ours, not of the user.
            raise TypeError(f"a default is given for {part.key(min(stray))}, which {cls.__name__} has not")
        return cls

    def _given(self, part: Part) -> dict[str, Any]:
        """What the user set in a library section."""
        return part.given | {k: None if inner is None else self._given(inner) for k, inner in part.inside.items()}

    def _construct(self, part: Part, problems: list[str]) -> Any:
        count = len(problems)
        cls = self._fill(part, problems)
        if cls is None:
            return None
        values: dict[str, Any] = {}
        for field in keys_of(cls).values():
            value = part.recipe_default(field.name)
            if field.name in part.filled:
                value = part.filled[field.name][0]
            value = part.given.get(field.name, value)
            if field.name in part.inside:
                inner = part.inside[field.name]
                value = None if inner is None else self._construct(inner, problems)
            elif value is dataclasses.MISSING and field.make_default is None:
                problems.append(
                    f"`{part.key(field.name)}` must be given: {words(field.hint)} (--{part.key(field.name)} VALUE)"
                )
            if value is not dataclasses.MISSING:
                values[field.name] = copy.deepcopy(value) if field.name not in part.inside else value
        if len(problems) > count:
            return None
        try:
            return cls(**values)
        except UserError as error:
            problems.extend(_told(part, problem) for problem in error.problems)
        except Exception as error:
            usual = isinstance(error, ValueError | ImportError | NotImplementedError)
            if not usual and not part.library:
                raise  # a mistake of ours, not of the user
            logging.getLogger(__name__).debug("%s refuses its values", cls.__name__, exc_info=True)
            message = " ".join(str(error).split())
            problems.append(_told(part, message if usual else f"{type(error).__name__}: {message}"))
        return None

    def _values(self, part: Part) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if part.library:
            own = part.default if isinstance(part.default, dict) else {}
            known = {k: v for k, v in own.items() if k not in part.filled} | part.given
            order = list(keys_of(part.load())) if part.given else list(known)
            found = {k: plain(known[k]) for k in order if k in known}
            found |= {k: None if inner is None else self._values(inner) for k, inner in part.inside.items()}
            return found
        for field in keys_of(part.load()).values():
            if field.name in part.inside:
                inner = part.inside[field.name]
                found[field.name] = None if inner is None else self._values(inner)
            else:
                value = part.given.get(field.name, part.below(field))
                if value is not dataclasses.MISSING:
                    found[field.name] = plain(value)
        return found

    def _rows(self, part: Part, depth: int) -> Iterator[tuple[str, str]]:
        """(text, origin) a line; the origin is empty for a heading."""
        space = "  " * depth
        fields = keys_of(part.load())
        known = {k: value for k, (value, _) in part.filled.items()} | part.given
        own = part.default if part.library and isinstance(part.default, dict) else {}
        names = list(fields)
        if part.library:
            names.sort(
                key=lambda n: 0 if n in part.given or n in part.inside else 1 if n in part.filled or n in own else 2
            )
        for name in names:
            key = part.key(name)
            if name in part.inside:
                if depth == 0 and name != names[0]:
                    yield "", ""
                inner = part.inside[name]
                if inner is None:
                    yield f"{space}{name}: null", self.origin(key)
                    continue
                title = f"  # {inner.source.path}" if isinstance(inner.source, Library) else ""
                yield f"{space}{name}:{' {}' if not self._values(inner) else ''}{title}", ""
                yield from self._rows(inner, depth + 1)
                continue
            active = name in part.given or (name not in part.filled and (name in own or not part.library))
            value = known[name] if name in known else part.below(fields[name])
            if value is dataclasses.MISSING:
                yield f"{space}# {name}:", "must be given"
            else:
                yield from self._row(name, plain(value), key, space if active else f"{space}# ", self.origin(key))

    def _row(self, name: str, value: Any, key: str, space: str, inherited: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            yield f"{space}{flow(name)}:", ""
            for k, v in value.items():
                origin = self._origins.get(f"{key}.{k}", inherited)
                yield from self._row(k, v, f"{key}.{k}", space + "  ", origin)
        else:
            yield f"{space}{flow(name)}: {flow(value)}", self._origins.get(key, inherited)


def _parts(part: Part) -> Iterator[Part]:
    yield part
    for inner in part.inside.values():
        if inner is not None:
            yield from _parts(inner)


def _told(part: Part, message: str) -> str:
    return f"{part.path}: {message}" if part.path else message
