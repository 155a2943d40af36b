"""GLM's corruption: spans are cut out of a text, a mask left in each one's place, and the spans written behind it.

    text           x1 x2 x3 x4 x5 x6          spans [x3], [x5 x6], in the order 2, 1 (the paper's figure 2)

    tokens         x1 x2 M  x4 M | S  x5 x6 S  x3      Part A | Part B
    positions      1  2  3  4  5 | 5  5  5  3  3       where it is, or where its span's mask is
    span positions 0  0  0  0  0 | 1  2  3  1  2       where it is within its span
    labels         .  .  .  .  . | x5 x6 E  x3 E       what each token of Part B predicts

Three kinds of spans share this form and the one mask token: short ones (token), whole sentences (sentence), and one span
of at least half of the text (document). Here positions count from 0, as tables do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from recipes.common.modeling_blank_infilling import BlankInfillingModel

MASK_TOKEN, START_TOKEN, STOP_TOKEN = "<|mask|>", "<|start|>", "<|stop|>"
OBJECTIVES = ("token", "sentence", "document")
Span = tuple[int, int]  # first token, and one past the last


class Marks(NamedTuple):
    """The ids of the three tokens that the objective adds, and of padding."""

    mask: int  # [MASK]: in Part A, in place of a span
    start: int  # [START]: opens a span in Part B
    stop: int  # [END]: what a span's last token predicts
    pad: int


class Infilling(NamedTuple):
    """One sample, as in the picture above; the lists are of one length."""

    tokens: list[int]
    positions: list[int]
    span_positions: list[int]
    labels: list[int]  # -100 in Part A
    context_length: int  # tokens of Part A


class SentenceMarks(NamedTuple):
    """What a token's text says about sentences; each (vocabulary,)."""

    ends: np.ndarray  # 2: ends one; 1: ends one if white space follows
    opens: np.ndarray  # begins with white space
    blank: np.ndarray  # is white space alone


def add_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Give the tokenizer the mask, the start and the stop of a span, where it lacks them.

    The stop is not the tokenizer's end of text: a span that is cut from packed documents may hold that one.
    """
    from tokenizers import AddedToken

    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    tokenizer.add_tokens([AddedToken(name, special=True) for name in (START_TOKEN, STOP_TOKEN)], special_tokens=True)
    ids = tokenizer.get_vocab()
    return Marks(tokenizer.mask_token_id, ids[START_TOKEN], ids[STOP_TOKEN], tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------------ which spans


def token_spans(length: int, rate: float, mean: float, rng: np.random.Generator) -> list[Span]:
    """Spans of Poisson(mean) tokens, drawn until at least `rate` of the text is covered (section 2.1), in text order.

    A draw of zero is drawn again: there would be nothing to predict. At least one token stands between two spans; all such
    placements are equally likely.
    """
    lengths: list[int] = []
    while sum(lengths) < rate * length:
        room = length - sum(lengths) - len(lengths)  # a short text: with a token between neighbours, no more fits
        if room < 1:
            break
        if drawn := int(rng.poisson(mean)):
            lengths.append(min(drawn, room))
    rng.shuffle(lengths)  # the last drawn, which crossed the rate, is longer than most: it must not always stand last
    free = length - sum(lengths) - (len(lengths) - 1)  # tokens left over once every gap has its one
    before = np.sort(rng.choice(free + len(lengths), len(lengths), replace=False)) - np.arange(len(lengths))
    starts = before + np.arange(len(lengths)) + np.cumsum([0, *lengths[:-1]])
    return [(int(start), int(start) + size) for start, size in zip(starts, lengths, strict=True)]


def sentence_marks(tokenizer: PreTrainedTokenizerBase) -> SentenceMarks:
    """Look at the text of every token once."""
    texts = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    sure, likely = re.compile("[。！？]$|\n"), re.compile("[.!?]$")
    ends = [2 if sure.search(text) else int(bool(likely.search(text))) for text in texts]
    ends[tokenizer.eos_token_id] = 2
    return SentenceMarks(
        np.array(ends, dtype=np.int8),
        np.array([t[:1].isspace() for t in texts]),
        np.array([t.isspace() for t in texts]),
    )


def sentences(ids: Sequence[int], marks: SentenceMarks) -> list[Span]:
    """The text cut into sentences: after . ! or ? before white space, and at line ends (a line of code is one).

    White space belongs to the sentence before it.
    """
    starts, ended = [0], False
    for i, token in enumerate(ids):
        if ended and not marks.blank[token]:
            starts.append(i)
            ended = False
        sure = marks.ends[token]
        ended |= bool(sure == 2 or (sure == 1 and i + 1 < len(ids) and marks.opens[ids[i + 1]]))
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))


def sentence_spans(whole: list[Span], rate: float, rng: np.random.Generator) -> list[Span]:
    """Sentences drawn until they cover at least `rate` of the text (section 2.2), in text order."""
    chosen: list[Span] = []
    for i in rng.permutation(len(whole)):
        chosen.append(whole[i])
        if sum(stop - start for start, stop in chosen) >= rate * whole[-1][1]:
            break
    return sorted(chosen)


def document_span(length: int, shortest: float, rng: np.random.Generator) -> list[Span]:
    """One span, its length uniform over `shortest` to all of the text (section 2.2), its place uniform."""
    size = int(rng.integers(max(1, int(np.ceil(shortest * length))), length + 1))
    start = int(rng.integers(0, length - size + 1))
    return [(start, start + size)]


# ------------------------------------------------------------------------------------------------------ the sample


def infill(ids: Sequence[int], spans: Sequence[Span], order: Sequence[int], marks: Marks) -> Infilling:
    """The sample for spans given in text order, written in Part B in `order`. Its length is len(ids) + 2 len(spans)."""
    context: list[int] = []
    masks: list[int] = []  # where in Part A each span's mask is
    done = 0
    for start, stop in spans:
        context += ids[done:start]
        masks.append(len(context))
        context.append(marks.mask)
        done = stop
    context += ids[done:]
    tokens, labels = list(context), [-100] * len(context)
    positions, within = list(range(len(context))), [0] * len(context)
    for i in order:
        span = list(ids[slice(*spans[i])])
        tokens += [marks.start, *span]
        labels += [*span, marks.stop]
        positions += [masks[i]] * (len(span) + 1)
        within += range(1, len(span) + 2)
    return Infilling(tokens, positions, within, labels, len(context))


def rebuild(sample: Infilling, marks: Marks) -> list[int]:
    """The text that a sample was made of: each span back in its mask's place. Undoes `infill`."""
    spans: dict[int, list[int]] = {}
    for i in range(sample.context_length, len(sample.tokens)):
        span = spans.setdefault(sample.positions[i], [])
        if sample.tokens[i] != marks.start or sample.span_positions[i] != 1:
            span.append(sample.tokens[i])
    pieces = [spans.get(i, [token]) for i, token in enumerate(sample.tokens[: sample.context_length])]
    return [token for piece in pieces for token in piece]


class Corrupter:
    """Draws a sample from a text: the objective by `mix`, its spans, and their order in Part B."""

    def __init__(
        self,
        marks: Marks,
        sentence_marks: SentenceMarks,
        mix: dict[str, float],
        mask_rate: float = 0.15,
        mean_span: float = 3.0,
        shortest_document: float = 0.5,
    ):
        self.marks, self.sentence_marks = marks, sentence_marks
        self.shares = np.array([mix.get(name, 0.0) for name in OBJECTIVES]) / sum(mix.values())
        self.mask_rate, self.mean_span, self.shortest_document = mask_rate, mean_span, shortest_document

    def __call__(self, ids: Sequence[int], rng: np.random.Generator, objective: str | None = None) -> Infilling:
        """`objective`: one of OBJECTIVES; drawn by the mix where None."""
        ids = list(ids)
        objective = objective or OBJECTIVES[int(rng.choice(len(OBJECTIVES), p=self.shares))]
        if objective == "token":
            spans = token_spans(len(ids), self.mask_rate, self.mean_span, rng)
        elif objective == "sentence":
            spans = sentence_spans(sentences(ids, self.sentence_marks), self.mask_rate, rng)
        else:
            spans = document_span(len(ids), self.shortest_document, rng)
        return infill(ids, spans, rng.permutation(len(spans)).tolist(), self.marks)


def check_mix(mix: dict[str, float]) -> None:
    """Raise UserError unless the mix names objectives that exist, with shares that can be drawn from."""
    unknown = sorted(set(mix) - set(OBJECTIVES))
    if unknown or not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise UserError(
            f"glm.mix: {mix}: shares of {', '.join(OBJECTIVES)}, none below 0 and one at least above, "
            "such as {token: 0.5, sentence: 0.25, document: 0.25}"
        )


def batch_of(samples: Sequence[Infilling], pad: int) -> dict[str, Tensor]:
    """Samples as the model takes them, padded at the end to the longest, to a multiple of 16: (batch, seq)."""
    import torch

    longest = -(-max(len(sample.tokens) for sample in samples) // 16) * 16

    def stack(name: str, filler: int) -> Any:
        rows = [getattr(sample, name) for sample in samples]
        # by way of numpy, which reads lists faster than torch does
        return torch.from_numpy(np.array([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=np.int64))

    return {
        "input_ids": stack("tokens", pad),
        "position_ids": stack("positions", 0),
        "span_position_ids": stack("span_positions", 0),
        "context_length": torch.tensor([sample.context_length for sample in samples]),
        "labels": stack("labels", -100),
    }


# ------------------------------------------------------------------------------------------- a blank at the end


def answer_batch(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], marks: Marks, length: int
) -> dict[str, Tensor]:
    """Conditional generation (section 2.3): a source with a mask at its end, the target as the span that was there.

    A sample has `length` tokens at most: a target takes half of them at most, a source what is left.
    """
    samples = []
    for source, target in zip(sources, targets, strict=True):
        target = target[: length // 2]
        source = source[: length - len(target) - 2]
        samples.append(infill([*source, *target], [(len(source), len(source) + len(target))], [0], marks))
    return batch_of(samples, marks.pad)


def write(
    model: BlankInfillingModel, sources: Sequence[Sequence[int]], marks: Marks, tokens: int, bf16: bool = False
) -> list[list[int]]:
    """Fill one blank at the end of each source, greedily, up to its stop token or `tokens` of it."""
    import torch

    written: list[list[int]] = [[] for _ in sources]
    going = list(range(len(sources)))
    model.eval()
    for _ in range(tokens):
        samples = [
            infill([*sources[i], *written[i]], [(len(sources[i]), len(sources[i]) + len(written[i]))], [0], marks)
            for i in going
        ]
        batch = {name: value.to(model.device) for name, value in batch_of(samples, marks.pad).items()}
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**{**batch, "labels": None}).logits  # (batch, seq, vocabulary)
        last = torch.tensor([len(sample.tokens) - 1 for sample in samples], device=logits.device)
        chosen = logits[torch.arange(len(going), device=logits.device), last].argmax(-1).tolist()
        for i, token in zip(going, chosen, strict=True):
            if token != marks.stop:
                written[i].append(token)
        going = [i for i, token in zip(going, chosen, strict=True) if token != marks.stop]
        if not going:
            break
    return written
