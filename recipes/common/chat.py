"""The special tokens and the chat template of every tokenizer that this repository trains.

    <|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>4<|end|>
                                                              ^^^^^^^^  what an assistant-only loss learns

One stop token, `<|end|>`, ends documents in pretraining and turns in a conversation: a model that has learned to stop
in one place knows how to stop in the other. There is no begin token: a document starts after the `<|end|>` before it.

Control tokens come from the template or from their id, never from text. Two doors, both closed here:

- plain text: a tokenizer finds special tokens inside text by default. `encode_plain` (or `split_special_tokens=True` in
  any tokenizer call) reads `<|end|>` in a document as seven ordinary characters. Pretraining data goes through it.
- conversations: the template's own output must be parsed for control tokens, so there it is the content that is made
  harmless: the template writes a zero-width space after the `<` of a control token that stands inside a message.
  People see the same text; the model sees no forged turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<|pad|>"  # id 0: fills a batch, never learned from
END_TOKEN = "<|end|>"  # id 1: ends a document and every turn; the eos token that generation stops at
UNK_TOKEN = "<|unk|>"  # only for models that cannot spell every text (WordPiece, Unigram)
ROLES = ("system", "user", "assistant", "tool")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
SPECIAL_TOKENS = (PAD_TOKEN, END_TOKEN, *ROLE_TOKENS)  # ids 0 to 5, in this order


def special_tokens(unk: bool = False) -> list[str]:
    """The special tokens in the order of their ids; with `unk`, `<|unk|>` comes third."""
    return [PAD_TOKEN, END_TOKEN, *([UNK_TOKEN] if unk else []), *ROLE_TOKENS]


_HARMLESS = "".join(f"|replace('{token}', '<\\u200b{token[1:]}')" for token in special_tokens(unk=True))

CHAT_TEMPLATE = (
    # Written without line breaks between tags: every character outside a tag would be rendered.
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role \"' ~ message['role'] ~ '\": use system, user, assistant or tool') -}}"
    "{%- endif -%}"
    "{%- if message['content'] is not string -%}"
    "{{- raise_exception('the content of a ' ~ message['role'] ~ ' message must be a text') -}}"
    "{%- endif -%}"
    f"{{%- set content = message['content']{_HARMLESS} -%}}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- content ~ '<|end|>' -}}{% endgeneration %}"
    "{%- else -%}"
    "{{- content ~ '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def add_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer our chat template. Raises UserError if it lacks one of the tokens that the template writes."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (END_TOKEN, *ROLE_TOKENS) if token not in vocabulary]
    if missing:
        raise UserError(
            f"the tokenizer has no {', '.join(missing)}, which the chat template writes: "
            "train one with `make tokenizer`, or give the model's own template in model.chat_template"
        )
    tokenizer.chat_template = CHAT_TEMPLATE


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, where text that looks like a control token is ordinary text. Adds no special token."""
    if not texts:
        return []
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
