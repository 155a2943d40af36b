"""AdapterFusion: train one adapter a task, freeze them all, and learn from few rows of a target which of them to listen to.

    stage 1    A_1 ... A_N     one bottleneck adapter a source task, and one on the target's few rows, each trained apart
    stage 2    s = softmax_n((Q h) . (K A_n(h)))        h <- h + sum_n s_n V A_n(h)        at each place of an adapter
               learned: Q, K, V [d, d] alone, 3 d^2 numbers a place; V = I, Q = 0 at first: the mean of the adapters

At inference all N adapters are computed at each place, and the attention over them: nothing merges.

The adapters are never mixed while they learn, so no task can undo another's; what is shared is found afterwards. Every task
is text here, for decoders and encoder-decoders: the paper's classifiers bring a head each, which no other task could use.
Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247

    make adapter_fusion                                       # laptop, offline, minutes, from what `make llama` made
    make adapter_fusion CONFIG=gpu                            # one GPU, public translations
    make adapter_fusion CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves stages/<task>/adapter, each as `make adapter` would, and adapter/ with all of them and the attention:
`adapter_files.load_adapter(base, folder)` puts either back. Laptop result: RESULTS.md#adapter_fusion.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from recipes.common.bottleneck import Adapter
from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import trl
    from datasets import DatasetDict
    from matplotlib.axes import Axes
    from torch import Tensor
    from transformers import PreTrainedModel

    from recipes.common.adaptation import Task
    from recipes.common.modeling_bottleneck import Fusion as FusionModule
    from recipes.common.sft import Measured

Numbers = dict[str, "Tensor"]  # of one adapter, by the names that they have in the model


@dataclass
class Fusion:
    """Which adapters are fused, and for what."""

    sources: list[str] | dict[str, str | list[str]] = field(
        default_factory=list
    )  # values of the rows' column `task`; or adapter -> its own data
    adapters: dict[str, str] = field(default_factory=dict)  # adapters that `make adapter` trained: name -> folder
    target: str | None = None  # the value of the column `task` that is the target; default: all rows of data
    target_samples: PositiveInt = 200  # training rows of the target, for its own adapter and for the fusion
    steps: PositiveInt = 300  # of each adapter
    learning_rate: PositiveFloat = 1e-3  # of the adapters; the fusion's is training.learning_rate


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    adapter: Adapter
    fusion: Fusion
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


# ------------------------------------------------------------------------------------------------------------ the rows


def choose_rows(task: Task, config: Config) -> tuple[dict[str, DatasetDict], DatasetDict]:
    """The rows of each source, and the target's, cut to fusion.target_samples."""
    from recipes.common import adaptation
    from recipes.common.data import load_data
    from recipes.common.stages import rows_where

    fusion = config.fusion
    if len(fusion.sources) + len(fusion.adapters) < 1:
        raise UserError("fusion.sources: name at least one task to train an adapter on (or one of fusion.adapters)")
    if isinstance(fusion.sources, dict):
        kind = adaptation.KINDS[task.type]
        plain = replace(config.data, columns=None, subset=None, validation_split=None)
        sources: Any = {n: load_data(replace(plain, name=data), kind) for n, data in fusion.sources.items()}
    else:
        sources = {name: rows_where(task.data, "task", name, "fusion.sources") for name in fusion.sources}
    if fusion.target in (names := {*sources, *fusion.adapters}):
        raise UserError(
            f"fusion.target: {fusion.target!r} is among the sources, so it would not be learned from few rows"
        )
    if "target" in names or len(names) < len(fusion.sources) + len(fusion.adapters):
        raise UserError("fusion: each adapter needs a name of its own, other than `target`")
    target = task.data if fusion.target is None else rows_where(task.data, "task", fusion.target, "fusion.target")
    target = copy.copy(target)
    target["train"] = target["train"].select(range(min(len(target["train"]), fusion.target_samples)))
    return sources, target


# ------------------------------------------------------------------------------------------------- stage 1: adapters


def reset(model: PreTrainedModel, seed: int) -> None:
    """Fresh adapters in the place of what was learned."""
    import torch

    from recipes.common.modeling_bottleneck import Bottleneck

    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.start()


def train_adapter(task: Task, rows: DatasetDict, name: str, config: Config, run: RunFolder) -> Numbers:
    """Train the model's one adapter on the rows, afresh, in a run folder of its own."""
    from recipes.common.stages import train_stage

    reset(task.base, config.training.seed)
    return train_stage(
        name, task, rows, task.base, config.training, run, config.run,
        method="adapter", told=asdict(config.adapter),
        max_steps=config.fusion.steps, learning_rate=config.fusion.learning_rate,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- stage 2: fusion


def fuse(model: PreTrainedModel, count: int) -> list[str]:
    """In the place of each adapter, `count` copies of it under a fresh attention; gives the places' names."""
    from recipes.common.modeling_bottleneck import Bottleneck, Fusion

    places = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    for place in places:
        one: Any = model.get_submodule(place)
        fused = Fusion([copy.deepcopy(one) for _ in range(count)])
        model.set_submodule(place, fused.to(one.up.weight.device, one.up.weight.dtype))
    return places


def fill(model: PreTrainedModel, places: list[str], adapters: list[Numbers]) -> None:
    """Give each copy its adapter's numbers. Raises UserError where the adapters have different shapes."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in numbers.items()} for numbers in adapters]
    for other in shapes[1:]:
        if odd := sorted(set(other.items()) ^ set(shapes[0].items())):
            raise UserError(
                f"only adapters of the same shape can be fused: {odd[0][0]} is {odd[0][1]} in one of them alone"
            )
    for place in places:
        fused: Any = model.get_submodule(place)
        for adapter, numbers in zip(fused.adapters, adapters, strict=True):
            own = {n.removeprefix(f"{place}."): tensor for n, tensor in numbers.items() if n.startswith(f"{place}.")}
            adapter.load_state_dict(own)


def attention_names(model: PreTrainedModel) -> set[str]:
    """The parameters that stage 2 learns: Q, K and V."""
    from recipes.common.bottleneck import adapter_names

    return {name for name in adapter_names(model) if name.rsplit(".", 2)[-2] in ("query", "key", "value")}


def put_back(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """As adapter_files.load_adapter calls it: the places, ready for the saved numbers."""
    from recipes.common import bottleneck

    bottleneck.put_in(model, Adapter(**settings["adapter"]))
    fuse(model, len(settings["names"]))
    return model


def attention_weights(trainer: Any, places: list[str], batches: int = 8) -> Tensor:
    """The mean weight s_n at each place over held-out tokens, (places, adapters); of a decoder, the learned tokens."""
    import torch

    from recipes.common.generation import inference

    parts: list[FusionModule] = [trainer.model.get_submodule(place) for place in places]
    sums = torch.zeros(len(places), len(parts[0].adapters), dtype=torch.float64)
    with inference(trainer.model, bf16=trainer.args.bf16):
        for _, batch in zip(range(batches), trainer.get_eval_dataloader(), strict=False):
            for part in parts:
                part.weights = []
            learned = batch["labels"].cpu() != -100
            trainer.model(**trainer._prepare_inputs({**batch, "use_cache": False}))
            for i, part in enumerate(parts):
                weights = torch.cat(part.weights or [])  # (batch, tokens, adapters)
                sums[i] += (weights[learned] if weights.shape[:-1] == learned.shape else weights.flatten(0, -2)).sum(0)
                part.weights = None
    return sums / sums.sum(-1, keepdim=True)


def draw_weights(axes: Axes, weights: Tensor, places: list[str], names: list[str]) -> None:
    """A heat map: a row a place, a column an adapter."""
    shown = axes.imshow(weights.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(places)), [_short(place) for place in places])
    for i, row in enumerate(weights.tolist()):
        for n, value in enumerate(row):
            light = value < 0.6 * float(weights.max())
            axes.text(n, i, f"{value:.2f}", ha="center", va="center", color="w" if light else "k", fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("adapter")
    axes.figure.colorbar(shown, ax=axes, label="mean attention, held-out tokens of the target")


def _short(place: str) -> str:
    """model.layers.3.feed_forward_adapter -> layer 3; encoder.block.0.attention_adapter -> encoder 0, attention."""
    words = place.split(".")
    side = next((word for word in words if word in ("encoder", "decoder")), "layer")
    number = next(word for word in words if word.isdigit())
    return f"{side} {number}" + (", attention" if words[-1].startswith("attention") else "")


def compare(base: Measured, singles: dict[str, Measured], fused: Measured, own: str) -> dict[str, float]:
    """Flat figures of the target's held-out rows: the mean single source, the best, the target's own adapter, the fusion."""
    sources = [measured for name, measured in singles.items() if name != own]
    figures: dict[str, float] = {}
    for key, of in {"loss": lambda m: m.loss, "exact_match": lambda m: m.figures.get("exact_match")}.items():
        if of(base) is None:
            continue
        values = [of(measured) for measured in sources]
        figures[f"mean_single_{key}"] = round(sum(values) / len(values), 4)
        figures[f"best_single_{key}"] = min(values) if key == "loss" else max(values)
        figures[f"target_alone_{key}"] = of(singles[own])
    return figures


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Stage 1: an adapter a task. Each measured on the target. Stage 2: the attention over them, trained on the target."""
    from recipes.common import adaptation, bottleneck
    from recipes.common.stages import refuse_shards
    from recipes.common.training import fit

    refuse_shards()
    if config.adapter.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        raise UserError(
            f"adapter.task_type: {config.adapter.task_type}, but each task would bring classes and a head of its own: give "
            "the classes as text (CAUSAL_LM, SEQ_2_SEQ_LM)"
        )
    task = adaptation.prepare(config.model, config.data, config.adapter.task_type, run)
    model, own = task.base, config.fusion.target or "target"
    sources, rows = choose_rows(task, config)
    known = {
        name: bottleneck.read_adapter(model, folder, config.adapter, f"fusion.adapters.{name}")
        for name, folder in config.fusion.adapters.items()
    }
    bottleneck.put_in(model, config.adapter)
    adaptation.freeze(model, bottleneck.adapter_names(model))
    stages = {**sources, own: rows}
    adapters = known | {name: train_adapter(task, some, name, config, run) for name, some in stages.items()}

    target = replace(task, data=rows)
    trainer = adaptation.make_trainer(target, model, config.training, run)
    reset(model, config.training.seed)
    base = adaptation.measure(target, trainer, config.evaluation, run, "base")
    singles = {}
    for name, numbers in adapters.items():
        model.load_state_dict(numbers, strict=False)
        singles[name] = adaptation.measure(target, trainer, config.evaluation, run, f"adapter {name}")

    reset(model, config.training.seed)
    places = fuse(model, len(adapters))
    fill(model, places, list(adapters.values()))
    learned = adaptation.freeze(model, attention_names(model))
    run.say(f"  fusion: {len(adapters)} adapters at {len(places)} places, 3 d^2 each = {learned:,} numbers learn")
    adaptation.announce(target, trainer, run)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    fused = adaptation.measure(target, trainer, config.evaluation, run, "fused")

    figures = adaptation.report(target, run, base, fused) | compare(base, singles, fused, own)
    weights = attention_weights(trainer, places)
    run.plot("fusion_weights", lambda axes: draw_weights(axes, weights, places, list(adapters)))
    figures |= {f"weight_{name}": round(weights[:, i].mean().item(), 4) for i, name in enumerate(adapters)}
    settings = {"adapter": asdict(config.adapter), "names": list(adapters)}
    names = bottleneck.adapter_names(model)  # the frozen adapters too
    figures["adapter_bytes"] = adaptation.save(target, trainer, model, run, "adapter_fusion", settings, names)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
