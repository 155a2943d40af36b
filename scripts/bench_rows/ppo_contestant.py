"""One contestant of the benchmark's `ppo` row, in a process of its own, since TRL's PPOTrainer needs an older TRL.

    python scripts/bench_rows/ppo_contestant.py ours FOLDER OUTPUT STEPS            # recipes/alignment/ppo.py, whole
    python scripts/bench_rows/ppo_contestant.py trl  FOLDER OUTPUT STEPS [--bf16]   # trl.experimental.ppo.PPOTrainer

scripts/bench_rows/ppo.py makes FOLDER: policy/, reward/, prompts.jsonl, settings.json, ours.yaml. OUTPUT gets the seconds of STEPS
steps, the first step of the process left out, and what was run. Nothing here may import recipes but `ours`: the peer's
interpreter has another TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 1  # a step answers and learns in several shapes, all of which the first one has seen


def peak_memory_gib() -> float:
    """Most memory that this process has held, GiB: of the GPU where there is one, else of the process (Linux)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """The recipe itself; what is timed is its loop, from each step's begin to the next's."""
    sys.path.insert(0, str(ROOT))
    from recipes.alignment import ppo
    from recipes.common import training
    from recipes.common.recipe import run_recipe

    begins: list[float] = []

    class TimedLoop(training.Loop):
        def __iter__(self) -> Any:
            for step in super().__iter__():
                begins.append(time.perf_counter())
                yield step

    training.Loop = TimedLoop  # type: ignore[misc]  # the recipe takes it from there as it starts
    count = WARM_UP + steps + 1  # the last step's end is not seen
    code = run_recipe(
        ppo.main,
        ppo.Config,
        ["--config", str(folder / "ours.yaml"), "--training.max_steps", str(count), "--run.overwrite", "true"],
    )
    if code:
        raise SystemExit(code)
    seconds = [b - a for a, b in pairwise(begins)]
    history = [json.loads(line) for line in (folder / "runs" / "ppo" / "default" / "metrics.jsonl").open()]
    return {
        "seconds": seconds[WARM_UP:],
        "minibatches": history[-1]["minibatches"],
        "response_length": history[-1]["response_length"],
        "peak_memory_gib": peak_memory_gib(),
    }


def trl(folder: Path, steps: int, bf16: bool) -> dict[str, Any]:
    """TRL's trainer on the same prompts, lengths, batches and passes; what is timed is from each step's end to the next's."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    settings = json.loads((folder / "settings.json").read_text())
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    conversations = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    data = Dataset.from_dict({"input_ids": [p for p in prompts if len(p) <= settings["max_prompt_length"]]})
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    truncate = ppo_trainer.truncate_response

    def measured(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        found = truncate(stop, pad, responses)
        lengths.append((found != pad).sum(dim=1).float().mean().item())
        return found

    ppo_trainer.truncate_response = measured
    args = PPOConfig(
        str(folder / "trl"),
        # all of a step's answers in one "micro batch", so that TRL cuts it into num_mini_batches and steps after each:
        # with gradient_accumulation_steps = num_mini_batches, accelerate would step once a pass
        per_device_train_batch_size=settings["rollouts"],
        gradient_accumulation_steps=1,
        num_mini_batches=settings["rollouts"] // settings["minibatch"],
        num_ppo_epochs=settings["epochs"],
        local_rollout_forward_batch_size=settings["rollouts"],  # like ours; its default of 64 would make four of it
        total_episodes=settings["rollouts"] * (steps + WARM_UP),
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=1.0,
        kl_coef=settings["kl_coefficient"],
        learning_rate=settings["learning_rate"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in range(2))
    trainer = PPOTrainer(
        args,
        tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(1)),
        callbacks=[Clock],
    )
    trainer.train()
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "minibatches": settings["epochs"] * settings["rollouts"] // settings["minibatch"],
        "response_length": lengths[-1],
        "peak_memory_gib": peak_memory_gib(),
        "precision": str(trainer.accelerator.mixed_precision),
        "trl": trl.__version__,
    }


def main(argv: list[str] | None = None) -> None:
    """Run one contestant and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=["ours", "trl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args(argv)
    if asked.contestant == "ours":
        found = ours(asked.folder, asked.steps)
    else:
        found = trl(asked.folder, asked.steps, asked.bf16)
    asked.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
