"""PPO's recipe with answers that do not depend on the number of processes, each drawn alone, by a seed of its prompt's own
(and of how many answers the prompt has got before): a script for test_ppo.py."""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from recipes.alignment import ppo
from recipes.common import generation
from recipes.common.recipe import run_recipe

sampled = generation.generate_ids


def seeded(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """`generate_ids`, prompt by prompt."""
    seen: Counter[str] = Counter()
    answers = []
    for prompt in prompts:
        name = str(list(prompt))
        seen[name] += 1
        answers += sampled(model, [prompt], **{**options, "seed": zlib.crc32(f"{name}{seen[name]}".encode())})
    return answers


if __name__ == "__main__":
    generation.generate_ids = seeded
    sys.exit(run_recipe(ppo.main, ppo.Config))
