"""Sequence labelling (TOKEN_CLS): every word of a row has a tag, and the model's head tells it at the word's last token.

    words    "\\n    return"  " x"    " #"      " in"      " order"
    tags      keyword        name   comment  comment     comment          the same word may be a keyword elsewhere

A row is {"words": [str, ...], "tags": [str, ...]}; the words carry the space between them, so that they joined are the
text. Measured beside the best that needs no context: for each word its commonest tag in the training rows. The builtin set
is `python_tokens`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.sections import Data

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from recipes.common.adaptation import Task
    from recipes.common.sections import Evaluation
    from recipes.common.sft import Measured

IGNORED = -100


# ----------------------------------------------------------------------------------------------------------- the rows


def load_rows(data: Data) -> DatasetDict:
    """Rows of words and tags as "train" and "validation": the builtin set, a JSON lines file or a folder of them (train.jsonl,
    validation.jsonl), or a hub data set.

    data.columns may map `words` and `tags`; a hub set's numbered tags get their names. Raises UserError for anything else.
    """
    from datasets import Dataset, DatasetDict

    from recipes.common.builtin import BUILTINS

    if not isinstance(data.name, str) or data.streaming:
        raise UserError("data: for TOKEN_CLS give one name, and no stream")
    builtin = BUILTINS.get(data.name)
    if builtin is not None and builtin.kind == "labelling":
        splits = {split: Dataset.from_list(builtin.load(split, data.seed)) for split in ("train", "validation")}
    else:
        splits = _read(data)
    for split, most in (("train", data.max_samples), ("validation", data.max_validation_samples)):
        splits[split] = splits[split].take(min(most or len(splits[split]), len(splits[split])))
    return DatasetDict(splits)


def _read(data: Data) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_dataset

    name, columns = str(data.name), data.columns or {}
    if not Path(name).exists() and name.count("/") != 1:
        raise UserError(
            f"data.name: {name} is no file, no hub id, and not `python_tokens`, the builtin set of TOKEN_CLS"
        )
    try:
        if Path(name).is_dir():
            files = {file.stem: str(file) for file in sorted(Path(name).glob("*.jsonl"))}
            read = load_dataset("json", data_files=files)
        elif Path(name).exists():
            read = load_dataset("json", data_files=name)
        else:
            read = load_dataset(name, data.subset)
    except Exception as error:  # whatever a library makes of a file or of the hub: shown, and ended with
        raise UserError(f"data.name: {name} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("split", "validation_split"):
        split = getattr(data, key)
        if split is not None and split not in read:
            raise UserError(f"data.{key}: {name} has no {split!r}; it has {', '.join(read)}")
    held_out = data.validation_split or next((s for s in ("validation", "test") if s in read), None)
    if held_out is None:
        cut = read[data.split].train_test_split(data.validation_fraction, seed=data.seed)
        read, held_out = DatasetDict(train=cut["train"], held_out=cut["test"]), "held_out"
    train = read[data.split if data.split in read else "train"]
    return {"train": _canonical(train, columns), "validation": _canonical(read[held_out], columns)}


def _canonical(rows: Dataset, columns: dict[str, str]) -> Dataset:
    words, tags = columns.get("words", "words"), columns.get("tags", "tags")
    if missing := [name for name in (words, tags) if name not in rows.column_names]:
        raise UserError(
            f"data.columns: there is no column {missing[0]!r}, only {', '.join(rows.column_names)}: map `words` and `tags`"
        )
    feature = getattr(rows.features[tags], "feature", None)
    names = getattr(feature, "names", None)

    def canonical(row: dict[str, Any]) -> dict[str, Any]:
        if len(row[words]) != len(row[tags]):
            raise UserError(f"a row has {len(row[words])} words and {len(row[tags])} tags: {row[words][:8]}")
        spaced = [word if i == 0 or word[:1].isspace() else f" {word}" for i, word in enumerate(row[words])]
        return {"words": spaced, "tags": [names[t] if names else str(t) for t in row[tags]]}

    made = rows.map(canonical, remove_columns=rows.column_names, features=None, load_from_cache_file=False)
    return made.filter(lambda row: len(row["words"]) > 0, load_from_cache_file=False)


def tags_of(rows: DatasetDict) -> list[str]:
    """The tags of the training rows, sorted. Raises UserError if there is one alone, or the held-out rows have others."""
    names = sorted({tag for tags in rows["train"]["tags"] for tag in tags})
    if len(names) < 2:
        raise UserError("data: the training rows have less than two different tags: there is nothing to tell apart")
    if unknown := sorted({tag for tags in rows["validation"]["tags"] for tag in tags} - set(names)):
        raise UserError(f"data: no training row has the tag {unknown[0]!r} of the held-out rows: use more rows")
    return names


# --------------------------------------------------------------------------------------------------------- the batches


def collate(task: Task, rows: Sequence[dict[str, Any]], longest: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, all (batch, longest row); a word's tag stands at its last token."""
    import torch

    known = {tag: i for i, tag in enumerate(task.classes)}
    ids, labels = [], []
    for row in rows:
        of_row, tags = encode(task.tokenizer, row["words"], [known[tag] for tag in row["tags"]], longest)
        ids.append(torch.tensor(of_row))
        labels.append(torch.tensor(tags))
    pad: Any = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=task.tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def encode(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], tags: Sequence[int], longest: int
) -> tuple[list[int], list[int]]:
    """The ids of a row and its labels, cut at `longest`; with what the tokenizer puts around a text: [CLS] and [SEP], <s>."""
    from recipes.common.chat import encode_plain

    ids, labels = [], []
    for pieces, tag in zip(encode_plain(tokenizer, words), tags, strict=True):
        ids += pieces
        labels += [IGNORED] * (len(pieces) - 1) + [tag] if pieces else []
    special = set(tokenizer.all_special_ids)
    around = tokenizer("a")["input_ids"]
    here = next(i for i, token in enumerate(around) if token not in special)
    first, last = around[:here], [token for token in around[here:] if token in special]
    room = longest - len(first) - len(last)
    return (
        [*first, *ids[:room], *last],
        [*[IGNORED] * len(first), *labels[:room], *[IGNORED] * len(last)],
    )


# ------------------------------------------------------------------------------------------------------------- measured


def measure(task: Task, trainer: Any, evaluation: Evaluation, longest: int) -> Measured:
    """Held-out loss a word, accuracy over the words, and the mean of the tags' F1; a word that training.max_length cut off is
    a wrong one."""
    from sklearn.metrics import f1_score
    from torch.nn import functional as F

    from recipes.common.generation import inference
    from recipes.common.sft import Measured

    rows = task.data["validation"].to_list()
    loss, told, right, lost = 0.0, [], [], []
    shown: list[dict[str, Any]] = []
    with inference(trainer.model, bf16=trainer.args.bf16):
        for first in range(0, len(rows), evaluation.batch_size):
            some = rows[first : first + evaluation.batch_size]
            batch = trainer._prepare_inputs(collate(task, some, longest))
            labels = batch.pop("labels")
            logits = trainer.model(**batch).logits.float()  # (batch, length, tags)
            loss += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
            ).item()
            for row, answers, expected in zip(some, logits.argmax(-1), labels, strict=True):
                places = expected != IGNORED
                guessed, wanted = answers[places].tolist(), expected[places].tolist()
                told += guessed
                right += wanted
                lost += list((Counter(map(task.classes.index, row["tags"])) - Counter(wanted)).elements())
                if len(shown) < 20:
                    shown.append(_shown(task, row["words"], guessed, wanted))
    seen = len(right)
    told, right = told + [-1] * len(lost), right + lost
    accuracy = sum(a == b for a, b in zip(told, right, strict=True)) / len(right)
    figures = {
        "accuracy": round(accuracy, 4),
        "macro_f1": round(
            float(f1_score(right, told, labels=sorted({*told, *right} - {-1}), average="macro", zero_division=0.0)), 4
        ),
    }
    if lost:
        figures["words_cut"] = round(len(lost) / len(right), 4)
    return Measured(round(loss / seen, 4), figures, shown)


def _shown(task: Task, words: Sequence[str], told: Sequence[int], right: Sequence[int]) -> dict[str, Any]:
    """A row to read: its text, and the tags of the words that were wrong."""
    wrong = [
        f"{word.strip()}: {task.classes[a]} for {task.classes[b]}"
        for word, a, b in zip(words, told, right, strict=False)
        if a != b
    ]
    expected = ", ".join(f"{word.strip()} {task.classes[b]}" for word, b in zip(words, right, strict=False))
    return {
        "prompt": "".join(words),
        "expected": expected,
        "greedy": "; ".join(wrong) or "all right",
        "right": not wrong,
    }


def majority(data: DatasetDict) -> dict[str, float]:
    """What a table of each word's commonest tag reaches on the held-out rows: all that can be told without context."""
    from sklearn.metrics import f1_score

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in data["train"]:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            counts[word.strip()][tag] += 1
    every: Counter[str] = sum(counts.values(), Counter())
    commonest = every.most_common(1)[0][0]
    table = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    right = [tag for row in data["validation"] for tag in row["tags"]]
    told = [table.get(word.strip(), commonest) for row in data["validation"] for word in row["words"]]
    return {
        "majority_accuracy": round(sum(a == b for a, b in zip(told, right, strict=True)) / len(right), 4),
        "majority_macro_f1": round(float(f1_score(right, told, average="macro", zero_division=0.0)), 4),
    }
