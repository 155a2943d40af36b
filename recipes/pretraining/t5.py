"""T5: pretrain an encoder-decoder to write back the spans cut out of a text, then give it every task as text to text.

    inputs    Thank you <0> me to your party <1> week          15 % of the tokens cut out, in spans of 3 on average
    targets   <0> for inviting <1> last <2>
    loss = - 1/T sum_t log p(y_t | y_<t, inputs)

    attention(q, k) = softmax(q k^T + b[bucket(j - i)])        a learned number for each head and distance from i to j

Distances have 32 buckets: one each when short, wider and wider when long, all the same from 128 on; T5 has no other
positions. Fine-tuning is one mixture of tasks, each with a prefix, all as text: translation, classification (the label's
name is written), regression (a number in steps of 0.2 is written) and summaries.

The objective is in recipes/common/span_corruption.py, the tasks as text in recipes/common/text_to_text.py.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683

    make t5                                           # laptop, offline, minutes
    make t5 CONFIG=gpu                                # one GPU, a public corpus
    make t5 CONFIG=cluster LAUNCH=ddp NPROC=8         # a node; scripts/ has SLURM

Laptop result: RESULTS.md#t5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section
from recipes.common.downstream import Downstream
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers
    from torch import Tensor

    from recipes.common.optimizers import MuonWithAdamW
    from recipes.common.text_to_text import Pair

LOW, HIGH = 0.0, 5.0  # of a similarity, STS-B's


@dataclass
class T5:
    """Knobs of the objective; the architecture's are in model.config."""

    input_length: PositiveInt = 512  # tokens of the corrupted text with its end; 568 of text, section 3.1.4
    corruption_rate: OpenUnitInterval = 0.15  # share of the text that is cut out; section 3.3.4
    mean_span: PositiveFloat = 3.0  # tokens of a span cut out; section 3.3.4
    sentinels: PositiveInt = 100  # tokens that stand for spans; T5's vocabulary has 100
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW; T5's is adafactor
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)


@dataclass
class Task:
    """One task of the mixture."""

    data: str | None = None  # a builtin name, a local file, or a hub id
    subset: str | None = None  # the hub data set's configuration name
    columns: dict[str, str] | None = None  # ours -> theirs, e.g. {source: en, target: de}
    validation_split: str | None = None  # which split is held out; default: as in the data section
    prefix: str = ""  # what a source begins with, so that the model knows the task
    rows: NonNegativeInt = 0  # training rows used: few, since that is where pretraining pays; 0 leaves the task out
    bleu: Literal["13a", "zh", "char", "intl"] | None = None  # sacreBLEU's tokenizer: what is written is scored so too


@dataclass
class Finetuning:
    """The mixture of tasks that the pretrained and a random model learn, alike."""

    limit: PositiveInt = 2**21  # examples that a task counts for at most, K in section 3.5.2; theirs is 2^21
    temperature: PositiveFloat = 1.0  # of the mixing rates; section 3.5.2. 1: by the number of examples
    steps: PositiveInt = 300
    batch_size: PositiveInt = 32  # pairs a step
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: as in pretraining, with the rates of t5 and training
    learning_rate: PositiveFloat = 1e-3  # of adamw, falling to 0; T5's own stays there, section 3.1.2
    max_length: PositiveInt = 128  # tokens of a source, and of a target
    eval_rows: PositiveInt = 200  # held-out rows of each task that an answer is written for
    longest_answer: PositiveInt = 32  # tokens written
    beams: PositiveInt = 1  # of the search for an answer; 1: greedy. T5's translations: 4, section 3.7
    group_by_length: bool = False  # rows of like length in a batch, so that little of it is padding
    label_smoothing: OpenUnitInterval | None = None  # share of a target that all tokens get alike


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    t5: T5
    training: Section[transformers.TrainingArguments]
    run: Run
    finetuning: Finetuning = field(default_factory=Finetuning)
    translation: Task = field(
        default_factory=lambda: Task("tasks_translation", prefix="translate English to Chinese: ", rows=2000)
    )
    classification: Task = field(default_factory=lambda: Task("pydocs_package", prefix="package: ", rows=1000))
    similarity: Task = field(default_factory=lambda: Task("pydocs_summary", prefix="similarity ", rows=1000))
    summary: Task = field(default_factory=lambda: Task("pydocs_summary", prefix="summarize: ", rows=2000))


# --------------------------------------------------------------------------------------------- the tasks, as text

Texts = list[tuple[str, str]]  # source and target
TASKS = ("translation", "classification", "similarity", "summary")  # sections of the config


def task_texts(name: str, task: Task, eval_rows: int, few: bool = False) -> tuple[Texts, Texts]:
    """A task's training and held-out rows as text to text, each source with its prefix (`few`: as `load_data` has it)."""
    from recipes.common.data import load_data
    from recipes.common.draws import generator
    from recipes.common.text_to_text import as_text, similar_pairs

    source = Data(
        name=task.data or "", subset=task.subset, columns=task.columns, validation_split=task.validation_split,
        max_samples=task.rows, max_validation_samples=eval_rows,
    )  # fmt: skip
    numbers = name == "similarity" and task.data != "pydocs_summary"  # rows with a score from 0 to 5 as their label
    loaded = load_data(
        source, "scored_pair" if numbers else "classification" if name == "classification" else "pair", few
    )

    def texts(rows: list[dict[str, Any]], seed: int) -> Texts:
        if name == "classification":
            return [(task.prefix + " ".join(filter(None, [r["text"], r["text_pair"]])), str(r["label"])) for r in rows]
        if name == "similarity":
            if numbers:
                scored = [(row["text"], row["text_pair"], row["label"]) for row in rows]
            else:
                scored = similar_pairs([row["target"] for row in rows], generator(seed, 0))
            return [(f"{task.prefix}sentence1: {a} sentence2: {b}", as_text(score)) for a, b, score in scored]
        return [(task.prefix + row["source"], row["target"]) for row in rows]

    return texts(loaded["train"].to_list(), 1), texts(loaded["validation"].to_list(), 2)


def score_task(name: str, written: list[str], wanted: list[str]) -> float:
    """Exact answers for translation, right classes, Pearson's r for similarity, shared words for summaries; 1 is perfect."""
    from recipes.common.held_out import word_overlap
    from recipes.common.text_to_text import correlation

    if name == "similarity":
        return correlation(written, [float(text) for text in wanted], LOW, HIGH)
    if name == "summary":
        return word_overlap(written, wanted)
    return sum(a == b.strip() for a, b in zip(written, wanted, strict=True)) / len(wanted)


def compare_tasks(
    config: Config, run: RunFolder, tokenizer: Any, texts: dict[str, tuple[Texts, Texts]], pretrained: Any, fresh: Any
) -> dict[str, float]:
    """Fine-tune both starts on the one mixture, and let them write the answers of held-out rows of each task."""
    from recipes.common.downstream import compare_starts
    from recipes.common.draws import generator
    from recipes.common.text_to_text import batch_of, bleu, encode_pairs, mixture, say_cut, write

    tuning, training = config.finetuning, config.training

    def encode(rows: Texts) -> list[Pair]:
        return encode_pairs(tokenizer, [a for a, _ in rows], [b for _, b in rows], tuning.max_length)

    count = tuning.steps * tuning.batch_size
    learned = [encode(train) for train, _ in texts.values()]
    for name, pairs in zip(texts, learned, strict=True):
        say_cut(pairs, tuning.max_length, f"finetuning.max_length, {name}", run)
    rows = mixture(learned, count, tuning.limit, tuning.temperature, generator(training.seed, 0))
    starts = iter(("pretrained", "from-scratch"))

    def score(model: Any) -> dict[str, float]:
        figures, shown, start = {}, [], next(starts)
        for name, (_, test) in texts.items():
            written = write(model, encode(test), tokenizer, tuning.longest_answer, training.bf16, beams=tuning.beams)
            wanted = [target for _, target in test]
            figures[name] = score_task(name, written, wanted)
            if how := getattr(config, name).bleu:
                figures[f"{name}_bleu"], said = bleu(written, wanted, how)
                run.say(f"  {name}, {start}: {said}")
                shown.append(said)
            shown += [f"{a}\n  wanted: {b}\n  wrote:  {w}" for (a, b), w in zip(test[:20], written[:20], strict=True)]
        run.sample(f"answers-{start}.txt", "\n\n".join(shown))
        return figures

    settings = Downstream(
        labels=count, steps=tuning.steps, batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate, max_length=tuning.max_length, eval_rows=tuning.eval_rows,
        group_by_length=tuning.group_by_length, label_smoothing=tuning.label_smoothing,
    )  # fmt: skip
    return compare_starts(
        pretrained, fresh, rows, lambda pairs: batch_of(pairs, tokenizer.pad_token_id), settings, score, training, run,
        "task",
        (lambda model: make_optimizer(model, training, config.t5.muon_learning_rate))
        if tuning.optimizer == "muon" else None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the story


def make_optimizer(model: Any, args: transformers.TrainingArguments, muon_learning_rate: float) -> MuonWithAdamW:
    """Muon on the hidden matrices; those of the queries, whose attention is not scaled, learn slower, and so do the norms.

    The norms' gains take no more than the matrices' rate: at the embeddings', 3e-2, the encoder's last one fell from 1 to
    0.27 in 400 steps, while the decoder hardly used its source.
    """
    from recipes.common.optimizers import muon_with_adamw, slow_queries

    optimizer = muon_with_adamw(model, args, muon_learning_rate)
    queries = [p for name, p in model.named_parameters() if name.endswith(".q.weight")]
    slow_queries(optimizer, queries, model.config.d_kv)
    for group in optimizer.adamw.param_groups:
        if all(p.ndim == 1 for p in group["params"]):
            group["lr"] = min(args.learning_rate, muon_learning_rate)
    return optimizer


def check(config: Config, model: Any) -> None:
    """Raise UserError, before any long work, for what cannot be trained so."""
    from transformers import T5ForConditionalGeneration

    from recipes.common.downstream import too_short
    from recipes.common.draws import refuse_smoothing
    from recipes.common.optimizers import check_muon
    from recipes.common.span_corruption import lengths, longest_text

    t5 = config.t5
    if "muon" in (t5.optimizer, config.finetuning.optimizer):
        check_muon(config.training)
    refuse_smoothing(config.training)
    if not isinstance(model, T5ForConditionalGeneration):
        raise UserError(f"model: {type(model).__name__} is not T5: set model_type: t5, or give a T5's name")
    problems = []
    if t5.input_length < 8:
        problems.append(f"t5.input_length: {t5.input_length} tokens are too short for a span to be cut out: use 8")
    elif t5.mean_span > t5.input_length:
        problems.append(f"t5.mean_span: {t5.mean_span:g} tokens are more than a text has, {t5.input_length}")
    else:
        spans = lengths(
            longest_text(t5.input_length, t5.corruption_rate, t5.mean_span), t5.corruption_rate, t5.mean_span
        )
        if spans.spans > t5.sentinels:
            problems.append(
                f"t5.sentinels: {t5.sentinels} cannot mark the {spans.spans} spans of a text: set it to {spans.spans} at "
                "least, or raise t5.mean_span"
            )
    problems += too_short({"finetuning": config.finetuning.max_length})
    problems += [
        f"{name}.data: no data for its {getattr(config, name).rows} rows: name some, or set {name}.rows: 0"
        for name in TASKS
        if getattr(config, name).rows and not getattr(config, name).data
    ]
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, objective, train, evaluate, fine-tune from two starts, save."""
    import numpy as np
    import torch
    from transformers import AutoModelForSeq2SeqLM, Trainer

    from recipes.common.data import load_data
    from recipes.common.downstream import two_starts
    from recipes.common.draws import generator, numbered, pretrain_and_score
    from recipes.common.models import extend_vocabulary, load_model, load_tokenizer
    from recipes.common.packing import pack_texts
    from recipes.common.preflight import enough_blocks
    from recipes.common.span_corruption import add_sentinels, corrupt, longest_text, noise_mask
    from recipes.common.text_to_text import flops_per_source_token

    t5, training = config.t5, config.training
    tokenizer = load_tokenizer(config.model, run)
    sentinels = extend_vocabulary(
        lambda tokenizer: add_sentinels(tokenizer, t5.sentinels), tokenizer, config.model, run
    )
    model: Any = load_model(
        config.model, tokenizer, run, AutoModelForSeq2SeqLM, decoder_start_token_id=tokenizer.pad_token_id
    )
    check(config, model)
    # the library's loss is a micro-batch's mean whatever it is given, so it is the Trainer that has to divide
    model.accepts_loss_kwargs = False

    sections = {name: getattr(config, name) for name in TASKS}
    texts = {
        name: task_texts(name, task, config.finetuning.eval_rows, run.dry)
        for name, task in sections.items()
        if task.rows
    }
    text_length = longest_text(t5.input_length, t5.corruption_rate, t5.mean_span)
    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=text_length)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out = [row["input_ids"] for row in enough_blocks(pack, data["validation"], run)]

    def spans_cut(texts: list[list[int]], draws: list[int], seed: int) -> dict[str, Tensor]:
        """input_ids: (batch, inputs), labels: (batch, targets); all texts have one length, so there is no padding."""
        pairs = [
            corrupt(np.asarray(text), noise_mask(len(text), t5.corruption_rate, t5.mean_span, rng), sentinels, end)
            for text, rng in zip(texts, (generator(seed, draw) for draw in draws), strict=True)
        ]
        inputs, targets = (torch.from_numpy(np.stack(side)).long() for side in zip(*pairs, strict=True))
        return {"input_ids": inputs, "labels": targets}

    end = tokenizer.eos_token_id

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return spans_cut([row["input_ids"] for row in rows], [row["draw"] for row in rows], training.seed)

    trainer = Trainer(
        model,
        training,
        train_dataset=numbered(blocks, training),
        data_collator=collate,
        optimizers=(make_optimizer(model, training, t5.muon_learning_rate) if t5.optimizer == "muon" else None, None),
    )
    scored = [
        spans_cut(held_out[i : i + 32], list(range(i, min(i + 32, len(held_out)))), 0)
        for i in range(0, len(held_out), 32)
    ]
    figures, model = pretrain_and_score(
        trainer,
        tokenizer,
        scored,
        run,
        time_limit_minutes=config.run.time_limit_minutes,
        flops_per_token=lambda batch: flops_per_source_token(model, batch),
    )
    run.sample("spans.txt", show_spans(model, tokenizer, scored[0], 8))

    return figures | compare_tasks(config, run, tokenizer, texts, *two_starts(model, training.seed))


def show_spans(model: Any, tokenizer: Any, batch: dict[str, Tensor], rows: int) -> str:
    """Held-out texts with spans cut out, what was in them, and what the model writes there."""
    import torch

    model.eval()
    with torch.inference_mode():
        inputs = batch["input_ids"][:rows].to(model.device)
        out = model.generate(inputs, max_new_tokens=batch["labels"].shape[1], do_sample=False)
    sides = [tokenizer.batch_decode(ids) for ids in (batch["input_ids"][:rows], batch["labels"][:rows], out)]
    return "\n\n".join(f"{a}\n  was:   {b}\n  wrote: {c}" for a, b, c in zip(*sides, strict=True))


if __name__ == "__main__":
    run_recipe(main, Config)
