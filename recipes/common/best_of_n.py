"""Best-of-n: draw n answers, keep the one that the reward model likes best. No training at all, and hard to beat.

    KL(best-of-n || policy) <= log n - (n - 1) / n        nats an answer; equal where no two answers have the same score

Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; the bound: Beirami et al. 2024, https://arxiv.org/abs/2401.01879
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def kl_bound(n: int) -> float:
    """How far best-of-n is from the policy that it draws from, at most, in nats."""
    return math.log(n) - (n - 1) / n


def value_of_best(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """The value to expect of the answer with the highest score among n of these K, drawn without putting back.

    scores, values: one of each an answer, K of both. Over all C(K, n) draws: the answer at place i from the bottom is the
    best of C(i-1, n-1) of them. So K answers tell about every n up to K, with less noise than one draw of n would.
    Answers of equal score share their places' weight. Raises ValueError unless 1 <= n <= K.
    """
    k = len(scores)
    if not 1 <= n <= k or len(values) != k:
        raise ValueError(f"best of {n} needs as many scores as values, and {n} or more: {k} and {len(values)}")
    order = sorted(range(k), key=lambda i: scores[i])
    weights = [math.comb(place, n - 1) / math.comb(k, n) for place in range(k)]
    total, start = 0.0, 0
    while start < k:
        end = start
        while end < k and scores[order[end]] == scores[order[start]]:
            end += 1
        tied = [values[i] for i in order[start:end]]
        total += sum(weights[start:end]) * sum(tied) / len(tied)
        start = end
    return total
