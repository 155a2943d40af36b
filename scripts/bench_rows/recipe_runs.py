"""A recipe as a contestant: run whole, from its own laptop config, up to its training, which is timed or only looked at."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.common import machine
from scripts.bench_rows.harness import ROOT, WARM_UP, Failed, clock_callback, fresh_state
from scripts.bench_rows.materials import tokenizer_folder

# What a recipe reads: a corner of its data, since what is timed are some steps.
CORNER = {"data.max_samples": 400, "data.max_validation_samples": 20}


@dataclass
class Timed:
    """The timed steps of a training, the warm-up left out; a number a step each."""

    seconds: list[float]  # from a step's begin to the next's
    waits: list[float]  # of that, until the next batch was there


class _Reached(Exception):
    """Leaves a recipe whose training was reached, with what was wanted of it."""

    def __init__(self, found: Any):
        super().__init__()
        self.found = found


def timed_training(recipe: str, steps: int, **settings: Any) -> Timed:
    """Run `<chapter>.<recipe>` and time that many steps of its own training; then it is left."""

    def train(trainer: Any, fit: Callable[[], None]) -> Timed:
        clock = clock_callback(stop_after=WARM_UP + steps + 1)  # the last step's end is not seen
        trainer.add_callback(clock)
        waits = _watch_batches(trainer)
        fit()
        # waits[i] is the wait for the batch of step i: it lies in the seconds of step i - 1
        return Timed(clock.seconds[WARM_UP:], waits[WARM_UP + 1 : len(clock.begins)])

    return run_to_training(recipe, train, **settings)


def trainer_of(recipe: str, **settings: Any) -> Any:
    """The Trainer that `<chapter>.<recipe>` has made, with its model and its rows, right before it trains."""
    return run_to_training(recipe, lambda trainer, fit: trainer, **settings)


def run_to_training(recipe: str, then: Callable[[Any, Callable[[], None]], Any], **settings: Any) -> Any:
    """Give what `then(trainer, fit)` gives; `fit()` trains as the recipe would. The recipe does not go on after it.

    settings: of the recipe's config, with `__` for a dot, beside its cpu.yaml; a corner of its data is read.
    """
    from recipes.common import training
    from recipes.common.recipe import run_recipe

    fit = training.fit
    module = importlib.import_module(f"recipes.{recipe}")

    def reached(trainer: Any, run: Any, **options: Any) -> None:
        raise _Reached(then(trainer, lambda: fit(trainer, run, **options)))

    fresh_state()
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as root:
        given = {
            **CORNER, "training.save_strategy": "no", "run.root": root,
            "training.torch_compile": "false",  # or it would be, in the midst of a long run, once that pays
            **{name.replace("__", "."): value for name, value in settings.items()},
        }  # fmt: skip
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        training.fit = reached  # the recipe takes it from there when it comes to it
        try:
            with contextlib.redirect_stdout(said):
                code = run_recipe(module.main, module.Config, words)
        except _Reached as end:
            return end.found
        finally:
            training.fit = fit
    if code == 130:
        raise KeyboardInterrupt
    raise Failed(f"{recipe} ended with {code} before it trained:\n" + "\n".join(said.getvalue().splitlines()[-15:]))


def with_tokenizer(spare: Path) -> dict[str, Any]:
    """Settings of a pretraining recipe: the chain's tokenizer, or one like it, made in `spare`."""
    return {"model__tokenizer": str(tokenizer_folder(spare))}


def config_of_this_machine(recipe: str, spare: Path) -> dict[str, Any]:
    """Settings of a pretraining recipe that is timed: its cpu.yaml as it is, or on a GPU its gpu.yaml with cpu.yaml's data, since no
    network is needed then; written into `spare`."""
    if not machine.has_gpu():
        return {}
    chapter, name = recipe.split(".")
    folder = ROOT / "configs" / chapter / name
    laptop, values = (yaml.safe_load((folder / f"{kind}.yaml").read_text()) for kind in ("cpu", "gpu"))
    values |= {section: laptop[section] for section in laptop if section not in ("model", "training", name)}
    (spare / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return {"config": spare / f"{name}.yaml"}


def _watch_batches(trainer: Any) -> list[float]:
    """Wrap how the Trainer fetches: gives the list that the seconds of each step's waiting are put into."""
    fetch, waits = trainer.get_batch_samples, []

    def watched(batches: Iterator[Any], count: int, device: Any) -> Any:
        waits.append(0.0)

        def waited_for() -> Iterator[Any]:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                waits[-1] += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

        return fetch(waited_for(), count, device)

    trainer.get_batch_samples = watched
    return waits
