"""Tasks as text: batches, mixtures by size, limit and temperature, and numbers as text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import make_tokenizer

from recipes.common.masked_language import add_marks
from recipes.common.text_to_text import (
    Pair,
    as_number,
    as_text,
    batch_of,
    correlation,
    encode_pairs,
    encode_with_own_marks,
    mixing_rates,
    mixture,
    say_cut,
    similar_pairs,
    write,
)


def test_mixing_rates() -> None:
    assert mixing_rates([100, 300], 10**6).tolist() == [0.25, 0.75]  # examples-proportional
    assert mixing_rates([100, 300, 10**9], 400).tolist() == [0.125, 0.375, 0.5]  # the huge one counts as 400
    assert mixing_rates([100, 300], 50).tolist() == [0.5, 0.5]  # all above the limit: equal mixing
    warm = mixing_rates([1, 4], 10, temperature=2)  # square roots: 1 to 2
    assert warm == pytest.approx([1 / 3, 2 / 3])
    assert mixing_rates([1, 10**6], 10**7, temperature=1e6) == pytest.approx([0.5, 0.5], abs=1e-4)


def test_a_mixture_has_its_rates_and_goes_round_a_task_before_it_repeats() -> None:
    tasks = [[Pair([task], [i]) for i in range(size)] for task, size in ((0, 100), (1, 300), (2, 5000))]
    drawn = mixture(tasks, 10_000, 400, 1.0, np.random.default_rng(0))
    counts = np.bincount([pair.source[0] for pair in drawn])
    assert counts / 10_000 == pytest.approx([0.125, 0.375, 0.5], abs=0.025)  # 5 standard errors
    first_round = [pair.target[0] for pair in drawn if pair.source[0] == 0][:100]
    assert sorted(first_round) == list(range(100)) and first_round != list(range(100))
    assert drawn == mixture(tasks, 10_000, 400, 1.0, np.random.default_rng(0))
    assert drawn != mixture(tasks, 10_000, 400, 1.0, np.random.default_rng(1))


def test_pairs_are_cut_with_their_end_kept() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    (pair,) = encode_pairs(tokenizer, ["abcdef"], ["<|end|>"], 4)
    assert tokenizer.decode(pair.source[:3]) == "abc" and pair.source[3:] == [end]
    assert len(pair.target) == 4 and pair.target.count(end) == 1  # a control token within a text is ordinary text


def test_batches_are_padded() -> None:
    batch = batch_of([Pair([5, 6, 1], [7, 1]), Pair([5, 1], [8, 9, 1])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]


def test_numbers_as_text() -> None:
    """2.57 is the paper's own example."""
    assert [as_text(x) for x in (2.57, 0, 5, 3.0, 0.09, 4.91)] == ["2.6", "0.0", "5.0", "3.0", "0.0", "5.0"]
    assert len({as_text(x) for x in np.linspace(0, 5, 1001)}) == 26  # 0 to 5 in steps of 0.2, none else
    assert as_number("3.8", 0, 5) == 3.8
    assert as_number("5.2", 0, 5) is None and as_number("a lot", 0, 5) is None and as_number("nan", 0, 5) is None


def test_correlation_counts_what_is_no_number_as_wrong() -> None:
    wanted = [0.0, 2.0, 4.0, 5.0]
    assert correlation(["0.0", "2.0", "4.0", "5.0"], wanted, 0, 5) == pytest.approx(1)
    assert correlation(["5.0", "3.0", "1.0", "0.0"], wanted, 0, 5) == pytest.approx(-1)
    assert correlation(["0.0", "2.0", "4.0", "five"], wanted, 0, 5) < 0.6
    assert correlation(["x"] * 4, wanted, 0, 5) == 0


def test_similar_pairs_say_how_many_words_stayed() -> None:
    sentences = [f"a{i} b{i} c{i} d{i} e{i}" for i in range(2000)]
    pairs = similar_pairs(sentences, np.random.default_rng(0))
    for first, second, score in pairs:
        same = sum(a == b for a, b in zip(first.split(), second.split(), strict=True))
        assert score == same
    counts = np.bincount([int(score) for _, _, score in pairs], minlength=6)
    assert counts / 2000 == pytest.approx([1 / 6] * 6, abs=0.045)  # 5 standard errors


class Echo(torch.nn.Module):
    """Writes its source, and keeps how it was asked."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=None, min_length=56)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, -1:]  # mBART's: the target's language stands last

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **asked: Any) -> torch.Tensor:
        self.asked, self.defaults = asked, self.generation_config
        return input_ids


def test_what_is_written_comes_back_in_the_order_of_the_pairs() -> None:
    tokenizer, model = make_tokenizer(), Echo()
    texts = ["ccc", "a", "dddd", "bb", "eeeee"]
    assert write(model, encode_pairs(tokenizer, texts, texts, 20), tokenizer, 4, False, batch_size=3) == texts


def test_a_checkpoints_generation_defaults_are_set_aside_and_put_back() -> None:
    tokenizer, model = make_tokenizer(), Echo()
    before = model.generation_config
    write(model, [Pair([20, 21, 1], [22, 77])], tokenizer, 4, False)
    assert model.generation_config is before and getattr(model.defaults, "min_length", None) != 56
    assert model.asked["decoder_start_token_id"] == 77
    assert model.asked["eos_token_id"] == [tokenizer.eos_token_id]


def test_pairs_are_encoded_as_the_models_own_tokenizer_does() -> None:
    """What it puts around a text of each side stays; an end follows where it puts none; both fit."""
    tokenizer = make_tokenizer()
    plain = encode_with_own_marks(tokenizer, ["abcdef"], ["ab"], 4)
    assert plain == encode_pairs(tokenizer, ["abcdef"], ["ab"], 4)
    add_marks(tokenizer)  # BERT's: [CLS] text [SEP]
    cls, sep, end = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
    ((source, target),) = encode_with_own_marks(tokenizer, ["abcdef"], ["ab"], 5)
    assert source[0] == cls and len(source) == 5 and source[-1] == end
    assert target[0] == cls and target[-2:] == [sep, end]


def test_pairs_that_fill_the_length_are_told_of() -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(say=said.append)
    pairs = [Pair([1, 2, 3, 4], [5]), Pair([1], [2, 3, 4, 5]), Pair([1, 2], [3])]
    say_cut(pairs, 4, "generation.max_length", run)
    say_cut(pairs, 5, "generation.max_length", run)
    assert said == ["  generation.max_length: 2 of 3 pairs reach 4 tokens; what is longer is cut"]
