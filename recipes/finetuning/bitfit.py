"""BitFit: fine-tune the biases, freeze everything else.

    h = W x + b        W frozen, b learned: about 0.1 % of the parameters, nothing added at inference

`subset: query_and_mlp` learns two biases a layer, the paper's b_q and b_m2 (section 3.3), and does nearly as well.
A model without biases (LLaMA) can be given zero ones, which change nothing until they learn (`add_biases`).

Ben Zaken, Goldberg, Ravfogel 2021, https://arxiv.org/abs/2106.10199

    make bitfit                                       # laptop, offline, 2 minutes, from what `make llama` made
    make bitfit CONFIG=gpu                            # one GPU: the paper's BERT-large on GLUE
    make bitfit CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Leaves adapter/ (the biases alone) and model/ (a model like any other). Laptop result: RESULTS.md#bitfit.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.adaptation import TaskType
from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import trl
    from transformers import PreTrainedModel

# Where the two biases of the paper's section 3.3 are, in the names of transformers.
QUERY = ("query", "query_proj", "q_proj", "q_lin")  # b_q
MLP = (  # b_m2: into the wide inner layer
    "intermediate.dense", "dense_h_to_4h", "fc1", "lin1", "c_fc", ".ffn", "up_proj", "gate_proj",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias")  # fields of a config that give its model biases


@dataclass
class BitFit:
    """Which biases learn."""

    task_type: TaskType = "CAUSAL_LM"  # what the rows are, and the model's head
    subset: Literal["all", "query_and_mlp"] = "all"  # the paper's section 3.3: half the biases do nearly as well
    add_biases: bool = False  # give a model without biases zero ones, where its class knows them


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    bitfit: BitFit
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def biases_of(model: PreTrainedModel, subset: str = "all") -> set[str]:
    """The names of the biases to learn. Raises UserError where the model lacks them: a task's head brings its own, and learns anyway."""
    from recipes.common.adaptation import head_names

    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    named = type(model).__name__
    if not every - head_names(model):
        instead = (
            "bitfit.add_biases: true gives it zero ones"
            if missing_biases(model)
            else f"{type(model.config).__name__} has no switch for any ({', '.join(SWITCHES)}), so they could not be "
            "saved with it: take another method (lora, ia3, adapter)"
        )
        raise UserError(f"bitfit: {named} has no biases to learn; {instead}")
    if subset == "all":
        return every
    query, mlp = ({b for b in every if b.removesuffix(".bias").endswith(ends)} for ends in (QUERY, MLP))
    if lacking := [what for what, found in (("queries", query), ("MLP's first layer", mlp)) if not found]:
        raise UserError(
            f"bitfit.subset: query_and_mlp, but {named} has no bias of the {' or the '.join(lacking)} alone; "
            f"subset: all learns the {len(every)} that it has"
        )
    return query | mlp


def missing_biases(model: PreTrainedModel) -> set[str]:
    """Names of the biases that the model's own class would have with the SWITCHES of its config on."""
    import torch

    config = copy.deepcopy(model.config)
    for switch in SWITCHES:
        if hasattr(config, switch):
            setattr(config, switch, True)
    with torch.device("meta"):
        twin = type(model)(config)
    names = {name for name, _ in model.named_parameters()}
    return {name for name, _ in twin.named_parameters() if name.endswith(".bias") and name not in names}


def put_in(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """Add the zero biases, where asked, and say so in the config, so that the saved model loads as what it is."""
    import torch

    if not settings["add_biases"]:
        return model
    missing = missing_biases(model)
    if not missing:
        own = sum(name.endswith("bias") for name, _ in model.named_parameters())
        if own:
            raise UserError(f"bitfit.add_biases: {type(model).__name__} has {own} biases of its own: leave it out")
        raise UserError(
            f"bitfit.add_biases: {type(model).__name__} has no linear layer that could be given a bias: its config "
            f"has no switch for more of them ({', '.join(SWITCHES)}), so they could not be saved with it"
        )
    for name in missing:
        layer: Any = model.get_submodule(name.removesuffix(".bias"))
        layer.bias = torch.nn.Parameter(layer.weight.new_zeros(layer.out_features))  # [out]
    for switch in SWITCHES:
        if hasattr(model.config, switch):
            setattr(model.config, switch, True)
    return model


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, freeze all but the biases and the head, train, save the biases and the model."""
    from recipes.common import adaptation, sft

    settings = asdict(config.bitfit)
    task = adaptation.prepare(config.model, config.data, config.bitfit.task_type, run)
    model = put_in(task.base, settings)
    biases, head = biases_of(model, config.bitfit.subset), adaptation.head_names(model)
    learned = adaptation.freeze(model, biases | head)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters() if parameter.requires_grad):
        raise UserError(
            "model.dtype: a bias learned in 16 bits rounds small steps away; set it to float32: with training.bf16 the "
            "products are in bf16 all the same"
        )
    of_head = f" and a head of {len(head)}" if head else ""
    run.say(f"  bitfit: {len(biases)} biases ({config.bitfit.subset}){of_head}, {learned:,} numbers learn")
    trainer, figures = adaptation.learn(task, model, config.training, config.evaluation, run, config.run)

    figures["adapter_bytes"] = adaptation.save(task, trainer, model, run, "bitfit", settings)
    sft.save(trainer, task.tokenizer, run)  # the plain model: nothing was added to it but, where asked, biases
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
