"""Rows of the fine-tuning chapter: against TRL's trainer, and against loops written by hand."""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes.common import machine
from scripts.bench_rows.harness import WARM_UP, clock_callback, fresh_state, interleave, quiet_run, result
from scripts.bench_rows.materials import BATCH, LENGTH, alpaca, make_tokenizer, small_chat_model, small_llama
from scripts.bench_rows.recipe_runs import timed_training, trainer_of


def sft(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second that are not padding, of fine-tuning the 12M model on alpaca at batch 8 of at most 512 tokens."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from recipes.common.sft import make_trainer
    from recipes.common.sft_packing import prepare
    from recipes.common.training import fit, training_defaults

    rows = alpaca()
    conversations = Dataset.from_list(rows)
    tokenizer = make_tokenizer(m["content"] for row in rows for m in row["messages"])

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    count = WARM_UP + steps + 1
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": count, "max_length": LENGTH, "save_strategy": "no",
    }  # fmt: skip
    their_model, packing_model, our_model = small_llama(), small_llama(), small_llama()
    packed: dict[str, Any] = {}

    def counting(trainer: Any) -> list[int]:
        """Wrap the collator: how many tokens that are not padding each batch holds."""
        collate, sizes = trainer.data_collator, []

        def counted(samples: Any) -> Any:
            batch = collate(samples)  # a mask tells padding apart, also where the collator cuts; packed rows have none
            mask = batch.get("attention_mask")
            sizes.append(sum(len(row["input_ids"]) for row in samples) if mask is None else int(mask.sum()))
            return batch

        trainer.data_collator = counted
        return sizes

    def speed(clock: Any, sizes: list[int]) -> float:
        timed = list(zip(sizes, clock.seconds, strict=False))[WARM_UP:]
        return sum(n for n, _ in timed) / sum(t for _, t in timed)

    def of_trl(model: Any, packing: bool) -> float:
        fresh_state()
        args = SFTConfig(
            str(folder / "trl"), use_cpu=not machine.has_gpu(), report_to="none", disable_tqdm=True, packing=packing,
            assistant_only_loss=True, bf16=bool(machine.choose_bf16().value), gradient_checkpointing=False, **given,
        )  # fmt: skip
        clock = clock_callback()
        trainer = SFTTrainer(
            model, args=args, train_dataset=conversations, processing_class=tokenizer, callbacks=[clock]
        )
        sizes = counting(trainer)
        trainer.train()
        return speed(clock, sizes)

    def ours() -> float:
        fresh_state()
        chosen = {key: value for key, (value, _) in training_defaults(folder / "ours", given).items()}
        args = SFTConfig(**{**chosen, **given, "packing": True, "assistant_only_loss": True})
        run = quiet_run(folder)
        run.figures["flops_per_token"] = 0.0
        if not packed:
            packed.update(prepare({"train": conversations}, tokenizer, our_model, args, run))  # type: ignore[arg-type]
        trainer = make_trainer(our_model, tokenizer, packed, args)
        clock = clock_callback()
        trainer.add_callback(clock)
        sizes = counting(trainer)
        fit(trainer, run)
        return speed(clock, sizes)

    torch.manual_seed(0)
    precision = "bf16" if machine.choose_bf16().value else "fp32"
    contestants = {
        f"TRL, unpacked default, {precision}": lambda: of_trl(their_model, False),
        f"TRL, packed, {precision}": lambda: of_trl(packing_model, True),
        "ours": ours,
    }
    with temporary:
        found = interleave(contestants, rounds)
    return result(
        "sft", f"fine-tuning on alpaca, 12M llama, batch {BATCH} of at most {LENGTH}", "tokens/s, not padding", found, True,
        batch=[BATCH, LENGTH], steps=steps, samples=len(rows), compiled=False, gradient_checkpointing=False,
        note="all learn the assistant's tokens only; a round's tokens over its seconds; no contestant is compiled",
    )  # fmt: skip


def adapter(recipe: str, steps: int, rounds: int) -> dict[str, Any]:
    """Steps a second of a recipe that trains one of peft's adapters, at its laptop config, against a loop written by hand.

    The loop takes the same packed rows, adapter, quantisation and precision, and is what peft's documentation shows.
    """
    with tempfile.TemporaryDirectory() as folder:
        small_chat_model(Path(folder), positions=LENGTH)
        settings = {
            "model__name": folder, "data__max_samples": 2000,
            "evaluation__max_samples": 1, "evaluation__max_new_tokens": 1,  # measured before it trains
        }  # fmt: skip
        trainer = trainer_of(f"finetuning.{recipe}", **settings)
        precision = "bf16" if trainer.args.bf16 else "fp32"

        def by_hand() -> float:
            return 1 / statistics.median(peft_loop(trainer, folder, steps))

        def ours() -> float:
            return 1 / statistics.median(timed_training(f"finetuning.{recipe}", steps, **settings).seconds)

        found = interleave({f"PEFT loop by hand, {precision}": by_hand, "ours": ours}, rounds)
    batch = [trainer.args.per_device_train_batch_size, trainer.args.max_length]
    return result(
        recipe, f"{recipe} fine-tuning, 3.4M llama, batch {batch[0]} x {batch[1]}, packed", "steps/s", found, True,
        batch=batch, steps=steps, bf16=trainer.args.bf16, compiled=False,
        adapter=str(trainer.model.peft_config["default"].peft_type.value), note="random weights; the same packed rows",
    )  # fmt: skip


def peft_loop(trainer: Any, base: str, steps: int) -> list[float]:
    """Seconds of each timed step of a plain loop over the rows of a recipe's trainer, with an adapter like its own."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    fresh_state()
    args, theirs = trainer.args, trainer.model
    device = "cuda" if machine.has_gpu() else "cpu"
    quantization = getattr(theirs.config, "quantization_config", None)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=copy.deepcopy(quantization), device_map={"": device}
    )
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    model = get_peft_model(model, copy.deepcopy(theirs.peft_config["default"]))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    batches = DataLoader(
        trainer.train_dataset, args.per_device_train_batch_size, shuffle=True, collate_fn=trainer.data_collator
    )
    model.train()
    seconds = []
    started = time.perf_counter()
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    for batch in itertools.islice(epochs, WARM_UP + steps):
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            # no cache: with one, transformers would let packed conversations see each other
            loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds[WARM_UP:]
