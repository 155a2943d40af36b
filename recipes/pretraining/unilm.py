"""UniLM: pretrain one Transformer under four attention masks, so that it both understands and writes.

    left to right      right to left      bidirectional      sequence to sequence
    x . . .            x x x x            x x x x            x x . .      a row looks at its x's
    x x . .            . x x x            x x x x            x x . .
    x x x .            . . x x            x x x x            x x x .
    x x x x            . . . x            x x x x            x x x x
    1/6                1/6                1/3                1/3          of the samples

    loss = - mean over the masked tokens of log p(token | what its position may look at)  [+ next sentence, bidirectional]

15 % of the tokens are masked: one at a time, or (20 %) two or three in a row; 80 % become [MASK], 10 % a random token,
10 % stay. Segment ids tell the model which mask it is under. Afterwards the bidirectional mask serves to classify, and
the sequence-to-sequence one to write: a [MASK] is put after what is written, and what it predicts takes its place.

The model is BERT: what is saved loads with AutoModelForPreTraining or AutoModelForMaskedLM. The masks are in
recipes/common/prefix_masks.py, and are passed as a 4-D attention_mask; a copy of that file lies beside the weights.

Dong et al. 2019, https://arxiv.org/abs/1905.03197

    make unilm                                        # laptop, offline, minutes
    make unilm CONFIG=gpu                             # one GPU, a public corpus
    make unilm CONFIG=cluster LAUNCH=ddp NPROC=8      # a node; scripts/ has SLURM

Laptop result: RESULTS.md#unilm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.chat import encode_plain
from recipes.common.config import Section
from recipes.common.downstream import Downstream, Split
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import ClosedUnitInterval, Data, Model, OpenUnitInterval, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor

    from recipes.common.prefix_masks import Marks


CARD = """The weights are a plain BERT's. Its four masks are in `prefix_masks.py` beside them (numpy and torch, nothing of ours):

```python
from transformers import AutoModelForPreTraining, AutoTokenizer
from prefix_masks import add_marks, write  # with the model's folder on sys.path; here: recipes.common.prefix_masks

model, tokenizer = AutoModelForPreTraining.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
written = write(model, [tokenizer(source, add_special_tokens=False)["input_ids"]], add_marks(tokenizer), 32)
```"""


@dataclass
class Unilm:
    """Knobs of the objective; the architecture's are in model.config."""

    block_length: PositiveInt = 509  # tokens of text in an input; with [SOS] and two [EOS] 512, section 2.4
    mask_rate: OpenUnitInterval = 0.15  # share of the tokens that is masked; section 2.4
    longer: ClosedUnitInterval = 0.2  # share of the maskings that are a bigram or a trigram; section 2.4
    answer_mask_rate: OpenUnitInterval = 0.7  # share of a target's tokens masked in fine-tuning; section 3.1
    optimizer: Literal["muon", "adamw"] = (
        "muon"  # muon: hidden matrices by Muon, the rest by AdamW; the paper's is adamw
    )
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)
    longest_answer: PositiveInt = 32  # tokens written
    written: PositiveInt = 100  # held-out sources that an answer is written for


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    unilm: Unilm
    classification: Downstream
    generation: Downstream
    training: Section[transformers.TrainingArguments]
    run: Run


# ------------------------------------------------------------------------------------- what pretraining bought


def classifier(model: Any, names: list[str]) -> torch.nn.Module:
    """softmax(h W), h the last hidden state of [SOS] (section 2.5), under the bidirectional mask."""
    import torch
    from torch.nn import functional as F
    from transformers.modeling_outputs import SequenceClassifierOutput

    from recipes.common.prefix_masks import encode

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.head = torch.nn.Linear(model.config.hidden_size, len(names))
            torch.nn.init.normal_(self.head.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(self.head.bias)

        def forward(self, labels: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
            """labels: (batch,) classes."""
            logits = self.head(encode(self.model, **inputs)[:, 0]).float()  # (batch, classes)
            loss: Any = F.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    return Classifier()


def compare_classification(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Accuracy of the classifier on held-out rows, from both starts."""
    from recipes.common.downstream import compare_classifiers, two_starts
    from recipes.common.prefix_masks import BIDIRECTIONAL, Sample, batch_of

    settings, training = config.classification, config.training

    def inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        samples = []
        for row in rows:
            texts = encode_plain(tokenizer, [part for part in (row["text"], row["text_pair"]) if part is not None])
            room = (settings.max_length - 1 - len(texts)) // len(texts)
            segments = [[*ids[:room], marks.end] for ids in texts]
            tokens = [marks.start, *(token for segment in segments for token in segment)]
            samples.append(Sample(tokens, [-100] * len(tokens), 1 + len(segments[0]), BIDIRECTIONAL))
        return batch_of(samples, marks)

    starts = two_starts(model, training.seed)
    return compare_classifiers(starts, split, classifier, inputs, settings, training, run, "classification")


def compare_generation(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Loss of the masked tokens of held-out targets, and the words that written ones share with them, from both starts."""
    from recipes.common.downstream import compare_starts, two_starts, written_score
    from recipes.common.draws import generator
    from recipes.common.prefix_masks import answer_sample, batch_of, train_on_cloze, write

    settings, training, unilm = config.generation, config.training, config.unilm
    rows, test = split
    shown = test[: unilm.written]
    room = settings.max_length - unilm.longest_answer - 3
    asked = [ids[:room] for ids in encode_plain(tokenizer, [row["source"] for row in shown])]
    steps = itertools.cycle(range(settings.steps))  # the second start gets the first one's masks

    def batch(rows: list[dict[str, Any]], seed: int, draw: int) -> dict[str, Tensor]:
        rng = generator(seed, draw)
        sides = [encode_plain(tokenizer, [row[side] for row in rows]) for side in ("source", "target")]
        both = zip(*sides, strict=True)
        return batch_of(
            [answer_sample(s, t, marks, rng, settings.max_length, unilm.answer_mask_rate) for s, t in both], marks
        )

    score = written_score(
        [row["source"] for row in shown],
        [row["target"] for row in shown],
        lambda model: [
            tokenizer.decode(ids) for ids in write(model, asked, marks, unilm.longest_answer, training.bf16)
        ],
        [batch(test[i : i + 32], 0, i) for i in range(0, len(test), 32)],
        training,
        run,
        "answers",
    )
    pretrained, fresh = two_starts(model, training.seed)
    for start in (pretrained, fresh):
        train_on_cloze(start)
    return compare_starts(
        pretrained, fresh, rows, lambda rows: batch(rows, training.seed, next(steps)), settings, score, training, run,
        "generation",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the story


def check(config: Config, model: Any) -> None:
    """Raise UserError, before any long work, for what cannot be trained so."""
    from transformers import BertForPreTraining

    from recipes.common.downstream import too_short
    from recipes.common.draws import refuse_smoothing
    from recipes.common.optimizers import check_muon
    from recipes.common.prefix_masks import PADDED_TO, SEGMENTS

    unilm = config.unilm
    if unilm.optimizer == "muon":
        check_muon(config.training)
    refuse_smoothing(config.training)
    if not isinstance(model, BertForPreTraining):
        raise UserError(f"model: UniLM is a BERT under four masks, not a {type(model).__name__}: set model_type: bert")
    problems = []
    segments = max(max(pair) for pair in SEGMENTS) + 1
    if model.config.type_vocab_size < segments:
        problems.append(
            f"model.config.type_vocab_size: {model.config.type_vocab_size}: the four masks need {segments} segment ids"
        )
    for name, length in (
        ("unilm.block_length: with [SOS] and two [EOS]", unilm.block_length + 3),
        ("classification.max_length:", config.classification.max_length),
        ("generation.max_length:", config.generation.max_length),
    ):
        padded = -(-length // PADDED_TO) * PADDED_TO
        if padded > model.config.max_position_embeddings:
            problems.append(
                f"{name} {length} tokens, {padded} with their padding, are above model.config.max_position_embeddings, "
                f"{model.config.max_position_embeddings}"
            )
    problems += too_short({name: getattr(config, name).max_length for name in ("classification", "generation")})
    if (kernel := model.config._attn_implementation) not in ("eager", "sdpa"):
        problems.append(f"model.attention: {kernel} does not take this objective's own masks: set eager or sdpa")
    if unilm.block_length < 8:
        problems.append(
            f"unilm.block_length: {unilm.block_length} tokens are too short for two segments: use 8 at least"
        )
    if unilm.longest_answer > config.generation.max_length // 2:
        problems.append(
            f"unilm.longest_answer: {unilm.longest_answer} is above half of generation.max_length, "
            f"{config.generation.max_length}"
        )
    if config.training.per_device_train_batch_size < 2:
        problems.append(
            "training.per_device_train_batch_size: the wrong next segment is another sample's of the batch: use 2 at least"
        )
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, objective, train, evaluate, fine-tune from two starts, save."""
    from transformers import AutoModelForPreTraining, Trainer

    from recipes.common import prefix_masks
    from recipes.common.data import load_data
    from recipes.common.downstream import load_classes, load_rows
    from recipes.common.draws import generator, numbered, pretrain_and_score
    from recipes.common.held_out import mean_loss
    from recipes.common.models import extend_vocabulary, load_model, load_tokenizer
    from recipes.common.optimizers import muon_with_adamw
    from recipes.common.packing import pack_texts
    from recipes.common.prefix_masks import (
        BIDIRECTIONAL,
        KINDS,
        add_marks,
        batch_of,
        pretraining_sample,
        train_on_cloze,
    )
    from recipes.common.preflight import enough_blocks

    unilm, training = config.unilm, config.training
    tokenizer = load_tokenizer(config.model, run)
    marks = extend_vocabulary(add_marks, tokenizer, config.model, run)
    model: Any = load_model(config.model, tokenizer, run, AutoModelForPreTraining)
    check(config, model)
    train_on_cloze(model)

    labelled = load_classes(config.classification, "classification", run.dry)
    pairs = load_rows(config.generation, "pair", "generation", run.dry)
    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=unilm.block_length)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out = [row["input_ids"] for row in enough_blocks(pack, data["validation"], run)]

    def corrupt(texts: list[list[int]], draws: list[int], seed: int, kind: int | None = None) -> dict[str, Tensor]:
        # the wrong next segments come from half a batch away: in a stream the next block is mostly of the same text
        half = max(1, len(texts) // 2)
        others = [*texts[half:], *texts[:half]]
        samples = [
            pretraining_sample(text, other, marks, generator(seed, draw), unilm.mask_rate, unilm.longer, kind)
            for text, other, draw in zip(texts, others, draws, strict=True)
        ]
        return batch_of(samples, marks)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return corrupt([row["input_ids"] for row in rows], [row["draw"] for row in rows], training.seed)

    def held_out_batches(kind: int | None = None, blocks: int | None = None) -> list[dict[str, Tensor]]:
        texts = held_out[:blocks]
        starts = range(0, len(texts), 32)
        return [corrupt(texts[i : i + 32], list(range(i, i + len(texts[i : i + 32]))), 0, kind) for i in starts]

    def cloze_alone(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{name: value for name, value in batch.items() if name != "is_next"} for batch in batches]

    rows = numbered(blocks, training)
    # a last batch of one text has no other to be put beside it; fewer texts than a batch stay one batch
    whole_batch = training.per_device_train_batch_size * training.world_size
    training.dataloader_drop_last = not hasattr(rows, "__len__") or len(rows) >= whole_batch
    optimizer = muon_with_adamw(model, training, unilm.muon_learning_rate) if unilm.optimizer == "muon" else None
    trainer = Trainer(
        model,
        training,
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    figures, model = pretrain_and_score(
        trainer, tokenizer, cloze_alone(held_out_batches()), run, time_limit_minutes=config.run.time_limit_minutes
    )
    for kind, name in enumerate(KINDS):
        figures[f"eval_loss_{name}"] = mean_loss(model, cloze_alone(held_out_batches(kind, 200)), training)
    asked = [
        corrupt([held_out[i] for i in some], some, 0, BIDIRECTIONAL) for some in random_batches(len(held_out), size=32)
    ]
    if asked:  # a single block has no other to be put beside
        figures["next_sentence_accuracy"] = next_sentence_accuracy(model, asked, training)
    run.save_code(prefix_masks)
    run.card(CARD)

    figures |= compare_classification(config, run, tokenizer, marks, model, labelled)
    figures |= compare_generation(config, run, tokenizer, marks, model, pairs)
    return figures


def random_batches(blocks: int, size: int) -> list[list[int]]:
    """Numbers of blocks by `size`, in an order of its own, an even number in each: as in training, a wrong segment is any text's.

    In the files' order it would be the next block's, of the same text. A single block at the end would have none but its own.
    """
    import numpy as np

    order = np.random.default_rng(0).permutation(blocks)[: blocks // 2 * 2].tolist()
    return [order[i : i + size] for i in range(0, len(order), size)]


def next_sentence_accuracy(model: Any, batches: list[dict[str, Tensor]], args: transformers.TrainingArguments) -> float:
    """Share of the bidirectional samples in which the model tells whether the second segment follows the first."""
    import torch

    from recipes.common.prefix_masks import encode

    right, asked = 0, 0
    model.eval()
    with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for batch in batches:
            here = {name: value.to(args.device) for name, value in batch.items()}
            guess = model.cls.seq_relationship(model.bert.pooler(encode(model, **here))).argmax(-1)  # (batch,)
            right += int((guess == here["is_next"]).sum())
            asked += len(guess)
    return right / asked


if __name__ == "__main__":
    run_recipe(main, Config)
