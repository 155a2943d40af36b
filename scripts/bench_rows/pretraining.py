"""Rows of the pretraining chapter: tokens a second against the transformers Trainer's defaults, and waiting for data."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.common import machine
from scripts.bench_rows.harness import WARM_UP, clock_callback, fresh_state, interleave, quiet_run, result
from scripts.bench_rows.materials import llama_of_this_machine
from scripts.bench_rows.recipe_runs import config_of_this_machine, timed_training, trainer_of, with_tokenizer

TRAINER = "transformers Trainer, defaults"
CORRUPTING = ("bert", "t5", "unilm", "glm", "bart")  # recipes whose collator corrupts each text anew
DATA_GOAL = 5.0  # per cent of a step, at most


def trainer_defaults(model: Any, rows: Any, collate: Any, batch_size: int, steps: int) -> list[float]:
    """Seconds of each timed step of a Trainer that was told no more than the batch, the steps, and to write nothing."""
    from transformers import Trainer, TrainingArguments

    fresh_state()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, use_cpu=not machine.has_gpu(), per_device_train_batch_size=batch_size, max_steps=WARM_UP + steps + 1,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        clock = clock_callback()
        Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    return clock.seconds[WARM_UP:]


def llama(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of pretraining, and MFU."""
    import torch
    from transformers import Trainer, TrainingArguments

    from recipes.common.fused_loss import fuse_next_token_loss
    from recipes.common.preflight import count_parameters, flops_per_token
    from recipes.common.training import fit, training_defaults

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    count = WARM_UP + steps + 1  # the last step's end is not seen
    (our_model, batch_size, length), (loop_model, *_), (default_model, *_) = (llama_of_this_machine() for _ in range(3))
    vocabulary, generator = our_model.config.vocab_size, torch.Generator().manual_seed(0)
    blocks = [
        {"input_ids": torch.randint(vocabulary, (length,), generator=generator)} for _ in range(batch_size * count)
    ]
    bf16, compiles = bool(machine.choose_bf16().value), bool(machine.can_compile().value)
    device = "cuda" if machine.has_gpu() else "cpu"

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    loop_name = "minimal loop, " + ("bf16" if bf16 else "fp32") + (" + compile" if compiles else "")
    loop_model.to(device)
    fuse_next_token_loss(our_model)
    loop_step = loop_model
    if compiles:
        our_model.compiled_loss = torch.compile(our_model.compiled_loss)
        loop_step = torch.compile(loop_model)

    def speed(name: str, seconds: list[float]) -> float:
        step_seconds[name].append([round(t, 4) for t in seconds])
        return batch_size * length / statistics.median(seconds)

    def defaults() -> float:
        return speed(TRAINER, trainer_defaults(default_model, blocks, collate, batch_size, steps))

    def minimal_loop() -> float:
        fresh_state()
        optimizer = torch.optim.AdamW(loop_model.parameters(), lr=5e-5, fused=True)
        seconds = []
        for step in range(count - 1):
            started = time.perf_counter()
            batch = collate(blocks[step * batch_size : (step + 1) * batch_size])
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loop_step(**{k: v.to(device) for k, v in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(loop_model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.perf_counter() - started)
        return speed(loop_name, seconds[WARM_UP:])

    def ours() -> float:
        fresh_state()
        given = {"per_device_train_batch_size": batch_size, "max_steps": count, "save_strategy": "no"}
        chosen = {key: value for key, (value, _) in training_defaults(folder / "ours", given).items()}
        run = quiet_run(folder)
        run.figures["flops_per_token"] = per_token
        clock = clock_callback()
        args = TrainingArguments(**{**chosen, **given})
        trainer = Trainer(our_model, args, train_dataset=blocks, data_collator=collate, callbacks=[clock])
        fit(trainer, run)
        return speed("ours", clock.seconds[WARM_UP:])

    per_token = flops_per_token(our_model, length)
    contestants = {
        TRAINER: defaults, loop_name: minimal_loop, "ours": ours,
    }  # fmt: skip
    step_seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    with temporary:
        speeds = interleave(contestants, rounds)
    peak = machine.peak_flops("bfloat16" if bf16 else "float32")
    return result(
        "llama", f"pretraining, {count_parameters(our_model) / 1e6:.1f}M llama, batch {batch_size} x {length}", "tokens/s", speeds, True,
        parameters=count_parameters(our_model), batch=[batch_size, length], steps=steps,
        mfu={name: round(statistics.median(of) * per_token / peak, 4) for name, of in speeds.items()},
        peak_tflops=round(peak / 1e12, 3), step_seconds=step_seconds, bf16=bf16, compiled=compiles,
    )  # fmt: skip


def bert(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of the BERT recipe, hidden words and next sentences, at its laptop config; on a GPU with gpu.yaml's sizes."""
    from transformers import DataCollatorForLanguageModeling

    from recipes.common.masked_language import IGNORED, add_marks

    def peer(batches: list[dict[str, Any]], tokenizer: Any, model: Any) -> tuple[list[dict[str, Any]], Any]:
        """The recipe's own pairs, as they were before words were hidden; the library's collator hides as many anew."""
        add_marks(tokenizer)
        special = tokenizer.all_special_ids
        rows = []
        for batch in batches:
            ids = batch["input_ids"].where(batch["labels"] == IGNORED, batch["labels"])  # (batch, seq)
            columns = (ids, batch["token_type_ids"], batch["next_sentence_label"])
            rows += [
                {
                    "input_ids": tokens, "token_type_ids": segments, "next_sentence_label": label,
                    "special_tokens_mask": [int(token in special) for token in tokens],
                }
                for tokens, segments, label in zip(*(column.tolist() for column in columns), strict=True)
            ]  # fmt: skip
        hidden = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        rate = hidden / sum(batch["labels"].numel() for batch in batches)  # as many as the recipe hides
        return rows, DataCollatorForLanguageModeling(tokenizer, mlm_probability=rate)

    return against_trainer("bert", "pretraining.bert", peer, steps, rounds)


def t5(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens of text a second of the T5 recipe, span corruption, at its laptop config; on a GPU with gpu.yaml's sizes."""
    from transformers import DataCollatorForSeq2Seq

    def peer(batches: list[dict[str, Any]], tokenizer: Any, model: Any) -> tuple[list[dict[str, Any]], Any]:
        """The recipe's own texts, their spans cut out beforehand: what is left to the collator is to pad."""
        rows = [
            {"input_ids": source, "labels": target}
            for batch in batches
            for source, target in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
        return rows, DataCollatorForSeq2Seq(tokenizer, model=model)

    return against_trainer("t5", "pretraining.t5", peer, steps, rounds)


Peer = Callable[[list[dict[str, Any]], Any, Any], tuple[list[dict[str, Any]], Any]]


def against_trainer(row: str, recipe: str, peer: Peer, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens of input a second: the recipe itself against the Trainer's defaults on the recipe's model and rows.

    peer: makes the Trainer's rows and collator from the recipe's batches, the tokenizer and the model
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    from recipes.common.preflight import count_parameters

    with tempfile.TemporaryDirectory() as folder:
        settings = with_tokenizer(Path(folder)) | config_of_this_machine(recipe, Path(folder))
        trainer = trainer_of(recipe, **settings)
        batches = list(itertools.islice(trainer.get_train_dataloader(), WARM_UP + steps + 1))
        shape = list(batches[0]["input_ids"].shape)
        # without what the recipe has chosen beside the architecture, such as the attention kernel
        config = type(trainer.model.config).from_dict(trainer.model.config.to_dict())
        model = type(trainer.model)(config)
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
        rows, collate = peer(batches, AutoTokenizer.from_pretrained(settings["model__tokenizer"]), model)
        data = Dataset.from_list(rows)

        def speed(seconds: list[float]) -> float:
            return shape[0] * shape[1] / statistics.median(seconds)

        contestants = {
            TRAINER: lambda: speed(trainer_defaults(model, data, collate, shape[0], steps)),
            "ours": lambda: speed(timed_training(recipe, steps, **settings).seconds),
        }
        found = interleave(contestants, rounds)
    size = f"{count_parameters(model) / 1e6:.1f}M {row}, batch {shape[0]} x {shape[1]}"
    return result(
        row, f"pretraining, {size}", "tokens/s", found, True,
        batch=shape, steps=steps, bf16=bool(machine.choose_bf16().value), compiled=False,
        note="the same pairs or texts, none of them padded; ours is the whole recipe: Muon, whose step costs more, a log line a step",
    )  # fmt: skip


def data(steps: int, rounds: int) -> dict[str, Any]:
    """Per cent of a step that the pretraining recipes wait for their next batch, which they corrupt anew each time."""
    steps = 5 * steps
    with tempfile.TemporaryDirectory() as folder:
        settings = with_tokenizer(Path(folder))

        def share(recipe: str) -> float:
            here = config_of_this_machine(f"pretraining.{recipe}", Path(folder))
            timed = timed_training(f"pretraining.{recipe}", steps, **settings, **here)
            return 100 * sum(timed.waits) / sum(timed.seconds)

        found = interleave({name: (lambda name=name: share(name)) for name in CORRUPTING}, rounds)
    return result(
        "data", "waiting for the next batch", "% of a step", found, False,
        goal=DATA_GOAL, steps=steps, note="no worker process: fetching, corrupting and collating stand between two steps",
    )  # fmt: skip
