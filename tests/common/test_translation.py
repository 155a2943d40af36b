"""What translation adds to fine-tuning: BLEU as sacreBLEU counts it, beams, batches of like length, smoothed targets."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.common.downstream import Downstream, batches_of, fine_tune, written_score
from recipes.common.text_to_text import Pair, bleu

WRITTEN = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
WANTED = ["The dog bit the man.", "It was not surprising.", "The man had bitten the dog."]


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    score, line = bleu(WRITTEN, WANTED, "13a")
    assert score == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, [WANTED]).score)
    assert (
        line == f"BLEU = {score:.2f} {line.split(' ', 3)[3]}"
        and f"|tok:13a|smooth:exp|version:{sacrebleu.__version__}" in line
    )
    assert bleu(WANTED, WANTED, "13a")[0] == pytest.approx(100)
    assert bleu(["xyz"] * 3, WANTED, "13a")[0] == 0
    # by hand: of the hypothesis' 4 words, 3 pairs, 2 triples and 1 four, all are there; one word of five is missing
    assert bleu(["a b c d"], ["a b c d e"], "13a")[0] == pytest.approx(
        100 * torch.tensor(1 - 5 / 4).exp().item(), rel=1e-6
    )
    chinese = "我们明天去北京看长城"
    assert bleu([chinese], [chinese], "zh")[0] == pytest.approx(100)
    assert bleu([chinese[:8]], [chinese], "zh")[0] > 70 > bleu([chinese[:8]], [chinese], "13a")[0]  # 13a: one word


def test_a_written_score_has_bleu_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.common.held_out.mean_loss", lambda *_: 1.5)
    said: list[str] = []
    samples: dict[str, str] = {}
    run: Any = SimpleNamespace(say=said.append, sample=samples.__setitem__)
    args: Any = None
    score = written_score(["a", "b", "c"], WANTED, lambda _: WRITTEN, [], args, run, "translation", "13a")
    figures = score(None)
    assert figures["bleu"] == bleu(WRITTEN, WANTED, "13a")[0] and figures["loss"] == 1.5
    assert "tok:13a" in said[0] and samples["translation-pretrained.txt"].startswith("BLEU = ")
    plain = written_score(["a", "b", "c"], WANTED, lambda _: WRITTEN, [], args, run, "plain")
    assert "bleu" not in plain(None) and len(said) == 1


def pairs(count: int) -> list[Pair]:
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (count,), generator=rng).tolist()
    return [Pair([i] * size, [i] * size) for i, size in enumerate(sizes)]


def test_batches_of_like_length_hold_every_row_once_and_little_padding() -> None:
    rows = pairs(1000)

    def drawn(group: bool) -> tuple[list[list[int]], float]:
        settings = Downstream(batch_size=10, group_by_length=group)
        batches = batches_of(rows, settings, torch.Generator().manual_seed(0))
        found = [next(batches) for _ in range(100)]
        sizes = [[len(rows[i].source) for i in batch] for batch in found]
        return found, 1 - sum(map(sum, sizes)) / sum(max(batch) * len(batch) for batch in sizes)

    (grouped, little), (mixed, much) = drawn(True), drawn(False)
    assert sorted(chain.from_iterable(grouped)) == sorted(chain.from_iterable(mixed)) == list(range(1000))
    assert little < 0.03 and much > 0.35
    longest = [max(len(rows[i].source) for i in batch) for batch in grouped]
    assert longest != sorted(longest)  # short and long batches come in any order
    assert grouped == drawn(True)[0]


class Copy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.table(x)  # (batch, seq, 5)
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def test_smoothed_targets_are_a_mixture_with_the_uniform_one_and_padding_counts_for_nothing() -> None:
    batch = {"x": torch.tensor([[1, 2, 0]]), "labels": torch.tensor([[3, 4, -100]])}
    args: Any = SimpleNamespace(seed=0, device=torch.device("cpu"), bf16=False)
    run: Any = SimpleNamespace()

    def first_loss(share: float | None) -> float:
        settings = Downstream(steps=1, batch_size=1, label_smoothing=share)
        return fine_tune(Copy(), [0], lambda _: batch, settings, args, run)[0]

    logp = Copy().table(torch.tensor([1, 2])).log_softmax(-1)
    plain = -(logp[0, 3] + logp[1, 4]).item() / 2
    assert first_loss(None) == pytest.approx(plain)
    assert first_loss(0.1) == pytest.approx(0.9 * plain + 0.1 * -logp.mean().item())
