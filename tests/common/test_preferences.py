"""What is said of scores of ranked answers: figures, calibration, length bias and baselines, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from recipes.common import preferences as figures_of


def test_figures_on_hand_numbers():
    data = {"ranks": [[0, 1, 1], [0, 1, 2]], "sequences": [[[1] * 5, [1], [1]], [[1], [1] * 2, [1] * 3]]}
    scores = [[2.0, 1.0, 3.0], [5.0, 5.0, 0.0]]
    # prompt 1: 2 > 1 right, 2 > 3 wrong; prompt 2: 5 = 5 half, 5 > 0 right (gap 2), 5 > 0 right (gap 1)
    figures = figures_of.ranking_figures(scores, data)
    assert figures["accuracy"] == pytest.approx(3.5 / 5)
    assert figures["accuracy_gap_1"] == pytest.approx(2.5 / 4) and figures["accuracy_gap_2"] == 1
    first = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    second = (math.log(2) + 2 * math.log1p(math.exp(-5))) / 3
    assert figures["loss"] == pytest.approx((first + second) / 2)


def test_length_baseline_takes_the_direction_that_training_shows():
    from datasets import Dataset

    short_wins = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1], [1, 1]]}] * 4)
    long_wins = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1, 1], [1]]}] * 4)
    assert figures_of.length_baseline(short_wins, short_wins) == 1
    assert figures_of.length_baseline(long_wins, long_wins) == 1
    assert figures_of.length_baseline(short_wins, long_wins) == 0


def test_a_perfectly_calibrated_model_has_no_calibration_error():
    import numpy as np

    rng = np.random.default_rng(0)
    margin = np.abs(rng.normal(0, 2, 100_000))
    right = rng.random(100_000) < 1 / (1 + np.exp(-margin))
    predicted, observed, count = figures_of.calibration(np.where(right, margin, -margin))
    assert (np.abs(predicted - observed) < 0.02).all() and count.sum() == 100_000
    predicted, observed, _ = figures_of.calibration(np.full(10, 3.0))  # always right, at 95 % confidence
    assert observed.tolist() == [1.0] and predicted.tolist() == [pytest.approx(1 / (1 + math.exp(-3)))]


def test_accuracy_by_margin_on_hand_numbers():
    import numpy as np

    differences = np.array([0.5, -0.1, 3.0, -2.0, 0.2, 4.0])  # by |.|: -0.1, 0.2 | 0.5, -2 | 3, 4
    parts = figures_of.accuracy_by_margin(differences, 3)
    assert [share for _, share in parts] == [0.5, 0.5, 1.0]
    assert [margin for margin, _ in parts] == [pytest.approx(0.15), pytest.approx(1.25), pytest.approx(3.5)]
    assert figures_of.accuracy_by_margin(np.array([0.0]), 5) == [(0.0, 0.5)]


def test_length_bias_is_of_answers_to_one_prompt_and_beside_that_of_the_labels():
    data = {"ranks": [[0, 1], [0, 1]], "sequences": [[[1] * 3, [1] * 2], [[1] * 90, [1] * 91]]}
    told = figures_of.length_bias(
        [[5.0, 4.0], [-60.0, -59.0]], data
    )  # longer by 1: higher by 1; long prompts score low
    assert told["length_correlation"] == pytest.approx(1)
    assert told["label_length_correlation"] == pytest.approx(0)
    assert figures_of.length_bias([[1.0, 1.0], [2.0, 2.0]], data)["length_correlation"] == 0


def test_words_baseline_learns_words_and_neither_their_order_nor_the_prompt():
    from datasets import Dataset

    def rows(better: str, worse: str, count: int) -> Dataset:
        return Dataset.from_list([{"ranks": [0, 1], "completions": [better, worse]}] * count)

    train = rows("yes 4", "no 5", 20)
    assert figures_of.words_baseline(train, rows("yes", "no", 4)) == 1
    assert figures_of.words_baseline(train, rows("5", "4", 4)) == 0
    assert figures_of.words_baseline(train, rows("1 2 3", "3 2 1", 4)) == 0.5
    assert figures_of.words_baseline(rows("good", "bad", 1), rows("good", "bad", 1)) == 1  # one pair is enough
    assert figures_of.words_baseline(rows("1 2", "2 1", 5), rows("1 2", "2 1", 5)) == 0.5
    assert (
        figures_of.words_baseline(rows("tea", "eat", 5), rows("Tea!", "Eat!", 5)) == 1
    )  # words, and not letters alone


def test_baselines_learn_from_so_many_pairs(monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(figures_of, "BASELINE_PAIRS", 6)
    train = Dataset.from_list(
        [{"ranks": [0, 1, 2]}, {"ranks": [0, 0]}, {"ranks": [0, 1, 1]}, {"ranks": [1, 0]}, {"ranks": [0, 1]}]
    )
    assert len(figures_of._few(train)) == 4  # 3 + 0 + 2 + 1 pairs
    assert len(figures_of._few(train.select(range(2)))) == 2


def test_lengths_that_cannot_be_balanced_are_refused_and_equal_ones_need_no_weights():
    from datasets import Dataset

    from recipes.common.errors import UserError

    longer = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1, 1], [1]]}] * 4)
    with pytest.raises(UserError, match="balance_lengths"):
        figures_of.length_balance(longer)
    equal = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1], [1]]}] * 4)
    assert figures_of.length_balance(equal) == (0.0, 1.0)
