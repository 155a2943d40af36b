"""A tokenizer, a policy and preferences so small that a recipe runs on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = ["k", "c", "q", "f"]  # from best to worst, whatever the question; of one length, which tells nothing


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 40 thousand parameters and a byte-level tokenizer with our chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from recipes.common.chat import SPECIAL_TOKENS, add_chat_template

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [" ".join(WORDS)] * 50 + [f"Is it {n}?" for n in range(100)],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    add_chat_template(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of K-way preferences: K from 2 to 4, some ties, the same order for every question."""
    rows = []
    for n in range(160):
        k = 2 + n % 3
        words = [WORDS[(n + i) % 4] for i in range(k)]
        ranks = [WORDS.index(word) for word in words]
        if k == 4:  # "q" and "f" are equally bad here
            ranks = [min(rank, 2) for rank in ranks]
        prompt = [{"role": "user", "content": f"Is it {n}" + "?" * (1 + n % 4)}]
        rows.append({"prompt": prompt, "completions": words, "ranks": ranks})
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def judge(tiny: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the tiny language: "k" is best."""
    from recipes.alignment import reward_model
    from recipes.common.recipe import run_recipe

    root = tmp_path_factory.mktemp("judge")
    argv = [
        *("--model.name", str(tiny), "--data.name", str(preferences), "--run.root", str(root), "--run.threads", "1"),
        *("--training.max_steps", "40", "--training.per_device_train_batch_size", "16"),
        *("--training.learning_rate", "3e-3", "--training.bf16", "false"),
        *("--reward.frozen_layers", "0", "--reward.new_layers", "0", "--reward.optimizer", "adamw"),
        *("--reward.language_coefficient", "0", "--reward.likelihood_coefficient", "0"),
    ]
    assert run_recipe(reward_model.main, reward_model.Config, argv) == 0
    return root / "reward_model" / "default" / "model"
