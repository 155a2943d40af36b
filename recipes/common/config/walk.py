"""What the user wrote against the sections that there are; unknown keys, and where they belong."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator
from typing import Any

from recipes.common.config.reading import DEFAULT, Node, kind
from recipes.common.config.schema import Field, Library, keys_of
from recipes.common.config.values import FINITE, Refused, bad_items, containers, fix, narrowed, parse_value, words

# What people write for a key: its name in older versions of the libraries, or a short one.
RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "overwrite_output_dir": "overwrite",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
}


@dataclasses.dataclass
class Part:
    """A section of this run: what the user gave for it, what else it stands on."""

    path: str  # dotted; "" is the whole config
    source: type | Library
    # What the recipe says: an instance, a dict for a library section, or MISSING.
    default: Any = dataclasses.field(default_factory=lambda: dataclasses.MISSING)
    library: bool = False  # a library section, or a section inside of one
    given: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the user, checked
    inside: dict[str, Part | None] = dataclasses.field(default_factory=dict)  # its sections; None: optional, left out
    filled: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)  # by library_defaults: value, origin
    broken: bool = False  # something in it is wrong, so it cannot be built

    @classmethod
    def of(cls, field: Field, path: str, default: Any, library: bool) -> Part:
        """The part that a key which is a section opens."""
        assert field.section is not None
        source = field.section
        if isinstance(source, type) and isinstance(default, source):
            source = type(default)  # a recipe may put a subclass of its own in place of a shared section
        missing = default is None
        return cls(path, source, dataclasses.MISSING if missing else default, library or isinstance(source, Library))

    def key(self, name: str) -> str:
        """A key's dotted name."""
        return f"{self.path}.{name}" if self.path else name

    def load(self) -> type:
        """The class. Raises ImportError."""
        return self.source.load() if isinstance(self.source, Library) else self.source

    def recipe_default(self, name: str) -> Any:
        """What the recipe's own default for this section says about a key; MISSING when it says nothing."""
        if isinstance(self.default, dict):
            return self.default.get(name, dataclasses.MISSING)
        return dataclasses.MISSING if self.default is dataclasses.MISSING else getattr(self.default, name)

    def below(self, field: Field) -> Any:
        """A key's value if nobody gives one: the recipe's default, else the class's."""
        value = self.recipe_default(field.name)
        return field.default() if value is dataclasses.MISSING else value


@dataclasses.dataclass
class Unknown:
    """A key that its section does not have."""

    part: Part
    key: Any
    node: Node


class Walk:
    """Compares what the user wrote with the sections; collects every problem."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        self.unknown: list[Unknown] = []
        self.origins: dict[str, str] = {}

    def section(self, part: Part, layers: list[Node]) -> Part:
        """Check the keys of one section; `layers` are the mappings that speak of it, the weakest first."""
        if part.library and not layers:
            return part  # nothing to check, so nothing to import
        try:
            fields = keys_of(part.load())
        except ImportError as error:
            part.broken = True
            self.problems.append(no_library(part, error))
            return part
        for layer in layers:
            for key, node in layer.value.items():
                if key not in fields:
                    part.broken = True
                    self.unknown.append(Unknown(part, key, node))
        for field in fields.values():
            nodes = [layer.value[field.name] for layer in layers if field.name in layer.value]
            is_section = field.section and (field.hint is None or all(isinstance(n.value, dict | None) for n in nodes))
            if is_section and not (part.library and not nodes):
                self._subsection(part, field, nodes)
            elif nodes:
                self._leaf(part, field, nodes)
        return part

    def _subsection(self, part: Part, field: Field, nodes: list[Node]) -> None:
        path = part.key(field.name)
        default = part.below(field)
        for node in nodes:
            problem = ""
            if node.value is None and not field.optional:
                problem = f"`{path}` is null, and this recipe needs it; leave the line out for its defaults"
            elif node.value is not None and not isinstance(node.value, dict):
                fix_it = f"write `{path}.KEY`, see `--help {path}`"
                problem = f"`{path}` is a section, a mapping of keys, not {kind(node)}; {fix_it}"
            if problem:
                part.broken = True
            if problem and not node.said:
                self.problems.append(f"{problem} {node.where}")
        if nodes:
            self.origins[path] = nodes[-1].origin
        last_null = max((i for i, n in enumerate(nodes) if n.value is None), default=-1)
        layers = [n for n in nodes[last_null + 1 :] if isinstance(n.value, dict)]
        if not layers and (last_null >= 0 or default is None):
            part.inside[field.name] = None
            return
        inner = self.section(Part.of(field, path, default, part.library), layers)
        part.inside[field.name] = inner
        part.broken |= inner.broken and part.path != ""

    def _leaf(self, part: Part, field: Field, nodes: list[Node]) -> None:
        path = part.key(field.name)
        default = part.below(field)
        base = [_from_plain(default)] if isinstance(default, dict) and default else []
        node = functools.reduce(_merge, [*base, *nodes])
        hint = narrowed(field.name, field.hint) if part.library else field.hint
        self._record(path, node)
        warmup = part.library and field.name == "warmup_steps"
        trap = _warmup_trap(node) if warmup else ""
        try:
            value = parse_value(hint, node)
            endless = isinstance(value, float) and math.isinf(value) and part.library and field.name in FINITE
            if not trap and not endless:
                # A whole number of warm-up steps stays one: 1.0 would not be taken when the config is loaded again.
                part.given[field.name] = node.value if warmup else value
                return
        except Refused:
            pass
        part.broken = True
        if wrong := bad_items(hint, node):
            for place, choice, item in wrong:
                remedy = fix(choice, item, dataclasses.MISSING)
                where = node.where if node.flag else item.where
                must = f"must be {words(choice, section=part.path)}, not {kind(item)}{remedy}"
                self.problems.append(f"`{path}[{place}]` {must} {where}")
            return
        expected = words(hint, section=part.path)
        if field.section is not None:
            expected = f"a mapping or {expected}"
        remedy = trap or fix(hint, node, default)
        inside = isinstance(node.value, dict | list) and type(node.value) in containers(hint)
        if not node.said:
            self.problems.append(f"`{path}` must be {expected}, not {kind(node, inside)}{remedy} {node.where}")

    def _record(self, path: str, node: Node) -> None:
        self.origins[path] = node.origin
        if isinstance(node.value, dict):
            for key, child in node.value.items():
                self._record(f"{path}.{key}", child)


def _warmup_trap(node: Node) -> str:
    if not isinstance(node.value, int | float) or isinstance(node.value, bool):
        return ""
    meaning = "a whole number counts steps, a number below 1 is a share of all steps"
    if isinstance(node.value, float) and node.value == 1:
        return f", which would be ONE step, not the whole run: {meaning}; write `1` for one step"
    if node.value > 1 and node.value != int(min(node.value, 2**62)):
        return f": {meaning}; write `{round(min(node.value, 2**62))}`"
    return f": {meaning}" if node.value < 0 else ""


def _from_plain(value: Any) -> Node:
    if isinstance(value, dict):
        return Node({k: _from_plain(v) for k, v in value.items()}, DEFAULT)
    if isinstance(value, list | tuple):
        return Node([_from_plain(v) for v in value], DEFAULT)
    return Node(value, DEFAULT, str(value))


def _merge(below: Node, above: Node) -> Node:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or above.whole:
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        # The command line has text for every key; a file may have written the key as a number.
        same = next((k for k in merged if k == key or (above.flag and str(k) == key)), key)
        merged[same] = _merge(merged[same], node) if same in merged else node
    return dataclasses.replace(above, value=merged)


def no_library(part: Part, error: ImportError) -> str:
    assert isinstance(part.source, Library)
    return f"{part.path}: needs {part.source.path}, which cannot be imported: {error}; install it (`make setup`)"


def explain_unknown(unknown: list[Unknown], config_class: type) -> Iterator[str]:
    """For each key that no section has: where it belongs, or the nearest one."""
    everywhere: list[str] | None = None  # every section's keys, dotted
    for item in unknown:
        key, path = str(item.key), item.part.path
        scores = {item.part.key(name): _likeness(key, name) for name in keys_of(item.part.load())}
        is_section = not path and isinstance(item.node.value, dict)
        belongs: list[str] = []
        if key in RENAMED or max(scores.values(), default=0) < 0.85 or not (path or is_section):
            if everywhere is None:
                everywhere = list(_all_keys(config_class, ""))  # costs the libraries' import: only now
            for wanted in (key, RENAMED.get(key)):
                belongs = belongs or [k for k in everywhere if wanted and (k == wanted or k.endswith(f".{wanted}"))]
            belongs = [k for k in belongs if path and k.startswith(f"{path}.")] or belongs[:4]
            for other in everywhere:  # a key of another section must be a little more alike
                if not is_section:
                    scores.setdefault(other, _likeness(key, other.rsplit(".", 1)[-1]) - 0.03)
        near = max(scores, key=lambda k: scores[k], default="")
        yield _unknown_text(item, key, belongs, near if near and scores[near] >= 0.6 else "")


def _unknown_text(item: Unknown, key: str, belongs: list[str], near: str) -> str:
    path, node = item.part.path, item.node
    dashes = "--" if node.flag else ""
    what = f"`{item.part.key(key)}` is not a key of {f'`{path}`' if path else 'the top level'}"
    if not path and isinstance(node.value, dict):
        what = f"`{key}` is not a section of this recipe"
        if dashes and near:
            near += node.flag.removeprefix(key)
    options = " or ".join(f"`{dashes}{b}`" for b in belongs)
    if belongs and (key == belongs[0].rsplit(".", 1)[-1] or "." in key):
        sections = " or ".join(f"`{b.rpartition('.')[0]}`" if "." in b else "the top level" for b in belongs)
        if "." in key and not dashes:
            last = key.rsplit(".", 1)[-1]
            return f"{what}: dotted keys are for the command line; here write `{last}` under {sections} {node.where}"
        return f"{what}; it belongs under {sections}: {options} {node.where}"
    if belongs:
        note = ", a share of all steps when below 1" if key == "warmup_ratio" else ""
        return f"{what}; here it is called {options}{note} {node.where}"
    if near:
        return f"{what}; did you mean `{dashes}{near}`? {node.where}"
    names = list(keys_of(item.part.load()))
    listed = f"`--help {path}` lists its keys" if len(names) > 15 else f"there are: {', '.join(names)}"
    return f"{what}; {listed} {node.where}"


def _likeness(a: str, b: str) -> float:
    a, b = (text.lower().replace("-", "_").replace(" ", "_") for text in (a, b))
    return difflib.SequenceMatcher(None, a, b).ratio()


def _all_keys(cls: type, path: str) -> Iterator[str]:
    """Every section's keys, dotted. A section whose library cannot be imported is left out: these are suggestions."""
    for field in keys_of(cls).values():
        inner = f"{path}.{field.name}" if path else field.name
        yield inner
        if isinstance(field.section, Library):
            try:
                yield from (f"{inner}.{name}" for name in keys_of(field.section.load()))
            except ImportError:
                continue
        elif field.section is not None:
            yield from _all_keys(field.section, inner)
