"""BERT's two objectives as pure functions: words hidden in a text, and a second text that follows the first or does not.

    text:     the  man  went  to  the  store          words:   0  1  2  3  4  5
    chosen:              ^                 ^          15 % of the tokens
    input:    the  man [MASK]  to  the  pen           80 % [MASK], 10 % a random token, 10 % the token itself
    labels:    .    .   went   .    .  store          the loss is on the chosen tokens alone

    [CLS] A ... [SEP] B ... [SEP]                     B follows A in the document (0), or is another's (1)
      0   0      0    1      1                        segment ids

Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that the loss leaves out
FOLLOWS, ANOTHER = 0, 1  # next_sentence_label


def add_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer [CLS], [SEP] and [MASK] where it lacks them, and BERT's form of one text or two."""
    from tokenizers.processors import TemplateProcessing

    wanted = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer.add_special_tokens({name: mark for name, mark in wanted.items() if getattr(tokenizer, name) is None})
    first, end = str(tokenizer.cls_token), str(tokenizer.sep_token)
    engine: Any = tokenizer
    engine.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {end}",
        pair=f"{first} $A {end} $B:1 {end}:1",
        special_tokens=[(first, tokenizer.cls_token_id), (end, tokenizer.sep_token_id)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # what save_pretrained writes


def choose(words: Sequence[int], rate: float, whole_words: bool, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions to predict, sorted: round(rate * n) of the n tokens, at least one.

    words: (n,) the number of the word that each token is part of. With `whole_words` a word is taken with all its tokens,
    in random order, unless that would exceed the number; so a few may be missing to it.
    """
    wanted = max(1, round(rate * len(words)))
    if not whole_words:
        return np.sort(rng.permutation(len(words))[:wanted])
    numbers = np.asarray(words)
    chosen: list[int] = []
    for word in rng.permutation(np.unique(numbers)):
        positions = np.flatnonzero(numbers == word)
        if len(chosen) + len(positions) <= wanted:
            chosen += positions.tolist()
        if len(chosen) == wanted:
            break
    if not chosen:  # every word is longer than that
        chosen = [int(rng.integers(len(words)))]
    return np.sort(np.asarray(chosen))


def hide(
    ids: Sequence[int], chosen: NDArray[np.int64], mask: int, plain: NDArray[np.int64], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Inputs and labels, (n,) each: of the chosen tokens 80 % become the mask, 10 % one of the `plain` tokens, 10 % stay."""
    inputs, labels = list(ids), [IGNORED] * len(ids)
    for position, draw in zip(chosen.tolist(), rng.random(len(chosen)), strict=True):
        labels[position] = inputs[position]
        if draw < 0.8:
            inputs[position] = mask
        elif draw < 0.9:
            # what rng.choice(plain) draws, in a third of its time
            inputs[position] = int(plain[rng.integers(len(plain))])
    return inputs, labels


def segments(
    block: Sequence[Any], other: Sequence[Any], rng: np.random.Generator
) -> tuple[Sequence[Any], Sequence[Any], int]:
    """A, B and whether B follows A: a block is cut in two, at a quarter to three quarters; half the time B is of `other`.

    `other` is from another document; as much of it is taken as the block's own second part would have had.
    """
    cut = int(rng.integers(max(1, len(block) // 4), max(2, 3 * len(block) // 4)))
    if rng.random() < 0.5:
        return block[:cut], block[cut:], FOLLOWS
    return block[:cut], other[: len(block) - cut], ANOTHER


def of_another_document(row: dict[str, Any], rows: Any, rng: np.random.Generator) -> dict[str, Any]:
    """One of `rows`, drawn at random, that is not of the row's own `document`; there must be one."""
    while (other := rows[int(rng.integers(len(rows)))])["document"] == row["document"]:
        pass
    return other  # type: ignore[no-any-return]


def sample(
    block: tuple[Sequence[int], Sequence[int]],
    other: tuple[Sequence[int], Sequence[int]],
    tokenizer: Any,
    plain: NDArray[np.int64],
    rate: float,
    whole_words: bool,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One row of both objectives: input_ids, token_type_ids, labels (lists as long as the row), next_sentence_label.

    block, other: (token ids, word numbers), as long as each other. The marks are never chosen.
    """
    a, b, label = segments(list(zip(*block, strict=True)), list(zip(*other, strict=True)), rng)
    pieces = {"input_ids": [int(tokenizer.cls_token_id)], "token_type_ids": [0], "labels": [IGNORED]}
    texts = [*a, *b]
    numbers = [word for _, word in a] + [-1 - word for _, word in b]  # a word of B is none of A's
    chosen = choose(numbers, rate, whole_words, rng)
    inputs, labels = hide([token for token, _ in texts], chosen, int(tokenizer.mask_token_id), plain, rng)
    for segment, part in enumerate((slice(0, len(a)), slice(len(a), None))):
        pieces["input_ids"] += [*inputs[part], int(tokenizer.sep_token_id)]
        pieces["labels"] += [*labels[part], IGNORED]
        pieces["token_type_ids"] += [segment] * (len(inputs[part]) + 1)
    return {**pieces, "next_sentence_label": label}
