"""`run_recipe`: the one entry of every recipe. Config in, run folder out, exit codes kept.

0 done · 2 the user's input is wrong (said on stderr, all of it, no traceback) · 130 interrupted, resumable. Anything else is a bug.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.common import machine
from recipes.common.config import Loaded, help_text, load_config, to_yaml
from recipes.common.errors import DryRunDone, Interrupted, UserError
from recipes.common.launch import check_sharding, check_world_size, environment_defaults, launcher_arguments
from recipes.common.run_folder import RunFolder, plain, wait_for_everyone, write_atomically
from recipes.common.run_opening import open_folder

ROOT = Path(__file__).resolve().parents[2]
LONGEST_NAME = 200  # bytes of a run's name: a file system takes 255, and a file beside the folder is named after it
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


def run_recipe(
    main: Callable[[Any, RunFolder], dict[str, Any]], config_class: type, argv: list[str] | None = None
) -> int:
    """Run a recipe from its command line. With `argv` (tests, the quickstart) gives the exit code; without, exits with it."""
    with _terminated_as_interrupted():
        code = _guarded(main, config_class, sys.argv[1:] if argv is None else argv)
    if argv is None:
        torch_distributed = sys.modules.get("torch.distributed")
        if (
            code != 130
            and torch_distributed
            and torch_distributed.is_available()
            and torch_distributed.is_initialized()
        ):
            torch_distributed.destroy_process_group()  # torch warns of one that is left
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `| head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM outside of the training (which has its own handler) ends with 130 as Ctrl-C does: a scheduler sends no other."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python takes handlers in the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Where a library meets a setting: an error from within is what it thinks of the setting, and nothing of ours.
SETTINGS_MET_IN = {
    "create_optimizer", "create_scheduler", "get_optimizer_cls_and_kwargs", "get_scheduler",
    "get_reporting_integration_callbacks",
}  # fmt: skip


def _wrong_input(error: Exception) -> str | None:
    """What an error that a library raised says of the user's input, in one line; None where it says nothing of it."""
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'the run folder'}: {error.strerror}; free space, or choose another --run.root"
    if isinstance(error, RuntimeError) and "out of memory" in said.lower():
        return (
            "out of memory: lower training.per_device_train_batch_size and raise training.gradient_accumulation_steps by the same "
            f"factor, set training.gradient_checkpointing: true, or shard with LAUNCH=zero3 ({said[:160]})"
        )
    if type(error).__module__.startswith("jinja2"):
        return f"the chat template cannot render a conversation: {said} (model.chat_template gives another)"
    frames = [
        (frame.f_code.co_name, frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    reporter = any(name == "__init__" and module.startswith("transformers.integrations") for name, module in frames)
    if reporter or any(name in SETTINGS_MET_IN and module.startswith("transformers.") for name, module in frames):
        kwargs = isinstance(error, TypeError) and "keyword argument" in said
        hint = "; training.lr_scheduler_kwargs are another schedule's: give its own, or null" if kwargs else ""
        return f"training: {said}{hint}"
    built = any(name == "__init__" and module.startswith(("transformers.trainer", "trl.")) for name, module in frames)
    return f"training: {said}" if built and isinstance(error, ValueError) else None


def _guarded(main: Callable[..., dict[str, Any]], config_class: type, argv: list[str]) -> int:
    try:
        _run(main, config_class, launcher_arguments(argv))
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # rank 0 most often has the same to say
            try:
                time.sleep(2)
            except KeyboardInterrupt:  # its launcher stops the others before they repeat it
                return 2
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except DryRunDone:
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interrupted as stop:
        print(f"interrupted: {stop}; go on with --run.resume true", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(
            "interrupted outside of the training; what was checkpointed goes on with --run.resume true", file=sys.stderr
        )
        return 130
    except Exception as error:
        if (said := _wrong_input(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()
    return 0


def _run(main: Callable[..., dict[str, Any]], config_class: type, argv: list[str]) -> None:
    environment_defaults()
    module = sys.modules[main.__module__]
    script = Path(module.__file__ or "recipe.py").resolve()
    recipe = script.stem
    config_folder = ROOT / "configs" / script.parent.name / recipe
    where: dict[str, Path] = {}

    def library_defaults(section: str, section_class: type, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
        from transformers import TrainingArguments

        if not issubclass(section_class, TrainingArguments):
            return {}
        from recipes.common.training import training_defaults

        return training_defaults(where.get("run", Path("runs") / recipe) / "checkpoints", given)

    loaded = load_config(
        config_class,
        argv,
        config_folder=config_folder if config_folder.exists() else None,
        library_defaults=library_defaults,
        wrong_inside=_wrong_in_model_config,
    )
    if loaded.help is not None:
        shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
        print(help_text(config_class, module.__doc__ or "", str(shown), loaded.help or None))
        return
    run_values = loaded.values.get("run", {})
    where["run"] = _root(run_values) / recipe / str(run_values.get("name", "default"))
    if loaded.print_config:
        print(loaded.print())
        return
    check_world_size()
    started = time.perf_counter()
    _check_run_name(run_values)
    _set_threads(run_values.get("threads"))
    _quiet_libraries()
    machine.forget_peak_memory()
    config = loaded.build()
    if (training := getattr(config, "training", None)) is not None:
        check_sharding(training)
        training._n_gpu = min(
            training.n_gpu, 1
        )  # one process, one GPU: the Trainer would wrap the model in DataParallel
    run = open_folder(
        where["run"], recipe=recipe, fingerprint=saved_config(loaded), dry=loaded.dry_run, given=loaded.given,
        resume=bool(run_values.get("resume")), overwrite=bool(run_values.get("overwrite")),
    )  # fmt: skip
    run.started = started
    try:
        _say_choices(run, config)
        _seed(config)
        figures = main(config, run)
        if not run.dry:
            _finish(run, module.__doc__ or "", figures)
    except BaseException as ended:  # a folder in which nothing ran would be in the next run's way
        if isinstance(ended, Exception) or run.replaced is not None:  # an interrupted run may be resumed
            run.leave_if_unused()
        raise
    finally:
        run.unlock()


def _wrong_in_model_config(given: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the fields of model.config; only transformers knows, which every run of such a config imports anyway."""
    fields = given.get("model", {}).get("config")
    if not fields:
        return {}
    from recipes.common.models import wrong_fields

    return wrong_fields(fields.get("model_type"), {key: value for key, value in fields.items() if key != "model_type"})


def saved_config(loaded: Loaded) -> str:
    """The resolved config as YAML, without the two switches that say how to open the folder."""
    values = {section: dict(v) if isinstance(v, dict) else v for section, v in loaded.values.items()}
    for switch in ("resume", "overwrite"):
        values.get("run", {}).pop(switch, None)
    return to_yaml(values)


def _check_run_name(run_values: dict[str, Any]) -> None:
    name = str(run_values.get("name", "default"))
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"run.name: {len(name.encode())} bytes are more than a file system takes; at most {LONGEST_NAME}"
        )
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UserError(f"run.name {name!r}: letters, digits, `_`, `-`, `+` and `.` only, since it is a folder's name")


def _root(run_values: dict[str, Any]) -> Path:
    """The folder of all runs, with `~` as the home folder: a library that is given a path below it sees it so."""
    root = str(run_values.get("root", "runs"))
    if not root.strip():
        raise UserError("run.root is blank: give the folder that holds all runs, such as `runs`")
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise UserError(f"run.root {root!r}: {error}") from error


def _set_threads(asked: int | None) -> None:
    threads = int(machine.choose_threads(asked).value)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _quiet_libraries() -> None:
    """One line a step is ours; the libraries' progress bars would break it up."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _say_choices(run: RunFolder, config: Any) -> None:
    run.say(f"{run.recipe} -> {run.path}" + ("  (dry run)" if run.dry else ""))
    threads = machine.choose_threads(config.run.threads)
    run.choose("threads", threads.value, threads.reason)
    if (training := getattr(config, "training", None)) is not None:
        bf16 = machine.choose_bf16()
        asked = {"training.bf16", "training.fp16"} & run.given
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        run.choose("precision", precision, f"{asked.pop()} says so" if asked else bf16.reason)


def _seed(config: Any) -> None:
    training = getattr(config, "training", None)
    seed = training.seed if training is not None else config.data.seed
    from transformers import set_seed

    set_seed(seed)


def _finish(run: RunFolder, summary: str, figures: dict[str, Any]) -> None:
    """Final figures, model card and the table on the screen."""
    from recipes.common import machine
    from recipes.common.model_card import model_card, show

    figures = {name: plain(value) for name, value in {**run.figures, **figures}.items()}
    figures["wall_seconds"] = round(run.wall_seconds(), 1)
    figures["peak_memory_gib"] = round(machine.peak_memory_gib(), 3)
    if run.is_main:
        run.forget_replaced()
        environment = {**machine.describe(), "commit": _commit(), "choices": run.choices}
        write_atomically(run.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_atomically(run.path / "metrics.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
        config_yaml = (run.path / "config.yaml").read_text()
        write_atomically(run.path / "README.md", model_card(run, summary, figures, config_yaml, environment))
        width = max(map(len, figures))
        run.say(
            "\n".join(
                ["", *(f"  {name:<{width}}  {show(value)}" for name, value in figures.items()), "", f"  {run.path}", ""]
            )
        )
    wait_for_everyone()


def _commit() -> str | None:
    """The commit of the code that ran, with a mark where files were changed since; None outside a git checkout."""
    try:
        told = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return told.stdout.strip() or None


def _leave_process_group() -> None:
    """Several processes leave together, so that none is reported as having vanished."""
    if "torch" in sys.modules and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
