"""The config loader: dataclass sections, layered YAML files, `--section.key value`, and every mistake said at once.

    loaded = load_config(Config, argv, config_folder=Path("configs/finetuning/lora"))
    config = loaded.build()              # an instance of Config, the libraries' own dataclasses included
    loaded.origin("training.max_steps")  # "default", "configs/finetuning/lora/cpu.yaml:12" or "command line"

A value on the command line beats the last `--config` file, which beats the ones before it, which beat the frame's
choice for this machine (`library_defaults`), which beats the recipe's default, which beats the library's default.
Mappings merge key by key, wherever they come from; `--model.config '{...}'`, a mapping written whole on the command
line, replaces.

jsonargparse checks each single value against its annotation (Union, Optional, Literal, list, dict, restricted
numbers). The structure is walked here, because no library does it in the way that a person needs: jsonargparse stops
at the first mistake and imports every section's class for `--help`; OmegaConf knows neither Literal, nor Unions of
containers, nor bounds; neither gives a line number, nor says that a stray `learning_rate` belongs under `training`.
This package is imported for `--help`, so it imports nothing heavy.

    schema.py      what a section is          values.py   one value: is it good, the nearest fix, the libraries' bounds
    reading.py     YAML with line numbers     walk.py     what was written against the sections there are
    arguments.py   the command line           loaded.py   the result: values, origins, instances      help.py   --help
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.config.arguments import find_configs, read_arguments
from recipes.common.config.help import help_text
from recipes.common.config.loaded import LibraryDefaults, Loaded, refuse
from recipes.common.config.reading import COMMAND_LINE, Reader, to_yaml
from recipes.common.config.schema import Section, defaults
from recipes.common.config.walk import Part, Walk, explain_unknown

__all__ = ["Loaded", "Section", "defaults", "help_text", "load_config", "to_yaml"]


def load_config(
    config_class: type,
    argv: Sequence[str],
    *,
    config_folder: Path | None,
    library_defaults: LibraryDefaults | None = None,
    wrong_inside: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
) -> Loaded:
    """Read `--config FILE --section.key value ...` for a recipe's config class.

    `config_folder` holds the recipe's `<name>.yaml`; `cpu.yaml` is taken when no `--config` is given.
    `library_defaults(section, cls, given)` is asked, once a library section is built or printed, for what the user left
    unset: key -> (value, origin). `wrong_inside` is told what the user gave, by section, and says what is wrong inside of values
    that are mappings of any keys: dotted key -> problem. Raises UserError with every problem there is.
    """
    problems: list[str] = []
    arguments = read_arguments(argv, config_folder, problems)
    if arguments.help is not None:
        return Loaded(config_class, None, {}, library_defaults, arguments)
    reader = Reader(problems)
    files = [reader.read_file(path) for path in find_configs(arguments.configs, config_folder, problems)]
    layers = [node for node in files if node is not None]
    walk = Walk(problems)
    root = walk.section(Part("", config_class), [*layers, arguments.tree])
    problems.extend(explain_unknown(walk.unknown, config_class))
    if wrong_inside is not None:
        given = {name: inner.given for name, inner in root.inside.items() if inner is not None}
        for key, problem in wrong_inside(given).items():
            origin = walk.origins.get(key, "")
            problems.append(f"{problem} ({f'--{key}' if origin == COMMAND_LINE else origin})")
    loaded = Loaded(config_class, root, walk.origins, library_defaults, arguments)
    if problems:
        # What the sound sections' classes refuse is said now too, not after the next try.
        for inner in root.inside.values():
            if inner is not None and not inner.broken:
                loaded._construct(inner, problems)
        refuse(problems)
    return loaded
