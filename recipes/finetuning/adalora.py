"""AdaLoRA: LoRA that spends a budget of rank where it matters, by pruning singular values while it learns.

    W' = W + (alpha / r) P L Q        P [out, r], L diagonal, Q [r, in]: an SVD by construction                 eq. (3)
    loss + g (|P^T P - I|^2 + |Q Q^T - I|^2)             keeps P and Q orthogonal; peft's norms have no square  eq. (4)
    S_i = s(l_i) + mean_j s(P_ji) + mean_j s(Q_ij)       importance of the triplet i, of one matrix             eq. (7)
    s   = (smoothed |w dL/dw|) x (its smoothed deviation)      sensitivity x uncertainty                 eq. (9)-(11)
    budget: r_0 a matrix, for tinit steps; then down along a cubic; target_r on average for the last tfinal steps  eq. (12)

Every deltaT steps the triplets with the largest S of the whole model are kept, and the singular values of the others set
to zero; until the last tfinal steps they may learn their way back. peft has the parts, but neither it nor transformers
calls them, and TRL makes its loss of the tokens' log-probabilities, without eq. (4): with neither of the two functions
below AdaLoRA is a plain LoRA. Merged like LoRA: nothing is added at inference.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512

    make adalora                                       # laptop, offline, minutes, from what `make llama` made
    make adalora CONFIG=gpu                            # one GPU, a public model and instruction set
    make adalora CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves adapter/ (the triplets that were kept) and model/ (merged). Laptop result: RESULTS.md#adalora.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder, write_atomically
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import trl
    from torch import Tensor
    from transformers import Trainer

UNSET = 10**9  # peft wants a number of steps before there is a Trainer to know it


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    adalora: Section[peft.AdaLoraConfig] = field(default_factory=defaults(task_type="CAUSAL_LM", total_step=UNSET))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def closed_form(model: Any) -> int:
    """What learns at the start: r_0 (in + out + 1) numbers for each matrix."""
    from peft.tuners.adalora import SVDLinear

    layers: list[Any] = [module for module in model.modules() if isinstance(module, SVDLinear)]
    return sum(layer.r["default"] * (layer.in_features + layer.out_features + 1) for layer in layers)


def ranks(model: Any) -> dict[str, int]:
    """Singular values that are not zero, by matrix."""
    return {
        re.sub(r"^base_model\.model\.|\.lora_E\..*$", "", name): int((parameter != 0).sum())
        for name, parameter in model.named_parameters()
        if ".lora_E." in name
    }


def unorthogonal(model: Any) -> Tensor:
    """The mean, over P and Q of all matrices, of |P^T P - I| in Frobenius' norm: what eq. (4) adds to the loss, as in peft."""
    import torch

    distances = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            across = parameter if ".lora_A." in name else parameter.T  # [r, in] or [r, out]
            with torch.autocast(parameter.device.type, enabled=False):
                products = across @ across.T
            distances.append((products - torch.eye(len(products), device=products.device)).norm())
    return torch.stack(distances).mean()


def keep_orthogonal(trainer: Trainer, model: Any, weight: float) -> None:
    """Add eq. (4)'s term to the loss of a TRL trainer, which does not take the model's own."""
    compute: Callable[..., Any] = trainer.compute_loss

    def compute_loss(learner: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        found = compute(learner, inputs, return_outputs, num_items_in_batch)
        if not learner.training:
            return found
        # given the number of tokens, a micro-batch's loss is its part of the step's; else the Trainer divides
        parts = trainer.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        term = weight * unorthogonal(model) / parts
        return (found[0] + term, found[1]) if return_outputs else found + term

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]


def allocate_as_it_learns(trainer: Trainer, model: Any, run: RunFolder) -> None:
    """Prune after every optimizer step, while the gradients are there; the importances are part of a checkpoint."""
    from transformers import TrainerCallback

    from recipes.common.training import total_steps

    settings, allocator = model.peft_config["default"], model.base_model.rankallocator
    steps = total_steps(trainer)
    if settings.total_step not in (UNSET, steps):
        raise UserError(f"adalora.total_step: {settings.total_step}, but the run takes {steps} steps: leave it out")
    if settings.tinit >= steps - settings.tfinal:
        raise UserError(
            f"adalora: tinit {settings.tinit} and tfinal {settings.tfinal} leave none of the {steps} steps to prune in: "
            "lower them"
        )
    allocator.set_total_step(steps)

    class Allocate(TrainerCallback):
        # which triplets live; kept from peft, which would save a checkpoint without the others
        pattern: Pattern | None = None
        logged = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if run.resume_from is not None:
                self.pattern = restore(model, run.resume_from)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step + 1
            settings.rank_pattern = self.pattern
            model.base_model.update_and_allocate(step)
            self.pattern, settings.rank_pattern = settings.rank_pattern, None
            budget, pruned = allocator.budget_schedule(step)
            # between two prunings the others learn again, and count for nothing
            if (pruned or step <= settings.tinit) and step - self.logged >= steps // 100:
                self.logged = step
                run.log(step, rank_budget=budget, rank=sum(ranks(model).values()))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if run.is_main:
                store(model, self.pattern, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer.add_callback(Allocate())


Pattern = dict[str, list[bool]]  # of each matrix's triplets, which live
EMAS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # peft's names for |w dL/dw| as it was last, its mean and its deviation


def store(model: Any, pattern: Pattern | None, folder: Path) -> None:
    """Importances and ranks beside a checkpoint's weights: without them a resumed run would prune other triplets."""
    from safetensors.torch import save

    allocator = model.base_model.rankallocator
    tensors = {f"{ema}/{name}": value.contiguous() for ema in EMAS for name, value in getattr(allocator, ema).items()}
    write_atomically(folder / "importance.safetensors", save(tensors))
    write_atomically(folder / "rank_pattern.json", json.dumps(pattern) + "\n")


def restore(model: Any, folder: Path) -> Pattern | None:
    """Puts back what `store` kept, and gives the pattern."""
    from safetensors.torch import load_file

    allocator = model.base_model.rankallocator
    allocator.reset_ipt()
    device = next(model.parameters()).device
    for key, value in load_file(folder / "importance.safetensors").items():
        ema, name = key.split("/", 1)
        getattr(allocator, ema)[name] = value.to(device)
    pattern: Pattern | None = json.loads((folder / "rank_pattern.json").read_text())
    return pattern


def prune(model: Any) -> None:
    """Let peft leave the triplets whose singular value is zero out of what it saves."""
    singular = {name: p for name, p in model.base_model.model.named_parameters() if ".lora_E." in name}
    model.peft_config["default"].rank_pattern = {name: (p != 0).flatten().tolist() for name, p in singular.items()}


def draw(run: RunFolder, kept: dict[str, int], most: int) -> None:
    """The rank that each matrix was left with: one row a kind of matrix, one column a layer."""
    places = {name: re.search(r"\.(\d+)\.", name) for name in kept}
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in kept))
    layers = sorted({int(found[1]) for found in places.values() if found})
    cells = [[float("nan")] * len(layers) for _ in kinds]
    for name, rank in kept.items():
        if found := places[name]:
            cells[kinds.index(name.rsplit(".", 1)[-1])][layers.index(int(found[1]))] = rank

    def heat(axes: Any) -> None:
        image = axes.imshow(cells, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        axes.figure.colorbar(image, label=f"rank kept, of {most}")
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                if value == value:
                    shade = "white" if value < most / 2 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade)

    run.plot("rank_by_layer", heat)
    run.plot_curve("rank", "rank", goal="rank_budget", label="sum of the ranks")


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, adapter, train while pruning, merge, save both."""
    from recipes.common import adaptation, sharding
    from recipes.common.peft_models import check_low_rank, save_and_merge, with_adapter

    adalora = config.adalora
    task = adaptation.prepare(config.model, config.data, adalora.task_type, run)
    check_low_rank(task.base, adalora, run, "adalora", "init_r")
    if not 0 < adalora.target_r < adalora.init_r:
        raise UserError(
            f"adalora.target_r: {adalora.target_r} is not below adalora.init_r, {adalora.init_r}: nothing would be pruned"
        )
    adapted = with_adapter(task.base, adalora)
    run.say(
        f"  adalora: {len(ranks(adapted))} matrices, sum of r (in + out + 1) = {closed_form(adapted):,} at the start"
    )

    def ready(trainer: Any) -> None:
        if sharding.launched_with() is not None:
            raise UserError(
                f"adalora: the importances need the gradients at each step, which {sharding.launched_with()} keeps to "
                "itself: launch with ddp, or single"
            )
        if task.type == "CAUSAL_LM":
            keep_orthogonal(trainer, adapted, adalora.orth_reg_weight)
        allocate_as_it_learns(trainer, adapted, run)

    trainer, figures = adaptation.learn(task, adapted, config.training, config.evaluation, run, config.run, ready=ready)
    kept = ranks(adapted)
    figures |= {
        "rank_before": adalora.init_r * len(kept),
        "rank_after": sum(kept.values()),
        "rank_budget": adalora.target_r * len(kept),
        "matrices_without_rank": sum(rank == 0 for rank in kept.values()),
    }
    if run.is_main:
        draw(run, kept, adalora.init_r)
    prune(adapted)
    return figures | save_and_merge(task, trainer, adapted, run)


if __name__ == "__main__":
    run_recipe(main, Config)
