"""Bottleneck adapters: which there are, and where they stand in which architectures.

    houlsby    h + A(h) after attention and after the feed-forward, before either is added to the residual
    pfeiffer   h + A(h) after the feed-forward alone
    parallel   h + A(x) where the feed-forward made h of x

h is what is about to be added to the residual. In encoders that normalise after the sum (BERT), Pfeiffer's own reads h behind sum and
norm, and a second norm follows; here it stands where Houlsby's second one does, so that no norm is added to the model.

The modules themselves are in modeling_bottleneck.py. What is not in KNOWN is refused, since a part of the same name may
have the residual in it already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recipes.common.adaptation import TaskType
from recipes.common.errors import UserError
from recipes.common.sections import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION, FEED_FORWARD = "attention_adapter", "feed_forward_adapter"  # names of the adapters in a layer


@dataclass
class Adapter:
    """Which adapters, how wide, and in which layers."""

    task_type: TaskType = "CAUSAL_LM"  # what the rows are, and the model's head
    kind: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"  # where they stand
    bottleneck: PositiveInt | None = None  # m, numbers in the middle; default: the model's width / reduction
    reduction: PositiveFloat = 16.0  # width / m; Pfeiffer et al.'s default
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"  # in the middle
    scale: PositiveFloat = 1.0  # of what is added; He et al. take 4 for parallel
    layers: Literal["all"] | list[int] = "all"  # which layers have them; of an encoder-decoder, in both


class Parts(NamedTuple):
    """The submodules of a layer between which adapters stand."""

    attention: str  # its output (or the first of it) is what is added to the residual
    feed_in: str  # its input is the feed-forward's
    feed_out: str  # its output is what is added to the residual


# Architectures whose layers are known, by transformers' class of a layer: the first pattern that fits is taken.
DECODER = Parts("self_attn", "mlp", "mlp")
BERT = Parts("attention.output.dropout", "intermediate", "output.dropout")
BART = Parts("self_attn", "fc1", "fc2")
KNOWN: dict[str, tuple[Parts, ...]] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi", "Olmo2"), (DECODER,)),
    "GPT2": (Parts("attn", "mlp", "mlp"),),
    **dict.fromkeys(("Bert", "Roberta", "XLMRoberta", "Electra"), (BERT,)),
    **dict.fromkeys(("Bart", "MBart", "Marian", "Pegasus", "OPT"), (BART,)),
    **dict.fromkeys(
        ("T5", "MT5"),
        (  # a decoder's layer.1 is the attention to the encoder
            Parts("layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.2.DenseReluDense"),
            Parts("layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense"),
        ),
    ),
}
ENDINGS = ("DecoderLayer", "EncoderLayer", "Layer", "Block")


def stacks(model: PreTrainedModel) -> Iterator[list[tuple[nn.Module, Parts]]]:
    """The model's stacks of layers (two in an encoder-decoder), each layer with its parts. UserError if it is not known."""
    from torch.nn import ModuleList

    found = False
    for module in model.modules():
        if (
            isinstance(module, ModuleList)
            and len(module)
            and (parts := [_parts(layer) for layer in module])
            and all(parts)
        ):
            found = True
            yield list(zip(module, parts, strict=True))  # type: ignore[arg-type]
    if not found:
        raise UserError(
            f"adapter: where adapters stand in the layers of {type(model).__name__} is not known; known are "
            f"{', '.join(KNOWN)} (recipes/common/bottleneck.py: a line for another one says which parts its layer has)"
        )


def _parts(layer: nn.Module) -> Parts | None:
    named, modules = type(layer).__name__, {name for name, _ in layer.named_modules()}
    kind = next((named.removesuffix(end) for end in ENDINGS if named.endswith(end)), named)
    return next((parts for parts in KNOWN.get(kind, ()) if set(parts) <= modules), None)


def size_of(model: PreTrainedModel, settings: Adapter) -> int:
    """Numbers in the middle of an adapter. Raises UserError where the reduction leaves none."""
    width = model.config.hidden_size
    size = settings.bottleneck or int(width / settings.reduction)
    if size == 0:
        raise UserError(
            f"adapter.reduction: {settings.reduction:g} leaves no number in the middle: the model's width is {width}"
        )
    return size


def put_in(model: PreTrainedModel, settings: Adapter) -> int:
    """Put fresh adapters into the model's layers; gives how many. The model computes what it did before."""
    from recipes.common.modeling_bottleneck import Bottleneck, parallel, serial

    size, count = size_of(model, settings), 0
    for stack in stacks(model):
        for i in _chosen(settings, len(stack)):
            layer, parts = stack[i]
            names = [ATTENTION, FEED_FORWARD] if settings.kind == "houlsby" else [FEED_FORWARD]
            for name in names:
                adapter = Bottleneck(model.config.hidden_size, size, settings.nonlinearity, settings.scale)
                layer.add_module(name, adapter.to(next(layer.parameters()).device, _precision(model)))
            if settings.kind == "parallel":
                parallel(layer, FEED_FORWARD, layer.get_submodule(parts.feed_in), layer.get_submodule(parts.feed_out))
            else:
                serial(layer, FEED_FORWARD, layer.get_submodule(parts.feed_out))
            if settings.kind == "houlsby":
                serial(layer, ATTENTION, layer.get_submodule(parts.attention))
            count += len(names)
    return count


def _chosen(settings: Adapter, layers: int) -> list[int]:
    if settings.layers == "all":
        return list(range(layers))
    chosen = sorted(set(settings.layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= layers:
        raise UserError(
            f"adapter.layers: {settings.layers}, but there are the layers 0 to {layers - 1}: name some of them"
        )
    return chosen


def _precision(model: PreTrainedModel) -> Any:
    """float32 whatever the base is in; ZeRO-3 needs one precision for all parameters."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    return model.dtype if is_deepspeed_zero3_enabled() else torch.float32


def adapter_names(model: nn.Module) -> set[str]:
    """The parameters of the adapters."""
    return {name for name, _ in model.named_parameters() if {ATTENTION, FEED_FORWARD} & set(name.split("."))}


def closed_form(width: int, size: int) -> int:
    """Numbers of one adapter: W_down and W_up, m d each, b_down of m and b_up of d."""
    return 2 * size * width + size + width


def put_back(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """`put_in` as adapter_files.load_adapter calls it."""
    put_in(model, Adapter(**settings))
    return model


def read_adapter(model: PreTrainedModel, folder: str, settings: Adapter, key: str) -> dict[str, Tensor]:
    """The numbers of an adapter in `folder`, trained on this base with settings of this shape.

    Raises UserError where it is of another base, kind or shape; `key` is where the config names it.
    """
    from safetensors.torch import load_file

    from recipes.common.adapter_files import check_base

    path = Path(folder)
    if not (path / "adapter.json").exists():
        raise UserError(f"{key}: {folder} holds no adapter of `make adapter` (no adapter.json)")
    told = json.loads((path / "adapter.json").read_text())
    if told["method"] != "adapter":
        raise UserError(f"{key}: {folder} is a {told['method']}, not a bottleneck adapter")
    check_base(model, path)
    theirs = Adapter(**told["settings"])
    both = {
        name: (getattr(theirs, name), getattr(settings, name)) for name in ("kind", "layers", "nonlinearity", "scale")
    }
    both["bottleneck"] = (size_of(model, theirs), size_of(model, settings))
    for name, (its, asked) in both.items():
        if its != asked:
            raise UserError(
                f"{key}: its {name} is {its}, and adapter.{name} is {asked}: only adapters of the same shape can be fused"
            )
    return load_file(path / "adapter_model.safetensors")
