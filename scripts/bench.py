"""Measure ours against a peer, in the same run: a ratio survives a change of machine, a speed does not.

    make bench                                     # every row, a quarter of an hour
    python scripts/bench.py llama --steps 2        # one row, quickly

llama   pretraining, 12M parameters, batch 8 x 512: ours, the transformers Trainer's defaults, a minimal loop
sft     tokens a second that are not padding, on ../shared/data's alpaca: ours, packed, against TRL's default and TRL's packing
ppo     samples a second of a PPO step, 3.4M parameters, 256 answers: ours against TRL 1.12, the last that had PPO
start   seconds from the start of the process to the first finished training step: ours against TRL's sft script
help    seconds of `--help`: ours against TRL's sft script

Contestants take turns, round after round, in one order and then in the other, so that a slow minute of the machine falls
on all of them. A contestant has one figure a round, warm-up left out; shown is the median over the rounds. The ratio is
taken within each round: its median is shown, with the smallest and the largest. Results go to benchmarks/<row>.json, and
from there into RESULTS.md (`make results`). A row that fails is said at the end, exit code 1; the others are kept.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common import machine  # noqa: E402
from recipes.common.run_folder import RunFolder, write_atomically  # noqa: E402

BATCH, LENGTH = 8, 512
WARM_UP = 2  # steps of a round that are left out: the first compiles or allocates
PPO_ROLLOUTS = 256  # answers a step, learned from in 4 minibatches, twice
ALPACA = ROOT.parent / "shared" / "data" / "llama_factory" / "alpaca_en_demo.json"
TOKENIZER = ROOT / "runs" / "tokenizer" / "default" / "model"
PEER = ROOT / ".venv-bench" / "trl-1.12"
PEER_REQUIREMENTS = ROOT / "requirements" / "bench-trl.txt"


class Skipped(Exception):
    """A row that cannot be measured here, with the reason."""


class Failed(Exception):
    """A row that should have been measured and was not, with the reason."""


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let each contestant run once a round, every other round in the opposite order; gives a figure a round of each."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            found[name].append(contestants[name]())
            print(f"  round {turn + 1}/{rounds}  {name}: {found[name][-1]:,.2f}", file=sys.stderr, flush=True)
    return found


def compare(found: dict[str, list[float]], higher_is_better: bool = True) -> dict[str, dict[str, float]]:
    """How many times better "ours" is than each other contestant: above 1 is better, whatever the unit."""
    ratios = {
        name: [a / b if higher_is_better else b / a for a, b in zip(found["ours"], theirs, strict=True)]
        for name, theirs in found.items()
        if name != "ours"
    }
    return {
        name: {"median": round(statistics.median(r), 3), "min": round(min(r), 3), "max": round(max(r), 3)}
        for name, r in ratios.items()
    }


def result(
    row: str, what: str, unit: str, found: dict[str, list[float]], higher_is_better: bool, **more: Any
) -> dict[str, Any]:
    """What benchmarks/<row>.json holds."""
    return {
        "row": row,
        "what": what,
        "unit": unit,
        "figures": {name: round(statistics.median(values), 3) for name, values in found.items()},
        "ours_is_better_by": compare(found, higher_is_better),
        "rounds": {name: [round(value, 3) for value in values] for name, values in found.items()},
        **more,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line a contestant."""
    lines = ["| row | contestant | figure | unit | ours is better by |", "|---|---|---|---|---|"]
    for found in results:
        for name, value in found["figures"].items():
            ratio = found["ours_is_better_by"].get(name)
            shown = "" if ratio is None else f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            lines.append(f"| {found['row']} | {name} | {value:,.2f} | {found['unit']} | {shown} |")
    return "\n".join(lines)


def _fresh_state() -> None:
    """accelerate keeps one state a process, which would carry one contestant's precision into the next."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    gc.collect()


def _clock() -> Any:
    """A Trainer callback whose `seconds` are those from each step's begin to the next's."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begins: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begins.append(time.perf_counter())

        @property
        def seconds(self) -> list[float]:
            return [b - a for a, b in zip(self.begins, self.begins[1:], strict=False)]

    return Clock()


def _quiet_run(folder: Path) -> RunFolder:
    run = RunFolder(folder, recipe="bench", given={"training.torch_compile"})  # compiled here, not when it pays
    run.say = lambda text: None  # type: ignore[method-assign]
    return run


def _llama(length: int = LENGTH) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


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
    generator = torch.Generator().manual_seed(0)
    blocks = [{"input_ids": torch.randint(4096, (LENGTH,), generator=generator)} for _ in range(BATCH * count)]
    bf16, compiles = bool(machine.choose_bf16().value), bool(machine.can_compile().value)
    device = "cuda" if machine.has_gpu() else "cpu"

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    default_model, loop_model, our_model = _llama(), _llama().to(device), _llama()
    fuse_next_token_loss(our_model)
    loop_step = loop_model
    if compiles:
        our_model.compiled_loss = torch.compile(our_model.compiled_loss)
        loop_step = torch.compile(loop_model)

    def speed(name: str, seconds: list[float]) -> float:
        step_seconds[name].append([round(t, 4) for t in seconds])
        return BATCH * LENGTH / statistics.median(seconds)

    def trainer_defaults() -> float:
        _fresh_state()
        args = TrainingArguments(
            str(folder / "a"), use_cpu=device == "cpu", per_device_train_batch_size=BATCH, max_steps=count,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        clock = _clock()
        Trainer(default_model, args, train_dataset=blocks, data_collator=collate, callbacks=[clock]).train()
        return speed("transformers Trainer, defaults", clock.seconds[WARM_UP:])

    def minimal_loop() -> float:
        _fresh_state()
        optimizer = torch.optim.AdamW(loop_model.parameters(), lr=5e-5, fused=True)
        seconds = []
        for step in range(count - 1):
            started = time.perf_counter()
            batch = collate(blocks[step * BATCH : (step + 1) * BATCH])
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loop_step(**{k: v.to(device) for k, v in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(loop_model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.perf_counter() - started)
        return speed("minimal loop, bf16 + compile", seconds[WARM_UP:])

    def ours() -> float:
        _fresh_state()
        given = {"per_device_train_batch_size": BATCH, "max_steps": count, "save_strategy": "no"}
        chosen = {key: value for key, (value, _) in training_defaults(folder / "ours", given).items()}
        run = _quiet_run(folder)
        run.figures["flops_per_token"] = per_token
        clock = _clock()
        args = TrainingArguments(**{**chosen, **given})
        trainer = Trainer(our_model, args, train_dataset=blocks, data_collator=collate, callbacks=[clock])
        fit(trainer, run)
        return speed("ours", clock.seconds[WARM_UP:])

    per_token = flops_per_token(our_model, LENGTH)
    contestants = {
        "transformers Trainer, defaults": trainer_defaults, "minimal loop, bf16 + compile": minimal_loop, "ours": ours,
    }  # fmt: skip
    step_seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    with temporary:
        speeds = interleave(contestants, rounds)
    peak = machine.peak_flops("bfloat16" if bf16 else "float32")
    return result(
        "llama", f"pretraining, {count_parameters(our_model) / 1e6:.1f}M llama, batch {BATCH} x {LENGTH}", "tokens/s", speeds, True,
        parameters=count_parameters(our_model), batch=[BATCH, LENGTH], steps=steps,
        mfu={name: round(statistics.median(of) * per_token / peak, 4) for name, of in speeds.items()},
        peak_tflops=round(peak / 1e12, 3), step_seconds=step_seconds, bf16=bf16, compiled=compiles,
    )  # fmt: skip


def sft(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second that are not padding, of fine-tuning the 12M model on alpaca at batch 8 of at most 512 tokens."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from recipes.common.sft import make_trainer
    from recipes.common.sft_packing import prepare
    from recipes.common.training import fit, training_defaults

    rows = _alpaca()
    conversations = Dataset.from_list(rows)
    tokenizer = _tokenizer(m["content"] for row in rows for m in row["messages"])

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    count = WARM_UP + steps + 1
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": count, "max_length": LENGTH, "save_strategy": "no",
    }  # fmt: skip
    their_model, packing_model, our_model = _llama(), _llama(), _llama()
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
        _fresh_state()
        args = SFTConfig(
            str(folder / "trl"), use_cpu=not machine.has_gpu(), report_to="none", disable_tqdm=True, packing=packing,
            assistant_only_loss=True, bf16=bool(machine.choose_bf16().value), gradient_checkpointing=False, **given,
        )  # fmt: skip
        clock = _clock()
        trainer = SFTTrainer(
            model, args=args, train_dataset=conversations, processing_class=tokenizer, callbacks=[clock]
        )
        sizes = counting(trainer)
        trainer.train()
        return speed(clock, sizes)

    def ours() -> float:
        _fresh_state()
        chosen = {key: value for key, (value, _) in training_defaults(folder / "ours", given).items()}
        args = SFTConfig(**{**chosen, **given, "packing": True, "assistant_only_loss": True})
        run = _quiet_run(folder)
        run.figures["flops_per_token"] = 0.0
        if not packed:
            packed.update(prepare({"train": conversations}, tokenizer, our_model, args, run))  # type: ignore[arg-type]
        trainer = make_trainer(our_model, tokenizer, packed, args)
        clock = _clock()
        trainer.add_callback(clock)
        sizes = counting(trainer)
        fit(trainer, run)
        return speed(clock, sizes)

    torch.manual_seed(0)
    contestants = {
        "TRL, unpacked default, bf16": lambda: of_trl(their_model, False),
        "TRL, packed, bf16": lambda: of_trl(packing_model, True),
        "ours": ours,
    }
    with temporary:
        found = interleave(contestants, rounds)
    return result(
        "sft", f"fine-tuning on alpaca, 12M llama, batch {BATCH} of at most {LENGTH}", "tokens/s, not padding", found, True,
        batch=[BATCH, LENGTH], steps=steps, samples=len(rows), compiled=False, gradient_checkpointing=False,
        note="all learn the assistant's tokens only; a round's tokens over its seconds; no contestant is compiled",
    )  # fmt: skip


def _alpaca() -> list[dict[str, Any]]:
    """../shared/data's alpaca as conversations."""
    if not ALPACA.exists():
        raise Skipped(f"{ALPACA} is not there")
    return [
        {
            "messages": [
                {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in json.loads(ALPACA.read_text())
    ]


def _tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level tokenizer of 4,096 words with our chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from recipes.common.chat import END_TOKEN, PAD_TOKEN, add_chat_template, special_tokens

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special_tokens(), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD_TOKEN, eos_token=END_TOKEN)
    add_chat_template(tokenizer)
    return tokenizer


def _small_chat_model(positions: int) -> tuple[Any, Any]:
    """`make llama`'s 3.4M shape with random weights, and the chain's tokenizer, or one like it where that was not made."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (TOKENIZER / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    else:
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
        tokenizer = _tokenizer(path.read_text(errors="replace") for path in library)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=positions, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def _environment(**more: str) -> dict[str, str]:
    """Of a contestant in a process of its own: offline, as many threads as the others, nothing of ours on its path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ACCELERATE_MIXED_PRECISION")}
    threads = str(machine.choose_threads(None).value)
    return kept | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def _call(command: list[str], environment: dict[str, str]) -> None:
    """Run to the end. Failed, with the last lines that it said, if it does not end well."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")


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
    _call([sys.executable, "-m", "venv", "--without-pip", str(PEER)], dict(os.environ))
    install = ["install", "--disable-pip-version-check", "--no-input", "--no-deps", "-r", str(PEER_REQUIREMENTS)]
    _call([sys.executable, "-m", "pip", "--python", str(python), *install], dict(os.environ))
    site_packages = next(PEER.glob("lib/python*/site-packages"))
    (site_packages / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own: its TRL comes first
    stamp.write_text(wanted)
    return python


def ppo(steps: int, rounds: int) -> dict[str, Any]:
    """Samples (a prompt answered, scored, and learned from) a second of PPO, at the laptop config's sizes."""
    import yaml
    from transformers import LlamaForSequenceClassification

    from recipes.common.data import load_data
    from recipes.common.sections import Data

    steps = max(1, steps // 3)  # one takes seconds
    settings = {
        "rollouts": PPO_ROLLOUTS, "minibatch": PPO_ROLLOUTS // 4, "epochs": 2, "max_prompt_length": 64, "max_new_tokens": 16,
        "kl_coefficient": 0.05, "learning_rate": 1e-5,
    }  # fmt: skip
    bf16 = bool(machine.choose_bf16().value)
    seen: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = _small_chat_model(positions=256)
        model.save_pretrained(folder / "policy")
        model.config.num_labels = 1
        LlamaForSequenceClassification(model.config).save_pretrained(folder / "reward")
        for part in ("policy", "reward"):
            tokenizer.save_pretrained(folder / part)
        prompts = load_data(Data(name="tasks", max_samples=4000), "prompt")["train"]["prompt"]
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (folder / "prompts.jsonl").write_text("".join(lines))
        (folder / "settings.json").write_text(json.dumps(settings))
        config = {
            "model": {"name": str(folder / "policy")},
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
            script = str(ROOT / "scripts" / "bench_ppo.py")
            _call([python, script, which, str(folder), str(output), str(steps), *more], _environment(**environment))
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
        "ppo", f"PPO, 3.4M llama, {PPO_ROLLOUTS} answers a step", "samples/s", found, True,
        settings=settings, vocabulary=len(tokenizer), steps=steps,
        precision={name: said.get("precision", "bf16" if bf16 else "fp32") for name, said in seen.items()},
        response_length={name: round(said["response_length"], 2) for name, said in seen.items()},
        minibatches=counts.pop(), trl=next(said["trl"] for said in seen.values() if "trl" in said),
        note="random weights, so answers seldom end early; TRL generates and scores in fp32 in either precision",
    )  # fmt: skip


def start(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds from the start of the process to the first finished training step, offline, each with fresh caches."""
    import yaml

    bf16 = bool(machine.choose_bf16().value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = _small_chat_model(positions=LENGTH)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "data").mkdir()
        data = folder / "data" / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in _alpaca()))
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
                environment = _environment(HF_HOME=cache, HF_DATASETS_CACHE=f"{cache}/datasets")
                return _seconds_until(command, sign, environment)

        contestants = {name: (lambda c=command, s=sign: timed(c, s)) for name, (command, sign) in commands.items()}
        for run in contestants.values():  # once before it counts: the libraries come from the disk
            run()
        found = interleave(contestants, rounds)
    return result(
        "start", "process start to the first finished step of fine-tuning, 3.4M llama", "seconds", found, False,
        batch=[BATCH, LENGTH], bf16=bf16, vocabulary=len(tokenizer),
        note="each with its own default packing: ours packs, TRL does not; ours measures one held-out row first",
    )  # fmt: skip


def _seconds_until(command: list[str], sign: str, environment: dict[str, str]) -> float:
    """Seconds until the process says a line that matches; then it is stopped. Failed if it ends without."""
    started, said = time.perf_counter(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if re.search(sign, line):
                return time.perf_counter() - started
            said.append(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise Failed(f"{' '.join(command)} ended before its first step:\n{''.join(said[-15:])}")


def help_seconds(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of `--help`."""
    commands = {
        "trl.scripts.sft": ["-m", "trl.scripts.sft", "--help"],
        "ours": ["-m", "recipes.finetuning.full", "--help"],
    }

    def timed(command: list[str]) -> float:
        started = time.perf_counter()
        _call([sys.executable, *command], _environment())
        return time.perf_counter() - started

    contestants = {name: (lambda c=command: timed(c)) for name, command in commands.items()}
    for run in contestants.values():  # once before it counts: the libraries come from the disk
        run()
    return result("help", "--help of fine-tuning", "seconds", interleave(contestants, rounds), False)


ROWS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "llama": llama,
    "sft": sft,
    "ppo": ppo,
    "start": start,
    "help": help_seconds,
}


def main(argv: list[str] | None = None) -> int:
    """Measure the rows asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    asked = parser.parse_args(argv)
    if unknown := [row for row in asked.rows if row not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: there are {', '.join(ROWS)}")
    if asked.steps < 1 or asked.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    import torch

    threads = machine.choose_threads(None)
    torch.set_num_threads(int(threads.value))
    results, failed = [], []
    for row in asked.rows or ROWS:
        print(f"{row} ...", file=sys.stderr, flush=True)
        try:
            found = ROWS[row](asked.steps, asked.rounds)
        except Skipped as reason:
            print(f"{row}: skipped: {reason}", file=sys.stderr)
            continue
        except Exception as error:  # the other rows are measured and kept all the same
            failed.append(row)
            print(f"error: {row}: {error}" if isinstance(error, Failed) else traceback.format_exc(), file=sys.stderr)
            continue
        found["threads"] = threads.value
        write_atomically(asked.output / f"{row}.json", json.dumps(found, indent=2) + "\n")
        results.append(found)
    print(table(results))
    if failed:
        print(f"error: not measured, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
