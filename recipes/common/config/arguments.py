"""The command line: `--config`, `--section.key value` and the three switches."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from recipes.common.config.reading import COMMAND_LINE, Node, Reader, shown_path


@dataclasses.dataclass
class Arguments:
    """argv, taken apart."""

    configs: list[str] = dataclasses.field(default_factory=list)
    tree: Node = dataclasses.field(default_factory=lambda: Node({}, COMMAND_LINE))
    dry_run: bool = False
    print_config: bool = False
    help: str | None = None


def read_arguments(argv: Sequence[str], config_folder: Path | None, problems: list[str]) -> Arguments:
    arguments = Arguments()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, attached = token.partition("=")
        if name in ("--help", "-h"):
            arguments.help = attached if equals else rest.pop(0) if rest and not rest[0].startswith("-") else ""
        elif token == "--dry-run":
            arguments.dry_run = True
        elif token == "--print-config":
            arguments.print_config = True
        elif name in ("--dry-run", "--print-config"):
            problems.append(f"`{name}` is a switch: leave out `={attached}`")
        elif name in ("--local_rank", "--local-rank") and equals:
            continue  # DeepSpeed's launcher adds it to every script; LOCAL_RANK in the environment says the same
        elif not token.startswith("--") or name == "--":
            problems.append(_stray(token, arguments, config_folder))
        elif not equals and (not rest or rest[0].startswith("--")):
            near = difflib.get_close_matches(name, ("--dry-run", "--print-config", "--help"), 1, 0.8)
            remedy = f"did you mean `{near[0]}`?" if near else f"write `{name} VALUE`, or `{name} true` for a switch"
            problems.append(f"`{name}` has no value: {remedy}")
        else:
            value = attached if equals else rest.pop(0)
            if name == "--config":
                arguments.configs.append(value)
            else:
                _assign(arguments.tree, name[2:], value, problems)
    return arguments


def _stray(token: str, arguments: Arguments, config_folder: Path | None) -> str:
    what = f"`{token}` stands alone: values are given as `--section.key value`"
    if token.endswith((".yaml", ".yml")) or token in config_names(config_folder):
        return f"{what}; did you mean `--config {token}`?"
    if re.match(r"^-?[\w.]+=", token):
        return f"{what}; did you mean `--{token.lstrip('-')}`?"
    if re.match(r"^-[A-Za-z]", token):
        return f"{what}; did you mean `-{token}`?"
    if re.match(r"^\w+(\.\w+)+$", token):
        return f"{what}; did you mean `--{token} VALUE`?"
    return what + "; a value with spaces needs quotes around it"


def _assign(tree: Node, key: str, text: str, problems: list[str]) -> None:
    parts = key.split(".")
    if not all(parts):
        problems.append(f"`--{key}` is no key: write `--section.key value`")
        return
    node = Reader(problems).read_value(key, text)
    place = tree
    for depth, part in enumerate(parts[:-1], 1):
        place = place.value.setdefault(part, Node({}, COMMAND_LINE, flag=key))
        if not isinstance(place.value, dict):
            problems.append(f"`--{key}` contradicts `--{'.'.join(parts[:depth])} {place.raw}`: leave one of them out")
            return
    if parts[-1] in place.value:
        problems.append(f"`--{key}` is given twice: leave one of them out")
        return
    place.value[parts[-1]] = node


def config_names(folder: Path | None) -> list[str]:
    """The configs that `--config NAME` knows."""
    return sorted(p.stem for p in folder.glob("*.yaml")) if folder and folder.is_dir() else []


def find_configs(asked: list[str], folder: Path | None, problems: list[str]) -> list[Path]:
    if not asked:
        usual = folder / "cpu.yaml" if folder else None
        return [usual] if usual and usual.is_file() else []
    found = []
    for value in asked:
        names = config_names(folder)
        if value in names and folder:
            found.append(folder / f"{value}.yaml")
        elif os.path.isfile(value):
            found.append(Path(value))
        elif os.path.isdir(value):
            problems.append(f"--config {value}: is a folder; name a file in it")
        elif not value:
            problems.append("--config: is empty; write the path of a YAML file")
        elif "/" not in value and not value.endswith((".yaml", ".yml")):
            near = difflib.get_close_matches(value, names, 1)
            there = (
                f"{shown_path(folder)} has {', '.join(names)}" if folder and names else "give the path of a YAML file"
            )
            problems.append(
                f"--config {value}: there is no such config; {there}" + (f"; did you mean {near[0]}?" if near else "")
            )
        else:
            problems.append(f"--config {value}: there is no such file{_nearest_file(Path(value), folder)}")
    return found


def _nearest_file(path: Path, folder: Path | None) -> str:
    files = [
        p for place in (path.parent, folder) if place and place.is_dir() for p in sorted(place.iterdir()) if p.is_file()
    ]
    yamls = [p for p in files if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, [p.name for p in yamls], 1, 0.5)
    if near:
        return f"; did you mean {shown_path(next(p for p in yamls if p.name == near[0]))}?"
    return f"; {shown_path(yamls[0].parent)} has {', '.join(p.name for p in yamls[:8])}" if yamls else ""
