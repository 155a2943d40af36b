"""QLoRA: the frozen model in four bits, and LoRA on top of it in full precision.

    h = dequantise(W4) x + (alpha / r) B A x         W4: NF4 [out, in], frozen; A [r, in], B [out, r] learned      eq. (5)
    NF4: the 16 values that split a normal distribution evenly; each block of 64 weights is divided by its largest one

    bits a weight    4 + 32/64 = 4.5: a float32 constant a block
    double           4 + 8/64 + 32/(64 * 256) = 4.127: the constants in 8 bits, and a float32 one for each 256 of them

The gradient goes through the four bits and does not change them. Embeddings, norms and the output layer stay as they are.
For decoders that answer conversations (CAUSAL_LM).

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

    make qlora                                       # laptop, offline, minutes, from what `make llama` made
    make qlora CONFIG=gpu                            # one GPU, a public model and instruction set
    make qlora CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node; scripts/ has SLURM

Leaves adapter/ and model/: the weights that were trained on (de-quantised) with the adapter added. Quantising the sum again
would round the adapter away. At inference model/ costs what the base does in 16 bits; the base in four bits with adapter/
beside it keeps its matrices in about a quarter of that, and computes B A x at each layer. Laptop result: RESULTS.md#qlora.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import torch
    import trl
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class QLoRA:
    """How the frozen weights are kept."""

    quantisation: Literal["nf4", "fp4"] = "nf4"  # the 16 values; the paper's table 4 has nf4 ahead
    double_quantisation: bool = True  # the blocks' constants too; 0.373 bits a weight less
    # what a block is turned into to multiply; default: bfloat16 where the machine multiplies it, else float32
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    qlora: QLoRA = field(default_factory=QLoRA)
    lora: Section[peft.LoraConfig] = field(default_factory=defaults(task_type="CAUSAL_LM"))
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


BLOCK, SUPER_BLOCK = 64, 256  # weights of a block, blocks of a block of constants: bitsandbytes' and the paper's


def expected_bytes(weights: int, double: bool) -> float:
    """Bytes of so many four-bit weights with the constants of their blocks, section 3."""
    constants = 8 / BLOCK + 32 / (BLOCK * SUPER_BLOCK) if double else 32 / BLOCK
    return weights * (4 + constants) / 8


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers by name, whether or not an adapter stands around them."""
    import bitsandbytes as bnb

    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def keep_the_gradient(model: nn.Module) -> None:
    """Evaluating must leave the layers able to learn.

    On a processor with AVX512-BF16 bitsandbytes packs a layer's weights anew the first time that it is evaluated, for a kernel
    that has no backward: from then on no gradient reaches what lies below, and nothing says so.
    """
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def measured_bytes(model: nn.Module) -> tuple[int, int]:
    """How many weights are in four bits, and the bytes that they take, constants included."""
    weights = size = 0
    for layer in four_bit_layers(model).values():
        state = layer.weight.quant_state
        weights += state.shape.numel()
        tensors = [layer.weight.data, state.absmax]
        if state.nested:
            tensors.append(state.state2.absmax)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return weights, size


def quantisation_config(qlora: QLoRA) -> Any:
    """transformers' config of it. Raises UserError where bitsandbytes is not installed."""
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    from recipes.common import machine

    if find_spec("bitsandbytes") is None:
        raise UserError("qlora: four-bit weights need bitsandbytes: run `make setup`, or pip install bitsandbytes")
    chosen = qlora.compute_dtype or ("bfloat16" if machine.choose_bf16().value else "float32")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=qlora.quantisation,
        bnb_4bit_use_double_quant=qlora.double_quantisation,
        bnb_4bit_compute_dtype=getattr(torch, chosen),
    )


def paged_where_it_can(training: trl.SFTConfig, run: RunFolder) -> None:
    """The paper's paged optimizer lives in memory that a GPU shares with the host; without a GPU there is none to share."""
    from transformers.training_args import OptimizerNames

    from recipes.common import machine

    if "training.optim" not in run.given and machine.has_gpu():
        training.optim = OptimizerNames.PAGED_ADAMW
        run.choose(
            "training.optim", "paged_adamw_32bit", "the optimizer's state moves to the host when the GPU is full"
        )
    elif "paged" in training.optim and not machine.has_gpu():
        training.optim = OptimizerNames.ADAMW_TORCH_FUSED
        run.choose(
            "training.optim", "adamw_torch_fused", "a paged one moves its state between a GPU and the host: no GPU"
        )


def merged(adapted: Any, config: Config, run: RunFolder) -> tuple[PreTrainedModel, float]:
    """A plain model: every weight as it was trained on, de-quantised, plus (alpha / r) B A; what else learned, as it is.

    And what quantising the sums again, which peft's own merge does, would cost: |Q(W + D) - (W + D)| / |D|, over all
    quantised matrices; near 1, the error is as large as what was learned.
    """
    import bitsandbytes.functional as bnb
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    from recipes.common.models import load_model

    plain = load_model(config.model, None, run)
    modules = dict(plain.named_modules())
    error = learned = 0.0

    def copy(name: str, key: str, value: torch.Tensor) -> None:
        own = getattr(modules[name], key)
        own.copy_(value.to(own.dtype))

    with torch.no_grad():
        for name, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, ModulesToSaveWrapper):  # trained whole, beside the original
                for key, value in layer.modules_to_save["default"].named_parameters():
                    inner, _, last = key.rpartition(".")
                    copy(f"{name}.{inner}" if inner else name, last, value)
            if name not in modules:
                continue
            held = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            state = getattr(getattr(held, "weight", None), "quant_state", None)
            for key, value in held.named_parameters(recurse=False):
                if state is None or key != "weight":
                    copy(name, key, value)
            if state is None and not isinstance(layer, LoraLayer):
                continue
            weight = held.weight if state is None else bnb.dequantize_4bit(held.weight.data, state)
            weight = before = weight.float()  # [out, in]
            if isinstance(layer, LoraLayer):
                variant = layer.lora_variant.get("default")  # DoRA
                weight = (
                    variant.merge_safe(layer, "default", weight)
                    if variant
                    else weight + layer.get_delta_weight("default").float()
                )
            if state is not None and isinstance(layer, LoraLayer):
                again = bnb.quantize_4bit(weight, quant_type=state.quant_type, compress_statistics=state.nested)
                error += (bnb.dequantize_4bit(*again) - weight).square().sum().item()
                learned += (weight - before).square().sum().item()
            # GPT-2's layers lie the other way round, [in, out], until they are quantised
            copy(name, "weight", weight.T if state is not None and isinstance(modules[name], Conv1D) else weight)
    return plain, (error / learned) ** 0.5 if learned else 0.0


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base in four bits and task, adapter, train, merge, save both."""
    import torch
    from peft import prepare_model_for_kbit_training

    from recipes.common import adaptation, sharding
    from recipes.common.peft_models import check_low_rank, logits_on, merging_moved, with_adapter

    paged_where_it_can(config.training, run)
    if config.lora.task_type != "CAUSAL_LM":
        raise UserError(f"lora.task_type: {config.lora.task_type}; this recipe merges and measures decoders: CAUSAL_LM")
    if config.lora.trainable_token_indices or config.lora.target_parameters:
        raise UserError(
            "lora.trainable_token_indices, lora.target_parameters: they are not merged here; name whole modules, in "
            "lora.target_modules or lora.modules_to_save"
        )
    task = adaptation.prepare(
        config.model, config.data, "CAUSAL_LM", run, quantization_config=quantisation_config(config.qlora)
    )
    check_low_rank(task.base, config.lora, run)
    keep_the_gradient(task.base)
    weights, size = measured_bytes(task.base)
    run.say(
        f"  qlora: {weights:,} weights in {size:,} bytes, {8 * size / weights:.3f} bits each; by the formula "
        f"{expected_bytes(weights, config.qlora.double_quantisation):,.0f}"
    )
    base = prepare_model_for_kbit_training(task.base, use_gradient_checkpointing=config.training.gradient_checkpointing)
    adapted = with_adapter(base, config.lora)

    def in_full_precision(_: Any) -> None:
        """TRL has rounded the adapter to bf16, in which small steps are lost; autocast computes in it all the same."""
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    trainer, figures = adaptation.learn(
        task, adapted, config.training, config.evaluation, run, config.run, ready=in_full_precision
    )

    figures |= {"quantised_weights": weights, "bits_per_quantised_weight": round(8 * size / weights, 4)}
    figures["adapter_bytes"] = adaptation.save(task, trainer, adapted, run)
    if sharding.sharded(trainer):
        run.say("  the model is sharded, so it is not merged here: adapter/ is the result")
        return figures
    full_precision = trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)  # no autocast around it
    for layer in four_bit_layers(full_precision).values():
        layer.compute_dtype = torch.float32  # the difference of the weights is to be told, not bf16's rounding
    plain, figures["requantising_error"] = merged(full_precision, config, run)
    batch = next(iter(trainer.get_train_dataloader()))
    figures["merge_max_logit_difference"] = merging_moved(
        logits_on(full_precision, batch), plain.to(adapted.device), batch
    )
    run.save_model(plain, task.tokenizer)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
