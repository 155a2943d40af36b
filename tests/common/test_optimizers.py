"""Muon with AdamW: which parameters go where, and where it is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat import make_model, make_tokenizer

from recipes.common.errors import UserError
from recipes.common.optimizers import BatchedMuon, muon_with_adamw, slow_queries

ARGS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "optim": "adamw_torch_fused",
    "deepspeed": None,
    "fsdp": None,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(make_tokenizer())


def test_every_parameter_learns_once_and_muon_takes_hidden_matrices_only(model: Any) -> None:
    optimizer = muon_with_adamw(model, SimpleNamespace(**ARGS), 0.01)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(i for group in groups for i in group) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[i] for i in groups[0]}
    assert by_muon and all(name.endswith("_proj.weight") for name in by_muon)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert {names[i].rsplit(".", 2)[-2] for i in groups[2]} == {"input_layernorm", "post_attention_layernorm", "norm"}


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "more", "heads"),
    [
        ("LlamaForSequenceClassification", {"num_labels": 4}, {"score.weight"}),
        ("LlamaForSequenceClassification", {"num_labels": 1}, {"score.weight"}),
        ("BertForPreTraining", {}, {"cls.seq_relationship.weight"}),
        ("BertForTokenClassification", {"num_labels": 3}, {"classifier.weight"}),
    ],
)
def test_a_head_is_no_hidden_matrix(kind: str, more: dict[str, Any], heads: set[str]) -> None:
    import transformers

    config = getattr(transformers, f"{kind.partition('For')[0]}Config")(**SIZES, pad_token_id=0, **more)
    model = getattr(transformers, kind)(config)
    optimizer = muon_with_adamw(model, SimpleNamespace(**ARGS), 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, decayed = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups[:2])
    assert heads <= decayed and not any("embeddings" in name for name in muon)
    assert muon == {name for name, p in model.named_parameters() if p.ndim == 2} - decayed
    assert ("cls.predictions.transform.dense.weight" in muon) == (kind == "BertForPreTraining")


def test_queries_of_an_attention_that_is_not_scaled_learn_slower(model: Any) -> None:
    optimizer = muon_with_adamw(model, SimpleNamespace(**ARGS), 0.01)
    queries = [p for name, p in model.named_parameters() if name.endswith("q_proj.weight")]
    before = {id(p) for p in optimizer.param_groups[0]["params"]}
    slow_queries(optimizer, queries, 16)
    others, apart = optimizer.muon.param_groups
    assert [group["lr"] for group in (others, apart)] == [0.01, 0.0025] and apart["params"] == queries
    assert {id(p) for group in (others, apart) for p in group["params"]} == before


@pytest.mark.parametrize("library", ["DeepSpeed", "FSDP"])
@pytest.mark.parametrize("by", ["launcher", "training"])
def test_it_is_refused_where_matrices_are_sharded(
    model: Any, monkeypatch: pytest.MonkeyPatch, library: str, by: str
) -> None:
    """ZeRO's optimizer sees pieces of a flat vector, at every stage; no error would follow."""
    changes: dict[str, Any] = {}
    if by == "launcher":  # what `accelerate launch` sets for zero1 .. zero3_offload and fsdp
        monkeypatch.setenv(f"ACCELERATE_USE_{library.upper()}", "true")
    else:
        changes = {"deepspeed": "zero2.json"} if library == "DeepSpeed" else {"fsdp": "full_shard"}
    with pytest.raises(UserError, match=f"{library} hands the optimizer pieces.*optimizer: adamw"):
        muon_with_adamw(model, SimpleNamespace(**{**ARGS, **changes}), 0.01)


def test_another_optimizer_is_not_left_out_without_a_word(model: Any) -> None:
    with pytest.raises(UserError, match=r"training\.optim: adafactor would do nothing.*optimizer: adamw"):
        muon_with_adamw(model, SimpleNamespace(**{**ARGS, "optim": "adafactor"}), 0.01)


def test_batched_muon_is_muon() -> None:
    """Square, wide and tall matrices, some without a gradient; a few steps, against torch's own loop."""
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 40), (40, 16), (16, 16), (40, 16), (8, 24)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    batched, single = BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = None if step == 2 and i == 3 else torch.randn(p.shape)
        before = [q.detach().clone() for q in theirs]
        batched.step()
        single.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() <= 0.02 * (q - old).norm() + 1e-6  # bf16, and sums in another order
            q.data.copy_(p.data)
    assert batched.state_dict()["state"].keys() == single.state_dict()["state"].keys()
