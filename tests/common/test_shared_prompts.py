"""A row for all answers to a prompt computes of each answer what a row of its own would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.common.errors import UserError
from recipes.common.shared_prompts import (
    at_places,
    attention_mask,
    check_apart,
    check_window,
    first_fit,
    row_length,
    share,
    visible,
)

PROMPTS = [[5, 6, 7], [8, 9]]
ANSWERS = [[[20, 21], [22, 23, 24]], [[25, 26, 27, 28]]]


def test_the_rows_of_a_small_example():
    rows = share([*PROMPTS, [10]], [*ANSWERS, [[29], [30]]], fill=0)
    assert rows.input_ids.tolist() == [[5, 6, 7, 20, 21, 22, 23, 24, 0], [8, 9, 25, 26, 27, 28, 10, 29, 30]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5, 0, 1, 1]]
    assert rows.prompt.tolist() == [[0] * 8 + [-1], [1] * 6 + [2] * 3]
    assert rows.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, -1], [0, 0, 1, 1, 1, 1, 0, 1, 2]]
    assert rows.mask.tolist() == [
        [[1, 1, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
    ]
    real = rows.mask.bool()
    assert at_places(rows.input_ids, rows.at)[real].tolist() == [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]
    assert at_places(rows.input_ids, rows.before)[real].tolist() == [7, 20, 7, 22, 23, 9, 25, 26, 27, 10, 10]
    assert set(at_places(rows.input_ids, rows.at)[~real].tolist()) == {7, 9, 10}  # the prompts' last


def test_short_prompts_share_a_row_and_answers_may_be_laid_wider_than_they_are():
    prompts, answers = [[1], [2, 3, 4], [5], [6, 7]], [[[11]], [[12, 13, 14]], [[15, 16]], [[17], [18]]]
    rows = share(prompts, answers, fill=0, longest=5)
    assert rows.input_ids.tolist() == [[2, 3, 4, 12, 13, 14, 1, 11], [6, 7, 17, 18, 5, 15, 16, 0]]
    assert rows.prompt.tolist() == [[1] * 6 + [0] * 2, [3] * 4 + [2] * 3 + [-1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 2, 0, 1, 2, 0]]
    assert rows.mask.shape == (4, 2, 5)
    found = at_places(rows.input_ids, rows.at)[rows.mask.bool()]
    assert found.tolist() == [11, 12, 13, 14, 15, 16, 17, 18]  # by prompt, wherever they stand


def test_rows_are_as_long_as_leaves_the_least_padding():
    assert row_length([8]) == 8
    assert row_length([8, 5, 5, 5, 5]) == 10  # 3 rows of 10; 5 of 8 would be 40
    assert row_length([300] + [200] * 8) == 412  # 5 rows of 412: 600 is beyond FREE
    assert row_length([600, 400, 400]) == 600
    assert row_length([5, 5, 5, 5]) == 5  # of equal ones the shortest: attention costs the square


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 50))
def test_first_fit_lays_all_without_overlap_in_few_rows(lengths, more):
    longest, taken = max(lengths) + more, {}
    for length, (row, first) in zip(lengths, first_fit(lengths, longest), strict=True):
        assert first >= 0 and first + length <= longest
        columns = taken.setdefault(row, set())
        assert not columns & set(range(first, first + length))
        columns |= set(range(first, first + length))
    assert sorted(taken) == list(range(len(taken)))
    halves = [row for row, columns in taken.items() if 2 * len(columns) <= longest]
    assert len(halves) <= 1  # two of them would have been one
    for columns in taken.values():
        assert columns == set(range(len(columns)))  # no holes


def test_a_token_sees_its_prompt_and_its_own_answer_up_to_itself():
    rows = share([[1] * 3, [8, 9], [5] * 11], [[[3], [4]], [[25, 26]], [[6]]], fill=0)
    assert rows.prompt.tolist() == [[2] * 12 + [0] * 5 + [1] * 4]
    seen = [row.nonzero().flatten().tolist() for row in visible(rows)[0, 0]]
    assert seen[11] == list(range(12))
    assert seen[14] == [12, 13, 14]  # the end of a prompt, behind another with its answer
    assert (seen[15], seen[16]) == ([12, 13, 14, 15], [12, 13, 14, 16])  # its two answers
    assert seen[20] == [17, 18, 19, 20]
    padded = share([[5] * 9, [8, 9], [8, 9]], [[[6]], *ANSWERS[1:], *ANSWERS[1:]], fill=0)
    assert (padded.prompt < 0).sum() == 2 and visible(padded).any(dim=-1).all()  # padding looks at something too


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_every_answer_is_computed_as_if_it_were_alone_gradients_too(kernel):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=kernel,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts, answers = [*PROMPTS, [10, 11], [12]], [*ANSWERS, [[29], [30]], [[31, 32]]]
    rows = share(prompts, answers, fill=0)
    assert rows.input_ids.shape == (2, 11)  # two prompts in each
    mask = attention_mask(rows, model.config)
    logits = at_places(model(rows.input_ids, mask, position_ids=rows.position_ids).logits, rows.before)
    losses, alone = [], []
    for b, (prompt, some) in enumerate(zip(prompts, answers, strict=True)):
        for k, answer in enumerate(some):
            found = logits[b, k, : len(answer)]
            wanted = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            words = torch.tensor(answer)
            losses.append(torch.nn.functional.cross_entropy(found, words, reduction="sum"))
            alone.append(torch.nn.functional.cross_entropy(wanted, words, reduction="sum"))
    shared = torch.autograd.grad(sum(losses), list(model.parameters()))
    apart = torch.autograd.grad(sum(alone), list(model.parameters()))
    for one, other in zip(shared, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "intermediate_size": None}),
        ("GPTNeoX", {}),  # its head is called embed_out
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.3}),
        ("Cohere", {"num_key_value_heads": 2, "logit_scale": 0.1}),
        ("Granite", {"num_key_value_heads": 2, "logits_scaling": 7.0}),
    ],
)
def test_log_probabilities_and_entropies_are_those_of_the_models_own_logits(kind, more):
    """Some cap or scale what comes out of their head."""
    import transformers

    from recipes.common.rlhf import answers_told, token_entropy

    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    ).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)  # so that a cap is felt
    prompts, answers = [*PROMPTS, [10, 11]], [*ANSWERS, [[29], [30]]]
    rows = share(prompts, answers, fill=0)
    with torch.no_grad():
        out, logprobs, entropy = answers_told(model, rows, with_entropy=True)
        assert out.logits.shape == (1, 11, 40)
        for b, (prompt, some) in enumerate(zip(prompts, answers, strict=True)):
            for k, answer in enumerate(some):
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
                wanted = logits.log_softmax(-1)[range(len(answer)), answer]
                torch.testing.assert_close(logprobs[b, k, : len(answer)], wanted, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(entropy[b, k, : len(answer)], token_entropy(logits), atol=1e-4, rtol=1e-4)
    padding = rows.mask == 0
    assert (logprobs[padding] == 0).all() and (entropy[padding] == 0).all()


def test_a_kernel_that_takes_no_mask_is_refused():
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="sdpa, or eager"):
        attention_mask(share([[5]], [[[6]]], fill=0), config)


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("Llama", {}, None),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}, None),  # the window is check_window's to refuse
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, None),
        ("GPTNeoX", {}, None),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "intermediate_size": None}, None),
        ("Lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "its layers are conv"),
        ("Bloom", {"intermediate_size": None}, "its positions cannot be given"),
        ("RecurrentGemma", {"num_hidden_layers": 3, "lru_width": 32}, "come out otherwise than each alone"),
    ],
)
def test_a_model_that_does_not_keep_answers_apart_is_refused(kind, more, why):
    import transformers

    torch.manual_seed(0)
    sizes = {name: size for name, size in {**SIZES, **more}.items() if size is not None}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    if why is None:
        check_apart(model)
        return
    with pytest.raises(UserError, match=why):
        check_apart(model)


def test_a_window_shorter_than_the_row_is_refused():
    from transformers import Gemma2Config, GPTNeoConfig, MistralConfig, Qwen2Config

    for config in (MistralConfig(sliding_window=8), Gemma2Config(sliding_window=8), GPTNeoConfig(window_size=8)):
        check_window(config, 8)
        with pytest.raises(UserError, match=r"look back 8 tokens, and .* a row of up to 9"):
            check_window(config, 9)
    for config in (LlamaConfig(), Qwen2Config(sliding_window=8), GPTNeoConfig(attention_types=[[["global"], 24]])):
        check_window(config, 1000)  # Qwen2.5 names a window that it does not use


def test_a_judge_that_looks_back_less_far_than_an_answer_is_refused():
    from tiny_chat import make_tokenizer
    from transformers import MistralConfig, MistralForSequenceClassification

    from recipes.common.own_answers import Answer, reward_scores

    tokenizer = make_tokenizer()
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "num_labels": 1}
    judge = MistralForSequenceClassification(MistralConfig(**sizes, sliding_window=8))
    row = {"prompt": [{"role": "user", "content": "Is it 3?"}]}
    with pytest.raises(UserError, match="look back 8 tokens"):
        reward_scores(judge, tokenizer, [row], [[Answer("it is")]], 1)


def test_nothing_is_no_answer():
    with pytest.raises(ValueError, match="no token"):
        share([[5]], [[[6], []]], fill=0)
