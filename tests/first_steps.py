"""The first steps of a gpu.yaml or cluster.yaml, on local stand-ins for what it takes from the hub: tiny on a processor, of the real sizes on a GPU.

python tests/first_steps.py [recipe ...]        # on a machine with a GPU: each gpu.yaml, several at once, and a table
python tests/first_steps.py --dry-run           # on any machine: their batches, parameters and memory
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from hub_stand_ins import localised  # noqa: E402

os.environ["PYTHONPATH"] = str(ROOT)  # of the recipes' processes

GPU, CLUSTER = (sorted((ROOT / "configs").glob(f"*/*/{kind}.yaml")) for kind in ("gpu", "cluster"))
FEW = {  # what a section may have, wherever it is
    "max_steps": 3, "steps": 3, "first_stage_steps": 2, "labels": 64, "rows": 64, "eval_rows": 32, "target_samples": 32,
    "max_validation_samples": 8, "warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip
TINY = {  # on a processor
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "d_kv": 8, "d_ff": 64, "intermediate_size": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "batch_size": 4, "source_layers": 1,
    "block_length": 128, "input_length": 128, "max_length": 512, "row_length": 64, "max_bytes": 60_000, "unigram_max_bytes": 60_000,
    "vocabulary_size": 400, "rollouts": 8, "max_samples": 40, "longest_answer": 8, "written": 4,
    "r": 4, "init_r": 6, "target_r": 4,
}  # fmt: skip
OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "adalora": {"adalora.tinit": 1, "adalora.tfinal": 1, "adalora.deltaT": 1, "training.max_steps": 4},
    "grpo": {"training.max_steps": 2},
    "ppo": {"training.max_steps": 2, "evaluation.max_new_tokens": 16},
}
TINY_OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "dpo": {"training.max_length": 512},
    "grpo": {
        "training.num_generations": 4, "training.per_device_train_batch_size": 4, "training.max_completion_length": 8,
        "training.use_vllm": False,
    },
    "ppo": {
        "ppo.max_new_tokens": 8, "ppo.engine": "transformers", "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
    },
    "gpt/cluster": {"model.config.attention_types": [[["global", "local"], 1]], "gpt.shots": [0, 1]},
}  # fmt: skip


def shortened(values: Any, few: dict[str, Any]) -> Any:
    """The values with what `few` names in place of theirs, wherever it is; a number only gets smaller."""
    if isinstance(values, list):
        return [shortened(value, few) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: min(few[key], value) if key in few and isinstance(value, int) else few.get(key, shortened(value, few))
        for key, value in values.items()
    }


def few_steps(config: Path, folder: Path, full: bool) -> dict[str, Any]:
    """The config's values for a run of a few steps; the hub's models and data are made below `folder`."""
    recipe, kind = config.parent.name, config.stem
    pretraining = config.parents[1].name == "pretraining"
    few = FEW if full else TINY | FEW | ({"max_length": 128} if pretraining else {})
    values = shortened(localised(yaml.safe_load(config.read_text()), folder, full), few)
    if recipe != "tokenizer":
        values["training"] |= (
            {"max_steps": 8, "save_steps": 1000} if full else {"max_steps": FEW["max_steps"], "save_steps": 2}
        )
    if not pretraining:
        values["evaluation"] = {"max_samples": 8, "batch_size": 8, "max_new_tokens": 4}
    if recipe == "ppo":
        values["ppo"]["reward_model"] = str(folder / "runs" / "reward_model" / kind / "model")
    changes = dict(OF_THEIR_OWN.get(recipe, {}))
    if not full:
        changes |= TINY_OF_THEIR_OWN.get(recipe, {}) | TINY_OF_THEIR_OWN.get(f"{recipe}/{kind}", {})
        if "dataset_num_proc" in values.get("training", {}):
            changes["training.dataset_num_proc"] = None  # processes cost more than so few rows
    for key, value in changes.items():
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[name] = value
    return values


def write(config: Path, folder: Path, full: bool) -> Path:
    """The few steps' config as a file."""
    place = folder / "configs" / f"{config.parent.name}_{config.stem}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(yaml.safe_dump(few_steps(config, folder, full), sort_keys=False))
    return place


# ---------------------------------------------------------------- on a processor


def configs_of(chapter: str) -> list[Path]:
    """A chapter's gpu.yaml and cluster.yaml files; ppo's last: it takes what reward_model's leave."""
    found = [config for config in (*GPU, *CLUSTER) if config.parents[1].name == chapter]
    return sorted(found, key=lambda config: (config.parent.name == "ppo", config))


def first_steps_of(chapter: str) -> Callable[..., None]:
    """A test for each of a chapter's configs; its stand-ins and its runs are the module's."""
    import pytest

    @pytest.mark.slow
    @pytest.mark.parametrize("config", configs_of(chapter), ids=lambda config: f"{config.parent.name}-{config.stem}")
    def test_it_takes_its_first_steps(run_in_process: Callable[..., Any], module_folder: Path, config: Path) -> None:
        takes_its_first_steps(run_in_process, module_folder, config)

    return test_it_takes_its_first_steps


def takes_its_first_steps(run_in_process: Callable[..., Any], hub: Path, config: Path) -> None:
    """Assert that a config runs to its end, tiny, in a processor's numbers; stand-ins and runs go below `hub`."""
    from recipes.common import machine

    chapter, recipe = config.parts[-3:-1]
    line = ["--config", str(write(config, hub, full=False)), "--run.name", config.stem]
    if recipe != "tokenizer":
        line += ["--training.bf16", "false"]
        if not machine.choose_bf16().value:  # emulated, a bf16 product takes a hundred times as long
            line += ["--model.dtype", "float32"]
    done = run_in_process(importlib.import_module(f"recipes.{chapter}.{recipe}"), line, hub / "runs")
    assert done.code == 0, done.err
    assert done.figures and any(done.folder.rglob("*config.json"))  # a model, an adapter, or a tokenizer of each kind


# ---------------------------------------------------------------- on a GPU


def run(config: Path, folder: Path, dry: bool = False) -> dict[str, Any]:
    """One config in a process of its own, at its real sizes: how it ended, its peak and its speed."""
    recipe, started = config.parent.name, time.perf_counter()
    script = ROOT / "recipes" / config.parents[1].name / f"{recipe}.py"
    line = [
        sys.executable,
        str(script),
        "--config",
        str(write(config, folder, full=True)),
        "--run.root",
        str(folder / "runs"),
    ]
    line += ["--run.name", "gpu", *(["--dry-run"] if dry else [])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    place = folder / "runs" / recipe / "gpu"
    (folder / f"{recipe}.log").write_text(f"{done.stdout}\n{done.stderr}\n")
    found: dict[str, Any] = {"recipe": recipe, "code": done.returncode, "seconds": round(time.perf_counter() - started)}
    if done.returncode:
        found["error"] = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300]
    if (place / "metrics.json").exists():
        figures = json.loads((place / "metrics.json").read_text())
        found |= {
            key: figures[key] for key in ("peak_memory_gib", "parameters", "trainable_parameters") if key in figures
        }
        steps = [json.loads(row) for row in (place / "metrics.jsonl").read_text().splitlines()]
        speeds = [row["tokens_per_second"] for row in steps if "tokens_per_second" in row]
        found |= {
            "tokens_per_second": max(speeds, default=None),
            "mfu": max((row.get("mfu", 0) for row in steps), default=None),
        }
    if dry:
        found["memory"] = next(
            (x.split("device(s): ")[1] for x in done.stdout.splitlines() if "memory/device" in x), None
        )
    print(json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="recipe")
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--dry-run", action="store_true", help="of the real sizes, on any machine")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "first_steps")
    asked = parser.parse_args()
    by_name = {config.parent.name: config for config in GPU}
    chosen = [by_name[name] for name in asked.recipes or by_name]
    late = [config for config in chosen if config.parent.name == "ppo"]  # needs what reward_model leaves
    for config in chosen:
        few_steps(config, asked.output, full=True)  # makes the stand-ins, once
    with ThreadPoolExecutor(asked.at_once) as pool:
        found = list(
            pool.map(lambda config: run(config, asked.output, asked.dry_run), [c for c in chosen if c not in late])
        )
    found += [run(config, asked.output, asked.dry_run) for config in late]
    (asked.output / "table.json").write_text(json.dumps(found, indent=1))
    return 1 if any(row["code"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
