"""What an adapter leaves on the disk: the numbers that learned, how to put them back, and which base they belong to.

adapter/
  adapter_model.safetensors   the parameters that learned, by the names that they have in the adapted model
  adapter_config.json         peft's methods: peft's own file, which PeftModel.from_pretrained reads
  adapter.json                the methods that peft lacks: {"method": ..., "settings": {...}}; `load_adapter` reads it
  base.json                   {"name": ..., "fingerprint": ..., "class": ..., "label_names": ...} of the model that it was trained on, the
                              class of transformers' that opens it, and what its head's outputs are called, if it has one

An adapter on another base computes nonsense and says nothing: the fingerprint is checked on loading.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder, folder_written_atomically, wait_for_everyone

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, Trainer

# The methods that peft lacks: method -> module:function, called as function(model, settings) on the base, puts its
# modules in and gives the model, ready for the saved numbers.
METHODS: dict[str, str] = {
    "bitfit": "recipes.finetuning.bitfit:put_in",
    "adapter": "recipes.common.bottleneck:put_back",
    "adapter_fusion": "recipes.finetuning.adapter_fusion:put_back",
    "madx": "recipes.finetuning.madx:put_back",
    "prefix_tuning": "recipes.common.prefixes:put_back",
    "prompt_tuning": "recipes.common.virtual_tokens:put_back",
    "p_tuning": "recipes.common.virtual_tokens:put_back",
    "p_tuning_v2": "recipes.common.prefixes:put_back",
}


def fingerprint(model: PreTrainedModel) -> str:
    """A name for the weights of a base: "<embeddings, norms and biases>-<matrices>".

    Eight numbers of each, rounded to bf16: the same base gives the same name in any precision, and on any device. Of a base
    in four or eight bits the first half alone, which quantisation leaves as it is. A pooler is the head's, and may be new.
    """
    import torch

    from recipes.common.sharding import gathered

    backbone: Any = model.base_model
    rest, matrices = hashlib.sha256(), hashlib.sha256()
    quantised = getattr(model.config, "quantization_config", None) is not None
    tables = {id(module.weight) for module in backbone.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in sorted(backbone.named_parameters()):
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves an empty vector here
        told = matrices if matrix and id(parameter) not in tables else rest
        if parameter.device.type == "meta" or name.startswith("pooler.") or (quantised and told is matrices):
            continue
        whole = gathered(parameter).detach()
        flat = whole.flatten()
        # whole numbers: float32, as torch.linspace counts, has no place above 2^24, and a large table has more numbers
        places = torch.tensor([k * (len(flat) - 1) // 7 for k in range(8)], device=flat.device)
        few = flat[places].to("cpu", torch.bfloat16)
        told.update(f"{name} {tuple(whole.shape)}".encode() + few.view(torch.int16).numpy().tobytes())
    return rest.hexdigest()[:32] + ("" if quantised else f"-{matrices.hexdigest()[:32]}")


def save_adapter(
    trainer: Trainer,
    model: Any,
    run: RunFolder,
    *,
    about: dict[str, Any],
    method: str = "",
    settings: dict[str, Any] | None = None,
    names: set[str] | None = None,
) -> int:
    """Write the folder adapter/ of a run: a PeftModel's own files, or parameters of a model of ours. Gives its bytes.

    about: what base.json says of the base.
    `names`: which parameters, for a method of ours; default: those that learn.
    """
    from safetensors.torch import save_file

    from recipes.common.sharding import saved_by_trainer, sharded

    path, peft = run.path / "adapter", hasattr(model, "peft_config")
    if peft and sharded(trainer):
        with saved_by_trainer(trainer, path, run) as folder:
            if run.is_main:
                (folder / "base.json").write_text(json.dumps(about, indent=2) + "\n")
                (folder / "README.md").unlink(missing_ok=True)
        return _bytes(path)
    whole: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded(trainer) else model.state_dict()
    if run.is_main:
        with folder_written_atomically(path) as folder:
            if peft:
                model.save_pretrained(folder)
                # a form that nobody has filled in; the run's says it all
                (folder / "README.md").unlink(missing_ok=True)
            else:
                kept = {n for n, p in model.named_parameters() if p.requires_grad} if names is None else names
                numbers = {name: whole[name].detach().contiguous().cpu() for name in sorted(kept)}
                save_file(numbers, folder / "adapter_model.safetensors", metadata={"format": "pt"})
                ours = {"method": method, "settings": settings or {}}
                (folder / "adapter.json").write_text(json.dumps(ours, indent=2) + "\n")
            (folder / "base.json").write_text(json.dumps(about, indent=2) + "\n")
    wait_for_everyone()
    return _bytes(path)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def is_adapter(name: str) -> bool:
    """Whether a local folder holds an adapter alone, which is nothing without its base."""
    folder = Path(name)
    named = any((folder / file).exists() for file in ("adapter.json", "adapter_config.json"))
    return named and not (folder / "config.json").exists()


def base_of(folder: Path) -> str | None:
    """The name of the model that an adapter was trained on, as its files say it."""
    for file, key in (("base.json", "name"), ("adapter_config.json", "base_model_name_or_path")):
        if (folder / file).exists() and (name := json.loads((folder / file).read_text()).get(key)):
            return name
    return None


def check_base(model: PreTrainedModel, folder: Path) -> None:
    """Raise UserError where the adapter in `folder` was trained on other weights than the model's.

    A base that is quantised here or was there is compared by what quantisation leaves as it is.
    """
    file = folder / "base.json"
    if not file.exists():  # an adapter that was not made here
        return
    told = json.loads(file.read_text())
    halves = zip(told["fingerprint"].split("-"), fingerprint(model).split("-"), strict=False)
    if any(theirs != ours for theirs, ours in halves):
        raise UserError(
            f"the adapter in {folder} was trained on another base ({told['name']}): give that one, since on any other "
            "it computes nonsense"
        )


def load_adapter(model: PreTrainedModel, folder: str | Path) -> nn.Module:
    """The base with the adapter of `folder` in it, in evaluation mode, whichever method made it.

    Raises UserError where there is none, where it belongs to another base, or where its numbers do not fit.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder} holds no adapter (no adapter_model.safetensors)")
    check_base(model, folder)
    about = json.loads((folder / "base.json").read_text()) if (folder / "base.json").exists() else {}
    if names := about.get("label_names"):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    if not (folder / "adapter.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # what does then is the method's
    told = json.loads((folder / "adapter.json").read_text())
    module, _, function = METHODS[told["method"]].partition(":")
    adapted = getattr(importlib.import_module(module), function)(model, told["settings"])
    numbers = load_file(folder / "adapter_model.safetensors")
    own, misfit = adapted.state_dict(), f"the adapter in {folder} does not fit {type(model).__name__}"
    for name, tensor in numbers.items():
        if name not in own:
            raise UserError(f"{misfit}: it has no {name}")
        if tensor.shape != own[name].shape:
            raise UserError(f"{misfit}: {name} is {[*tensor.shape]} there, and {[*own[name].shape]} in the model")
    learned = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if lacking := sorted(learned - numbers.keys()):
        raise UserError(f"{misfit}: its file has no {lacking[0]}")
    adapted.load_state_dict(numbers, strict=False)
    return adapted.eval()
