"""T5's objective: spans of the text are cut out, and the decoder writes what was in them.

    text      Thank you for inviting me to your party last week
    noise                x-----------x                  x--x
    inputs    Thank you <0> me to your party <1> week <end>
    targets   <0> for inviting <1> last <2> <end>            <0>, <1>, ... are sentinels, new at each place of one text

Inputs and targets together are the text again: `rebuild`. How many tokens are cut, and into how many spans, depends on the
length alone, so every sample of one length gives inputs and targets of one length: no padding.

Raffel et al. 2020, sections 3.1.4 and 3.3.4, and the lengths as its code works them out (random_spans_helper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINELS = 100  # as many as T5's vocabulary has


class Lengths(NamedTuple):
    """What a text of some length becomes, in tokens."""

    noise: int  # tokens cut out
    spans: int  # in so many pieces
    inputs: int  # what stays, a sentinel for each span, and the end
    targets: int  # what was cut out, the same sentinels, and the end


def lengths(text: int, rate: float, mean_span: float) -> Lengths:
    """Of a text of `text` tokens. Raises UserError if it is too short to lose a span and keep something before it."""
    if text < 2:
        raise UserError(f"a text of {text} token(s) is too short for a span to be cut out of it: give 2 at least")
    noise = min(max(round(text * rate), 1), text - 1)
    spans = min(max(round(noise / mean_span), 1), noise, text - noise)
    return Lengths(noise, spans, text - noise + spans + 1, noise + spans + 1)


def longest_text(inputs: int, rate: float, mean_span: float) -> int:
    """Tokens of text that become at most `inputs` tokens of inputs: 568 for 512, at 15 % and 3."""
    text = inputs
    while lengths(text + 1, rate, mean_span).inputs <= inputs:
        text += 1
    while text > 2 and lengths(text, rate, mean_span).inputs > inputs:
        text -= 1
    return text


def pieces(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A sum of `parts` positive numbers that makes `total`, each such sum equally likely: (parts,)."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def noise_mask(text: int, rate: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """(text,) true where a token is cut out: kept and cut pieces by turns, a kept one first and a cut one last."""
    wanted = lengths(text, rate, mean_span)
    runs = np.empty(2 * wanted.spans, dtype=int)
    runs[::2] = pieces(text - wanted.noise, wanted.spans, rng)
    runs[1::2] = pieces(wanted.noise, wanted.spans, rng)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def corrupt(tokens: np.ndarray, noise: np.ndarray, sentinels: Sequence[int], end: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets: in the one, each cut piece is a sentinel; in the other, each piece that stayed and is not first.

    A piece that stays at the very end of the text is a sentinel of the targets too, as in the paper's figure 2.
    """
    begins = noise & ~np.concatenate([[False], noise[:-1]])  # (text,) first token of a cut piece
    number = np.cumsum(begins)  # of the piece that a token is in or behind, from 1
    marks = np.asarray(sentinels)
    if number[-1] + (not noise[-1]) > len(marks):
        raise UserError(f"{number[-1]} spans need as many sentinels, and the tokenizer has {len(marks)}")
    inputs = np.where(begins, marks[number - 1], tokens)[~noise | begins]
    places = np.flatnonzero(begins)
    targets = np.insert(tokens, places, marks[: len(places)])[np.insert(noise, places, True)]
    closing = [] if noise[-1] else [marks[number[-1]]]
    return np.append(inputs, end), np.concatenate([targets, closing, [end]]).astype(tokens.dtype)


def rebuild(inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int]) -> list[int]:
    """The text that inputs and targets, without their end, were made of."""
    marks = set(sentinels)
    cut: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets[:-1].tolist():
        if token in marks:
            current = cut.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs[:-1].tolist() for t in (cut[token] if token in marks else [token])]


def add_sentinels(tokenizer: PreTrainedTokenizerBase, count: int = SENTINELS) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., T5's names; the tokenizer gets those that it lacks."""
    names = [f"<extra_id_{i}>" for i in range(count)]
    known = tokenizer.get_vocab()
    missing = [name for name in names if name not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    known = tokenizer.get_vocab()
    return [known[name] for name in names]
