"""Which split trains and which is held out; rows held out by their content where the source has no split for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.common.data.sources import Source
from recipes.common.data.words import counted
from recipes.common.errors import UserError
from recipes.common.row_values import nearest
from recipes.common.sections import Data

if TYPE_CHECKING:
    import numpy as np

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")  # tried in this order


def choose_splits(source: Source, data: Data) -> tuple[str, str | None, str | None]:
    """Names of the splits that (train, are held out, are the test); None where there is none. Raises UserError."""
    problems = []
    bases = {}
    for key, wanted in (("split", data.split), ("validation_split", data.validation_split)):
        if wanted is None:
            continue
        base = wanted.split("[")[0] if source.load else wanted
        bases[key] = base
        if base not in source.splits:
            near = nearest(base, source.splits)
            hint = f" (did you mean {near!r}?)" if near else ""
            if "[" in base and base.split("[")[0] in source.splits:
                hint = "; slices are for data sets of the hub: data.max_samples takes the first rows of any"
            elif not near and len(source.splits) == 1 and key == "split":
                hint = f"; if that is what trains, set data.split: {source.splits[0]}"
            problems.append(f"data.{key}: {source.name} has no split {base!r}; it has {', '.join(source.splits)}{hint}")
    if problems:
        raise UserError(problems)
    held_out = data.validation_split or next(
        (name for name in HELD_OUT_SPLITS if name in source.splits and name != bases["split"]), None
    )
    used = (bases["split"], bases.get("validation_split", held_out))
    return data.split, held_out, "test" if "test" in source.splits and "test" not in used else None


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: bool [rows], about `fraction` of them, chosen by their content and the seed alone.

    hashes: uint64 [rows]; rows of equal content have equal hashes and go to the same side
    Raises UserError where one side would be empty.
    """
    import numpy as np

    unique, counts = np.unique(hashes, return_counts=True)
    if len(unique) < 2:
        raise UserError(
            f"only {counted(len(hashes), 'row')}{' (all equal)' if len(hashes) > 1 else ''}: nothing can be held out; "
            "add rows, or name another split with data.validation_split"
        )
    order = np.argsort(mixed(unique, seed), kind="stable")
    wanted = max(1, round(len(hashes) * fraction))
    taken = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
    if taken >= len(unique):
        taken = len(unique) - 1
        if round(len(hashes) * (1 - fraction)) < 1:
            raise UserError(
                f"data.validation_fraction: {fraction} of {len(hashes)} rows leaves nothing to train on; lower it"
            )
    return np.isin(hashes, unique[order[:taken]])


def mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another hash of each hash, as good as independent for each seed (splitmix64)."""
    import numpy as np

    with np.errstate(over="ignore"):
        x = hashes + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def cut_document(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text in (what trains, what is held out): about its last `fraction`, whole lines. Raises UserError."""
    at = len(text) - round(len(text) * fraction)
    cut = text.rfind("\n", 0, at) + 1 or text.find("\n", at) + 1
    if cut in (0, len(text)):
        cut = at  # one line only
    head, tail = text[:cut], text[cut:]
    if not head.strip() or not tail.strip():
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(text)} characters leaves nothing on one side; "
            "give more text, or another fraction"
        )
    return head, tail
