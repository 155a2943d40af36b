"""Virtual tokens: ids that stand in a row as any other token does, whose vectors are learned and that mean no word.

    row     <|prompt 0|> ... <|prompt 7|> <|user|> 2 + 2 ? <|end|> <|assistant|> 4 <|end|>
    vector      p_0      ...     p_7        E[..]  E[2] ...                                 E frozen, p learned

The tokenizer writes them where a template says: in the chat template for conversations, around the text for the other
tasks. The embedding layer gives p for them. Masks, positions, padding on either side, packing and the cache treat them
as the tokens that they are, and so need no care. They are never answers: no loss is on them, and the output layer has no
row for them (or one that no word uses, where it is longer than the tokenizer).
An adapter's own tokenizer is saved beside it: it is what puts the virtual tokens into a row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

    from recipes.common.adaptation import Task

NAMED = "<|prompt {}|>"
OPENING = "<|prompt"  # what a text may not hold as it is
HARMLESS = "<\u200b|prompt"  # what it holds instead: people see the same
PLACES = re.compile(r"\{v\*(\d+)\}")


@dataclass(frozen=True)
class Template:
    """What stands before and behind a text: virtual tokens by their names, and words (anchors)."""

    before: str
    behind: str
    tokens: int
    pair: str | None = None  # what stands between the two texts where the template has {text_pair}

    def fill(self, text: str, pair: str | None = None) -> str:
        """The text, or the two texts, in their places."""
        middle = harmless(text) if self.pair is None else harmless(text) + self.pair + harmless(pair or "")
        return self.before + middle + self.behind


def harmless(text: str) -> str:
    """The text, in which nothing can be taken for a virtual token."""
    return text.replace(OPENING, HARMLESS)


def read_template(text: str, where: str) -> Template:
    """`{v*4}{text}{v*4} Answer:` -> the virtual tokens 0 to 3, the text, 4 to 7, an anchor. Raises UserError if it is none."""
    count = 0

    def names(match: re.Match[str]) -> str:
        nonlocal count
        first, count = count, count + int(match[1])
        return "".join(NAMED.format(i) for i in range(first, count))

    written = PLACES.sub(names, text)
    before, found, rest = written.partition("{text}")
    between, pair, behind = rest.partition("{text_pair}")
    left = re.findall(r"\{[^}]*\}", before + rest.replace("{text_pair}", "", 1))
    if not found or left:
        raise UserError(
            f"{where}: {text!r} is no template"
            + (f" ({left[0]} is not known)" if left else "")
            + ": give {text} once, {text_pair} behind it where rows have two texts, and {v*n} for n virtual tokens"
        )
    if count == 0:
        raise UserError(f"{where}: {text!r} has no virtual token; {{v*8}} is eight of them")
    return Template(before, behind, count, between) if pair else Template(before, between, count)


# ------------------------------------------------------------------------------------------ into the tokenizer and rows


def place(task: Task, template: Template, args: SFTConfig, *, in_front: bool = False) -> int:
    """Teach the tokenizer the virtual tokens, and put them around the user's words, or the text; gives the first id.

    in_front: before the whole conversation, and not before each of the user's turns.
    """
    from tokenizers import AddedToken

    tokenizer = task.tokenizer
    # not special: where rows are read with split_special_tokens, these are still tokens
    tokenizer.add_tokens([AddedToken(NAMED.format(i), special=False, normalized=False) for i in range(template.tokens)])
    if task.type == "CAUSAL_LM":
        tokenizer.chat_template = _chat_template(tokenizer, template, args, in_front)
    else:
        place_in_rows(task, template, args)
    return int(tokenizer.convert_tokens_to_ids(NAMED.format(0)))  # type: ignore[arg-type]


def check_type(task_type: str, section: str) -> None:
    """Raise UserError for tags of words: a row of words has no place for a template."""
    if task_type == "TOKEN_CLS":
        raise UserError(
            f"{section}.task_type: TOKEN_CLS tells a tag for each word, and virtual tokens are none: p_tuning_v2 does it"
        )


def place_in_rows(task: Task, template: Template, args: SFTConfig) -> None:
    """The rows of text of a task, with the template around them.

    Texts are cut first, the longer of two, where the whole would be longer than a row may be: cut afterwards, a row would
    lose the virtual tokens behind its text.
    """
    from recipes.common.adaptation import encode_texts, longest_row
    from recipes.common.chat import encode_plain

    longest, written = longest_row(task, args), task.type == "SEQ_2_SEQ_LM"

    def placed(text: str, pair: str | None) -> tuple[str, str | None]:
        if template.pair is not None:
            return template.fill(text, pair), None
        return template.fill(text), None if pair is None else harmless(pair)

    def length(text: str, pair: str | None) -> int:
        if written:
            return len(encode_plain(task.tokenizer, [text])[0]) + 1  # its end
        return len(encode_texts(task, [text], [pair])["input_ids"][0])

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        texts = [row["source"], None] if written else [row["text"], row["text_pair"]]
        while (over := length(*(filled := placed(*texts))) - longest) > 0 and any(texts):
            tokens = [len(ids) for ids in encode_plain(task.tokenizer, [text or "" for text in texts])]
            longer = int(tokens[1] > tokens[0])
            fewer = max((over + 1) // 2, tokens[longer] - tokens[1 - longer])
            texts[longer] = first_tokens(task.tokenizer, texts[longer], tokens[longer] - min(over, fewer))
        return {"source": filled[0]} if written else {"text": filled[0], "text_pair": filled[1]}

    task.data = task.data.map(fill)


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The part of the text that its first `count` tokens stand for, in whole characters: a token may be a part of one."""
    if count <= 0:
        return ""
    told = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    places = told["offset_mapping"]
    return text if count >= len(places) else text[: min(places[count - 1][1], places[count][0])]


def _chat_template(tokenizer: PreTrainedTokenizerBase, template: Template, args: SFTConfig, in_front: bool) -> str:
    """The tokenizer's own chat template, which gets the messages with the virtual tokens in them."""
    from recipes.common.sft_packing import training_template

    if template.pair is not None:
        raise UserError("the template has {text_pair}, and a conversation has one text: what the user says")
    if not args.assistant_only_loss:
        raise UserError(
            "training.assistant_only_loss: false would have the model predict virtual tokens, which are no words: set it "
            "to true"
        )
    # of the families that TRL knows, the form that marks the assistant's words: it looks it up by the exact text
    own = training_template(tokenizer, args) or str(tokenizer.chat_template)
    before, behind = json.dumps(template.before), json.dumps(template.behind)
    front, around = (before, '""') if in_front else ('""', before)
    rewritten = (
        "{%- set placed = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        f"{{%- set text = message['content']|replace('{OPENING}', '{HARMLESS}') -%}}"
        f"{{%- if message['role'] == 'user' -%}}{{%- set text = {around} ~ text ~ {behind} -%}}{{%- endif -%}}"
        "{%- set placed.messages = placed.messages + [dict(message, content=text)] -%}"
        "{%- endfor -%}"
        "{%- set messages = placed.messages -%}"
    )
    return rewritten + f"{{{{- {front} -}}}}" + own


# ------------------------------------------------------------------------------------------------------ into the model


def put_in(model: PreTrainedModel, encoder: nn.Module, tokens: int, first_id: int) -> None:
    """Let the embedding layers give what `encoder` makes for the ids from `first_id` on; it becomes `model.prompt`."""
    import torch

    from recipes.common.prompt_encoder import Prompt, check_room

    check_room(model, tokens)
    prompt = Prompt(encoder, tokens)
    prompt.last_id = first_id + tokens - 1
    model.add_module("prompt", prompt)
    table = model.get_input_embeddings().weight
    for layer in list(model.modules()):  # an encoder-decoder has several over one table
        if isinstance(layer, torch.nn.Embedding) and layer.weight is table:
            _give_vectors(layer, prompt, first_id)


def _give_vectors(layer: nn.Embedding, prompt: Any, first_id: int) -> None:
    import torch

    words = layer.forward

    def forward(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        virtual = (ids >= first_id) & (ids < first_id + prompt.tokens)  # [batch, length]
        found = words(ids.masked_fill(virtual, 0))  # [batch, length, width]
        if not torch.is_grad_enabled() and not virtual.any():  # the steps of generation
            return found
        vectors = prompt().to(found.dtype)  # [tokens, width]
        return torch.where(virtual[..., None], vectors[(ids - first_id).clamp(0, prompt.tokens - 1)], found)

    # the table keeps its name, and stays tied to what it is tied to
    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def put_back(model: Any, settings: dict[str, Any]) -> Any:
    """For `adapter_files.load_adapter`: a place for the learned vectors; the encoder that made them is not needed."""
    import torch

    from recipes.common.prompt_encoder import learned_names

    width = model.get_input_embeddings().embedding_dim
    put_in(model, torch.nn.Embedding(settings["tokens"], width), settings["tokens"], settings["first_id"])
    model.prompt.settle()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned_names(model))
    return model
