"""UniLM's masks, maskings and samples: figure 1 of the paper, the rates of 10,000 draws, and nothing leaked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import make_tokenizer

from recipes.common.prefix_masks import (
    BIDIRECTIONAL,
    LEFT_TO_RIGHT,
    RIGHT_TO_LEFT,
    SEGMENTS,
    SEQUENCE_TO_SEQUENCE,
    Marks,
    Sample,
    add_marks,
    allowed,
    answer_sample,
    batch_of,
    cloze_loss,
    encode,
    masked,
    ngrams,
    pretraining_sample,
    replace,
    train_on_cloze,
    write,
)

MARKS = Marks(start=1, end=2, mask=3, pad=0, ordinary=np.arange(4, 90))
BLOCK, OTHER = list(range(10, 34)), list(range(50, 74))


def draws(n: int = 10_000) -> list[np.random.Generator]:
    return [np.random.default_rng([3, i]) for i in range(n)]


# -------------------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (LEFT_TO_RIGHT, ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        (RIGHT_TO_LEFT, ["xxxxx", ".xxxx", "..xxx", "...xx", "....x"]),
        (BIDIRECTIONAL, ["xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxxx"]),
        (SEQUENCE_TO_SEQUENCE, ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]),
    ],
)
def test_the_four_masks_of_the_paper_s_figure_1(kind: int, rows: list[str]) -> None:
    def see(size: int) -> Any:
        return allowed(torch.tensor([kind]), torch.tensor([2]), torch.tensor([5]), size)[0, 0]

    expected = torch.tensor([[mark == "x" for mark in row] for row in rows])
    assert torch.equal(see(5), expected)
    padded = see(8)
    assert torch.equal(padded[:5, :5], expected)
    assert not padded[:5, 5:].any() and padded.any(-1).all()  # nobody looks at padding; no row has nothing to look at


def small_model(attention: str = "eager") -> Any:
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, type_vocab_size=6, attn_implementation=attention,
    )  # fmt: skip
    return BertForPreTraining(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", range(4))
def test_a_prediction_depends_on_what_its_mask_shows_alone(attention: str, kind: int) -> None:
    """Change each token in turn: the states of rows that may not look at it stay bit for bit, the others change."""
    model, n, first = small_model(attention), 9, 4
    tokens = [1, *range(10, 16), 20, 2]
    if kind in (LEFT_TO_RIGHT, RIGHT_TO_LEFT):
        first = n
    short = Sample(tokens[:6], [-100] * 6, min(first, 6), kind)
    batch = batch_of([Sample(tokens, [-100] * n, first, kind), short], MARKS)
    see = allowed(batch["kind"], batch["first"], batch["length"], n)[0, 0]
    with torch.no_grad():
        before = encode(model, **batch)[0]
        for i in range(n):
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][0, i] = 77
            after = encode(model, **changed)
            same = (after[0] == before).all(-1)[:n]
            assert torch.equal(~same, see[:, i])  # two layers reach no further than one: what is seen sees no more


def test_padding_changes_nothing() -> None:
    model = small_model()
    short, long = Sample([1, 10, 11, 2, 12, 2], [-100] * 6, 4, 3), Sample([1, *range(10, 40), 2], [-100] * 32, 32, 0)
    with torch.no_grad():
        alone, both = (encode(model, **batch_of(samples, MARKS)) for samples in ([short], [short, long]))
    assert both.shape[1] > alone.shape[1]
    torch.testing.assert_close(both[0, :6], alone[0, :6])


# ------------------------------------------------------------------------------------------------ what is masked


def test_the_rate_and_the_shares_of_bigrams_and_trigrams() -> None:
    maskable = np.ones(200, bool)
    maskable[[0, 99, 199]] = False
    sizes: Counter[int] = Counter()
    covered = np.zeros(200)
    for rng in draws(2000):
        found = ngrams(maskable, 0.15, 0.2, rng)
        assert sum(size for _, size in found) == 30  # round(0.15 * 197)
        sizes.update(size for _, size in found[:-1])  # the last may be cut
        for place, size in found:
            covered[place : place + size] += 1
    assert covered.max() <= 2000 and covered[~maskable].sum() == 0  # no overlap, no special token
    assert sizes[1] / sizes.total() == pytest.approx(0.8, abs=0.01)
    assert sizes[2] / sizes.total() == pytest.approx(0.1, abs=0.01)
    assert sizes[3] / sizes.total() == pytest.approx(0.1, abs=0.01)
    inner = covered[maskable][3:-3] / 2000
    assert inner.mean() == pytest.approx(0.15, abs=0.005) and inner.std() < 0.015


@pytest.mark.parametrize("places", [1, 2, 3, 7])
def test_a_short_text_has_a_masked_token(places: int) -> None:
    for rng in draws(50):
        assert 1 <= sum(size for _, size in ngrams(np.ones(places, bool), 0.15, 0.2, rng)) <= places
    assert ngrams(np.zeros(places, bool), 0.15, 0.2, np.random.default_rng(0)) == []


def test_eight_of_ten_masked_tokens_become_the_mask() -> None:
    kinds = Counter()
    for rng in draws():
        token = replace(17, MARKS, rng)
        kinds["mask" if token == MARKS.mask else "same" if token == 17 else "random"] += 1
        assert token == MARKS.mask or token in MARKS.ordinary
    assert kinds["mask"] == pytest.approx(8000, abs=160)
    assert kinds["random"] == pytest.approx(1000, abs=120) and kinds["same"] == pytest.approx(1000, abs=120)


def test_a_seed_gives_the_maskings_that_the_plain_way_gives() -> None:
    """The loop as section 2.4 tells it, on arrays: `ngrams` and `replace` are quicker, and draw the same."""

    def plainly(tokens: list[int], maskable: np.ndarray, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        given, labels, free = list(tokens), [-100] * len(tokens), maskable.copy()
        left, size, places = max(1, round(0.3 * int(maskable.sum()))), 0, []
        for place in rng.permutation(np.flatnonzero(maskable)):
            if left == 0:
                break
            if size == 0:
                size = int(rng.integers(2, 4)) if rng.random() < 0.2 else 1
            size = min(size, left)
            if free[place : place + size].sum() == size:
                places += range(place, place + size)
                free[place : place + size] = False
                left, size = left - size, 0
        for i in places:
            labels[i] = tokens[i]
            chance = rng.random()
            given[i] = MARKS.mask if chance < 0.8 else int(rng.choice(MARKS.ordinary)) if chance < 0.9 else tokens[i]
        return given, labels

    for seed in range(300):
        tokens = np.random.default_rng([1, seed]).integers(1, 90, 40 + seed % 20).tolist()
        maskable = ~np.isin(tokens, (MARKS.start, MARKS.end))
        found = [how(np.random.default_rng(seed)) for how in (
            lambda rng, t=tokens, m=maskable: plainly(t, m, rng),
            lambda rng, t=tokens, m=maskable: masked(t, m, 0.3, 0.2, MARKS, rng),
        )]  # fmt: skip
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", range(4))
def test_a_masked_token_leaves_no_trace_in_the_input(kind: int) -> None:
    """Another token in a masked place: the same input, save in the tenth that stay."""
    gone = 0
    for seed in range(200):
        sample = pretraining_sample(BLOCK, BLOCK, MARKS, np.random.default_rng(seed), kind=kind)
        masked_places = [i for i, label in enumerate(sample.labels) if label != -100]
        place = masked_places[seed % len(masked_places)]
        token = sample.labels[place]  # no other of the text's is like it
        changed = [88 if i == token else i for i in BLOCK]
        other = pretraining_sample(changed, changed, MARKS, np.random.default_rng(seed), kind=kind)
        assert other.labels == [*sample.labels[:place], 88, *sample.labels[place + 1 :]]
        if other.tokens == sample.tokens:
            gone += 1
        else:
            assert sample.tokens[place] == token and other.tokens == [
                *sample.tokens[:place], 88, *sample.tokens[place + 1 :]
            ]  # fmt: skip
    assert gone / 200 == pytest.approx(0.9, abs=0.1)


# ------------------------------------------------------------------------------------------------ the samples


def restored(sample: Sample) -> list[int]:
    return [token if label == -100 else label for token, label in zip(sample.tokens, sample.labels, strict=True)]


def test_the_four_masks_are_drawn_in_the_paper_s_shares() -> None:
    kinds = Counter(pretraining_sample(BLOCK, OTHER, MARKS, rng).kind for rng in draws())
    for kind, share in (
        (LEFT_TO_RIGHT, 1 / 6),
        (RIGHT_TO_LEFT, 1 / 6),
        (BIDIRECTIONAL, 1 / 3),
        (SEQUENCE_TO_SEQUENCE, 1 / 3),
    ):
        assert kinds[kind] / 10_000 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("kind", range(4))
def test_the_labels_rebuild_the_text(kind: int) -> None:
    asked: Counter[int] = Counter()
    for rng in draws(2000):
        sample = pretraining_sample(BLOCK, OTHER, MARKS, rng, kind=kind)
        text = restored(sample)
        asked[sample.is_next] += 1
        if kind in (LEFT_TO_RIGHT, RIGHT_TO_LEFT):
            assert text == [1, *BLOCK, 2] and sample.first == 26
        else:
            cut = sample.first - 2
            assert len(BLOCK) // 4 <= cut < len(BLOCK) - len(BLOCK) // 4
            second = OTHER if sample.is_next == 0 else BLOCK
            assert text == [1, *BLOCK[:cut], 2, *second[cut:], 2]
    assert set(asked) == ({0, 1} if kind == BIDIRECTIONAL else {-100})
    if kind == BIDIRECTIONAL:
        assert asked[1] == pytest.approx(1000, abs=90)


def test_segment_ids_tell_the_mask_and_the_segment() -> None:
    samples = [pretraining_sample(BLOCK, OTHER, MARKS, np.random.default_rng(k), kind=k) for k in range(4)]
    batch = batch_of(samples, MARKS)
    for row, sample in enumerate(samples):
        ids = batch["token_type_ids"][row, : len(sample.tokens)].tolist()
        a, b = SEGMENTS[row]
        assert ids == [a] * sample.first + [b] * (len(sample.tokens) - sample.first)
    assert len({SEGMENTS[k][0] for k in range(4)}) == 4


def test_a_seed_gives_its_sample_again_and_another_another() -> None:
    first, again, other = (pretraining_sample(BLOCK, OTHER, MARKS, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other


def test_in_fine_tuning_the_target_alone_is_masked_its_end_too() -> None:
    source, target = list(range(10, 20)), list(range(30, 39))
    masked, ends = [], 0
    for rng in draws(2000):
        sample = answer_sample(source, target, MARKS, rng, 40)
        assert restored(sample) == [1, *source, 2, *target, 2]
        places = [i for i, label in enumerate(sample.labels) if label != -100]
        assert min(places) >= sample.first == 12
        masked.append(len(places))
        ends += sample.labels[-1] == MARKS.end
    assert set(masked) == {7}  # 0.7 * 10
    assert ends / 2000 == pytest.approx(0.7, abs=0.04)
    long = answer_sample([9] * 99, [8] * 99, MARKS, np.random.default_rng(0), 40)
    assert len(long.tokens) == 40 and long.first == 19


def test_marks_are_added_once_and_are_never_a_random_token() -> None:
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    marks = add_marks(tokenizer)
    again = add_marks(tokenizer)
    assert len(tokenizer) == before + 2 and marks[:4] == again[:4] and len(set(marks[:4])) == 4
    assert not set(marks.ordinary.tolist()) & set(tokenizer.all_special_ids)
    assert len(marks.ordinary) == 256


# -------------------------------------------------------------------------------------------- loss and writing


def test_the_loss_is_the_mean_over_the_masked_tokens_plus_the_next_sentence_s() -> None:
    model = small_model()
    samples = [pretraining_sample(BLOCK, OTHER, MARKS, np.random.default_rng(k), kind=k) for k in range(4)]
    batch = batch_of(samples, MARKS)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "is_next")}
    with torch.no_grad():
        hidden = encode(model, **inputs)
        logits, asked = model.cls(hidden, model.bert.pooler(hidden))
        labels = batch["labels"]
        each = [
            -logits[r, i].log_softmax(-1)[labels[r, i]]
            for r in range(4)
            for i in range(labels.shape[1])
            if labels[r, i] != -100
        ]
        assert len(each) == 4 * 4  # round(0.15 * 24)
        cloze = torch.stack(each).mean()
        torch.testing.assert_close(cloze_loss(model, labels, **inputs), cloze)
        following = -asked[BIDIRECTIONAL].log_softmax(-1)[batch["is_next"][BIDIRECTIONAL]]
        torch.testing.assert_close(cloze_loss(model, labels, batch["is_next"], **inputs), cloze + following)
        train_on_cloze(model)
        torch.testing.assert_close(model(**batch).loss, cloze + following)


def test_writing_is_what_the_masks_predict_one_after_another() -> None:
    model = small_model()
    with torch.no_grad():
        written = write(model, [[10, 11], [20, 21, 22, 23]], MARKS, 4)
        for source, target in zip([[10, 11], [20, 21, 22, 23]], written, strict=True):
            for i in range(4):
                given = [1, *source, 2, *target[:i], MARKS.mask]
                sample = Sample(given, [-100] * len(given), len(source) + 2, SEQUENCE_TO_SEQUENCE)
                state = encode(model, **batch_of([sample], MARKS))[0, len(given) - 1]
                best = int(model.cls.predictions(state).argmax())
                if best == MARKS.end:
                    assert len(target) == i
                    break
                assert target[i] == best
        stopped = []
        for end in range(3, 40):  # of the words of a random model, one that it would write
            marks = MARKS._replace(end=end)
            answer = write(model, [[10, 11]], marks, 4)[0]
            if len(answer) == 4:
                continue
            given = [1, 10, 11, end, *answer, MARKS.mask]
            state = encode(model, **batch_of([Sample(given, [-100] * len(given), 4, SEQUENCE_TO_SEQUENCE)], marks))
            stopped.append(int(model.cls.predictions(state[0, len(given) - 1]).argmax()) == end and end not in answer)
        assert stopped and all(stopped)


def test_the_segments_of_the_four_masks_are_all_different() -> None:
    """As numbers: a saved model is of use to those alone who number them so."""
    assert SEGMENTS == ((2, 2), (3, 3), (0, 1), (4, 5)) and len({i for pair in SEGMENTS for i in pair}) == 6
