"""What the tests of the parameter-efficient recipes have in common: tiny models of three kinds, and what must hold of all.

    from peft_checks import ...

The models are saved folders with the byte tokenizer of tiny_chat beside them, random and frozen for ever: a method must
bend them to an answer that the rows always have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import SHORT_RUN, command_line, make_tokenizer

Run = Callable[..., Any]
Changes = dict[str, Any]
FOUR_STEPS: Changes = {"training.max_steps": 4}


def arguments(model: Path, data: Path | str, *changes: Changes) -> list[str]:
    """The command line of a short run; later changes win."""
    values: Changes = {"model.name": model, "model.attention": "sdpa", "data.name": data, **SHORT_RUN}
    for some in changes:
        values |= some
    return command_line(values)


# ---------------------------------------------------------------------------------------------------- tiny models


BERT_HEAD = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def save_bert(folder: Path) -> Path:
    """An encoder, 2 layers of width 32."""
    from transformers import BertConfig, BertModel

    return _save(BertModel, BertConfig, folder, **SIZES, pad_token_id=0)


def save_t5(folder: Path) -> Path:
    """An encoder-decoder without biases, 2 layers of width 32 on each side."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return _save(T5ForConditionalGeneration, T5Config, folder, **sizes, pad_token_id=0, decoder_start_token_id=0)


def save_bart(folder: Path) -> Path:
    """An encoder-decoder with biases, 2 layers of width 32 on each side."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "max_position_embeddings": 128}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_ffn_dim": 64, f"{side}_layers": 2, f"{side}_attention_heads": 4}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": None, "forced_eos_token_id": None}
    return _save(BartForConditionalGeneration, BartConfig, folder, **sizes, **ids)


def save_gpt2(folder: Path) -> Path:
    """A decoder with biases and queries, keys and values in one matrix, 2 layers of width 32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return _save(GPT2LMHeadModel, GPT2Config, folder, **sizes, bos_token_id=None)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _save(model_class: Any, config_class: Any, folder: Path, **sizes: Any) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labelled_rows(file: Path) -> Path:
    """JSON lines of two classes that one word tells apart; gives the file."""
    rows = [{"text": f"{('red', 'blue')[n % 2]} {n}", "label": ("warm", "cold")[n % 2]} for n in range(400)]
    return _write(file, rows)


def pair_rows(file: Path) -> Path:
    """JSON lines of sources whose target is always the same; gives the file."""
    return _write(file, [{"source": f"is it {n}?", "target": "yes"} for n in range(400)])


def _write(file: Path, rows: list[Changes]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ------------------------------------------------------------------------------------------- what must hold of all


def check_gradients(model: Any, batch: dict[str, torch.Tensor], intended: set[str]) -> None:
    """A backward pass reaches the intended parameters, all of them, and no other."""
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == intended
    model.zero_grad()


def check_a_step_changes(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> None:
    """One step of AdamW on what learns moves the logits."""
    before = model(**inputs).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    model(**inputs, labels=inputs["input_ids"] if labels is None else labels).loss.backward()
    optimizer.step()
    assert (model(**inputs).logits - before).abs().max() > 1e-3


def check_base_untouched(adapted: Any, base: Any, changed: Callable[[str], bool] = lambda name: False) -> None:
    """Every weight of the base is, bit for bit, in the adapted model under its own name, but for those that may change."""
    now = adapted.state_dict()
    for name, tensor in base.state_dict().items():
        assert name in now, name
        if not changed(name):
            assert torch.equal(now[name], tensor), name


def check_reloads(folder: Path, trained: Any, fresh: Any, inputs: dict[str, torch.Tensor], atol: float = 0.0) -> Any:
    """The adapter of a run, on a fresh base: the logits of `trained`, and others than the base's. Gives the adapted model."""
    from recipes.common.adapter_files import load_adapter

    with torch.no_grad():
        plain = fresh.eval()(**inputs).logits
        loaded = load_adapter(fresh, folder / "adapter")
        ours, theirs = loaded(**inputs).logits, trained.eval()(**inputs).logits
    assert (ours - theirs).abs().max() <= atol
    assert (ours - plain).abs().max() > 1e-2, "the adapter changes nothing"
    return loaded


def trained_model(
    recipe: Any, line: list[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Changes, Any]:
    """Run a recipe to its end; gives its run folder, its figures and the model that was trained, as it is in memory."""
    from recipes.common import adaptation
    from recipes.common.recipe import run_recipe

    kept: list[Any] = []
    save = adaptation.save

    def keep(task: Any, trainer: Any, model: Any, *rest: Any, **more: Any) -> int:
        kept.append(model)
        return save(task, trainer, model, *rest, **more)

    monkeypatch.setattr(adaptation, "save", keep)
    assert run_recipe(recipe.main, recipe.Config, [*line, "--run.root", str(root)]) == 0
    folder = root / Path(recipe.__file__).stem / "default"
    return folder, json.loads((folder / "metrics.json").read_text()), kept[0]


def check_card(folder: Path, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Each block of Python in the run's card loads a model that computes what the trained one does."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert blocks and not (folder / "adapter" / "README.md").exists()
    for block in blocks:
        loaded: dict[str, Any] = {}
        exec(block, loaded)
        assert loaded["tokenizer"]("Is it 3?")["input_ids"]
        with torch.no_grad():
            told = loaded["model"].eval()(**inputs).logits
            assert torch.allclose(told, model.eval()(**inputs).logits, atol=1e-4)


def check_resume(
    recipe: Any,
    line: list[str],
    run_in_process: Run,
    folder: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int = 24,
) -> None:
    """Stopped `after` so many steps and resumed, a run leaves the adapter of the uninterrupted one (its run folder)."""
    from recipes.common import training

    asked, steps = training.StopSignals.asked, iter(range(1000))

    def stop(self: Any) -> bool:
        self.reason = "test"
        return next(steps) >= after

    monkeypatch.setattr(training.StopSignals, "asked", stop)
    assert run_in_process(recipe, line, folder).code == 130
    monkeypatch.setattr(training.StopSignals, "asked", asked)
    resumed = run_in_process(recipe, [*line, "--run.resume", "true"], folder)
    assert resumed.code == 0, resumed.err
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (resumed.folder, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)


def check_checkpointing_and_packing(recipe: Any, line: list[str], run_in_process: Run, folder: Path) -> None:
    """Gradient checkpointing happens and gives the same adapter; rows that are not packed are learned from too. `line`: FOUR_STEPS."""
    from transformers import modeling_utils

    found, layers, plain_call = {}, 0, modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal layers
        layers += 1
        return plain_call(*args, **kwargs)

    for name, words in {
        "plain": (),
        "checkpointed": ("--training.gradient_checkpointing", "true"),
        "unpacked": ("--training.packing", "false"),
    }.items():
        layers = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_utils, "checkpoint", counted)
            done = run_in_process(recipe, [*line, *words, "--run.name", name], folder)
        assert done.code == 0, done.err
        assert (layers > 0) == (name == "checkpointed")
        found[name] = load_file(done.folder / "adapter" / "adapter_model.safetensors"), done.figures
    plain, checkpointed = found["plain"][0], found["checkpointed"][0]
    assert all(plain[name].shape == checkpointed[name].shape for name in plain)
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=0, atol=1e-5) for name in plain)
    assert found["unpacked"][1]["eval_loss"] < found["unpacked"][1]["baseline_loss"]


def check_refused(recipe: Any, line: list[str], told: str, run_in_process: Run, folder: Path) -> None:
    """Exit code 2, one clear line, no traceback, no run folder."""
    done = run_in_process(recipe, line, folder)
    assert done.code == 2, done.out
    assert told in done.err
    assert "Traceback" not in done.err
    assert not done.folder.exists()


def check_other_base_refused(folder: Path, other: Any) -> None:
    """The adapter of a run is not put on a base of the same shape with other weights: all of them, or one matrix's."""
    from recipes.common.adapter_files import load_adapter
    from recipes.common.errors import UserError

    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(other, folder / "adapter")
    name = json.loads((folder / "adapter" / "base.json").read_text())["name"]
    nearly = type(other).from_pretrained(name)
    matrices = [p for n, p in nearly.base_model.named_parameters() if p.ndim == 2 and "embed" not in n]
    with torch.no_grad():
        matrices[-1].mul_(1.1)  # as merging another adapter would
    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(nearly, folder / "adapter")
