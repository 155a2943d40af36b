"""Which split a thing belongs to, by a stable hash of what it is: the same on every machine, in any order."""

from __future__ import annotations

import hashlib

from recipes.common.errors import UserError

SPLITS = ("train", "validation", "test")


def split_of(key: str, held_out: int) -> str:
    """Put `held_out` percent of all keys in validation, as many in test, and the rest in train."""
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") % 100
    if bucket < held_out:
        return "validation"
    return "test" if bucket < 2 * held_out else "train"


def check_split(split: str) -> None:
    """Raise UserError unless `split` is one that the builtin sets have."""
    if split not in SPLITS:
        raise UserError(f"split: a builtin set has no {split!r}; it has {', '.join(SPLITS)}")
