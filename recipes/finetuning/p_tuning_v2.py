"""P-tuning v2: deep prompts, learned keys and values in every layer, for classification and sequence labelling.

    layer l      softmax(Q [P_K^l ; K]^T / sqrt(d)) [P_V^l ; V]          P_K, P_V [tokens, width] learned, no MLP before them
    head         a linear layer on the row's vector (SEQ_CLS) or on each word's (TOKEN_CLS), instead of words to be filled in
    learned      2 x layers x tokens x width numbers and the head, 0.1 % to 3 % of the model

The same place as prefix_tuning's, and what the paper found to matter for understanding: prompts in all layers, a plain
head, short prompts (under 20) for simple tasks and long ones (about 100) for sequence labelling, and that the
reparameterisation often does not help (`p_tuning_v2.prefix_projection`). At inference each token attends to `tokens` more
keys in every layer; nothing merges.

Liu et al. 2022, https://arxiv.org/abs/2110.07602

    make p_tuning_v2                                    # laptop, offline, 3 minutes: the kinds of words in Python code
    make p_tuning_v2 CONFIG=classify                    # laptop: which package a docstring is from
    make p_tuning_v2 CONFIG=real                        # laptop: CLINC150's intents, on what `make bert CONFIG=real` made
    make p_tuning_v2 CONFIG=gpu                         # one GPU: BERT-large tags names in Wikipedia
    make p_tuning_v2 CONFIG=cluster LAUNCH=ddp NPROC=8  # a node; scripts/ has SLURM

Leaves adapter/ (the keys and values, and the head). Laptop result: RESULTS.md#p_tuning_v2.
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
    p_tuning_v2: Section[peft.PrefixTuningConfig] = field(
        default_factory=defaults(task_type="TOKEN_CLS", num_virtual_tokens=20)
    )
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=False))
    evaluation: Evaluation
    run: Run


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, a prompt in every layer and a head, train both, save both."""
    from recipes.common import adaptation, prefixes, prompt_encoder

    settings = config.p_tuning_v2
    task = adaptation.prepare(config.model, config.data, settings.task_type, run)
    packed = config.training.packing and task.type == "CAUSAL_LM"
    prefixes.check(task.base, settings, config.training, "p_tuning_v2", packed)

    prefixes.put_in(task.base, settings)
    learned = adaptation.freeze(task.base, prompt_encoder.learned_names(task.base))
    prompts = prefixes.closed_form(settings, prefixes.shapes_of(task.base))
    run.say(
        f"  p_tuning_v2: {settings.num_virtual_tokens} keys and values in every layer: {prompts:,} numbers learn, and "
        f"{learned - prompts:,} of the head"
    )
    trainer, figures = adaptation.learn(task, task.base, config.training, config.evaluation, run, config.run)

    names = prompt_encoder.settle(task.base)
    told = {"tokens": settings.num_virtual_tokens}
    figures["adapter_bytes"] = adaptation.save(task, trainer, task.base, run, "p_tuning_v2", told, names)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
