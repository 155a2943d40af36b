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
from recipes.common.fused_loss import smoothed_loss
from recipes.common.text_to_text import Pair, batch_of, bleu

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


def encoder_decoder(kind: str) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes))
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=60, d_model=32, max_position_embeddings=64, dropout=0.0, init_std=0.2, **sizes, **heads
    )
    config.pad_token_id, config.decoder_start_token_id = 0, 2
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_smoothed_loss_without_logits_is_the_one_on_the_library_s_logits_with_its_gradients(
    kind: str, bf16: bool
) -> None:
    """Of 600 targets: three pieces. Also share 0, which is the library's own loss, and beside a source encoder's model."""
    model = encoder_decoder(kind)
    rng = torch.Generator().manual_seed(1)
    rows = [
        Pair(*(torch.randint(3, 60, (n,), generator=rng).tolist() for n in (5 + i % 7, 9 + i % 13))) for i in range(40)
    ]
    batch = batch_of(rows, 0)
    for share in (0.0, 0.1):
        found = []
        for ours in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                if ours:
                    loss = smoothed_loss(model, batch, share)
                else:
                    out = model(**batch)
                    logits = out.logits.flatten(0, 1).float()
                    loss = F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=share)
                    if share == 0:
                        assert loss.item() == pytest.approx(out.loss.item(), rel=1e-2 if bf16 else 1e-6)
            loss.backward()
            found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert found[1][0] == pytest.approx(found[0][0], rel=5e-3 if bf16 else 1e-6)
        for name, gradient in found[0][1].items():  # that of a key's bias is 0: attention does not know it
            apart, least = (found[1][1][name] - gradient).norm(), 2e-3 if bf16 else 1e-6
            assert apart < (0.05 if bf16 else 1e-4) * gradient.norm() + least, (name, apart)
        assert model.get_output_embeddings()._forward_pre_hooks == {}  # the head is whole again


def test_fine_tuning_takes_the_smoothed_loss_of_an_encoder_decoder() -> None:
    args: Any = SimpleNamespace(seed=0, device=torch.device("cpu"), bf16=False)
    batch = batch_of([Pair([5, 6, 1], [7, 1]), Pair([5, 1], [8, 9, 1])], 0)
    settings = Downstream(steps=1, batch_size=1, label_smoothing=0.1)
    (first,) = fine_tune(encoder_decoder("t5"), [0], lambda _: batch, settings, args, SimpleNamespace())  # type: ignore[arg-type]
    logits = encoder_decoder("t5")(**batch).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.1)
    assert first == pytest.approx(wanted.item(), rel=1e-5)
