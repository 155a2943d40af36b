"""Prefixes: learned keys and values that stand before a row in every layer's self-attention (prefix_tuning, p_tuning_v2).

    layer l, head h      softmax(Q [P_K ; K]^T / sqrt(d)) [P_V ; V]        P_K, P_V [tokens, d] learned

                 keys     P P P P x x x x x          every token sees the prefix and what it sees anyhow
    decoder      query x  v v v v v . . . .          (. is not seen)
    encoder      query x  v v v v v v v v v

A decoder, or an encoder like BERT's, gets the prefix as a cache that is filled before the first token, so it counts as
so many positions. The encoder of an encoder-decoder takes no cache: there each self-attention gets its own.

peft 0.21's own placement is not used, only its encoders. With transformers 5.19 its generation fails for LLaMA and
differs with and without the cache for BART; left-padded rows get other positions than right-padded ones; and the
prefix reaches the decoder alone. The numbers are laid out as peft's, [tokens, 2 layers, heads, d]: `export_for_peft`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PrefixTuningConfig
    from torch import nn
    from transformers import PreTrainedModel
    from trl import SFTConfig

Pairs = list[tuple["torch.Tensor", "torch.Tensor"]]  # keys and values of each layer, [batch, heads, tokens, d]


@dataclass(frozen=True)
class Shape:
    """The keys of one stack: layers, heads, numbers a head."""

    layers: int
    heads: int
    d: int


def shape_of(config: Any, *, encoder: bool) -> Shape:
    """The shape of a decoder's keys (or the only stack's), or of the encoder of an encoder-decoder."""

    def first(*names: str) -> int | None:
        return next((int(v) for name in names if (v := getattr(config, name, None)) is not None), None)

    side = "encoder" if encoder else "decoder"
    layers = first(
        *(("num_decoder_layers",) if not encoder else ("num_layers",)), f"{side}_layers", "num_hidden_layers"
    )
    queries = first(f"{side}_attention_heads", "num_attention_heads")
    heads = first("num_key_value_heads") or queries
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1  # Falcon-7B's, whatever its num_kv_heads says
    width = first("hidden_size", "d_model")
    if layers is None or heads is None or queries is None or width is None:
        raise UserError(f"a prefix needs to know the model's layers and heads, and {type(config).__name__} names none")
    return Shape(layers, heads, first("d_kv", "head_dim") or width // queries)


def encoder_for(settings: PrefixTuningConfig, shape: Shape) -> nn.Module:
    """peft's PrefixEncoder: [tokens] -> [tokens, 2 layers heads d], a table, or a smaller table and an MLP."""
    from peft import PrefixEncoder

    sized = copy.copy(settings)
    sized.num_layers, sized.token_dim, sized.inference_mode = shape.layers, shape.heads * shape.d, False
    if sized.encoder_hidden_size is None:
        sized.encoder_hidden_size = sized.token_dim
    return PrefixEncoder(sized)


def closed_form(settings: PrefixTuningConfig, shapes: list[Shape]) -> int:
    """How many numbers learn in the prefixes.

    P tokens, k = heads x d:  a table    P 2 L k
                              with MLP   P k  +  k h + h  +  h 2 L k + 2 L k        h: encoder_hidden_size
    """
    total = 0
    for shape in shapes:
        k, out = shape.heads * shape.d, 2 * shape.layers * shape.heads * shape.d
        h = settings.encoder_hidden_size or k
        plain = settings.num_virtual_tokens * out
        total += (
            settings.num_virtual_tokens * k + (k * h + h) + (h * out + out) if settings.prefix_projection else plain
        )
    return total


def shapes_of(model: PreTrainedModel) -> list[Shape]:
    """Of the stacks that get a prefix."""
    config = model.config if model.config.is_encoder_decoder else model.config.get_text_config()
    shapes = [shape_of(config, encoder=False)]
    return [*shapes, shape_of(config, encoder=True)] if model.config.is_encoder_decoder else shapes


def check(model: PreTrainedModel, settings: PrefixTuningConfig, args: SFTConfig, section: str, packed: bool) -> None:
    """Raise UserError for what a prefix cannot do. packed: whether training.packing would be done, for this task."""
    from recipes.common.generation import model_positions
    from recipes.common.prompt_encoder import check_encoder, check_room, refuse_shards
    from recipes.common.shared_prompts import windows_below

    check_encoder(settings, section)
    check_room(model, settings.num_virtual_tokens or 0)
    longest = (settings.num_virtual_tokens or 0) + (args.max_length or model_positions(model) or 0)
    if windows := windows_below(model.config, longest):
        raise UserError(
            f"model.name: layers of this model look back {min(windows)} tokens, and a row with its prefix may have {longest}: its "
            "last tokens would lose the prefix; lower training.max_length, or take lora"
        )
    refuse_shards(args, section)
    if args.gradient_checkpointing:
        raise UserError(
            f"training.gradient_checkpointing: {section} cannot: the prefix is a cache, and checkpointed layers get none; set "
            "it to false (what is frozen keeps no optimizer state, so memory is seldom short)"
        )
    if packed:
        raise UserError(
            f"training.packing: {section} cannot: a prefix stands before a row, not before each conversation in it, and "
            "with it transformers no longer keeps the conversations of a row apart; set it to false"
        )


def put_in(model: PreTrainedModel, settings: PrefixTuningConfig) -> None:
    """A prefix in every self-attention: `model.prompt` (decoder, or only stack) and `model.encoder_prompt`."""
    import peft  # noqa: F401  (now: what it draws when it is imported must not shift what the seed gives here)

    from recipes.common.adaptation import seed_again

    seed_again()
    _put_in(model, lambda shape: encoder_for(settings, shape), int(settings.num_virtual_tokens))


def _put_in(model: PreTrainedModel, make: Callable[[Shape], nn.Module], tokens: int) -> None:
    from recipes.common.prompt_encoder import Prompt

    for name, shape in zip(("prompt", "encoder_prompt"), shapes_of(model), strict=False):
        prompt = Prompt(make(shape), tokens)
        model.add_module(name, prompt)
        if name == "prompt":
            prompt.positions = tokens
            _before_rows(_stack(model), prompt, shape)
        else:
            _in_attention(model.get_encoder(), prompt, shape)


def _stack(model: Any) -> nn.Module:
    """The module that takes the cache: a decoder, or the whole backbone."""
    return model.get_decoder() if model.config.is_encoder_decoder else model.base_model


def key_values(prompt: Any, shape: Shape, batch: int, like: nn.Module) -> Pairs:
    """The numbers of a prompt as keys and values of each layer, in the type that the layers compute in."""
    import torch

    device = next(like.parameters()).device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(like.parameters()).dtype
    numbers = prompt().to(dtype).view(-1, 2 * shape.layers, shape.heads, shape.d).permute(1, 2, 0, 3)
    numbers = numbers[:, None].expand(-1, batch, -1, -1, -1)  # [2 layers, batch, heads, tokens, d]
    return [(numbers[2 * layer], numbers[2 * layer + 1]) for layer in range(shape.layers)]


def _before_rows(stack: nn.Module, prompt: Any, shape: Shape) -> None:
    """Fill the cache of a stack before its first token; mask and positions follow."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    names = list(inspect.signature(type(stack).forward).parameters)[1:]
    # RoBERTa and its relatives number their tokens from behind the padding's id
    padding = getattr(getattr(stack, "embeddings", None), "padding_idx", None)
    first = 0 if padding is None else padding + 1
    if "past_key_values" not in names:
        raise UserError(f"a prefix is a cache, and {type(stack).__name__} takes none: take prompt_tuning or lora")

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        batch, length = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is None:
            crossing = kwargs.get("encoder_hidden_states") is not None
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if crossing else DynamicCache()
        if cache.get_seq_length() == 0:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            for layer, (keys, values) in enumerate(key_values(prompt, shape, batch, stack)):
                own.update(keys, values, layer)
        kwargs["past_key_values"] = cache
        mask = kwargs.get("attention_mask")  # [batch, seen tokens]
        if mask is not None:
            kwargs["attention_mask"] = mask = torch.cat([mask.new_ones(batch, prompt.tokens), mask], 1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + prompt.tokens
        elif mask is not None and "position_ids" in names:  # padding on the left takes no position
            kwargs["position_ids"] = first + (mask.long().cumsum(1) - 1)[:, -length:]
        return (), kwargs

    def after(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("use_cache") is False:  # or generation without a cache would go on with this one
            output.past_key_values = None

    stack.register_forward_pre_hook(hook, with_kwargs=True)
    stack.register_forward_hook(after, with_kwargs=True)


def _in_attention(encoder: nn.Module, prompt: Any, shape: Shape) -> None:
    """Give each self-attention of an encoder its layer's keys and values as a cache of its own."""
    import torch
    from transformers import DynamicCache

    attentions = [
        module
        for name, module in encoder.named_modules()
        if name.rsplit(".", 1)[-1] in ("SelfAttention", "self_attn")
        and "past_key_values" in inspect.signature(type(module).forward).parameters
    ]
    if len(attentions) != shape.layers:
        raise UserError(
            f"a prefix in the encoder: {type(encoder).__name__} has {len(attentions)} self-attentions that take one, and "
            f"{shape.layers} layers; T5, BART and their relatives do, others need prompt_tuning or lora"
        )
    made: Pairs = []  # of the pass that is under way

    def at_start(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        made[:] = key_values(prompt, shape, len(args[0] if ids is None else ids), encoder)

    encoder.register_forward_pre_hook(at_start, with_kwargs=True)
    for layer, attention in enumerate(attentions):
        mask_name = "mask" if "mask" in inspect.signature(type(attention).forward).parameters else "attention_mask"

        def hook(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer, mask_name: str = mask_name
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cache = DynamicCache()
            cache.update(*made[layer], layer)
            kwargs["past_key_values"] = cache
            if (mask := kwargs.get(mask_name)) is not None:  # [batch, 1, length, length]: true, or 0, is seen
                seen = True if mask.dtype == torch.bool else 0.0
                kwargs[mask_name] = torch.nn.functional.pad(mask, (prompt.tokens, 0), value=seen)
            return args, kwargs

        attention.register_forward_pre_hook(hook, with_kwargs=True)


def put_back(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """For `adapter_files.load_adapter`: a place for the learned keys and values."""
    import torch

    from recipes.common.prompt_encoder import learned_names, settle

    def table(shape: Shape) -> nn.Module:
        return torch.nn.Embedding(settings["tokens"], 2 * shape.layers * shape.heads * shape.d)

    _put_in(model, table, settings["tokens"])
    settle(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned_names(model))
    return model


def export_for_peft(model: Any, settings: PrefixTuningConfig, folder: Path) -> None:
    """What PeftModel.from_pretrained reads, for a decoder: the same logits, for rows that are not padded on the left."""
    from safetensors.torch import save_file

    shape = shapes_of(model)[0]
    told = copy.copy(settings)
    told.num_layers, told.num_attention_heads, told.token_dim = shape.layers, shape.heads, shape.heads * shape.d
    told.num_transformer_submodules, told.inference_mode = 1, True
    told.base_model_name_or_path = model.config._name_or_path
    folder.mkdir(parents=True, exist_ok=True)
    told.save_pretrained(str(folder))
    numbers = model.prompt.numbers.detach().float().cpu().contiguous()
    save_file({"prompt_embeddings": numbers}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
