"""Several adapters on one base: switching is exact, sums are the sums that they say, and what cannot stand together is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_checks as checks
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes.common.adapter_files import fingerprint, load_adapter
from recipes.common.errors import UserError
from recipes.finetuning import multi_adapter
from recipes.finetuning.multi_adapter import MultiAdapter

BATCH = {"input_ids": torch.arange(10, 210).view(4, 50)}
ALL = ["q_proj", "v_proj", "down_proj"]


def fresh(chat_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(chat_model)


def adapter(chat_model: Path, folder: Path, settings: Any, seed: int) -> Path:
    """An adapter as `make lora` leaves it, with random numbers."""
    base = fresh(chat_model)
    told = {"name": str(chat_model), "fingerprint": fingerprint(base)}
    model = get_peft_model(base, settings)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(1.0 if "ia3" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps(told))
    return folder


def lora(rank: int = 4, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ALL, **changes})


def ia3() -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", target_modules=ALL, feedforward_modules=["down_proj"])


@pytest.fixture(scope="module")
def folders(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three of LoRA: two alike, one of another rank, on other matrices, and rank-stabilised."""
    root = tmp_path_factory.mktemp("adapters")
    other = lora(6, target_modules=["q_proj", "o_proj"], use_rslora=True)
    kinds = {"one": lora(), "two": lora(), "other": other}
    return {name: adapter(chat_model, root / name, kind, i) for i, (name, kind) in enumerate(kinds.items())}


def merged_by_hand(chat_model: Path, folders: dict[str, Path], weights: dict[str, float]) -> Any:
    """W + sum_i w_i s_i B_i A_i, from the files."""
    model = fresh(chat_model)
    for name, folder in folders.items():
        told = json.loads((folder / "adapter_config.json").read_text())
        scale = told["lora_alpha"] / (told["r"] ** 0.5 if told["use_rslora"] else told["r"])
        numbers = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in numbers if "lora_A" in key]:
            place = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = numbers[key.replace("lora_A", "lora_B")] @ numbers[key]
            model.get_submodule(place).weight.data += weights[name] * scale * change
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- switch


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_switching_gives_the_logits_of_each_adapter_alone(
    kind: str, chat_model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "ia3":
        folders = {name: adapter(chat_model, tmp_path / name, ia3(), seed) for seed, name in enumerate("xy")}
    base = fresh(chat_model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    alone = multi_adapter.logits_alone(base, folders, BATCH)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        for name, folder in folders.items():  # on a base of its own, by the door that all methods have
            assert torch.equal(load_adapter(fresh(chat_model), folder)(**BATCH).logits, alone[name])
            assert (alone[name] - alone["base"]).abs().max() > 1e-2
    found = multi_adapter.check_switching(multi_adapter.load_all(base, folders), alone, BATCH)
    assert found["switch_max_logit_difference"] == 0
    assert found.get("mixed_batch_max_logit_difference", 0) < 1e-5
    assert ("mixed_batch_max_logit_difference" in found) == (kind == "lora")


def test_adapters_that_disturb_each_other_are_noticed(chat_model: Path, folders: dict[str, Path]) -> None:
    base = fresh(chat_model)
    alone = multi_adapter.logits_alone(base, folders, BATCH)
    model = multi_adapter.load_all(base, folders)
    model.base_model.set_adapter(["one", "two"])  # both at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "set_adapter", lambda *_: None)
        with pytest.raises(RuntimeError, match="disturb each other"):
            multi_adapter.check_switching(model, alone, BATCH)


# ------------------------------------------------------------------------------------------------------------- add up


def test_cat_is_the_weighted_sum_whatever_the_ranks(
    chat_model: Path, folders: dict[str, Path], tmp_path: Path, run: Any
) -> None:
    weights = {"one": 0.5, "two": -1.0, "other": 2.0}
    order = {name: folders[name] for name in ("other", "one", "two")}  # the first one's settings become the sum's
    base = fresh(chat_model)
    model = multi_adapter.load_all(base, order)
    assert multi_adapter.add_up(model, list(order), "cat", MultiAdapter(weights=weights)) < 1e-6
    assert model.peft_config["cat"].r == 4 + 4 + 6
    model.set_adapter("cat")
    by_hand = merged_by_hand(chat_model, order, weights)
    with torch.no_grad():
        expected = by_hand(**BATCH).logits
        assert torch.allclose(model.eval()(**BATCH).logits, expected, atol=1e-4)

    run.path = tmp_path
    told = {"type": "CAUSAL_LM", "base": base, "classes": [], "fingerprint": fingerprint(fresh(chat_model))}
    task: Any = type("Task", (), told)
    saved = multi_adapter.save_sums(model, task, ["cat"], run)
    again = load_adapter(fresh(chat_model), saved["cat"])  # with its fingerprint, and its scale of 1
    with torch.no_grad():
        assert torch.allclose(again(**BATCH).logits, expected, atol=1e-4)


def test_a_sum_over_a_base_in_16_bits_is_not_rounded_to_them(chat_model: Path, folders: dict[str, Path]) -> None:
    alike = {name: folders[name] for name in ("one", "two")}
    model = multi_adapter.load_all(fresh(chat_model).to(torch.bfloat16), alike)
    assert multi_adapter.add_up(model, ["one", "two"], "cat", MultiAdapter()) < 1e-6
    assert {p.dtype for name, p in model.named_parameters() if ".cat." in name} == {torch.float32}
    assert "inject_adapter" not in vars(model.base_model)  # peft's own again


def test_a_sum_cut_to_one_rank_is_nearer_than_one_of_mixed_factors(chat_model: Path, folders: dict[str, Path]) -> None:
    alike = {name: folders[name] for name in ("one", "two")}
    model = multi_adapter.load_all(fresh(chat_model), alike)
    errors = {name: multi_adapter.add_up(model, ["one", "two"], name, MultiAdapter()) for name in MultiAdapter().merges}
    assert errors["cat"] < 1e-6 < errors["svd"] < errors["linear"]
    assert errors["ties_svd"] > errors["svd"]
    assert model.peft_config["svd"].r == model.peft_config["linear"].r == 4


def test_ia3_s_factors_are_averaged(chat_model: Path, tmp_path: Path) -> None:
    folders = {name: adapter(chat_model, tmp_path / name, ia3(), seed) for seed, name in enumerate("xy")}
    model = multi_adapter.load_all(fresh(chat_model), folders)
    multi_adapter.add_up(model, ["x", "y"], "linear", MultiAdapter(weights={"x": 3.0}))
    state = dict(model.named_parameters())
    for key in [key for key in state if ".ia3_l.x" in key]:
        mean = 0.75 * state[key] + 0.25 * state[key.replace("_l.x", "_l.y")]
        assert torch.allclose(state[key.replace("_l.x", "_l.linear")], mean, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_stand_side_by_side_is_refused(chat_model: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    base = fresh(chat_model)

    def told(made: dict[str, Path], **changes: Any) -> str:
        with pytest.raises(UserError) as error:
            multi_adapter.check_adapters(base, made, MultiAdapter(**changes))
        return str(error.value)

    no_linear: Any = {"merges": ["cat", "svd"]}
    assert multi_adapter.check_adapters(base, folders, MultiAdapter(**no_linear)) == "LORA"
    assert "multi.adapters.other: its rank is 6, another's 4: leave `linear` out" in told(folders)
    factors = adapter(chat_model, tmp_path / "ia3", ia3(), 0)
    assert "of different kinds" in told({"one": folders["one"], "x": factors}, merges=[])
    assert "multi.merges: IA3's factors have no rank" in told({"x": factors}, **no_linear)
    dora = adapter(chat_model, tmp_path / "dora", lora(use_dora=True), 0)
    assert "DoRA's magnitudes, which do not add up" in told({"x": dora}, **no_linear)
    assert multi_adapter.check_adapters(base, {"x": dora}, MultiAdapter(merges=[])) == "LORA"
    prompt = adapter(
        chat_model, tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0
    )
    assert "is of PROMPT_TUNING" in told({"x": prompt})
    assert "holds no adapter" in told({"x": tmp_path / "nothing"})
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "adapter.json").write_text('{"method": "adapter", "settings": {}}')
    assert "is of adapter; here it is LoRA or IA3 (adapter_fusion" in told({"x": tmp_path / "ours"})
    strange = adapter(chat_model, tmp_path / "strange", lora(), 0)
    (strange / "base.json").write_text('{"name": "another", "fingerprint": "0"}')
    assert "was trained on another base (another)" in told({"x": strange})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"multi.sources": "[yes]"}, "multi.sources: name at least two tasks"),
        ({"multi.adapters": '{"maybe": "x"}'}, "multi.adapters: maybe is none of multi.sources (yes, no)"),
        ({"multi.weights": '{"maybe": 1}'}, "multi.weights: maybe is none of multi.sources"),
        ({"multi.sources": '{"base": "x.jsonl", "no": "x.jsonl"}'}, "'base' cannot be an adapter's name here"),
        ({"multi.sources": '{"lora": "x.jsonl", "no": "x.jsonl"}'}, "'lora' cannot be an adapter's name here"),
        ({"lora.task_type": "SEQ_CLS"}, "would give each task a head of its own"),
        ({"lora.target_modules": "[q_prok]"}, "did you mean q_proj"),
        ({"multi.merges": "[mean]"}, "multi.merges"),
    ],
)
def test_bad_input(
    changes: checks.Changes, told: str, chat_model: Path, sources: dict[str, Path], run_in_process: Any, tmp_path: Path
) -> None:
    line = checks.arguments(chat_model, sources["yes"], few(sources), changes)
    checks.check_refused(multi_adapter, line, told, run_in_process, tmp_path)


# --------------------------------------------------------------------------------------------------------------- serve


def test_the_command_that_serves_them() -> None:
    told = multi_adapter.serving("base", {"sort": Path("a/b"), "cat": Path("c")}, [16, 33])
    assert "vllm serve base --enable-lora --max-loras 2 --max-lora-rank 64 --lora-modules sort=a/b cat=c" in told
    assert "512 is the most" in multi_adapter.serving("base", {"cat": Path("c")}, [600])


# ------------------------------------------------------------------------------------------------------------- the run


def few(sources: dict[str, Path]) -> checks.Changes:
    return {
        "multi.sources": json.dumps({name: str(file) for name, file in sources.items()}),
        "multi.steps": 40,
        "multi.learning_rate": 2e-2,
        "lora.r": 8,
        "lora.lora_alpha": 32,
        "lora.target_modules": "[q_proj, v_proj, up_proj, down_proj]",
    }


@pytest.fixture(scope="module")
def trained(
    chat_model: Path, questions: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """One finished run that several tests look at: its folder and figures."""
    with pytest.MonkeyPatch.context() as patch:
        line = checks.arguments(chat_model, questions, few(sources))
        folder, figures, _ = checks.trained_model(multi_adapter, line, tmp_path_factory.mktemp("runs"), patch)
        yield folder, figures


def test_a_task_s_own_adapter_is_best_at_it(trained: Any) -> None:
    _, figures = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.5
    assert figures["eval_loss"] < figures["others_loss"] - 0.3  # "yes" where "no" is right
    assert figures["switch_max_logit_difference"] == 0
    assert figures["cat_relative_error"] < 1e-5 < figures["svd_relative_error"] < figures["linear_relative_error"]
    assert figures["eval_loss"] < figures["cat_loss"] < figures["others_loss"]


def test_every_adapter_is_saved_in_peft_s_format(trained: Any, chat_model: Path) -> None:
    folder, _ = trained
    places = [folder / "stages" / name / "adapter" for name in ("yes", "no")]
    places += [folder / "adapters" / name for name in ("cat", "svd", "ties_svd", "linear")]
    for place in places:
        load_adapter(fresh(chat_model), place)
    card = (folder / "README.md").read_text()
    assert "--max-loras 6 --max-lora-rank 16 --lora-modules yes=" in card
    assert f"cat={folder / 'adapters' / 'cat'}" in card
    assert (folder / "plots" / "scores.png").stat().st_size > 5000


@pytest.mark.slow
def test_adapters_that_are_there_are_taken(
    trained: Any, chat_model: Path, questions: Path, sources: dict[str, Path], run_in_process: Any, tmp_path: Path
) -> None:
    folder, figures = trained
    there = {name: str(folder / "stages" / name / "adapter") for name in ("yes", "no")}
    line = checks.arguments(chat_model, questions, few(sources), {"multi.adapters": json.dumps(there)})
    dry = run_in_process(multi_adapter, [*line, "--dry-run"], tmp_path)
    assert dry.code == 0 and "2 adapters of LORA belong to this base" in dry.out and not dry.folder.exists()
    done = run_in_process(multi_adapter, line, tmp_path)
    assert done.code == 0, done.err
    assert not (done.folder / "stages").exists()
    assert {name: done.figures[name] for name in ("eval_loss", "cat_loss")} == {
        name: figures[name] for name in ("eval_loss", "cat_loss")
    }
