"""Prompt tuning as a recipe: the vectors and their starts, that they stand in every row, padding, caches, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import prompt_checks
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_chat import conversation, make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from recipes.common import adaptation, prompt_encoder, virtual_tokens
from recipes.common.chat import CHAT_TEMPLATE
from recipes.common.errors import UserError
from recipes.common.generation import generate, prompt_ids
from recipes.finetuning import prompt_tuning
from recipes.finetuning.prompt_tuning import Start

FEW: checks.Changes = {
    "training.learning_rate": 2e-1,
    "training.max_length": 96,
    "prompt_tuning.num_virtual_tokens": 5,
}
FIRST = len(make_tokenizer())  # the id of the first virtual token
PROMPT = list(range(FIRST, FIRST + 5))
ROWS = [PROMPT + row for row in prompt_checks.ROWS]
INPUTS = {"input_ids": torch.tensor([[*PROMPT, *range(i, i + 40)] for i in (10, 50, 90)])}


def prompted(model: Any) -> Any:
    virtual_tokens.put_in(model, torch.nn.Embedding(5, 32), 5, FIRST)
    adaptation.freeze(model, prompt_encoder.learned_names(model))
    prompt_checks.spread(model, scale=0.1)
    return model


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(prompt_tuning, checks.arguments(chat_model, questions, FEW), root, patch)


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught by five vectors at its input."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.05


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """tokens x width, and nothing else is saved."""
    folder, figures, _ = trained
    assert figures["trainable_parameters"] == 5 * 32
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt.numbers": (5, 32)}


def test_the_equation() -> None:
    """A row with virtual tokens gives the logits of [P; X] as embeddings."""
    model = prompted(make_model(make_tokenizer())).eval()
    plain = make_model(make_tokenizer()).eval()
    with torch.no_grad():
        x = plain.get_input_embeddings()(INPUTS["input_ids"][:, 5:])
        expected = plain(inputs_embeds=torch.cat([model.prompt().expand(3, -1, -1), x], 1)).logits
        assert torch.allclose(model(**INPUTS).logits, expected, atol=1e-6)
        assert torch.equal(model(INPUTS["input_ids"][:, 5:]).logits, plain(INPUTS["input_ids"][:, 5:]).logits)
        assert expected.shape[-1] == FIRST, "the output layer must not know virtual tokens"


def test_only_the_vectors_get_gradients_and_a_step_changes_the_output() -> None:
    model = prompted(make_model(make_tokenizer()))
    batch = {**INPUTS, "labels": INPUTS["input_ids"].where(INPUTS["input_ids"] < FIRST, -100)}
    checks.check_gradients(model, batch, {"prompt.encoder.weight"})
    checks.check_a_step_changes(model, INPUTS, batch["labels"])


def test_padding_and_the_cache_of_decoders(tmp_path: Path) -> None:
    for base in (make_model(make_tokenizer()), AutoModelForCausalLM.from_pretrained(checks.save_gpt2(tmp_path))):
        model = prompted(base)
        prompt_checks.check_padding(model, ROWS, given=True)
        prompt_checks.check_generation(model, ROWS)


def test_padding_of_classifiers(tmp_path: Path) -> None:
    """A decoder's row is judged at its last token, which peft's inputs_embeds hide from it when rows are padded."""
    config = make_model(make_tokenizer()).config
    config.num_labels = 3
    prompt_checks.check_class_padding(prompted(LlamaForSequenceClassification(config)), ROWS)


@pytest.mark.parametrize("save", [checks.save_t5, checks.save_bart])
def test_an_encoder_decoder_writes_the_same_in_company(save: Any, tmp_path: Path) -> None:
    model = prompted(AutoModelForSeq2SeqLM.from_pretrained(save(tmp_path)))
    prompt_checks.check_written(model, ROWS)


# ---------------------------------------------------------------------------------------------------- into the rows


def task_of(rows: list[Any]) -> Any:
    tokenizer = make_tokenizer()
    train = Dataset.from_list([conversation(*turns) for turns in rows])
    return SimpleNamespace(type="CAUSAL_LM", tokenizer=tokenizer, base=make_model(tokenizer), data={"train": train})


def test_the_prompt_stands_in_front_once(arguments: Any) -> None:
    task = task_of([("a", "b", "c", "d")])
    plain = prompt_ids(make_tokenizer(), [[{"role": "user", "content": "hello"}]])[0]
    template = virtual_tokens.read_template("{v*5}{text}", "t")
    assert virtual_tokens.place(task, template, arguments(), in_front=True) == FIRST
    assert prompt_ids(task.tokenizer, [[{"role": "user", "content": "hello"}]])[0] == PROMPT + plain
    several = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert prompt_ids(task.tokenizer, [several])[0].count(FIRST) == 1


def test_what_a_user_writes_is_no_virtual_token(arguments: Any) -> None:
    task = task_of([("a", "b")])
    virtual_tokens.place(task, virtual_tokens.read_template("{v*5}{text}", "t"), arguments(), in_front=True)
    asked = prompt_ids(task.tokenizer, [[{"role": "user", "content": "<|prompt 2|>"}]])[0]
    assert [i for i in asked if i >= FIRST] == PROMPT


def test_the_loss_leaves_the_prompt_out(arguments: Any, run: Any) -> None:
    from recipes.common.sft_packing import prepare

    task = task_of([("a", "b")] * 4)
    virtual_tokens.place(task, virtual_tokens.read_template("{v*5}{text}", "t"), arguments(), in_front=True)
    virtual_tokens.put_in(task.base, torch.nn.Embedding(5, 32), 5, FIRST)
    row = prepare(task.data, task.tokenizer, task.base, arguments(packing=False), run)["train"][0]
    assert row["input_ids"][:5] == PROMPT
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert task.tokenizer.decode(learned) == "b<|end|>"


def test_a_template_that_trl_knows_is_still_marked(arguments: Any) -> None:
    """TRL finds the marked form of a family's template by its exact text, which is changed here."""
    from trl import chat_template_utils

    task = task_of([("a", "b")])
    task.tokenizer.chat_template = chat_template_utils.qwen3_chat_template
    virtual_tokens.place(task, virtual_tokens.read_template("{v*5}{text}", "t"), arguments(), in_front=True)
    assert "{% generation %}" in task.tokenizer.chat_template
    assert task.tokenizer.chat_template != CHAT_TEMPLATE


# ----------------------------------------------------------------------------------------------------------- starts


@pytest.fixture
def task() -> Any:
    return task_of([("abc " * 5, "yes"), ("abcd", "yes"), ("xyz", "no")])


def test_the_random_start_is_uniform(task: Any) -> None:
    vectors = prompt_tuning.first_vectors(task, Start("random"), 100, seed=0)
    assert vectors.shape == (100, 32)
    assert -0.5 <= vectors.min() < -0.49
    assert 0.49 < vectors.max() <= 0.5
    assert torch.equal(vectors, prompt_tuning.first_vectors(task, Start("random"), 100, seed=0))


def test_the_vocabulary_start_has_vectors_of_the_rows_tokens(task: Any) -> None:
    vectors = prompt_tuning.first_vectors(task, Start("vocabulary"), 40, seed=0)
    table = task.base.get_input_embeddings().weight.detach()
    found = {int((table == vector).all(1).nonzero()) for vector in vectors}
    written = {i for text in ("abcd xyz yes no",) for i in task.tokenizer(text, add_special_tokens=False)["input_ids"]}
    assert found <= written
    assert len(found) > 4


def test_the_text_start_repeats_the_text(task: Any) -> None:
    vectors = prompt_tuning.first_vectors(task, Start("text", "yes"), 5, seed=0)
    ids = task.tokenizer("yesye", add_special_tokens=False)["input_ids"]
    assert torch.equal(vectors, task.base.get_input_embeddings().weight[ids])


def test_the_label_start_has_the_means_of_the_answers_first(task: Any) -> None:
    vectors = prompt_tuning.first_vectors(task, Start("labels"), 5, seed=0)
    table = task.base.get_input_embeddings().weight
    for vector, answer in zip(vectors, ("yes", "no"), strict=False):
        assert torch.allclose(vector, table[task.tokenizer(answer, add_special_tokens=False)["input_ids"]].mean(0))
    assert torch.equal(vectors[2:], prompt_tuning.first_vectors(task, Start("vocabulary"), 5, seed=0)[:3])


def test_a_start_is_as_large_as_the_layer_makes_its_words(tmp_path: Path) -> None:
    """BART's layer, like Gemma's, multiplies what is in its table: the table's rows alone would be 5.7 times too small."""
    task: Any = task_of([("abc", "yes")])
    task.base = AutoModelForSeq2SeqLM.from_pretrained(checks.save_bart(tmp_path), scale_embedding=True)
    vectors = prompt_tuning.first_vectors(task, Start("text", "yes"), 3, seed=0)
    ids = task.tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert torch.allclose(vectors, task.base.get_encoder().embed_tokens(torch.tensor(ids)))
    assert torch.allclose(vectors, 32**0.5 * task.base.get_input_embeddings().weight[ids])


def test_a_text_start_needs_a_text(task: Any) -> None:
    with pytest.raises(UserError, match="needs a text"):
        prompt_tuning.first_vectors(task, Start("text"), 5, seed=0)


# ---------------------------------------------------------------------------------------------------------- the run


def test_the_lines_of_its_card_load_it(trained: Any) -> None:
    folder, _, model = trained
    checks.check_card(folder, model, INPUTS)


def test_the_adapter_reloads_on_a_base_that_is_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    fresh = AutoModelForCausalLM.from_pretrained(chat_model)
    from recipes.common.adapter_files import load_adapter

    with torch.no_grad():
        loaded = load_adapter(fresh, folder / "adapter")
        assert torch.equal(loaded(**INPUTS).logits, model.eval()(**INPUTS).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {"prompt.numbers"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    asked: Any = [[{"role": "user", "content": "Is it 3?"}]]
    assert prompt_ids(tokenizer, asked)[0][:5] == PROMPT
    assert generate(loaded, tokenizer, asked) == generate(model, tokenizer, asked)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(prompt_tuning, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """Both work: virtual tokens are tokens, and every conversation of a packed row has its own."""
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(prompt_tuning, line, run_in_process, tmp_path)


@pytest.mark.slow
def test_an_encoder_classifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = prompt_checks.save_louder(checks.save_bert(tmp_path / "bert"))
    rows = checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"prompt_tuning.task_type": "SEQ_CLS", "start.kind": "labels", "training.learning_rate": 2e-2}
    folder, figures, model = checks.trained_model(
        prompt_tuning, checks.arguments(base, rows, FEW, changes), tmp_path, monkeypatch
    )
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.05
    assert figures["accuracy"] > 0.9 > figures["baseline_accuracy"]
    assert (
        figures["trainable_parameters"] == 5 * 32 + 2 * 32 + 2 + 32 * 32 + 32
    )  # the head, and the pooler that feeds it
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt.numbers", *checks.BERT_HEAD}
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    from recipes.common.adapter_files import load_adapter

    loaded = load_adapter(fresh, folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    names = virtual_tokens.read_template("{v*5}{text}", "t").before
    batch = tokenizer([f"{names}red 4", f"{names}blue 7"], padding=True, return_tensors="pt")
    assert (batch["input_ids"] >= FIRST).sum() == 10
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.slow
def test_an_encoder_decoder_learns(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = {"prompt_tuning.task_type": "SEQ_2_SEQ_LM"}
    done = run_in_process(prompt_tuning, checks.arguments(base, rows, FEW, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[checks.Changes, str]] = {
    "longer than the context": ({"prompt_tuning.num_virtual_tokens": 256}, "is longer than the context"),
    "longer than a row": (
        {"prompt_tuning.num_virtual_tokens": 96},
        "leaves a row of training.max_length, 96 tokens, no",
    ),
    "no room for an answer": ({"prompt_tuning.num_virtual_tokens": 90}, "raise it (the shortest sample has"),
    "tags of words": ({"prompt_tuning.task_type": "TOKEN_CLS"}, "p_tuning_v2 does it"),
    "peft's start": (
        {"prompt_tuning.prompt_tuning_init": "SAMPLE_VOCAB"},
        "prompt_tuning.prompt_tuning_init: this recipe has the paper's starts",
    ),
    "a loss on virtual tokens": ({"training.assistant_only_loss": "false"}, "virtual tokens, which are no words"),
    "a text that is missing": ({"start.kind": "text"}, "start.text"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    line = checks.arguments(chat_model, questions, FEW, changes)
    checks.check_refused(prompt_tuning, line, told, run_in_process, tmp_path)
