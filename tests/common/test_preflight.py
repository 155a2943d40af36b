"""The dry run's memory: each part against what is really held, and the whole against the peak of real runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_chat import command_line, make_model, make_tokenizer
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel

from recipes.common import memory_estimate as estimate
from recipes.common.errors import UserError
from recipes.common.machine import GIB
from recipes.common.optimizers import muon_with_adamw
from recipes.common.preflight import count_parameters, enough_blocks
from recipes.common.run_folder import RunFolder
from tests.conftest import ROOT

IDS = torch.randint(0, 260, (4, 128), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def settings(optim: str = "adamw_torch_fused", bf16: bool = False, **changes: Any) -> Any:
    """What the estimate reads of TrainingArguments."""
    fixed = {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-8,
        "gradient_checkpointing": False,
        "world_size": 1,
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(optim=optim, bf16=bf16, fp16=False, **{**fixed, **changes})


def small(**changes: Any) -> Any:
    """Wide enough for its matrices to outweigh what is small change."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    return make_model(make_tokenizer(), **{**sizes, **changes})


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))


def held(optimizer: Any) -> int:
    """Bytes of an optimizer's state, its step counters left out."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------------------------------------ the parts


def test_the_moments_are_those_of_the_optimizer_in_use() -> None:
    model = small()
    muon = muon_with_adamw(model, settings(), 0.01)
    adamw = torch.optim.AdamW(model.parameters())
    model(**BATCH).loss.backward()
    for optimizer, given in ((muon, muon), (adamw, None)):
        optimizer.step()
        assert estimate.optimizer_bytes(model, settings(), given)[0] == held(optimizer)
    assert held(muon) < 0.7 * held(adamw)


@pytest.mark.parametrize(
    "optim, bytes_each",
    [("adamw_torch", 8), ("paged_adamw_32bit", 8), ("paged_adamw_8bit", 2), ("adamw_torch_4bit", 1), ("lion_32bit", 4),
     ("paged_lion_8bit", 1), ("rmsprop", 4), ("sgd", 0), ("adafactor", 0)],
)  # fmt: skip
def test_an_optimizer_is_known_by_its_name(optim: str, bytes_each: int) -> None:
    model = small()
    assert estimate.optimizer_bytes(model, settings(optim)) == (bytes_each * count_parameters(model), 0)


def test_only_what_learns_has_gradients_and_moments() -> None:
    model = with_lora(small())
    learned = count_parameters(model, trainable_only=True)
    assert 0 < learned < count_parameters(model) / 2
    assert estimate.gradient_bytes(model) == 4 * learned
    assert estimate.optimizer_bytes(model, settings())[0] == 8 * learned


def test_frozen_weights_count_as_they_are_kept() -> None:
    model = small().bfloat16()
    assert estimate.weight_bytes(model) == 2 * count_parameters(model)
    for parameter in list(model.parameters())[:3]:
        parameter.data = parameter.data.float()
    first = sum(p.numel() for p in list(model.parameters())[:3])
    assert estimate.weight_bytes(model) == 2 * count_parameters(model) + 2 * first


def test_four_bit_weights_count_packed_and_as_numbers_each(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from recipes.finetuning.qlora import QLoRA, measured_bytes, quantisation_config

    plain = small()
    plain.save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation_config(QLoRA()))
    weights, size = measured_bytes(packed)
    assert weights > 0.7 * count_parameters(plain)
    assert count_parameters(packed) == count_parameters(plain)
    rest = count_parameters(plain) - weights
    assert estimate.weight_bytes(packed) == size + rest * next(p for p in packed.parameters() if p.ndim == 1).itemsize


def kept_for_backward(model: Any, bf16: bool) -> int:
    """What a forward pass really keeps, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.train()(**BATCH)
    return sum(found.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapt", [lambda model: model, with_lora], ids=["full", "lora"])
def test_the_formula_is_near_what_the_forward_pass_keeps(
    adapt: Callable[[Any], Any], attention: str, bf16: bool
) -> None:
    model = adapt(small(attn_implementation=attention))
    args = settings(bf16=bf16)
    guessed = estimate.activation_bytes(model, BATCH, args) + estimate.copied_bytes(model, args)
    assert guessed == pytest.approx(kept_for_backward(model, bf16), rel=0.35)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_gelu_written_out_in_python_keeps_each_of_its_steps(bf16: bool) -> None:
    def gpt2(activation: str) -> GPT2LMHeadModel:
        sizes = {"vocab_size": 264, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **none, activation_function=activation))

    written_out, fused = gpt2("gelu_new"), gpt2("gelu_pytorch_tanh")
    fused.load_state_dict(written_out.state_dict())
    assert torch.allclose(written_out.eval()(IDS).logits, fused.eval()(IDS).logits, atol=1e-5)
    really = kept_for_backward(written_out, bf16) - kept_for_backward(fused, bf16)
    guessed = [estimate.activation_bytes(model, BATCH, settings(bf16=bf16)) for model in (written_out, fused)]
    assert guessed[0] - guessed[1] == pytest.approx(really, rel=0.01)
    on_gpu = estimate.activation_bytes(written_out, BATCH, settings(bf16=True, device=torch.device("cuda")))
    assert on_gpu - guessed[1] > really or not bf16


def test_eager_attention_holds_its_matrix_and_checkpointing_little() -> None:
    sizes = {
        attention: estimate.activation_bytes(small(attn_implementation=attention), BATCH, settings())
        for attention in ("eager", "sdpa")
    }
    assert sizes["eager"] - sizes["sdpa"] == 3 * 4 * 4 * 128 * 128 * 4  # layers, heads, rows, length, length, bytes
    few = settings(gradient_checkpointing=True)
    assert estimate.activation_bytes(small(), BATCH, few, scored=0) < 0.5 * estimate.activation_bytes(
        small(), BATCH, settings(), scored=0
    )


def test_the_table_is_the_paper_s() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 devices, 31.4, 16.6 and 1.9 GB."""
    model = torch.nn.Linear(75_000, 100_000, bias=False, device="meta")
    found = estimate.memory_per_device(model, settings(bf16=True, world_size=64), 0)
    in_gb = {stage: round(size * GIB / 1e9, 1) for stage, size in found.items()}
    assert in_gb == {
        "zero0": 135.0,
        "zero1": 31.4,
        "zero2": 16.6,
        "zero3": 1.9,
    }  # autocast: 16 bytes and a copy in bf16
    model.requires_grad_(False)
    alone = estimate.memory_per_device(model, settings(bf16=True, world_size=64), 10**9)["zero3"]
    assert alone * GIB == pytest.approx(2 * 7.5e9 / 64 + 1e9)  # frozen: the weights alone are shared out


def test_frozen_models_beside_it_are_whole_on_every_device_but_under_stage_3() -> None:
    model, frozen = (torch.nn.Linear(1000, 1000, bias=False) for _ in range(2))
    for bf16, size in ((False, 4e6), (True, 2e6)):
        args = settings(bf16=bf16, world_size=4)
        alone, both = (estimate.memory_per_device(model, args, 0, frozen=some) for some in ((), (frozen,)))
        more = {stage: (both[stage] - alone[stage]) * GIB for stage in alone}
        assert more == pytest.approx({"zero0": 4e6, "zero1": size, "zero2": size, "zero3": size / 4})


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else tells what of a mapped file is in memory")
def test_weights_that_nobody_read_yet_are_counted(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    small(hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    before = estimate.unread_bytes(model)
    assert before <= size + 8192
    for parameter in model.parameters():
        parameter.sum()
    after = estimate.unread_bytes(model)
    assert after <= before and after < 0.2 * size
    assert estimate.unread_bytes(torch.nn.Linear(100, 100, device="meta")) == 4 * 10_100 + after


# ------------------------------------------------------------------------------------------------------ how much is read


def read_of(rows: Any, least: int = 0, batch: int = 1, max_steps: int = 5, dry: bool = True) -> tuple[list[int], float]:
    """Characters of each try to pack the rows into blocks of 1,000, and the share that was read in the end."""
    tries: list[int] = []

    def pack(some: Any) -> Any:
        tries.append(sum(len(row["text"]) for row in some))
        if tries[-1] < least:
            raise UserError("too short")
        return Dataset.from_dict({"input_ids": list(range(tries[-1] // 1000))})

    run = RunFolder(Path("nowhere"), recipe="x", dry=dry)
    args = settings(max_steps=max_steps, per_device_train_batch_size=batch)
    blocks = enough_blocks(pack, rows, run, args)
    assert hasattr(blocks, "__len__") == hasattr(rows, "__len__")
    return tries, run.share_read


def test_a_dry_run_packs_the_first_characters_and_more_only_where_a_batch_takes_more() -> None:
    rows = Dataset.from_dict({"text": ["x" * 300_000] * 10})
    assert read_of(rows, dry=False) == ([3_000_000], 1.0)
    assert read_of(rows) == ([500_000], pytest.approx(1 / 6))
    assert read_of(Dataset.from_dict({"text": ["x" * 3_000_000]})) == ([500_000], pytest.approx(1 / 6))  # one text file
    assert read_of(rows.to_iterable_dataset())[0] == [500_000]
    assert read_of(rows, batch=600) == ([500_000, 2_000_000], pytest.approx(2 / 3))
    assert read_of(rows, batch=2500) == ([500_000, 2_000_000, 3_000_000], 1.0)
    assert read_of(rows, least=600_000)[0] == [500_000, 2_000_000]
    with pytest.raises(UserError):
        read_of(rows, least=4_000_000)


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 million parameters: enough for methods and optimizers to differ by more than the tolerance."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    make_model(tokenizer, num_attention_heads=8, num_key_value_heads=8, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "lora", "bitfit", "qlora"])
def test_the_dry_run_s_estimate_is_within_15_percent_of_the_measured_peak(
    recipe: str, base: Path, execute: Callable[..., Any], tmp_path: Path
) -> None:
    """Each in a process of its own: the laptop config, on fewer rows and steps.

    The C library gives blocks of more than 128 KiB back here as soon as they are freed. Left to itself it keeps them for
    whoever asks next, more of them or fewer from run to run: one and the same run of lora peaked at 1.30 to 1.57 GiB.
    """
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Is it {n}?", "completion": "yes"}) + "\n" for n in range(400)))
    changes = {
        "model.name": base,
        "data.name": rows,
        "training.max_steps": 2,  # the second has the optimizer's state beside its gradients
        "training.per_device_train_batch_size": 24,
        "evaluation.max_samples": 8,
        "run.root": tmp_path,
    }
    line = [sys.executable, ROOT / f"recipes/finetuning/{recipe}.py", *command_line(changes)]
    heap = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    dry = execute([*line, "--dry-run"], timeout=1200, **heap)
    assert dry.returncode == 0, dry.stderr
    told = re.search(r"memory here +([\d.]+) GiB", dry.stdout)
    assert told and "a step was tried" in dry.stdout, dry.stdout
    done = execute(line, timeout=1200, **heap)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / recipe / "default" / "metrics.json").read_text())
    assert float(told[1]) == pytest.approx(figures["peak_memory_gib"], rel=0.15)
