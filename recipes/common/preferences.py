"""What a reward model's scores are worth: held-out figures, baselines that read no meaning, and pictures.

`data` is rows of ranked answers as the recipe encodes them: prompt, completions, ranks (0 = best), and "sequences", the
ids of each answer behind its prompt. `scores` has one list a row, one score an answer. Only untied answers to the same
prompt are ever compared; an equal score counts as half right.

Length balance: Singhal et al. 2023, https://arxiv.org/abs/2310.03716, balance their preference data by bins of length;
the weights here are those of entropy balancing, Hainmueller 2012, https://doi.org/10.1093/pan/mpr025
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from recipes.common.run_folder import RunFolder

Scores = list[list[float]]
WORDS = (
    r"\w\w+",
    r"\w|[^\w\s]",
)  # what the bag holds: words, and the letters, digits and signs that short answers are of
BASELINE_PAIRS = 16_000  # training pairs, about, that the baselines learn from

# ---------------------------------------------------------------- figures


def pairs_of(scores: Scores, data: Any) -> tuple[Any, Any, Any]:
    """Every untied pair: score of the better - of the worse [P], rank gap [P], weight [P] = 1 / pairs of its prompt."""
    differences, gaps, weights = [], [], []
    for row, ranks in zip(scores, data["ranks"], strict=True):
        pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
        differences += [row[i] - row[j] for i, j in pairs]
        gaps += [ranks[j] - ranks[i] for i, j in pairs]
        weights += [1 / len(pairs)] * len(pairs)
    return np.array(differences), np.array(gaps), np.array(weights)


def right(differences: Any) -> Any:
    """Of each pair, whether it is ranked right: 1, 0, or 0.5 where the scores are equal."""
    return np.where(differences == 0, 0.5, differences > 0)


def ranking_figures(scores: Scores, data: Any) -> dict[str, float]:
    """Share of pairs ranked right, the K-way loss, how far confidence is from truth, and accuracy by rank gap."""
    differences, gaps, weights = pairs_of(scores, data)
    predicted, observed, count = calibration(differences)
    return {
        "accuracy": float(right(differences).mean()),
        "loss": float((np.logaddexp(0, -differences) * weights).sum() / weights.sum()),
        "calibration_error": float((np.abs(predicted - observed) * count).sum() / count.sum()),
        **{f"accuracy_gap_{gap}": float(right(differences)[gaps == gap].mean()) for gap in np.unique(gaps)},
    }


def calibration(differences: Any, bins: int = 10) -> tuple[Any, Any, Any]:
    """Confidence of the model in the answer it prefers, 0.5 to 1, against how often that one is the better: by bin.

    Returns mean confidence, share right and count of the bins that hold any pair.
    """
    confidence, is_right = 1 / (1 + np.exp(-np.abs(differences))), differences > 0
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = np.unique(which)
    return tuple(
        np.array([f(which == b) for b in filled])
        for f in (lambda m: confidence[m].mean(), lambda m: is_right[m].mean(), lambda m: m.sum())
    )  # type: ignore[return-value]


def accuracy_by_margin(differences: Any, parts: int = 5) -> list[tuple[float, float]]:
    """Pairs in `parts` equal parts, from the closest scores to the farthest: (mean |r_1 - r_2|, share ranked right)."""
    order = np.argsort(np.abs(differences), kind="stable")
    parted = [part for part in np.array_split(order, parts) if len(part)]
    return [(float(np.abs(differences[p]).mean()), float(right(differences)[p].mean())) for p in parted]


def length_correlation(scores: Scores, data: Any) -> float:
    """Pearson's correlation of score and length among the answers to the same prompt: above 0, longer ones score higher.

    0 where either is always the same.
    """

    def centred(rows: Any) -> Any:
        return np.concatenate([np.asarray(row, float) - np.mean(row) for row in rows])

    told, lengths = centred(scores), centred([list(map(len, row)) for row in data["sequences"]])
    return float((told * lengths).sum() / np.sqrt(max((told**2).sum() * (lengths**2).sum(), 1e-12)))


def length_bias(scores: Scores, data: Any) -> dict[str, float]:
    """How scores go with length, beside how the labels do: what is beyond theirs is the model's own bias."""
    labels = [[-float(rank) for rank in ranks] for ranks in data["ranks"]]
    return {
        "length_correlation": length_correlation(scores, data),
        "label_length_correlation": length_correlation(labels, data),
    }


# ---------------------------------------------------------------- pairs of which length tells nothing


def length_balance(data: Any) -> tuple[float, float]:
    """(tilt, scale) of the pair weights  w = scale exp(- tilt d),  d = length of the better - of the worse, such that

        sum w d = 0   over all pairs, each prompt's counting as one pair together;   mean w = 1

    So a score that is a multiple of the length lowers the weighted ranking loss by nothing: its derivative there is
    - 1/2 sum w d. Of all weights that do this, these are the nearest to equal ones (entropy balancing). Raises UserError
    where the better answer is never, or always, the longer one: no weights can make up for that.
    """
    differences, _, weights = pairs_of([list(map(len, row)) for row in data["sequences"]], data)
    if not (differences.min() < 0 < differences.max() or (differences == 0).all()):
        raise UserError(
            "reward.balance_lengths: the better answer is never the longer one, or never the shorter: nothing to balance"
        )

    def tilted(tilt: float) -> Any:
        exponent = -tilt * differences
        return weights * np.exp(exponent - exponent.max())

    low, high = -50.0, 50.0
    for _ in range(200):  # bisection: the tilted mean of d falls as the tilt rises
        tilt = (low + high) / 2
        low, high = (tilt, high) if (tilted(tilt) * differences).sum() > 0 else (low, tilt)
    tilt = 0.0 if (differences == 0).all() else tilt
    return tilt, float(weights.sum() / (weights * np.exp(-tilt * differences)).sum())


def best_ranked(scores: Scores, data: Any) -> list[float]:
    """The scores of the answers of rank 0."""
    pairs = zip(scores, data["ranks"], strict=True)
    return [score for row, ranks in pairs for score, rank in zip(row, ranks, strict=True) if rank == 0]


# ---------------------------------------------------------------- baselines


def _few(train: Any) -> Any:
    """As many of the first prompts as have BASELINE_PAIRS untied pairs."""
    pairs = np.array([sum(a < b for a in ranks for b in ranks) for ranks in train["ranks"]])
    return train.select(range(min(len(train), int((pairs.cumsum() < BASELINE_PAIRS).sum()) + 1)))


def length_baseline(train: Any, held_out: Any) -> float:
    """Accuracy of preferring the longer answer, or the shorter: whichever is right more often in training."""

    def longer_is_better(data: Any) -> float:
        return ranking_figures([[float(len(s)) for s in row] for row in data["sequences"]], data)["accuracy"]

    share = longer_is_better(_few(train))
    return longer_is_better(held_out) if share >= 0.5 else 1 - longer_is_better(held_out)


def words_baseline(train: Any, held_out: Any) -> float:
    """Accuracy of a logistic regression on differences of the counts of words and of characters: it sees neither the order
    nor the prompt."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train = _few(train)
    patterns = [re.compile(pattern) for pattern in WORDS]
    counter = CountVectorizer(analyzer=lambda text: [word for p in patterns for word in p.findall(text.lower())])
    if not any(counter.build_analyzer()(text) for row in train["completions"] for text in row):
        return 0.5  # answers of blanks alone
    counter.fit(text for row in train["completions"] for text in row)

    def differences(data: Any) -> Any:  # [P, words], better - worse
        counts = counter.transform([text for row in data["completions"] for text in row])
        better, worse, start = [], [], 0
        for ranks in data["ranks"]:
            pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
            better += [start + i for i, _ in pairs]
            worse += [start + j for _, j in pairs]
            start += len(ranks)
        return counts[better] - counts[worse]

    found = differences(train)
    if found.shape[0] == 1:  # a single comparison, both ways round
        found = found[[0, 0]]
    sign = np.where(np.arange(found.shape[0]) % 2, 1, -1)  # it takes two classes: every other pair the other way round
    model = LogisticRegression(fit_intercept=False, max_iter=300).fit(found.multiply(sign[:, None]).tocsr(), sign)
    return float(right(model.decision_function(differences(held_out))).mean())


# ---------------------------------------------------------------- pictures and samples


def draw(scores: Scores, held_out: Any, run: RunFolder) -> None:
    """Scores of the best and the others, calibration, accuracy by rank gap and by margin, and the training curves."""
    best = best_ranked(scores, held_out)
    rest = [
        score
        for row, ranks in zip(scores, held_out["ranks"], strict=True)
        for score, rank in zip(row, ranks, strict=True)
        if rank > 0
    ]
    differences, gaps, _ = pairs_of(scores, held_out)

    def histogram(axes: Any) -> None:
        high, low = max(best + rest), min(best + rest)
        shown = max(low, high - 3 * (high - np.quantile(best, 0.01)))  # a wild answer's likelihood is far below
        edges = np.linspace(shown, high, 41)
        axes.hist(
            [np.clip(best, shown, None), np.clip(rest, shown, None)],
            edges,
            label=["best ranked", "the others"],
            histtype="stepfilled",
            alpha=0.55,
            density=True,
        )
        axes.set_xlabel("score of held-out answers" + ("" if shown == low else " (first bar: this low, and lower)"))
        axes.set_ylabel("density")
        axes.legend(frameon=False)

    def reliability(axes: Any) -> None:
        predicted, observed, count = calibration(differences)
        axes.plot([0.5, 1], [0.5, 1], "--", color="grey", label="perfect")
        axes.scatter(
            predicted, observed, s=20 + 300 * count / count.max(), alpha=0.7, label="held-out pairs (area: how many)"
        )
        axes.set_xlabel("model's confidence, sigmoid |r_1 - r_2|")
        axes.set_ylabel("share of pairs that it ranks right")
        axes.legend(frameon=False, loc="upper left")

    def by_gap(axes: Any) -> None:
        found = np.unique(gaps)
        axes.bar(found, [(differences[gaps == g] > 0).mean() for g in found], width=0.6)
        axes.axhline(0.5, color="grey", linestyle="--")
        axes.set_xticks(found)
        axes.set_ylim(0, 1)
        axes.set_xlabel("difference of ranks")
        axes.set_ylabel("accuracy")

    def by_margin(axes: Any) -> None:
        parts = accuracy_by_margin(differences, 10)
        axes.bar(range(len(parts)), [share for _, share in parts], width=0.7)
        axes.axhline(0.5, color="grey", linestyle="--")
        axes.set_xticks(range(len(parts)), [f"{margin:.2g}" for margin, _ in parts])
        axes.set_ylim(0, 1)
        axes.set_xlabel("|r_1 - r_2|, mean of each tenth of the held-out pairs")
        axes.set_ylabel("accuracy")

    run.plot("rewards", histogram)
    run.plot("calibration", reliability)
    run.plot("accuracy_by_rank_gap", by_gap)
    run.plot("accuracy_by_margin", by_margin)
    run.plot_curve("loss", "loss", "eval_loss")
    run.plot_curve("accuracy", "accuracy", "eval_accuracy")


def ranked_sample(scores: Scores, held_out: Any, count: int = 20) -> str:
    """Some held-out prompts with their answers, from the highest score down, beside the rank that they should have."""
    lines = []
    for row, row_scores in zip(held_out.select(range(min(count, len(scores)))), scores, strict=False):
        lines.append(f"{row['prompt'][-1]['role']}: {row['prompt'][-1]['content']}")
        order = sorted(range(len(row_scores)), key=lambda k: -row_scores[k])
        lines += [f"  {row_scores[k]:+7.2f}  rank {row['ranks'][k]}  {row['completions'][k]!r}" for k in order]
    return "\n".join(lines) + "\n"
