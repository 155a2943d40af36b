"""Prefix tuning: freeze the model, and learn keys and values that stand before a row in every layer.

    layer l      softmax(Q [P_K^l ; K]^T / sqrt(d)) [P_V^l ; V]          P_K, P_V [tokens, width] learned
    learned      2 x layers x tokens x width numbers; for an encoder-decoder in the self-attention of both sides
    with `prefix_projection`   [P_K ; P_V] = MLP(E), E [tokens, width]: steadier to train (section 4.3), and thrown
                               away afterwards, when only the keys and values are kept

A prefix is like `tokens` words that say the task in every layer and not only in the first: more to steer with than
prompt_tuning. At inference it costs `tokens` more keys a query, and no longer rows.

Li and Liang 2021, https://arxiv.org/abs/2101.00190

    make prefix_tuning                                    # laptop, offline, 3 minutes, from what `make llama` made
    make prefix_tuning CONFIG=gpu                         # one GPU, a public model and instruction set
    make prefix_tuning CONFIG=cluster LAUNCH=ddp NPROC=8  # a node; scripts/ has SLURM

Leaves adapter/ (the keys and values). Laptop result: RESULTS.md#prefix_tuning.
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
    prefix_tuning: Section[peft.PrefixTuningConfig] = field(
        default_factory=defaults(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True)
    )
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=False))
    evaluation: Evaluation
    run: Run


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, a prefix in every layer, train it, save its keys and values."""
    from recipes.common import adaptation, prefixes, prompt_encoder

    settings = config.prefix_tuning
    task = adaptation.prepare(config.model, config.data, settings.task_type, run)
    packed = config.training.packing and task.type == "CAUSAL_LM"
    prefixes.check(task.base, settings, config.training, "prefix_tuning", packed)

    prefixes.put_in(task.base, settings)
    shapes = prefixes.shapes_of(task.base)
    adaptation.freeze(task.base, prompt_encoder.learned_names(task.base))
    kept = sum(2 * settings.num_virtual_tokens * shape.layers * shape.heads * shape.d for shape in shapes)
    run.say(
        f"  prefix_tuning: {settings.num_virtual_tokens} keys and values in each of "
        f"{' + '.join(str(shape.layers) for shape in shapes)} layers: "
        f"{prefixes.closed_form(settings, shapes):,} numbers learn, {kept:,} stay"
    )
    trainer, figures = adaptation.learn(task, task.base, config.training, config.evaluation, run, config.run)

    names = prompt_encoder.settle(task.base)
    told = {"tokens": settings.num_virtual_tokens}
    figures["adapter_bytes"] = adaptation.save(task, trainer, task.base, run, "prefix_tuning", told, names)
    if task.type == "CAUSAL_LM" and run.is_main:
        prefixes.export_for_peft(task.base, settings, run.path / "adapter" / "peft")
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
