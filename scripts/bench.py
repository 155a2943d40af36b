"""Measure ours against a peer, in the same run: a ratio survives a change of machine, a speed does not.

    make bench                                     # every row, about half an hour
    python scripts/bench.py llama --steps 2        # one row, quickly

llama   pretraining, 12M parameters, batch 8 x 512 (on a GPU `make llama CONFIG=gpu`'s model and batch): ours, the
        transformers Trainer's defaults, a minimal loop
bert    pretraining at the recipe's laptop config (on a GPU gpu.yaml's model and batch): the recipe, the transformers
        Trainer's defaults on its model and rows
t5      the same
data    per cent of a step that bert, t5, unilm, glm and bart wait for their next batch: goal below 5
sft     tokens a second that are not padding, on ../shared/data's alpaca: ours, packed, against TRL's default and TRL's packing
lora    steps a second at the recipe's laptop config: the recipe, a PEFT loop written by hand on the same packed rows
qlora   the same on four bits
ppo     samples a second of a PPO step, 3.4M parameters, 256 answers: ours against TRL 1.12, the last that had PPO
rollouts  answers a second of PPO's rollouts, against one bare, padded call of `generate`
start   seconds from the start of the process to the first finished training step: ours against TRL's sft script
help    seconds of `--help`: ours against TRL's sft script

Contestants take turns, round after round, in one order and then in the other, so that a slow minute of the machine falls
on all of them. A contestant has one figure a round, warm-up left out; shown is the median over the rounds. The ratio is
taken within each round: its median is shown, with the smallest and the largest. Results go to benchmarks/<row>.json, of a
GPU to benchmarks/<its name>/<row>.json, and from there into RESULTS.md (`make results`). A row that fails is said at the end, exit code 1; the others are kept.

The rows are in scripts/bench_rows/, the turns and ratios in its harness.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common import machine  # noqa: E402
from recipes.common.run_folder import write_atomically  # noqa: E402
from scripts.bench_rows import finetuning, ppo, pretraining, startup  # noqa: E402
from scripts.bench_rows.harness import Failed, Skipped, table  # noqa: E402

ROWS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "llama": pretraining.llama,
    "bert": pretraining.bert,
    "t5": pretraining.t5,
    "data": pretraining.data,
    "sft": finetuning.sft,
    "lora": partial(finetuning.adapter, "lora"),
    "qlora": partial(finetuning.adapter, "qlora"),
    "ppo": ppo.ppo,
    "rollouts": ppo.rollouts,
    "start": startup.start,
    "help": startup.help_seconds,
}


def main(argv: list[str] | None = None) -> int:
    """Measure the rows asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of the results, in place of benchmarks/")
    asked = parser.parse_args(argv)
    if unknown := [row for row in asked.rows if row not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: there are {', '.join(ROWS)}")
    if asked.steps < 1 or asked.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    import torch

    threads = machine.choose_threads(None)
    torch.set_num_threads(int(threads.value))
    folder = asked.output or ROOT / "benchmarks"
    if machine.has_gpu() and not asked.output:
        folder /= torch.cuda.get_device_name().replace(" ", "-")
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
        write_atomically(folder / f"{row}.json", json.dumps(found, indent=2) + "\n")
        results.append(found)
    print(table(results))
    if failed:
        print(f"error: not measured, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
