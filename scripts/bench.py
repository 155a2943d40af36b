"""Measure ours against a peer, in the same run: a ratio survives a change of machine, a speed does not.

    make bench                                     # every row, minutes
    python scripts/bench.py llama --steps 2        # one row, quickly

llama   pretraining, 12M parameters, batch 8 x 512: ours, the transformers Trainer's defaults, a minimal loop
sft     tokens a second that are not padding: ours, packed, against TRL's default, on ../shared/data's alpaca
help    seconds of `--help`: ours against TRL's sft script

Contestants take turns, round after round, so that a slow minute of the machine falls on all of them. A step's time is
the median over all rounds, each round's first steps left out. Results go to benchmarks/<row>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common import machine  # noqa: E402
from recipes.common.run_folder import RunFolder, write_atomically  # noqa: E402

BATCH, LENGTH = 8, 512
WARM_UP = 2  # steps of a round that are left out: the first compiles or allocates
ALPACA = ROOT.parent / "shared" / "data" / "llama_factory" / "alpaca_en_demo.json"


class Skipped(Exception):
    """A row that cannot be measured here, with the reason."""


def interleave(contestants: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Let each contestant run once a round; gives all figures of each."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name] += run()
    return found


def compare(figures: dict[str, float], higher_is_better: bool = True) -> dict[str, float]:
    """How many times better "ours" is than each other contestant: above 1 is better, whatever the unit."""
    ours = figures["ours"]
    return {
        name: round(ours / value if higher_is_better else value / ours, 3)
        for name, value in figures.items()
        if name != "ours"
    }


def result(row: str, unit: str, figures: dict[str, float], higher_is_better: bool, **more: Any) -> dict[str, Any]:
    """What benchmarks/<row>.json holds."""
    return {
        "row": row,
        "unit": unit,
        "figures": {name: round(value, 3) for name, value in figures.items()},
        "ours_is_better_by": compare(figures, higher_is_better),
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
            shown = "" if ratio is None else f"{ratio:.2f} x"
            lines.append(f"| {found['row']} | {name} | {value:,.2f} | {found['unit']} | {shown} |")
    return "\n".join(lines)


def _fresh_state() -> None:
    """accelerate keeps one state a process, which would carry one contestant's precision into the next."""
    import os

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

    def trainer_defaults() -> list[float]:
        _fresh_state()
        args = TrainingArguments(
            str(folder / "a"), use_cpu=device == "cpu", per_device_train_batch_size=BATCH, max_steps=count,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        clock = _clock()
        Trainer(default_model, args, train_dataset=blocks, data_collator=collate, callbacks=[clock]).train()
        return clock.seconds[WARM_UP:]

    def minimal_loop() -> list[float]:
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
        return seconds[WARM_UP:]

    def ours() -> list[float]:
        _fresh_state()
        given = {"per_device_train_batch_size": BATCH, "max_steps": count, "save_strategy": "no"}
        chosen = {key: value for key, (value, _) in training_defaults(folder / "ours", given).items()}
        run = _quiet_run(folder)
        run.figures["flops_per_token"] = per_token
        clock = _clock()
        args = TrainingArguments(**{**chosen, **given})
        trainer = Trainer(our_model, args, train_dataset=blocks, data_collator=collate, callbacks=[clock])
        fit(trainer, run)
        return clock.seconds[WARM_UP:]

    per_token = flops_per_token(our_model, LENGTH)
    contestants = {"transformers Trainer, defaults": trainer_defaults, "minimal loop, bf16 + compile": minimal_loop}
    with temporary:
        seconds = interleave({**contestants, "ours": ours}, rounds)
    speeds = {name: BATCH * LENGTH / statistics.median(times) for name, times in seconds.items()}
    peak = machine.peak_flops("bfloat16" if bf16 else "float32")
    return result(
        "llama", "tokens/s", speeds, True,
        parameters=count_parameters(our_model), batch=[BATCH, LENGTH], steps=steps, rounds=rounds,
        mfu={name: round(speed * per_token / peak, 4) for name, speed in speeds.items()},
        peak_tflops=round(peak / 1e12, 3), step_seconds={n: [round(t, 4) for t in v] for n, v in seconds.items()},
    )  # fmt: skip


def sft(steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second that are not padding, of fine-tuning the 12M model on alpaca at batch 8 of at most 512 tokens."""
    if not ALPACA.exists():
        raise Skipped(f"{ALPACA} is not there")
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from recipes.common.chat import END_TOKEN, PAD_TOKEN, add_chat_template, special_tokens
    from recipes.common.sft import make_trainer
    from recipes.common.sft_packing import prepare
    from recipes.common.training import fit, training_defaults

    rows = json.loads(ALPACA.read_text())
    conversations = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
                    {"role": "assistant", "content": row["output"]},
                ]
            }
            for row in rows
        ]
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special_tokens(), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((m["content"] for row in conversations for m in row["messages"]), learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD_TOKEN, eos_token=END_TOKEN)
    add_chat_template(tokenizer)

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    count = WARM_UP + steps + 1
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": count, "max_length": LENGTH, "save_strategy": "no",
    }  # fmt: skip
    their_model, our_model = _llama(), _llama()
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

    def speeds(clock: Any, sizes: list[int]) -> list[float]:
        return [n / t for n, t in list(zip(sizes, clock.seconds, strict=False))[WARM_UP:]]

    def trl_default() -> list[float]:
        _fresh_state()
        args = SFTConfig(
            str(folder / "trl"), use_cpu=not machine.has_gpu(), report_to="none", disable_tqdm=True,
            bf16=bool(machine.choose_bf16().value), **given,
        )  # fmt: skip
        clock = _clock()
        trainer = SFTTrainer(
            their_model, args=args, train_dataset=conversations, processing_class=tokenizer, callbacks=[clock]
        )
        sizes = counting(trainer)
        trainer.train()
        return speeds(clock, sizes)

    def ours() -> list[float]:
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
        return speeds(clock, sizes)

    torch.manual_seed(0)
    with temporary:
        found = interleave({"TRL, unpacked default, bf16": trl_default, "ours": ours}, rounds)
    figures = {name: statistics.median(values) for name, values in found.items()}
    return result(
        "sft", "tokens/s, not padding", figures, True,
        batch=[BATCH, LENGTH], steps=steps, rounds=rounds, samples=len(rows), compiled=False,
        caution="each step's speed is of its own batch; neither contestant is compiled",
    )  # fmt: skip


def help_seconds(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of `--help`; the fastest says least about the disk, so the median is taken, like everywhere."""
    commands = {
        "trl.scripts.sft": ["-m", "trl.scripts.sft", "--help"],
        "ours": ["-m", "recipes.finetuning.full", "--help"],
    }

    def timed(command: list[str]) -> list[float]:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Skipped(f"{' '.join(command)} failed: {(done.stderr.splitlines() or [''])[-1]}")
        return [time.perf_counter() - started]

    seconds = interleave({name: (lambda c=command: timed(c)) for name, command in commands.items()}, rounds)
    figures = {name: statistics.median(times) for name, times in seconds.items()}
    return result("help", "seconds", figures, False, rounds=rounds, seconds=seconds)


ROWS: dict[str, Callable[[int, int], dict[str, Any]]] = {"llama": llama, "sft": sft, "help": help_seconds}


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
    results = []
    for row in asked.rows or ROWS:
        print(f"{row} ...", file=sys.stderr, flush=True)
        try:
            found = ROWS[row](asked.steps, asked.rounds)
        except Skipped as reason:
            print(f"{row}: skipped: {reason}", file=sys.stderr)
            continue
        found["threads"] = threads.value
        write_atomically(asked.output / f"{row}.json", json.dumps(found, indent=2) + "\n")
        results.append(found)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
