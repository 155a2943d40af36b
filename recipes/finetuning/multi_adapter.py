"""Several adapters on one base: load them all, switch between them, add them up with weights, and serve them.

    switch    h = W x + s_i B_i A_i x        i is the row's own: one base in memory, rows of several tasks in one batch
    add up    W' = W + sum_i w_i s_i B_i A_i        s = alpha / r; task arithmetic on the adapters' changes of W
    cat       A = [w_1 s_1 A_1; ...; w_N s_N A_N], B = [B_1, ..., B_N]        the sum itself, of rank r_1 + ... + r_N
    svd       the best approximation of the sum that has one adapter's rank
    ties_svd  of each change the largest numbers alone, of those the sign that outweighs, then svd
    linear    A = sum_i sqrt(w_i s_i) A_i, B likewise: B A has the products B_i A_j of different adapters in it, too

IA3's factors are averaged by their weights instead (`linear`). Ilharco et al. 2022, https://arxiv.org/abs/2212.04089 (task
arithmetic); Yadav et al. 2023, https://arxiv.org/abs/2306.01708 (TIES).

    make multi_adapter                                       # laptop, offline, minutes, from what `make llama` made
    make multi_adapter CONFIG=gpu                            # one GPU, a public model and data sets
    make multi_adapter CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

`multi.adapters` takes adapters that `make lora` (or ia3, or qlora) left; what has none yet is trained first, one after the
other. Each adapter, and each sum, answers the held-out rows of all tasks. Leaves stages/<task>/adapter and adapters/<sum>,
all of them in peft's format. To serve them with vLLM (LoRA only), each under its name beside the base:

    vllm serve BASE --enable-lora --max-loras 3 --max-lora-rank 16 --lora-modules sort=FOLDER reverse=FOLDER
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sort", "messages": [{"role": "user", "content": "..."}]}'

and in Python `LLM(BASE, enable_lora=True).chat(messages, lora_request=LoRARequest("sort", 1, FOLDER))`. The model card of
the run has the command with its own folders. Laptop result: RESULTS.md#multi_adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section, defaults
from recipes.common.errors import DryRunDone, UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder, wait_for_everyone, write_atomically
from recipes.common.sections import Data, Evaluation, Model, OpenUnitInterval, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import peft
    import torch
    import trl
    from datasets import DatasetDict
    from matplotlib.axes import Axes
    from peft import PeftModel
    from transformers import PreTrainedModel

    from recipes.common.adaptation import Task
    from recipes.common.sft import Measured

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


@dataclass
class MultiAdapter:
    """Which adapters, and how they are added up."""

    # values of the rows' column `task`; or task -> its own data. An adapter each.
    sources: list[str] | dict[str, str | list[str]] = field(default_factory=list)
    adapters: dict[str, str] = field(
        default_factory=dict
    )  # of those, the ones that are trained already: task -> folder
    merges: list[Literal["cat", "svd", "ties_svd", "linear"]] = field(
        default_factory=lambda: ["cat", "svd", "ties_svd", "linear"]
    )  # each leaves an adapter
    weights: dict[str, float] = field(default_factory=dict)  # task -> w_i of the sums; default: 1
    density: OpenUnitInterval = 0.5  # ties_svd: the share of a change's numbers that stays
    steps: PositiveInt = 300  # of each adapter that is trained
    learning_rate: PositiveFloat = 1e-3  # of those


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    multi: MultiAdapter
    lora: Section[peft.LoraConfig] = field(default_factory=defaults(task_type="CAUSAL_LM"))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


# ------------------------------------------------------------------------------------------------- rows and adapters


def choose_rows(task: Task, config: Config) -> dict[str, DatasetDict]:
    """The rows of each task. Raises UserError for names that do not fit together."""
    from recipes.common import adaptation
    from recipes.common.data import load_data
    from recipes.common.stages import rows_where

    multi, names = config.multi, list(config.multi.sources)
    if len(set(names)) < 2:
        raise UserError("multi.sources: name at least two tasks, each once: there is nothing to switch between")
    for key, given in (("adapters", multi.adapters), ("weights", multi.weights)):
        if strange := sorted(given.keys() - set(names)):
            raise UserError(f"multi.{key}: {strange[0]} is none of multi.sources ({', '.join(names)})")
    for name in names:
        if name in ("base", *multi.merges) or name in "lora_" or name in "ia3_" or "." in name:  # parts of peft's names
            raise UserError(f"multi.sources: {name!r} cannot be an adapter's name here: give the task another one")
    if isinstance(multi.sources, dict):
        kind = adaptation.KINDS[task.type]
        plain = replace(config.data, columns=None, subset=None, validation_split=None)
        return {n: load_data(replace(plain, name=data), kind) for n, data in multi.sources.items()}  # type: ignore[misc]
    return {name: rows_where(task.data, "task", name, "multi.sources") for name in names}


def train_adapter(task: Task, rows: DatasetDict, name: str, config: Config, run: RunFolder) -> Path:
    """As `make lora` would, in a run folder of its own; gives the adapter's folder. The base is as before."""
    import torch

    from recipes.common.peft_models import with_adapter
    from recipes.common.stages import train_stage

    torch.manual_seed(config.training.seed)  # the same start, whatever was trained before
    adapted = with_adapter(task.base, config.lora)
    train_stage(
        name, task, rows, adapted, config.training, run, config.run, method="", told={},
        max_steps=config.multi.steps, learning_rate=config.multi.learning_rate,
    )  # fmt: skip
    adapted.unload()  # peft puts its modules into the base itself
    return run.path / "stages" / name / "adapter"


def check_adapters(base: PreTrainedModel, folders: dict[str, Path], multi: MultiAdapter) -> str:
    """What kind they all are, as peft calls it: LORA or IA3. Raises UserError for what cannot stand side by side."""
    from peft import PeftConfig

    from recipes.common.adapter_files import check_base

    kinds = {}
    for name, folder in folders.items():
        key = f"multi.adapters.{name}"
        if (folder / "adapter.json").exists():
            method = json.loads((folder / "adapter.json").read_text())["method"]
            raise UserError(
                f"{key}: {folder} is of {method}; here it is LoRA or IA3 (adapter_fusion fuses bottlenecks)"
            )
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"{key}: {folder} holds no adapter (no adapter_config.json)")
        check_base(base, folder)
        settings: Any = PeftConfig.from_pretrained(folder)
        kinds[name] = str(settings.peft_type.value)
        if kinds[name] not in ("LORA", "IA3"):
            raise UserError(f"{key}: {folder} is of {kinds[name]}; what can be switched and added up is LoRA and IA3")
        if multi.merges and (getattr(settings, "use_dora", False) or settings.modules_to_save):
            what = "DoRA's magnitudes" if getattr(settings, "use_dora", False) else "whole modules (modules_to_save)"
            raise UserError(f"{key}: {folder} has {what}, which do not add up: set multi.merges to []")
        if "linear" in multi.merges and kinds[name] == "LORA":
            first = PeftConfig.from_pretrained(next(iter(folders.values())))
            if settings.r != first.r:  # type: ignore[attr-defined]
                raise UserError(
                    f"{key}: its rank is {settings.r}, another's {first.r}: leave `linear` out of multi.merges"
                )  # type: ignore[attr-defined]
    if len(set(kinds.values())) > 1:
        raise UserError(f"multi.adapters: of different kinds ({kinds}): switch between LoRA alone, or IA3 alone")
    kind = next(iter(kinds.values()))
    if kind == "IA3" and set(multi.merges) - {"linear"}:
        raise UserError(
            "multi.merges: IA3's factors have no rank; the weighted mean of them is `linear`: leave the others out"
        )
    return kind


def load_all(base: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    """The base with all of the adapters in it, each under its name; the first is active."""
    from peft import PeftModel

    first, *others = folders
    model = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=name)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- switch


@contextmanager
def active(model: PeftModel, name: str) -> Iterator[None]:
    """Compute with this adapter; `base`: with none."""
    if name == "base":
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def logits_of(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Of the whole batch, in float32."""
    import torch

    asked = {name: batch[name] for name in batch.keys() - {"labels", "seq_lengths"}} | {"use_cache": False}
    if model.config.is_encoder_decoder:  # the decoder's input is made of them
        asked["labels"] = batch["labels"]
    model.eval()
    with torch.no_grad():
        return model(**asked, **options).logits.float()


def logits_alone(base: PreTrainedModel, folders: dict[str, Path], batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The logits of the base, and with each adapter as the only one that was ever loaded."""
    from peft import PeftModel

    found = {"base": logits_of(base, batch)}
    for name, folder in folders.items():
        alone = PeftModel.from_pretrained(base, folder)
        found[name] = logits_of(alone, batch)
        alone.unload()
    return found


def check_switching(model: PeftModel, alone: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """What being loaded together changes of any logit: one adapter for the batch, and for LoRA one for each row.

    Raises RuntimeError if switching is not exact, or if a row's own adapter in a mixed batch is off by more than rounding.
    """
    import torch

    switched = mixed = 0.0
    for name in [*alone, *reversed(alone)]:  # to each from before and from behind
        with active(model, name):
            switched = max(switched, (logits_of(model, batch) - alone[name]).abs().max().item())
    figures = {"switch_max_logit_difference": switched}
    largest = max(logits.abs().max().item() for logits in alone.values())
    if kind_of(model) == "LORA":  # peft takes a name a row of the others too, and pays no heed to it
        count = next(iter(alone.values())).shape[0]
        names = [list(alone)[i % len(alone)] for i in range(count)]
        asked = [{"base": "__base__"}.get(name, name) for name in names]  # peft's word for no adapter
        expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
        mixed = (logits_of(model, batch, adapter_names=asked) - expected).abs().max().item()
        figures["mixed_batch_max_logit_difference"] = mixed
    rounding = 1e-4 if model.dtype.itemsize == 4 else 5e-2
    if switched != 0 or not mixed <= rounding * max(1.0, largest):
        raise RuntimeError(
            f"adapters that are loaded together disturb each other: {switched:.3g}, {mixed:.3g} in a batch"
        )
    return figures


def kind_of(model: PeftModel) -> str:
    """LORA or IA3."""
    return str(next(iter(model.peft_config.values())).peft_type.value)


# ------------------------------------------------------------------------------------------------------------- add up


def add_up(model: PeftModel, names: list[str], method: str, multi: MultiAdapter) -> float:
    """Add the weighted sum to the model, as an adapter called as its method.

    Gives its error: |D - sum_i w_i D_i| / |sum_i w_i D_i| over all matrices, D being what is added to a weight. Zero for
    IA3, whose `linear` is the mean by definition. Raises RuntimeError where `cat` is not the sum.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    weights = [multi.weights.get(name, 1.0) for name in names]
    merge: Any = model.base_model.add_weighted_adapter
    if kind_of(model) == "IA3":
        total = sum(weights)
        merge(names, [weight / total for weight in weights], method)
        return 0.0
    with new_adapters_in_full_precision(model):
        merge(names, weights, method, combination_type=method, density=multi.density, svd_full_matrices=False)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and method in m.scaling]
    # peft gives the sum alpha = r, and for rank-stabilised LoRA (alpha / sqrt r) that would not be a scale of 1
    model.peft_config[method].use_rslora = False
    error = size = 0.0
    with torch.no_grad():
        for layer in layers:
            layer.scaling[method] = 1.0
            changes = [w * layer.get_delta_weight(n) for n, w in zip(names, weights, strict=True) if n in layer.scaling]
            asked = torch.stack(changes).sum(0)
            error += (layer.get_delta_weight(method) - asked).square().sum().item()
            size += asked.square().sum().item()
    relative = (error / size) ** 0.5 if size else 0.0
    if method == "cat" and relative > 1e-3:
        raise RuntimeError(f"`cat` is off the sum of the adapters by {relative:.1%}: it must not be saved as their sum")
    return relative


@contextmanager
def new_adapters_in_full_precision(model: PeftModel) -> Iterator[None]:
    """Within it, an adapter that peft adds beside others is kept in float32, as they are: add_weighted_adapter makes it in the
    base's type, and in bf16 a sum is off by 0.2 %."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    tuner: Any = model.base_model
    inject = tuner.inject_adapter

    def inject_in_full_precision(inner: Any, name: str, *given: Any, **options: Any) -> None:
        inject(inner, name, *given, **options)
        cast_adapter_dtype(inner, name)

    tuner.inject_adapter = inject_in_full_precision
    try:
        yield
    finally:
        del tuner.inject_adapter  # the class's own again


def save_sums(model: PeftModel, task: Task, methods: list[str], run: RunFolder) -> dict[str, Path]:
    """adapters/<method>, in peft's format, with the base's fingerprint; gives the folders."""
    from recipes.common import adaptation

    if run.is_main and methods:
        model.save_pretrained(str(run.path / "adapters"), selected_adapters=methods)
        told = adaptation.about_base(task)
        for method in methods:
            write_atomically(run.path / "adapters" / method / "base.json", json.dumps(told, indent=2) + "\n")
    wait_for_everyone()
    return {method: run.path / "adapters" / method for method in methods}


# -------------------------------------------------------------------------------------------------- measure and serve


Scores = dict[str, dict[str, "Measured"]]  # who answers -> whose rows -> how well


def measure_all(
    model: PeftModel, task: Task, rows: dict[str, DatasetDict], who: list[str], config: Config, run: RunFolder
) -> Scores:
    """Each of `who` on the held-out rows of each task."""
    import copy

    from recipes.common import adaptation

    scores: Scores = {name: {} for name in who}
    for asked, some in rows.items():
        part = replace(task, data=some)
        trainer = adaptation.make_trainer(part, model, copy.copy(config.training), run)
        for name in who:
            with active(model, name):
                scores[name][asked] = adaptation.measure(part, trainer, config.evaluation, run, f"{name} on {asked}")
    return scores


def figures_of(scores: Scores, tasks: list[str], sums: list[str]) -> dict[str, float]:
    """Means over the tasks: of the base, of each task's own adapter (switched), of an adapter on the others' rows, of the sums."""

    def mean(prefix: str, found: list[Measured]) -> dict[str, float]:
        values = {"loss": [one.loss for one in found]}
        if all("exact_match" in one.figures for one in found):
            values["exact_match"] = [one.figures["exact_match"] for one in found]
        return {f"{prefix}{name}": round(sum(all_) / len(all_), 4) for name, all_ in values.items()}

    own = mean("", [scores[name][name] for name in tasks])
    own["eval_loss"] = own.pop("loss")
    return {
        **own,
        **mean("baseline_", [scores["base"][name] for name in tasks]),
        **mean("others_", [scores[name][asked] for name in tasks for asked in tasks if asked != name]),
        **{key: value for name in sums for key, value in mean(f"{name}_", [*scores[name].values()]).items()},
    }


def draw_scores(axes: Axes, scores: Scores) -> None:
    """Who answers, by whose rows: exact match where all rows can be checked, else the held-out loss."""
    cells = [list(row.values()) for row in scores.values()]
    checked = all("exact_match" in one.figures for row in cells for one in row)
    values = [[one.figures["exact_match"] if checked else one.loss for one in row] for row in cells]
    image = axes.imshow(values, cmap="viridis" if checked else "viridis_r", aspect="auto", vmin=0 if checked else None)
    axes.figure.colorbar(image, label="answered exactly right" if checked else "held-out loss, nats a token")
    axes.set_xticks(range(len(cells[0])), list(next(iter(scores.values()))))
    axes.set_yticks(range(len(cells)), list(scores))
    axes.set_xlabel("held-out rows of")
    axes.set_ylabel("active adapter")
    axes.grid(False)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            shade = image.norm(value) if checked else 1 - image.norm(value)
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if shade < 0.6 else "black")


def serving(base: str, folders: dict[str, Path], ranks: list[int]) -> str:
    """The command that serves the adapters with vLLM, each under its name beside the base."""
    rank = next((r for r in SERVED_RANKS if r >= max(ranks)), None)
    if rank is None:
        return f"vLLM serves no adapter of rank {max(ranks)}: {SERVED_RANKS[-1]} is the most."
    modules = " ".join(f"{name}={folder}" for name, folder in folders.items())
    return (
        "Served with vLLM, each adapter under its name:\n\n"
        f"    vllm serve {base} --enable-lora --max-loras {len(folders)} --max-lora-rank {rank} --lora-modules {modules}"
    )


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Adapters one by one, all of them on the base, switched, added up; everybody on every task's rows."""
    from recipes.common import adaptation, sharding
    from recipes.common.peft_models import check_low_rank
    from recipes.common.stages import refuse_shards

    refuse_shards()
    multi, task_type = config.multi, config.lora.task_type
    if task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise UserError(f"lora.task_type: {task_type} would give each task a head of its own: give the classes as text")
    task = adaptation.prepare(config.model, config.data, task_type, run)
    check_low_rank(task.base, config.lora, run)
    rows = choose_rows(task, config)
    folders = {name: Path(folder) for name, folder in multi.adapters.items()}
    if folders:
        check_adapters(task.base, folders, multi)
    for name, some in rows.items():
        if name not in folders:
            folders[name] = train_adapter(task, some, name, config, run)
    folders = {name: folders[name] for name in rows}
    kind = check_adapters(task.base, folders, multi)
    if run.dry:
        run.say(f"dry run: {len(folders)} adapters of {kind} belong to this base; nothing was measured")
        raise DryRunDone

    trainer = adaptation.make_trainer(replace(task, data=rows[next(iter(rows))]), task.base, config.training, run)
    if sharding.sharded(trainer):
        raise UserError("multi_adapter: switching needs the whole model in each process; launch with ddp, or single")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    alone = logits_alone(task.base, folders, batch)
    model = load_all(task.base, folders)
    figures = check_switching(model, alone, batch)
    run.say(f"  {len(folders)} adapters of {kind}, switched: the logits of each as if it were alone")
    errors = {method: add_up(model, list(folders), method, multi) for method in multi.merges}
    figures |= {f"{method}_relative_error": round(error, 6) for method, error in errors.items()}

    scores = measure_all(model, task, rows, ["base", *folders, *multi.merges], config, run)
    figures |= figures_of(scores, list(folders), list(multi.merges))
    run.plot("scores", lambda axes: draw_scores(axes, scores))
    sums = save_sums(model, task, list(multi.merges), run)
    if kind == "LORA":
        every = {**folders, **sums}
        told = serving(str(config.model.name), every, [model.peft_config[name].r for name in every])  # type: ignore[attr-defined]
        run.card(told)
        run.say(told)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
