"""Rows of PPO: ours against TRL 1.12, the last that had it, in an environment of its own; rollouts against bare `generate`."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recipes.common import machine
from scripts.bench_rows.harness import ROOT, WARM_UP, Failed, call, environment_of_own, fresh_state, interleave, result
from scripts.bench_rows.materials import small_chat_model

ROLLOUTS = 256  # answers a step, learned from in 4 minibatches, twice
PEER = ROOT / ".venv-bench" / "trl-1.12"
PEER_REQUIREMENTS = ROOT / "requirements" / "bench-trl.txt"


def peer_python() -> Path:
    """The interpreter of .venv-bench/trl-1.12, made if it is not there or was made from other requirements.

    It holds TRL alone: torch, transformers and all the rest are .venv's own, so that both contestants stand on the same.
    """
    python = PEER / "bin" / "python"
    wanted, stamp = str(zlib.crc32(PEER_REQUIREMENTS.read_bytes())), PEER / "made"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"  installing {PEER_REQUIREMENTS.relative_to(ROOT)} into {PEER.relative_to(ROOT)} (once)", file=sys.stderr)
    if PEER.exists():
        shutil.rmtree(PEER)
    call([sys.executable, "-m", "venv", "--without-pip", str(PEER)], dict(os.environ))
    install = ["install", "--disable-pip-version-check", "--no-input", "--no-deps", "-r", str(PEER_REQUIREMENTS)]
    call([sys.executable, "-m", "pip", "--python", str(python), *install], dict(os.environ))
    site_packages = next(PEER.glob("lib/python*/site-packages"))
    (site_packages / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own: its TRL comes first
    stamp.write_text(wanted)
    return python


def learn_to_answer(folder: Path) -> None:
    """`make full` of the weights in folder/random, a few steps of it, into folder/policy.

    It answers `tasks` in a few words and stops, as a policy does that is worth the training: random weights go on to the
    longest answer there may be.
    """
    from recipes.common.recipe import run_recipe
    from recipes.finetuning import full

    fresh_state()
    settings = {
        "model.name": folder / "random", "data.name": "tasks", "data.max_validation_samples": 8, "training.max_steps": 150,
        "training.torch_compile": "false", "evaluation.max_samples": 8, "run.root": folder / "runs",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    if code := run_recipe(full.main, full.Config, ["--config", str(ROOT / "configs/finetuning/full/cpu.yaml"), *words]):
        if code == 130:
            raise KeyboardInterrupt
        raise Failed(f"`full`, which makes the policy, ended with exit code {code}")
    (folder / "runs" / "full" / "default" / "model").rename(folder / "policy")


def ppo(steps: int, rounds: int) -> dict[str, Any]:
    """Samples (a prompt answered, scored, and learned from) a second of PPO, at the laptop config's sizes."""
    import yaml
    from transformers import LlamaForSequenceClassification

    from recipes.common.data import load_data
    from recipes.common.sections import Data

    steps = max(1, steps // 3)  # one takes seconds
    settings = {
        "rollouts": ROLLOUTS, "minibatch": ROLLOUTS // 4, "epochs": 2, "max_prompt_length": 64, "max_new_tokens": 16,
        "kl_coefficient": 0.05, "learning_rate": 1e-5,
    }  # fmt: skip
    bf16 = bool(machine.choose_bf16().value)
    seen: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = small_chat_model(folder / "random", positions=256)
        learn_to_answer(folder)
        model.config.num_labels = 1
        LlamaForSequenceClassification(model.config).save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
        prompts = load_data(Data(name="tasks", max_samples=4000), "prompt")["train"]["prompt"]
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (folder / "prompts.jsonl").write_text("".join(lines))
        (folder / "settings.json").write_text(json.dumps(settings))
        config = {
            # the laptop config's choice on a processor
            "model": {"name": str(folder / "policy"), "attention": "sdpa" if machine.has_gpu() else "eager"},
            "data": {"name": str(folder / "prompts.jsonl"), "max_validation_samples": 8},
            "ppo": {
                "reward_model": str(folder / "reward"),
                **{key: settings[key] for key in ("rollouts", "max_prompt_length", "max_new_tokens", "epochs", "kl_coefficient")},
                "stop_kl": None,  # or a step might end before its last minibatch
            },
            "training": {
                "per_device_train_batch_size": settings["minibatch"], "learning_rate": settings["learning_rate"],
                "save_steps": 1_000_000,
            },
            "evaluation": {"max_samples": 8, "max_new_tokens": settings["max_new_tokens"]},
            "run": {"root": str(folder / "runs")},
        }  # fmt: skip
        (folder / "ours.yaml").write_text(yaml.safe_dump(config))

        def contestant(name: str, python: str, which: str, *more: str, **environment: str) -> float:
            output = folder / "output.json"
            script = str(ROOT / "scripts" / "bench_rows" / "ppo_contestant.py")
            call(
                [python, script, which, str(folder), str(output), str(steps), *more], environment_of_own(**environment)
            )
            seen[name] = json.loads(output.read_text())
            return settings["rollouts"] * len(seen[name]["seconds"]) / sum(seen[name]["seconds"])

        peer = str(peer_python())
        contestants = {"TRL 1.12 PPOTrainer, fp32": lambda: contestant("TRL 1.12 PPOTrainer, fp32", peer, "trl")}
        # TRL makes its Accelerator itself, and only `accelerate launch`, which sets this, tells it the precision.
        if bf16:
            name = "TRL 1.12 PPOTrainer, bf16"
            contestants[name] = lambda: contestant(name, peer, "trl", "--bf16", ACCELERATE_MIXED_PRECISION="bf16")
        contestants["ours"] = lambda: contestant("ours", sys.executable, "ours")
        found = interleave(contestants, rounds)
    counts = {said["minibatches"] for said in seen.values()}
    if len(counts) != 1:
        raise Failed(f"the contestants took different numbers of minibatches: {seen}")
    return result(
        "ppo", f"PPO, 3.4M llama, {ROLLOUTS} answers a step", "samples/s", found, True,
        settings=settings, vocabulary=len(tokenizer), steps=steps,
        precision={name: said.get("precision", "bf16" if bf16 else "fp32") for name, said in seen.items()},
        response_length={name: round(said["response_length"], 2) for name, said in seen.items()},
        peak_memory_gib={name: round(said["peak_memory_gib"], 3) for name, said in seen.items()},
        minibatches=counts.pop(), trl=next(said["trl"] for said in seen.values() if "trl" in said),
        note="150 steps of fine-tuning before, so answers are short; TRL generates and scores in fp32 in either precision",
    )  # fmt: skip


def rollouts(steps: int, rounds: int) -> dict[str, Any]:
    """Answers a second of PPO's rollouts, at the sizes of the row `ppo`, against one bare, padded call of `generate`."""
    import torch
    from accelerate import Accelerator
    from transformers import GenerationConfig

    from recipes.common.data import load_data
    from recipes.common.generation import prompt_ids
    from recipes.common.ppo_rollout import Models, answer
    from recipes.common.rlhf import ActorCritic
    from recipes.common.sections import Data

    fresh_state()
    accelerator, bf16 = Accelerator(cpu=not machine.has_gpu()), bool(machine.choose_bf16().value)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = small_chat_model(Path(folder), positions=256)
    model.to(accelerator.device).eval()
    asked = load_data(Data(name="tasks", max_samples=4000), "prompt")["train"]["prompt"]
    prompts = [ids for ids in prompt_ids(tokenizer, asked) if len(ids) <= 64][:ROLLOUTS]
    models = Models(ActorCritic(model, None), reference=None, reward_model=None, tokenizer=tokenizer)

    def bare() -> None:
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(accelerator.device)
        choices = GenerationConfig(
            max_new_tokens=16, do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )  # fmt: skip
        with torch.no_grad(), torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            model.generate(**batch, generation_config=choices).tolist()

    def ours() -> None:
        args: Any = SimpleNamespace(bf16=bf16)
        answer(models, [{}] * ROLLOUTS, prompts, args, accelerator, longest=16, at_once=ROLLOUTS, seed=0)

    def speed(once: Callable[[], None]) -> float:
        seconds = []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - started)
        return ROLLOUTS / statistics.median(seconds[WARM_UP:])

    found = interleave({"bare generate": lambda: speed(bare), "ours": lambda: speed(ours)}, rounds)
    return result(
        "rollouts", f"PPO's rollouts, 3.4M llama, {ROLLOUTS} answers at once", "answers/s", found, True,
        steps=steps, bf16=bf16, note="random weights, so answers seldom end early; ours also decodes and tells where each ended",
    )  # fmt: skip
