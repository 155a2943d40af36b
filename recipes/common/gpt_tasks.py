"""GPT-1's fine-tuning: every task as token sequences, so that a linear layer is all that is new.

    classification   [start] text [extract]                                              one sequence
    entailment       [start] premise [delimiter] hypothesis [extract]                    one
    similarity       [start] a [delimiter] b [extract],  [start] b [delimiter] a [extract]   two, their states summed
    multiple choice  [start] context [delimiter] choice_k [extract]                      one a choice, softmax over scores

    L2 = - log softmax(W_y h_extract)[y]          L1 = next-token loss on the same sequences          L3 = L2 + lambda L1

Radford et al. 2018, sections 3.2 and 3.3 and figure 1,
https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from recipes.common.chat import encode_plain
from recipes.common.downstream import Downstream, accuracy, class_names, compare_starts, load_rows, name_of
from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainingArguments

Kind = Literal["classification", "entailment", "similarity", "multiple_choice"]
START, DELIMITER, EXTRACT = MARKERS = ("<|start|>", "<|delimiter|>", "<|extract|>")
CHOICES = 4


def add_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer start, delimiter and extract; their embeddings are learned in the fine-tuning."""
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKERS)}, replace_extra_special_tokens=False)


# ------------------------------------------------------------------------------------------- the transformations


def shorten(parts: list[list[int]], room: int) -> list[list[int]]:
    """Cut tokens off the ends, always of the longest part, until all have room."""
    sizes = [len(part) for part in parts]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def sequence(parts: list[list[int]], markers: list[int], length: int) -> list[int]:
    """[start] part [delimiter] part ... [extract], at most `length` tokens."""
    start, delimiter, extract = markers
    ids = [start]
    for i, part in enumerate(shorten(parts, length - len(parts) - 1)):
        ids += [delimiter, *part] if i else part
    return [*ids, extract]


def transform(kind: Kind, texts: list[list[int]], markers: list[int], length: int) -> list[list[int]]:
    """The sequences of one row. texts: one (classification), two, or the context and then the choices."""
    if kind == "multiple_choice":
        context, *choices = texts
        return [sequence([context, choice], markers, length) for choice in choices]
    if kind == "similarity":
        return [sequence(texts, markers, length), sequence(texts[::-1], markers, length)]
    return [sequence(texts, markers, length)]


def choose_among(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows {"source", "target"} to multiple choice: a row's target among other ones, all in an order drawn at random."""
    answers = {target: i for i, target in enumerate(dict.fromkeys(row["target"] for row in rows))}
    if len(answers) < CHOICES:
        raise UserError(
            f"gpt.tasks: multiple_choice draws {CHOICES} choices, and the {len(rows)} rows have {len(answers)} different "
            "targets: give more rows"
        )
    rng, targets = np.random.default_rng(seed), list(answers)
    made = []
    for row in rows:
        others = rng.choice(len(targets) - 1, CHOICES - 1, replace=False)
        others += others >= answers[row["target"]]  # any answer but this one
        choices = [row["target"], *(targets[j] for j in others)]
        order = rng.permutation(CHOICES)
        made.append({"texts": [row["source"], *(choices[j] for j in order)], "label": int(np.argmin(order))})
    return made


def encode_rows(
    kind: Kind,
    rows: list[dict[str, Any]],
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Canonical rows to {"sequences": lists of ids, "label": class}. Raises UserError where a task of two texts gets one."""
    if kind == "multiple_choice":
        rows = choose_among(rows, seed)
    elif kind == "classification":
        if any(row["text_pair"] is not None for row in rows):
            raise UserError(
                "gpt.tasks: classification reads one text a row, and these have two: entailment or similarity"
            )
        rows = [{"texts": [row["text"]], "label": names.index(row["label"])} for row in rows]
    else:
        if any(row["text_pair"] is None for row in rows):
            raise UserError(f"gpt.tasks: {kind} needs two texts a row (text, text_pair), and these rows have one")
        rows = [{"texts": [row["text"], row["text_pair"]], "label": names.index(row["label"])} for row in rows]
    vocabulary = tokenizer.get_vocab()
    markers = [vocabulary[marker] for marker in MARKERS]
    return [
        {"sequences": transform(kind, encode_plain(tokenizer, row["texts"]), markers, length), "label": row["label"]}
        for row in rows
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """input_ids: (batch, sequences, seq), padded on the right; extract: (batch, sequences), its place; labels: (batch,)."""
    flat = [torch.tensor(ids) for row in rows for ids in row["sequences"]]
    shape = (len(rows), len(rows[0]["sequences"]))
    return {
        "input_ids": nn.utils.rnn.pad_sequence(flat, batch_first=True).view(*shape, -1),
        "extract": torch.tensor([len(ids) - 1 for ids in flat]).view(shape),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


# ------------------------------------------------------------------------------------------------------ the model


class TaskModel(nn.Module):
    """A copy of the Transformer with the linear layer W_y; the language head is the (tied) embedding, as in pretraining."""

    def __init__(self, model: PreTrainedModel, kind: Kind, classes: int, lm_weight: float):
        super().__init__()
        self.body: Any = copy.deepcopy(model.base_model)
        self.kind, self.lm_weight = kind, lm_weight
        self.head = nn.Linear(model.config.hidden_size, 1 if kind == "multiple_choice" else classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(0.1)  # section 4.1

    def forward(self, input_ids: Tensor, extract: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """L3 and the logits (batch, classes or choices)."""
        ids, last = input_ids.flatten(0, 1), extract.flatten()  # (batch * sequences, seq)
        real = torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
        hidden = self.body(input_ids=ids, attention_mask=real.long(), use_cache=False).last_hidden_state
        states = hidden[torch.arange(len(ids), device=ids.device), last].view(*extract.shape, -1)
        if self.kind == "multiple_choice":
            logits = self.head(self.dropout(states)).squeeze(-1)  # (batch, choices)
        else:
            logits = self.head(self.dropout(states.sum(dim=1)))  # (batch, classes)
        loss = F.cross_entropy(logits.float(), labels)  # L2, equation 4
        if self.lm_weight and self.training:
            words = F.linear(hidden[:, :-1][real[:, 1:]], self.body.get_input_embeddings().weight)
            loss = loss + self.lm_weight * F.cross_entropy(words.float(), ids[:, 1:][real[:, 1:]])  # L3, equation 5
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


@dataclass
class Task:
    """A task that is ready to be fine-tuned on."""

    name: str
    kind: Kind
    settings: Downstream
    classes: int
    taught: list[dict[str, Any]]  # what encode_rows gives
    asked: list[dict[str, Any]]  # held out


def load_task(
    kind: Kind, settings: Downstream, tokenizer: PreTrainedTokenizerBase, seed: int, few: bool = False
) -> Task:
    """Read and encode the rows of a task (`few`: as `load_data` has it). Raises UserError for rows that do not fit it."""
    name = name_of(settings.data)
    several = kind == "multiple_choice"
    rows, held_out = load_rows(settings, "pair" if several else "classification", "downstream", few)
    names = [] if several else class_names(rows, held_out, f"downstream.labels ({settings.data})")
    taught, asked = (encode_rows(kind, part, names, tokenizer, settings.max_length, seed) for part in (rows, held_out))
    return Task(name, kind, settings, len(names), taught, asked)


def compare_on_task(
    task: Task,
    starts: tuple[PreTrainedModel, PreTrainedModel],
    lm_weight: float,
    args: TrainingArguments,
    run: RunFolder,
) -> dict[str, float]:
    """Held-out accuracy, fine-tuned from `starts` (pretrained, random), and of the most common class.

    With lambda (`lm_weight`) above 0 both are run without L1 too: GPT-1's ablation, its table 5.
    """

    def score(tuned: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(tuned, task.asked, collate, args.bf16)}

    figures: dict[str, float] = {}
    for weight, name in {lm_weight: task.name, 0.0: f"{task.name}_without_lm" if lm_weight else task.name}.items():
        made = []
        for start in starts:
            torch.manual_seed(args.seed)  # both get the same W_y
            made.append(TaskModel(start, task.kind, task.classes, weight))
        figures |= compare_starts(made[0], made[1], task.taught, collate, task.settings, score, args, run, name)
    labels = [row["label"] for row in task.asked]
    return {**figures, f"{task.name}_most_common": max(map(labels.count, labels)) / len(labels)}
