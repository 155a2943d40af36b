"""GLM: pretrain one model on autoregressive blank infilling, for understanding and for writing.

    text x1 x2 x3 x4 x5 x6, spans [x3] and [x5 x6] cut out, written behind the text in a random order:

    tokens          x1 x2 M x4 M | S x5 x6 S x3        Part A, seen from everywhere | Part B, left to right
    positions        1  2 3  4 5 | 5  5  5 3  3        of a span: where its mask stands
    span positions   0  0 0  0 0 | 1  2  3 1  2        so a mask does not tell how long its span is
    targets                      | x5 x6 E x3 E        E ends a span

    loss = - mean over the targets of log p(target | Part A, Part B before it)

The spans are short (Poisson(3), 15 % of the text), whole sentences (15 %), or one half to all of the text. Afterwards a
class is a word in a blank, and an answer is a long blank at the end: the same weights do both, with nothing added.

transformers' `Glm` classes are another model (GLM-4: decoder only, rotary positions, next-token prediction): this one is
recipes/common/modeling_blank_infilling.py; a copy of that file lies beside the weights.

Du et al. 2022, https://arxiv.org/abs/2103.10360

    make glm                                        # laptop, offline, minutes
    make glm CONFIG=gpu                             # one GPU, a public corpus
    make glm CONFIG=cluster LAUNCH=ddp NPROC=8      # a node; scripts/ has SLURM

Laptop result: RESULTS.md#glm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.chat import encode_plain
from recipes.common.config import Section
from recipes.common.downstream import Downstream, Split
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, OpenUnitInterval, PositiveFloat, PositiveInt, Run, UpToOne

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from recipes.common.blank_infilling import Marks
    from recipes.common.modeling_blank_infilling import BlankInfillingModel


CARD = """The architecture is `modeling_blank_infilling.py` beside the weights (torch and transformers, nothing of ours). Importing it
registers the model's type; transformers never runs it by itself:

```python
import modeling_blank_infilling  # with the model's folder on sys.path; here: recipes.common.modeling_blank_infilling
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

`recipes.common.blank_infilling` makes its inputs (`infill`, `batch_of`) and writes with it (`write`)."""


@dataclass
class Glm:
    """Knobs of the objective; the architecture's are in model.config."""

    block_length: PositiveInt = 512  # tokens of a text before corruption; section 3.1
    mix: dict[str, float] = field(  # how often each kind of span is drawn; half short ones, section 2.2
        default_factory=lambda: {"token": 0.5, "sentence": 0.25, "document": 0.25}
    )
    mask_rate: OpenUnitInterval = 0.15  # share of a text cut out, of short spans and of sentences; section 2.1
    mean_span: PositiveFloat = 3.0  # tokens, of the Poisson that gives a short span's length; section 2.1
    shortest_document: UpToOne = 0.5  # share of a text that a document-level span covers at least; section 2.2
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW; GLM's own is adamw
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)
    cloze: str = "\nimport {mask}\n"  # stands behind a text to be classified; its class is the word in the blank
    longest_answer: PositiveInt = 32  # tokens written into the blank at a source's end
    written: PositiveInt = 100  # held-out sources that an answer is written for


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    glm: Glm
    classification: Downstream
    generation: Downstream
    training: Section[transformers.TrainingArguments]
    run: Run


# ------------------------------------------------------------------------------------ a class as a word in a blank


def label_tokens(names: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The verbalizer v(y): for each class the first token of its name that no other class has taken."""
    taken: list[int] = []
    for name, ids in zip(names, encode_plain(tokenizer, [f" {name}" for name in names]), strict=True):
        free = [i for i in ids if i not in taken]
        if not free:
            raise UserError(
                f"classification.data: the class {name!r} has no token of its own to stand for it in a blank"
            )
        taken.append(free[0])
    return taken


def cloze_samples(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, marks: Marks, pattern: str, length: int
) -> list[Any]:
    """c(x) of section 2.3: the text, the pattern with its blank, and a Part B of [START] alone. `length` bounds Part A."""
    from recipes.common.blank_infilling import infill

    before, after = encode_plain(tokenizer, pattern.split("{mask}"))
    samples = []
    for ids in encode_plain(tokenizer, texts):
        ids = [*ids[: length - len(before) - 1 - len(after)], *before]
        samples.append(infill([*ids, *after], [(len(ids), len(ids))], [0], marks))
    return samples


def cloze_classifier(model: BlankInfillingModel, verbalizer: list[int]) -> torch.nn.Module:
    """p(y | x) = p(v(y) | c(x)) / sum over y' of p(v(y') | c(x)): equation (3), cross-entropy on it."""
    import torch
    from torch.nn import functional as F
    from transformers.modeling_outputs import SequenceClassifierOutput

    class Cloze(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("verbalizer", torch.tensor(verbalizer))

        def forward(self, labels: Tensor, context_length: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
            """labels: (batch,) classes. The blank is read at Part B's first token, [START]."""
            logits = self.model(context_length=context_length, **inputs).logits  # (batch, seq, vocabulary)
            at_start = logits[torch.arange(len(logits), device=logits.device), context_length]  # (batch, vocabulary)
            scores = at_start[:, self.verbalizer].float()  # (batch, classes)
            loss: Any = F.cross_entropy(scores, labels)
            return SequenceClassifierOutput(loss=loss, logits=scores)

    return Cloze()


# ------------------------------------------------------------------------------------- what pretraining bought


def compare_classification(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Accuracy of the cloze classifier on held-out rows, from both starts."""
    from recipes.common.blank_infilling import batch_of
    from recipes.common.downstream import compare_classifiers, two_starts

    settings, training = config.classification, config.training

    def classifier(start: Any, names: list[str]) -> torch.nn.Module:
        return cloze_classifier(start, label_tokens(names, tokenizer))

    def inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = ["\n".join(part for part in (row["text"], row["text_pair"]) if part is not None) for row in rows]
        return batch_of(cloze_samples(texts, tokenizer, marks, config.glm.cloze, settings.max_length), marks.pad)

    starts = two_starts(model, training.seed)
    return compare_classifiers(starts, split, classifier, inputs, settings, training, run, "classification")


def compare_generation(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Loss of the held-out answers, and the words that written answers share with them, from both starts."""
    from recipes.common.blank_infilling import answer_batch, write
    from recipes.common.downstream import compare_starts, two_starts, written_score

    settings, training, glm = config.generation, config.training, config.glm
    rows, test = split
    shown = test[: glm.written]
    room = settings.max_length - glm.longest_answer - 2
    asked = [ids[:room] for ids in encode_plain(tokenizer, [row["source"] for row in shown])]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sources, targets = (encode_plain(tokenizer, [row[side] for row in rows]) for side in ("source", "target"))
        return answer_batch(sources, targets, marks, settings.max_length)

    score = written_score(
        [row["source"] for row in shown],
        [row["target"] for row in shown],
        lambda model: [tokenizer.decode(ids) for ids in write(model, asked, marks, glm.longest_answer, training.bf16)],
        [collate(test[i : i + 32]) for i in range(0, len(test), 32)],
        training,
        run,
        "answers",
    )
    pretrained, fresh = two_starts(model, training.seed)
    return compare_starts(pretrained, fresh, rows, collate, settings, score, training, run, "generation")


# -------------------------------------------------------------------------------------------------------- the story


def check(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError, before any long work, for what cannot be trained so."""
    from recipes.common.blank_infilling import check_mix
    from recipes.common.draws import refuse_smoothing
    from recipes.common.modeling_blank_infilling import BlankInfillingModel
    from recipes.common.optimizers import check_muon

    glm = config.glm
    if glm.optimizer == "muon":
        check_muon(config.training)
    refuse_smoothing(config.training)
    if not isinstance(model, BlankInfillingModel):
        raise UserError(
            "model: a GLM is model.config with model_type: blank_infilling, or model.name of one saved here"
        )
    check_mix(glm.mix)
    problems = []
    positions = model.config.n_positions
    if glm.block_length + 2 > positions:
        problems.append(
            f"glm.block_length: a text of {glm.block_length} tokens needs {glm.block_length + 2} positions (a span may be "
            f"all of it, with its start and stop), but the model has {positions} (model.config.n_positions)"
        )
    for name, section in (("classification", config.classification), ("generation", config.generation)):
        if section.max_length > positions:
            problems.append(f"{name}.max_length: {section.max_length} is above the model's {positions} positions")
    if glm.block_length < 8:
        problems.append(
            f"glm.block_length: {glm.block_length} tokens are too short for a span to be cut out: use 8 at least"
        )
    if glm.mean_span > glm.block_length:
        problems.append(f"glm.mean_span: {glm.mean_span:g} tokens are more than a text has, {glm.block_length}")
    if glm.longest_answer > config.generation.max_length // 2:
        problems.append(
            f"glm.longest_answer: {glm.longest_answer} is above half of generation.max_length, {config.generation.max_length}"
        )
    if glm.cloze.count("{mask}") != 1:
        problems.append(f"glm.cloze: {glm.cloze!r} must hold {{mask}} once: the blank that the class is read from")
    elif (pattern := sum(map(len, encode_plain(tokenizer, glm.cloze.split("{mask}")))) + 1) + 4 > (
        room := config.classification.max_length
    ):
        problems.append(
            f"classification.max_length: {room} tokens leave less than 4 of the text beside glm.cloze, which takes {pattern}"
        )
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, objective, train, evaluate, fine-tune from two starts, save."""
    from transformers import Trainer

    from recipes.common import modeling_blank_infilling  # registers the model's type
    from recipes.common.blank_infilling import OBJECTIVES, Corrupter, add_marks, batch_of, sentence_marks
    from recipes.common.data import load_data
    from recipes.common.downstream import class_names, load_classes, load_rows
    from recipes.common.draws import generator, numbered, pretrain_and_score
    from recipes.common.held_out import mean_loss
    from recipes.common.models import extend_vocabulary, load_model, load_tokenizer
    from recipes.common.optimizers import muon_with_adamw
    from recipes.common.packing import pack_texts
    from recipes.common.preflight import enough_blocks

    glm, training = config.glm, config.training
    tokenizer = load_tokenizer(config.model, run)
    marks = extend_vocabulary(add_marks, tokenizer, config.model, run)
    model: Any = load_model(config.model, tokenizer, run)
    check(config, model, tokenizer)

    labelled = load_classes(config.classification, "classification", run.dry)
    pairs = load_rows(config.generation, "pair", "generation", run.dry)
    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=glm.block_length)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out = [row["input_ids"] for row in enough_blocks(pack, data["validation"], run)]
    label_tokens(class_names(*labelled), tokenizer)  # refuses classes that no token can stand for
    corrupt = Corrupter(marks, sentence_marks(tokenizer), glm.mix, glm.mask_rate, glm.mean_span, glm.shortest_document)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [corrupt(row["input_ids"], generator(training.seed, row["draw"])) for row in rows]
        return batch_of(samples, marks.pad)

    def held_out_batches(objective: str | None = None, blocks: int | None = None) -> list[dict[str, Tensor]]:
        samples = [corrupt(ids, generator(0, i), objective) for i, ids in enumerate(held_out[:blocks])]
        return [batch_of(samples[i : i + 32], marks.pad) for i in range(0, len(samples), 32)]

    optimizer = muon_with_adamw(model, training, glm.muon_learning_rate) if glm.optimizer == "muon" else None
    trainer = Trainer(
        model,
        training,
        train_dataset=numbered(blocks, training),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    figures, model = pretrain_and_score(
        trainer, tokenizer, held_out_batches(), run, time_limit_minutes=config.run.time_limit_minutes
    )
    run.save_code(modeling_blank_infilling)
    run.card(CARD)
    for objective in OBJECTIVES:
        figures[f"eval_loss_{objective}"] = mean_loss(model, held_out_batches(objective, 200), training)

    figures |= compare_classification(config, run, tokenizer, marks, model, labelled)
    figures |= compare_generation(config, run, tokenizer, marks, model, pairs)
    sample = corrupt(held_out[0], generator(0, 0), "token")
    shown = (tokenizer.decode(held_out[0]), tokenizer.decode(sample.tokens))
    run.sample("corrupted.txt", "{}\n\n--- Part A, then Part B\n{}".format(*shown))
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
