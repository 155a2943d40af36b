"""BART's five corruptions: the paper's figure 2, what can be undone, rates and span lengths over 10,000 draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_chat import make_tokenizer

from recipes.common import denoising
from recipes.common.denoising import (
    KINDS,
    Marks,
    add_marks,
    choose,
    corrupt,
    delete_tokens,
    draw_spans,
    infill,
    mask_tokens,
    permute,
    rotate,
    sentence_starts,
    unpermute,
)

TEXT = np.array(list("ABC.DE."))
LETTERS = Marks(  # of characters as code points, each of which may begin a sentence
    ord("^"), ord("$"), ord("_"), ord("#"),
    np.array([chr(i) == "." for i in range(128)]), np.array([chr(i) != "." for i in range(128)]),
)  # fmt: skip


def text_of(tokens: np.ndarray) -> str:
    return "".join(tokens.tolist())


def test_the_papers_figure_2() -> None:
    """Token deletion by its definition: the two that token masking masks are gone."""
    second_and_fifth = np.isin(np.arange(7), [1, 4])
    assert text_of(mask_tokens(TEXT, second_and_fifth, "_")) == "A_C._E."  # type: ignore[arg-type]
    assert text_of(delete_tokens(TEXT, second_and_fifth)) == "AC.E."
    assert text_of(infill(TEXT, [1, 5], [2, 0], "_")) == "A_.D_E."  # type: ignore[arg-type]
    codes = np.array([ord(c) for c in "ABC.DE."])
    starts = sentence_starts(codes, LETTERS)
    assert starts.tolist() == [0, 4]
    assert text_of(permute(TEXT, starts, [1, 0])) == "DE.ABC."
    assert text_of(rotate(TEXT, 2)) == "C.DE.AB"


def test_permutation_and_rotation_can_be_undone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = rng.integers(0, 50, int(rng.integers(1, 40)))
        starts = np.concatenate([[0], np.flatnonzero(rng.random(len(text) - 1) < 0.3) + 1])
        order = rng.permutation(len(starts)).tolist()
        moved = permute(text, starts, order)
        assert sorted(moved) == sorted(text)
        assert (unpermute(moved, starts, order) == text).all()
        offset = int(rng.integers(len(text)))
        assert (rotate(rotate(text, offset), len(text) - offset) == text).all()


def test_a_sentence_ends_at_a_full_stop_before_white_space() -> None:
    tokenizer = make_tokenizer()
    marks = add_marks(tokenizer)
    text = "Use os.path. It is 3.5 times\nas fast.\nSee below."
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    parts = np.split(ids, sentence_starts(ids, marks)[1:])
    assert [tokenizer.decode(part) for part in parts] == ["Use os.path.", " It is 3.5 times\nas fast.", "\nSee below."]


def test_a_sentence_ends_where_a_text_of_the_block_does() -> None:
    """Captions have no full stop before white space: without this, permuting a block of them would do nothing."""
    codes = np.array([ord(c) for c in "A cat$A dog runs$An owl"])
    starts = sentence_starts(codes, LETTERS)
    assert starts.tolist() == [0, 6, 17]
    moved = permute(codes, starts, [2, 0, 1])
    assert "".join(map(chr, moved)) == "An owlA cat$A dog runs$"


def test_a_text_that_was_deleted_whole_is_not_rotated() -> None:
    kinds = ("token_deletion", "document_rotation")
    assert len(corrupt(np.arange(40), kinds, LETTERS, np.random.default_rng(0), rate=0.99)) == 0


def test_marks_are_added_once() -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    marks = add_marks(tokenizer)
    assert len(tokenizer) == size + 2 == len(add_marks(tokenizer).stop)
    assert {marks.mask, marks.start} == {size, size + 1} and marks.end == tokenizer.eos_token_id


def test_rates_over_10_000_draws() -> None:
    rng = np.random.default_rng(0)
    chosen = np.stack([choose(100, 0.3, rng) for _ in range(10_000)])
    assert (chosen.sum(axis=1) == 30).all()
    assert chosen.mean(axis=0) == pytest.approx(np.full(100, 0.3), abs=0.025)  # each place alike: 5 standard errors


def test_spans_are_poisson_3_over_10_000_draws() -> None:
    """A long text, so that the last span, cut to fit, and the stop at the budget hardly count."""
    rng = np.random.default_rng(0)
    found: list[int] = []
    for _ in range(100):
        _, spans = draw_spans(1100, 0.3, 3.0, rng)
        assert spans.sum() == 330
        found += spans.tolist()
    assert len(found) > 10_000
    wanted = [math.exp(-3) * 3**k / math.factorial(k) for k in range(9)]
    shares = np.bincount(found, minlength=9)[:9] / len(found)
    assert shares == pytest.approx(wanted, abs=0.025)
    assert shares[0] == pytest.approx(math.exp(-3), abs=0.015)  # insertions: a mask where nothing is missing


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_spans_lie_apart_anywhere_and_cover_the_rate(rate: float) -> None:
    rng = np.random.default_rng(0)
    covered = np.zeros(40)
    for _ in range(10_000 if rate == 0.3 else 500):
        starts, spans = draw_spans(40, rate, 3.0, rng)
        assert (starts[1:] >= starts[:-1] + spans[:-1]).all()  # in their order, none over another
        assert len(starts) == 0 or (starts[0] >= 0 and starts[-1] + spans[-1] <= 40)
        assert len(spans) <= round(rate * 40)
        for start, span in zip(starts, spans, strict=True):
            covered[start : start + span] += 1
    if rate == 0.3:
        share = covered / 10_000  # no place is spared; at the ends fewer spans lie over a token
        assert share[3:-3] == pytest.approx(np.full(34, 0.31), abs=0.03)
        assert (share > 0.1).all() and share.mean() == pytest.approx(0.3, abs=0.01)


def test_infilling_keeps_the_rest_and_never_grows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        text = np.arange(10, 60)
        starts, spans = draw_spans(50, 0.3, 3.0, rng)
        made = infill(text, starts, spans, 5)
        assert (made == 5).sum() == len(spans)
        gone = {token for a, n in zip(starts, spans, strict=True) for token in range(10 + a, 10 + a + n)}
        assert [t for t in made.tolist() if t != 5] == [t for t in text.tolist() if t not in gone]  # in their order
        assert len(made) == 50 - spans.sum() + len(spans) <= 50


@pytest.mark.parametrize("kind", ["token_masking", "token_deletion", "text_infilling"])
def test_what_is_hidden_leaves_no_trace(kind: denoising.Corruption) -> None:
    """Other tokens in the places that are masked, deleted or filled in: the same corrupted text."""
    place = np.arange(100, 150)  # each token says where it stands, so what is left over says which places are hidden
    for seed in range(200):
        left = corrupt(place, [kind], LETTERS, np.random.default_rng(seed), 0.3, 3.0)
        hidden = ~np.isin(place, left)
        assert hidden.sum() == 15  # 0.3 of 50
        other = np.where(hidden, place + 500, place)
        assert corrupt(other, [kind], LETTERS, np.random.default_rng(seed), 0.3, 3.0).tolist() == left.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_each_does_what_it_says_and_a_seed_gives_it_again(kind: denoising.Corruption) -> None:
    text = np.array([ord(c) for c in "abcdefgh.ijklmnop.qrstuvwxyz." * 3])
    a, b, c = (corrupt(text, [kind], LETTERS, np.random.default_rng(seed), 0.3, 3.0) for seed in (1, 1, 2))
    assert a.tolist() == b.tolist() and a.tolist() != c.tolist() and a.tolist() != text.tolist()
    masks = (a == LETTERS.mask).sum()
    if kind == "token_masking":
        assert len(a) == len(text) and masks == round(0.3 * len(text))
    elif kind == "token_deletion":
        assert len(a) == len(text) - round(0.3 * len(text)) and masks == 0
    elif kind == "text_infilling":
        assert len(a) < len(text) and masks > 0
    else:
        assert sorted(a) == sorted(text)


def test_they_compose_in_the_order_given() -> None:
    text = np.array([ord(c) for c in "abcdefgh.ijklmnop.qrstuvwxyz."])
    both = corrupt(text, ["sentence_permutation", "text_infilling"], LETTERS, np.random.default_rng(3), 0.3, 3.0)
    rng = np.random.default_rng(3)
    one = corrupt(text, ["sentence_permutation"], LETTERS, rng, 0.3, 3.0)
    assert corrupt(one, ["text_infilling"], LETTERS, rng, 0.3, 3.0).tolist() == both.tolist()
    assert corrupt(text, [], LETTERS, rng).tolist() == text.tolist()
