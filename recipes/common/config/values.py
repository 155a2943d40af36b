"""One value against its annotation: is it good, what would be, in words, and what is the nearest fix."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
import re
import types
import typing
from argparse import ArgumentError
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, set_loader
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type

from recipes.common.config.reading import Node, flow, plain
from recipes.common.config.schema import alternatives, union

# What the libraries do not check themselves, and what would fail hours later or never.
_Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)], docstring="float restricted to be ≥0 and <1")
UpToOne = restricted_number_type("UpToOne", float, [(">", 0), ("<=", 1)], docstring="float restricted to be >0 and ≤1")
_BOUNDED: dict[Any, str] = {
    PositiveInt: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
    "eval_accumulation_steps dataset_num_proc max_length max_completion_length num_generations num_iterations r init_r "
    "target_r num_virtual_tokens encoder_hidden_size dataloader_prefetch_factor",
    NonNegativeInt: "seed data_seed dataloader_num_workers top_k",
    PositiveFloat: "learning_rate num_train_epochs logging_steps save_steps eval_steps adam_epsilon lora_alpha "
    "temperature repetition_penalty",
    NonNegativeFloat: "warmup_steps weight_decay max_grad_norm eval_delay beta epsilon neftune_noise_alpha",
    _Share: "adam_beta1 adam_beta2 lora_dropout encoder_dropout label_smoothing_factor",
    UpToOne: "top_p",
    union([PositiveInt, Literal[-1]]): "max_steps",
}
BOUNDS: dict[str, Any] = {name: bound for bound, names in _BOUNDED.items() for name in names.split()}
FINITE = BOUNDS.keys() - {"max_grad_norm"}  # the one number for which infinity means something: no clipping


# jsonargparse would read text inside of values as YAML once more; ours is read already, so its loader gives it back.
set_loader("as_is", lambda text: text, json_superset=False)


@functools.cache
def _parser(hint: Any) -> ArgumentParser | None:
    """jsonargparse's judge of one annotation; None where it cannot judge it (the class's constructor does then)."""
    parser = ArgumentParser(exit_on_error=False, parser_mode="as_is")
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:
        return None
    return parser


@functools.cache
def _judged(hint: Any) -> Any:
    """The annotation for jsonargparse: an Enum by its values, `Any` as no judgement, a section's class left out.

    An Enum beside `str` (transformers' `SchedulerType | str`) is held to its values: the text is only their spelling.
    """
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    if isinstance(hint, typing.TypeVar):
        return Any
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _judged(args[0])
    if origin in (Union, types.UnionType):
        has_enum = any(isinstance(a, type) and issubclass(a, enum.Enum) for a in args)
        judged = [_judged(a) for a in args if not (has_enum and a is str) and not dataclasses.is_dataclass(a)]
        return Any if Any in judged or not judged else union(judged)
    if isinstance(origin, type) and issubclass(origin, list | tuple | set | dict) and args:
        judged = [a if a is Ellipsis else _judged(a) for a in args]
        return origin if Any in judged else origin.__class_getitem__(tuple(judged))
    return hint


class Refused(Exception):
    """The value is not of this type."""


def parse_value(hint: Any, node: Node) -> Any:
    """The value as its annotation wants it. Raises Refused."""
    judged = _judged(hint)
    if judged is Any:
        if node.broken:
            raise Refused
        return node.plain()
    members = alternatives(judged)
    if node.broken and str not in members:
        raise Refused
    value = node.plain(text_keys=any(get_args(m)[:1] == (str,) for m in alternatives(hint) if get_origin(m) is dict))
    if value is None:
        if type(None) in members or None in members:
            return None
        raise Refused
    if isinstance(value, str) and str in members:
        return value
    parser = _parser(judged)
    if parser is None:
        return value
    # The value itself first; but 1e4 is a good number of steps, the text 007 a good name, and so is `[x]` in a shell.
    tries = [value, _integral(value), node.texts()]
    if node.flag and isinstance(value, list | dict):
        tries.append(node.raw)
    if isinstance(value, float) and "float" not in repr(judged):
        del tries[0]
    for candidate in tries:
        try:
            result = parser.parse_object({"value": copy.deepcopy(candidate)})["value"]
        except (ArgumentError, OverflowError, RecursionError):
            continue
        if _same(candidate, result):
            return _as_enum(hint, _without_subclass(result))
    for choice in choices_of(hint):  # peft spells a pattern as a choice: "pissa_niter_[number of iters]"
        if isinstance(value, str) and "[" in str(choice) and re.match(re.escape(choice.split("[")[0]) + r"\w+$", value):
            return value
    raise Refused


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {k: _integral(item) for k, item in value.items()}
    return value


def _same(given: Any, result: Any) -> bool:
    """Whether jsonargparse kept the kind of a value: it would also read the text "5" as 5 and "yes" as true."""
    if isinstance(given, bool) or isinstance(result, bool) or given is None:
        return type(given) is type(result)
    if isinstance(given, str):
        return not isinstance(result, int | float | list | dict | None)
    if isinstance(given, int | float):
        return isinstance(result, int | float) and given == result
    if isinstance(given, list):
        if isinstance(result, set):
            return True
        return isinstance(result, list | tuple) and all(_same(a, b) for a, b in zip(given, result, strict=True))
    if isinstance(given, dict):
        return isinstance(result, dict) and all(_same(given[k], result.get(k)) for k in given)
    return True


def _without_subclass(value: Any) -> Any:
    """A restricted number as the plain int or float that it is: neither YAML nor pickle knows jsonargparse's types."""
    if isinstance(value, list | tuple | set):
        return type(value)(_without_subclass(item) for item in value)
    if isinstance(value, dict):
        return {k: _without_subclass(item) for k, item in value.items()}
    for base in (int, float):
        if isinstance(value, base) and not isinstance(value, bool):
            return base(value)
    return value


def _as_enum(hint: Any, value: Any) -> Any:
    """A member of the Enum where only the Enum will do."""
    members = alternatives(hint)
    for member in members:
        if isinstance(member, type) and issubclass(member, enum.Enum) and str not in members and value is not None:
            return member(value)
    return value


def choices_of(hint: Any) -> list[Any]:
    """What may be written where only certain values are good; empty where there are others too."""
    found: list[Any] = []
    for member in alternatives(_judged(hint)):
        if get_origin(member) is Literal:
            found += get_args(member)
        elif member is str:
            return []
    return found


def bad_items(hint: Any, node: Node) -> list[tuple[int, Any, Node]]:
    """Of a list of choices: which items are none of them, as (place, annotation of an item, the item)."""
    if not isinstance(node.value, list):
        return []
    for member in alternatives(_judged(hint)):
        origin, args = get_origin(member), get_args(member)
        if (origin in (list, set) or (origin is tuple and Ellipsis in args)) and choices_of(args[0]):
            found = []
            for place, item in enumerate(node.value):
                try:
                    parse_value(args[0], item)
                except Refused:
                    found.append((place, args[0], item))
            return found
    return []


def containers(hint: Any) -> set[Any]:
    """Which of list and dict the annotation takes at all: then it is something inside that was refused."""
    return {get_origin(m) or m for m in alternatives(_judged(hint))} & {list, dict}


def narrowed(name: str, hint: Any) -> Any:
    """A library's annotation with the bound that the library does not state."""
    members = alternatives(hint)
    if name not in BOUNDS or not {int, float} & {m for m in members if isinstance(m, type)}:
        return hint
    return union([BOUNDS[name], *(m for m in members if m not in (int, float))])


_PLAIN_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches (true or false)"),
    str: ("text", "texts"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
    set: ("a list", "lists"),
    Any: ("anything", "anything"),
    type(None): ("null", "nulls"),
    None: ("null", "nulls"),
    Path: ("a path", "paths"),
}


def words(hint: Any, many: bool = False, section: str = "") -> str:
    """A type in words: "a whole number above 0", "a list of texts", "one of `a`, `b`".

    With a section's name a long list of choices is left to `--help SECTION`.
    """
    judged = _judged(hint)
    if judged in _PLAIN_WORDS:
        return _PLAIN_WORDS[judged][many]
    origin, args = get_origin(judged), get_args(judged)
    if origin is Literal:
        if section and len(args) > 15:
            return f"one of {len(args)} choices (`--help {section}` lists them)"
        listed = ", ".join(f"`{a if isinstance(a, str) else flow(a)}`" for a in args)
        return listed if len(args) == 1 else f"one of {listed}"
    if origin in (Union, types.UnionType):
        members = sorted(args, key=lambda m: m is type(None))
        return " or ".join(words(m, many, section) for m in members)
    if origin in (list, set) or (origin is tuple and Ellipsis in args):
        return f"{'lists' if many else 'a list'} of {words(args[0], True)}"
    if origin is tuple:
        return f"{'lists' if many else 'a list'} of {len(args)}: {', '.join(words(a) for a in args)}"
    if origin is dict:
        return f"{'mappings' if many else 'a mapping'} of names to {words(args[1], True)}"
    restricted = re.match(r"(int|float|str) restricted to be (.+)$", getattr(judged, "__doc__", None) or "")
    if restricted:  # one of jsonargparse's own types, or made by its restricted_number_type
        base = _PLAIN_WORDS[{"int": int, "float": float, "str": str}[restricted[1]]][many]
        bounds = restricted[2]
        for sign, word in {"≥": "at least ", "≤": "at most ", ">": "above ", "<": "below "}.items():
            bounds = bounds.replace(sign, word)
        return f"{base} of {bounds}" if bounds.startswith("at ") else f"{base} {bounds}"
    return getattr(judged, "__name__", str(judged))


def fix(hint: Any, node: Node, default: Any) -> str:
    """The nearest good value, or what to do."""
    choices = [str(c) for c in choices_of(hint)]
    members = alternatives(_judged(hint))
    numbers = [m for m in members if isinstance(m, type) and issubclass(m, int | float) and m is not bool]
    if node.broken:
        return f"; {node.broken}"
    if isinstance(node.value, str):
        if choices:
            near = [c for c in choices if len(node.value) > 2 and c.startswith(node.value.lower())]
            near = near or difflib.get_close_matches(node.value.lower(), choices, 1)
            return f"; did you mean `{near[0]}`?" if near else ""
        if bool in members and node.value.lower() in ("yes", "on", "y", "true", "no", "off", "n", "false"):
            return f"; write `{'true' if node.value.lower() in ('yes', 'on', 'y', 'true') else 'false'}`"
        if numbers and node.quoted and re.match(r"^[-+\d.]", node.value):
            return "; write it without quotes"
    if isinstance(node.value, bool) and (str in members or any(str(c).lower() == node.raw.lower() for c in choices)):
        return f'; if text is meant, put it in quotes: "{node.raw}"'
    if not isinstance(node.value, list | dict) and any((get_origin(m) or m) is list for m in members):
        return f"; write `[{node.raw}]`" if node.value is not None else "; write `[]` for none"
    if default is not dataclasses.MISSING and not isinstance(default, dict | list):
        return f"; the default is {flow(plain(default))}"
    if node.value is None:
        return "; leave the line out for the default"
    return ""
