"""Best-of-n: the bound on its KL, and the value of the best of n against counting all the draws."""

from __future__ import annotations

import itertools
import math

import pytest

from recipes.common.best_of_n import kl_bound, value_of_best


def test_the_bound_is_that_of_the_paper() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(64) == pytest.approx(math.log(64) - 63 / 64)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_bound_holds_and_is_nearly_met_by_a_policy_of_many_answers(n: int) -> None:
    """A uniform policy over 1,000 answers, all of another score: P(best = i) = (i^n - (i-1)^n) / 1000^n."""
    size = 1000
    best = [((i**n - (i - 1) ** n) / size**n) for i in range(1, size + 1)]
    kl = sum(p * math.log(p * size) for p in best if p > 0)
    assert kl <= kl_bound(n) + 1e-9
    assert kl == pytest.approx(kl_bound(n), abs=0.01)


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("scores", [[3.0, 1.0, 2.0, 5.0, 4.0, 0.0], [1.0, 1.0, 0.0, 2.0, 2.0, 2.0], [0.0] * 6])
def test_the_value_is_the_mean_over_all_draws(scores: list[float], n: int) -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    seen = []
    for draw in itertools.combinations(range(6), n):
        top = max(scores[i] for i in draw)
        best = [values[i] for i in draw if scores[i] == top]
        seen.append(sum(best) / len(best))
    assert value_of_best(scores, values, n) == pytest.approx(sum(seen) / len(seen))


def test_more_draws_than_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="best of 3"):
        value_of_best([1.0, 2.0], [0.0, 1.0], 3)
