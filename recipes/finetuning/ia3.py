"""IA3: freeze the model, and learn one factor for each key, value and inner feed-forward activation.

    attention       softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)        l_k, l_v [key and value width]
    feed-forward    W_down (l_ff * f(W_up x))                         l_ff [inner width]
    learned         one vector a layer each, all ones at first: it starts as it was
    merged          W_k' = diag(l_k) W_k,  W_v' = diag(l_v) W_v,  W_down' = W_down diag(l_ff): nothing is added at inference

Liu et al. 2022, https://arxiv.org/abs/2205.05638 (section 3.3)

    make ia3                                       # laptop, offline, 2 minutes, from what `make llama` made
    make ia3 CONFIG=gpu                            # one GPU, a public model and instruction set
    make ia3 CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves adapter/ (the vectors alone) and model/ (merged, a model like any other). Laptop result: RESULTS.md#ia3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
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
    ia3: Section[peft.IA3Config] = field(default_factory=defaults(task_type="CAUSAL_LM"))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def closed_form(model: peft.PeftModel) -> tuple[int, int, int]:
    """How many vectors learn, how many are l_ff, and the sum of the lengths: a weight's out for l_k and l_v, in for l_ff."""
    from peft.tuners.ia3 import IA3Layer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, IA3Layer)]
    lengths = [layer.in_features if layer.is_feedforward else layer.out_features for layer in layers]
    return len(layers), sum(layer.is_feedforward for layer in layers), sum(lengths)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, vectors, train, merge, save both."""
    from recipes.common import adaptation
    from recipes.common.peft_models import check_targets, save_and_merge, with_adapter

    task = adaptation.prepare(config.model, config.data, config.ia3.task_type, run)
    check_targets(task.base, config.ia3.target_modules, "ia3")
    check_targets(task.base, config.ia3.feedforward_modules, "ia3", "feedforward_modules")
    adapted = with_adapter(task.base, config.ia3)
    vectors, inner, expected = closed_form(adapted)
    if config.ia3.feedforward_modules and not inner:
        raise UserError("ia3.feedforward_modules: none of them is among ia3.target_modules: add them there too")
    run.say(f"  ia3: {vectors} vectors, {inner} of them l_ff; the sum of their lengths is {expected:,}")
    trainer, figures = adaptation.learn(task, adapted, config.training, config.evaluation, run, config.run)
    return figures | save_and_merge(task, trainer, adapted, run)


if __name__ == "__main__":
    run_recipe(main, Config)
