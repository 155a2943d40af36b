"""T5's span corruption: the paper's worked example, its lengths, its rates, and that nothing of the text is lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_chat import make_tokenizer

from recipes.common.errors import UserError
from recipes.common.span_corruption import (
    Lengths,
    add_sentinels,
    corrupt,
    lengths,
    longest_text,
    noise_mask,
    pieces,
    rebuild,
)

RATE, SPAN, END = 0.15, 3.0, 1
SENTINELS = list(range(5000, 5100))


def test_the_papers_figure_2() -> None:
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    noise = np.isin(words, ["for", "inviting", "last"])
    inputs, targets = corrupt(np.arange(10), noise, [100, 101, 102], 99)
    names = dict(enumerate(words)) | {100: "<X>", 101: "<Y>", 102: "<Z>", 99: "."}
    assert " ".join(names[i] for i in inputs.tolist()) == "Thank you <X> me to your party <Y> week ."
    assert " ".join(names[i] for i in targets.tolist()) == "<X> for inviting <Y> last <Z> ."
    assert rebuild(inputs, targets, [100, 101, 102]) == list(range(10))


@pytest.mark.parametrize(
    ("inputs", "text", "targets"),
    [(512, 568, 114), (256, 284, 58), (1024, 1137, 229), (128, 141, 29)],
)
def test_the_published_lengths(inputs: int, text: int, targets: int) -> None:
    """568 and 114 stand in T5's own code; the others follow from its arithmetic: noise n = round(0.15 l), round(n / 3) spans."""
    assert longest_text(inputs, RATE, SPAN) == text
    made = lengths(text, RATE, SPAN)
    noise = round(0.15 * text)
    spans = round(noise / 3)
    assert made == Lengths(noise, spans, text - noise + spans + 1, noise + spans + 1)
    assert made.inputs <= inputs and made.targets == targets
    assert lengths(text + 1, RATE, SPAN).inputs > inputs


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("span", [1.0, 3.0, 10.0])
def test_lengths_hold_and_nothing_is_lost(rate: float, span: float) -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3, 7, 40, 141):
        text = rng.permutation(1000)[:size] + 10
        noise = noise_mask(size, rate, span, rng)
        inputs, targets = corrupt(text, noise, list(range(5000, 5200)), END)
        made = lengths(size, rate, span)
        assert (len(inputs), len(targets)) == (made.inputs, made.targets)
        assert inputs[-1] == targets[-1] == END
        assert not noise[0] and noise[-1]
        assert rebuild(inputs, targets, list(range(5000, 5200))) == text.tolist()


def test_any_mask_can_be_rebuilt() -> None:
    """Also those that begin with a cut piece or end with a kept one, and the empty and the full one."""
    rng = np.random.default_rng(0)
    text = np.arange(10, 40)
    for _ in range(500):
        noise = rng.random(30) < rng.random()
        inputs, targets = corrupt(text, noise, SENTINELS, END)
        assert rebuild(inputs, targets, SENTINELS) == text.tolist()
        used = [t for t in inputs.tolist() if t in SENTINELS]
        assert used == SENTINELS[: len(used)]  # in their order, each once
    inputs, targets = corrupt(text, np.zeros(30, bool), SENTINELS, END)
    assert inputs.tolist() == [*text, END] and targets.tolist() == [SENTINELS[0], END]
    inputs, targets = corrupt(text, np.ones(30, bool), SENTINELS, END)
    assert inputs.tolist() == [SENTINELS[0], END] and targets.tolist() == [SENTINELS[0], *text, END]


def test_what_is_cut_out_leaves_no_trace_in_the_inputs() -> None:
    """Other tokens in the cut places: the same inputs; other tokens in the kept ones: the same targets."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        text, other = rng.integers(10, 1000, 60), rng.integers(1000, 2000, 60)
        noise = noise_mask(60, RATE, SPAN, rng)
        inputs, targets = corrupt(text, noise, SENTINELS, END)
        assert corrupt(np.where(noise, other, text), noise, SENTINELS, END)[0].tolist() == inputs.tolist()
        assert corrupt(np.where(noise, text, other), noise, SENTINELS, END)[1].tolist() == targets.tolist()


def test_rates_and_span_lengths_over_10_000_draws() -> None:
    rng = np.random.default_rng(0)
    size = 141
    made = lengths(size, RATE, SPAN)
    masks = np.stack([noise_mask(size, RATE, SPAN, rng) for _ in range(10_000)])
    assert (masks.sum(axis=1) == made.noise).all()
    begins = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(axis=1) == made.spans).all()
    assert made.noise / made.spans == pytest.approx(3, abs=0.1)
    # each place is cut out as often as any other, save near the two ends, where a piece is bound to stay or to go
    inner = masks[:, 40:-40].mean(axis=0)
    assert inner.mean() == pytest.approx(RATE, abs=0.02)
    assert np.ptp(inner) < 0.04  # the standard error of one place's rate is 0.0036
    # composed of 21 in 7 parts, a piece is as long as k in C(20 - k, 5) of C(20, 6) ways
    ends = masks & ~np.pad(masks, ((0, 0), (0, 1)))[:, 1:]
    found = np.nonzero(ends)[1] - np.nonzero(begins)[1] + 1
    wanted = [math.comb(20 - k, 5) / math.comb(20, 6) for k in range(1, 8)]
    assert np.bincount(found, minlength=8)[1:8] / len(found) == pytest.approx(wanted, abs=0.01)


def test_pieces_are_every_sum_alike() -> None:
    """Of 6 in 3 parts there are 10; each comes up in a tenth of 10,000 draws."""
    rng = np.random.default_rng(0)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(10_000):
        parts = tuple(pieces(6, 3, rng).tolist())
        assert sum(parts) == 6 and min(parts) >= 1
        seen[parts] = seen.get(parts, 0) + 1
    assert len(seen) == 10
    assert all(abs(count - 1000) < 150 for count in seen.values())  # 5 standard errors


def test_seeds_reproduce() -> None:
    a, b, c = (noise_mask(141, RATE, SPAN, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert (a == b).all() and (a != c).any()


def test_refusals() -> None:
    with pytest.raises(UserError, match="too short"):
        lengths(1, RATE, SPAN)
    with pytest.raises(UserError, match="sentinels"):
        corrupt(np.arange(10), np.arange(10) % 2 == 1, [100, 101], END)


def test_sentinels_are_added_once() -> None:
    from tiny_chat import make_tokenizer

    tokenizer = make_tokenizer()
    size = len(tokenizer)
    ids = add_sentinels(tokenizer, 10)
    assert ids == list(range(size, size + 10))
    assert add_sentinels(tokenizer, 10) == ids and len(tokenizer) == size + 10
    assert tokenizer.eos_token == "<|end|>" and "<|user|>" in tokenizer.all_special_tokens  # none was lost
    assert tokenizer.decode(ids[:2], skip_special_tokens=True) == ""


def test_sentinels_come_in_their_order() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.convert_ids_to_tokens(add_sentinels(tokenizer, 5)) == [f"<extra_id_{i}>" for i in range(5)]
