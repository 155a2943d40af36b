"""What did pretraining buy? The same fine-tuning from pretrained and from random weights, scored on held-out rows.

    bought = score(fine-tuned from pretrained) - score(fine-tuned from scratch)      same rows, steps, batches, rate, seed

Fair means that nothing differs but the start. So the two share the order of the rows, and the seed of the dropout.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder
from recipes.common.sections import OpenUnitInterval, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import TrainingArguments


@dataclass
class Downstream:
    """The fine-tuning that both starts get."""

    data: str = "pydocs_package"  # labelled rows: a builtin name, a local file, or a hub id
    columns: dict[str, str] | None = None  # ours -> theirs, e.g. {text: utterance, label: intent}
    validation_split: str | None = None  # which split is held out; default: as in the data section
    labels: PositiveInt = 512  # training rows used: few, since that is where pretraining pays
    labels_per_class: PositiveInt | None = None  # instead of labels: the first so many rows of each class
    steps: PositiveInt = 200
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-3
    max_length: PositiveInt = 128  # tokens of a row
    group_by_length: bool = False  # rows of like length in a batch, so that little of it is padding
    label_smoothing: OpenUnitInterval | None = None  # share of the target that all classes or tokens get alike
    eval_rows: PositiveInt = 500  # held-out rows scored


Split = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # the training rows used, and the held-out ones


def load_rows(settings: Downstream, kind: Any, section: str, few: bool = False) -> Split:
    """The training rows used and the held-out ones, canonical rows of `kind` ("classification" or "pair").

    section: the config's name of these settings, for errors; few: as `load_data` has it, for a dry run
    """
    from recipes.common.data import load_data
    from recipes.common.sections import Data

    each = settings.labels_per_class
    if each is not None and kind != "classification":
        raise UserError(f"{section}.labels_per_class: {each}, but rows of kind {kind!r} have no class: set labels")
    source = Data(
        name=settings.data, columns=settings.columns, validation_split=settings.validation_split,
        max_samples=settings.labels if each is None else None, max_validation_samples=settings.eval_rows,
    )  # fmt: skip
    data = load_data(source, kind, few)
    rows, held_out = data["train"].to_list(), data["validation"].to_list()
    return rows if each is None else first_of_each_class(rows, each), held_out


def too_short(sections: dict[str, int]) -> list[str]:
    """What is wrong with the max_length of these sections: rows of a few tokens hold their marks and hardly any text."""
    return [
        f"{name}.max_length: {length} tokens are too short: use 8 at least"
        for name, length in sections.items()
        if length < 8
    ]


def name_of(source: str) -> str:
    """What the figures of a task on this data are called: the data's last name, without its ending."""
    return source.rstrip("/").split("/")[-1].split(".")[0]


def load_classes(settings: Downstream, section: str, few: bool = False) -> Split:
    """`load_rows` of labelled rows. UserError as by `class_names`: before the pretraining, not after it."""
    rows, held_out = load_rows(settings, "classification", section, few)
    class_names(rows, held_out, f"{section}.labels ({settings.data})")
    return rows, held_out


def first_of_each_class(rows: list[dict[str, Any]], each: int) -> list[dict[str, Any]]:
    """The first `each` rows of every class, in their order; all of a class that has fewer."""
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if taken[row["label"]] < each:
            chosen.append(row)
        taken[row["label"]] += 1
    return chosen


def class_names(rows: list[dict[str, Any]], held_out: list[dict[str, Any]], where: str = "labels") -> list[str]:
    """The classes of the training rows, sorted. Raises UserError, which begins with `where`, if there is one alone, or the
    held-out rows have others."""
    names = sorted({row["label"] for row in rows})
    if len(names) < 2:
        raise UserError(f"{where}: the {len(rows)} rows used have one class alone, {names[0]!r}: use more rows")
    if unknown := sorted({row["label"] for row in held_out} - set(names)):
        raise UserError(
            f"{where}: the held-out rows have {unknown[0]!r}, which none of the {len(rows)} training rows "
            "used has: use more rows"
        )
    return names


def have_second_texts(rows: Iterable[dict[str, Any]], where: str) -> bool:
    """Whether labelled rows are of two texts each. Raises UserError, which begins with `where`, if some are and some are not."""
    paired = [row["text_pair"] is not None for row in rows]
    if any(paired) and not all(paired):
        raise UserError(
            f"{where}: {paired.count(True)} of {len(paired)} rows have a second text (text_pair) and the others have none: give "
            "it in all of them, or in none"
        )
    return any(paired)


def batches_of(rows: list[Any], settings: Downstream, order: torch.Generator) -> Iterator[list[int]]:
    """Row numbers, batch_size at a time and without end: every row once before any comes again.

    By length: of the next 50 batches' rows, those of like length together, and then the batches in a random order.
    """
    import torch

    size = settings.batch_size
    at_once = 50 * size if settings.group_by_length else size
    queue: list[int] = []
    while True:
        while len(queue) < at_once:
            queue += torch.randperm(len(rows), generator=order).tolist()
        chosen, queue = queue[:at_once], queue[at_once:]
        if not settings.group_by_length:
            yield chosen
            continue
        chosen.sort(key=lambda i: length_of(rows[i]))
        for batch in torch.randperm(at_once // size, generator=order).tolist():
            yield chosen[batch * size : (batch + 1) * size]


def length_of(row: Any) -> int:
    """Tokens of a pair of token lists, characters of a row of texts."""
    return sum(len(side) for side in (row.values() if isinstance(row, dict) else row) if side is not None)


def fine_tune(
    model: nn.Module,
    rows: list[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    settings: Downstream,
    args: TrainingArguments,
    run: RunFolder,
    make_optimizer: Callable[[Any], Optimizer] | None = None,
) -> list[float]:
    """AdamW with a linear schedule and a tenth of warm-up, over the rows in an order that the seed gives. Gives the losses.

    `collate(rows)` makes a batch that `model(**batch)` turns into an output with `.loss`. Precision and seed are those of
    `args`, the pretraining's arguments. `make_optimizer(model)` gives another optimizer, with its own rates at their peak.
    """
    import torch
    from torch.nn import functional as F
    from transformers import get_linear_schedule_with_warmup, set_seed

    from recipes.common.fused_loss import smoothed_loss
    from recipes.common.training import duration, stop_at_nan

    set_seed(args.seed)
    device = args.device
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = (
        make_optimizer(model)
        if make_optimizer is not None
        else torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=True)
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, max(1, settings.steps // 10), settings.steps)
    batches = batches_of(rows, settings, torch.Generator().manual_seed(args.seed))
    losses: list[float] = []
    started, every = time.perf_counter(), max(25, settings.steps // 10)
    for step, chosen in zip(range(settings.steps), batches, strict=False):
        if step and step % every == 0:
            left = (time.perf_counter() - started) / step * (settings.steps - step)
            run.say(f"  fine-tuning step {step}/{settings.steps}  loss {losses[-1]:.4f}  left {duration(left)}")
        batch = {name: value.to(device) for name, value in collate([rows[i] for i in chosen]).items()}
        share = settings.label_smoothing
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            if share is None:
                loss = model(**batch).loss
            elif hasattr(model, "prepare_decoder_input_ids_from_labels"):
                loss = smoothed_loss(model, batch, share)
            else:
                logits = model(**batch).logits.flatten(0, -2).float()  # (targets, classes or vocabulary)
                loss = F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=share)
        losses.append(loss.item())
        stop_at_nan(losses[-1], step + 1, run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def compare_starts(
    pretrained: nn.Module,
    fresh: nn.Module,
    rows: list[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    settings: Downstream,
    score: Callable[[nn.Module], dict[str, float]],
    args: TrainingArguments,
    run: RunFolder,
    name: str,
    make_optimizer: Callable[[Any], Optimizer] | None = None,
) -> dict[str, float]:
    """Fine-tune both alike and score both: {"<name>_<figure>": from pretrained, "baseline_<name>_<figure>": from scratch}."""
    figures: dict[str, float] = {}
    for prefix, model in (("", pretrained), ("baseline_", fresh)):
        losses = fine_tune(model, rows, collate, settings, args, run, make_optimizer)
        model.eval()
        scored = score(model)
        figures |= {f"{prefix}{name}_{figure}": value for figure, value in scored.items()}
        start = "from scratch" if prefix else "pretrained"
        shown = "  ".join(f"{figure} {value:.4g}" for figure, value in scored.items())
        run.say(f"  {name}, {start}: loss {sum(losses[-10:]) / len(losses[-10:]):.3f}  held-out {shown}")
    return figures


def accuracy(
    model: nn.Module,
    rows: list[dict[str, Any]],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    bf16: bool,
    batch_size: int = 64,
) -> float:
    """Share of rows whose class is the largest of the model's logits (rows, classes); `collate` gives `labels` beside them."""
    import torch

    right, device = 0, next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(rows), batch_size):
            batch = {name: value.to(device) for name, value in collate(rows[first : first + batch_size]).items()}
            right += int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
    return right / len(rows)


def two_starts(model: Any, seed: int) -> tuple[Any, Any]:
    """A copy of the pretrained model, and one of random weights, to be fine-tuned: the given one stays as it is."""
    from transformers import set_seed

    set_seed(seed)
    fresh, pretrained = type(model)(model.config), type(model)(model.config)
    pretrained.load_state_dict(model.state_dict())
    for start in (fresh, pretrained):
        start.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return pretrained, fresh


def compare_classifiers(
    starts: tuple[Any, Any],
    split: Split,
    classifier: Callable[[Any, list[str]], nn.Module],
    inputs: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    settings: Downstream,
    args: TrainingArguments,
    run: RunFolder,
    name: str,
) -> dict[str, float]:
    """Accuracy on held-out labelled rows of `classifier(start, class names)`, from the pretrained start and the random one.

    `inputs(rows)` are the model's inputs without labels. What a classifier adds to its start is the same in both.
    """
    import torch

    rows, held_out = split
    names = class_names(rows, held_out)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**inputs(rows), "labels": torch.tensor([names.index(row["label"]) for row in rows])}

    made = []
    for start in starts:
        torch.manual_seed(args.seed)
        made.append(classifier(start, names))

    def score(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model, held_out, collate, args.bf16)}

    return compare_starts(made[0], made[1], rows, collate, settings, score, args, run, name)


def written_score(
    sources: Sequence[str],
    wanted: Sequence[str],
    write: Callable[[Any], list[str]],
    batches: list[dict[str, Tensor]],
    args: TrainingArguments,
    run: RunFolder,
    name: str,
    bleu_tokenizer: str | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A score for `compare_starts`: the loss of held-out targets, and of what is written the shared words and exact answers.

    `write(model)` gives a text for each of the sources; they are kept as samples/<name>-pretrained.txt and -from-scratch.txt.
    With a tokenizer of sacreBLEU's, BLEU is a figure too.
    """
    from recipes.common.held_out import mean_loss, word_overlap
    from recipes.common.text_to_text import bleu

    starts = iter(("pretrained", "from-scratch"))

    def score(model: Any) -> dict[str, float]:
        texts = write(model)
        lines = [f"{a}\n  wanted: {b}\n  wrote:  {c}" for a, b, c in zip(sources, wanted, texts, strict=True)]
        exact = sum(a.strip() == b.strip() for a, b in zip(texts, wanted, strict=True)) / len(texts)
        figures = {"loss": mean_loss(model, batches, args), "overlap": word_overlap(texts, wanted), "exact": exact}
        start = next(starts)
        if bleu_tokenizer is not None:
            figures["bleu"], said = bleu(texts, wanted, bleu_tokenizer)
            run.say(f"  {name}, {start}: {said}")
            lines = [said, *lines]
        run.sample(f"{name}-{start}.txt", "\n\n".join(lines))
        return figures

    return score
