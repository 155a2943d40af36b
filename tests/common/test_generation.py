"""Batched generation gives what each prompt would get alone; exact match counts what the checker says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes.common import generation
from recipes.common.errors import UserError
from recipes.common.generation import exact_match, generate, generate_ids, stop_ids
from recipes.common.sections import Evaluation

VOCABULARY = 300
NEVER = VOCABULARY  # no token has this id, so nothing stops early
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
prompts_of_ids = st.lists(st.lists(st.integers(10, VOCABULARY - 1), min_size=1, max_size=14), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from uniform, so that no two tokens tie
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    """Learned positions: a wrong position is another embedding, one past the last an error."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=20, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    )


def write(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    return generate_ids(model, prompts, **{"stop": [NEVER], "pad": 0, "max_new_tokens": 6, **options})


def without_cache(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding as it is defined: the whole text through the model for each token."""
    model.eval()
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@FEW
@given(prompts=prompts_of_ids, batch_size=st.integers(1, 8))
def test_a_batch_gets_what_each_prompt_gets_alone(llama: Any, prompts: list[list[int]], batch_size: int) -> None:
    together = write(llama, prompts, batch_size=batch_size)
    assert together == [write(llama, [prompt])[0] for prompt in prompts]


@FEW
@given(prompts=prompts_of_ids)
def test_the_cache_changes_nothing(llama: Any, prompts: list[list[int]]) -> None:
    assert write(llama, prompts) == [without_cache(llama, prompt, 6) for prompt in prompts]


@FEW
@given(prompts=prompts_of_ids)
def test_positions_count_from_each_prompts_own_start(gpt2: Any, prompts: list[list[int]]) -> None:
    assert write(gpt2, prompts) == [without_cache(gpt2, prompt, 6) for prompt in prompts]


@FEW
@given(prompts=prompts_of_ids, data=st.data())
def test_an_answer_ends_at_the_first_stop_token(llama: Any, prompts: list[list[int]], data: st.DataObject) -> None:
    endless = write(llama, prompts, max_new_tokens=8)
    stop = data.draw(st.sampled_from([token for answer in endless for token in answer]))
    for answer, ended in zip(endless, write(llama, prompts, max_new_tokens=8, stop=[stop]), strict=True):
        assert ended == (answer[: answer.index(stop) + 1] if stop in answer else answer)


def local() -> GPTNeoForCausalLM:
    """A layer that sees three tokens back alone: its cache holds no more."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 64,
    }
    pattern = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(GPTNeoConfig(attention_types=pattern, window_size=3, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "local"])
def test_a_prompt_is_read_once_however_often_it_is_asked_and_a_finished_answer_no_more(
    llama: Any, gpt2: Any, kind: str
) -> None:
    model = {"llama": llama, "gpt2": gpt2}.get(kind) or local()
    asked = [[11, 12, 13], [10, 20, 30, 40, 50, 60], [99]]
    endless = [without_cache(model, prompt, 11) for prompt in asked]
    stop = [endless[0][0], endless[1][4]]
    expected = [
        answer[: next((i + 1 for i, token in enumerate(answer) if token in stop), len(answer))] for answer in endless
    ]
    assert len({len(answer) for answer in expected}) > 1  # they end at different places
    read: list[torch.Size] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, given, out: read.append(given[0].shape))
    answers = write(model, [prompt for prompt in asked for _ in range(8)], max_new_tokens=11, stop=stop)
    handle.remove()
    assert answers == [answer for answer in expected for _ in range(8)]
    assert read[0] == (3, 5)  # each prompt once, less its last token
    one_by_one, done = [], 0  # and no part of it again
    for count in generation._parts(11):
        going = [len(answer) for answer in expected if len(answer) > done]
        one_by_one += [(8 * len(going), 1)] * min(count, max(going, default=done) - done)
        done += count
    assert read[1:] == one_by_one


def test_what_is_sampled_is_the_models_distribution_across_the_parts_of_an_answer() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.6)).eval()
    answers = write(model, [[1, 2, 3]] * 6000, max_new_tokens=4, stop=[0], batch_size=6000, temperature=1.0)
    assert generation.FIRST_PART < 4
    expected: dict[tuple[int, ...], float] = {}

    def grow(answer: tuple[int, ...], probability: float) -> None:
        if len(answer) == 4 or (answer and answer[-1] == 0):
            expected[answer] = probability
            return
        with torch.no_grad():
            told = model(torch.tensor([[1, 2, 3, *answer]])).logits[0, -1].softmax(-1).tolist()
        for token, share in enumerate(told):
            grow((*answer, token), probability * share)

    grow((), 1.0)
    counted = Counter(map(tuple, answers))
    assert set(counted) <= set(expected)
    # the sum of |observed - expected| over the answers: about sqrt(2 n / (pi N)) for n answers that are as likely
    distance = sum(abs(counted[answer] / 6000 - share) for answer, share in expected.items())
    assert distance < 2 * (2 * len(expected) / (3.14 * 6000)) ** 0.5


def test_near_the_last_position_there_is_room_for_fewer_tokens_alone_or_in_company(gpt2: Any) -> None:
    prompts = [list(range(10, 10 + length)) for length in (3, 19, 17, 12, 19)]
    answers = write(gpt2, prompts, max_new_tokens=5)
    assert [len(answer) for answer in answers] == [5, 1, 3, 5, 1]
    assert answers == [without_cache(gpt2, p, len(a)) for p, a in zip(prompts, answers, strict=True)]


def test_a_prompt_that_fills_the_model_is_the_users_mistake(gpt2: Any) -> None:
    with pytest.raises(UserError, match=r"2 prompt.*25 tokens.*20 positions"):
        write(gpt2, [[10] * 3, [10] * 25, [10] * 20])


def test_sampling_is_the_same_for_a_seed_and_leaves_the_callers_random_numbers_alone(llama: Any) -> None:
    prompts = [[10, 11], [12, 13, 14]]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = write(llama, prompts, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == write(llama, prompts, temperature=1.0, seed=1)
    assert first != write(llama, prompts, temperature=1.0, seed=2)


def test_sampling_draws_from_the_whole_vocabulary() -> None:
    """transformers takes top_k=50 where nobody says otherwise; of equal logits it would leave all."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=1e-3)  # nearly equally likely, and no two of them equal
    drawn = write(model, [[10]] * 2000, temperature=1.0, max_new_tokens=1, stop=[NEVER])
    assert len({token for answer in drawn for token in answer}) > 0.95 * VOCABULARY


def test_a_low_temperature_is_nearly_greedy(llama: Any) -> None:
    prompts = [[20, 21, 22]] * 4
    assert write(llama, prompts, temperature=1e-4) == write(llama, prompts)


def test_the_checkpoints_own_generation_defaults_are_set_aside_and_come_back(llama: Any) -> None:
    expected = write(llama, [[10, 11, 12]], max_new_tokens=12)
    own = llama.generation_config
    llama.generation_config = type(own)(repetition_penalty=5.0, do_sample=True, temperature=3.0, min_new_tokens=5)
    theirs = llama.generation_config
    try:
        assert write(llama, [[10, 11, 12]], max_new_tokens=12) == expected
        assert llama.generation_config is theirs
    finally:
        llama.generation_config = own


def test_training_mode_and_compilation_come_back(llama: Any) -> None:
    llama.train()
    llama.model.layers[0].eval()  # a part that somebody froze
    calls = []
    llama._compiled_call_impl = lambda *args, **kwargs: calls.append(1) or llama._call_impl(*args, **kwargs)
    try:
        write(llama, [[10, 11]])
        assert not calls, "the compiled forward pass was used"
        assert llama.training
        assert not llama.model.layers[0].training
        assert llama._compiled_call_impl is not None
        assert next(llama.parameters()).requires_grad
    finally:
        llama._compiled_call_impl = None
        llama.eval()


def test_bf16_autocast_is_asked_for(llama: Any) -> None:
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    write(llama, [[10, 11]], bf16=True)
    write(llama, [[10, 11]])
    handle.remove()
    assert set(seen[:6]) == {torch.bfloat16}
    assert set(seen[6:]) == {torch.float32}


def test_no_prompts_no_answers(llama: Any, tokenizer: Any) -> None:
    assert generate(llama, tokenizer, []) == []


def test_conversations_are_asked_with_the_chat_template(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(generation, "generate_ids", lambda model, prompts, **_: asked.extend(prompts) or [[6], [7]])
    generate(llama, tokenizer, [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bc"}]])
    assert [tokenizer.decode(ids) for ids in asked] == [
        "<|user|>a<|end|><|assistant|>",
        "<|user|>bc<|end|><|assistant|>",
    ]


def test_only_the_stop_token_is_left_out_of_an_answer(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    written = [ids("42<|end|>"), ids("42<|user|>more"), ids("<|end|>"), ids("a , b 。<|end|>")]
    monkeypatch.setattr(generation, "generate_ids", lambda *args, **kwargs: written)
    prompts = [[{"role": "user", "content": "x"}]] * 4
    assert generate(llama, tokenizer, prompts) == ["42", "42<|user|>more", "", "a , b 。"]


def test_both_the_tokenizers_and_the_checkpoints_stop_tokens_count(llama: Any, tokenizer: Any) -> None:
    own = llama.generation_config
    llama.generation_config = type(own)(eos_token_id=[1, 77])
    try:
        assert stop_ids(llama, tokenizer) == [1, 77]
    finally:
        llama.generation_config = own


# ------------------------------------------------------------------------------------------------------- exact match


def task_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n} + {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ],
            "task": "add" if n % 2 else "double",
            "language": "en",
            "answer": str(2 * n),
        }
        for n in range(count)
    ]


def knows_below(limit: int, sampled_limit: int) -> Any:
    """A stand-in for generate: right for n < limit when greedy, for n < sampled_limit when sampling."""

    def answer(model: Any, tokenizer: Any, prompts: Any, *, temperature: float | None = None, **_: Any) -> list[str]:
        numbers = [int(prompt[-1]["content"].split()[0]) for prompt in prompts]
        return [str(2 * n) if n < (limit if temperature is None else sampled_limit) else "no idea" for n in numbers]

    return answer


def test_exact_match_counts_what_the_checker_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "generate", knows_below(6, 3))
    other = {"messages": task_rows(1)[0]["messages"], "task": None, "language": None, "answer": None}
    found = exact_match(None, None, [other, *task_rows(20)], Evaluation(max_samples=10))  # type: ignore[arg-type]
    answers = found.pop("answers")
    assert found == {
        "exact_match": 0.6,
        "sampled_exact_match": 0.3,
        "exact_match_add": 0.6,
        "exact_match_double": 0.6,
    }
    assert [a["expected"] for a in answers] == [str(2 * n) for n in range(10)]
    assert [a["right"] for a in answers] == [True] * 6 + [False] * 4
    assert answers[0]["prompt"] == "0 + 0?"
    assert answers[7]["greedy"] == "no idea"


def test_the_answer_is_not_in_the_prompt_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(generation, "generate", lambda m, t, prompts, **_: asked.extend(prompts) or [""] * len(prompts))
    exact_match(None, None, task_rows(2), Evaluation())  # type: ignore[arg-type]
    assert all(prompt[-1]["role"] == "user" for prompt in asked)
    assert len(asked) == 4  # greedy and sampled


def test_rows_that_cannot_be_checked_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="tasks"):
        exact_match(None, None, [{"messages": []}], Evaluation())  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 6, 10])
def test_processes_share_the_rows_and_agree(monkeypatch: pytest.MonkeyPatch, world: int, count: int) -> None:
    monkeypatch.setattr(generation, "generate", knows_below(4, 2))
    alone = exact_match(None, None, task_rows(count), Evaluation())  # type: ignore[arg-type]
    shares: list[Any] = []
    for rank in range(world):  # what each process would send
        monkeypatch.setattr(generation, "_place", lambda rank=rank: (rank, world))
        monkeypatch.setattr(generation, "_gathered", lambda answers: shares.append(answers) or [answers])
        exact_match(None, None, task_rows(count), Evaluation())  # type: ignore[arg-type]
    assert len({len(share) for share in shares}) == 1, "a sharded model would wait for ever"
    monkeypatch.setattr(generation, "_gathered", lambda answers: shares)
    assert exact_match(None, None, task_rows(count), Evaluation()) == alone  # type: ignore[arg-type]
