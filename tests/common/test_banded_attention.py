"""GPT-3's band: the exact mask, the same outputs as dense attention and as transformers' GPT-Neo, and a linear cost."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from recipes.common.banded_attention import (
    FastSelfAttention,
    band,
    banded_attention,
    banded_speedup,
    start_like_gpt3,
    use_fast_attention,
)


def make_model(window: int = 5, layers: int = 4, **changes: Any) -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": layers, "num_heads": 4}
    kinds = {"attention_types": [[["global", "local"], layers // 2]], "window_size": window}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = GPTNeoConfig(**{**sizes, **kinds, **ids, "initializer_range": 0.2, **changes})
    return GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, seen: torch.Tensor) -> torch.Tensor:
    """Query by query, by the definition."""
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        places = [j for j in range(max(0, i - window + 1), i + 1) if seen[b, j]]
        if places:
            weights = torch.softmax(torch.stack([q[b, h, i] @ k[b, h, j] for j in places]), dim=0)
            out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, places, strict=True))
    return out


def test_the_band_of_the_recipes_picture() -> None:
    picture = ["x...", "xx..", ".xx.", "..xx"]
    assert band(4, 2).tolist() == [[cell == "x" for cell in row] for row in picture]
    assert band(6, 6).equal(torch.ones(6, 6).tril().bool())  # as wide as the text: causal
    assert band(100, 7).sum(dim=1).tolist() == [min(i + 1, 7) for i in range(100)]


@pytest.mark.parametrize(("length", "window"), [(1, 1), (1, 4), (7, 1), (8, 4), (9, 4), (11, 4), (12, 5), (5, 9)])
def test_blocks_give_what_the_definition_gives(length: int, window: int) -> None:
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3))
    seen = torch.ones(2, length, dtype=torch.bool)
    expected = reference(q, k, v, window, seen)
    torch.testing.assert_close(banded_attention(q, k, v, window), expected, atol=1e-6, rtol=0)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~band(length, window), -math.inf)
    torch.testing.assert_close(scores.softmax(-1) @ v, expected)


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 10, 4, dtype=torch.float64) for _ in range(3))
    seen = torch.ones(2, 10, dtype=torch.bool)
    seen[0, :3] = False  # on the left
    seen[1, 8:] = False  # on the right
    ours, expected = banded_attention(q, k, v, 4, seen), reference(q, k, v, 4, seen)
    for row in range(2):
        torch.testing.assert_close(ours[row][:, seen[row]], expected[row][:, seen[row]], atol=1e-6, rtol=0)


def test_gradients_are_those_of_dense_attention() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 13, 4, requires_grad=True) for _ in range(3)]
    q, k, v = inputs
    weigh = torch.randn(2, 2, 13, 4)
    ours = torch.autograd.grad((banded_attention(q, k, v, 4) * weigh).sum(), inputs)
    dense = (q @ k.transpose(-1, -2)).masked_fill(~band(13, 4), -math.inf).softmax(-1) @ v
    for a, b in zip(ours, torch.autograd.grad((dense * weigh).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [3, 5, 17, 40])
def test_a_gpt_neo_gives_the_same_logits_with_it(length: int) -> None:
    plain = make_model()
    ours = copy.deepcopy(plain)
    use_fast_attention(ours)
    assert [b.attn.attention.attention_type for b in ours.transformer.h] == ["global", "local"] * 2
    assert all(type(block.attn.attention) is FastSelfAttention for block in ours.transformer.h)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(2, 50, (3, length))
    mask = torch.ones_like(ids)
    mask[1, -1:] = 0  # padded on the right
    mask[2, :1] = 0  # and on the left
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, use_cache=False).logits, plain(ids).logits, atol=1e-5, rtol=0)
        a, b = (m(ids, attention_mask=mask, use_cache=False).logits for m in (ours, plain))
        torch.testing.assert_close(a[mask == 1], b[mask == 1], atol=1e-5, rtol=0)
        # and the band is there at all: a model of global layers says something else once the text is longer than it
        everywhere = make_model(attention_types=[[["global"], 4]])
        everywhere.load_state_dict(plain.state_dict())
        assert torch.allclose(everywhere(ids).logits, plain(ids).logits, atol=1e-4) == (length <= 5)


def test_it_generates_what_the_library_generates() -> None:
    plain = make_model()
    ours = copy.deepcopy(plain)
    use_fast_attention(ours)
    ids = torch.randint(2, 50, (2, 9))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert ours.generate(ids, **options).equal(plain.generate(ids, **options))


def test_a_banded_layer_sees_its_band_and_nothing_else() -> None:
    layer = make_model(window=4).transformer.h[1].attn.attention
    layer.__class__ = FastSelfAttention
    x = torch.randn(1, 16, 32)
    with torch.no_grad():
        before = layer(x)[0]
        for changed in range(16):
            other = x.clone()
            other[0, changed] += 1.0
            moved = [bool((a != b).any()) for a, b in zip(layer(other)[0][0], before[0], strict=True)]
            assert moved == [changed <= i < changed + 4 for i in range(16)], changed  # bit-equal outside


def test_its_cost_is_linear_in_the_length() -> None:
    def operations(attend: Any, length: int) -> int:
        q = torch.randn(1, 2, length, 8)
        with FlopCounterMode(display=False) as counter:
            attend(q)
        return counter.get_total_flops()

    ours = [operations(lambda q: banded_attention(q, q, q, 16), n) for n in (256, 512, 1024)]
    dense = [operations(lambda q: (q @ q.transpose(-1, -2)) @ q, n) for n in (256, 512, 1024)]
    assert [b / a for a, b in itertools.pairwise(ours)] == [2, 2]
    assert [b / a for a, b in itertools.pairwise(dense)] == [4, 4]
    assert [d / o for d, o in zip(dense, ours, strict=True)] == [256 / 32, 512 / 32, 1024 / 32]  # seq / (2 window)


@pytest.mark.slow
def test_it_is_faster_where_the_text_is_long() -> None:
    assert banded_speedup(64, 2048, heads=4, head=32) > 3  # by operations 16


def test_the_start_of_gpt2_and_gpt3() -> None:
    """Residual projections 0.02 / sqrt(2 layers), all other matrices 0.02; GPT-Neo's queries hold attention's 1/sqrt(head)."""
    config = GPT2Config(vocab_size=100, n_embd=128, n_layer=8, n_head=4, n_positions=32)
    gpt2 = GPT2LMHeadModel(config)
    gpt3 = make_model(layers=8, hidden_size=128, initializer_range=0.02)
    start_like_gpt3(gpt3)
    for model, residual in ((gpt2, ("attn.c_proj", "mlp.c_proj")), (gpt3, ("out_proj", "mlp.c_proj"))):
        seen = set()
        for name, weight in model.named_parameters():
            if ".h." not in name or weight.ndim != 2:
                continue
            small = name.removesuffix(".weight").endswith(residual)
            expected = 0.02 / math.sqrt(16) if small else 0.02 / math.sqrt(32) if "q_proj" in name else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name
            seen.add(small)
        assert seen == {True, False}
