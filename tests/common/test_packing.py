"""Blocks of one length, and texts that give none worth learning."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_chat import make_tokenizer

from recipes.common.errors import UserError
from recipes.common.packing import refuse_special_tokens_alone


def test_texts_of_special_tokens_alone_are_refused() -> None:
    tokenizer = make_tokenizer()
    end, letter = tokenizer.eos_token_id, tokenizer("a", add_special_tokens=False)["input_ids"][0]
    blank: list[dict[str, Any]] = [{"input_ids": [end] * 4}] * 40
    with pytest.raises(UserError, match=r"special tokens alone \(<\|end\|>\).*make tokenizer"):
        refuse_special_tokens_alone(blank, tokenizer)
    refuse_special_tokens_alone([*blank[:8], {"input_ids": [end, letter]}], tokenizer)
    refuse_special_tokens_alone([], tokenizer)  # a stream that is empty is another error's matter
