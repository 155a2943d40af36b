"""MAD-X as a recipe: the coupling and its inverse, what learns when, the swap, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from tiny_chat import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from recipes.common.bottleneck import closed_form
from recipes.common.errors import UserError
from recipes.common.modeling_bottleneck import Bottleneck, Invertible, LanguageAndTask
from recipes.finetuning import madx
from recipes.finetuning.madx import MadX

INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}
TINY = MadX(task_reduction=4)


@pytest.fixture(scope="module")
def bilingual() -> Iterator[str]:
    """Builtin rows stand for any with a column `language`: a small set of the same form."""
    from recipes.common.builtin import BUILTINS, Builtin

    def load(split: str, seed: int) -> list[dict[str, Any]]:
        asked = {"en": "Is it {}?", "zh": "是{}吗？"}
        numbers = range(200) if split == "train" else range(1000, 1020)
        return [
            {
                "messages": [
                    {"role": "user", "content": asked[language].format(n)},
                    {"role": "assistant", "content": "yes"},
                ],
                "task": "ask",
                "language": language,
                "answer": "yes",
            }
            for n in numbers
            for language in asked
        ]

    BUILTINS["bilingual"] = Builtin("conversation", load, "for this test")
    yield "bilingual"
    del BUILTINS["bilingual"]


FEW = {
    "madx.steps": 20,
    "madx.task_reduction": 4,
    "madx.learning_rate": 1e-2,
    "training.learning_rate": 3e-2,
    "training.max_steps": 30,
}


@pytest.fixture(scope="module")
def trained(chat_model: Path, bilingual: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        yield checks.trained_model(madx, checks.arguments(chat_model, bilingual, FEW), root, patch)


def adapted_model(seed: int | None = 5, **changes: Any) -> Any:
    """With numbers as after training, or fresh."""
    model = make_model(make_tokenizer(), **changes).eval()
    madx.put_in(model, TINY)
    if seed is not None:
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "_adapter." in name or name.startswith("inverses."):
                parameter.data.normal_(std=0.2)
    return model


# ---------------------------------------------------------------------------------------------------------- the model


def test_the_inverse_is_one() -> None:
    torch.manual_seed(0)
    coupling = Invertible(8, 3)
    e = torch.randn(2, 5, 8)
    assert torch.equal(coupling(e), e)  # F and G are zero at first
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter)
    o = coupling(e)
    assert (o - e).abs().max() > 0.1
    assert torch.allclose(coupling.inverse(o), e, atol=1e-5)
    assert torch.allclose(o[..., :4], e[..., :4] + coupling.f(e[..., 4:]))
    assert torch.allclose(o[..., 4:], e[..., 4:] + coupling.g(o[..., :4]))


def test_the_task_stands_on_the_language() -> None:
    torch.manual_seed(0)
    both = LanguageAndTask({"en": Bottleneck(8, 2, "relu"), "zh": Bottleneck(8, 2, "relu")}, Bottleneck(8, 3, "relu"))
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(2, 5, 8)
    assert torch.equal(both(h), both.task(h))
    both.active = "zh"
    spoken = both.languages["zh"](h)
    assert torch.allclose(both(h), both.task(h + spoken))  # the residual is h's, added outside
    both.with_task = False
    assert torch.equal(both(h), spoken)


def test_it_starts_as_it_was_in_every_language() -> None:
    plain, model = make_model(make_tokenizer()).eval(), adapted_model(seed=None)
    with torch.no_grad():
        for language in (None, "en", "zh"):
            madx.speak(model, language)
            assert torch.allclose(model(**INPUTS).logits, plain(**INPUTS).logits, atol=1e-6)


def test_the_inverse_stands_before_the_output_layer() -> None:
    """With no layer between, the embedding comes back: the logits are those of the plain model."""
    model, plain = adapted_model(num_hidden_layers=1), make_model(make_tokenizer(), num_hidden_layers=1).eval()
    for each in (model, plain):
        for part in (each.model.layers[0].self_attn.o_proj, each.model.layers[0].mlp.down_proj):
            part.weight.data.zero_()
        each.model.norm = torch.nn.Identity()
    model.model.layers[0].feed_forward_adapter = LanguageAndTask(
        {"en": Bottleneck(32, 2, "relu")}, Bottleneck(32, 2, "relu")
    )
    with torch.no_grad():
        inverses = model.inverses
        inverses.active = "en"
        inner: list[torch.Tensor] = []
        handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: inner.append(args[0]))
        ours = model(**INPUTS).logits
        handle.remove()
        assert (inner[0] - plain.get_input_embeddings()(INPUTS["input_ids"])).abs().max() > 1e-3
        assert torch.allclose(ours, plain(**INPUTS).logits, atol=1e-5)


@pytest.mark.parametrize("language", ["en", "zh", None])
def test_only_the_language_or_the_task_gets_gradients(language: str | None) -> None:
    model = adapted_model()
    madx.speak(model, language or "en", task=language is None)
    names = madx.names_of(model, language)
    task, spoken = closed_form(32, 8), closed_form(32, 16)
    expected = 2 * (task if language is None else spoken) + (0 if language is None else 2 * closed_form(16, 8))
    assert madx.freeze_all_but(model, language) == expected
    checks.check_gradients(model, {**INPUTS, "labels": INPUTS["input_ids"]}, names)


def test_a_swap_changes_the_output_and_generation_with_the_cache_equals_without() -> None:
    model = adapted_model()
    with torch.no_grad():
        found = []
        for language in (None, "en", "zh"):
            madx.speak(model, language)
            found.append(model(**INPUTS).logits)
    assert all((found[a] - found[b]).abs().max() > 1e-2 for a, b in ((0, 1), (0, 2), (1, 2)))
    ids = INPUTS["input_ids"][:, :9]
    told = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*told)
    with pytest.raises(UserError, match="there is no adapter for 'fr'; there are en, zh"):
        madx.speak(model, "fr")


# ------------------------------------------------------------------------------------------------------------ the run


def test_it_learns_and_reports_what_the_languages_bought(trained: Any) -> None:
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3
    assert {"without_languages_loss", "not_swapped_loss", "without_languages_exact_match"} <= set(figures)
    assert figures["trainable_parameters"] == 2 * closed_form(32, 8)


def test_the_base_is_bit_for_bit_what_it_was_and_the_saved_adapter_gives_the_same_logits(
    trained: Any, chat_model: Path
) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    loaded = checks.check_reloads(folder, model, AutoModelForCausalLM.from_pretrained(chat_model), INPUTS)
    assert loaded.inverses.active == "zh"
    told = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert told["method"] == "madx"


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


@pytest.mark.parametrize("steps", [40, 85])  # in the first language, in the task over it
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    steps: int,
    run_in_process: checks.Run,
    chat_model: Path,
    bilingual: str,
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = checks.arguments(chat_model, bilingual, FEW)
    checks.check_resume(madx, line, run_in_process, tmp_path, trained[0], monkeypatch, after=steps)


@pytest.mark.parametrize("library", ["DeepSpeed", "FSDP"])
def test_launchers_that_take_one_model_a_process_are_refused(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage would fail, after the first has trained."""
    monkeypatch.setenv(f"ACCELERATE_USE_{library.upper()}", "true")
    with pytest.raises(UserError, match=f"{library} takes one model a process: use LAUNCH=ddp"):
        madx.main(madx.Config.__new__(madx.Config), None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_text_and_rows_of_their_own(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    """Two files: the target's rows, and plain text of its language."""
    text = tmp_path / "text.txt"
    text.write_text("是的。不是。" * 2000)
    own = {
        "madx.target_rows": json.dumps({"name": str(questions)}),
        "madx.text": json.dumps({"zh": {"name": str(text)}}),
    }
    few = {**FEW, **own, "madx.steps": 3, "training.max_steps": 3}
    done = run_in_process(madx, checks.arguments(chat_model, questions, few), tmp_path)
    assert done.code == 0, done.err
    assert "stage language_zh: 1 rows" in done.out


BAD: dict[str, tuple[checks.Changes, str]] = {
    "one language": ({"madx.target": "en"}, "madx.target: 'en' is the source too"),
    "a language without rows": ({"madx.target": "fr"}, "no train row has the language 'fr'; there are en, zh"),
    "an unknown key in a data section": (
        {"madx.text": "{zh: {nme: x}}"},
        "madx.text.zh.nme is no key of a data section",
    ),
    "a reduction that leaves nothing": ({"madx.task_reduction": 64}, "madx.task_reduction: leaves no number"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "madx adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, bilingual: str, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    checks.check_refused(madx, checks.arguments(chat_model, bilingual, FEW, changes), told, run_in_process, tmp_path)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, bilingual: str, tmp_path: Path
) -> None:
    """Of the languages' training too."""
    line = checks.arguments(chat_model, bilingual, {**FEW, **checks.FOUR_STEPS, "madx.steps": 4})
    checks.check_checkpointing_and_packing(madx, line, run_in_process, tmp_path)
