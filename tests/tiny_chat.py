"""A tokenizer and a model so small that chat recipes run on them in seconds: `from tiny_chat import ...` in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY_LLAMA: dict[str, Any] = {  # a model.config
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
SHORT_RUN: dict[str, Any] = {
    "training.max_steps": 40,
    "training.max_length": 64,
    "training.per_device_train_batch_size": 8,
    "training.warmup_steps": 0,
    "training.save_steps": 20,
    "training.bf16": "false",
    "evaluation.max_samples": 12,
    "evaluation.max_new_tokens": 4,
}


def command_line(values: Mapping[str, Any]) -> list[str]:
    """`--key value` for each."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def make_tokenizer() -> Any:
    """Bytes and our special tokens, no merges, our chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from recipes.common.chat import SPECIAL_TOKENS, add_chat_template

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*SPECIAL_TOKENS, *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS[2:])})
    add_chat_template(tokenizer)
    return tokenizer


def make_model(tokenizer: Any, **changes: Any) -> Any:
    """A random Llama of 30 thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**sizes, **ids, **changes}))


def save_tokenizer_and_model(folder: Path) -> Any:
    """folder/tokenizer, and folder/model with its tokenizer beside it; gives the tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer", "model"):
        tokenizer.save_pretrained(folder / name)
    return tokenizer


def conversation(*turns: str) -> dict[str, Any]:
    """A row of turns that alternate between user and assistant."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}
