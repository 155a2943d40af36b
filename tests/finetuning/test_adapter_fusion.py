"""AdapterFusion as a recipe: the two stages, the attention's equation, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tiny_chat import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from recipes.common import adaptation, bottleneck
from recipes.common.adapter_files import load_adapter
from recipes.common.bottleneck import Adapter
from recipes.common.errors import UserError
from recipes.common.modeling_bottleneck import Bottleneck, Fusion
from recipes.common.stages import rows_where
from recipes.finetuning import adapter, adapter_fusion

INPUTS = {"input_ids": torch.arange(10, 210).view(4, 50)}


def few(sources: dict[str, Path], **changes: Any) -> checks.Changes:
    return {
        "adapter.kind": "pfeiffer",
        "adapter.bottleneck": 8,
        "fusion.sources": json.dumps({name: str(file) for name, file in sources.items()}),
        "fusion.target": "null",
        "fusion.target_samples": 8,
        "fusion.steps": 30,
        "fusion.learning_rate": 3e-2,
        "training.learning_rate": 1e-2,
        **changes,
    }


@pytest.fixture(scope="module")
def trained(
    chat_model: Path, questions: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """One finished run that several tests look at: its folder, figures and model."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        line = checks.arguments(chat_model, questions, few(sources))
        yield checks.trained_model(adapter_fusion, line, root, patch)


def test_the_fusion_beats_the_mean_single_adapter(trained: Any) -> None:
    """The target's answer is "yes": one of the sources helps, the other does not, and the attention tells them apart."""
    _, figures, _ = trained
    assert figures["eval_loss"] < figures["mean_single_loss"] - 0.02
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.3
    assert figures["best_single_loss"] < figures["mean_single_loss"]
    assert figures["weight_yes"] + figures["weight_target"] > figures["weight_no"]
    assert sum(figures[f"weight_{name}"] for name in ("yes", "no", "target")) == pytest.approx(1, abs=1e-3)


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """3 d^2 for one place in each of 2 layers, d 32."""
    _, figures, _ = trained
    assert figures["trainable_parameters"] == 2 * 3 * 32 * 32


def test_base_and_adapters_are_bit_for_bit_what_they_were(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_base_untouched(model, AutoModelForCausalLM.from_pretrained(chat_model))
    for i, name in enumerate(("yes", "no", "target")):
        for place, tensor in load_file(folder / "stages" / name / "adapter" / "adapter_model.safetensors").items():
            fused = place.replace("feed_forward_adapter.", f"feed_forward_adapter.adapters.{i}.")
            assert torch.equal(model.get_parameter(fused), tensor), fused


def test_the_saved_fusion_gives_the_logits_of_the_trained_model(trained: Any, chat_model: Path) -> None:
    folder, _, model = trained
    checks.check_reloads(folder, model, AutoModelForCausalLM.from_pretrained(chat_model), INPUTS)
    single = load_adapter(AutoModelForCausalLM.from_pretrained(chat_model), folder / "stages" / "no" / "adapter")
    with torch.no_grad():
        assert not torch.allclose(single(**INPUTS).logits, model(**INPUTS).logits, atol=1e-2)


def test_an_adapter_is_not_put_on_another_base(trained: Any) -> None:
    torch.manual_seed(1)
    checks.check_other_base_refused(trained[0], LlamaForCausalLM(make_model(make_tokenizer()).config))


def test_the_weights_are_drawn(trained: Any) -> None:
    folder, _, _ = trained
    assert (folder / "plots" / "fusion_weights.png").stat().st_size > 5000


@pytest.mark.parametrize("steps", [40, 110])  # in the second adapter, in the fusion
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    steps: int,
    run_in_process: checks.Run,
    chat_model: Path,
    questions: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = checks.arguments(chat_model, questions, few(sources))
    checks.check_resume(adapter_fusion, line, run_in_process, tmp_path, trained[0], monkeypatch, after=steps)


# ----------------------------------------------------------------------------------------------------- the attention


def fused_model(count: int = 3, kind: Any = "pfeiffer") -> tuple[Any, list[str]]:
    model = make_model(make_tokenizer()).eval()
    bottleneck.put_in(model, Adapter(kind=kind, bottleneck=4))
    places = adapter_fusion.fuse(model, count)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.normal_(std=0.2)
    return model, places


def test_the_equation() -> None:
    torch.manual_seed(0)
    adapters = [Bottleneck(6, 3, "relu") for _ in range(4)]
    for one in adapters:
        torch.nn.init.normal_(one.up.weight)
    fusion, h = Fusion(adapters), torch.randn(2, 5, 6)
    assert torch.equal(fusion.value.weight, torch.eye(6))
    mean = torch.stack([one(h) for one in adapters]).mean(0)
    assert torch.allclose(fusion(h), mean, atol=1e-6)  # at first
    for part in (fusion.query, fusion.value):
        torch.nn.init.normal_(part.weight)
    q, k, v = (layer.weight for layer in (fusion.query, fusion.key, fusion.value))
    for b in range(2):
        for t in range(5):
            z = [one(h[b, t]) for one in adapters]
            s = torch.stack([(q @ h[b, t]) @ (k @ one) for one in z]).softmax(0)
            expected = sum(s[n] * (v @ z[n]) for n in range(4))
            assert torch.allclose(fusion(h)[b, t], expected, atol=1e-5)


def test_one_adapter_alone_is_what_it_was_under_a_fresh_attention() -> None:
    model, places = fused_model(count=1)
    alone = copy.deepcopy(model)
    for place in places:
        alone.set_submodule(place, alone.get_submodule(place).adapters[0])
    with torch.no_grad():
        assert torch.allclose(model(**INPUTS).logits, alone(**INPUTS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_only_the_attention_gets_gradients_and_a_step_changes_the_output(kind: str) -> None:
    model, places = fused_model(kind=kind)
    learned = adapter_fusion.attention_names(model)
    assert learned == {f"{place}.{part}.weight" for place in places for part in ("query", "key", "value")}
    adaptation.freeze(model, learned)
    checks.check_gradients(model, {**INPUTS, "labels": INPUTS["input_ids"]}, learned)
    checks.check_a_step_changes(model, INPUTS)


@pytest.mark.slow
def test_an_encoder_decoder_writes(run_in_process: checks.Run, tmp_path: Path) -> None:
    base, rows = checks.save_t5(tmp_path / "t5"), checks.pair_rows(tmp_path / "rows.jsonl")
    changes = few({"a": rows}, **{"adapter.task_type": "SEQ_2_SEQ_LM", "fusion.steps": 10, "training.max_steps": 20})
    done = run_in_process(adapter_fusion, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["eval_loss"] < done.figures["baseline_loss"] - 0.3
    fresh = load_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), done.folder / "adapter")
    assert sum(isinstance(module, Fusion) for module in fresh.modules()) == 4


# ------------------------------------------------------------------------------------------------------- the adapters


def save_adapter(chat_model: Path, folder: Path, **changes: Any) -> Path:
    """An adapter as `make adapter` leaves it, with random numbers."""
    from safetensors.torch import save_file

    from recipes.common.adapter_files import fingerprint

    settings = Adapter(**{"bottleneck": 8, "nonlinearity": "gelu", **changes})
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    base = {"name": None, "fingerprint": fingerprint(model)}
    bottleneck.put_in(model, settings)
    folder.mkdir()
    state = model.state_dict()
    save_file(
        {n: torch.randn_like(state[n]) for n in bottleneck.adapter_names(model)}, folder / "adapter_model.safetensors"
    )
    (folder / "base.json").write_text(json.dumps(base))
    (folder / "adapter.json").write_text(json.dumps({"method": "adapter", "settings": asdict(settings)}))
    return folder


@pytest.mark.slow
def test_adapters_trained_before_are_fused_too(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    folder = save_adapter(chat_model, tmp_path / "mine")
    changes = few(
        {}, **{"fusion.adapters": json.dumps({"mine": str(folder)}), "fusion.steps": 4, "training.max_steps": 4}
    )
    done = run_in_process(adapter_fusion, checks.arguments(chat_model, questions, changes), tmp_path)
    assert done.code == 0, done.err
    numbers = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(numbers[name.replace("_adapter.", "_adapter.adapters.0.")], tensor)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bottleneck": 4}, "its bottleneck is 4, and adapter.bottleneck is 8"),
        ({"kind": "houlsby"}, "its kind is houlsby"),
        ({"layers": [0]}, "its layers is [0]"),
    ],
)
def test_adapters_of_another_shape_are_refused(
    changes: Any, told: str, run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    folder = save_adapter(chat_model, tmp_path / "mine", **changes)
    given = few({}, **{"fusion.adapters": json.dumps({"mine": str(folder)})})
    line = checks.arguments(chat_model, questions, given)
    checks.check_refused(adapter_fusion, line, told, run_in_process, tmp_path)


def test_numbers_of_different_shapes_are_refused() -> None:
    model, places = fused_model(count=2)
    one = {f"{places[0]}.up.weight": torch.zeros(32, 4)}
    with pytest.raises(UserError, match="only adapters of the same shape can be fused"):
        adapter_fusion.fill(model, places, [one, {f"{places[0]}.up.weight": torch.zeros(32, 8)}])


def test_the_rows_of_a_task() -> None:
    split = Dataset.from_list([{"task": "ab"[n % 2], "n": n} for n in range(6)])
    rows = DatasetDict({"train": split, "validation": split})
    assert rows_where(rows, "task", "b", "fusion.target")["train"]["n"][:] == [1, 3, 5]
    with pytest.raises(UserError, match="no train row has the task 'c'; there are a, b"):
        rows_where(rows, "task", "c", "fusion.target")
    with pytest.raises(UserError, match="have no column `task`"):
        rows_where(DatasetDict({"train": split.remove_columns("task")}), "task", "a", "fusion.sources")


BAD: dict[str, tuple[checks.Changes, str]] = {
    "nothing to fuse": ({"fusion.sources": "[]"}, "fusion.sources: name at least one task"),
    "a folder without an adapter": ({"fusion.adapters": "{a: nowhere}"}, "fusion.adapters.a: nowhere holds no adapter"),
    "a bottleneck of 0": ({"adapter.bottleneck": 0}, "adapter.bottleneck"),
    "classes": ({"adapter.task_type": "SEQ_CLS"}, "each task would bring classes and a head of its own"),
    "tags": ({"adapter.task_type": "TOKEN_CLS"}, "each task would bring classes and a head of its own"),
    "rows without tasks": ({"fusion.sources": "[sort]"}, "have no column `task`"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "adapts a pretrained model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: checks.Run, chat_model: Path, questions: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    changes, told = BAD[case]
    line = checks.arguments(chat_model, questions, few(sources, **changes))
    checks.check_refused(adapter_fusion, line, told, run_in_process, tmp_path)


@pytest.mark.slow
def test_an_adapter_of_the_adapter_recipe_is_of_its_form(
    run_in_process: checks.Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes = {"adapter.kind": "pfeiffer", "adapter.bottleneck": 8, **checks.FOUR_STEPS}
    done = run_in_process(adapter, checks.arguments(chat_model, questions, changes), tmp_path)
    told = json.loads((done.folder / "adapter" / "adapter.json").read_text())
    assert told["method"] == "adapter"
    assert Adapter(**told["settings"]).bottleneck == 8


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: checks.Run, chat_model: Path, questions: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    line = checks.arguments(chat_model, questions, few(sources, **checks.FOUR_STEPS, **{"fusion.steps": 4}))
    checks.check_checkpointing_and_packing(adapter_fusion, line, run_in_process, tmp_path)
