"""A model whose weights no process holds whole: ZeRO stage 3 and FSDP cut each of them into pieces."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.run_folder import RunFolder, wait_for_everyone, write_errors_explained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def launched_with() -> Literal["DeepSpeed", "FSDP"] | None:
    """The library that the launcher has asked to train the model, if it is one that may cut it."""
    asked = (
        name
        for name in ("DeepSpeed", "FSDP")
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("true", "1")
    )
    return next(asked, None)  # type: ignore[arg-type]


def sharded(trainer: Trainer) -> bool:
    """Whether no process holds the whole model (ZeRO stage 3, FSDP)."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def whole_model(trainer: Trainer) -> Any:
    """The trainer's model with all of its weights, on this process's device: itself, or a copy where it is in pieces.

    Every process takes part, and gets one: what follows needs no word between them. For models that fit a device.
    """
    import torch

    model: Any = trainer.model
    if not sharded(trainer):
        return model.to(trainer.args.device)
    with torch.random.fork_rng(), loaded_whole():
        whole = type(model)(copy.deepcopy(model.config))
    pieces = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    with torch.no_grad():
        # a tied one under each of its names: the sharded model may know it by one alone
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            if name in pieces and id(parameter) not in filled:
                parameter.data = gathered(pieces[name]).to(trainer.args.device, copy=True)
                filled.add(id(parameter))
    assert all(id(parameter) in filled for parameter in whole.parameters())
    whole.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    if again := getattr(model, "given_loss_by", None):  # a function that put another loss into the model's forward
        again(whole)
    return whole.to(trainer.args.device)


@contextmanager
def saved_by_trainer(trainer: Trainer, path: Path, run: RunFolder) -> Iterator[Path]:
    """Save a sharded model, or adapter, with its Trainer, which gathers it; every process takes part.

    Gives the folder that it lies in, for rank 0 to add to; after the block it takes the place of `path`, whole.
    """
    temporary = path.with_name(f".{path.name}.gathered")  # the same name in every process
    if run.is_main:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed meanwhile
    wait_for_everyone()
    try:
        with write_errors_explained(path):
            trainer.save_model(str(temporary))
            (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, of what config.yaml says
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if run.is_main:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    wait_for_everyone()


def gathered(parameter: Any) -> Tensor:
    """A parameter's numbers, all of them, where it is; every process takes part."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    return parameter  # FSDP, before it starts


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Models loaded meanwhile are whole in each process, which ZeRO-3 would cut as they are read."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
