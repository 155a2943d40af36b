"""Local models and data of the shape of those on the hub that the configs name, so that a config can run without a network.

`localised` takes a config's values and gives them with every hub id replaced. Models have random weights: tiny ones, or
(`full`) the architecture and sizes of those that a gpu.yaml names, which say what memory and time it takes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYLLABLES = [
    a + b
    for a in ("b", "dr", "f", "gl", "k", "m", "n", "pl", "s", "str", "th", "v")
    for b in ("a", "en", "i", "ou", "yx")
]

# ---------------------------------------------------------------- data


def sentence(rng: random.Random, words: int) -> str:
    """Made-up words of one to three syllables."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words)).capitalize() + "."


def turns(rng: random.Random, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(rng, 12)}, {"role": "assistant", "content": answer}]


def preference(rng: random.Random) -> dict[str, Any]:
    asked = turns(rng, "")[:1]
    chosen, rejected = ({"role": "assistant", "content": sentence(rng, words)} for words in (60, 61))
    return {"chosen": [*asked, chosen], "rejected": [*asked, rejected]}


def sum_of_two(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return {"question": f"What is {a} plus {b}?", "answer": f"It is {a} + {b}.\n#### {a + b}"}


def alpaca(rng: random.Random) -> dict[str, Any]:
    return {"instruction": sentence(rng, 10), "input": "", "output": sentence(rng, 50)}


ROWS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "tatsu-lab/alpaca": alpaca,
    "shibing624/alpaca-zh": alpaca,
    "sahil2801/CodeAlpaca-20k": alpaca,
    "databricks/databricks-dolly-15k": lambda r: {
        "instruction": sentence(r, 10), "context": "", "response": sentence(r, 50), "category": "open_qa",
    },
    "meta-math/MetaMathQA": lambda r: {"query": sentence(r, 10), "response": sentence(r, 50), "type": "x"},
    "HuggingFaceH4/ultrachat_200k": lambda r: {"prompt": "x", "messages": [*turns(r, sentence(r, 50)), *turns(r, "Yes.")]},
    "clinc/clinc_oos": lambda r: {"text": sentence(r, 8), "intent": r.choice(("balance", "freeze"))},
    "HuggingFaceH4/no_robots": lambda r: {"messages": turns(r, sentence(r, 50))},
    "trl-lib/ultrafeedback_binarized": preference,
    "openai/gsm8k": sum_of_two,
    "HuggingFaceFW/fineweb-edu": lambda r: {"text": " ".join(sentence(r, 15) for _ in range(40))},
    "wikimedia/wikipedia": lambda r: {"title": "x", "text": " ".join(sentence(r, 15) for _ in range(40))},
    "fancyzhx/ag_news": lambda r: {"text": sentence(r, 30), "label": r.choice(("World", "Sports"))},
    "nyu-mll/glue": lambda r: {
        "sentence1": sentence(r, 20), "sentence2": sentence(r, 9), "label": r.choice(("entailment", "not_entailment")),
    },
    "nyu-mll/glue stsb": lambda r: {
        "sentence1": sentence(r, 9), "sentence2": sentence(r, 9), "label": round(r.uniform(0, 5), 1),
    },
    "unimelb-nlp/wikiann": lambda r: {"tokens": (w := sentence(r, 12).split()), "ner_tags": [len(x) % 3 for x in w]},
    "bentrevett/multi30k": lambda r: {"en": sentence(r, 9), "de": sentence(r, 9)},
    "abisee/cnn_dailymail": lambda r: {"article": sentence(r, 80), "highlights": sentence(r, 12)},
}  # fmt: skip
SIZES = {"train": 4_000, "validation": 200}

# ---------------------------------------------------------------- models


def byte_tokenizer(marks: tuple[str, ...], **special: str) -> Any:
    """Bytes, a merge a pair of letters, and the special tokens of the family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product("abcdefghijklmnopqrstuvwxyzĠ", "abcdefghijklmnopqrstuvwxyz"))
    names = [*marks, *letters, *("".join(pair) for pair in pairs)]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": [mark for mark in marks if mark not in special.values()]})
    return tokenizer


def qwen_tokenizer(*, instruct: bool, generation: str = "qwen2_5") -> Any:
    from trl import chat_template_utils

    eos = "<|im_end|>" if instruct else "<|endoftext|>"
    tokenizer = byte_tokenizer(SPECIAL, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = getattr(chat_template_utils, f"{generation}_chat_template")  # a base model has one too
    return tokenizer


def bert_tokenizer() -> Any:
    from tokenizers.processors import TemplateProcessing

    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    tokenizer = byte_tokenizer(tuple(names.values()), **names)
    ids = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def bart_tokenizer() -> Any:
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return byte_tokenizer(tuple(names.values()), **names, cls_token="<s>", sep_token="</s>")


def t5_tokenizer() -> Any:
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return byte_tokenizer((*names.values(), *sentinels), **names)


def qwen(folder: Path, full: bool, *, instruct: bool = False, eight_billion: bool = False) -> None:
    """Qwen2.5 0.5B; or two of the 36 layers of Qwen3 8B."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    tokenizer = qwen_tokenizer(instruct=instruct, generation="qwen3" if eight_billion else "qwen2_5")
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **heads}
    vocabulary = len(tokenizer)
    if full and eight_billion:
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
        sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2, **heads}
    elif full:
        heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, **heads}
    if full:
        vocabulary = 151_936
    if eight_billion:
        config: Any = Qwen3Config(
            vocab_size=vocabulary, head_dim=128 if full else 8, tie_word_embeddings=False, **sizes
        )
    else:
        config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=32_768, **sizes)
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    torch.manual_seed(0)
    # drawing half a billion numbers takes a processor a minute
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert_large(folder: Path, full: bool) -> None:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = bert_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if full:
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    torch.manual_seed(0)
    vocabulary = 28_996 if full else len(tokenizer)
    BertForMaskedLM(BertConfig(vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def only(tokenizer: Callable[[], Any]) -> Callable[[Path, bool], None]:
    """A model of which a recipe takes the tokenizer alone."""
    return lambda folder, full: tokenizer().save_pretrained(folder)


MODELS: dict[str, Callable[[Path, bool], None]] = {
    "Qwen/Qwen2.5-0.5B": qwen,
    "Qwen/Qwen2.5-0.5B-Instruct": lambda folder, full: qwen(folder, full, instruct=True),
    "Qwen/Qwen2.5-7B": qwen,
    "Qwen/Qwen2.5-7B-Instruct": lambda folder, full: qwen(folder, full, instruct=True),
    "Qwen/Qwen2.5-32B": qwen,
    "Qwen/Qwen3-8B-Base": lambda folder, full: qwen(folder, full, eight_billion=True),
    "google-bert/bert-large-cased": bert_large,
    "google-bert/bert-base-uncased": only(bert_tokenizer),
    "HuggingFaceTB/SmolLM2-135M": only(
        lambda: byte_tokenizer(SPECIAL, eos_token="<|endoftext|>", pad_token="<|im_end|>")
    ),
    "mistralai/Mistral-7B-v0.1": only(
        lambda: byte_tokenizer(("<unk>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    ),
    "openai-community/gpt2": only(lambda: byte_tokenizer(SPECIAL[:1], eos_token="<|endoftext|>")),
    "facebook/bart-base": only(bart_tokenizer),
    "facebook/bart-large": only(bart_tokenizer),
    "google/t5-v1_1-base": only(t5_tokenizer),
    "google/t5-v1_1-large": only(t5_tokenizer),
}

# ---------------------------------------------------------------- configs


def stand_in(hub_id: str, subset: str | None, folder: Path, full: bool) -> str:
    """Where the local one is; made at the first call."""
    data_key = f"{hub_id} {subset}" if f"{hub_id} {subset}" in ROWS else hub_id
    place = folder / data_key.replace("/", "--").replace(" ", "-")
    if not place.exists():
        if hub_id in MODELS:
            MODELS[hub_id](place, full)
        else:
            place.mkdir(parents=True)
            rng = random.Random(data_key)
            for split, size in SIZES.items():
                lines = (json.dumps(ROWS[data_key](rng)) for _ in range(size if full else size // 20))
                (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(place)


def localised(values: Any, folder: Path, full: bool = False) -> Any:
    """The values with every id of MODELS and ROWS replaced, and what chose among the hub's files left out."""
    if isinstance(values, list):
        return [localised(value, folder, full) for value in values]
    if isinstance(values, str):
        return stand_in(values, None, folder, full) if values in MODELS or values in ROWS else values
    if not isinstance(values, dict):
        return values
    named = [key for key in ("name", "data") if isinstance(values.get(key), str) and values[key] in ROWS]
    changed = {}
    for key, value in values.items():
        if named and (key in ("subset", "split") or (key == "validation_split" and value != "validation")):
            continue
        if key in named:
            changed[key] = stand_in(value, values.get("subset"), folder, full)
            continue
        # a hub id can be a key too: gpt.tasks
        name = stand_in(key, None, folder, full) if key in ROWS else key
        changed[name] = localised(value, folder, full)
    return changed
