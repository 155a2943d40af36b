"""What the contestants are given: models of the laptop's sizes with random weights, a tokenizer, conversations."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from recipes.common import machine
from scripts.bench_rows.harness import ROOT, Skipped

BATCH, LENGTH = 8, 512
ALPACA = ROOT.parent / "shared" / "data" / "llama_factory" / "alpaca_en_demo.json"
TOKENIZER = ROOT / "runs" / "tokenizer" / "default" / "model"


def small_llama() -> Any:
    """12M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama_of_this_machine() -> tuple[Any, int, int]:
    """The model to pretrain, with the rows of a batch and their tokens: 12M parameters, or on a GPU `make llama CONFIG=gpu`'s 113M."""
    if not machine.has_gpu():
        return small_llama(), BATCH, LENGTH
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = yaml.safe_load((ROOT / "configs/pretraining/llama/gpu.yaml").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, **settings["model"]["config"])  # of the tokenizer that it names
    return (
        LlamaForCausalLM(config), settings["training"]["per_device_train_batch_size"], settings["llama"]["block_length"],
    )  # fmt: skip


def alpaca() -> list[dict[str, Any]]:
    """../shared/data's alpaca as conversations."""
    if not ALPACA.exists():
        raise Skipped(f"{ALPACA} is not there")
    return [
        {
            "messages": [
                {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in json.loads(ALPACA.read_text())
    ]


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level tokenizer of 4,096 words with our chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from recipes.common.chat import END_TOKEN, PAD_TOKEN, add_chat_template, special_tokens

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special_tokens(), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD_TOKEN, eos_token=END_TOKEN)
    add_chat_template(tokenizer)
    return tokenizer


def tokenizer_folder(spare: Path) -> Path:
    """Where the chain's tokenizer is, or, where that was not made, one like it in `spare`, which is filled once."""
    if (TOKENIZER / "tokenizer.json").exists():
        return TOKENIZER
    if not (spare / "tokenizer.json").exists():
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
        make_tokenizer(path.read_text(errors="replace") for path in library).save_pretrained(spare)
    return spare


def small_chat_model(folder: Path, positions: int) -> tuple[Any, Any]:
    """`make llama`'s 3.4M shape with random weights, and its tokenizer; both are saved in `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=positions, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
