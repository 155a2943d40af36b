"""Rows of what a user waits for before the first step: `--help`, and the first step itself."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes.common import machine
from scripts.bench_rows.harness import ROOT, call, environment_of_own, interleave, result, seconds_until
from scripts.bench_rows.materials import BATCH, LENGTH, alpaca, small_chat_model


def start(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds from the start of the process to the first finished training step, offline, each with fresh caches."""
    import yaml

    bf16 = bool(machine.choose_bf16().value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, tokenizer = small_chat_model(folder / "model", positions=LENGTH)
        (folder / "data").mkdir()
        data = folder / "data" / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
        config = {
            "model": {"name": str(folder / "model")},
            # one held-out row and answer: TRL's script measures nothing before it trains
            "data": {"name": str(data), "max_validation_samples": 1},
            "full": {"optimizer": "adamw"},
            "training": {
                "per_device_train_batch_size": BATCH,
                "max_length": LENGTH,
                "max_steps": 3,
                "learning_rate": 1e-5,
            },
            "evaluation": {"max_samples": 1, "max_new_tokens": 1},
            "run": {"root": str(folder / "runs"), "overwrite": True},
        }
        (folder / "ours.yaml").write_text(yaml.safe_dump(config))
        theirs = {
            "model_name_or_path": folder / "model", "dataset_name": folder / "data", "output_dir": folder / "trl",
            "per_device_train_batch_size": BATCH, "max_length": LENGTH, "max_steps": 3, "learning_rate": 1e-5,
            "assistant_only_loss": True, "gradient_checkpointing": False, "bf16": bf16, "use_cpu": not machine.has_gpu(),
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        flags = [word for key, value in theirs.items() for word in (f"--{key}", str(value))]
        commands = {
            "trl.scripts.sft": ([sys.executable, "-m", "trl.scripts.sft", *flags], r"'loss'"),
            "ours": (
                [sys.executable, str(ROOT / "recipes/finetuning/full.py"), "--config", str(folder / "ours.yaml")],
                r"^step 1/",
            ),
        }

        def timed(command: list[str], sign: str) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                environment = environment_of_own(HF_HOME=cache, HF_DATASETS_CACHE=f"{cache}/datasets")
                return seconds_until(command, sign, environment)

        contestants = {name: (lambda c=command, s=sign: timed(c, s)) for name, (command, sign) in commands.items()}
        for run in contestants.values():  # once before it counts: the libraries come from the disk
            run()
        found = interleave(contestants, rounds)
    return result(
        "start", "process start to the first finished step of fine-tuning, 3.4M llama", "seconds", found, False,
        batch=[BATCH, LENGTH], bf16=bf16, vocabulary=len(tokenizer),
        note="each with its own default packing: ours packs, TRL does not; ours measures one held-out row first",
    )  # fmt: skip


def help_seconds(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of `--help`."""
    commands = {
        "trl.scripts.sft": ["-m", "trl.scripts.sft", "--help"],
        "ours": ["-m", "recipes.finetuning.full", "--help"],
    }

    def timed(command: list[str]) -> float:
        started = time.perf_counter()
        call([sys.executable, *command], environment_of_own())
        return time.perf_counter() - started

    contestants = {name: (lambda c=command: timed(c)) for name, command in commands.items()}
    for run in contestants.values():  # once before it counts: the libraries come from the disk
        run()
    return result("help", "--help of fine-tuning", "seconds", interleave(contestants, rounds), False)
