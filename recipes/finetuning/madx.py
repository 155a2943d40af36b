"""MAD-X: adapters for languages under an adapter for a task, so that the task can be carried to a language it never saw.

    language   after each feed-forward:  h <- h + L(h)              trained on plain text of one language
    inverse    o1 = e1 + F(e2), o2 = e2 + G(o1)                     after the embedding, e = [e1, e2] its two halves;
               e2 = o2 - G(o1), e1 = o1 - F(e2)                     undone before the output layer (NICE's coupling)
    task       on top:  h <- h + T(h + L(h))                        trained on the source language's rows, L and F, G frozen
    zero-shot  swap L, F and G for the target language's, keep T

At inference one language's adapters and the task's are computed in each layer, F and G at both ends; nothing merges.

L, T, F and G are bottleneck adapters, zero at first. The task's residual is the feed-forward's output h: the paper found that to do
better than one to the language adapter's (section 4.2). Its encoders are adapted behind the layer norm and learn a language by hidden
words; here adapters stand before the residual's sum, and decoders learn it by next-token prediction.
Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052

    make madx                                       # laptop, offline, minutes, from what `make llama` made
    make madx CONFIG=gpu                            # one GPU, a public model
    make madx CONFIG=cluster LAUNCH=ddp NPROC=8     # a node; scripts/ has SLURM

Leaves adapter/ with both languages and the task; `speak(model, "zh")` swaps. Laptop result: RESULTS.md#madx.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import trl
    from datasets import DatasetDict
    from transformers import PreTrainedModel, Trainer
    from trl import SFTConfig

    from recipes.common.adaptation import Task
    from recipes.common.sft import Measured


@dataclass
class MadX:
    """The languages, and the sizes of the adapters."""

    source: str = "en"  # the language that the task is learned in: a value of the rows' column `language`
    target: str = "zh"  # the language that it is carried to; no answer of its training rows is looked at
    target_rows: dict[str, Any] | None = None  # a data section for the target's rows; default: those of data
    text: dict[str, dict[str, Any]] = field(default_factory=dict)  # language -> data section; default: the questions
    language_reduction: PositiveFloat = 2.0  # model's width / a language adapter's; of F and G, of half the width
    task_reduction: PositiveFloat = 16.0  # model's width / the task adapter's
    steps: PositiveInt = 300  # of a language
    learning_rate: PositiveFloat = 1e-3  # of the languages; the task's is training.learning_rate


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    madx: MadX
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


# ---------------------------------------------------------------------------------------------------------- the model


def put_in(model: PreTrainedModel, settings: MadX) -> None:
    """Fresh adapters for both languages and the task; the model speaks none of the two, and computes what it did before."""
    from recipes.common.bottleneck import FEED_FORWARD, stacks
    from recipes.common.modeling_bottleneck import Bottleneck, Invertible, LanguageAndTask, invert_around, serial

    width, languages = model.config.hidden_size, (settings.source, settings.target)
    if width % 2:
        raise UserError(f"model: its width is {width}, and the invertible adapter needs two halves")
    sizes = {what: int(width / getattr(settings, f"{what}_reduction")) for what in ("language", "task")}
    if least := [what for what, size in sizes.items() if size < 1]:
        raise UserError(f"madx.{least[0]}_reduction: leaves no number in the middle: the model's width is {width}")
    for stack in stacks(model):
        for layer, parts in stack:
            spoken = {name: Bottleneck(width, sizes["language"], "relu") for name in languages}
            both = LanguageAndTask(spoken, Bottleneck(width, sizes["task"], "relu"))
            layer.add_module(FEED_FORWARD, both.to(next(layer.parameters()).device))
            serial(layer, FEED_FORWARD, layer.get_submodule(parts.feed_out))
    around = {name: Invertible(width, max(1, sizes["language"] // 2)) for name in languages}
    invert_around(model, around)


def speak(model: PreTrainedModel, language: str | None, task: bool = True) -> None:
    """Compute with this language's adapters, or with none, and with the task's on top or without."""
    from recipes.common.modeling_bottleneck import Inverses, LanguageAndTask

    for module in model.modules():
        if isinstance(module, LanguageAndTask | Inverses):
            if language is not None and language not in module.languages:
                raise UserError(f"there is no adapter for {language!r}; there are {', '.join(module.languages)}")
            module.active = language
        if isinstance(module, LanguageAndTask):
            module.with_task = task


def names_of(model: PreTrainedModel, language: str | None) -> set[str]:
    """The parameters of a language's adapters; None: of the task's."""
    part = "task" if language is None else f"languages.{language}"
    return {
        name for name, _ in model.named_parameters()
        if f"_adapter.{part}." in name or name.startswith(f"inverses.{part}.")
    }  # fmt: skip


def put_back(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """As adapter_files.load_adapter calls it; the model speaks the target language."""
    put_in(model, MadX(**settings))
    speak(model, settings["target"])
    return model


# ------------------------------------------------------------------------------------------------------------ training


def data_section(values: dict[str, Any], key: str) -> Data:
    """A data section written inside another. Raises UserError for a key that it does not have."""
    if strange := sorted(values.keys() - {known.name for known in fields(Data)}):
        raise UserError(f"{key}.{strange[0]} is no key of a data section ({', '.join(f.name for f in fields(Data))})")
    return Data(**values)


def rows_of(task: Task, config: Config) -> dict[str, DatasetDict]:
    """Each language's rows, the source's first."""
    from recipes.common.data import load_data
    from recipes.common.stages import rows_where

    madx = config.madx
    if madx.target_rows is None:
        return {spoken: rows_where(task.data, "language", spoken, "madx") for spoken in (madx.source, madx.target)}
    target: Any = load_data(data_section(madx.target_rows, "madx.target_rows"), "conversation")
    return {madx.source: task.data, madx.target: target}


def text_of(language: str, rows: DatasetDict, config: Config) -> DatasetDict:
    """Plain text of a language: madx.text, or the questions of its training rows without the answers."""
    import datasets

    from recipes.common.data import load_data

    if language in config.madx.text:
        section = data_section(config.madx.text[language], f"madx.text.{language}")
        return load_data(section, "text")  # type: ignore[return-value]
    asked = {split: [row[0]["content"] for row in rows[split]["messages"]] for split in ("train", "validation")}
    return datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": texts}) for split, texts in asked.items()})


def language_trainer(part: Task, model: PreTrainedModel, args: SFTConfig, run: RunFolder) -> Trainer:
    """Next-token prediction on blocks of plain text."""
    import torch
    from transformers import Trainer

    from recipes.common.packing import pack_texts

    assert args.max_length is not None
    args.remove_unused_columns = False
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    blocks = pack_texts(part.data["train"], part.tokenizer, args.max_length)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"] for row in rows])  # (batch, max_length)
        return {"input_ids": ids, "labels": ids}

    return Trainer(model, args, train_dataset=blocks, data_collator=collate)


def learn_language(task: Task, language: str, text: DatasetDict, config: Config, run: RunFolder) -> None:
    """Train a language's adapters on its text, the task's out of the way."""
    from recipes.common.stages import train_stage

    speak(task.base, language, task=False)
    freeze_all_but(task.base, language)
    numbers = train_stage(
        f"language_{language}", replace(task, type="TEXT"), text, task.base, config.training,
        run, config.run, method="madx", told=asdict(config.madx), make_trainer=language_trainer,
        max_steps=config.madx.steps, learning_rate=config.madx.learning_rate,
    )  # fmt: skip
    task.base.load_state_dict(numbers, strict=False)


def freeze_all_but(model: PreTrainedModel, language: str | None) -> int:
    """Leave gradients on the language's adapters alone, or the task's."""
    from recipes.common import adaptation

    return adaptation.freeze(model, names_of(model, language))


def fresh_task(model: PreTrainedModel, seed: int) -> None:
    """The task's adapters as before any training."""
    import torch

    from recipes.common.modeling_bottleneck import LanguageAndTask

    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LanguageAndTask):
            module.task.start()


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """The task without languages, both languages, the task over the source language, and the swap to the target."""
    from recipes.common import adaptation
    from recipes.common.stages import refuse_shards, train_stage
    from recipes.common.training import fit

    refuse_shards()
    madx, seed = config.madx, config.training.seed
    if madx.source == madx.target:
        raise UserError(f"madx.target: {madx.target!r} is the source too: there is nothing to carry over")
    task = adaptation.prepare(config.model, config.data, "CAUSAL_LM", run)
    model = task.base
    rows = rows_of(task, config)
    texts = {language: text_of(language, of, config) for language, of in rows.items()}
    put_in(model, madx)

    learned = freeze_all_but(model, None)
    run.say(f"  madx: {learned:,} numbers for the task, {len(names_of(model, madx.target))} tensors a language")
    alone = train_stage(
        "task_without_languages", task, rows[madx.source], model, config.training, run, config.run,
        method="madx", told=asdict(madx),
    )  # fmt: skip
    fresh_task(model, seed)
    for language, text in texts.items():
        learn_language(task, language, text, config, run)

    carried = replace(task, data=rows[madx.source] | {"validation": rows[madx.target]["validation"]})
    freeze_all_but(model, None)
    fresh_task(model, seed)
    speak(model, madx.source)
    trainer = adaptation.make_trainer(carried, model, config.training, run)
    adaptation.announce(carried, trainer, run)

    def measure(language: str | None, what: str) -> Measured:
        speak(model, language)
        return adaptation.measure(carried, trainer, config.evaluation, run, what)

    base = measure(None, f"{madx.target}: base")
    speak(model, madx.source)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    unswapped = measure(madx.source, f"{madx.target}: task over {madx.source}, not swapped")
    swapped = measure(madx.target, f"{madx.target}: task over {madx.target}, zero-shot")
    learned_task = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name in names_of(model, None)
    }
    model.load_state_dict(alone, strict=False)
    without = measure(None, f"{madx.target}: task without languages")
    model.load_state_dict(learned_task, strict=False)
    speak(model, madx.target)

    figures = adaptation.report(carried, run, base, swapped)
    for name, measured in (("without_languages", without), ("not_swapped", unswapped)):
        figures[f"{name}_loss"] = measured.loss
        figures |= {f"{name}_{key}": measured.figures[key] for key in ("exact_match",) if key in measured.figures}
    names = names_of(model, None) | names_of(model, madx.source) | names_of(model, madx.target)
    figures["adapter_bytes"] = adaptation.save(carried, trainer, model, run, "madx", asdict(madx), names)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
