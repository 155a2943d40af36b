"""LoRA: freeze the model, and learn the change of each chosen weight matrix as a product of two thin ones.

    h = W x + (alpha / r) B A x        W [out, in] frozen;  A [r, in] random, B [out, r] zero: it starts as it was
    learned: r (in + out) numbers a matrix, instead of in * out
    W' = W + (alpha / r) B A           merged: nothing is added at inference

Hu et al. 2021, https://arxiv.org/abs/2106.09685

    make lora                                       # laptop, offline, 3 minutes, from what `make llama` made
    make lora CONFIG=gpu                            # one GPU, a public model and instruction set
    make lora CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves adapter/ (the thin matrices alone) and model/ (merged, a model like any other). Laptop result: RESULTS.md#lora.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import torch
    import trl
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    lora: Section[peft.LoraConfig] = field(default_factory=defaults(task_type="CAUSAL_LM"))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def check_targets(model: PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Raise UserError where lora.target_modules names nothing in the model: peft drops a name of several silently."""
    import torch

    targets = lora.target_modules
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    valid = sorted({name.rsplit(".", 1)[-1] for name in linear if name != head})
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in names)]
        if head is not None and any(head == t or head.endswith(f".{t}") for t in targets):
            raise UserError(
                f"lora.target_modules: the loss is computed from the weights of {head} directly, so an adapter on it "
                f"would never learn; leave it out (or list it in lora.modules_to_save). Valid: {', '.join(valid)}"
            )
    if missing:
        near = [match[0] for m in missing if (match := difflib.get_close_matches(m, valid, n=1))]
        raise UserError(
            f"lora.target_modules: nothing in {type(model).__name__} is called {', '.join(missing)}"
            + (f"; did you mean {', '.join(near)}?" if near else ".")
            + f" Valid: {', '.join(valid)}, or all-linear"
        )


def closed_form(model: peft.PeftModel) -> tuple[int, int]:
    """How many matrices are adapted, and the sum of r (in + out) over them, from the shapes of the frozen weights."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    sizes = [layer.r["default"] * (layer.in_features + layer.out_features) for layer in layers]
    return len(layers), sum(sizes)


def merge(model: peft.PeftModel, batch: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, float]:
    """Add B A to the weights; gives the plain model and the largest difference of a logit that merging made on `batch`.

    Raises RuntimeError if it is more than rounding: a merged model that is another model must not be saved as this one.
    """
    from recipes.common.generation import inference

    asked = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}
    with inference(model):
        apart = model(**asked).logits.float()
    merged = model.merge_and_unload()
    with inference(merged):
        together = merged(**asked).logits.float()
    difference = (apart - together).abs().max().item()
    rounding = 1e-4 if merged.dtype.itemsize == 4 else 5e-2
    if not difference <= rounding * max(1.0, apart.abs().max().item()):
        raise RuntimeError(
            f"merging the adapter moved a logit by {difference:.3g}: the merged model is not what was trained"
        )
    return merged, difference


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Model, conversations, adapter; measure, train, measure again, merge, save both."""
    from recipes.common import sft
    from recipes.common.data import load_data
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.sft_packing import prepare
    from recipes.common.training import fit

    if config.model.name is None:
        raise UserError(
            "model.name: LoRA adapts a pretrained model; a fresh one (model.config) has nothing to keep frozen"
        )
    tokenizer = load_tokenizer(config.model, run, chat=True)
    base = load_model(config.model, tokenizer, run)
    check_targets(base, config.lora)
    conversations = load_data(config.data, "conversation")
    rows = prepare(conversations, tokenizer, base, config.training, run)
    trainer = sft.make_trainer(base, tokenizer, rows, config.training, peft_config=config.lora)
    if sft.sharded(trainer):
        raise UserError(
            "lora: merging needs the whole model in each process; launch with ddp, zero1 or zero2 (the base is frozen, "
            "so its weights are all that a device must hold)"
        )
    adapted = sft.model_of(trainer)
    matrices, expected = closed_form(adapted)
    names = ", ".join(sorted(adapted.peft_config["default"].target_modules))
    run.say(f"  lora: {matrices} matrices ({names}), sum of r (in + out) = {expected:,}")
    batch = sft.announce(trainer, run)

    before = sft.measure(trainer, tokenizer, conversations["validation"], config.evaluation, run, "before")
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    after = sft.measure(trainer, tokenizer, conversations["validation"], config.evaluation, run, "after")

    run.save_model(adapted, tokenizer, folder="adapter")
    full_precision = trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)  # no autocast around it
    merged, difference = merge(full_precision, batch)
    run.save_model(merged, tokenizer)
    return {**sft.report(run, before, after), "merge_max_logit_difference": difference}


if __name__ == "__main__":
    run_recipe(main, Config)
