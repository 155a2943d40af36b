"""What is checked and said just before the long work starts; `--dry-run` ends here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from recipes.common import machine
from recipes.common.errors import DryRunDone, UserError
from recipes.common.memory_estimate import (
    activation_bytes,
    memory_here,
    memory_per_device,
    numbers_of,
    try_step,
    weight_bytes,
)
from recipes.common.run_folder import RunFolder
from recipes.common.training import dtype_name, duration

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

ASSUMED_MFU = 0.35  # for the time estimate of a dry run, before anything ran; the laptop runs reach 0.25 to 0.5
DRY_ROWS = 2000  # that a dry run looks at
DRY_TEXT, DRY_HELD_OUT = 500_000, 50_000  # characters of text that a dry run packs, and more where a batch takes more
TRY_FLOPS = 5e11  # a dry run on a processor tries a micro-batch of no more, two or three times: about ten seconds


def enough_rows(rows: Any, args: TrainingArguments, run: RunFolder) -> Any:
    """The rows; a few of them for a dry run whose steps are known, since it need not see all to say how long they take."""
    return rows.take(DRY_ROWS) if run.dry and args.max_steps > 0 else rows


def enough_blocks(pack: Callable[[Any], Any], rows: Any, run: RunFolder, args: TrainingArguments | None = None) -> Any:
    """`pack(rows)`, blocks of rows of {"text"}; a dry run packs no more of the text than it has to see.

    args: the training's, for training text: each process takes a micro-batch of blocks. Held-out text is enough where `pack`
    does not refuse it. Sets run.share_read, from which `preflight` knows the steps of whole epochs.
    """
    stream = not hasattr(rows, "__len__")
    if not run.dry or (stream and args is not None and args.max_steps <= 0):  # which the Trainer refuses
        return pack(rows)
    wanted = 0 if args is None else args.per_device_train_batch_size * args.world_size
    characters = DRY_HELD_OUT if args is None else DRY_TEXT
    while (part := first_text(rows, characters)) is not None:
        characters *= 4
        try:
            blocks = pack(part)
        except UserError:  # said of all of the text, if it is so for all
            continue
        if len(blocks) >= wanted:
            if args is not None and not stream:
                run.share_read = sum(map(len, part["text"])) / sum(map(len, rows["text"]))
            return blocks.to_iterable_dataset() if stream and args is not None else blocks
    return pack(rows)


def first_text(rows: Iterable[dict[str, Any]], characters: int) -> Any:
    """The first rows that hold so many characters, the last of them cut; None where there are no more than that."""
    from datasets import Dataset

    texts: list[str] = []
    for row in rows:
        texts.append(row["text"][:characters])
        characters -= len(row["text"])
        if characters < 0:
            return Dataset.from_dict({"text": texts})
    return None


def count_parameters(model: Any, trainable_only: bool = False) -> int:
    """How many numbers the model holds (or learns); tied weights count once."""
    return sum(numbers_of(p) for p in model.parameters() if p.requires_grad or not trainable_only)


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Floating-point operations a token of one training step, PaLM's convention (Chowdhery et al. 2022, appendix B).

    6 N + 12 L h S: N parameters that multiply (an untied input embedding is a look-up and does not), L layers, h hidden
    size, S sequence length. Frozen parameters need no weight gradient: 4 instead of 6.
    """
    config = model.config
    total, learned = count_parameters(model), count_parameters(model, trainable_only=True)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is not None and hasattr(embedding, "weight") and (head is None or head.weight is not embedding.weight):
        total -= numbers_of(embedding.weight)
        learned -= numbers_of(embedding.weight) if embedding.weight.requires_grad else 0
    layers = getattr(config, "num_hidden_layers", 0)
    hidden = getattr(config, "hidden_size", 0)
    return 4 * total + 2 * learned + 12 * layers * hidden * sequence_length


def check_batch(batch: dict[str, Any], model: nn.Module) -> None:
    """Raise UserError if the first batch cannot teach the model anything, or does not fit it."""
    problems = []
    ids, labels = batch.get("input_ids"), batch.get("labels")
    config = model.config
    if ids is not None:
        vocabulary = getattr(config, "vocab_size", None)
        virtual = getattr(getattr(model, "prompt", None), "last_id", -1)  # ids of learned prompts, behind the words
        vocabulary = None if vocabulary is None else max(vocabulary, virtual + 1)
        if vocabulary is not None and int(ids.max()) >= vocabulary:
            problems.append(
                f"the batch holds token {int(ids.max())}, but the model knows {vocabulary}: the tokenizer (model.tokenizer) and the model do not belong together"
            )
        positions = getattr(config, "max_position_embeddings", None)
        longest = int(batch["position_ids"].max()) + 1 if batch.get("position_ids") is not None else ids.shape[-1]
        if positions is not None and longest > positions:
            problems.append(
                f"a sample is {longest} tokens long, but the model has {positions} positions: lower training.max_length"
            )
    if labels is not None and labels.ndim == 2 and bool((labels == -100).all()):
        problems.append(
            "every label of the first batch is masked, so there is nothing to learn: check data.columns, that the answers are not "
            "empty, and that the maximum length leaves room for them"
        )
    if problems:
        raise UserError(problems)


def preflight(
    run: RunFolder,
    model: nn.Module,
    batch: dict[str, Any],
    *,
    args: TrainingArguments,
    total_steps: int,
    check: Callable[[dict[str, Any], nn.Module], None] = check_batch,
    trainer: Any = None,
    scored: int | None = None,
    answers: Callable[[], Any] | None = None,
    frozen: Sequence[Any] = (),
) -> None:
    """Check the first batch, say what is about to run, and end a dry run with an estimate.

    `batch` is one process's micro-batch, as the model will get it: a step has gradient_accumulation_steps of them on
    every process. `trainer` makes the estimate of memory better: its optimizer counts, and on a processor a dry run tries
    a step, after `answers`, which measures a few held-out rows as the run will. `scored`: positions that have logits all at
    once; default: all. `frozen`: models that are loaded beside it. Sets flops_per_token and the parameter counts among the run's figures. Raises DryRunDone or UserError.
    """
    import psutil
    import torch

    check(batch, model)
    parameters, learned = count_parameters(model), count_parameters(model, trainable_only=True)
    if learned == 0:
        raise UserError("nothing would learn: every parameter of the model is frozen")
    ids = next((v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim >= 2), None)
    micro_tokens = ids.numel() if ids is not None else 0
    sequence = ids.shape[-1] if ids is not None else 0
    tokens = micro_tokens * args.gradient_accumulation_steps * args.world_size
    per_token = flops_per_token(model, sequence)
    guessed = ""
    if run.share_read < 1 and args.max_steps <= 0:
        total_steps = math.ceil(total_steps / run.share_read)
        guessed = f" (from the first {run.share_read:.1%} of the text)"
    run.figures |= {"flops_per_token": per_token, "parameters": parameters, "trainable_parameters": learned}
    run.say(
        f"  model: {parameters:,} parameters, {learned:,} learn ({learned / parameters:.2%}); "
        f"{total_steps:,} steps of {tokens:,} tokens{guessed}"
    )
    if not run.dry:
        return

    dtype = dtype_name(args)
    peak = machine.peak_flops(dtype) * args.world_size
    seconds = total_steps * tokens * per_token / (peak * ASSUMED_MFU)
    activations = activation_bytes(model, batch, args, scored)
    optimizer = getattr(trainer, "optimizer", None)
    memory = memory_per_device(model, args, activations, optimizer, frozen)
    here = ""
    if args.device.type == "cpu":
        quick = micro_tokens * per_token <= TRY_FLOPS
        fits = memory["zero0"] * machine.GIB < psutil.virtual_memory().available
        tried = trainer is not None and quick and fits and next(model.parameters()).device.type == "cpu"
        trial = partial(try_step, trainer, batch, answers) if tried else None
        alone = memory["zero0"] - sum(map(weight_bytes, frozen)) / machine.GIB  # the process holds these already
        size = memory_here(model, args, alone, optimizer, trial)
        how = "a step was tried" if tried else "no step was tried"
        how += ", and the rest of the text comes to it" if run.share_read < 1 else ""
        here = f"  memory here    {size:.2f} GiB for the whole process ({how})"
    kept_in = str(next(p.dtype for p in model.parameters() if p.requires_grad)).removeprefix("torch.")
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor))
    supervised = batch["labels"] if isinstance(batch.get("labels"), torch.Tensor) else None
    lines = [
        "dry run: nothing was trained",
        f"  first batch    {shapes}",
        *(
            [f"  supervised     {int((supervised != -100).sum()):,} of {supervised.numel():,} label positions"]
            if supervised is not None and supervised.ndim == 2
            else []
        ),
        f"  parameters     {parameters:,}, of which {learned:,} learn",
        f"  precision      {dtype} products, {kept_in} weights that learn",
        *([here] if here else []),
        f"  memory/device  {args.world_size} device(s): " + ", ".join(f"{k} {v:.2f} GiB" for k, v in memory.items()),
        f"                 of which activations {activations / machine.GIB:.2f} GiB for a micro-batch of {micro_tokens:,} tokens",
        f"  steps          {total_steps:,} x {tokens:,} tokens = {total_steps * tokens:,}{guessed}",
        f"  time           about {duration(seconds)} at {ASSUMED_MFU:.0%} of the measured {peak / 1e12:.2f} TFLOP/s",
    ]
    run.say("\n".join(lines))
    raise DryRunDone
