"""Every task as text in, text out: pairs of token ids, their batches, what a model writes, and mixtures of tasks.

    "translate English to Chinese: What is 3 + 4?"            -> "3 + 4 等于多少？"
    "package: Raise an IndexError if i is out of range."      -> "numpy"
    "similarity sentence1: ... sentence2: ..."                -> "3.8"

Raffel et al. 2020, https://arxiv.org/abs/1910.10683, sections 2.4 and 3.5.2. For encoder-decoder models of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipes.common.chat import encode_plain
from recipes.common.generation import plain_choices, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recipes.common.run_folder import RunFolder


class Pair(NamedTuple):
    """Token ids, each side with its end."""

    source: list[int]
    target: list[int]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str], max_length: int
) -> list[Pair]:
    """Both sides in tokens; what is longer than max_length is cut, and the end is kept."""
    end = tokenizer.eos_token_id
    sides = [[[*ids[: max_length - 1], end] for ids in encode_plain(tokenizer, side)] for side in (sources, targets)]
    return [Pair(source, target) for source, target in zip(*sides, strict=True)]


def encode_with_own_marks(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str], max_length: int
) -> list[Pair]:
    """`encode_pairs` with what a pretrained model's own tokenizer puts around a text of each side: BART's <s>, mBART's
    language, Marian's other vocabulary. An end follows where it puts none."""
    how: Any = {"truncation": True, "max_length": max_length, "split_special_tokens": True, "verbose": False}
    sides = [tokenizer(list(sources), **how)["input_ids"], tokenizer(text_target=list(targets), **how)["input_ids"]]
    end = tokenizer.eos_token_id
    ended = [[ids if end in ids[-2:] else [*ids[: max_length - 1], end] for ids in side] for side in sides]
    return [Pair(source, target) for source, target in zip(*ended, strict=True)]


def say_cut(pairs: Sequence[Pair], max_length: int, key: str, run: RunFolder) -> None:
    """Say how many pairs have a side that fills max_length, given as `key`: a target that was cut teaches to stop midway."""
    full = sum(max(map(len, pair)) >= max_length for pair in pairs)
    if full:
        run.say(f"  {key}: {full:,} of {len(pairs):,} pairs reach {max_length} tokens; what is longer is cut")


def batch_of(pairs: Sequence[Pair], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask: (batch, longest source); labels: (batch, longest target), -100 behind the end."""
    sources = [torch.tensor(pair.source) for pair in pairs]
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
        "labels": pad_sequence([torch.tensor(p.target) for p in pairs], batch_first=True, padding_value=-100),
    }


def write(
    model: Any,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    bf16: bool,
    batch_size: int = 100,
    beams: int = 1,
) -> list[str]:
    """What the model writes for each source, at most `tokens` tokens: greedily, or the best of a search with `beams`.

    The checkpoint's own generation defaults (a summary's least length) are set aside. It begins with what it began with in
    training: an mBART's target language.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device, ends = model.device, stop_ids(base, tokenizer)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source))
    texts = [""] * len(pairs)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = {k: v.to(device) for k, v in batch_of([pairs[i] for i in chosen], tokenizer.pad_token_id).items()}
            begin = base.prepare_decoder_input_ids_from_labels(batch.pop("labels"))[0, 0].item()
            with plain_choices(base):
                out = model.generate(
                    **batch, max_new_tokens=tokens, do_sample=False, num_beams=beams, decoder_start_token_id=begin,
                    eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            for i, text in zip(chosen, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
    return texts


def bleu(written: Sequence[str], wanted: Sequence[str], tokenizer: str) -> tuple[float, str]:
    """Corpus BLEU, 0 to 100, and one line of it with the signature that says how it was counted (sacreBLEU, Post 2018).

    tokenizer: sacreBLEU's, which cuts the texts for the counting alone: 13a for European languages, zh for Chinese
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer)
    score = metric.corpus_score(list(written), [list(wanted)])
    return score.score, f"{score.format(width=2)} {metric.get_signature()}"


# -------------------------------------------------------------------------------------------------------- mixtures


def mixing_rates(sizes: Sequence[int], limit: int, temperature: float = 1.0) -> np.ndarray:
    """Share of each task in the mixture, (tasks,): r_m = min(e_m, K) / sum_n min(e_n, K), to the power 1/T, normalised.

    e_m examples of task m; K, the limit, keeps a huge task from drowning the rest; T = 1 is examples-proportional mixing,
    and a large T makes all tasks alike.
    """
    rates = np.minimum(np.asarray(sizes, dtype=float), limit)
    rates = (rates / rates.sum()) ** (1 / temperature)
    return np.asarray(rates / rates.sum())


def mixture(
    tasks: Sequence[Sequence[Pair]], count: int, limit: int, temperature: float, rng: np.random.Generator
) -> list[Pair]:
    """`count` pairs, the task of each drawn at its rate; a task's own pairs come in turn, in a new order each time round."""
    rates = mixing_rates([len(pairs) for pairs in tasks], limit, temperature)
    queues: list[list[int]] = [[] for _ in tasks]
    drawn = []
    for task in rng.choice(len(tasks), count, p=rates):
        if not queues[task]:
            queues[task] = rng.permutation(len(tasks[task])).tolist()
        drawn.append(tasks[task][queues[task].pop()])
    return drawn


# -------------------------------------------------------------------------------------------------- numbers as text


def as_text(number: float, step: float = 0.2) -> str:
    """A number as the nearest multiple of the step, in one decimal: 2.57 -> "2.6". T5's form of STS-B (section 2.4)."""
    return f"{round(number / step) * step:.1f}"


def as_number(text: str, low: float, high: float) -> float | None:
    """The number that a text is, or None: what is no number, or lies outside, counts as a wrong answer."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if low <= number <= high else None


def correlation(written: Sequence[str], wanted: Sequence[float], low: float, high: float) -> float:
    """Pearson's r of the numbers written and wanted, 0 where either side is constant; a text that is none counts as `low`."""
    numbers = [as_number(text, low, high) for text in written]
    ours = np.array([low if number is None else number for number in numbers])
    theirs = np.asarray(wanted)
    if ours.std() == 0 or theirs.std() == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])


def similar_pairs(sentences: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """Each sentence beside itself with words changed for another sentence's, and how alike they are.

    Alike is 5 times the share of the words kept: 5 the same sentence, 0 another one.
    """
    made = []
    for i, sentence in enumerate(sentences):
        words = sentence.split()
        others = sentences[int(rng.integers(len(sentences)))].split() or ["-"]
        changed = rng.permutation(len(words))[: int(rng.integers(len(words) + 1))]
        second = list(words)
        for place in changed:
            second[place] = others[place % len(others)]
        kept = sum(a == b for a, b in zip(words, second, strict=True)) / max(len(words), 1)
        made.append((sentences[i], " ".join(second), 5 * kept))
    return made


# ------------------------------------------------------------------------------------------------------- bookkeeping


def flops_per_source_token(model: Any, batch: dict[str, Tensor]) -> float:
    """Floating-point operations of a training step on the batch, for each token of the source (the Trainer counts those).

    6 for each number that multiplies a token: the encoder's meet source tokens, the decoder's and the head's target ones,
    save that the cross-attention's keys and values (left out here) meet source tokens. Attention itself as PaLM counts it.
    """
    from recipes.common.memory_estimate import numbers_of
    from recipes.common.preflight import count_parameters

    source, target = batch["input_ids"].shape[1], batch["labels"].shape[1]
    table = numbers_of(model.get_input_embeddings().weight)
    encoder = count_parameters(model.get_encoder()) - table
    decoder = count_parameters(model.get_decoder())  # with the table, which is the head
    config = model.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    attention = 12 * layers * hidden * (source * source + target * target + source * target)
    return (6 * (encoder * source + decoder * target) + attention) / source
