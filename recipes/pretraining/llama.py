"""LLaMA: pretrain a decoder from scratch on next-token prediction.

    loss = - 1/T sum_t log p(x_t | x_<t)
    block:   h = h + Attention(RMSNorm(h));   h = h + SwiGLU(RMSNorm(h))        pre-norm, no biases
    RMSNorm(h) = h / sqrt(mean(h^2) + eps) * g
    SwiGLU(h)  = W_down (SiLU(W_gate h) * W_up h)
    RoPE       rotates each pair of a query's and a key's numbers by an angle proportional to its position

    llama1     every query head has its own keys and values (MHA); AdamW, a cosine to a tenth
    llama2     groups of query heads share them (GQA): model.config.num_key_value_heads; a wider SwiGLU, twice the context

cpu.yaml is llama1 with tied embeddings and Muon. The library's class is trained; recipes/common/modeling_llama.py has it written out.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971 and https://arxiv.org/abs/2307.09288

    make llama                                        # laptop, offline, minutes; CONFIG=llama1, CONFIG=llama2
    make llama CONFIG=gpu                             # one GPU, a public corpus
    make llama CONFIG=cluster LAUNCH=fsdp NPROC=8     # a node; scripts/ has SLURM

Laptop result: RESULTS.md#llama.
"""

from __future__ import annotations

import itertools
import lzma
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.chat import encode_plain
from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, PositiveFloat, PositiveInt, Run, UpToOne

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# transformers' names for the same block: with a window (mistral), biases (qwen2) or norms (qwen3) beside it
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class Llama:
    """Knobs of the pretraining itself; the architecture's are in model.config."""

    block_length: PositiveInt = 512  # tokens a sample; documents are packed into such blocks
    mask_documents: bool = False  # keep a token from seeing the document before its own; LLaMA-1 and -2 did not
    optimizer: Literal["muon", "adamw"] = (
        "muon"  # muon: hidden matrices by Muon, the rest by AdamW; LLaMA's own is adamw
    )
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)
    evaluation_stride: UpToOne = (
        0.5  # share of a window that moves on at each evaluation step; smaller sees more context
    )
    compare_with_xz: bool = True  # xz -9 on the same held-out text, cold and after the training text
    prompts: tuple[str, ...] = ("def ", "import ", "The ")  # continued as it learns


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    llama: Llama
    training: Section[transformers.TrainingArguments]
    run: Run


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    stride: float,
    bf16: bool = False,
) -> float:
    """Bits that the model needs for a byte of the texts: sum of -log2 p over all tokens, over the number of UTF-8 bytes.

    Windows of `length` tokens move on by `stride` of themselves; each token is scored once, in the first window that
    holds it, so it is predicted from at least (1 - stride) * length tokens, save at a document's start. The first token
    of a document is predicted from an end-of-text token.
    """
    import torch
    from torch.nn import functional as F

    step = max(1, int(length * stride))
    windows, scored_from = [], []
    for ids in encode_plain(tokenizer, texts):
        document = [tokenizer.eos_token_id, *ids]
        for start in range(0, max(1, len(document) - 1 - (length - step)), step):
            windows.append(document[start : start + length + 1])
            scored_from.append(0 if start == 0 else length - step)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
    total, device = 0.0, model.device
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(order), 16):
            chosen = order[first : first + 16]
            longest = max(len(windows[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), tokenizer.eos_token_id)
            targets = torch.full((len(chosen), longest - 1), -100)
            for row, i in enumerate(chosen):
                window = torch.tensor(windows[i])
                ids[row, : len(window)] = window
                targets[row, scored_from[i] : len(window) - 1] = window[1 + scored_from[i] :]
            logits = model(input_ids=ids[:, :-1].to(device)).logits  # (batch, seq, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="sum")
            total += loss.item()
    model.train()
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


def unigram_bits_per_byte(blocks: Any, tokenizer: PreTrainedTokenizerBase, held_out: list[str]) -> float:
    """Bits a byte of the held-out texts under the frequencies of two million training tokens, which see no context."""
    import torch

    from recipes.common.held_out import unigram_loss
    from recipes.common.packing import stacked

    length = len(next(iter(blocks))["input_ids"])
    seen = [stacked(itertools.islice(blocks, 2_000_000 // length))]
    ids = [torch.tensor(tokens, dtype=torch.long) for tokens in encode_plain(tokenizer, held_out)]
    nats = unigram_loss(seen, ids, len(tokenizer)) * sum(map(len, ids))
    return nats / math.log(2) / sum(len(text.encode()) for text in held_out)


def xz_bits_per_byte(training: list[str], held_out: list[str]) -> dict[str, float]:
    """What `xz -9` needs for the held-out text alone, and on top of the training text: the compressor's own kind of learning."""

    def compressed(texts: list[str]) -> int:
        return len(lzma.compress("".join(texts).encode(), preset=9))

    with ThreadPoolExecutor(2) as pool:  # lzma lets other threads run
        primed, base = pool.map(compressed, [[*training, *held_out], training])
        cold = compressed(held_out)
    size = sum(len(text.encode()) for text in held_out)
    return {"xz_bits_per_byte": 8 * cold / size, "xz_primed_bits_per_byte": 8 * (primed - base) / size}


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, optimizer, train, evaluate, save."""
    import torch
    from transformers import Trainer, TrainerCallback

    from recipes.common.data import load_data
    from recipes.common.fused_loss import fuse_next_token_loss
    from recipes.common.generation import continue_prompts
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.optimizers import check_muon, muon_with_adamw
    from recipes.common.packing import check_lengths, pack_texts, stacked
    from recipes.common.preflight import enough_blocks, preflight
    from recipes.common.sharding import whole_model
    from recipes.common.training import fit, total_steps

    llama, training = config.llama, config.training
    if llama.optimizer == "muon":
        check_muon(training)
    tokenizer = load_tokenizer(config.model, run)
    model = load_model(config.model, tokenizer, run)
    if model.config.model_type not in FAMILY:
        raise UserError(
            f"model: this recipe trains a LLaMA ({', '.join(FAMILY)}), not a {model.config.model_type}: set model_type: llama"
        )
    check_lengths({"llama.block_length": llama.block_length}, model)
    fuse_next_token_loss(model)

    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=llama.block_length, mask_documents=llama.mask_documents)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out = [row["text"] for row in data["validation"]]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {key: stacked(rows, key) for key in rows[0]}  # (batch, block_length)
        return {**batch, "labels": batch["input_ids"]}

    optimizer = None  # None: the Trainer makes training.optim
    if llama.optimizer == "muon":
        optimizer = muon_with_adamw(model, training, llama.muon_learning_rate)

    class ShowSamples(TrainerCallback):
        """Text that the model writes at each checkpoint: how it learns, to be read."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.sample(f"step-{state.global_step:06d}.txt", continue_prompts(model, tokenizer, llama.prompts))

    trainer = Trainer(
        model,
        training,
        train_dataset=blocks,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[ShowSamples()],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    preflight(run, model, batch, args=training, total_steps=total_steps(trainer))
    unigram = unigram_bits_per_byte(blocks, tokenizer, held_out)
    untrained = bits_per_byte(
        whole_model(trainer), tokenizer, held_out[:8], llama.block_length, llama.evaluation_stride, training.bf16
    )
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    model = whole_model(trainer)
    run.save_model(model, tokenizer)
    run.plot_curve("loss", "loss")

    sizes = {"eval_bytes": sum(len(text.encode()) for text in held_out)}
    scored = bits_per_byte(model, tokenizer, held_out, llama.block_length, llama.evaluation_stride, training.bf16)
    baseline = xz_bits_per_byte([row["text"] for row in data["train"]], held_out) if llama.compare_with_xz else {}
    baseline |= {"unigram_bits_per_byte": unigram, "untrained_bits_per_byte": untrained}
    return {"bits_per_byte": scored, **baseline, **sizes}


if __name__ == "__main__":
    run_recipe(main, Config)
