"""Objectives that corrupt a text anew each time it is seen, so that a stopped run resumes to the very same corruptions.

Every training sample has a number, and its randomness comes from that number alone: `generator(seed, row["draw"])`. Which
process, worker or resumed run makes it does not matter. (UniLM's wrong next segments are another row's of the batch, so they
are a resumed run's too, and another number of processes has others.)

`pretrain_and_score` is what such recipes do with their Trainer: train, save, and hold the loss against two that know less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from recipes.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from recipes.common.run_folder import RunFolder

BATCHES_COUNTED = 50  # whose targets give the unigram frequencies


class Numbered(TorchDataset):  # type: ignore[type-arg]
    """`draws` items from a map-style data set, again and again from its start, each with its number as "draw"."""

    def __init__(self, rows: Any, draws: int):
        self.rows, self.draws = rows, draws

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= self.draws:
            raise IndexError(i)  # ends a `for` over the rows
        return {**self.rows[i % len(self.rows)], "draw": i}


def numbered(rows: Any, args: TrainingArguments) -> Any:
    """Rows with a "draw" each, as many as args.max_steps (or else num_train_epochs) will take; a stream is numbered as it comes."""
    args.remove_unused_columns = False  # the collator wants the number, which is no argument of the model
    if not hasattr(rows, "__len__"):
        # each process makes its own batches: else one makes all of a step's, and joins what has different lengths
        cast("Any", args.accelerator_config).dispatch_batches = False
        return rows.map(lambda row, i: {**row, "draw": i}, with_indices=True)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps > 0:
        return Numbered(rows, args.max_steps * a_step)
    draws = math.ceil(len(rows) * args.num_train_epochs)
    args.num_train_epochs = 1  # they are in the numbers now
    return Numbered(rows, draws)


def refuse_smoothing(args: TrainingArguments) -> None:
    """Raise UserError for a loss that the Trainer would work out itself, from logits that these objectives do not hand out."""
    if args.label_smoothing_factor:
        raise UserError(
            "training.label_smoothing_factor: an objective that hides parts of a text has its own loss, unsmoothed: leave it out"
        )


def generator(seed: int, draw: int) -> np.random.Generator:
    """The randomness of one draw."""
    return np.random.default_rng([seed, draw])


def pretrain_and_score(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[dict[str, Tensor]],
    run: RunFolder,
    *,
    time_limit_minutes: float | None = None,
    flops_per_token: Callable[[dict[str, Tensor]], float] | None = None,
) -> tuple[dict[str, float], Any]:
    """Train, save, draw the loss. Gives the held-out `eval_loss`, beside it `untrained_loss` and `unigram_loss`, and the model.

    held_out: batches whose draws are the same before and after, and in every run
    flops_per_token: of a batch, for models that the usual count does not fit (an encoder-decoder)
    """
    from accelerate.utils import gather_object

    from recipes.common.held_out import mean_loss, unigram_loss
    from recipes.common.preflight import preflight
    from recipes.common.sharding import whole_model
    from recipes.common.training import fit, total_steps

    model: Any = trainer.model
    args = trainer.args
    batches = iter(trainer.get_train_dataloader())
    seen = [next(batches)]
    preflight(run, model, seen[0], args=args, total_steps=total_steps(trainer))
    if flops_per_token is not None:
        run.figures["flops_per_token"] = flops_per_token(seen[0])
    more = max(1, BATCHES_COUNTED // args.world_size) - 1  # of each process, which counts its part of every batch
    seen += [batch for batch, _ in zip(batches, range(more), strict=False)]
    targets = gather_object([batch["labels"].cpu() for batch in seen])
    figures = {
        "unigram_loss": unigram_loss(targets, [batch["labels"] for batch in held_out], len(tokenizer)),
        "untrained_loss": mean_loss(whole_model(trainer), held_out, args),
    }
    fit(trainer, run, time_limit_minutes=time_limit_minutes)
    model = whole_model(trainer)
    run.save_model(model, tokenizer)
    run.plot_curve("loss", "loss")
    figures["eval_loss"] = mean_loss(model, held_out, args)
    return figures, model
