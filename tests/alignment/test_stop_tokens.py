"""A model whose texts end in one token and whose turns in another, as gemma's: where its answers end."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.common.recipe import run_recipe


@pytest.fixture(scope="module")
def two_stops(tiny, tmp_path_factory) -> Path:
    """The tiny model, whose tokenizer's stop token is <|tool|>; its template ends a turn with <|end|>; it names both."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("two_stops")
    tokenizer = AutoTokenizer.from_pretrained(tiny, eos_token="<|tool|>")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, tmp_path: Path) -> tuple[Any, Any]:
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.run_folder import RunFolder
    from recipes.common.sections import Model

    run, section = RunFolder(tmp_path, recipe="ppo", dry=True), Model(name=str(folder))
    tokenizer = load_tokenizer(section, run, chat=True)
    return load_model(section, tokenizer, run), tokenizer


def test_the_turns_end_is_the_templates_and_blanks_before_it_are_left_out(two_stops, tmp_path):
    from recipes.common.generation import check_turn_end, stop_ids, turn_end

    model, tokenizer = loaded(two_stops, tmp_path)
    end, tool = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|tool|>"))
    assert stop_ids(model, tokenizer) == [tool, end] and turn_end(tokenizer) == [end]
    check_turn_end(model, tokenizer)
    asked = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}ENDS{% endfor %}"
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for written, ids in (
        ("{{ ' <|end|>\n' }}", [end, *line]),
        ("{{ eos_token }}", [tool]),
        ("", [tool]),
        ("\n", [tool]),
    ):
        tokenizer.chat_template = asked.replace("ENDS", written)
        assert turn_end(tokenizer) == ids


def test_an_answer_that_ends_with_either_of_them_has_ended(two_stops, tmp_path, monkeypatch):
    from accelerate import Accelerator

    from recipes.common import generation, ppo_rollout, rlhf

    model, tokenizer = loaded(two_stops, tmp_path)
    k, end, tool = (tokenizer.convert_tokens_to_ids(token) for token in ("k", "<|end|>", "<|tool|>"))
    told = []

    def answers(*_, stop, **__):
        told.append(stop)
        return [[k, end], [k, tool], [k, k]]

    monkeypatch.setattr(generation, "generate_ids", answers)
    args: Any = type("Args", (), {"bf16": False})
    models = ppo_rollout.Models(rlhf.ActorCritic(model, None), None, None, tokenizer)
    given = ppo_rollout.answer(models, [{}] * 3, [[k]] * 3, args, Accelerator(cpu=True), longest=2, at_once=3, seed=0)
    assert told == [[tool, end]]
    assert given.stopped.tolist() == [True, True, False] and given.texts == ["k", "k", "kk"]


def test_a_comparison_ends_as_the_template_ends_it(two_stops, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    from recipes.alignment import reward_model
    from recipes.common import own_answers, rlhf

    model, tokenizer = loaded(two_stops, tmp_path)
    row = {"prompt": [{"role": "user", "content": "Is it 3?"}], "completions": ["k", "c"], "ranks": [0, 1]}
    (encoded,) = reward_model.comparisons(Dataset.from_list([row]), tokenizer, 64, None)  # type: ignore[arg-type]
    turns = [*row["prompt"], {"role": "assistant", "content": "k"}]
    assert encoded["sequences"][0] == tokenizer.apply_chat_template(turns, return_dict=False)
    torch.manual_seed(0)
    model.config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(model.config).eval()
    ((told, _),) = own_answers.reward_scores(judge, tokenizer, [row], [list(map(own_answers.Answer, ["k", "c"]))], 2)
    ids, mask = rlhf.pad(encoded["sequences"][:1], tokenizer.pad_token_id, "right")
    with torch.no_grad():
        assert told == pytest.approx(rlhf.sequence_scores(judge, ids, mask).item(), abs=1e-5)


@pytest.fixture
def one_stop(two_stops, tmp_path) -> Path:
    """The same, and the checkpoint names the tokenizer's alone: a base model with the template of its tuned kin (Qwen2.5's)."""
    from transformers import GenerationConfig

    folder = tmp_path / "one_stop"
    shutil.copytree(two_stops, folder)
    kept = GenerationConfig.from_pretrained(folder)
    kept.eos_token_id = kept.eos_token_id[:1]
    kept.save_pretrained(folder)
    return folder


def test_the_special_token_that_the_template_ends_a_turn_with_becomes_one_of_them(one_stop, tmp_path, capsys):
    from recipes.common.generation import stop_ids

    model, tokenizer = loaded(one_stop, tmp_path)
    end, tool = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|tool|>"))
    assert stop_ids(model, tokenizer) == [tool, end] == model.generation_config.eos_token_id
    assert "stop token: <|end|> too" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["ppo", "dpo", "grpo"])
def test_a_turn_that_ends_in_words_is_refused(recipe, one_stop, judge, preferences, tmp_path, capsys):
    folder, template = one_stop, tmp_path / "words.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + 'k' }}{% endfor %}")
    module = importlib.import_module(f"recipes.alignment.{recipe}")
    argv = ["--model.name", str(folder), "--data.name", str(preferences), "--run.root", str(tmp_path), "--lora", "null"]
    argv += ["--model.chat_template", str(template)]
    argv += ["--ppo.reward_model", str(judge)] if recipe == "ppo" else []
    argv += ["--dpo.candidates", "given"] if recipe == "dpo" else []
    assert run_recipe(module.main, module.Config, argv) == 2
    error = capsys.readouterr().err
    assert "ends the assistant's turn with 'k', which is none of the stop tokens ('<|tool|>')" in error
    assert "generation_config.json" in error and "Traceback" not in error
