"""Adapters: freeze the model, and learn small bottleneck networks between the parts of its layers.

    A(x) = W_up f(W_down x + b_down) + b_up        W_down [m, d] random, W_up [d, m] zero: it starts as it was
    houlsby    h <- h + A(h)                       after attention and after the feed-forward, before the residual's sum
    pfeiffer   h <- h + A(h)                       after the feed-forward alone
    parallel   FFN(x) <- FFN(x) + s A(x)           beside the feed-forward
    learned    2 m d + m + d numbers an adapter; the layers compute them at inference too, since f lets nothing be merged

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751 (they let the layer norms learn too; here the base stays as it is);
Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247; He et al. 2022, https://arxiv.org/abs/2110.04366

    make adapter                                       # laptop, offline, 2 minutes, from what `make llama` made
    make adapter CONFIG=gpu                            # one GPU, a public model and instruction set
    make adapter CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves adapter/: `adapter_files.load_adapter(base, folder)` puts it back. Laptop result: RESULTS.md#adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.common.bottleneck import Adapter
from recipes.common.config import Section, defaults
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import trl


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    adapter: Adapter
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, adapters, train, save the adapters."""
    from recipes.common import adaptation, bottleneck

    task = adaptation.prepare(config.model, config.data, config.adapter.task_type, run)
    model, size = task.base, bottleneck.size_of(task.base, config.adapter)
    adapters = bottleneck.put_in(model, config.adapter)
    adaptation.freeze(model, bottleneck.adapter_names(model) | adaptation.head_names(model))
    each = bottleneck.closed_form(model.config.hidden_size, size)
    run.say(f"  adapter: {adapters} of kind {config.adapter.kind}, {size} wide, {each:,} numbers each")
    trainer, figures = adaptation.learn(task, model, config.training, config.evaluation, run, config.run)

    figures["adapter_bytes"] = adaptation.save(task, trainer, model, run, "adapter", asdict(config.adapter))
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
