"""P-tuning as a recipe: the template, the LSTM that makes the vectors and is dropped, padding, caches, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import prompt_checks
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PromptEncoder, PromptEncoderConfig
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from recipes.common import adaptation, prompt_encoder, virtual_tokens
from recipes.common.adapter_files import load_adapter
from recipes.common.errors import UserError
from recipes.common.generation import generate, prompt_ids
from recipes.common.virtual_tokens import read_template
from recipes.finetuning import p_tuning

FEW: checks.Changes = {
    "training.learning_rate": 5e-2,
    "training.max_length": 96,
    "template.text": "{v*3}{text}{v*2} Answer:",
    "p_tuning.encoder_hidden_size": 12,
}
FIRST = len(make_tokenizer())  # the id of the first virtual token
PROMPT = list(range(FIRST, FIRST + 5))
ROWS = [PROMPT[:3] + row[:4] + PROMPT[3:] + row[4:] for row in prompt_checks.ROWS]
INPUTS = {"input_ids": torch.tensor([[*PROMPT[:3], *range(i, i + 40), *PROMPT[3:], i] for i in (10, 50, 90)])}
# table, 2 layers of LSTM both ways, MLP: equations 5 and 6 for width 32, h 12
LSTM = 5 * 32 + 2 * (48 * 32 + 48 * 12 + 96) + 2 * (48 * 24 + 48 * 12 + 96) + (24 * 24 + 24) + (24 * 32 + 32)
MLP = 5 * 32 + (32 * 12 + 12) + (12 * 12 + 12) + (12 * 32 + 32)


def settings(**changes: Any) -> PromptEncoderConfig:
    sizes: dict[str, Any] = {"num_virtual_tokens": 5, "token_dim": 32, "num_transformer_submodules": 1}
    kind = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}
    return PromptEncoderConfig(**{**sizes, **kind, **changes})


def prompted(model: Any) -> Any:
    torch.manual_seed(2)
    virtual_tokens.put_in(model, PromptEncoder(settings()), 5, FIRST)
    adaptation.freeze(model, prompt_encoder.learned_names(model))
    return model


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(p_tuning, checks.arguments(chat_model, questions, FEW), root, patch)


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught by five vectors at its input."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.03


@pytest.mark.parametrize(("changes", "expected"), [({}, LSTM), ({"encoder_reparameterization_type": "MLP"}, MLP)])
def test_what_learns_is_the_closed_form(changes: dict[str, Any], expected: int) -> None:
    encoder = PromptEncoder(settings(**changes))
    assert sum(p.numel() for p in encoder.parameters()) == expected
    assert p_tuning.closed_form(settings(**changes), 5, 32) == expected


def test_the_encoder_is_dropped_and_the_vectors_stay(trained: Any) -> None:
    folder, figures, model = trained
    assert figures["trainable_parameters"] == LSTM
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt.numbers": (5, 32)}
    assert torch.equal(tensors["prompt.numbers"], model.prompt())
    assert model.prompt.encoder is None


def test_the_equations() -> None:
    """h_i from an LSTM from the left and one from the right over the table, then Linear, ReLU, Linear."""
    prompt = prompt_encoder.Prompt(PromptEncoder(settings(encoder_num_layers=1)), 5)
    encoder: Any = prompt.encoder
    table, lstm, mlp = encoder.embedding.weight, encoder.lstm_head, encoder.mlp_head
    expected = []
    with torch.no_grad():
        for way, order in (("", range(5)), ("_reverse", range(4, -1, -1))):
            h, c = torch.zeros(12), torch.zeros(12)
            states: list[Any] = [None] * 5
            weights = {
                name: getattr(lstm, f"{name}_l0{way}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            for i in order:
                gates = (
                    weights["weight_ih"] @ table[i] + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
                )
                i_, f_, g_, o_ = gates.chunk(4)
                c = f_.sigmoid() * c + i_.sigmoid() * g_.tanh()
                h = o_.sigmoid() * c.tanh()
                states[i] = h
            expected.append(torch.stack(states))
        hidden = torch.cat(expected, 1)  # [tokens, 2 h]
        made = (hidden @ mlp[0].weight.T + mlp[0].bias).relu() @ mlp[2].weight.T + mlp[2].bias
        assert torch.allclose(prompt(), made, atol=1e-6)


def test_a_row_has_the_vectors_where_the_template_says() -> None:
    model, plain = prompted(make_model(make_tokenizer())).eval(), make_model(make_tokenizer()).eval()
    ids = INPUTS["input_ids"]
    with torch.no_grad():
        x = plain.get_input_embeddings()(ids.clamp(max=FIRST - 1))
        for place, vector in zip((0, 1, 2, 43, 44), model.prompt(), strict=True):
            x[:, place] = vector
        assert torch.allclose(model(**INPUTS).logits, plain(inputs_embeds=x).logits, atol=1e-6)


def test_only_the_encoder_gets_gradients_and_a_step_changes_the_output() -> None:
    model = prompted(make_model(make_tokenizer()))
    batch = {**INPUTS, "labels": INPUTS["input_ids"].where(INPUTS["input_ids"] < FIRST, -100)}
    checks.check_gradients(model, batch, {name for name, _ in model.named_parameters() if "prompt." in name})
    checks.check_a_step_changes(model, INPUTS, batch["labels"])


@pytest.mark.parametrize("autocast", [False, True])
def test_what_learns_stays_float32_over_a_base_in_bf16(autocast: bool) -> None:
    model = prompted(make_model(make_tokenizer()).bfloat16())
    ids = INPUTS["input_ids"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids, labels=ids.where(ids < FIRST, -100)).loss.backward()
        assert model.eval().generate(ids, max_new_tokens=2, pad_token_id=0).shape == (3, 48)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_padding_and_the_cache() -> None:
    model = prompted(make_model(make_tokenizer()))
    prompt_checks.check_padding(model, ROWS)
    prompt_checks.check_generation(model, ROWS)


# -------------------------------------------------------------------------------------------------------- templates


def test_a_template_is_read() -> None:
    template = read_template("{v*2}{text} is{v*1}?", "t")
    assert (template.before, template.behind) == ("<|prompt 0|><|prompt 1|>", " is<|prompt 2|>?")
    assert template.tokens == 3
    assert template.fill("it") == "<|prompt 0|><|prompt 1|>it is<|prompt 2|>?"
    pair = read_template("{text}{v*1}{text_pair}?", "t")
    assert pair.fill("a", "b") == "a<|prompt 0|>b?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{v*2} no place", "give {text} once"),
        ("{text}{text}{v*2}", "({text} is not known)"),
        ("{text}{words}{v*2}", "({words} is not known)"),
        ("{text} alone", "has no virtual token"),
        ("{text}{v*0}", "has no virtual token"),
    ],
)
def test_what_is_no_template_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        read_template(text, "template.text")
    assert told in str(refused.value)


def test_every_user_turn_is_in_the_template_and_anchors_stay_words(arguments: Any) -> None:
    tokenizer = make_tokenizer()
    task: Any = SimpleNamespace(type="CAUSAL_LM", tokenizer=tokenizer)
    virtual_tokens.place(task, read_template("{v*1}{text}{v*1} A:", "t"), arguments())
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<|prompt 1|>"},
    ]
    shown = tokenizer.decode(prompt_ids(tokenizer, [turns])[0])
    one = "<|user|><|prompt 0|>{}<|prompt 1|> A:<|end|>"
    assert shown == one.format("a") + "<|assistant|>b<|end|>" + one.format("<\u200b|prompt 1|>") + "<|assistant|>"


def test_rows_of_text_are_put_into_the_template(arguments: Any) -> None:
    def rows_in(kind: str, row: dict[str, Any], template: str) -> dict[str, Any]:
        data = DatasetDict(train=Dataset.from_list([row]), validation=Dataset.from_list([row]))
        tokenizer = make_tokenizer()
        task: Any = SimpleNamespace(type=kind, tokenizer=tokenizer, data=data, base=make_model(tokenizer))
        virtual_tokens.place(task, read_template(template, "t"), arguments(max_length=12))
        return task.data["validation"][0]

    one = {"text": "x", "text_pair": "y", "label": "z"}
    assert rows_in("SEQ_CLS", one, "{v*1}{text}") == {**one, "text": "<|prompt 0|>x"}
    both = rows_in("SEQ_CLS", one, "{text}{v*1}{text_pair}?")
    assert both == {"text": "x<|prompt 0|>y?", "text_pair": None, "label": "z"}
    assert rows_in("SEQ_2_SEQ_LM", {"source": "x", "target": "y"}, "{v*1}{text}")["source"] == "<|prompt 0|>x"
    # texts are cut, of a row of 12 tokens, and not what stands behind them; the longer of two is
    long = {"text": "abcdefghijkl", "text_pair": "mnopqrst", "label": "z"}
    assert (
        rows_in("SEQ_CLS", {**long, "text_pair": None}, "{text}?{v*2}")["text"] == "abcdefghi?<|prompt 0|><|prompt 1|>"
    )
    assert rows_in("SEQ_CLS", long, "{text}{v*1}{text_pair}?")["text"] == "abcde<|prompt 0|>mnopq?"
    cut = rows_in("SEQ_2_SEQ_LM", {"source": "abcdefghijkl", "target": "y"}, "{text}{v*1}")["source"]
    assert cut == "abcdefghij<|prompt 0|>"  # and its end


def test_a_text_is_cut_between_characters_whose_bytes_are_tokens(arguments: Any) -> None:
    from recipes.pretraining.tokenizer import train_bpe, with_chat

    tokenizer = with_chat(train_bpe(["a"], 262))
    data = Dataset.from_list([{"text": "啊" * n, "text_pair": None, "label": "z"} for n in range(4, 9)])
    task: Any = SimpleNamespace(
        type="SEQ_CLS", tokenizer=tokenizer, data=DatasetDict(train=data, validation=data), base=make_model(tokenizer)
    )
    virtual_tokens.place(task, read_template("{v*1}{text}", "t"), arguments(max_length=12))
    assert {row["text"] for row in task.data["train"]} == {"<|prompt 0|>啊啊啊"}  # three bytes each, 11 are left


# ---------------------------------------------------------------------------------------------------------- the run


def test_the_lines_of_its_card_load_it(trained: Any) -> None:
    folder, _, model = trained
    checks.check_card(folder, model, INPUTS)


def test_the_adapter_reloads_on_a_base_that_is_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    loaded: Any = load_adapter(AutoModelForCausalLM.from_pretrained(chat_model), folder / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**INPUTS).logits, model.eval()(**INPUTS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    asked = [[{"role": "user", "content": f"Is it {n}?"}] for n in (3, 125)]
    assert tokenizer.decode(prompt_ids(tokenizer, asked)[0]).endswith("<|prompt 4|> Answer:<|end|><|assistant|>")
    assert generate(loaded, tokenizer, asked) == generate(model, tokenizer, asked)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path, trained: Any, monkeypatch: Any
) -> None:
    """With the LSTM: peft's own checkpoints hold its output alone, and cannot be resumed from."""
    line = checks.arguments(chat_model, questions, FEW)
    checks.check_resume(p_tuning, line, run_in_process, tmp_path, trained[0], monkeypatch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """Both work: virtual tokens are tokens, and every conversation of a packed row has its own."""
    line = checks.arguments(chat_model, questions, FEW, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(p_tuning, line, run_in_process, tmp_path)


def test_an_encoder_classifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = prompt_checks.save_louder(checks.save_bert(tmp_path / "bert"))
    rows = checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"p_tuning.task_type": "SEQ_CLS", "training.learning_rate": 1e-2}
    folder, figures, model = checks.trained_model(
        p_tuning, checks.arguments(base, rows, FEW, changes), tmp_path, monkeypatch
    )
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.02
    assert figures["accuracy"] > 0.9 > figures["baseline_accuracy"]
    assert figures["trainable_parameters"] == LSTM + 2 * 32 + 2 + 32 * 32 + 32  # the head, and the pooler that feeds it
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt.numbers", *checks.BERT_HEAD}
    loaded = load_adapter(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    template = read_template(FEW["template.text"], "t")
    batch = tokenizer([template.fill("red 4"), template.fill("blue 7")], padding=True, return_tensors="pt")
    assert (batch["input_ids"] >= FIRST).sum() == 10
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.slow
def test_an_encoder_decoder_learns(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    done = run_in_process(p_tuning, checks.arguments(base, rows, FEW, {"p_tuning.task_type": "SEQ_2_SEQ_LM"}), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.2


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[checks.Changes, str]] = {
    "no template": ({"template.text": "{v*3}{question}"}, "template.text"),
    "two texts in a conversation": ({"template.text": "{v*3}{text}{text_pair}"}, "a conversation has one text"),
    "longer than a row": (
        {"template.text": "{v*60}{text}{v*36}"},
        "leaves a row of training.max_length, 96 tokens, no",
    ),
    "tags of words": ({"p_tuning.task_type": "TOKEN_CLS"}, "p_tuning_v2 does it"),
    "a loss on virtual tokens": ({"training.assistant_only_loss": "false"}, "virtual tokens, which are no words"),
    "another number of tokens": ({"p_tuning.num_virtual_tokens": 4}, "but template.text has 5 places"),
    "longer than the context": ({"template.text": "{v*200}{text}{v*56}"}, "is longer than the context"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    line = checks.arguments(chat_model, questions, FEW, changes)
    checks.check_refused(p_tuning, line, told, run_in_process, tmp_path)
