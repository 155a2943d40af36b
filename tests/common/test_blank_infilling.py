"""GLM's spans, samples and mask: the paper's figure 2, the distributions of 10,000 draws, and nothing lost or leaked."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import make_tokenizer

from recipes.common import blank_infilling
from recipes.common.blank_infilling import (
    Corrupter,
    Marks,
    add_marks,
    batch_of,
    check_mix,
    document_span,
    infill,
    rebuild,
    sentence_marks,
    sentence_spans,
    sentences,
    token_spans,
)
from recipes.common.errors import UserError
from recipes.common.modeling_blank_infilling import BlankInfillingConfig, BlankInfillingModel, part_mask

M, S, E, PAD = 100, 101, 102, 0
MARKS = Marks(M, S, E, PAD)
MIX = {"token": 0.5, "sentence": 0.25, "document": 0.25}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, and the three marks of the objective."""
    made = make_tokenizer()
    add_marks(made)
    return made


@pytest.fixture(scope="module")
def corrupt(tokenizer: Any) -> Corrupter:
    return Corrupter(add_marks(tokenizer), sentence_marks(tokenizer), MIX)


def draws(n: int = 10_000) -> list[np.random.Generator]:
    return [np.random.default_rng([7, i]) for i in range(n)]


# ------------------------------------------------------------------------------------------------ figure 2


def test_figure_2_of_the_paper() -> None:
    sample = infill([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)], [1, 0], MARKS)
    assert sample.tokens == [1, 2, M, 4, M, S, 5, 6, S, 3]
    assert [p + 1 for p in sample.positions] == [1, 2, 3, 4, 5, 5, 5, 5, 3, 3]
    assert sample.span_positions == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert sample.labels == [-100] * 5 + [5, 6, E, 3, E]
    assert sample.context_length == 5


def test_figure_2_s_mask() -> None:
    allowed = part_mask(torch.tensor([5]), 10)[0, 0].int()
    for row in range(10):
        assert allowed[row].tolist() == [1] * max(5, row + 1) + [0] * (10 - max(5, row + 1))


# ------------------------------------------------------------------------------------------------ the spans


def test_short_spans_cover_the_rate_and_a_span_more_at_most() -> None:
    for rng in draws(2000):
        spans = token_spans(128, 0.15, 3.0, rng)
        sizes = [stop - start for start, stop in spans]
        assert sum(sizes) >= 0.15 * 128 > sum(sizes) - max(sizes)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))  # in order, a token between them at least
        assert spans[0][0] >= 0 and spans[-1][1] <= 128


def test_short_spans_are_poisson_3_without_zero() -> None:
    """Long texts, so that the stopping rule hardly favours long spans."""
    sizes: Counter[int] = Counter()
    for rng in draws(400):
        sizes.update(stop - start for start, stop in token_spans(1024, 0.15, 3.0, rng))
    assert sizes.total() > 10_000
    zero = np.exp(-3)
    probability = zero
    for size in range(1, 8):
        probability *= 3 / size
        expected = probability / (1 - zero)
        error = np.sqrt(expected * (1 - expected) / sizes.total())
        assert abs(sizes[size] / sizes.total() - expected) < 4 * error + 0.004, size


def test_short_spans_fall_everywhere_alike() -> None:
    covered = np.zeros(40)
    for rng in draws():
        for start, stop in token_spans(40, 0.15, 3.0, rng):
            covered[start:stop] += 1
    covered /= 10_000
    inner = covered[6:-6]
    assert 0.15 < inner.mean() < 0.24  # 6 tokens of 40 at least, one span more at most
    assert inner.std() < 0.012


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rate", [0.15, 0.5, 0.99])
def test_short_spans_of_short_texts(length: int, rate: float) -> None:
    for rng in draws(300):
        spans = token_spans(length, rate, 3.0, rng)
        assert spans and all(0 <= start < stop <= length for start, stop in spans)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


def test_a_document_span_is_half_to_all_of_the_text_uniformly() -> None:
    sizes, starts = [], []
    for rng in draws():
        ((start, stop),) = document_span(100, 0.5, rng)
        sizes.append(stop - start)
        starts.append(start / (100 - sizes[-1]) if sizes[-1] < 100 else 0.5)
    assert min(sizes) == 50 and max(sizes) == 100
    counts = np.bincount(sizes)[50:]
    assert counts.min() > 130 and counts.max() < 265  # 196 each
    assert abs(np.mean(starts) - 0.5) < 0.01


def test_sentences_end_where_a_reader_ends_them(tokenizer: Any) -> None:
    text = "One is 1.5 high. Two!  Three?\n\n    if x:\n        return y.z\nlast"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [tokenizer.decode(ids[a:b]) for a, b in sentences(ids, sentence_marks(tokenizer))]
    assert "".join(parts) == text
    assert [part.strip() for part in parts] == ["One is 1.5 high.", "Two!", "Three?", "if x:", "return y.z", "last"]


def test_masked_sentences_are_whole_ones_and_cover_the_rate() -> None:
    whole = [(0, 9), (9, 12), (12, 30), (30, 34), (34, 60), (60, 100)]
    taken: Counter[tuple[int, int]] = Counter()
    for rng in draws(3000):
        spans = sentence_spans(whole, 0.15, rng)
        sizes = [stop - start for start, stop in spans]
        assert set(spans) <= set(whole) and spans == sorted(spans)
        assert sum(sizes) >= 15 and (len(sizes) == 1 or sum(sizes) - max(sizes) < 15)
        taken.update(spans)
    assert set(taken) == set(whole)


# ------------------------------------------------------------------------------------------------ the sample


def test_the_mix_is_drawn_in_its_shares(corrupt: Corrupter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer("A sentence. " * 8, add_special_tokens=False)["input_ids"]
    kinds: Counter[str] = Counter()

    def count(name: str) -> None:
        plain = getattr(blank_infilling, name)
        monkeypatch.setattr(blank_infilling, name, lambda *given: (kinds.update([name]), plain(*given))[1])

    for name in ("token_spans", "sentence_spans", "document_span"):
        count(name)
    for rng in draws():
        corrupt(ids, rng)
    for name, share in (("token_spans", 0.5), ("sentence_spans", 0.25), ("document_span", 0.25)):
        assert kinds[name] / 10_000 == pytest.approx(share, abs=0.02), name  # 4 standard errors
    assert kinds.total() == 10_000


def test_part_a_does_not_know_what_was_cut_out(corrupt: Corrupter, tokenizer: Any) -> None:
    """Other tokens in the spans: Part A, and all positions, stay as they are."""
    ids = tokenizer("To be or not to be, that is the question. " * 3, add_special_tokens=False)["input_ids"]
    for rng in draws(200):
        spans = token_spans(len(ids), 0.15, 3.0, rng)
        inside = {i for start, stop in spans for i in range(start, stop)}
        order = rng.permutation(len(spans)).tolist()
        sample, other = (
            infill(text, spans, order, corrupt.marks)
            for text in (ids, [ids[0] if i in inside else token for i, token in enumerate(ids)])
        )
        n = sample.context_length
        assert sample.tokens[:n] == other.tokens[:n] and sample.context_length == other.context_length
        assert (sample.positions, sample.span_positions) == (other.positions, other.span_positions)


@pytest.mark.parametrize("objective", ["token", "sentence", "document"])
def test_the_parts_rebuild_the_text(corrupt: Corrupter, tokenizer: Any, objective: str) -> None:
    text = "Read it. Then write!\nfor i in range(3):\n    print(i)\nThat is all there is to be said here. "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = corrupt.marks
    for rng in draws(500):
        sample = corrupt(ids, rng, objective)
        spans = sample.tokens.count(marks.start)
        assert rebuild(sample, marks) == ids
        assert len(sample.tokens) == len(ids) + 2 * spans  # a mask and a start for each span
        assert sample.tokens.count(marks.mask) == spans == sample.labels.count(marks.stop)
        assert max(sample.span_positions) <= len(ids) + 1 and max(sample.positions) < len(ids)


def test_spans_come_in_every_order() -> None:
    orders = set()
    corrupt = Corrupter(MARKS, sentence_marks(make_tokenizer()), {"token": 1.0}, mask_rate=0.3)
    for rng in draws(300):
        sample = corrupt(list(range(1, 21)), rng)
        starts = [sample.positions[i] for i, token in enumerate(sample.tokens) if token == S]
        if len(starts) == 3:
            orders.add(tuple(np.argsort(starts).tolist()))
    assert len(orders) == 6


def test_a_seed_gives_its_sample_again_and_another_another(corrupt: Corrupter, tokenizer: Any) -> None:
    ids = tokenizer("To be or not to be, that is the question. " * 3, add_special_tokens=False)["input_ids"]
    first, again, other = (corrupt(ids, np.random.default_rng(seed), "token") for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("mix", [{}, {"token": -1.0, "document": 2.0}, {"word": 1.0}, {"token": 0.0}])
def test_a_mix_that_cannot_be_drawn_from_is_refused(mix: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"glm\.mix"):
        check_mix(mix)


def test_marks_are_added_once(tokenizer: Any) -> None:
    size = len(tokenizer)
    marks = add_marks(tokenizer)
    assert len(tokenizer) == size and len(set(marks)) == 4
    assert tokenizer.decode(tokenizer("<|mask|>", split_special_tokens=True)["input_ids"]) == "<|mask|>"
    assert marks.mask not in tokenizer("<|mask|>", split_special_tokens=True)["input_ids"]


# ------------------------------------------------------------------------------------------------ no leak


def small_model(attention: str = "eager") -> BlankInfillingModel:
    torch.manual_seed(0)
    config = BlankInfillingConfig(
        vocab_size=110,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=40,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return BlankInfillingModel(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prediction_sees_part_a_and_what_is_before_it_alone(attention: str) -> None:
    """Change each token of Part B in turn: the logits before it stay bit for bit, its own and a later one change."""
    model = small_model(attention)
    sample = infill(list(range(1, 13)), [(2, 3), (5, 9), (10, 11)], [1, 2, 0], MARKS)
    batch = batch_of([sample], PAD)
    del batch["labels"]
    length = len(sample.tokens)
    with torch.no_grad():
        before = model(**batch).logits[0]
        for i in range(length):
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][0, i] = 50
            after = model(**changed).logits[0]
            same = (before == after).all(-1)
            if i < sample.context_length:
                assert not same[:length].any()  # Part A is seen from everywhere
            else:
                assert same[:i].all() and not same[i:length].any()


def test_padding_changes_nothing() -> None:
    model = small_model()
    short = infill(list(range(1, 8)), [(2, 4)], [0], MARKS)
    long = infill(list(range(1, 31)), [(2, 4), (6, 12)], [1, 0], MARKS)
    with torch.no_grad():
        alone, both = (model(**{**batch_of(s, PAD), "labels": None}).logits for s in ([short], [short, long]))
    n = len(short.tokens)
    torch.testing.assert_close(alone[0, :n], both[0, :n])


def test_a_mask_does_not_tell_how_long_its_span_is() -> None:
    """Part A of a span of one token and of five: the same ids, positions and logits."""
    one = infill([1, 2, 3, 9], [(2, 3)], [0], MARKS)
    five = infill([1, 2, 3, 4, 5, 6, 7, 9], [(2, 7)], [0], MARKS)
    n = one.context_length
    assert n == five.context_length
    for name in ("tokens", "positions", "span_positions"):
        assert getattr(one, name)[: n + 1] == getattr(five, name)[: n + 1]


def test_the_loss_is_the_mean_over_the_targets() -> None:
    model = small_model()
    samples = [infill(list(range(1, 13)), [(2, 3), (5, 9)], [1, 0], MARKS), infill([3, 4, 5, 6], [(1, 2)], [0], MARKS)]
    batch = batch_of(samples, PAD)
    labels = batch["labels"]
    with torch.no_grad():
        logits = model(**{**batch, "labels": None}).logits.log_softmax(-1)
        expected = [
            -logits[r, i, labels[r, i]] for r in range(2) for i in range(labels.shape[1]) if labels[r, i] != -100
        ]
        assert len(expected) == (1 + 4 + 2) + (1 + 1)  # tokens of the spans, and a stop for each
        torch.testing.assert_close(model(**batch).loss, torch.stack(expected).mean())
        halves = model(**batch, num_items_in_batch=2 * len(expected)).loss
        torch.testing.assert_close(halves, torch.stack(expected).mean() / 2)


@pytest.mark.slow
def test_a_saved_model_loads_with_our_class_and_with_auto(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model()
    model.save_pretrained(tmp_path)
    batch = {**batch_of([infill(list(range(1, 13)), [(2, 3), (5, 9)], [1, 0], MARKS)], PAD), "labels": None}
    with torch.no_grad():
        expected = model(**batch).logits
        for load in (BlankInfillingModel, AutoModelForCausalLM):
            loaded = load.from_pretrained(tmp_path, attn_implementation="eager")
            assert isinstance(loaded, BlankInfillingModel)
            assert torch.equal(loaded(**batch).logits, expected)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_saved_model_is_weights_and_no_code(tmp_path: Any) -> None:
    small_model().save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_answers_have_the_length_at_most() -> None:
    batch = blank_infilling.answer_batch([[5] * 50], [[8] * 50], Marks(1, 2, 3, 0), 20)
    assert int((batch["input_ids"] != 0).sum()) == 20


def test_an_end_of_text_ends_a_sentence() -> None:
    tokenizer = make_tokenizer()
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    ends = blank_infilling.sentence_marks(tokenizer)
    assert blank_infilling.sentences([a, tokenizer.eos_token_id, b], ends) == [(0, 2), (2, 3)]
