"""What the recipes that use peft share: targets that exist, the wrapped model, and a merge that is checked."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from recipes.common.adaptation import Task


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The layers that peft can adapt, by name: (in, out). GPT-2 writes them as Conv1D."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def check_targets(model: PreTrainedModel, targets: Any, section: str, key: str = "target_modules") -> None:
    """Raise UserError where one of `targets` names nothing in the model: peft drops a name of several silently.

    `section` and `key` say where the names stand in the config.
    """
    linear = linear_layers(model)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    valid = sorted({name.rsplit(".", 1)[-1] for name in linear if name != head})
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(
                f"{section}.{key}: {targets!r} is no pattern: {error}; give a list of names, or a pattern"
            ) from error
        missing = [] if any(_is_target(name, targets) for name in names) else [targets]
    else:
        missing = [target for target in sorted(targets) if not any(_is_target(name, [target]) for name in names)]
    if head is not None and _is_target(head, targets):
        raise UserError(
            f"{section}.{key}: the loss is computed from the weights of {head} directly, so an adapter on it "
            f"would never learn; leave it out (or list it in {section}.modules_to_save). Valid: {', '.join(valid)}"
        )
    if missing:
        near = [match[0] for m in missing if (match := difflib.get_close_matches(m, valid, n=1))]
        raise UserError(
            f"{section}.{key}: nothing in {type(model).__name__} is called {', '.join(missing)}"
            + (f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ".")
            + f" Valid: {', '.join(valid)}, or all-linear"
        )
    _refuse_tied(model, targets, f"{section}.{key}")


def check_low_rank(
    model: PreTrainedModel, settings: LoraConfig, run: RunFolder, section: str = "lora", rank: str = "r"
) -> None:
    """Raise UserError for targets that are not there, or a rank whose scale nobody chose."""
    check_targets(model, settings.target_modules, section)
    _refuse_tied(model, settings.modules_to_save or (), f"{section}.modules_to_save")
    if settings.init_lora_weights == "eva":
        raise UserError(
            f"{section}.init_lora_weights: eva takes its start from a pass over the data, which is not made here: leave it "
            "out, or take pissa or olora"
        )
    asked = getattr(settings, rank)
    if f"{section}.{rank}" in run.given and f"{section}.lora_alpha" not in run.given:
        raise UserError(
            f"{section}.lora_alpha: what is learned is multiplied by lora_alpha / {rank}, and with {section}.{rank} {asked} it "
            f"would be peft's {settings.lora_alpha} / {asked}: say it too (twice the rank is common)"
        )


def names_layers(settings: PeftConfig) -> bool:
    """Whether the user named the layers to adapt. Asked before peft puts the layers that it finds in their place."""
    return getattr(settings, "target_modules", None) not in (None, "all-linear")


def check_ranks(adapted: Any, section: str, named: bool) -> None:
    """Raise UserError for a rank above what its layer can have: of layers that the user `named` for any, else for all of them
    (all-linear takes in the router of a mixture of experts, which has as many rows as there are experts)."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    asked = {
        name: (layer.r.get("default", 0), min(layer.in_features, layer.out_features)) for name, layer in layers.items()
    }
    above = [name for name, (rank, most) in asked.items() if rank > most]
    if above and (named or len(above) == len(asked)):
        key, (rank, most) = "init_r" if section == "adalora" else "r", asked[above[0]]
        place = above[0].removeprefix("base_model.model.")
        raise UserError(f"{section}.{key}: {rank} is above what {place} can have, {most}")


def _refuse_tied(model: PreTrainedModel, targets: Any, where: str) -> None:
    """Raise UserError for word embeddings that are the output head too: peft would change one of the two."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    tied = [
        name
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if found := next((name for name in tied if _is_target(name, targets)), None):
        raise UserError(
            f"{where}: {found} is one with {' and '.join(name for name in tied if name != found) or 'the output head'} (tied "
            "word embeddings): what one of them learned could not be merged; leave it out"
        )


def _is_target(name: str, targets: Any) -> bool:
    """peft's rule: a string is a pattern of whole names; of a list, a name or how it ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def with_adapter(base: PreTrainedModel, settings: PeftConfig) -> Any:
    """The base frozen, with peft's modules in it; they are kept in float32 where the base is in less.

    Not under ZeRO-3, which needs one precision for all parameters. The head of a task learns, and is saved: peft sees to
    it by name, and knows neither BART's nor T5's. Raises UserError for settings that peft refuses.
    """
    from peft import PeftType, get_peft_model
    from transformers.integrations import is_deepspeed_zero3_enabled

    from recipes.common.adaptation import head_names

    section = PeftType(settings.peft_type).lower()
    if (some := getattr(settings, "trainable_token_indices", None)) is not None:
        ids = [i for own in (some.values() if isinstance(some, dict) else [some]) for i in own]
        words = base.get_input_embeddings().num_embeddings
        if not ids or not all(0 <= i < words for i in ids):
            wrong = (
                f"{next(i for i in ids if not 0 <= i < words)} is no id of {words} words"
                if ids
                else "it names no token"
            )
            raise UserError(f"{section}.trainable_token_indices: {wrong}: give some ids, or leave it out")
    if getattr(settings, "megatron_config", None) is not None:
        raise UserError(f"{section}.megatron_config: Megatron's layers are in none of these models: leave it out")
    if heads := {"pooler" if ".pooler." in name else name.partition(".")[0] for name in head_names(base)}:
        settings.modules_to_save = sorted({*(settings.modules_to_save or ()), *heads})  # type: ignore[attr-defined]
    named = names_layers(settings)
    try:
        adapted = get_peft_model(base, settings, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    except ValueError as error:  # layers_to_transform that are not there, ...
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error
    check_ranks(adapted, section, named)
    return adapted


def logits_on(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of every position of a training batch, in float32."""
    from recipes.common.generation import inference

    asked = {name: batch[name] for name in batch.keys() - {"labels", "seq_lengths"}} | {"use_cache": False}
    if model.config.is_encoder_decoder:  # the decoder's input is made of them
        asked["labels"] = batch["labels"]
    with inference(model):
        return model(**asked).logits.float()


def merging_moved(apart: torch.Tensor, merged: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference of a logit that merging made: `apart` are those of the base with its adapter.

    Raises RuntimeError if it is more than rounding: a merged model that is another model must not be saved as this one.
    """
    difference = (apart - logits_on(merged, batch)).abs().max().item()
    rounding = 1e-4 if merged.dtype.itemsize == 4 else 5e-2
    if not difference <= rounding * max(1.0, apart.abs().max().item()):
        raise RuntimeError(
            f"merging the adapter moved a logit by {difference:.3g}: the merged model is not what was trained"
        )
    return difference


def merge(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, float]:
    """Put what was learned into the weights; gives the plain model and what `merging_moved` on `batch`."""
    from peft.tuners.ia3 import IA3Model
    from peft.utils import ModulesToSaveWrapper

    apart = logits_on(model, batch)
    if isinstance(model.base_model, IA3Model):  # whose merge fails at a head of several layers: put it back first
        base = model.get_base_model()
        trained = {name: module for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        for name, module in trained.items():
            base.set_submodule(name, module.modules_to_save["default"])
    merged = model.merge_and_unload()
    return merged, merging_moved(apart, merged, batch)


def save_and_merge(task: Task, trainer: Any, adapted: Any, run: RunFolder) -> dict[str, float]:
    """adapter/, and model/ with the adapter in its weights; gives the adapter's bytes and what merging did to the logits."""
    from recipes.common import adaptation, sharding

    figures: dict[str, float] = {"adapter_bytes": adaptation.save(task, trainer, adapted, run)}
    if sharding.sharded(trainer):
        run.say("  the model is sharded, so it is not merged here: adapter/ is the result")
        return figures
    full_precision = trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)  # no autocast around it
    merged, figures["merge_max_logit_difference"] = merge(full_precision, next(iter(trainer.get_train_dataloader())))
    run.save_model(merged, task.tokenizer)
    return figures
