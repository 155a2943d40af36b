"""Fine-tuning from two starts: nothing differs but the start, and a start that knows the answer wins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.common import downstream
from recipes.common.downstream import Downstream, accuracy, class_names, compare_starts, fine_tune, load_rows
from recipes.common.errors import UserError

ROWS = [{"x": [float(i % 2), float(i // 2 % 2), 1.0], "y": i % 2} for i in range(40)]
SETTINGS = Downstream(steps=15, batch_size=4, learning_rate=0.02)


class Linear(nn.Module):
    def __init__(self, weight: list[list[float]] | None = None):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 2)
        self.seen: list[torch.Tensor] = []
        if weight is not None:
            self.layer.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        if self.training:
            self.seen.append(x)
        logits = self.layer(x)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([row["x"] for row in rows]), "labels": torch.tensor([row["y"] for row in rows])}


@pytest.fixture
def args() -> Any:
    return SimpleNamespace(seed=0, device=torch.device("cpu"), bf16=False)


@pytest.fixture
def run() -> Any:
    said: list[str] = []
    return SimpleNamespace(say=said.append, said=said)


def test_both_starts_see_the_same_rows_in_the_same_order_and_the_better_one_wins(args: Any, run: Any) -> None:
    knows, fresh = Linear([[-3.0, 0.0, 1.5], [3.0, 0.0, -1.5]]), Linear([[2.0, 0.0, -1.0], [-2.0, 0.0, 1.0]])

    def score(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model, ROWS, collate, bf16=False)}

    figures = compare_starts(knows, fresh, ROWS, collate, SETTINGS, score, args, run, "parity")
    assert figures == {"parity_accuracy": 1.0, "baseline_parity_accuracy": figures["baseline_parity_accuracy"]}
    assert figures["baseline_parity_accuracy"] < 1.0
    assert len(knows.seen) == SETTINGS.steps
    assert all(torch.equal(one, other) for one, other in zip(knows.seen, fresh.seen, strict=True))
    assert len(run.said) == 2 and "pretrained" in run.said[0] and "from scratch" in run.said[1]


def test_every_row_is_used_before_any_comes_again(args: Any, run: Any) -> None:
    model = Linear()
    rows = [{"x": [float(i), 0.0, 0.0], "y": i % 2} for i in range(10)]
    fine_tune(model, rows, collate, Downstream(steps=5, batch_size=4, learning_rate=1e-3), args, run)
    seen = torch.cat(model.seen)[:, 0].tolist()
    assert sorted(seen[:10]) == sorted(seen[10:20]) == [float(i) for i in range(10)]


def test_fine_tuning_learns_and_a_seed_repeats_it(args: Any, run: Any) -> None:
    first, again = Linear(), Linear()
    losses = fine_tune(first, ROWS, collate, Downstream(steps=60, batch_size=8, learning_rate=0.1), args, run)
    assert losses[-1] < 0.5 * losses[0]
    assert losses == fine_tune(again, ROWS, collate, Downstream(steps=60, batch_size=8, learning_rate=0.1), args, run)
    assert torch.equal(first.layer.weight, again.layer.weight)


def test_what_is_frozen_stays(args: Any, run: Any) -> None:
    model = Linear()
    model.layer.bias.requires_grad_(False)
    before = model.layer.bias.clone()
    fine_tune(model, ROWS, collate, SETTINGS, args, run)
    assert torch.equal(model.layer.bias, before)


def test_rows_of_a_builtin_set_and_their_classes() -> None:
    rows, held_out = load_rows(
        Downstream(data="pydocs_package", labels=200, eval_rows=100), "classification", "downstream"
    )
    assert (len(rows), len(held_out)) == (200, 100)
    assert len(class_names(rows, held_out)) == 8
    with pytest.raises(UserError, match="one class alone"):
        class_names([rows[0]], held_out)
    with pytest.raises(UserError, match="none of the 2 training rows"):
        class_names([{"label": "a"}, {"label": "b"}], [{"label": "c"}])


def test_two_starts_are_copies_of_the_trained_weights_and_of_random_ones() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.common.downstream import two_starts

    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pretrained, fresh = two_starts(model, 0)
    _, again = two_starts(model, 0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(pretrained.state_dict()[name], before[name])
    assert not torch.equal(fresh.state_dict()[name], before[name])
    assert torch.equal(fresh.state_dict()[name], again.state_dict()[name])
    with torch.no_grad():
        pretrained.state_dict()[name].zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_a_classifier_adds_is_the_same_in_both_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[nn.Linear] = []
    monkeypatch.setattr(downstream, "compare_starts", lambda one, other, *_: caught.extend((one, other)) or {})
    rows = [{"label": "a"}, {"label": "b"}]
    args: Any = SimpleNamespace(seed=3, bf16=False)
    nothing: Any = None
    downstream.compare_classifiers(
        (None, None), (rows, rows), lambda _, names: nn.Linear(4, len(names)), nothing, nothing, args, nothing, "x"
    )
    assert torch.equal(caught[0].weight, caught[1].weight)


def test_errors_name_the_section_and_the_data(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text("".join(f'{{"text": "x{i}", "label": "a"}}\n' for i in range(40)))
    with pytest.raises(UserError, match=r"^pairs\.labels \(.*one\.jsonl\): the \d+ rows used have one class alone"):
        downstream.load_classes(Downstream(data=str(file)), "pairs")
