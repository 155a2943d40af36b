"""UniLM's four attention masks, its segment ids, and its masked tokens.

    left to right      right to left      bidirectional      sequence to sequence (first segment: 2 tokens)
    x . . .            x x x x            x x x x            x x . .
    x x . .            . x x x            x x x x            x x . .
    x x x .            . . x x            x x x x            x x x .
    x x x x            . . . x            x x x x            x x x x

A row is the token that looks, an x what it may look at (section 2.3, figure 1). One model is trained under all four, told
by the segment ids which one it is under. Everything here is made from a numpy Generator, so a seed gives it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LEFT_TO_RIGHT, RIGHT_TO_LEFT, BIDIRECTIONAL, SEQUENCE_TO_SEQUENCE = range(4)
KINDS = ("left_to_right", "right_to_left", "bidirectional", "sequence_to_sequence")
PADDED_TO = 16  # tokens of a batch are a multiple of it: few shapes, and products that suit the kernels
SHARES = (1 / 6, 1 / 6, 1 / 3, 1 / 3)  # how often each is trained, section 2.4
SEGMENTS = ((2, 2), (3, 3), (0, 1), (4, 5))  # segment ids of the first and the second segment under each
MASK_TOKEN, START_TOKEN = "<|mask|>", "<|start|>"


class Marks(NamedTuple):
    """The ids of the tokens that the objective needs, and of those that a masked token may be replaced by."""

    start: int  # [SOS]: first of every input
    end: int  # [EOS]: after each segment
    mask: int
    pad: int
    ordinary: np.ndarray  # (n,), no special token


class Sample(NamedTuple):
    """One input and what is to be recovered; the lists are of one length."""

    tokens: list[int]
    labels: list[int]  # the token that a masked position held, -100 elsewhere
    first: int  # tokens of [SOS] S1 [EOS]; all of them where there is one segment
    kind: int  # which of KINDS
    is_next: int = -100  # whether S2 follows S1 in the text; -100: not asked


def add_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Give the tokenizer a mask and a start, where it lacks them; the end of a segment is its end of text."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if tokenizer.cls_token is None:
        tokenizer.add_special_tokens({"cls_token": START_TOKEN})
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    return Marks(
        tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id, ordinary
    )


# -------------------------------------------------------------------------------------------------------- the masks


def allowed(kind: Tensor, first: Tensor, length: Tensor, size: int) -> Tensor:
    """(batch, 1, size, size), true where a row's token may look at a column's; kind, first and length are (batch,).

    Padding is looked at by nobody but itself (a row with nothing to look at would be no number).
    """
    import torch

    place = torch.arange(size, device=kind.device)
    row, column = place[None, :, None], place[None, None, :]
    kind, first, length = (x[:, None, None] for x in (kind, first, length))  # (batch, 1, 1)
    behind, ahead = column <= row, column >= row
    see = (
        (kind == BIDIRECTIONAL)
        | ((kind == LEFT_TO_RIGHT) & behind)
        | ((kind == RIGHT_TO_LEFT) & ahead)
        # the first segment sees itself, the second also what is behind it
        | ((kind == SEQUENCE_TO_SEQUENCE) & ((column < first) | ((row >= first) & behind)))
    )
    return ((see & (column < length)) | (row == column))[:, None]


def as_bias(see: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """The form that the attention kernel takes: sdpa a truth value, plain products something to add."""
    import torch

    if attention == "sdpa":
        return see
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill(~see, torch.finfo(dtype).min)


# ------------------------------------------------------------------------------------------------- what is masked


def ngrams(maskable: np.ndarray, rate: float, longer: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(place, size) of what is masked: `rate` of the maskable places, one at a time, or with chance `longer` 2 or 3 in a row.

    Section 2.4: 80 % of the time one token, 20 % a bigram or a trigram. None overlap; the last is cut to what is left of
    the rate. maskable: (seq,) of truth values.
    """
    free = maskable.tolist()  # a list: one by one, its elements come faster than an array's
    left = max(1, round(rate * int(maskable.sum()))) if maskable.any() else 0
    found: list[tuple[int, int]] = []
    size = 0
    for place in rng.permutation(np.flatnonzero(maskable)).tolist():
        if left == 0:
            break
        if (
            size == 0
        ):  # drawn before its place, and kept until it fits, so that long ones are not fewer than they should
            size = int(rng.integers(2, 4)) if rng.random() < longer else 1
        size = min(size, left)
        if sum(free[place : place + size]) == size:
            found.append((place, size))
            free[place : place + size] = [False] * size
            left -= size
            size = 0
    return found


def replace(token: int, marks: Marks, rng: np.random.Generator) -> int:
    """What stands in a masked token's place: 80 % [MASK], 10 % a random token, 10 % itself."""
    chance = rng.random()
    if chance < 0.8:
        return marks.mask
    # what rng.choice(marks.ordinary) draws, in a third of its time
    return int(marks.ordinary[rng.integers(len(marks.ordinary))]) if chance < 0.9 else token


def masked(
    tokens: list[int], maskable: np.ndarray, rate: float, longer: float, marks: Marks, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """The tokens with some replaced, and the labels."""
    given, labels = list(tokens), [-100] * len(tokens)
    for place, size in ngrams(maskable, rate, longer, rng):
        for i in range(place, place + size):
            labels[i] = tokens[i]
            given[i] = replace(tokens[i], marks, rng)
    return given, labels


# ------------------------------------------------------------------------------------------------------- the samples


def pretraining_sample(
    block: Sequence[int], other: Sequence[int], marks: Marks, rng: np.random.Generator,
    rate: float = 0.15, longer: float = 0.2, kind: int | None = None,
) -> Sample:  # fmt: skip
    """A block of text under one of the four masks, drawn by SHARES where `kind` is None.

    One direction: one segment. Both others: two, cut from the block at a place between its quarters; under the
    bidirectional mask the second is, half of the time, that of `other`, and the model is asked which.
    """
    if kind is None:
        kind = int(rng.choice(len(KINDS), p=SHARES))
    block, is_next = list(block), -100
    if kind in (LEFT_TO_RIGHT, RIGHT_TO_LEFT):
        tokens = [marks.start, *block, marks.end]
        first = len(tokens)
    else:
        cut = int(rng.integers(len(block) // 4, len(block) - len(block) // 4)) if len(block) > 1 else 1
        second = block[cut:]
        if kind == BIDIRECTIONAL:
            is_next = int(rng.random() < 0.5)
            second = second if is_next else list(other[cut:])
        tokens = [marks.start, *block[:cut], marks.end, *second, marks.end]
        first = cut + 2
    maskable = ~np.isin(tokens, (marks.start, marks.end))
    given, labels = masked(tokens, maskable, rate, longer, marks, rng)
    return Sample(given, labels, first, kind, is_next)


def answer_sample(
    source: list[int], target: list[int], marks: Marks, rng: np.random.Generator, length: int, rate: float = 0.7
) -> Sample:
    """Fine-tuning to write (section 2.5): source and target as two segments, tokens masked in the target alone.

    The target's [EOS] may be masked too: so the model learns when to stop.
    """
    target = target[: length // 2]
    source = source[: length - len(target) - 3]
    tokens = [marks.start, *source, marks.end, *target, marks.end]
    first = len(source) + 2
    given, labels = masked(tokens, np.arange(len(tokens)) >= first, rate, 0.0, marks, rng)
    return Sample(given, labels, first, SEQUENCE_TO_SEQUENCE)


def batch_of(samples: Sequence[Sample], marks: Marks) -> dict[str, Tensor]:
    """Samples as the model takes them, padded at the end to the longest, to a multiple of PADDED_TO: (batch, seq)."""
    import torch

    size = -(-max(len(sample.tokens) for sample in samples) // PADDED_TO) * PADDED_TO

    def stack(rows: list[list[int]], filler: int) -> Tensor:
        # by way of numpy, which reads lists faster than torch does
        return torch.from_numpy(np.array([[*row, *[filler] * (size - len(row))] for row in rows], dtype=np.int64))

    segments = [[SEGMENTS[s.kind][0]] * s.first + [SEGMENTS[s.kind][1]] * (len(s.tokens) - s.first) for s in samples]
    return {
        "input_ids": stack([s.tokens for s in samples], marks.pad),
        "token_type_ids": stack(segments, 0),
        "kind": torch.tensor([s.kind for s in samples]),
        "first": torch.tensor([s.first for s in samples]),
        "length": torch.tensor([len(s.tokens) for s in samples]),
        "labels": stack([s.labels for s in samples], -100),
        "is_next": torch.tensor([s.is_next for s in samples]),
    }


# ------------------------------------------------------------------------------------------------------- writing


def write(
    model: Any, sources: Sequence[Sequence[int]], marks: Marks, tokens: int, bf16: bool = False
) -> list[list[int]]:
    """Greedy (section 2.5): a [MASK] is appended, what it predicts takes its place, until [EOS] or `tokens` of them."""
    import torch

    written: list[list[int]] = [[] for _ in sources]
    going = list(range(len(sources)))
    model.eval()
    for _ in range(tokens):
        samples = []
        for i in going:
            given = [marks.start, *sources[i], marks.end, *written[i], marks.mask]
            samples.append(Sample(given, [-100] * len(given), len(sources[i]) + 2, SEQUENCE_TO_SEQUENCE))
        batch = {name: value.to(model.device) for name, value in batch_of(samples, marks).items()}
        last = batch["length"] - 1
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            hidden = encode(model, **batch)  # (batch, seq, hidden)
            logits = model.cls.predictions(hidden[torch.arange(len(going), device=last.device), last])
        chosen = logits.argmax(-1).tolist()
        for i, token in zip(going, chosen, strict=True):
            if token != marks.end:
                written[i].append(token)
        going = [i for i, token in zip(going, chosen, strict=True) if token != marks.end]
        if not going:
            break
    return written


# --------------------------------------------------------------------------------------------------------- the model


def encode(
    model: Any,
    input_ids: Tensor,
    token_type_ids: Tensor,
    kind: Tensor,
    first: Tensor,
    length: Tensor,
    **_: Any,
) -> Tensor:
    """A BERT's last hidden states (batch, seq, hidden), each row of the batch under its own mask."""
    see = allowed(kind, first, length, input_ids.shape[1])
    bias = as_bias(see, model.config._attn_implementation, model.dtype)
    return model.bert(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=bias).last_hidden_state


def cloze_loss(model: Any, labels: Tensor, is_next: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """Cross-entropy of the masked tokens, plus that of the next-sentence question in the rows that are asked it.

    labels: (batch, seq), -100 where nothing is masked; is_next: (batch,), -100 where it is not asked.
    """
    from torch.nn import functional as F

    hidden = encode(model, **inputs)
    # filled up to a round number with the batch's first position, [SOS], which is never masked: tensors of many different
    # sizes would fragment the memory
    chosen = (labels.flatten() != -100).nonzero()[:, 0]
    chosen = F.pad(chosen, (0, -len(chosen) % 64))
    logits = model.cls.predictions(hidden.flatten(0, 1)[chosen]).float()  # (masked, vocabulary)
    loss = F.cross_entropy(logits, labels.flatten()[chosen])
    if is_next is not None and bool((is_next != -100).any()):
        asked = model.cls.seq_relationship(model.bert.pooler(hidden)).float()  # (batch, 2)
        loss = loss + F.cross_entropy(asked, is_next)
    return loss


def train_on_cloze(model: Any) -> None:
    """Make `model(**batch)` of a BertForPreTraining give `cloze_loss`; what it saves stays a plain BERT."""
    from transformers.modeling_outputs import MaskedLMOutput

    def forward(labels: Tensor, is_next: Tensor | None = None, **inputs: Tensor) -> Any:
        loss: Any = cloze_loss(model, labels, is_next, **inputs)
        return MaskedLMOutput(loss=loss)

    model.forward = forward
    model.accepts_loss_kwargs = False  # a micro-batch's mean, not a sum over all: the Trainer divides
    model.given_loss_by = train_on_cloze  # for sharding.whole_model's copy
