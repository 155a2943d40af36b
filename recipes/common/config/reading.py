"""YAML in and out: values that remember the file and line they were written on."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "command line"
DEFAULT = "default"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `3e-4` is a number, `no` and `on` are text, `0123` is not octal, a date is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_RESOLVERS = [
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:[0-9](?:_?[0-9])*|0x[0-9a-fA-F]+|0o[0-7]+)$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"^[-+]?(?:(?:[0-9](?:_?[0-9])*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[0-9](?:_?[0-9])*\.[0-9]*|\.[0-9]+"
            r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    ),
    (_MERGE, re.compile(r"^<<$"), ["<"]),
]
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back; text that an older reader would take for a switch (`no`) is quoted too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
for _character, _pairs in yaml.SafeDumper.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers[_character] = [*_Dumper.yaml_implicit_resolvers.get(_character, []), *_pairs]


@dataclasses.dataclass
class Node:
    """A value as the user wrote it."""

    value: Any  # a scalar, a list of nodes, or a dict of nodes
    origin: str  # "configs/x.yaml:3" or "command line"
    raw: str = ""  # a scalar's own text
    flag: str = ""  # on the command line: the key as typed
    quoted: bool = False
    whole: bool = False  # a mapping written whole on the command line: replaces what files say
    said: bool = False  # what is wrong with it is among the problems already
    broken: str = ""  # on the command line: why the value is no YAML (it may still be good text)

    @property
    def where(self) -> str:
        """The place that an error names."""
        return f"(--{self.flag})" if self.flag else f"({self.origin})"

    def plain(self, text_keys: bool = False) -> Any:
        """The value without places."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {str(k) if text_keys else k: item.plain() for k, item in self.value.items()}
        return self.value

    def texts(self) -> Any:
        """The value with every number as the text that was written: `name: 007` is a name where a name is expected."""
        if isinstance(self.value, list):
            return [item.texts() for item in self.value]
        if isinstance(self.value, dict):
            return {str(k): item.texts() for k, item in self.value.items()}
        return self.raw if isinstance(self.value, int | float) and not isinstance(self.value, bool) else self.value


class Reader:
    """Turns YAML text into nodes; collects what is wrong with it."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def read_file(self, path: Path) -> Node | None:
        """A file's mapping, or None and a problem."""
        label = shown_path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            self.problems.append(f"{label}: cannot be read: {error.strerror}")
            return None
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            self.problems.append(f"{label}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8")
            return None
        count = len(self.problems)
        root = self._parse(text, label)
        if root is None and len(self.problems) > count:
            return None
        if root is None or root.value is None:
            self.problems.append(
                f"{label}: is empty; write at least one section, such as `training:`, or leave out --config"
            )
            return None
        if not isinstance(root.value, dict):
            hint = "; a colon needs a space after it" if re.match(r"^\w[\w.]*:\S", str(root.value)) else ""
            self.problems.append(f"{root.origin}: a config is a mapping of sections, not {kind(root)}{hint}")
            return None
        return root

    def read_value(self, flag: str, text: str) -> Node:
        """A value of the command line. Text that is no YAML is still good where text is expected, so it is kept."""
        quiet: list[str] = []
        root = Reader(quiet)._parse(text, "") if text.strip() else None
        if root is None or quiet or (root.value is None and "#" in text):
            root = Node(text, COMMAND_LINE, text, quoted=True, broken="; ".join(quiet))
        if isinstance(root.value, dict | list):
            root.raw, root.whole = text, isinstance(root.value, dict)
        _set_flag(root, flag)
        return root

    def _parse(self, text: str, label: str) -> Node | None:
        try:
            tree = yaml.compose(text, Loader=_Loader)
            return self._convert(tree, label, []) if tree is not None else None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1 if isinstance(error.position, int) else 1
            what = f"the character {error.character!r} is not allowed in YAML"
            self.problems.append(_at(label, line) + what)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            row = text.split("\n")[line - 1 : line]
            if "'\\t'" in str(error.problem) or (row and re.match(r"\s*\t", row[0])):
                self.problems.append(_at(label, line) + "a tab; YAML indents with spaces")
            else:
                what = "; ".join(t for t in (error.context, error.problem) if t)
                self.problems.append(_at(label, line) + f"not valid YAML: {what}")
        except RecursionError:
            self.problems.append(_at(label, 1) + "nested too deeply to be read")
        return None

    def _convert(self, node: yaml.Node, label: str, above: list[yaml.Node]) -> Node:
        line = node.start_mark.line + 1
        origin = f"{label}:{line}" if label else COMMAND_LINE
        if any(node is other for other in above):
            self.problems.append(_at(label, line) + "an alias (`*name`) inside of the thing that it names")
            return Node(None, origin, said=True)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, label, line, origin)
        above = [*above, node]
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            self.problems.append(_at(label, line) + f"the tag `{node.tag}` is not understood: plain YAML only")
        if isinstance(node, yaml.SequenceNode):
            return Node([self._convert(item, label, above) for item in node.value], origin)
        assert isinstance(node, yaml.MappingNode)
        found: dict[Any, Node] = {}
        merged: dict[Any, Node] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    values = self._convert(source, label, above).value
                    if isinstance(values, dict):
                        merged = {**values, **merged}
                    else:
                        self.problems.append(_at(label, key_line) + "`<<` merges mappings, and this is none")
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(_at(label, key_line) + "a list or a mapping cannot be a key")
                continue
            key = self._scalar(key_node, label, key_line, origin).value
            key = key_node.value if key is None or isinstance(key, float | bool) else key
            if key in found:
                places = f"line {lines[key]} and line {key_line}" if label else "the same value"
                self.problems.append(_at(label, key_line) + f"`{key}` is written twice ({places}): keep one of them")
                continue
            lines[key] = key_line
            value = self._convert(value_node, label, above)
            found[key] = dataclasses.replace(value, origin=f"{label}:{key_line}" if label else COMMAND_LINE)
        return Node({**merged, **found}, origin)

    def _scalar(self, node: yaml.ScalarNode, label: str, line: int, origin: str) -> Node:
        raw, quoted = node.value, node.style is not None
        try:
            if node.tag in (_TEXT, _MERGE, "!"):
                return Node(raw, origin, raw, quoted=quoted)
            if node.tag == _NULL:
                return Node(None, origin, raw)
            if node.tag == _BOOL:
                return Node({"true": True, "false": False}[raw.lower()], origin, raw)
            if node.tag == _INT:
                digits = raw.replace("_", "")
                based = re.match(r"^[-+]?0[xo]", digits)
                return Node(int(digits, 0 if based else 10), origin, raw)
            if node.tag == _FLOAT:
                return Node(float(re.sub(r"\.(inf|nan)$", r"\1", raw.replace("_", "").lower())), origin, raw)
        except (KeyError, ValueError):
            kind = node.tag.rsplit(":", 1)[-1]
            self.problems.append(_at(label, line) + f"`{raw[:40]}` cannot be read as `!!{kind}`")
            return Node(None, origin, raw, said=True)
        self.problems.append(_at(label, line) + f"the tag `{node.tag}` is not understood: plain YAML only")
        return Node(None, origin, raw, said=True)


def _at(label: str, line: int) -> str:
    return f"{label}:{line}: " if label else ""


def shown_path(path: Path) -> str:
    """A path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _set_flag(node: Node, flag: str) -> None:
    node.flag, node.origin = flag, COMMAND_LINE
    for child in (
        node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    ):
        _set_flag(child, flag)


def plain(value: Any) -> Any:
    """Data that YAML can hold, copied."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def flow(value: Any) -> str:
    """A value as YAML on one line; what YAML cannot hold (a library's default object) as Python shows it."""
    if isinstance(value, str) and re.search(r"[\n\r\t\x00-\x1f\x85\u2028\u2029]", value):
        return json.dumps(value, ensure_ascii=False)
    try:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    except yaml.representer.RepresenterError:
        return str(value)
    return text.removesuffix("...\n").strip()


def to_yaml(values: Mapping[str, Any]) -> str:
    """`Loaded.values` as a file that reproduces the run when it is loaded with `--config`."""
    return yaml.dump(plain(dict(values)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def kind(node: Node, whole: bool = False) -> str:
    """What the user wrote, in words; a list or a mapping itself if `whole`."""
    if whole and isinstance(node.value, dict | list):
        text = flow(node.plain())
        return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "null"
    if isinstance(node.value, str):
        if not node.value:
            return "empty text"
        shown = node.value if len(node.value) <= 60 else node.value[:57] + "..."
        shown = " ".join(shown.split()) or "blank text"
        return f'the text `"{shown}"`' if node.quoted and not node.flag else f"`{shown}`"
    return f"`{node.raw[:60]}`"
