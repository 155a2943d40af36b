"""LoRA as a recipe: what learns, what stays, that merging changes nothing, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_checks as checks
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_chat import SHORT_RUN, command_line, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from recipes.common.adapter_files import fingerprint
from recipes.common.errors import UserError
from recipes.common.peft_models import check_low_rank, check_targets, merge, with_adapter
from recipes.finetuning import ia3, lora

BATCH = "training.per_device_train_batch_size"
Run = Callable[..., Any]
Changes = dict[str, Any]
FEW = SHORT_RUN | {
    "lora.r": 8,
    "lora.lora_alpha": 32,
    "lora.target_modules": "[q_proj, v_proj, up_proj, down_proj]",
    "training.learning_rate": 2e-2,
}


def arguments(chat_model: Path, data: Path | str, changes: Changes | None = None) -> list[str]:
    """The command line of a short run."""
    return command_line({"model.name": chat_model, "data.name": data, **FEW, **(changes or {})})


@pytest.fixture(scope="module")
def trained(chat_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One finished run that several tests look at: its folder and figures."""
    from recipes.common.recipe import run_recipe

    root = tmp_path_factory.mktemp("runs")
    assert run_recipe(lora.main, lora.Config, [*arguments(chat_model, questions), "--run.root", str(root)]) == 0
    folder = root / "lora" / "default"
    return folder, json.loads((folder / "metrics.json").read_text())


def test_it_learns(trained: Any) -> None:
    """As far as a frozen random model can be taught: its narrow output layer bounds how sure it can be."""
    _, figures = trained
    assert figures["eval_loss"] < figures["baseline_loss"] - 0.5


def test_the_lines_of_its_card_load_it_merged_and_as_an_adapter(trained: Any) -> None:
    folder, _ = trained
    ids = {"input_ids": torch.arange(10, 210).view(4, 50)}
    checks.check_card(folder, AutoModelForCausalLM.from_pretrained(folder / "model"), ids)


def test_what_learns_is_the_closed_form(trained: Any) -> None:
    """r (in + out) for q (32 x 32), v (32 x 16), up (32 x 64), down (64 x 32), in each of 2 layers."""
    _, figures = trained
    expected = 2 * 8 * ((32 + 32) + (32 + 16) + (32 + 64) + (64 + 32))
    assert figures["trainable_parameters"] == expected


def test_the_adapter_is_small_and_the_base_is_bit_for_bit_what_it_was(trained: Any, chat_model: Path) -> None:
    folder, _ = trained
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in tensors)
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in loaded.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    merged = load_file(folder / "model" / "model.safetensors")
    adapted = re.compile(r"(q|v|up|down)_proj")
    for name, tensor in merged.items():  # what no adapter touched was saved as it was
        assert torch.equal(tensor, before[name]) != bool(adapted.search(name)), name


def test_it_starts_as_it_was_only_the_two_factors_get_gradients_and_a_step_changes_the_output() -> None:
    plain = make_model(make_tokenizer()).eval()
    adapted = with_adapter(
        copy.deepcopy(plain), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    )
    batch = {"input_ids": torch.arange(10, 210).view(4, 50)}
    with torch.no_grad():
        assert torch.equal(adapted.eval()(**batch).logits, plain(**batch).logits)
    factors = {name for name, _ in adapted.named_parameters() if "lora_A" in name or "lora_B" in name}
    checks.check_gradients(adapted, batch | {"labels": batch["input_ids"]}, factors)
    checks.check_a_step_changes(adapted, batch)


@pytest.mark.slow
def test_gradient_checkpointing_and_packing(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    line = arguments(chat_model, questions, checks.FOUR_STEPS)
    checks.check_checkpointing_and_packing(lora, line, run_in_process, tmp_path)


@pytest.mark.slow
def test_an_encoder_tells_classes(run_in_process: Run, tmp_path: Path) -> None:
    base, rows = checks.save_bert(tmp_path / "bert"), checks.labelled_rows(tmp_path / "rows.jsonl")
    changes = {"lora.task_type": "SEQ_CLS", "lora.target_modules": "[query, value]"}
    done = run_in_process(lora, arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["accuracy"] > 0.9 > done.figures["baseline_accuracy"]
    fresh, merged = (
        AutoModelForSequenceClassification.from_pretrained(f, num_labels=2) for f in (base, done.folder / "model")
    )
    checks.check_reloads(done.folder, merged, fresh, {"input_ids": torch.arange(10, 210).view(4, 50)}, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "save"), [(lora, "bart"), (lora, "t5"), (ia3, "bart")])
def test_the_head_of_an_encoder_decoder_learns_and_is_saved(
    run_in_process: Run, tmp_path: Path, recipe: Any, save: str
) -> None:
    """peft knows heads that are called classifier or score: another would stay random, and be another's once reloaded."""
    base, rows = getattr(checks, f"save_{save}")(tmp_path / save), checks.labelled_rows(tmp_path / "rows.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base)  # with an end behind each text, as BART's and T5's own have
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    plain = tmp_path / "plain"
    AutoTokenizer.from_pretrained(base).save_pretrained(plain)
    tokenizer.save_pretrained(base)
    name = Path(recipe.__file__).stem
    queries = {"bart": "[q_proj, v_proj]", "t5": "[q, v]"}[save]
    own = {"lora.r": 4, "lora.lora_alpha": 8} if recipe is lora else {"ia3.feedforward_modules": "[]"}
    changes = {f"{name}.task_type": "SEQ_CLS", f"{name}.target_modules": queries, **own, **checks.FOUR_STEPS}
    refused = run_in_process(recipe, checks.arguments(base, rows, changes, {"model.tokenizer": plain}), tmp_path)
    assert refused.code == 2 and "writes no <|end|>: give the model's own" in refused.err
    done = run_in_process(recipe, checks.arguments(base, rows, changes), tmp_path)
    assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained(done.folder / "model")
    torch.manual_seed(1)  # the head of the fresh one is another
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    ids = torch.arange(10, 50).view(4, 10)
    ids[:, -1] = tokenizer.eos_token_id
    checks.check_reloads(done.folder, merged, fresh, {"input_ids": ids}, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["fsdp", "zero3"])
def test_a_sharded_run_leaves_the_adapter_of_one_process(
    run_in_process: Run, execute: Any, chat_model: Path, questions: Path, tmp_path: Path, launch: str
) -> None:
    """Two processes that hold half of the frozen weights each; the rows of a step are the same, and so is what they teach."""
    pytest.importorskip("deepspeed")
    few = {"training.max_steps": 4, "run.threads": 1, "lora.init_lora_weights": "gaussian"}
    one = run_in_process(lora, arguments(chat_model, questions, {**few, "run.name": "one"}), tmp_path)
    assert one.code == 0, one.err
    half = {**few, "run.name": "two", "training.per_device_train_batch_size": SHORT_RUN[BATCH] // 2}
    line = [
        sys.executable,
        "tests/sharded_on_cpu.py",
        launch,
        "2",
        lora.__file__,
        *arguments(chat_model, questions, half),
    ]
    done = execute([*line, "--run.root", str(tmp_path)], timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr

    folders = [one.folder, one.folder.with_name("two")]
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    losses = [[row["loss"] for row in found if "loss" in row] for found in rows]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() < 0.02 * theirs[name].norm() for name in theirs)
    assert {file.suffix for file in (folders[1] / "adapter").iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_a_table_of_more_numbers_than_float32_can_count_has_a_fingerprint() -> None:
    table = torch.nn.Embedding(2**21 + 1, 8, dtype=torch.bfloat16)  # Qwen2.5 0.5B's has 136 million
    model: Any = SimpleNamespace(base_model=torch.nn.Sequential(table), config=SimpleNamespace())
    before = fingerprint(model)
    table.weight.data[-1, -1] += 1  # the last number is one of those that are looked at
    assert fingerprint(model) != before


def test_base_and_adapter_give_the_merged_models_logits(trained: Any, chat_model: Path) -> None:
    folder, figures = trained
    ids = torch.randint(10, 250, (4, 30))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder / "model")(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(chat_model)
        plain = base(input_ids=ids).logits
        apart = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=ids).logits
    assert torch.allclose(apart, merged, atol=1e-4)
    assert not torch.allclose(plain, merged, atol=1e-1), "the adapter changed nothing"
    assert 0 <= figures["merge_max_logit_difference"] < 1e-4


def test_the_merged_model_answers(trained: Any) -> None:
    from recipes.common.generation import generate

    folder, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = [[{"role": "user", "content": f"Is it {n}?"}] for n in (3, 77)]
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == ["yes", "yes"]


def test_a_resumed_run_ends_with_the_adapter_of_an_uninterrupted_one(
    run_in_process: Run,
    chat_model: Path,
    questions: Path,
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from recipes.common import training

    asked = training.StopSignals.asked
    steps = iter(range(1000))

    def stop_after_24(self: Any) -> bool:
        self.reason = "test"
        return next(steps) >= 24

    monkeypatch.setattr(training.StopSignals, "asked", stop_after_24)
    assert run_in_process(lora, arguments(chat_model, questions), tmp_path).code == 130
    monkeypatch.setattr(training.StopSignals, "asked", asked)
    resumed = run_in_process(lora, arguments(chat_model, questions, {"run.resume": "true"}), tmp_path)
    assert resumed.code == 0, resumed.err
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (resumed.folder, trained[0]))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6


def test_merging_that_moves_the_logits_is_not_saved() -> None:
    """A fault in merging (peft has had several) must end the run, not the model."""
    tokenizer = make_tokenizer()
    model = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    batch = {"input_ids": torch.randint(10, 200, (2, 20))}
    honest = model.merge_and_unload

    def faulty() -> Any:
        merged = honest()
        merged.model.layers[0].self_attn.q_proj.weight.data *= 1.5
        return merged

    model.merge_and_unload = faulty
    with pytest.raises(RuntimeError, match="merging the adapter moved a logit"):
        merge(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"lora.use_dora": "true"}, {"lora.use_rslora": "true"}, {"lora.bias": "lora_only"}]
)
def test_relatives_of_lora_merge_too(
    run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path, changes: Changes
) -> None:
    done = run_in_process(lora, arguments(chat_model, questions, {"training.max_steps": 3, **changes}), tmp_path)
    assert done.code == 0, done.err
    assert done.figures["merge_max_logit_difference"] < 1e-4


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["qproj"], "nothing in LlamaForCausalLM is called qproj; did you mean q_proj"),
        (["q_proj", "value"], "nothing in LlamaForCausalLM is called value"),
        (["lm_head"], "the loss is computed from the weights of lm_head directly"),
        (r".*\.attention\..*", r".*\.attention\..*"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_the_valid_ones(targets: Any, told: str) -> None:
    model = make_model(make_tokenizer())
    with pytest.raises(UserError) as refused:
        check_targets(model, targets, "lora")
    assert told in str(refused.value)
    assert "Valid: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(refused.value)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj"], ["self_attn.q_proj"], r".*layers\.1\.mlp.*_proj"])
def test_targets_that_match_are_taken(targets: Any) -> None:
    check_targets(make_model(make_tokenizer()), targets, "lora")


def test_the_layers_of_gpt2_are_valid_targets_too() -> None:
    """It writes them as Conv1D."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"did you mean c_proj\?.* Valid: c_attn, c_fc, c_proj, or all-linear"):
        check_targets(model, ["o_proj", "c_prj"], "lora")


def test_a_rank_without_its_scale_is_refused() -> None:
    given = SimpleNamespace(given={"lora.r"})
    with pytest.raises(UserError, match=r"lora\.lora_alpha: what is learned is multiplied by lora_alpha / r"):
        check_low_rank(make_model(make_tokenizer()), LoraConfig(r=4, target_modules=["q_proj"]), given)  # type: ignore[arg-type]


def test_the_router_of_a_mixture_may_have_fewer_rows_than_the_rank() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    with_adapter(MixtralForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"))
    with pytest.raises(UserError, match=r"lora\.r: 16 is above what model\.layers\.0\.mlp\.gate can have, 4"):
        with_adapter(MixtralForCausalLM(config), LoraConfig(r=16, target_modules=["q_proj", "gate"]))


BAD: dict[str, tuple[Changes, str]] = {
    "a target that is not there": ({"lora.target_modules": "[q_proj, qv_proj]"}, "is called qv_proj"),
    "a fresh model": ({"model.name": "null", "model.config": "{model_type: llama}"}, "lora adapts a pretrained model"),
    "a broken pattern": ({"lora.target_modules": "("}, "'(' is no pattern"),
    "a rank of 0": ({"lora.r": 0}, "lora.r"),
    "a rank above the layer": ({"lora.r": 17}, "lora.r: 17 is above what model.layers.0.self_attn.v_proj can have, 16"),
    "a rank above every layer": ({"lora.r": 500, "lora.target_modules": "all-linear"}, "lora.r: 500 is above what"),
    "a pattern that takes the head too": ({"lora.target_modules": ".*(lm_head|q_proj)"}, "lm_head directly, so an"),
    "a start from the data": ({"lora.init_lora_weights": "eva"}, "lora.init_lora_weights: eva takes its start from"),
    "held-out rows laid out otherwise": ({"training.eval_packing": "false"}, "training.eval_packing: False, but"),
    "tied embeddings": ({"lora.target_modules": "[embed_tokens]"}, "model.embed_tokens is one with lm_head (tied"),
    "tied embeddings, whole": ({"lora.modules_to_save": "[lm_head]"}, "lm_head is one with model.embed_tokens (tied"),
    "an adapter as the model": ({"model.name": "{adapter}"}, "is an adapter, and no model without its base"),
    "a token that is none": (
        {"lora.trainable_token_indices": "[99999]"},
        "lora.trainable_token_indices: 99999 is no id of",
    ),
    "another library's layers": ({"lora.megatron_config": "{a: 1}"}, "lora.megatron_config: Megatron's layers are"),
    "no tokens to learn": ({"lora.trainable_token_indices": "[]"}, "lora.trainable_token_indices: it names no token"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    case: str, run_in_process: Run, chat_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes, told = BAD[case]
    if changes.get("model.name") == "{adapter}":
        adapter = tmp_path / "adapter"
        get_peft_model(make_model(make_tokenizer()), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(adapter)
        make_tokenizer().save_pretrained(adapter)
        changes = {"model.name": adapter}
    done = run_in_process(lora, arguments(chat_model, questions, changes), tmp_path)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_unmerging_gives_the_base_back(chat_model: Path, variant: dict[str, bool]) -> None:
    """To a rounding: the product is added to each weight and taken off again."""
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    settings: Any = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **variant)  # type: ignore[arg-type]
    model = with_adapter(base, settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = {"input_ids": torch.arange(10, 60).view(2, 25)}
    model.eval()
    apart = model(**ids).logits
    model.merge_adapter()
    assert torch.allclose(model(**ids).logits, apart, atol=1e-4)
    merged = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(merged, before["model.layers.0.self_attn.q_proj.weight"], atol=1e-2)
    model.unmerge_adapter()
    assert torch.allclose(model(**ids).logits, apart, atol=1e-4)
    for name, tensor in model.unload().state_dict().items():
        assert torch.allclose(tensor, before[name], atol=1e-6), name
