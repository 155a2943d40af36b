"""Conversations to rows of tokens: what is learned, what is cut, and several in one row without seeing each other.

    tokens  <|user|> 2 + 2 ? <|end|> <|assistant|> 4 <|end|>
    labels     -     - - - -    -         -        4 <|end|>      the stop token is learned too, or answers never end

Packing lays several conversations into one row of fixed length. Each one's positions start from 0, and that is what
keeps them apart: with no attention mask and no cache, transformers reads the documents off the positions and hides
every document from every other (`masking_utils.find_packed_sequence_indices`). With `use_cache=True`, with a padding
mask, or in FlashAttention with more than one row, it does not, and says nothing; tests/finetuning/test_sft_packing.py
compares packed samples with the same samples alone.

TRL's own packing collator also lays the rows of a batch end to end: one row whose length varies, so that attention
costs the square of the whole batch and a compiled model is compiled again and again. Rows stay rows here, except for
FlashAttention, which that collator is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.generation import decode, model_positions, prompt_ids, prompt_of
from recipes.common.preflight import enough_rows
from recipes.common.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

IGNORED = -100  # a label that the loss leaves out


def prepare(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, args: SFTConfig, run: RunFolder
) -> dict[str, Dataset]:
    """Canonical conversations to rows of "input_ids" and "labels" (and "seq_lengths" when packed), for each split.

    Sets the stop token (training.eos_token) on tokenizer and model. Says how many samples were cut at
    training.max_length, which costs an answer its stop token, and how many had nothing left to learn. Raises UserError
    when the chat template cannot mask, leaves the stop token outside the mask, or no sample has anything to learn.
    """
    from datasets import IterableDataset

    if isinstance(data["train"], IterableDataset) and args.max_steps < 1:
        raise UserError(
            "training.max_steps: a stream (data.streaming) has no known length, so say how many steps to take"
        )
    if args.eval_packing not in (None, args.packing):
        raise UserError(
            f"training.eval_packing: {args.eval_packing}, but the held-out rows are laid out as the training rows are "
            f"(training.packing: {args.packing}): leave it out"
        )
    _set_stop_token(tokenizer, model, args)
    _fit_length(model, args, run)
    if args.packing and (why := packing_leaks(model)):
        if "training.packing" in run.given:
            raise UserError(f"training.packing: {why}: set it to false")
        run.choose("training.packing", False, why)
        args.packing = args.eval_packing = False
    template = training_template(tokenizer, args)
    _check_template(data["train"], tokenizer, template, args, run)
    made = {}
    for split in ("train", "validation"):
        if split in data:
            rows = _tokenize(enough_rows(data[split], args, run), tokenizer, template, args)
            made[split] = _fit_rows(rows, split, args, run)
    if not args.assistant_only_loss:
        run.say("  training.assistant_only_loss is false: the loss is on the questions too, not only on the answers")
    return made


def _set_stop_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, args: SFTConfig) -> None:
    if args.eos_token is None:
        return
    if args.eos_token not in tokenizer.get_vocab():
        raise UserError(f"training.eos_token: the tokenizer has no token {args.eos_token!r}")
    tokenizer.eos_token = args.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def _fit_length(model: PreTrainedModel, args: SFTConfig, run: RunFolder) -> None:
    """Lower training.max_length to the model's positions where the user did not set it; else say what is wrong."""
    positions = model_positions(model)
    if args.max_length is None:
        if args.packing and positions is None:
            raise UserError("training.packing needs training.max_length, the length of a packed row")
        args.max_length = positions
    elif positions is not None and args.max_length > positions:
        if "training.max_length" in run.given:
            raise UserError(
                f"training.max_length is {args.max_length}, but the model has {positions} positions: lower it to that"
            )
        run.choose("training.max_length", positions, "the model's positions")
        args.max_length = positions


def packing_leaks(model: PreTrainedModel) -> str:
    """Why conversations cannot share a row of this model, "" if they can: OPT and BLOOM place their tokens without being told
    where, and Falcon's mask is not read off the positions. The model is asked; not where no process holds its weights."""
    import torch

    from recipes.common.generation import inference
    from recipes.common.sharding import launched_with

    # FlashAttention takes them apart in the single row that TRL's collator lays out
    takes_apart = model.config._attn_implementation.startswith("flash")
    out_of_reach = any(weight.is_meta or hasattr(weight, "ds_id") for weight in model.parameters())
    if takes_apart or out_of_reach or launched_with() == "FSDP":
        return ""
    ids = torch.tensor([[3, 4, 5, 6, 7, 10, 11, 12], [8, 9, 3, 3, 13, 10, 11, 12]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=model.device).expand(2, -1)
    with inference(model):  # two rows of two documents; the second of both is the same
        told = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 5:].float()
    if torch.allclose(told[0], told[1], rtol=1e-3, atol=1e-3 * told.abs().max().item()):
        return ""
    return f"{type(model).__name__} does not keep the conversations of a row apart: one that changes moves the next one's logits"


def training_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str | None:
    """The template to train with where it is not the tokenizer's own: one that marks the assistant's words.

    TRL brings such a template for the common model families. Raises UserError where there is none.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: give one with model.chat_template (a Jinja file)")
    if not args.assistant_only_loss or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "the chat template does not mark the assistant's words, so the loss cannot be on them alone, and TRL has "
            "no training template for this model: put {% generation %} ... {% endgeneration %} around them in a copy "
            "of the template and give it with model.chat_template, or set training.assistant_only_loss: false"
        ) from error


def _rendered(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, template: str | None, masked: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and assistant mask (all ones unless `masked`) of a batch of conversations."""
    import json

    conversations = [[{k: m[k] for k in ("role", "content")} for m in messages] for messages in rows["messages"]]
    tools = rows.get("tools") or [None] * len(conversations)
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    options: dict[str, Any] = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": masked}
    groups = (
        [(conversations, None)] if not any(tools) else [([c], t) for c, t in zip(conversations, tools, strict=True)]
    )
    for group, tool in groups:
        made: Any = tokenizer.apply_chat_template(group, tools=json.loads(tool) if tool else None, **options)
        ids += made["input_ids"]
        masks += made["assistant_masks"] if masked else [[1] * len(row) for row in made["input_ids"]]
    return ids, masks


def _check_template(
    train: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | None, args: SFTConfig, run: RunFolder
) -> None:
    """Look at what the template makes of the first samples. Raises UserError if answers, or their end, go unlearned."""
    first = list(train.take(64))
    if not first:
        raise UserError("no training sample is left: check data.name, data.split and data.max_samples")
    columns: dict[str, list[Any]] = {key: [row.get(key) for row in first] for key in ("messages", "tools")}
    ids, masks = _rendered(columns, tokenizer, template, args.assistant_only_loss)
    for row, mask in zip(ids, masks, strict=True):
        learned = [i for i, bit in enumerate(mask) if bit]
        if not learned:
            raise UserError(
                "the chat template puts no assistant words inside {% generation %} ... {% endgeneration %}, so there "
                f"is nothing to learn in {_shown(tokenizer, row)}; correct it (model.chat_template)"
            )
        last = learned[-1]  # of the last answer's run of learned tokens, the stop token must be one
        start = next((i + 1 for i in range(last, -1, -1) if not mask[i]), 0)
        if tokenizer.eos_token_id not in row[start : last + 1]:
            after = tokenizer.convert_ids_to_tokens(row[last : last + 2])
            raise UserError(
                f"the stop token {tokenizer.eos_token!r} is outside the loss mask, so answers would never learn to "
                f"end: what is learned of {_shown(tokenizer, row)} ends with {after[0]!r}"
                + (f" and {after[1]!r} follows" if len(after) > 1 else "")
                + ". If the template ends a turn with another token, name it in training.eos_token; otherwise move the "
                "stop token inside {% generation %} ... {% endgeneration %} (model.chat_template)"
            )
    prompts = [prompt_of(row) for row in first]
    asked = prompt_ids(tokenizer, prompts)
    differing = next(
        (i for i, (prompt, row) in enumerate(zip(asked, ids, strict=True)) if row[: len(prompt)] != prompt), None
    )
    with_tools = next((row for row in first if row.get("tools")), None)
    if differing is not None and with_tools is None:
        run.say(
            "  caution: a prompt looks different when it is asked than when it was learned: "
            f"{_shown(tokenizer, asked[differing])} against {_shown(tokenizer, ids[differing])}"
        )
    if with_tools is not None:
        bare, _ = _rendered({"messages": [with_tools["messages"]]}, tokenizer, template, False)
        told, _ = _rendered(
            {"messages": [with_tools["messages"]], "tools": [with_tools["tools"]]}, tokenizer, template, False
        )
        if bare == told:
            run.say("  caution: the data has tool definitions, but the chat template does not show them to the model")


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = decode(tokenizer, ids)
    return repr(text if len(text) <= 120 else f"{text[:57]} ... {text[-57:]}")


def _tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | None, args: SFTConfig) -> Dataset:
    """Whole conversations as input_ids and labels; nothing is cut yet."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids, masks = _rendered(batch, tokenizer, template, args.assistant_only_loss)
        labels = [
            [token if bit else IGNORED for token, bit in zip(row, mask, strict=True)]
            for row, mask in zip(ids, masks, strict=True)
        ]
        return {"input_ids": ids, "labels": labels}

    return _map(rows, encode, args, remove_columns=rows.column_names or list(next(iter(rows))))


def _map(rows: Dataset, function: Callable[..., Any], args: SFTConfig, **options: Any) -> Dataset:
    """`Dataset.map` in batches, with training.dataset_num_proc processes, without its progress bar; streams too."""
    from datasets import Dataset, disable_progress_bars

    if isinstance(rows, Dataset):
        disable_progress_bars()
        options["num_proc"] = args.dataset_num_proc
    return rows.map(function, batched=True, batch_size=1000, **options)


def _fit_rows(rows: Dataset, split: str, args: SFTConfig, run: RunFolder) -> Dataset:
    """Cut what is longer than training.max_length, leave out what has nothing to learn then, pack."""
    from datasets import Dataset
    from trl import pack_dataset

    longest, keep_end = args.max_length, args.truncation_mode == "keep_end"
    # nothing is cut off: the rest goes to another row
    splits_long = args.packing and args.packing_strategy == "bfd_split"
    if args.packing and args.packing_strategy == "wrapped":
        raise UserError(
            "training.packing_strategy: wrapped cuts conversations anywhere and lets them see each other; use bfd"
        )

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if longest is not None and not splits_long and len(ids) > longest:
                part = slice(-longest, None) if keep_end else slice(longest)
                ids, labels = ids[part], labels[part]
            if any(label != IGNORED for label in labels[1:]):  # the first token of a row is not predicted
                made["input_ids"].append(ids)
                made["labels"].append(labels)
        return made

    kept = _map(rows, cut, args)
    if isinstance(rows, Dataset):
        lengths = _lengths(rows)
        long = 0 if longest is None or splits_long else sum(length > longest for length in lengths)
        lost = len(rows) - len(kept)
        if long and not keep_end:
            run.say(
                f"  {split}: {long:,} of {len(rows):,} samples are longer than training.max_length {longest} (the "
                f"longest has {max(lengths):,} tokens): they are cut, and their answers lose their stop token"
            )
        if lost:
            run.say(f"  {split}: {lost:,} of {len(rows):,} samples have no answer left to learn and are left out")
        if not len(kept):
            raise UserError(
                f"every label of the {split} data is masked: no sample has any of its answer within "
                f"training.max_length {longest}; raise it (the shortest sample has {min(lengths):,} tokens), or check "
                "the answers in the data"
            )
    if not args.packing:
        return kept
    assert longest is not None  # `_fit_length` saw to it
    if args.shuffle_dataset and split == "train":
        kept = kept.shuffle(seed=args.seed)
    packed = pack_dataset(kept, longest, args.packing_strategy)
    if isinstance(packed, Dataset):
        tokens = sum(_lengths(kept))
        run.say(
            f"  {split}: {len(kept):,} samples of {tokens / len(kept):.0f} tokens packed into {len(packed):,} rows of "
            f"{longest}, {tokens / (len(packed) * longest):.1%} full"
        )
    return packed


def _lengths(rows: Dataset) -> list[int]:
    import pyarrow.compute as pc

    return pc.list_value_length(rows.with_format("arrow")["input_ids"]).to_pylist()


@dataclass
class PackedRows:
    """Collator: packed samples to batches of one shape, [rows, length], whatever they hold.

    Padding has position 0 and label -100: a document of its own, which no other token sees and the loss leaves out. A
    last batch that is short is filled with rows of padding, so that a compiled model meets one shape only.
    """

    pad_id: int
    length: int
    rows: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of input_ids, labels, seq_lengths (lengths of the documents in it) -> tensors [rows, length]."""
        import torch

        shape = (max(self.rows, len(samples)), self.length)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            n = len(sample["input_ids"])
            ids[row, :n] = torch.tensor(sample["input_ids"])
            labels[row, :n] = torch.tensor(sample["labels"])
            positions[row, :n] = torch.cat([torch.arange(length) for length in sample["seq_lengths"]])
        labels[positions == 0] = IGNORED  # a document's first token is not predicted from the document before it
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
