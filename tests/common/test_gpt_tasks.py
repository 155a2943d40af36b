"""GPT-1's input transformations and loss, and GPT-3's prompts: by the papers' figures and by hand."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat import make_tokenizer
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from recipes.common import gpt_tasks, in_context
from recipes.common.banded_attention import use_fast_attention
from recipes.common.downstream import Downstream
from recipes.common.errors import UserError
from recipes.common.gpt_tasks import (
    CHOICES,
    MARKERS,
    TaskModel,
    add_markers,
    choose_among,
    collate,
    encode_rows,
    shorten,
    transform,
)

S, D, E = 101, 102, 103


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    add_markers(made)
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96, "initializer_range": 0.2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **sizes, **off)).eval()


# --------------------------------------------------------------------------------------------- transformations


def test_figure_1_of_the_paper() -> None:
    text, premise, hypothesis = [1, 2, 3], [4, 5], [6]
    markers = [S, D, E]
    assert transform("classification", [text], markers, 20) == [[S, 1, 2, 3, E]]
    assert transform("entailment", [premise, hypothesis], markers, 20) == [[S, 4, 5, D, 6, E]]
    assert transform("similarity", [premise, hypothesis], markers, 20) == [[S, 4, 5, D, 6, E], [S, 6, D, 4, 5, E]]
    assert transform("multiple_choice", [premise, [7], [8, 9]], markers, 20) == [
        [S, 4, 5, D, 7, E],
        [S, 4, 5, D, 8, 9, E],
    ]


@pytest.mark.parametrize("length", [5, 7, 20, 60])
def test_cutting_keeps_the_markers_and_cuts_the_longest(length: int) -> None:
    long, short = list(range(50)), [60, 61]
    (ids,) = transform("entailment", [long, short], [S, D, E], length)
    assert len(ids) == min(length, 55)
    assert (ids[0], ids[-1], ids.count(D)) == (S, E, 1)
    if length >= 7:
        assert ids[-3:-1] == short
    assert shorten([[1, 2, 3], [4, 5, 6]], 4) == [[1, 2], [4, 5]]
    assert shorten([[1], []], 5) == [[1], []]


def test_markers_come_beside_the_tokens_there_were_and_not_from_text(tokenizer: Any, tmp_path: Any) -> None:
    before = make_tokenizer()
    assert len(tokenizer) == len(before) + 3
    assert set(before.all_special_tokens) | set(MARKERS) == set(tokenizer.all_special_tokens)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
    assert again.convert_tokens_to_ids(list(MARKERS)) == ids and len(set(ids)) == 3
    row = {"text": "a<|extract|>b", "text_pair": None, "label": "x"}
    (made,) = encode_rows("classification", [row], ["x", "y"], tokenizer, 50, seed=0)
    assert made["sequences"][0].count(ids[2]) == 1  # the recipe's own


def test_choices_are_the_target_among_others_anywhere() -> None:
    rows = [{"source": f"s{i}", "target": f"t{i}"} for i in range(10_000)]
    made = choose_among(rows, seed=0)
    for i, row in enumerate(made):
        source, *choices = row["texts"]
        assert source == f"s{i}" and choices[row["label"]] == f"t{i}" and len(set(choices)) == CHOICES
    shares = Counter(row["label"] for row in made)
    assert all(shares[k] / 10_000 == pytest.approx(1 / CHOICES, abs=0.015) for k in range(CHOICES))  # 3.5 sigma
    assert made == choose_among(rows, seed=0) != choose_among(rows, seed=1)


def test_a_choice_that_is_right_too_is_not_among_the_wrong_ones() -> None:
    rows = [{"source": f"s{i}", "target": f"t{i % 5}"} for i in range(200)]
    for row, made in zip(rows, choose_among(rows, seed=0), strict=True):
        _, *choices = made["texts"]
        assert choices[made["label"]] == row["target"] and len(set(choices)) == CHOICES
    with pytest.raises(UserError, match="have 3 different targets"):
        choose_among([{"source": f"s{i}", "target": f"t{i % 3}"} for i in range(200)], seed=0)


def test_both_starts_get_the_same_layer_for_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=1, n_positions=12))
    caught: list[Any] = []

    def compare(pretrained: Any, fresh: Any, *_: Any) -> dict[str, float]:
        caught.extend((pretrained, fresh))
        return {}

    monkeypatch.setattr(gpt_tasks, "compare_starts", compare)
    task = gpt_tasks.Task("x", "classification", Downstream(), 3, [], [{"label": 0}])
    gpt_tasks.compare_on_task(task, (model, model), 0.5, SimpleNamespace(seed=3), None)  # type: ignore[arg-type]
    weights = [made.head.weight for made in caught]
    assert len(weights) == 4 and all(weight.equal(weights[0]) for weight in weights)  # with L1 and without it


def test_a_task_of_two_texts_refuses_one(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="needs two texts"):
        encode_rows("entailment", [{"text": "a", "text_pair": None, "label": "x"}], ["x", "y"], tokenizer, 50, seed=0)


# ---------------------------------------------------------------------------------------------------- the model


def rows_of(kind: Any, tokenizer: Any) -> list[dict[str, Any]]:
    if kind == "multiple_choice":
        rows = [{"source": f"source {i}" * (i + 1), "target": f"target {i}"} for i in range(4)]
    else:
        pairs = [None if kind == "classification" else f"pair {i}" for i in range(4)]
        rows = [{"text": f"text {i} " * (i + 1), "text_pair": pairs[i], "label": "xyzx"[i]} for i in range(4)]
    return encode_rows(kind, rows, ["x", "y", "z"], tokenizer, 96, seed=0)


KINDS = {"classification": 1, "entailment": 1, "similarity": 2, "multiple_choice": CHOICES}


@pytest.mark.parametrize(("kind", "sequences"), KINDS.items())
def test_l3_is_l2_plus_lambda_l1(model: Any, tokenizer: Any, kind: Any, sequences: int) -> None:
    """Each loss worked out again, sequence by sequence and without padding, with the library's own language loss."""
    rows = rows_of(kind, tokenizer)
    batch = collate(rows)
    assert batch["input_ids"].shape[:2] == batch["extract"].shape == (4, sequences)
    tuned = TaskModel(model, kind, 3, lm_weight=0.5).train()
    tuned.dropout.p = 0.0
    out = tuned(**batch)
    logits, tokens, nats = [], 0, 0.0
    for row in rows:
        states = []
        for sequence in row["sequences"]:
            ids = torch.tensor([sequence])
            states.append(model.transformer(ids).last_hidden_state[0, -1])
            nats += model(ids, labels=ids).loss.item() * (len(sequence) - 1)
            tokens += len(sequence) - 1
        stacked = torch.stack(states)
        logits.append(tuned.head(stacked)[:, 0] if kind == "multiple_choice" else tuned.head(stacked.sum(dim=0)))
    expected = torch.stack(logits)
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)  # so padding changes nothing
    task = F.cross_entropy(expected, batch["labels"]).item()
    assert out.loss.item() == pytest.approx(task + 0.5 * nats / tokens, rel=1e-4)
    tuned.lm_weight = 0.0
    assert tuned(**batch).loss.item() == pytest.approx(task, rel=1e-4)


def test_similarity_does_not_know_the_order_and_entailment_does(model: Any, tokenizer: Any) -> None:
    one = [{"text": "first text", "text_pair": "the other", "label": "x"}]
    two = [{"text": "the other", "text_pair": "first text", "label": "x"}]
    for kind, same in (("similarity", True), ("entailment", False)):
        tuned = TaskModel(model, kind, 2, 0.0).eval()
        a, b = (tuned(**collate(encode_rows(kind, rows, ["x", "y"], tokenizer, 50, 0))).logits for rows in (one, two))
        assert torch.allclose(a, b, atol=1e-6) == same, kind


def test_fine_tuning_leaves_the_pretrained_weights_alone(model: Any, tokenizer: Any) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuned = TaskModel(model, "classification", 3, 0.5).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    tuned(**collate(rows_of("classification", tokenizer))).loss.backward()
    optimizer.step()
    assert all(model.state_dict()[name].equal(weight) for name, weight in before.items())
    assert not tuned.body.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


# --------------------------------------------------------------------------------------------------- in context


def test_a_prompt_is_examples_with_answers_and_a_question_without(tokenizer: Any) -> None:
    pool = [{"text": "cat", "text_pair": None, "label": "animal"}, {"text": "oak", "text_pair": None, "label": "plant"}]
    question = {"text": "fox", "text_pair": None, "label": "animal"}

    def shown(examples: list[Any], room: int = 500) -> str:
        return tokenizer.decode(in_context.prompt(tokenizer, examples, question, room))

    assert shown([]) == "Text: fox\nAnswer:"
    assert shown(pool) == "Text: cat\nAnswer: animal\n\nText: oak\nAnswer: plant\n\nText: fox\nAnswer:"
    long = [{**row, "text": row["text"] * 100} for row in pool]
    cut = in_context.prompt(tokenizer, long, {**question, "text": "fox" * 100}, 120)
    assert 115 <= len(cut) <= 120
    assert tokenizer.decode(cut).count("Answer:") == 3 and tokenizer.decode(cut).endswith("\nAnswer:")


def test_a_prompt_that_has_no_room_is_refused_and_one_that_just_has_fits(tokenizer: Any) -> None:
    pool = [{"text": "cat" * 50, "text_pair": None, "label": label} for label in ("animal", "bird", "animal")]
    least = len("Text: a\nAnswer: animal\n\n") * 2 + len("Text: a\nAnswer: animal")  # a token is a byte here
    in_context.check_room(tokenizer, pool, 2, least)
    assert len(in_context.prompt(tokenizer, [pool[0]] * 2, pool[0], least - len(" animal"))) == least - len(" animal")
    with pytest.raises(UserError, match=f"gpt.shots: a prompt with 2 examples takes {least} tokens"):
        in_context.check_room(tokenizer, pool, 2, least - 1)
    with pytest.raises(UserError, match="4 examples of 3 rows"):
        in_context.check_room(tokenizer, pool, 4, 10_000)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("endings", [[[11], [12, 13, 14], [15, 16]], [[11], [12]]])
def test_the_likelihood_of_an_ending_is_the_sum_over_its_tokens(kind: str, endings: list[list[int]]) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=None, eos_token_id=None, **sizes)).eval()
    else:
        model = make_gpt_neo(window=3)
    context = [9, 8, 7, 6, 5, 4, 3]
    found = in_context.log_likelihoods(model, context, endings, bf16=False)
    for value, ending in zip(found, endings, strict=True):
        words = model(torch.tensor([[*context, *ending]])).logits.log_softmax(-1)[0]
        expected = sum(words[len(context) - 1 + i, token] for i, token in enumerate(ending))
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def make_gpt_neo(window: int) -> Any:
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": window, "initializer_range": 0.3}
    sizes = {"vocab_size": 50, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    config = GPTNeoConfig(bos_token_id=None, eos_token_id=None, **sizes, **kinds)
    model = GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()
    use_fast_attention(model)
    return model


def test_the_class_that_gains_most_by_the_question_is_the_answer(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that likes "b" whatever is asked, and somewhat more the class that the question's text names."""
    prompts = []

    def likes(model: Any, context: list[int], endings: list[list[int]], bf16: bool) -> torch.Tensor:
        text = tokenizer.decode(context)
        prompts.append(text)
        named = text.rsplit("Text: ", 1)[-1][:1] if "Text: " in text else ""
        return torch.tensor([-9.0 + (named == "a"), -2.0 + (named == "b")])

    monkeypatch.setattr(in_context, "log_likelihoods", likes)
    pool = [{"text": f"{name}{i}", "text_pair": None, "label": name} for name in "ab" for i in range(10)]
    options = {"shots": 3, "length": 400, "bf16": False}
    assert in_context.in_context_accuracy(None, tokenizer, pool, pool, **options) == 1.0
    assert all(text.count("Answer: ") == 3 for text in prompts[1:])
    first, prompts[:] = list(prompts), []
    in_context.in_context_accuracy(None, tokenizer, pool, pool, **options)
    assert prompts == first  # the same examples for the same seed
