"""Packing: documents of any length into blocks of one length, so that no step is spent on padding.

    documents:  [a a a a a END] [b b END] [c c c c END]        block length 6
    blocks:     [a a a a a END] [b b END c c c] ...            the last, short block is dropped

With `mask_documents`, `position_ids` start again at 0 in each document, and transformers builds from them the mask that
keeps a token from seeing the document before it (masking_utils.find_packed_sequence_indices).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from recipes.common.chat import encode_plain
from recipes.common.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pack_texts(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, length: int, *, mask_documents: bool = False
) -> Dataset | IterableDataset:
    """Rows of {"text"} to rows of {"input_ids": (length,)} (and "position_ids"), each document ended by the eos token.

    Documents are joined within batches of 1,000, so the loss at the seams is one short block a batch. Raises UserError
    for less text than one block, and as `refuse_special_tokens_alone`.
    """
    import numpy as np

    end = tokenizer.eos_token_id

    def pack(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = encode_plain(tokenizer, batch["text"])
        ids = np.concatenate([np.asarray([*document, end], dtype=np.int32) for document in encoded])
        whole = len(ids) // length * length
        rows: dict[str, Any] = {"input_ids": list(ids[:whole].reshape(-1, length))}
        if mask_documents:
            positions = np.concatenate([np.arange(len(document) + 1, dtype=np.int32) for document in encoded])
            positions = positions[:whole].reshape(-1, length)
            # a block that starts inside a document counts from its own start: positions stay below the model's maximum
            offset = positions[:, :1] * (np.cumsum(positions == 0, axis=1) == 0)
            rows["position_ids"] = list(positions - offset)
        return rows

    columns = dataset.column_names or ["text"]
    options: dict[str, Any] = {"batched": True, "batch_size": 1000, "remove_columns": columns}
    packed = dataset.map(pack, **options)
    if hasattr(packed, "__len__") and len(packed) == 0:
        raise UserError(
            f"data: a text is shorter than one block of {length} tokens: give more text, or a smaller block length"
        )
    refuse_special_tokens_alone(packed, tokenizer)
    return packed


def check_lengths(lengths: dict[str, int], model: PreTrainedModel) -> None:
    """Raise UserError for samples of more tokens than the model has positions, or of too few to learn from. lengths: by config key."""
    positions = getattr(model.config, "max_position_embeddings", None)
    problems = [
        f"{name} is {length}, but the model has {positions} positions (model.config.max_position_embeddings): lower the one, "
        "or raise the other"
        for name, length in lengths.items()
        if positions is not None and length > positions
    ]
    problems += [
        f"{name} is {length} tokens, too short: use 8 at least" for name, length in lengths.items() if length < 8
    ]
    if problems:
        raise UserError(problems)


def stacked(rows: Iterable[dict[str, Any]], column: str = "input_ids") -> Tensor:
    """Blocks as one tensor, (rows, length). A stream has them as arrays, which torch.tensor would read number by number."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([row[column] for row in rows])).long()


def refuse_special_tokens_alone(blocks: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the first 32 blocks of text hold special tokens alone, such as <|unk|>: there is nothing to learn."""
    special = set(tokenizer.all_special_ids)
    found = {token for block in itertools.islice(blocks, 32) for token in block["input_ids"]}
    if found and found <= special:
        shown = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found)))
        raise UserError(
            f"data: the first blocks of text hold special tokens alone ({shown}), so there is nothing to learn: the tokenizer "
            "does not know the text's characters; train one on it (`make tokenizer`), or give another model.tokenizer"
        )
