"""Full fine-tuning: teach a pretrained model to answer, or another task, with every weight free to move.

    loss = - 1/|A| sum_{t in A} log p(x_t | x_<t)      A: the assistant's tokens, each answer's stop token included

Only the assistant's words are learned; the questions are read, not imitated. Several conversations share a row of fixed
length, and none of them sees another (recipes/common/sft_packing.py).

Wei et al. 2021, https://arxiv.org/abs/2109.01652; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155

    make full                                       # laptop, offline, 2 to 4 minutes, from what `make llama` made
    make full CONFIG=gpu                            # one GPU, a public model and instruction set
    make full CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Laptop result: RESULTS.md#full. The model goes on in `make reward_model` and `make ppo`; `make chat` talks to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.adaptation import TaskType
from recipes.common.config import Section, defaults
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, Run

if TYPE_CHECKING:
    import trl

    from recipes.common.adaptation import Task


@dataclass
class Full:
    """Knobs of the fine-tuning itself."""

    task_type: TaskType = "CAUSAL_LM"  # what the rows are, and the model's head
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, as a small model was pretrained
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices; training.learning_rate is that of the rest


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    full: Full = field(default_factory=Full)
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def prepare(config: Config, run: RunFolder) -> Task:
    """Model, rows and their tokenizer. Only a conversation can be learned by a fresh model: nothing of it is frozen."""
    from recipes.common import adaptation
    from recipes.common.data import load_data
    from recipes.common.models import load_model, load_tokenizer

    if config.full.task_type != "CAUSAL_LM":
        return adaptation.prepare(config.model, config.data, config.full.task_type, run)
    tokenizer = load_tokenizer(config.model, run, chat=True)
    model = load_model(config.model, tokenizer, run)
    conversations = load_data(config.data, "conversation")
    return adaptation.Task(
        "CAUSAL_LM", tokenizer, model, conversations, fingerprint=""
    )  # no adapter will name its base


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Model and task; measure, train, measure again, save."""
    from recipes.common import adaptation, sft
    from recipes.common.optimizers import check_muon, muon_with_adamw

    def with_muon(trainer: Any) -> None:
        trainer.optimizer = muon_with_adamw(trainer.model, config.training, config.full.muon_learning_rate)

    muon = config.full.optimizer == "muon"
    if muon:
        check_muon(config.training)
    task = prepare(config, run)
    ready = with_muon if muon else None
    trainer, figures = adaptation.learn(
        task, task.base, config.training, config.evaluation, run, config.run, ready=ready
    )
    sft.save(trainer, task.tokenizer, run)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
