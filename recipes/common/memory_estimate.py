"""How much memory a training run will take, before it runs: by formulas for a GPU, and for a processor by trying a step.

    weights + gradients + the optimizer's moments + what the forward pass keeps for the backward pass

A GPU is told of these alone. A process on a processor also holds Python, the libraries and what its allocator does not give
back, which is most of a small model's peak, so there a step is taken and measured.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from recipes.common import machine
from recipes.common.training import dtype_name

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def numbers_of(parameter: Any) -> int:
    """How many numbers a parameter holds; bitsandbytes packs two four-bit ones into a byte, ZeRO-3 leaves none here."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def weight_bytes(model: Any) -> int:
    """Bytes of the weights as they are kept: master weights, frozen ones in 16 bits, four-bit ones with their constants."""
    size = 0
    for parameter in model.parameters():
        size += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            constants = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            size += sum(tensor.numel() * tensor.element_size() for tensor in constants)
    return size


def gradient_bytes(model: Any) -> int:
    """A gradient is kept in the precision of its weight."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: Any, args: TrainingArguments, optimizer: Any = None) -> tuple[int, int]:
    """What the optimizer keeps from step to step, and what it takes besides while it steps.

    `optimizer`: one that was built already; default: the one that `args.optim` names.
    """
    from recipes.common.optimizers import MuonWithAdamW

    if isinstance(optimizer, MuonWithAdamW):
        return _muon_bytes(optimizer)
    learned = [p for p in model.parameters() if p.requires_grad]
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(("sgd", "adafactor", "lomo", "adalomo")):  # no moment, or one a row and one a column
        moments = 0
    else:
        moments = 1 if name.removeprefix("paged_").startswith(("lion", "adagrad", "rmsprop")) else 2
    packed = 1.0 if name.endswith("8bit") else 0.5 if name.endswith("4bit") else None
    return sum(int(moments * p.numel() * (packed or p.element_size())) for p in learned), 0


def _muon_bytes(optimizer: Any) -> tuple[int, int]:
    """One moment of a matrix, two of the rest. While it steps, the updates of all matrices, and of the most that are alike
    four copies: their stack, what Newton-Schulz made of it, what it makes next, and one laid out for the products."""
    from recipes.common.optimizers import _dtype_of_products

    matrices = [p for group in optimizer.muon.param_groups for p in group["params"]]
    rest = [p for group in optimizer.adamw.param_groups for p in group["params"]]
    size = sum(p.numel() * p.element_size() for p in matrices)
    alike: dict[tuple[int, ...], int] = defaultdict(int)
    for p in matrices:
        alike[tuple(sorted(p.shape))] += p.numel()
    stacks = 4 * _dtype_of_products(matrices[0].device).itemsize * max(alike.values()) if matrices else 0
    return size + sum(2 * p.numel() * p.element_size() for p in rest), size + stacks


def activation_bytes(model: Any, batch: dict[str, Any], args: TrainingArguments, scored: int | None = None) -> int:
    """About what the forward pass of a micro-batch keeps for the backward pass.

    Of every linear layer what it gives, and what it is given if its weight learns; of every norm what it is given, and
    if it learns the same divided by its size, in float32; eager attention's probabilities, which the other kernels never
    hold; what gelu_new, written out in Python, keeps of each of its steps; the logits of the `scored` positions (default:
    all), once as they are and twice in float32. With checkpointing a layer's input for each layer, and all of one layer.
    """
    import torch

    element = 4 if dtype_name(args) == "float32" else 2
    config = model.config
    ids = next((v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim >= 2), None)
    if ids is None:
        return 0
    tokens, labels = ids.numel(), batch.get("labels")
    written = labels.numel() if getattr(config, "is_encoder_decoder", False) and labels is not None else tokens
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = 0
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        seen = written if "decoder." in name else tokens
        if type(module).__name__.endswith("Norm") and weight is not None:
            kept += seen * 4 * weight.numel() * (1 + weight.requires_grad)
        elif (widths := _widths(module)) and module is not head:
            given, gives = widths[0] * weight.requires_grad, widths[1] * (".lora_" not in name)
            kept += seen * element * (given + gives)
        elif type(module).__name__ == "NewGELUActivation":
            inner = model.get_submodule(name.rpartition(".")[0])
            width = max(_widths(layer)[1] for layer in inner.children() if _widths(layer))  # type: ignore[index]
            # x / 2, the tanh, and 1 + it; a GPU's autocast raises to powers in float32, and all that follows
            kept += seen * width * (14 if element == 2 and args.device.type == "cuda" else 3 * element)
    hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    if getattr(config, "_attn_implementation", "") == "eager":
        probabilities = layers * tokens * ids.shape[-1] * getattr(config, "num_attention_heads", 0)
        kept += probabilities * (4 if element == 4 else 4 + 2)  # the softmax is in float32, the product with V is not
    if args.gradient_checkpointing and layers:
        kept = kept // layers + 4 * tokens * hidden * layers
    if head is not None:
        kept += (written if scored is None else scored) * getattr(config, "vocab_size", 0) * (8 + element)
    return kept


def _widths(module: Any) -> tuple[int, int] | None:
    """How many numbers a linear layer is given, and gives, per token; None for other modules."""
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not hasattr(module, "base_layer"):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" else None


def copied_bytes(model: Any, args: TrainingArguments) -> int:
    """Autocast's 16-bit copies of the float32 weights of its products: the backward pass needs them again."""
    if dtype_name(args) == "float32":
        return 0
    weights: dict[int, Any] = {id(module.weight): module.weight for module in model.modules() if _widths(module)}
    return sum(2 * weight.numel() for weight in weights.values() if weight.element_size() == 4)


def memory_per_device(
    model: Any, args: TrainingArguments, activations: int, optimizer: Any = None, frozen: Sequence[Any] = ()
) -> dict[str, float]:
    """GiB a device for ZeRO stages 0 to 3 (Rajbhandari et al. 2020, section 3).

    zero0 is one process, or DDP: weights as they are kept, gradients, moments, and under autocast copies of the weights.
    DeepSpeed in 16 bits has weights and gradients in 16 bits, and beside the moments a float32 master of what learns.
    Stage 1 shares moments and master among the devices, 2 the gradients too, 3 the weights too, and those of the `frozen`
    models beside it.
    """
    weights, gradients = weight_bytes(model), gradient_bytes(model)
    beside = sum(map(weight_bytes, frozen))
    moments, stepping = optimizer_bytes(model, args, optimizer)
    # in the backward pass gradients take the place of activations
    alone = weights + beside + moments + gradients + max(activations + copied_bytes(model, args), stepping)
    if dtype_name(args) != "float32":
        floats = [p for p in model.parameters() if p.is_floating_point()]  # four-bit ones are bytes, and stay
        learned = sum(p.numel() for p in floats if p.requires_grad)
        weights -= sum((p.element_size() - 2) * p.numel() for p in floats)
        gradients, moments = 2 * learned, moments + 4 * learned
        beside = sum(2 * numbers_of(p) for other in frozen for p in other.parameters())
    n = args.world_size
    shared = {
        "zero1": weights + beside + gradients + moments / n,
        "zero2": weights + beside + (gradients + moments) / n,
        "zero3": (weights + beside + gradients + moments) / n,
    }
    sizes = {"zero0": alone, **{stage: size + activations for stage, size in shared.items()}}
    return {stage: size / machine.GIB for stage, size in sizes.items()}


# ------------------------------------------------------------------------------------------------------ on a processor


def memory_here(
    model: Any, args: TrainingArguments, alone: float, optimizer: Any = None, trial: Callable[[], None] | None = None
) -> float:
    """GiB that this process will have held at most, by its end.

    `trial` takes steps, and what they reach is measured. Without, `alone` GiB of formulas (zero0) are added to what the
    process holds.
    """
    import psutil
    from matplotlib.backends import backend_agg  # noqa: F401  (a run draws in the end, and what draws takes memory)

    process = psutil.Process()
    merged = sum(4 * numbers_of(p) for p in model.parameters() if hasattr(p, "quant_state"))  # de-quantised, in the end
    if trial is not None:
        trial()
        reached = kept = process.memory_info().rss  # with what the C library keeps of what was freed
    else:
        moments, stepping = optimizer_bytes(model, args, optimizer)
        kept = process.memory_info().rss + unread_bytes(model) + moments
        reached = max(kept + stepping, kept - moments - weight_bytes(model) + alone * machine.GIB)
    return max(machine.peak_memory_gib(), max(reached, kept + merged) / machine.GIB)


def give_back_freed_memory() -> None:
    """Let the C library return to the system what was freed: it keeps it, as resident, for the next who asks (glibc)."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def unread_bytes(model: Any) -> int:
    """Of the weights, what is not in memory yet but will be: parts of mapped files that nobody read, and a model's on `meta`."""
    import psutil

    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == "meta")
    if hasattr(psutil.Process, "memory_maps"):  # not on macOS
        maps = [m for m in psutil.Process().memory_maps() if m.path.endswith(".safetensors")]
        size += sum(m.size - m.rss for m in maps)
    return size


def try_step(trainer: Trainer, batch: dict[str, Any], answers: Callable[[], Any] | None = None) -> None:
    """A step on the micro-batch as the Trainer takes it, and another's way forward and back. The model is spoiled.

    `answers` comes first: a small model's peak is made by the rows that it answers before and after as much as by steps.
    The second time there are the optimizer's moments, a heap in which what was freed rarely fits what is wanted next, as
    in a run, and, where gradients are accumulated, those of a micro-batch before.
    """
    if answers is not None:
        answers()
        give_back_freed_memory()  # what it left behind would be taken by some of the step's values, or by none: luck
    model: Any = trainer.model
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    learner = trainer.accelerator.prepare_model(model.train())

    def forward_and_back() -> None:
        loss = trainer.compute_loss(learner, cast(Any, trainer)._prepare_inputs(dict(batch)))
        trainer.accelerator.backward(loss)

    forward_and_back()
    optimizer = cast(Any, trainer.optimizer or trainer.create_optimizer())
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(min(2, trainer.args.gradient_accumulation_steps)):
        forward_and_back()
