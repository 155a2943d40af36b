"""What the recipes that use peft share: targets that exist, the wrapped model, and a merge that is checked."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from recipes.common.adaptation import Task


def check_targets(model: PreTrainedModel, targets: Any, section: str, key: str = "target_modules") -> None:
    """Raise UserError where one of `targets` names nothing in the model: peft drops a name of several silently.

    `section` and `key` say where the names stand in the config.
    """
    import torch

    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    valid = sorted({name.rsplit(".", 1)[-1] for name in linear if name != head})
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in names)]
        if head is not None and any(head == t or head.endswith(f".{t}") for t in targets):
            raise UserError(
                f"{section}.{key}: the loss is computed from the weights of {head} directly, so an adapter on it "
                f"would never learn; leave it out (or list it in {section}.modules_to_save). Valid: {', '.join(valid)}"
            )
    if missing:
        near = [match[0] for m in missing if (match := difflib.get_close_matches(m, valid, n=1))]
        raise UserError(
            f"{section}.{key}: nothing in {type(model).__name__} is called {', '.join(missing)}"
            + (f"; did you mean {', '.join(near)}?" if near else ".")
            + f" Valid: {', '.join(valid)}, or all-linear"
        )


def with_adapter(base: PreTrainedModel, settings: PeftConfig) -> Any:
    """The base frozen, with peft's modules in it; they are kept in float32 where the base is in less.

    Not under ZeRO-3, which needs one precision for all parameters. Raises UserError for settings that peft refuses.
    """
    from peft import PeftType, get_peft_model
    from transformers.integrations import is_deepspeed_zero3_enabled

    section = PeftType(settings.peft_type).lower()
    if getattr(settings, "trainable_token_indices", None) in ([], {}):
        raise UserError(f"{section}.trainable_token_indices: it names no token: give some ids, or leave it out")
    try:
        return get_peft_model(base, settings, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    except ValueError as error:  # layers_to_transform that are not there, ...
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error


def merge(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, float]:
    """Put what was learned into the weights; gives the plain model and the largest difference of a logit that merging made on `batch`.

    Raises RuntimeError if it is more than rounding: a merged model that is another model must not be saved as this one.
    """
    from recipes.common.generation import inference

    asked = {name: batch[name] for name in batch.keys() - {"labels", "seq_lengths"}} | {"use_cache": False}
    if model.config.is_encoder_decoder:  # the decoder's input is made of them
        asked["labels"] = batch["labels"]
    with inference(model):
        apart = model(**asked).logits.float()
    merged = model.merge_and_unload()
    with inference(merged):
        together = merged(**asked).logits.float()
    difference = (apart - together).abs().max().item()
    rounding = 1e-4 if merged.dtype.itemsize == 4 else 5e-2
    if not difference <= rounding * max(1.0, apart.abs().max().item()):
        raise RuntimeError(
            f"merging the adapter moved a logit by {difference:.3g}: the merged model is not what was trained"
        )
    return merged, difference


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
