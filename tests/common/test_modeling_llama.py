"""The LLaMA that is written out: the library's logits and gradients on the same weights, and what its parts promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.common.modeling_llama import Llama, RMSNorm, rope_angles, rotate

CONFIGS = Path(__file__).resolve().parents[2] / "configs/pretraining/llama"


def pair(**changes: Any) -> tuple[Llama, LlamaForCausalLM]:
    """Ours and the library's, with the same weights; they are large, so that scores and logits are far from 0."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "initializer_range": 0.15, "max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **changes})
    library = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in library.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # as they are made they are 1, and a forgotten one would not show
    ours = Llama(config)
    ours.load_state_dict(library.state_dict())
    return ours, library


def tokens(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours: torch.Tensor, library: torch.Tensor) -> None:
    assert library.std() > 0.3
    torch.testing.assert_close(ours, library, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("groups", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_logits_and_gradients_are_the_library_s(groups: int, tied: bool) -> None:
    ours, library = pair(num_key_value_heads=groups, tie_word_embeddings=tied)
    assert sum(p.numel() for p in ours.parameters()) == library.num_parameters()
    ids = tokens()
    logits = ours(ids)
    assert_same(logits, library(ids).logits)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    library(ids, labels=ids).loss.backward()
    theirs = dict(library.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_rope_theta_is_heeded(theta: float) -> None:
    ours, library = pair(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert_same(ours(tokens()), library(tokens()).logits)
    other, _ = pair(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 2 * theta})
    assert not torch.allclose(other(tokens()), ours(tokens()), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"head_dim": 12}, {"rms_norm_eps": 0.1}])
def test_the_config_s_other_fields_are_heeded(changes: dict[str, Any]) -> None:
    ours, library = pair(num_key_value_heads=3, **changes)
    assert_same(ours(tokens()), library(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("groups", [6, 2])
def test_left_padding_changes_nothing(groups: int) -> None:
    ours, library = pair(num_key_value_heads=groups)
    ids, mask = tokens(), torch.ones(3, 17, dtype=torch.long)
    mask[1, :5], mask[2, :16] = 0, 0
    for positions in (
        None,
        (mask.cumsum(-1) - 1).clamp(min=0),
    ):  # rotations are relative: it matters not where one counts from
        logits = ours(ids, attention_mask=mask, position_ids=positions)
        expected = library(ids, attention_mask=mask, position_ids=positions).logits
        assert_same(logits[mask == 1], expected[mask == 1])
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1, 5:], ours(ids[1:2, 5:])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_that_are_given_are_used() -> None:
    ours, library = pair(num_key_value_heads=2)
    ids = tokens()
    positions = torch.stack([torch.arange(17), torch.arange(17) * 3, torch.arange(17) + 40])
    logits = ours(ids, position_ids=positions)
    assert_same(logits, library(ids, position_ids=positions).logits)
    plain = ours(ids)
    torch.testing.assert_close(logits[2], plain[2], atol=1e-4, rtol=0)  # shifted: the same distances
    assert not torch.allclose(logits[1], plain[1], atol=1e-2)  # stretched: others


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama1", "llama2"])
def test_the_two_variants_configs(name: str) -> None:
    """LLaMA-1 has a key for every query head, LLaMA-2 one for three, at the same size and twice the context."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config = LlamaConfig(vocab_size=4096, **{k: v for k, v in given["model"]["config"].items() if k != "model_type"})
    assert config.num_attention_heads // config.num_key_value_heads == {"llama1": 1, "llama2": 3}[name]
    assert config.max_position_embeddings == given["llama"]["block_length"] == {"llama1": 256, "llama2": 512}[name]
    library = LlamaForCausalLM(config).eval()
    assert library.num_parameters() == pytest.approx(4.23e6, rel=0.005)
    ours = Llama(config)
    ours.load_state_dict(library.state_dict())
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids), library(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits() -> None:
    ours, _ = pair(num_key_value_heads=2)
    ids = tokens(1)
    before = ours(ids)[0]
    for i in range(17):
        changed = ids.clone()
        changed[0, i] = (changed[0, i] + 1) % 97
        moved = (ours(changed)[0] != before).any(-1)
        assert moved.tolist() == [place >= i for place in range(17)]


def test_a_turned_query_and_key_know_their_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        return rotate(x, rope_angles(torch.tensor(place), 8, 100.0).double())

    scores = [turned(q, m) @ turned(k, n) for m, n in ((5, 2), (13, 10), (3, 0))]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-5, rtol=0)
    assert abs(turned(q, 5) @ turned(k, 3) - scores[0]) > 1e-3
    torch.testing.assert_close(turned(q, 9).norm(), q.norm())
    torch.testing.assert_close(turned(q, 0), q)
    # pair i is (x_i, x_{i + head/2}), turned by place * theta^(-2 i / head); by hand for i = 1
    angle = torch.tensor(9 * 100.0 ** (-2 / 8))
    by_hand = q[1] * angle.cos() - q[5] * angle.sin(), q[5] * angle.cos() + q[1] * angle.sin()
    torch.testing.assert_close(turned(q, 9)[[1, 5]], torch.stack(by_hand), atol=1e-5, rtol=0)


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(3, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, -1.0])
    h = torch.tensor([[[1.0, 2.0, 4.0]]])
    torch.testing.assert_close(norm(h), torch.tensor([[[1.0, 4.0, -4.0]]]) / (21 / 3 + 0.5) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear RoPE"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_another_architecture_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Llama(LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, **changes))
