"""BART's five ways to corrupt a text; the decoder writes the whole text back.

    text                    A B C . D E .
    token masking           A _ C . _ E .      tokens chosen at random become a mask
    token deletion          A C . E .          or vanish: where something is missing must be found out too
    text infilling          A _ . D _ E .      a span becomes one mask, of a length drawn from Poisson(3); 0: a mask put in
    sentence permutation    D E . A B C .      the sentences in another order
    document rotation       C . D E . A B      the text begins at another token

Each has a pure function of the text and of what was drawn, which it takes as an argument; `corrupt` draws and composes.

Lewis et al. 2019, section 2.2 and figure 2, https://arxiv.org/abs/1910.13461
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Corruption = Literal["token_masking", "token_deletion", "text_infilling", "sentence_permutation", "document_rotation"]
KINDS: tuple[Corruption, ...] = (
    "token_masking", "token_deletion", "text_infilling", "sentence_permutation", "document_rotation",
)  # fmt: skip
MASK_TOKEN, START_TOKEN = "<|mask|>", "<|start|>"


class Marks(NamedTuple):
    """The tokens that the objective writes, and what it knows of the others."""

    start: int
    end: int
    mask: int
    pad: int
    stop: np.ndarray  # (vocabulary,) true of a token whose last character is a full stop
    space: np.ndarray  # (vocabulary,) true of a token that begins with white space


def add_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Give the tokenizer a mask and a start, where it lacks them; the end of a text is its end of text."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": START_TOKEN})
    shown = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    stop = np.array([text.rstrip().endswith(".") for text in shown])
    space = np.array([text[:1].isspace() for text in shown])
    return Marks(
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id, stop, space
    )


# ------------------------------------------------------------------------------------- what each does, once it is drawn


def mask_tokens(tokens: np.ndarray, chosen: np.ndarray, mask: int) -> np.ndarray:
    """Chosen tokens, (text,) true or false, become a mask."""
    return np.where(chosen, mask, tokens)


def delete_tokens(tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Chosen tokens vanish."""
    return tokens[~chosen]


def infill(tokens: np.ndarray, starts: Iterable[int], spans: Iterable[int], mask: int) -> np.ndarray:
    """Spans, in their order and apart, become one mask each; one of length 0 is a mask before the token at its start."""
    made: list[int] = []
    done = 0
    for start, span in zip(starts, spans, strict=True):
        made += [*tokens[done:start].tolist(), mask]
        done = start + span
    return np.array([*made, *tokens[done:].tolist()], dtype=tokens.dtype)


def sentence_starts(tokens: np.ndarray, marks: Marks) -> np.ndarray:
    """Where sentences begin: at 0, behind a full stop that white space follows, so that `os.path` is none, and behind the end
    of a text: a block holds several."""
    after_stop = marks.stop[tokens[:-1]] & marks.space[tokens[1:]]
    return np.concatenate([[0], np.flatnonzero(after_stop | (tokens[:-1] == marks.end)) + 1])


def permute(tokens: np.ndarray, starts: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The sentences that begin at `starts`, in the order given."""
    sentences = np.split(tokens, starts[1:])
    return np.concatenate([sentences[i] for i in order])


def unpermute(tokens: np.ndarray, starts: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The text that `permute` was given, with the same starts and order."""
    sizes = np.diff(np.append(starts, len(tokens)))
    moved = np.split(tokens, np.cumsum(sizes[list(order)])[:-1])
    return np.concatenate([moved[list(order).index(i)] for i in range(len(order))])


def rotate(tokens: np.ndarray, offset: int) -> np.ndarray:
    """The text from its token at `offset` on, then what was before it; `rotate(rotate(x, n), len(x) - n)` is x."""
    return np.concatenate([tokens[offset:], tokens[:offset]])


# ----------------------------------------------------------------------------------------------------------- the draws


def choose(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(size,) true at round(rate * size) places."""
    chosen = np.zeros(size, dtype=bool)
    chosen[rng.choice(size, round(rate * size), replace=False)] = True
    return chosen


def draw_spans(size: int, rate: float, mean: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the spans to fill in: (spans,) each.

    Lengths come from Poisson(mean) until they add up to round(rate * size), the last one cut to fit. Where they lie is drawn
    by putting spans and kept tokens in a row, every order equally likely. There are no more spans than tokens to be masked, so
    that a text never grows.
    """
    budget = round(rate * size)
    spans: list[int] = []
    left = budget
    while left > 0 and len(spans) < budget:
        spans.append(min(int(rng.poisson(mean)), left))
        left -= spans[-1]
    lengths = rng.permutation(np.array(spans, dtype=int))  # the one that was cut may come anywhere
    kept = size - int(lengths.sum())
    places = np.sort(
        rng.choice(kept + len(lengths), len(lengths), replace=False)
    )  # in the row of spans and kept tokens
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    return places - np.arange(len(lengths)) + before, lengths


def corrupt(
    tokens: np.ndarray,
    kinds: Sequence[Corruption],
    marks: Marks,
    rng: np.random.Generator,
    rate: float = 0.3,
    mean_span: float = 3.0,
) -> np.ndarray:
    """The text after these corruptions, one after the other."""
    for kind in kinds:
        size = len(tokens)
        if kind == "token_masking":
            tokens = mask_tokens(tokens, choose(size, rate, rng), marks.mask)
        elif kind == "token_deletion":
            tokens = delete_tokens(tokens, choose(size, rate, rng))
        elif kind == "text_infilling":
            tokens = infill(tokens, *draw_spans(size, rate, mean_span, rng), marks.mask)
        elif kind == "sentence_permutation":
            starts = sentence_starts(tokens, marks)
            tokens = permute(tokens, starts, rng.permutation(len(starts)).tolist())
        elif size:  # all of a short text may have been deleted
            tokens = rotate(tokens, int(rng.integers(size)))
    return tokens
