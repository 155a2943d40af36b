"""BERT's objectives: which tokens are hidden and how, whole words, and the two texts of a row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tiny_chat import make_tokenizer

from recipes.common.masked_language import (
    ANOTHER,
    FOLLOWS,
    IGNORED,
    add_marks,
    choose,
    hide,
    of_another_document,
    sample,
    segments,
)

PLAIN = np.arange(10, 110)
MASK = 5


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_papers_shares_over_ten_thousand_tokens() -> None:
    """Section 3.1: 15 % chosen; of these 80 % [MASK], 10 % random, 10 % as they were."""
    random, kinds, chosen_places = rng(), Counter(), Counter()
    ids = list(range(200, 300))
    for _ in range(700):  # 10,500 chosen tokens
        chosen = choose(range(100), 0.15, False, random)
        inputs, labels = hide(ids, chosen, MASK, PLAIN, random)
        assert len(chosen) == len(set(chosen.tolist())) == 15
        assert [place for place, label in enumerate(labels) if label != IGNORED] == chosen.tolist()
        assert all(inputs[place] == ids[place] for place in set(range(100)) - set(chosen.tolist()))
        assert all(labels[place] == ids[place] for place in chosen.tolist())
        chosen_places.update(chosen.tolist())
        for place in chosen.tolist():
            given = inputs[place]
            kinds["mask" if given == MASK else "same" if given == ids[place] else "random"] += 1
    for kind, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert kinds[kind] / 10_500 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 10_500))
    assert min(chosen_places.values()) > 60 and max(chosen_places.values()) < 160  # 105 each, every place alike


def test_a_seed_gives_the_tokens_that_the_plain_way_gives() -> None:
    """The rule of section 3.1 with `rng.choice`: `hide` is quicker, and draws the same."""
    for seed in range(200):
        ids, plainly = list(range(200, 300)), rng(seed)
        chosen = choose(range(100), 0.3, False, plainly)
        wanted = list(ids)
        for place, draw in zip(chosen.tolist(), plainly.random(len(chosen)), strict=True):
            wanted[place] = MASK if draw < 0.8 else int(plainly.choice(PLAIN)) if draw < 0.9 else wanted[place]
        quickly = rng(seed)
        assert hide(ids, choose(range(100), 0.3, False, quickly), MASK, PLAIN, quickly)[0] == wanted


def test_a_hidden_token_leaves_no_trace_in_the_row() -> None:
    """Another token in a hidden place: the same inputs, so the same predictions everywhere; where it stays, it alone differs."""
    left_out = 0
    for seed in range(200):
        ids, random = list(range(200, 300)), rng(seed)
        chosen = choose(range(100), 0.15, False, random)
        place = int(chosen[seed % len(chosen)])
        inputs, labels = hide(ids, chosen, MASK, PLAIN, rng(seed))
        changed, other_labels = hide([*ids[:place], 999, *ids[place + 1 :]], chosen, MASK, PLAIN, rng(seed))
        if inputs[place] == ids[place]:  # one of the tenth that stay
            assert changed == [*inputs[:place], 999, *inputs[place + 1 :]]
        else:
            assert changed == inputs
            left_out += 1
        assert other_labels == [*labels[:place], 999, *labels[place + 1 :]]
    assert left_out / 200 == pytest.approx(0.9, abs=0.08)


def test_random_tokens_are_plain_ones() -> None:
    ids = [200] * 2_000
    inputs, _ = hide(ids, np.arange(2_000), MASK, PLAIN, rng())
    drawn = {token for token in inputs if token not in (MASK, 200)}
    assert drawn <= set(PLAIN.tolist()) and len(drawn) > 80


def test_whole_words_are_hidden_with_all_their_tokens() -> None:
    words = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8, 8, 9, 9, 9]
    seen = Counter()
    for seed in range(500):
        chosen = set(choose(words, 0.3, True, rng(seed)).tolist())
        assert 1 <= len(chosen) <= 6
        for word in set(words):
            places = {place for place, of in enumerate(words) if of == word}
            assert places <= chosen or not places & chosen
            seen[word] += places <= chosen
    assert set(seen) == set(words) and min(seen.values()) > 20  # long words too


def test_at_least_one_token_is_hidden_and_a_seed_repeats_it() -> None:
    assert len(choose([0, 0, 0], 0.15, False, rng())) == 1
    assert len(choose([0, 0, 0, 0], 0.15, True, rng())) == 1  # no word is short enough
    assert choose(range(50), 0.15, True, rng(3)).tolist() == choose(range(50), 0.15, True, rng(3)).tolist()
    assert choose(range(50), 0.15, True, rng(3)).tolist() != choose(range(50), 0.15, True, rng(4)).tolist()


def test_half_of_the_second_texts_follow_and_all_have_the_blocks_length() -> None:
    block, other = list(range(40)), list(range(100, 140))
    labels = Counter()
    for seed in range(10_000):
        a, b, label = segments(block, other, rng(seed))
        labels[label] += 1
        assert len(a) + len(b) == 40 and 10 <= len(a) < 30
        assert list(a) == block[: len(a)]
        assert list(b) == (block[len(a) :] if label == FOLLOWS else other[: len(b)])
    assert labels[FOLLOWS] / 10_000 == pytest.approx(0.5, abs=0.02) and set(labels) == {FOLLOWS, ANOTHER}


def test_the_other_text_is_of_any_other_document_and_never_of_its_own() -> None:
    rows = [{"document": document, "block": block} for document in range(4) for block in range(3)]
    drawn = Counter(
        (other["document"], other["block"])
        for seed in range(9_000)
        for other in [of_another_document(rows[4], rows, rng(seed))]
    )
    assert {document for document, _ in drawn} == {0, 2, 3} and len(drawn) == 9
    assert all(count == pytest.approx(1_000, abs=130) for count in drawn.values())  # 4 sigma


def test_a_row_has_berts_form_and_gives_the_text_back() -> None:
    tokenizer = make_tokenizer()
    add_marks(tokenizer)
    marks = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    block, other = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the man went out. ", "pens are blue, ok")
    )
    size = min(len(block), len(other))
    texts = [(ids[:size], list(range(size))) for ids in (block, other)]
    for seed in range(40):
        row = sample(texts[0], texts[1], tokenizer, PLAIN, 0.15, False, rng(seed))
        ids, labels, types = row["input_ids"], row["labels"], row["token_type_ids"]
        assert len(ids) == len(labels) == len(types) == size + 3
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        first_end = ids.index(tokenizer.sep_token_id)
        assert types == [0] * (first_end + 1) + [1] * (len(ids) - first_end - 1)
        assert sum(token in marks for token in ids) == 3  # and so none of them was hidden or drawn
        whole = [label if label != IGNORED else token for token, label in zip(ids, labels, strict=True)]
        a, b = whole[1:first_end], whole[first_end + 1 : -1]
        follows = row["next_sentence_label"] == FOLLOWS
        assert a == block[: len(a)] and b == (block[len(a) : size] if follows else other[: len(b)])


def test_words_of_two_texts_with_one_number_are_two() -> None:
    """A's word 0 and B's word 0 are not one word: of those that both texts have whole, one is hidden without the other."""
    tokenizer = make_tokenizer()
    add_marks(tokenizer)
    texts = [(list(range(first, first + 12)), [i // 2 for i in range(12)]) for first in (20, 40)]  # words of two tokens
    apart = 0
    for seed in range(300):
        row = sample(texts[0], texts[1], tokenizer, np.arange(20, 60), 0.34, True, rng(seed))
        if row["next_sentence_label"] == ANOTHER:
            first = row["token_type_ids"].index(1) - 2  # tokens of A
            hidden = {label for label in row["labels"] if label != IGNORED}
            both = range(min(first // 2, (12 - first) // 2))  # words whole in A and in B
            apart += any((20 + 2 * word in hidden) != (40 + 2 * word in hidden) for word in both)
    assert apart > 30


def test_next_sentence_labels_are_transformers() -> None:
    """BertForPreTraining: 0 says that B follows A, 1 that it does not."""
    for seed in range(50):
        _, b, label = segments(list(range(40)), list(range(100, 140)), rng(seed))
        assert label == int(b[0] >= 100)


def test_cuts_lie_anywhere_between_the_quarters() -> None:
    cuts = Counter(len(segments(list(range(40)), list(range(40)), rng(seed))[0]) for seed in range(4000))
    assert set(cuts) == set(range(10, 30)) and min(cuts.values()) > 130  # 200 each


def test_the_number_of_hidden_tokens_is_rounded() -> None:
    assert [len(choose(range(n), 0.15, False, rng())) for n in (13, 16, 17)] == [2, 2, 3]


def test_the_tokenizer_gives_one_text_or_two_in_berts_form() -> None:
    tokenizer = make_tokenizer()
    add_marks(tokenizer)
    size = len(tokenizer)
    add_marks(tokenizer)
    assert len(tokenizer) == size  # adding twice adds nothing
    pair = tokenizer("ab", "cd")
    assert tokenizer.decode(pair["input_ids"]).replace(" ", "") == "[CLS]ab[SEP]cd[SEP]"
    ends = pair["input_ids"].index(tokenizer.sep_token_id)
    assert pair["token_type_ids"] == [0] * (ends + 1) + [1] * (len(pair["input_ids"]) - ends - 1)
