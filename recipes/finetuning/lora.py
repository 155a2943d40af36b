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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import trl


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    lora: Section[peft.LoraConfig] = field(default_factory=defaults(task_type="CAUSAL_LM"))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def closed_form(model: peft.PeftModel) -> tuple[int, int]:
    """How many matrices are adapted, and the sum of r (in + out) over them, from the shapes of the frozen weights."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    sizes = [layer.r["default"] * (layer.in_features + layer.out_features) for layer in layers]
    return len(layers), sum(sizes)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, adapter, train, merge, save both."""
    from recipes.common import adaptation
    from recipes.common.peft_models import check_low_rank, save_and_merge, with_adapter

    task = adaptation.prepare(config.model, config.data, config.lora.task_type, run)
    check_low_rank(task.base, config.lora, run)
    adapted = with_adapter(task.base, config.lora)
    matrices, expected = closed_form(adapted)
    targets = adapted.peft_config[
        "default"
    ].target_modules  # a set of names (of all-linear: of every layer's), or one pattern
    names = targets if isinstance(targets, str) else ", ".join(sorted({name.rsplit(".", 1)[-1] for name in targets}))
    run.say(f"  lora: {matrices} matrices ({names}), sum of r (in + out) = {expected:,}")
    trainer, figures = adaptation.learn(task, adapted, config.training, config.evaluation, run, config.run)
    return figures | save_and_merge(task, trainer, adapted, run)


if __name__ == "__main__":
    run_recipe(main, Config)
