"""BERT: pretrain an encoder that sees both sides, by hidden words and by whether a text follows another.

    [CLS] the man went to the [MASK] [SEP] he bought a gallon [MASK] milk [SEP]
      |                         |                               |
    follows?                  store                            of
    loss = - mean over the hidden tokens of log p(token | whole row)  -  log p(follows or not | [CLS])

15 % of the tokens are predicted: 80 % of them become [MASK], 10 % a random token, 10 % stay, so that fine-tuning, which
has no [MASK], finds a model that looks at every token. `bert.whole_words` hides words with all their tokens. Both
objectives are in recipes/common/masked_language.py; the model is transformers' BertForPreTraining.

Afterwards a layer on [CLS] classifies one text or two, from few labels, beside the same model from random weights.

Devlin et al. 2019, https://arxiv.org/abs/1810.04805

    make bert                                        # laptop, offline, minutes
    make bert CONFIG=gpu                             # one GPU, a public corpus
    make bert CONFIG=cluster LAUNCH=ddp NPROC=8      # a node; scripts/ has SLURM

Laptop result: RESULTS.md#bert.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section
from recipes.common.downstream import Downstream, Split
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, OpenUnitInterval, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers
    from datasets import Dataset
    from torch import Tensor


@dataclass
class Bert:
    """Knobs of the two objectives; the architecture's are in model.config."""

    row_length: PositiveInt = 512  # tokens of a row, [CLS] and two [SEP] included; section A.2
    mask_rate: OpenUnitInterval = 0.15  # share of the tokens that is predicted; section 3.1
    whole_words: bool = False  # hide a word with all its tokens (Google's release of May 2019)
    joined: PositiveInt = 1  # documents made one, in an order of training.seed: for those that are shorter than a row
    tasks: tuple[Literal["classification", "pairs"], ...] = ("classification", "pairs")  # what it is fine-tuned for
    optimizer: Literal["muon", "adamw"] = (
        "muon"  # muon: hidden matrices by Muon, the rest by AdamW; the paper's is adamw
    )
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    bert: Bert
    classification: Downstream
    pairs: Downstream
    training: Section[transformers.TrainingArguments]
    run: Run


def join_documents(rows: Dataset, count: int, seed: int) -> Dataset:
    """Every `count` documents as one, a line each, in an order that the seed gives: sorted by class, they would tell it."""
    if count == 1:
        return rows
    return rows.shuffle(seed=seed).map(
        lambda batch: {"text": ["\n".join(batch["text"])]},
        batched=True, batch_size=count, remove_columns=rows.column_names,
    )  # fmt: skip


def blocks_of(rows: Dataset, tokenizer: Any, length: int, side: str = "train") -> Dataset:
    """Documents as blocks of `length` tokens, each of one document: input_ids, words (the word each token is of), document."""

    def cut(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        blocks: dict[str, list[Any]] = {"input_ids": [], "words": [], "document": []}
        for i, (ids, number) in enumerate(zip(encoded["input_ids"], numbers, strict=True)):
            words = encoded.word_ids(i)
            for start in range(0, len(ids) - length + 1, length):
                blocks["input_ids"].append(ids[start : start + length])
                blocks["words"].append(words[start : start + length])
                blocks["document"].append(number)
        return blocks

    blocks = rows.map(cut, batched=True, batch_size=100, with_indices=True, remove_columns=rows.column_names)
    documents = len(set(blocks["document"])) if len(blocks) else 0  # without a row there is no column either
    if documents < 2:
        raise UserError(
            f"data: the {side} text gives {len(blocks)} block(s) of {length} tokens, of {documents} document(s): "
            "next-sentence prediction takes two documents that are longer than that; give more text, or a smaller bert.row_length"
        )
    return blocks


def predict_hidden(model: Any) -> None:
    """Make `model(**batch)` of a BertForPreTraining give its own loss from the logits of the hidden tokens alone.

    The output layer is a third of a small model's work, and 70 to 85 % of its rows would go unused. What it saves stays a
    plain BERT; without labels it is the library's forward.
    """
    from torch.nn import functional as F
    from transformers.modeling_outputs import MaskedLMOutput

    library = model.forward

    def forward(labels: Tensor | None = None, next_sentence_label: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None or next_sentence_label is None:
            return library(labels=labels, next_sentence_label=next_sentence_label, **inputs)
        encoded = model.bert(**inputs)  # (batch, seq, hidden), and the pooled [CLS]: (batch, hidden)
        chosen = (labels.flatten() != -100).nonzero()[:, 0]
        # filled up to a round number with [CLS], whose label is -100: many different sizes would fragment the memory
        chosen = F.pad(chosen, (0, -len(chosen) % 64))
        logits = model.cls.predictions(encoded.last_hidden_state.flatten(0, 1)[chosen]).float()
        follows = model.cls.seq_relationship(encoded.pooler_output).float()  # (batch, 2)
        loss: Any = F.cross_entropy(logits, labels.flatten()[chosen]) + F.cross_entropy(follows, next_sentence_label)
        return MaskedLMOutput(loss=loss)

    model.forward = forward
    model.accepts_loss_kwargs = False  # a micro-batch's mean, not a sum over all: the Trainer divides


def measure(model: Any, batches: list[dict[str, Tensor]], args: transformers.TrainingArguments) -> dict[str, float]:
    """Held-out cross-entropy and accuracy on the hidden tokens, and the share of next sentences told right."""
    import torch
    from torch.nn import functional as F

    loss, hits, hidden, told, rows = 0.0, 0, 0, 0, 0
    model.to(args.device).eval()
    with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for batch in batches:
            inputs = {name: value.to(args.device) for name, value in batch.items()}
            labels, follows = inputs.pop("labels"), inputs.pop("next_sentence_label")
            out = model(**inputs)
            here = labels != -100  # (batch, seq)
            logits = out.prediction_logits[here].float()  # (hidden tokens, vocabulary)
            loss += F.cross_entropy(logits, labels[here], reduction="sum").item()
            hits += int((logits.argmax(-1) == labels[here]).sum())
            told += int((out.seq_relationship_logits.argmax(-1) == follows).sum())
            hidden, rows = hidden + len(logits), rows + len(follows)
    model.train()
    return {"loss": loss / hidden, "token_accuracy": hits / hidden, "next_sentence_accuracy": told / rows}


def fill(model: Any, tokenizer: Any, batch: dict[str, Tensor], rows: int = 6) -> str:
    """Held-out rows as they are given, and what is put where a token is hidden: to be read."""
    import torch

    model.eval()
    with torch.inference_mode():
        inputs = {n: v[:rows].to(model.device) for n, v in batch.items() if n not in ("labels", "next_sentence_label")}
        guesses = model(**inputs).prediction_logits.argmax(-1)
    lines = []
    for ids, labels, guess in zip(inputs["input_ids"].cpu(), batch["labels"], guesses.cpu(), strict=False):
        lines.append(tokenizer.decode(ids))
        for place in (labels != -100).nonzero().flatten()[:12].tolist():
            wanted, given, got = (tokenizer.decode([int(x[place])]) for x in (labels, ids, guess))
            lines.append(f"  {given!r} was {wanted!r}, filled with {got!r}")
        lines.append("")
    return "\n".join(lines)


def compare(
    name: str,
    split: Split,
    settings: Downstream,
    model: Any,
    tokenizer: Any,
    args: transformers.TrainingArguments,
    run: RunFolder,
) -> dict[str, float]:
    """Classify one text or two from few labels: accuracy on held-out rows, pretrained and from random weights."""
    from transformers import BertForSequenceClassification

    from recipes.common.downstream import compare_classifiers, two_starts

    def classifier(start: Any, names: list[str]) -> Any:
        with_classes = copy.deepcopy(start.config)
        with_classes.num_labels = len(names)
        made: Any = BertForSequenceClassification(with_classes)
        made.bert.load_state_dict(start.bert.state_dict())
        return made

    def inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        second = [row["text_pair"] for row in rows] if rows[0]["text_pair"] is not None else None
        batch = tokenizer(
            [row["text"] for row in rows], second,
            truncation=True, max_length=settings.max_length, padding=True, split_special_tokens=True, return_tensors="pt",
        )  # fmt: skip
        return dict(batch)

    return compare_classifiers(two_starts(model, args.seed), split, classifier, inputs, settings, args, run, name)


def check_texts(task: str, split: Split) -> None:
    """Raise UserError where some rows of a task have a second text and some have none, or `pairs` has rows of one text."""
    from recipes.common.downstream import have_second_texts

    paired = have_second_texts((row for rows in split for row in rows), f"{task}.data")
    if task == "pairs" and not paired:
        raise UserError(
            "pairs.data: its rows have one text: give a second one (text_pair), or take pairs out of bert.tasks"
        )


def check(config: Config, model: Any) -> None:
    """Raise UserError, before any long work, for what cannot be trained so."""
    from transformers import BertForPreTraining

    from recipes.common.downstream import too_short
    from recipes.common.draws import refuse_smoothing
    from recipes.common.optimizers import check_muon

    if config.bert.optimizer == "muon":
        check_muon(config.training)
    refuse_smoothing(config.training)
    if not isinstance(model, BertForPreTraining):
        raise UserError(f"model: this recipe pretrains a BERT, not a {type(model).__name__}: set model_type: bert")
    problems = []
    if config.data.streaming:
        problems.append("data.streaming: the second text comes from anywhere in the data, which a stream does not give")
    places = model.config.max_position_embeddings
    lengths = {"bert.row_length": config.bert.row_length}
    lengths |= {f"{task}.max_length": getattr(config, task).max_length for task in config.bert.tasks}
    for name, length in lengths.items():
        if length > places:
            problems.append(f"{name}: {length} tokens are above model.config.max_position_embeddings, {places}")
    problems += too_short({task: getattr(config, task).max_length for task in config.bert.tasks})
    if config.bert.row_length < 11:
        problems.append(
            f"bert.row_length: {config.bert.row_length} tokens hold no two texts beside three marks: use 11"
        )
    if model.config.type_vocab_size < 2:
        problems.append("model.config.type_vocab_size: two texts need 2 segment ids")
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, objectives, train, evaluate, save, fine-tune from two starts."""
    import numpy as np
    import torch
    from transformers import AutoModelForPreTraining, Trainer

    from recipes.common.data import load_data
    from recipes.common.downstream import load_classes
    from recipes.common.draws import generator, numbered
    from recipes.common.held_out import unigram_loss
    from recipes.common.masked_language import add_marks, of_another_document, sample
    from recipes.common.models import extend_vocabulary, load_model, load_tokenizer
    from recipes.common.optimizers import muon_with_adamw
    from recipes.common.packing import refuse_special_tokens_alone
    from recipes.common.preflight import enough_blocks, preflight
    from recipes.common.sharding import whole_model
    from recipes.common.training import fit, total_steps

    bert, training = config.bert, config.training
    tokenizer: Any = load_tokenizer(config.model, run, writes=False)  # BERT's own has no end of text
    extend_vocabulary(add_marks, tokenizer, config.model, run)
    model: Any = load_model(config.model, tokenizer, run, AutoModelForPreTraining)
    check(config, model)
    predict_hidden(model)
    plain = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))  # what a random token may be

    settings = {"classification": config.classification, "pairs": config.pairs}
    splits = {task: load_classes(settings[task], task, run.dry) for task in bert.tasks}
    for task, split in splits.items():
        check_texts(task, split)
    data = load_data(config.data, "text")
    documents: dict[str, int] = {}

    def cut(side: str, rows: Dataset) -> Dataset:
        joined = join_documents(rows, bert.joined, training.seed)
        documents[side] = len(joined)
        return blocks_of(joined, tokenizer, bert.row_length - 3, side)

    blocks = enough_blocks(partial(cut, "train"), data["train"], run, training)
    held_out = enough_blocks(partial(cut, "validation"), data["validation"], run)
    refuse_special_tokens_alone(blocks, tokenizer)
    if bert.whole_words and all(len(set(row["words"])) == 1 for row in blocks.take(min(32, len(blocks)))):
        raise UserError("bert.whole_words: this tokenizer does not cut a text into words first: all of it is one word")
    left_out = 1 - len(set(blocks["document"])) / documents["train"]
    if left_out > 0.05:
        run.say(
            f"  data: {left_out:.0%} of the documents are shorter than {bert.row_length - 3} tokens, so no row is cut from them: "
            "a smaller bert.row_length, or bert.joined, would use them"
        )

    def rows_of(chosen: list[dict[str, Any]], source: Dataset, seed: int) -> dict[str, Tensor]:
        """Each block cut, joined and hidden by the randomness of its own draw."""
        samples = []
        for row in chosen:
            rng = generator(seed, row["draw"])
            texts = [(text["input_ids"], text["words"]) for text in (row, of_another_document(row, source, rng))]
            samples.append(sample(texts[0], texts[1], tokenizer, plain, bert.mask_rate, bert.whole_words, rng))
        batch = {
            name: torch.from_numpy(np.array([row[name] for row in samples])) for name in samples[0]
        }  # (batch, seq); label (batch,)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    optimizer = muon_with_adamw(model, training, bert.muon_learning_rate) if bert.optimizer == "muon" else None
    trainer = Trainer(
        model,
        training,
        train_dataset=numbered(blocks, training),
        data_collator=lambda rows: rows_of(rows, blocks, training.seed),
        optimizers=(optimizer, None),
    )
    batches = iter(trainer.get_train_dataloader())
    seen = [next(batches)]
    preflight(run, model, seen[0], args=training, total_steps=total_steps(trainer))

    seen += [batch for batch, _ in zip(batches, range(49), strict=False)]
    drawn = [{**held_out[i], "draw": i} for i in range(len(held_out))]
    scored = [rows_of(drawn[i : i + 64], held_out, 0) for i in range(0, len(drawn), 64)]
    before = measure(whole_model(trainer), scored, training)
    unigram = unigram_loss([b["labels"].cpu() for b in seen], [b["labels"] for b in scored], len(tokenizer))
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    model = whole_model(trainer)
    run.save_model(model, tokenizer)
    run.plot_curve("loss", "loss")
    after = measure(model, scored, training)
    run.sample("filled.txt", fill(model, tokenizer, scored[0]))

    figures = {f"eval_{name}": value for name, value in after.items()}
    figures |= {"unigram_loss": unigram, "untrained_loss": before["loss"]}
    for task in bert.tasks:
        figures |= compare(task, splits[task], settings[task], model, tokenizer, training, run)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
