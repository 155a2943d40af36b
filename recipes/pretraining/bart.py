"""BART: pretrain an encoder-decoder to write back a corrupted text; then classify, write and translate with it.

    text        A B C . D E .
    corrupted   D _ E . A _ .           sentences permuted, then 30 % of the tokens in spans, a mask for each
    loss = - 1/T sum_t log p(x_t | x_<t, corrupted)        over the whole text x, not its missing parts alone

Any of five corruptions may be composed (recipes/common/denoising.py). Afterwards:
- to classify, the same text goes into encoder and decoder, and the decoder's state at the text's end is classified
- to write (a summary of a function), the source goes into the encoder, and the decoder writes the target
- to translate into the language of the pretraining, a new small encoder takes the place of the encoder's embeddings, and learns
  to turn foreign words into what BART can denoise: first with BART frozen, save its positions and the first layer's
  self-attention inputs, then all of it (section 3.4)

Lewis et al. 2019, https://arxiv.org/abs/1910.13461

    make bart                                         # laptop, offline, minutes
    make bart CONFIG=gpu                              # one GPU, a public corpus
    make bart CONFIG=cluster LAUNCH=ddp NPROC=8       # a node; scripts/ has SLURM

Laptop result: RESULTS.md#bart.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.chat import encode_plain
from recipes.common.config import Section
from recipes.common.downstream import Downstream, Split
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, OpenUnitInterval, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers
    from torch import Tensor

    from recipes.common.denoising import Marks
    from recipes.common.text_to_text import Pair


@dataclass
class Bart:
    """Knobs of the objective and of the tasks after it; the architecture's are in model.config."""

    block_length: PositiveInt = 1022  # tokens of text; with its start and end 1024
    corruptions: tuple[
        Literal["token_masking", "token_deletion", "text_infilling", "sentence_permutation", "document_rotation"], ...
    ] = ("sentence_permutation", "text_infilling")  # one after the other; section 5.1
    rate: OpenUnitInterval = 0.3  # share of the tokens that is masked, deleted or filled in; section 5.1
    mean_span: PositiveFloat = 3.0  # tokens of an infilled span, of its Poisson distribution; section 2.2
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW; theirs is adamw
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)
    longest_answer: PositiveInt = 32  # tokens written
    written: PositiveInt = 100  # held-out sources that an answer is written for
    beams: PositiveInt = 1  # of the search for an answer; 1: greedy. The paper's: 5, section 5.3
    tasks: tuple[Literal["classification", "generation", "translation"], ...] = (
        "classification", "generation", "translation",
    )  # what it is fine-tuned for  # fmt: skip
    translation_optimizer: Literal["muon", "adamw"] = "adamw"  # muon: as in pretraining, with its rates
    bleu: Literal["13a", "zh", "char", "intl"] | None = None  # sacreBLEU's tokenizer: translation is scored so too
    translate_back: bool = True  # targets to sources: into the language of the pretraining
    source_layers: PositiveInt = 2  # of the new encoder that translation puts below BART; theirs has 6
    first_stage_steps: PositiveInt = 150  # of translation with BART frozen; translation.steps come after


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    bart: Bart
    classification: Downstream
    generation: Downstream
    translation: Downstream
    training: Section[transformers.TrainingArguments]
    run: Run


# ------------------------------------------------------------------------------------- what pretraining bought


def compare_classification(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Accuracy on held-out rows, from both starts."""
    from transformers import BartForSequenceClassification

    from recipes.common.downstream import compare_classifiers, two_starts
    from recipes.common.text_to_text import Pair, batch_of

    settings, training = config.classification, config.training

    def classifier(start: Any, names: list[str]) -> Any:
        with_classes = copy.deepcopy(start.config)
        with_classes.num_labels = len(names)
        made: Any = BartForSequenceClassification(with_classes)
        made.model.load_state_dict(start.model.state_dict())
        return made

    def inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = encode_plain(tokenizer, [" ".join(filter(None, [row["text"], row["text_pair"]])) for row in rows])
        batch = batch_of(
            [Pair([marks.start, *ids[: settings.max_length - 2], marks.end], []) for ids in texts], marks.pad
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    starts = two_starts(model, training.seed)
    return compare_classifiers(starts, split, classifier, inputs, settings, training, run, "classification")


def sides_of(rows: list[dict[str, Any]], back: bool = False) -> tuple[list[str], list[str]]:
    """Sources and targets of the rows; `back` swaps them."""
    sources, targets = ([row[side] for row in rows] for side in ("source", "target"))
    return (targets, sources) if back else (sources, targets)


def encoded(rows: list[dict[str, Any]], tokenizer: Any, marks: Marks, length: int, back: bool = False) -> list[Pair]:
    """Rows of {"source", "target"} in tokens, each side with its start and end; `back` swaps the sides."""
    from recipes.common.text_to_text import Pair, encode_pairs

    pairs = encode_pairs(tokenizer, *sides_of(rows, back), length - 1)
    return [Pair([marks.start, *source], [marks.start, *target]) for source, target in pairs]


def writing_score(
    config: Config, run: RunFolder, tokenizer: Any, name: str, pairs: list[Pair], texts: tuple[list[str], list[str]]
) -> Any:
    """The held-out loss of the targets, and the words that written ones share with them, of a model.

    texts: the sources and targets of the pairs as they were given, of which the pairs may be cut
    """
    from recipes.common.downstream import written_score
    from recipes.common.text_to_text import batch_of, write

    bart, args, shown = config.bart, config.training, pairs[: config.bart.written]
    how = bart.bleu if name == "translation" else None
    return written_score(
        *(side[: len(shown)] for side in texts),
        lambda model: write(model, shown, tokenizer, bart.longest_answer, args.bf16, beams=bart.beams),
        [batch_of(pairs[i : i + 32], tokenizer.pad_token_id) for i in range(0, len(pairs), 32)],
        args,
        run,
        name,
        how,
    )


def compare_generation(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """The targets' loss and the written targets' words, from both starts."""
    from recipes.common.downstream import compare_starts, two_starts
    from recipes.common.text_to_text import batch_of, say_cut

    settings = config.generation
    rows, test = (encoded(some, tokenizer, marks, settings.max_length) for some in split)
    say_cut(rows, settings.max_length, "generation.max_length", run)
    score = writing_score(config, run, tokenizer, "generation", test, sides_of(split[1]))
    pretrained, fresh = two_starts(model, config.training.seed)
    return compare_starts(
        pretrained, fresh, rows, lambda pairs: batch_of(pairs, marks.pad), settings, score, config.training, run,
        "generation",
    )  # fmt: skip


def put_source_encoder(model: Any, layers: int) -> None:
    """In place: BART's encoder reads a new, random encoder's states where it looked tokens up (section 3.4).

    The new one has its own embeddings, so its words may be of another language; the decoder keeps BART's.
    """
    from transformers.models.bart.modeling_bart import BartEncoder

    below = copy.deepcopy(model.config)
    below.encoder_layers = layers
    encoder, plain = model.model.encoder, model.model.encoder.forward
    encoder.source = BartEncoder(below)

    def forward(
        input_ids: Tensor, attention_mask: Tensor | None = None, inputs_embeds: None = None, **options: Any
    ) -> Any:
        states = encoder.source(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return plain(inputs_embeds=states, attention_mask=attention_mask, **options)

    encoder.forward = forward


def learn_first_stage_only(model: Any) -> int:
    """Freeze all but the source encoder, BART's positions, and the inputs of its first self-attention; how many numbers learn."""
    from recipes.common.preflight import count_parameters

    bart = model.model
    model.requires_grad_(False)
    attention = bart.encoder.layers[0].self_attn
    for part in (
        bart.encoder.source, bart.encoder.embed_positions, bart.decoder.embed_positions,
        attention.q_proj, attention.k_proj, attention.v_proj,
    ):  # fmt: skip
        part.requires_grad_(True)
    return count_parameters(model, trainable_only=True)


def compare_translation(
    config: Config, run: RunFolder, tokenizer: Any, marks: Marks, model: Any, split: Split
) -> dict[str, float]:
    """Translation in two stages, from both starts, with the same new source encoder."""
    import torch

    from recipes.common.downstream import fine_tune, two_starts
    from recipes.common.optimizers import muon_with_adamw
    from recipes.common.text_to_text import batch_of, say_cut

    settings, training, bart = config.translation, config.training, config.bart
    optimizer = (
        (lambda model: muon_with_adamw(model, training, bart.muon_learning_rate))
        if bart.translation_optimizer == "muon" else None
    )  # fmt: skip
    rows, test = (encoded(some, tokenizer, marks, settings.max_length, bart.translate_back) for some in split)
    say_cut(rows, settings.max_length, "translation.max_length", run)
    score = writing_score(config, run, tokenizer, "translation", test, sides_of(split[1], bart.translate_back))
    figures: dict[str, float] = {}
    for prefix, start in zip(("", "baseline_"), two_starts(model, training.seed), strict=True):
        torch.manual_seed(training.seed)  # the new encoder is the same in both
        put_source_encoder(start, bart.source_layers)
        learned = learn_first_stage_only(start)

        def collate(pairs: list[Pair]) -> dict[str, Tensor]:
            return batch_of(pairs, marks.pad)

        losses = fine_tune(
            start, rows, collate, replace(settings, steps=bart.first_stage_steps), training, run, optimizer
        )
        figures[f"{prefix}translation_first_stage_loss"] = sum(losses[-10:]) / len(losses[-10:])
        start.requires_grad_(True)
        fine_tune(start, rows, collate, settings, training, run, optimizer)
        start.eval()
        figures |= {f"{prefix}translation_{figure}": value for figure, value in score(start).items()}
        run.say(
            f"  translation, {'from scratch' if prefix else 'pretrained'}: {learned:,} numbers in stage 1  "
            + "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if k.startswith(f"{prefix}translation"))
        )
    return figures


# -------------------------------------------------------------------------------------------------------- the story


def check(config: Config, model: Any) -> None:
    """Raise UserError, before any long work, for what cannot be trained so."""
    from transformers import BartForConditionalGeneration

    from recipes.common.downstream import too_short
    from recipes.common.draws import refuse_smoothing
    from recipes.common.optimizers import check_muon

    bart = config.bart
    if "muon" in (bart.optimizer, bart.translation_optimizer):
        check_muon(config.training)
    refuse_smoothing(config.training)
    if not isinstance(model, BartForConditionalGeneration):
        raise UserError(f"model: {type(model).__name__} is not BART: set model_type: bart, or give a BART's name")
    positions = model.config.max_position_embeddings
    lengths = {"bart.block_length: with its start and end": bart.block_length + 2}
    lengths |= {f"{task}.max_length:": getattr(config, task).max_length for task in bart.tasks}
    problems = [
        f"{name} {length} tokens are above model.config.max_position_embeddings, {positions}"
        for name, length in lengths.items()
        if length > positions
    ]
    problems += too_short({task: getattr(config, task).max_length for task in bart.tasks})
    if not bart.corruptions:
        problems.append("bart.corruptions: there is none, and a text that is not corrupted is only copied: name one")
    if bart.block_length < 8:
        problems.append(f"bart.block_length: {bart.block_length} tokens are too short to be corrupted: use 8 at least")
    if bart.mean_span > bart.block_length:
        problems.append(f"bart.mean_span: {bart.mean_span:g} tokens are more than a text has, {bart.block_length}")
    if bart.longest_answer >= positions:
        problems.append(f"bart.longest_answer: {bart.longest_answer} is not below the {positions} positions")
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, objective, train, evaluate, fine-tune from two starts, save."""
    import numpy as np
    from transformers import AutoModelForSeq2SeqLM, Trainer

    from recipes.common.data import load_data
    from recipes.common.denoising import KINDS, add_marks, corrupt
    from recipes.common.downstream import load_classes, load_rows
    from recipes.common.draws import generator, numbered, pretrain_and_score
    from recipes.common.held_out import mean_loss
    from recipes.common.models import extend_vocabulary, load_model, load_tokenizer
    from recipes.common.optimizers import muon_with_adamw
    from recipes.common.packing import pack_texts
    from recipes.common.preflight import enough_blocks
    from recipes.common.text_to_text import Pair, batch_of, flops_per_source_token

    bart, training = config.bart, config.training
    tokenizer = load_tokenizer(config.model, run)
    marks = extend_vocabulary(add_marks, tokenizer, config.model, run)
    model: Any = load_model(
        config.model, tokenizer, run, AutoModelForSeq2SeqLM,
        decoder_start_token_id=marks.end, forced_eos_token_id=None,
    )  # fmt: skip
    check(config, model)
    # the library's loss is a micro-batch's mean whatever it is given, so it is the Trainer that has to divide
    model.accepts_loss_kwargs = False

    splits = {
        task: load_classes(config.classification, task, run.dry)
        if task == "classification"
        else load_rows(getattr(config, task), "pair", task, run.dry)
        for task in bart.tasks
    }
    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=bart.block_length)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out = [row["input_ids"] for row in enough_blocks(pack, data["validation"], run)]

    def noised(texts: list[list[int]], draws: list[int], seed: int, kinds: tuple[Any, ...]) -> dict[str, Tensor]:
        pairs = []
        for text, draw in zip(texts, draws, strict=True):
            left = corrupt(np.asarray(text), kinds, marks, generator(seed, draw), bart.rate, bart.mean_span)
            pairs.append(Pair([marks.start, *left.tolist(), marks.end], [marks.start, *text, marks.end]))
        return batch_of(pairs, marks.pad)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts, draws = [row["input_ids"] for row in rows], [row["draw"] for row in rows]
        return noised(texts, draws, training.seed, bart.corruptions)

    def held_out_batches(kinds: tuple[Any, ...], count: int | None = None) -> list[dict[str, Tensor]]:
        texts = held_out[:count]
        parts = [range(i, min(i + 32, len(texts))) for i in range(0, len(texts), 32)]
        return [noised([texts[i] for i in part], list(part), 0, kinds) for part in parts]

    trainer = Trainer(
        model,
        training,
        train_dataset=numbered(blocks, training),
        data_collator=collate,
        optimizers=(
            muon_with_adamw(model, training, bart.muon_learning_rate) if bart.optimizer == "muon" else None,
            None,
        ),
    )
    figures, model = pretrain_and_score(
        trainer,
        tokenizer,
        held_out_batches(bart.corruptions),
        run,
        time_limit_minutes=config.run.time_limit_minutes,
        flops_per_token=lambda batch: flops_per_source_token(model, batch),
    )
    for kind in KINDS:  # also those that it was not trained on
        figures[f"eval_loss_{kind}"] = mean_loss(model, held_out_batches((kind,), 64), training)

    compare = {
        "classification": compare_classification, "generation": compare_generation, "translation": compare_translation,
    }  # fmt: skip
    for task in bart.tasks:
        figures |= compare[task](config, run, tokenizer, marks, model, splits[task])
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
