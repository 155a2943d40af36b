"""What the parameter-efficient recipes share: a pretrained base, a task, and the same measurement before and after.

    CAUSAL_LM      a decoder answers conversations; the loss is on the assistant's tokens; exact match where it can be checked
    SEQ_2_SEQ_LM   an encoder-decoder writes the target of a source; exact answers and shared words
    SEQ_CLS        any model tells the class of a text, or of two; accuracy
    TOKEN_CLS      any model tells the tag of each word; accuracy and F1 (recipes/common/labelling.py)

The method stands between `prepare` and `learn`, in the recipe. The names are those of peft's TaskType.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
    from trl import SFTConfig

    from recipes.common.sft import Measured

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"]
KINDS: dict[str, Literal["conversation", "pair", "classification"]] = {
    "CAUSAL_LM": "conversation", "SEQ_2_SEQ_LM": "pair", "SEQ_CLS": "classification",
}  # fmt: skip
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "TEXT": "AutoModelForCausalLM",  # a language from plain text: MAD-X's language adapters
}  # fmt: skip
SHOWN = 40  # answers that are kept in samples/


@dataclass
class Task:
    """A pretrained model as it came, what it is to learn, and how to tell the base again."""

    type: str
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    data: DatasetDict  # canonical rows of the type's kind
    fingerprint: str  # of the base, for the adapter's file
    classes: list[str] = field(default_factory=list)  # SEQ_CLS and TOKEN_CLS: sorted, the order of the head's outputs


def prepare(model: Model, data: Data, task_type: str, run: RunFolder, **options: Any) -> Task:
    """Tokenizer, rows and base of a recipe that adapts a pretrained model; `options` go to `from_pretrained`.

    Raises UserError for a fresh model: a method that keeps the base frozen needs a base that has learned something.
    """
    import transformers

    from recipes.common import labelling
    from recipes.common.adapter_files import fingerprint
    from recipes.common.data import load_data
    from recipes.common.models import load_model, load_tokenizer, refuse_quantised

    if model.name is None:
        raise UserError(
            f"model.name: {run.recipe} adapts a pretrained model; a fresh one (model.config) has nothing to keep frozen"
        )
    if task_type not in (*KINDS, "TOKEN_CLS"):
        raise UserError(f"task_type: {task_type} is not one of {', '.join(KINDS)}, TOKEN_CLS")
    tells_classes = task_type in ("SEQ_CLS", "TOKEN_CLS")
    tokenizer = load_tokenizer(model, run, chat=task_type == "CAUSAL_LM", writes=not tells_classes)
    rows: Any = labelling.load_rows(data) if task_type == "TOKEN_CLS" else load_data(data, KINDS[task_type])
    classes: list[str] = []
    if tells_classes:
        classes = _classes(rows) if task_type == "SEQ_CLS" else labelling.tags_of(rows)
        options |= {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: i for i, name in enumerate(classes)},
        }
    seed_again()
    base = load_model(model, tokenizer, run, getattr(transformers, AUTO_CLASSES[task_type]), **options)
    if (
        task_type == "SEQ_CLS"
        and base.config.is_encoder_decoder
        and tokenizer.eos_token_id not in tokenizer("a")["input_ids"]
    ):
        raise UserError(
            f"model.tokenizer: {type(base).__name__} tells the class at the end of a text, and this tokenizer writes no "
            f"{tokenizer.eos_token}: give the model's own"
        )
    refuse_quantised(base)
    return Task(task_type, tokenizer, base, rows, fingerprint(base), classes)


def seed_again() -> None:
    """Draw from the run's seed on from here: libraries draw too when they are first imported, and not when they are not."""
    import torch

    torch.manual_seed(torch.initial_seed())


def _classes(rows: DatasetDict) -> list[str]:
    from recipes.common.downstream import have_second_texts

    have_second_texts((row for split in ("train", "validation") for row in rows[split]), "data")
    names = sorted(set(rows["train"]["label"]))
    if len(names) < 2:
        raise UserError(f"data: the training rows have one class alone, {names[0]!r}: there is nothing to tell apart")
    if unknown := sorted(set(rows["validation"]["label"]) - set(names)):
        raise UserError(f"data: no training row has the class {unknown[0]!r} of the held-out rows: use more rows")
    return names


def make_trainer(task: Task, model: Any, args: SFTConfig, run: RunFolder) -> Trainer:
    """The Trainer of the task's type on `model`, the base with the method in it."""
    from recipes.common import sft
    from recipes.common.sft_packing import prepare as rows_of_tokens

    if args.gradient_checkpointing:  # a frozen embedding gives the checkpointed layers nothing to differentiate
        task.base.enable_input_require_grads()
    if task.type == "CAUSAL_LM":
        rows = rows_of_tokens(task.data, task.tokenizer, task.base, args, run)
        return sft.make_trainer(model, task.tokenizer, rows, args)

    from transformers import Trainer

    from recipes.common.length_groups import group_by_length
    from recipes.common.text_to_text import say_cut

    args.remove_unused_columns = False  # the collator takes rows of text
    train, held_out = _rows(task, "train", args), _rows(task, "validation", args)
    if task.type == "SEQ_2_SEQ_LM":
        say_cut(train, longest_row(task, args), "training.max_length", run)
    trainer = Trainer(
        model, args, train_dataset=train, eval_dataset=held_out, data_collator=lambda rows: collate(task, rows, args)
    )
    # encoders' and encoder-decoders' losses are a micro-batch's mean whatever they are given: the Trainer is to divide
    trainer.model_accepts_loss_kwargs = False
    if args.train_sampling_strategy == "group_by_length":
        group_by_length(trainer, [sum(map(len, filter(None, _sides(row)))) for row in train])
    return trainer


def _sides(row: Any) -> list[Any]:
    """What a row's length is made of: the token lists of a pair, or the texts or words of a row."""
    return list(row) if isinstance(row, tuple) else [row.get(name) for name in ("text", "text_pair", "words")]


def _rows(task: Task, split: str, args: SFTConfig) -> Any:
    if task.type in ("SEQ_CLS", "TOKEN_CLS"):
        return task.data[split]
    from recipes.common.text_to_text import encode_with_own_marks

    sides = task.data[split]
    return encode_with_own_marks(task.tokenizer, sides["source"], sides["target"], longest_row(task, args))


def longest_row(task: Task, args: SFTConfig) -> int:
    """Tokens of a row at most: training.max_length, or the model's positions where those are fewer."""
    from recipes.common.generation import model_positions

    return min(length for length in (args.max_length, model_positions(task.base), 2**20) if length)


def collate(task: Task, rows: list[Any], args: SFTConfig) -> dict[str, torch.Tensor]:
    """Rows of the task, or SEQ_2_SEQ_LM pairs, as a model's inputs with `labels`: (batch,), or (batch, length)."""
    import torch

    from recipes.common import labelling
    from recipes.common.generation import positions_of
    from recipes.common.text_to_text import batch_of

    if task.type == "SEQ_2_SEQ_LM":
        return batch_of(rows, task.tokenizer.pad_token_id)  # type: ignore[arg-type]
    if task.type == "TOKEN_CLS":
        return labelling.collate(task, rows, longest_row(task, args))
    batch = encode_texts(
        task, [row["text"] for row in rows], [row["text_pair"] for row in rows],
        truncation=True, max_length=longest_row(task, args), padding=True, return_tensors="pt",
    )  # fmt: skip
    if task.tokenizer.padding_side == "left" and "position_ids" in signature(task.base.forward).parameters:
        # told apart by nothing else, learned positions would count the padding
        batch["position_ids"] = positions_of(batch["attention_mask"])
    return {**batch, "labels": torch.tensor([task.classes.index(row["label"]) for row in rows])}


def encode_texts(task: Task, texts: list[str], pairs: list[str | None], **options: Any) -> dict[str, Any]:
    """SEQ_CLS rows in tokens, with what the tokenizer puts around a text, or two, that are to be told apart."""
    if task.tokenizer.sep_token is None:  # a decoder's tokenizer knows no pairs
        texts = [a if b is None else f"{a}\n{b}" for a, b in zip(texts, pairs, strict=True)]
        pairs = [None]
    told: Any = None if pairs[0] is None else pairs
    return dict(task.tokenizer(texts, told, split_special_tokens=True, **options))


def learn(
    task: Task,
    model: Any,
    training: SFTConfig,
    evaluation: Evaluation,
    run: RunFolder,
    settings: Run,
    ready: Callable[[Any], None] | None = None,
) -> tuple[Any, dict[str, float]]:
    """Check the first batch (`--dry-run` ends here), measure, train, measure again. Gives the Trainer and the figures.

    `ready` is called with the Trainer before anything runs: for a method that takes part in the steps.
    """
    from recipes.common.training import fit

    trainer = make_trainer(task, model, training, run)
    if ready is not None:
        ready(trainer)
    announce(task, trainer, run, evaluation)
    before = measure(task, trainer, evaluation, run, "before")
    fit(trainer, run, time_limit_minutes=settings.time_limit_minutes)
    after = measure(task, trainer, evaluation, run, "after")
    return trainer, report(task, run, before, after)


def save(
    task: Task,
    trainer: Any,
    model: Any,
    run: RunFolder,
    method: str = "",
    settings: dict[str, Any] | None = None,
    names: set[str] | None = None,
) -> int:
    """adapter/ and its tokenizer; gives the adapter's bytes.

    For the methods that peft lacks: `method` and `settings`, and `names` where more than what learned is to be saved.
    """
    from recipes.common.adapter_files import save_adapter

    size = save_adapter(trainer, model, run, about=about_base(task), method=method, settings=settings, names=names)
    if run.is_main:
        task.tokenizer.save_pretrained(run.path / "adapter")
    return size


def about_base(task: Task) -> dict[str, Any]:
    """What an adapter's base.json says of the model that it was trained on."""
    return {
        "name": task.base.config._name_or_path or None,
        "fingerprint": task.fingerprint,
        "class": AUTO_CLASSES[task.type],
        "label_names": task.classes or None,
    }


def announce(task: Task, trainer: Any, run: RunFolder, evaluation: Evaluation | None = None) -> dict[str, torch.Tensor]:
    """Check the first batch and say what is about to run; gives the batch. `evaluation`: how it will be measured."""
    from recipes.common import sft
    from recipes.common.preflight import preflight
    from recipes.common.training import total_steps

    answers = None
    if evaluation is not None:  # one batch of answers tells how much memory they take
        few = replace(evaluation, max_samples=evaluation.batch_size)
        answers = partial(measure, task, trainer, few, run, "dry run")
    if task.type == "CAUSAL_LM":
        return sft.announce(trainer, run, answers)
    batch = next(iter(trainer.get_train_dataloader()))
    preflight(
        run, trainer.model, batch, args=trainer.args, total_steps=total_steps(trainer), trainer=trainer, answers=answers
    )
    return batch


def measure(task: Task, trainer: Any, evaluation: Evaluation, run: RunFolder, when: str) -> Measured:
    """Held-out loss, and what share of the held-out rows is answered right; under ZeRO-3, where no process could run the
    model alone, the loss."""
    from recipes.common import labelling, sft
    from recipes.common.sharding import launched_with, sharded

    if task.type == "CAUSAL_LM":
        return sft.measure(trainer, task.tokenizer, task.data["validation"], evaluation, run, when)
    if sharded(trainer) and launched_with() == "DeepSpeed":
        return sft.measure_in_pieces(trainer, run, when)
    if task.type == "TOKEN_CLS":
        measured = labelling.measure(task, trainer, evaluation, longest_row(task, trainer.args))
    else:
        measured = (_classified if task.type == "SEQ_CLS" else _written)(task, trainer, evaluation)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.figures.items())
    run.say(f"{when}: held-out loss {measured.loss:.4f}, {shown}")
    return measured


def _classified(task: Task, trainer: Any, evaluation: Evaluation) -> Measured:
    from torch.nn import functional as F

    from recipes.common.generation import inference
    from recipes.common.sft import Measured

    rows, size = task.data["validation"].to_list(), evaluation.batch_size
    loss, answers = 0.0, []
    with inference(trainer.model, bf16=trainer.args.bf16):
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            batch = trainer._prepare_inputs(collate(task, some, trainer.args))
            labels = batch.pop("labels")
            logits = trainer.model(**batch).logits.float()  # (batch, classes)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            for row, chosen in zip(some, logits.argmax(-1).tolist(), strict=True):
                told = task.classes[chosen]
                answers.append(
                    {"prompt": row["text"], "expected": row["label"], "greedy": told, "right": told == row["label"]}
                )
    accuracy = sum(answer["right"] for answer in answers) / len(rows)
    return Measured(round(loss / len(rows), 4), {"accuracy": round(accuracy, 4)}, answers[:SHOWN])


def _written(task: Task, trainer: Any, evaluation: Evaluation) -> Measured:
    import torch
    from torch.nn import functional as F

    from recipes.common.generation import inference
    from recipes.common.held_out import word_overlap
    from recipes.common.sft import Measured
    from recipes.common.text_to_text import write

    args, pairs = trainer.args, trainer.eval_dataset
    total = torch.zeros(2, dtype=torch.float64)
    with inference(trainer.model, bf16=args.bf16):
        for first in range(0, len(pairs), evaluation.batch_size):
            batch = trainer._prepare_inputs(collate(task, pairs[first : first + evaluation.batch_size], args))
            # not the model's own loss: AdaLoRA's has its penalty in it
            logits, labels = trainer.model(**batch).logits.float(), batch["labels"]  # (batch, length, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            total += torch.tensor([loss, (labels != -100).sum().item()], dtype=torch.float64)
    rows = task.data["validation"].select(range(min(len(pairs), evaluation.max_samples))).to_list()
    with inference(trainer.model):
        written = write(
            trainer.model, pairs[: len(rows)], task.tokenizer, evaluation.max_new_tokens, args.bf16,
            evaluation.batch_size,
        )  # fmt: skip
    answers = [
        {"prompt": row["source"], "expected": row["target"], "greedy": text, "right": text == row["target"].strip()}
        for row, text in zip(rows, written, strict=True)
    ]
    figures = {
        "exact_match": round(sum(answer["right"] for answer in answers) / len(rows), 4),
        "word_overlap": round(word_overlap(written, [row["target"] for row in rows]), 4),
    }
    return Measured(round(float(total[0] / total[1]), 4), figures, answers[:SHOWN])


def report(task: Task, run: RunFolder, before: Measured, after: Measured) -> dict[str, float]:
    """Plots and samples of the two; gives the flat figures: those of after, and baseline_* of before."""
    from recipes.common import labelling, sft

    if task.type == "CAUSAL_LM":
        return sft.report(run, before, after)
    run.plot_curve("loss", "loss", label="training loss, nats")
    run.sample("answers.md", sft.side_by_side(before, after))
    figures = {"eval_loss": after.loss, "baseline_loss": before.loss, **after.figures}
    figures |= {f"baseline_{name}": value for name, value in before.figures.items()}
    if task.type == "SEQ_CLS":
        labels = Counter(task.data["validation"]["label"])
        figures["most_common_class"] = round(max(labels.values()) / labels.total(), 4)
    return figures | (labelling.majority(task.data) if task.type == "TOKEN_CLS" else {})


def head_names(model: PreTrainedModel) -> set[str]:
    """Parameters outside of the pretrained backbone that a task brings with it: a classifier's head, and the pooler that feeds
    it (BERT's, which a checkpoint saved from masked words lacks); none for text.

    Nobody has trained them for the task, so every method lets them learn.
    """
    from transformers.models.auto import modeling_auto

    by_text = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    if type(model).__name__ not in {*by_text, *modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()}:
        return set()
    backbone = {id(p) for p in model.base_model.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in backbone or ".pooler." in name}


def freeze(model: Any, learned: set[str]) -> int:
    """Leave gradients on the named parameters alone; gives how many numbers learn. Raises UserError if none does."""
    from recipes.common.memory_estimate import numbers_of

    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned)
        count += numbers_of(parameter) if name in learned else 0
    if count == 0:
        raise UserError("nothing would learn: every parameter of the model is frozen")
    return count
