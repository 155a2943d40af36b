"""Start a recipe as one process or many, and refuse what this machine would silently do otherwise.

    python -m recipes.common.launch llama --config gpu --launch fsdp --nproc 8 -- --training.max_steps 100
    python -m recipes.common.launch --list

`make <recipe> CONFIG= LAUNCH= NPROC= ARGS=` comes here. A recipe started by hand with `accelerate launch`, `torchrun`,
`deepspeed`, `srun` or `mpirun` meets the same checks, since `run_recipe` calls `check_world_size`.

Why checks: on a machine without a GPU `accelerate launch --num_processes 2` starts one process, plain `torchrun` starts
copies that know nothing of each other, and FSDP and DeepSpeed are skipped by accelerate without a word.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

LAUNCHERS = {
    "single": "one process",
    "ddp": "a copy of the model in each process, gradients averaged",
    "fsdp": "PyTorch FSDP2: parameters, gradients and optimizer state sharded",
    "zero1": "DeepSpeed: optimizer state sharded",
    "zero2": "DeepSpeed: optimizer state and gradients sharded",
    "zero3": "DeepSpeed: optimizer state, gradients and parameters sharded",
    "zero2_offload": "zero2 with the optimizer in host memory",
    "zero3_offload": "zero3 with the optimizer and the parameters in host memory",
}

ENVIRONMENT = {
    # No telemetry from anything that a recipe may import.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LANGSMITH_TRACING": "false",
    "ANONYMIZED_TELEMETRY": "False",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "VLLM_NO_USAGE_STATS": "1",
    # Plots go to files, with or without a display.
    "MPLBACKEND": "Agg",
    # When a launcher stops the workers they write a checkpoint first, for which its own 30 seconds may be too short.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
}


def environment_defaults() -> None:
    """Set what every recipe wants around it and the user has not set. Call before any heavy import.

    TOKENIZERS_PARALLELISM stays unset on purpose: then tokenizers use all threads, and stop doing so in a forked child,
    where threads could deadlock. Workers of one machine share its cores, so each one's tokenizer gets that worker's
    threads only.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not gpu_files():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # accelerate imports DeepSpeed, which else warns that it saw no GPU
    # On a processor with bf16 it warns, at import, that a kernel on the hub would be faster for 4-bit generation.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and "OMP_NUM_THREADS" in os.environ:
        os.environ.setdefault("RAYON_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


# What there is to launch


def recipes() -> dict[str, Path]:
    """Every recipe by name: recipes/<chapter>/<recipe>.py. No list to keep: a new file is a new recipe."""
    found = sorted(ROOT.glob("recipes/*/*.py"))
    return {path.stem: path for path in found if path.parent.name != "common" and not path.stem.startswith("_")}


def summary(path: Path) -> str:
    """The first line of a recipe's docstring, read without importing the recipe."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), str(path))) or "(no docstring)"
    return text.splitlines()[0]


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean "x"?` when one of `words` is near enough, else nothing."""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def find_recipe(name: str, others: Sequence[str] = ()) -> Path:
    """The script of a recipe, given as `llama`, `pretraining/llama` or a path; `others`: what else may have been meant.

    Raises UserError that names the nearest recipe.
    """
    known = recipes()
    if name.endswith(".py"):
        path = Path(name)
        if path.is_file():
            return path.resolve()
        raise UserError(f"there is no script {name}{nearest(path.stem, list(known))}")
    chapter, _, stem = name.rpartition("/")
    if stem in known and chapter in ("", known[stem].parent.name):
        return known[stem]
    hint = nearest(stem, [*known, *others])
    raise UserError(
        f"there is no recipe called {name}{hint or f' among the {len(known)} recipes'} (`make list` shows them all)"
    )


def find_config(script: Path, name: str) -> Path:
    """The config file of a recipe: a path to one, or a name such as `cpu` for configs/<chapter>/<recipe>/cpu.yaml.

    Raises UserError that names the nearest.
    """
    folder = ROOT / "configs" / script.parent.name / script.stem
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    path = Path(name) if is_path else folder / f"{name}.yaml"
    if path.is_file():
        return path.resolve()
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    have = f"{script.stem} has {', '.join(names)}" if names else f"{script.stem} has none: give a path to a YAML file"
    raise UserError(f"there is no config {name}{nearest(Path(name).stem, names)} ({have})")


# What this machine has


def core_count() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_files() -> bool:
    """Whether there is a device file of an NVIDIA or AMD GPU, also under WSL. Without one torch sees no GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev", name).exists() for name in ("kfd", "dxg"))


def gpu_count() -> int:
    """GPUs that torch can use (CUDA or ROCm). Without a device file it is 0 at once, and torch is not imported."""
    if not gpu_files():
        return 0
    import torch

    return torch.cuda.device_count()


def process_count(text: str) -> int:
    """NPROC as a number. Raises UserError."""
    try:
        n = int(text)
    except ValueError:
        raise UserError(f"NPROC={text} is not a whole number") from None
    if n < 1:
        raise UserError(f"NPROC={n}: at least 1 process is needed")
    return n


def check_room(n: int, launch: str, gpus: int, cores: int) -> None:
    """Raise UserError where this machine has no room for `n` processes, or would ignore this launcher."""
    if launch not in ("single", "ddp") and not gpus:
        raise refuse_without_gpu(f"LAUNCH={launch}")
    if launch == "single" and n > 1:
        sharing = "ddp, fsdp or zero3" if gpus else "ddp"
        raise UserError(f"LAUNCH=single is one process, and NPROC={n} asks for {n}: add LAUNCH={sharing}")
    if gpus and n > gpus:
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(
            f"NPROC={n}: a process takes one GPU, and this machine has {have} (CUDA_VISIBLE_DEVICES= to use the cores)"
        )
    if not gpus and n > cores:
        have = "1 core" if cores == 1 else f"{cores} cores"
        raise UserError(
            f"NPROC={n}: this machine has no GPU and {have}, and more processes than cores only slow each other down"
        )


def refuse_without_gpu(what: str) -> UserError:
    """The error for a way of sharding that accelerate skips on a CPU. `what`: "LAUNCH=zero3", "training.fsdp", ..."""
    return UserError(
        f"{what}: there is no GPU here, and without one accelerate ignores FSDP and DeepSpeed without a word: every "
        "process would hold the whole model. Use LAUNCH=ddp (really several processes, on the cores) or LAUNCH=single"
    )


def check_sharding(training: Any) -> None:
    """Refuse `training.deepspeed` and `training.fsdp` (of transformers' TrainingArguments) where they would be ignored.

    With `training.deepspeed` on a CPU the processes do form a group, but each trains on all of the data.
    """
    for name in ("deepspeed", "fsdp"):
        if getattr(training, name, None) and (getattr(training, "use_cpu", False) or not gpu_count()):
            raise refuse_without_gpu(f"training.{name}")


# The command


def command(
    script: Path, config: Path, launch: str, nproc: int, arguments: Sequence[str] = (), *, gpus: int, cores: int
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `script` on a machine with `gpus` and `cores`, and what it adds to the environment.

    The processes share the cores: each gets `cores // nproc` threads, where accelerate and torchrun would give it one.
    Raises UserError for a launcher that would be ignored.
    """
    recipe = [str(script), *([] if _names_config(arguments) else ["--config", str(config)]), *arguments]
    environment = {"RECIPES_WORLD_SIZE": str(nproc)}
    if launch == "single":
        return [sys.executable, *recipe], environment
    environment["OMP_NUM_THREADS"] = str(max(1, cores // nproc))
    if not gpus:
        if launch != "ddp":
            raise refuse_without_gpu(f"LAUNCH={launch}")
        environment["ACCELERATE_USE_CPU"] = "true"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        return [sys.executable, *torchrun, *recipe], environment
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"configs/accelerate/{launch}.yaml")]
    # Port 0: a free one, so that two runs on one machine do not meet.
    accelerate += ["--num_machines", "1", "--num_processes", str(nproc), "--main_process_port", "0"]
    if launch.startswith("zero"):
        # The YAML names this file relative to the repository's root; the absolute path works from any folder.
        accelerate += ["--deepspeed_config_file", str(ROOT / f"configs/deepspeed/{launch}.json")]
    return [sys.executable, *accelerate, *recipe], environment


def _names_config(arguments: Sequence[str]) -> bool:
    """Whether a recipe's arguments say which config they mean, in place of CONFIG: `--config x` or `--config=x`."""
    return any(word == "--config" or word.startswith("--config=") for word in arguments)


def start(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run what `command` made and give its exit code. One process takes the place of this one.

    torchrun and accelerate run inside this process, because by themselves they turn every failure of a worker into exit
    code 1 and a traceback of their own; here the code of the worker that failed first comes through (2: the user's
    input, 130: interrupted).
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(environment)
    sys.stdout.flush()
    sys.stderr.flush()
    if line[1] != "-m":
        os.execv(line[0], list(line))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the launcher's own words about a worker that has said already what is wrong
    launcher = importlib.import_module(line[2])
    sys.argv = [line[2], *line[3:]]
    try:
        launcher.main()
    except SignalException:
        return 130
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (2, 130):
            return failure.exitcode
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
            how += " (out of memory, most likely)" if failure.exitcode == -signal.SIGKILL else ""
        else:
            how = f"ended with exit code {failure.exitcode}"
        print(
            f"error: process {rank} of {environment['RECIPES_WORLD_SIZE']} {how}, and the others were stopped",
            file=sys.stderr,
        )
        return 1
    return 0


# The check after the launch


def launcher_arguments(argv: Sequence[str]) -> list[str]:
    """The command line without the `--local_rank=N` that `deepspeed` puts into it (LOCAL_RANK says the same)."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def check_world_size(formed: int | None = None) -> None:
    """See to it that as many processes work together as were asked for; call it before any heavy import.

    Without a GPU, workers of a plain `torchrun` are told to form one group (ACCELERATE_USE_CPU).
    Call it again with `formed`, the size of the group that accelerate formed, once there is one.
    Raises UserError when the number differs from what was asked, or when FSDP or DeepSpeed would be ignored.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    asked = _asked_for()
    if asked is not None and asked[0] != started:
        number, launcher = asked
        raise UserError(_wrong_count(number, started, launcher))
    if "WORLD_SIZE" not in os.environ and (copies := _copies()) is not None:
        number, starter = copies
        raise UserError(
            f"{starter} started {number} copies of this recipe that know nothing of each other: let it start one "
            "launcher a machine (scripts/ has SLURM and ssh files), or start one copy"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") and not gpu_count():
            raise refuse_without_gpu(f"accelerate's configuration asks for {name.replace('DEEPSPEED', 'DeepSpeed')}")
    if started > 1 and "ACCELERATE_USE_CPU" not in os.environ and not gpu_count():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if formed is not None and formed != started:
        raise UserError(
            f"{started} processes were started, and the group that they formed has {formed}: each would train by itself"
        )


def _wrong_count(asked: int, started: int, launcher: str) -> str:
    count = f"{started} process" if started == 1 else f"{started} processes"
    script, recipe = sys.argv[0], Path(sys.argv[0]).stem
    text = f"{launcher} was asked for {asked} and started {count}"
    if launcher == "accelerate launch" and started == 1:
        text += (
            ": with --cpu, or a configuration that names no multi-GPU type, it starts one and says nothing. "
            f"Use `make {recipe} LAUNCH=ddp NPROC={asked}` or `torchrun --standalone --nproc_per_node {asked} {script}`"
        )
    return text


def _asked_for() -> tuple[int, str] | None:
    """How many processes were asked for, and of which launcher: ours, else one on a parent's command line."""
    if ours := os.environ.get("RECIPES_WORLD_SIZE"):
        return int(ours), "`python -m recipes.common.launch`"
    import psutil

    try:
        for parent in psutil.Process().parents()[:4]:
            if (found := asked_on(parent.cmdline())) is not None:
                return found
    except psutil.Error:  # a parent that ended meanwhile, or that is not ours to look at
        return None
    return None


def asked_on(argv: Sequence[str]) -> tuple[int, str] | None:
    """How many processes a launcher's command line asks for in all, and its name; None where that cannot be told."""
    names = [Path(word).name for word in argv[:3]]
    modules = [argv[i + 1] for i, word in enumerate(argv[:4]) if word == "-m" and i + 1 < len(argv)]
    script = next((i for i, word in enumerate(argv) if i > 1 and word.endswith(".py")), len(argv))
    options = argv[:script]  # what follows is the recipe's

    def number(*flags: str) -> int | None:
        value = _option(options, *flags)
        return int(value) if value is not None and value.isdigit() else None

    if "torchrun" in names or {"torch.distributed.run", "torch.distributed.launch"} & set(modules):
        machines = number("nnodes") if _option(options, "nnodes") is not None else 1
        each = number("nproc-per-node")
        return (machines * each, "torchrun") if machines and each else None
    if (
        ("accelerate" in names and "launch" in argv[1:3])
        or "accelerate-launch" in names
        or "accelerate.commands.launch" in modules
    ):
        asked = number("num-processes") or _in_accelerate_config(_option(options, "config-file"))
        return (asked, "accelerate launch") if asked else None
    if "deepspeed" in names or "deepspeed.launcher.runner" in modules:
        each = number("num-gpus", "num-accelerators")
        machines = number("num-nodes") or (
            None if _option(options, "hostfile", "H") or Path("/job/hostfile").exists() else 1
        )
        return (machines * each, "deepspeed") if machines and each else None
    return None


def _option(words: Sequence[str], *names: str) -> str | None:
    """The value of the first of these options, written `--a-b v`, `--a_b v`, `--a-b=v` or `-a v`."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.startswith("-") and flag.lstrip("-").replace("_", "-") in names:
            return value if equals else words[i + 1] if i + 1 < len(words) else None
    return None


def _in_accelerate_config(file: str | None) -> int | None:
    """`num_processes` of the configuration that `accelerate launch` reads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    path = Path(file) if file else Path(home, "accelerate", "default_config.yaml").expanduser()
    if not path.is_file():
        return None
    import yaml

    asked = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("num_processes")
    return asked if isinstance(asked, int) and asked > 0 else None


def _copies() -> tuple[int, str] | None:
    """More than one task of a scheduler that started this script directly, and the scheduler."""
    for name, starter in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")):
        if (count := os.environ.get(name, "1")).isdigit() and int(count) > 1:
            return int(count), starter
    return None


# The command line


def main(argv: Sequence[str] | None = None) -> int:
    """Start what the command line says. Gives the exit code: 2 with everything that is wrong with the input."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python -m recipes.common.launch", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("recipe", nargs="?", help="llama, pretraining/llama, or a path to a script")
    parser.add_argument("--config", default="cpu", help="cpu, gpu, cluster, or a path to a YAML file")
    parser.add_argument("--launch", default="single", help=", ".join(LAUNCHERS))
    parser.add_argument(
        "--nproc", default="1", help="processes: one a GPU, or one a core or more where there is no GPU"
    )
    parser.add_argument("--list", action="store_true", help="list the recipes, one line each")
    parser.add_argument(
        "--targets", default="", help=argparse.SUPPRESS
    )  # make's own targets, which a misspelt one may have meant
    options = parser.parse_args(given[:cut])
    if options.list:
        width = max(map(len, recipes()), default=0)
        try:
            for name, path in sorted(recipes().items(), key=lambda item: (item[1].parent.name, item[0])):
                print(f"{path.parent.name:<13} {name:<{width}}  {summary(path)}", flush=True)
        except BrokenPipeError:  # the reader, `| head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    try:
        line, environment = _resolve(options, given[cut + 1 :])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    environment_defaults()
    if options.launch != "single":
        shown = [word.removeprefix(f"{Path.cwd()}{os.sep}") for word in line]
        settings = [f"{name}={value}" for name, value in environment.items() if name != "RECIPES_WORLD_SIZE"]
        print(f"$ {shlex.join([*settings, *shown])}", flush=True)
    return start(line, environment)


def _resolve(options: argparse.Namespace, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Check every word of the command line, and say all that is wrong at once."""
    problems: list[str] = []

    def check(function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except UserError as error:
            problems.extend(error.problems)
            return None

    gpus, cores = gpu_count(), core_count()
    if options.recipe is None:
        raise UserError("which recipe? `make list` shows them all")
    script = check(find_recipe, options.recipe, options.targets.split())
    config = (
        check(find_config, script, options.config) if script and not _names_config(arguments) else Path(options.config)
    )
    nproc = check(process_count, options.nproc)
    if options.launch not in LAUNCHERS:
        hint = nearest(options.launch, list(LAUNCHERS))
        problems.append(f"there is no launcher LAUNCH={options.launch}{hint} ({', '.join(LAUNCHERS)})")
    else:
        check(check_room, nproc or 1, options.launch, gpus, cores)
        if gpus and options.launch.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            problems.append(f"LAUNCH={options.launch} needs DeepSpeed, which is not installed: make setup-distributed")
    if problems:
        raise UserError(problems)
    from recipes.common.machine import physical_cores

    return command(script, config, options.launch, nproc, arguments, gpus=gpus, cores=physical_cores())


if __name__ == "__main__":
    sys.exit(main())
