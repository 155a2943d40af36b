"""Training plumbing, the same for a library's Trainer (`fit`) and for a loop written out in a recipe (`Loop`).

Both resume from the last complete checkpoint, checkpoint and stop on SIGINT / SIGTERM / a time limit, stop at a loss that is
not a number, and print one line a step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipes.common import machine
from recipes.common.errors import Interrupted, UserError
from recipes.common.launch import check_world_size, nearest
from recipes.common.run_folder import (
    RunFolder,
    complete_checkpoints,
    drop_half_written_checkpoints,
    last_complete_checkpoint,
    wait_for_everyone,
    write_errors_explained,
)
from recipes.common.stop_signals import StopSignals, on_any_process

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import Trainer, TrainingArguments

# What compiling a small model costs, measured on 2 cores: 12 s to 29 s alone, more beside other work.
COMPILE_SECONDS = 40
COMPILE_SAVES = 0.12  # share of a step's time that it saves, measured: 0.11 with AVX512-BF16, 0.32 with AMX


# What the libraries look up in a mapping: a key that is none of these is passed over, or is a traceback.
MAPPINGS: dict[str, tuple[str, ...]] = {
    "accelerator_config": (
        "split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking",
        "gradient_accumulation_kwargs", "use_configured_state",
    ),
    # each also as fsdp_...
    "fsdp_config": (
        "version", "cpu_offload", "auto_wrap_policy", "min_num_params", "transformer_layer_cls_to_wrap", "state_dict_type",
        "cpu_ram_efficient_loading", "activation_checkpointing", "reshard_after_forward", "forward_prefetch",
        "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers", "xla", "xla_fsdp_v2",
        "xla_fsdp_grad_ckpt", "xla_fsdp_settings",
    ),
    "gradient_checkpointing_kwargs": (
        "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop",
    ),
}  # fmt: skip


def training_defaults(output_dir: Path, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """What the frame sets in a TrainingArguments section where the user did not, each with where it comes from.

    Raises UserError for settings that this machine cannot honour.
    """
    problems = [
        f"training.{key} belongs to the frame ({value}): leave it out"
        for key, value in {
            "output_dir": "the run folder is <run.root>/<recipe>/<run.name>",
            "resume_from_checkpoint": "use --run.resume true",
            "overwrite_output_dir": "use --run.overwrite true",
        }.items()
        if key in given
    ]
    problems += [
        f"training.{key}: {given[key]} would break a promise of the frame ({promise}): leave it out"
        for key, (kept, promise) in {
            "logging_strategy": (
                "steps",
                "a loss that is not a number stops the run; training.logging_steps says how often",
            ),
            "save_only_model": (False, "a resumed run ends with the same weights, which takes the optimizer's state"),
            "ignore_data_skip": (False, "a resumed run ends with the same weights, so it sees no row twice"),
        }.items()
        if given.get(key, kept) != kept
    ]
    if given.get("save_total_limit") == 1:
        problems.append(
            "training.save_total_limit: 1 leaves no whole checkpoint where a run is killed while it writes one: at least 2, or "
            "null to keep all"
        )
    for key, keys in MAPPINGS.items():
        names = list(given[key]) if isinstance(given.get(key), dict) else []
        unknown = [name for name in names if str(name).removeprefix("fsdp_") not in keys]
        problems += [
            f"training.{key}: there is no {name}{nearest(str(name), keys)} ({', '.join(keys)})" for name in unknown
        ]
    if given.get("push_to_hub"):
        problems.append(
            "training.push_to_hub: nothing is uploaded from here; leave it out, and `hf upload` the model/ folder"
        )
    if given.get("chat_template_path"):
        problems.append(
            "training.chat_template_path: model.chat_template takes the file, in every recipe; leave this one out"
        )
    for key, known in _library_choices().items():
        if given.get(key) not in (None, *known):
            problems.append(f"training.{key} must be one of {', '.join(known)}, not {given[key]!r}")
    bf16 = machine.choose_bf16()
    if given.get("bf16") and not bf16.value:
        problems.append(f"training.bf16: true, but {bf16.reason}; leave it out, or set it to false")
    if given.get("fp16") and not machine.has_gpu():
        problems.append("training.fp16: true needs a GPU; leave it out: bf16 is used where the processor has it")
    if given.get("torch_compile") and not machine.can_compile().value:
        problems.append(
            f"training.torch_compile: true, but {machine.can_compile().reason}; leave it out, or set it to false"
        )
    if given.get("use_cpu") is False and not machine.has_gpu():
        problems.append("training.use_cpu: false, but torch sees no GPU; leave it out")
    if given.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        problems.append("training.use_liger_kernel: true needs the package liger-kernel; install it, or leave it out")
    if given.get("activation_offloading") and not machine.has_gpu():
        problems.append("training.activation_offloading: true, but there is no GPU to take them from; leave it out")
    if problems:
        raise UserError(problems)

    chosen: dict[str, tuple[Any, str]] = {
        "output_dir": (str(output_dir), "frame: the run folder"),
        "use_cpu": (not machine.has_gpu(), "machine: " + ("has a GPU" if machine.has_gpu() else "has no GPU")),
        "report_to": ("none", "frame: metrics.jsonl"),
        "disable_tqdm": (True, "frame: one line a step"),
        "logging_steps": (1, "frame: one line a step"),
        "logging_nan_inf_filter": (False, "frame: a loss that is not a number must be seen"),
        "save_strategy": ("steps", "frame: resumable"),
        "save_total_limit": (2, "frame: the one before last, should the last be half-written"),
        "optim": ("adamw_torch_fused", "frame: the fused kernel"),
        "dataloader_pin_memory": (machine.has_gpu(), "machine: pinned memory serves GPU copies only"),
        "include_num_input_tokens_seen": ("all", "frame: tokens/s"),
        "gradient_checkpointing": (False, "frame: off unless asked, it costs a second forward"),
    }
    if not given.get("fp16"):
        chosen["bf16"] = (bool(bf16.value), "machine: " + bf16.reason)
    return chosen


def refuse_unused(args: TrainingArguments, unused: dict[str, tuple[Any, str]]) -> None:
    """Raise UserError for settings that a recipe does not read: key -> (the value that says nothing, why it is not read)."""
    given = {key: getattr(getattr(args, key), "value", getattr(args, key)) for key in unused}
    if problems := [
        f"training.{key}: {', '.join(value) if isinstance(value, list) else value} has no say here: {why}; leave it out"
        for key, (usual, why) in unused.items()
        if (value := given[key]) != usual
    ]:
        raise UserError(problems)


def _library_choices() -> dict[str, list[str]]:
    """What transformers types as any text, and then takes only some of: without this, in the middle of a traceback."""
    from accelerate.utils import DynamoBackend
    from transformers.training_args import trainer_log_levels

    levels = list(trainer_log_levels)
    backends = [backend.value.lower() for backend in DynamoBackend]
    packing = ["bfd", "bfd_split", "wrapped"]  # trl's SFTConfig
    return {
        "log_level": levels, "log_level_replica": levels, "torch_compile_backend": backends, "packing_strategy": packing,
    }  # fmt: skip


class StepReport:
    """Turns step times into the one log line: step, loss, tokens/s, MFU, peak memory, time left."""

    WARM_UP_STEPS = 3  # left out of the mean speed: first calls allocate, pick kernels, compile

    def __init__(self, run: RunFolder, total_steps: int, flops_per_token: float, dtype_name: str, first_step: int = 0):
        self.run, self.total_steps, self.flops_per_token = run, total_steps, flops_per_token
        self.first_step = self.last_step = first_step
        self.last_time = self.warm_time = time.perf_counter()
        self.tokens = self.warm_tokens = 0
        self.warm_step: int | None = None
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.peak = machine.peak_flops(dtype_name) * self.world_size
        run.choose(
            "peak",
            f"{self.peak / 1e12:.2f} TFLOP/s",
            f"measured {dtype_name} matrix product, {self.world_size} process(es)",
        )

    def line(self, step: int, loss: float | None, tokens: int, **figures: Any) -> dict[str, Any]:
        """Report a step that was finished: `tokens` were processed since the last line, over all processes."""
        now = time.perf_counter()
        seconds = max(now - self.last_time, 1e-9)
        self.tokens += tokens
        if self.warm_step is None and step - self.first_step >= self.WARM_UP_STEPS:
            self.warm_step, self.warm_time, self.warm_tokens = step, now, self.tokens
        speed = tokens / seconds
        row = {
            **({} if loss is None else {"loss": loss}),
            **figures,
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.flops_per_token / self.peak, 4),
            "peak_memory_gib": round(machine.peak_memory_gib(), 3),
        }
        self.run.log(step, **row)
        per_step = seconds / max(step - self.last_step, 1)
        left = (self.total_steps - step) * (self.mean_step_seconds(step, now) or per_step)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float) and k in SHOWN)
        self.run.say(
            f"step {step}/{self.total_steps}"
            + ("" if loss is None else f"  loss {loss:.4f}")
            + (f"  {shown}" if shown else "")
            + f"  {speed:,.0f} tok/s  mfu {row['mfu']:.1%}  {row['peak_memory_gib']:.2f} GiB  left {duration(left)}"
        )
        self.last_step, self.last_time = step, now
        return row

    def pause(self, seconds: float) -> None:
        """Time that was not training (an evaluation, a checkpoint) does not count against the speed."""
        self.last_time += seconds
        self.warm_time += seconds

    def mean_step_seconds(self, step: int, now: float | None = None) -> float | None:
        """Mean seconds a step since the warm-up; None until then."""
        if self.warm_step is None or step <= self.warm_step:
            return None
        return ((now or time.perf_counter()) - self.warm_time) / (step - self.warm_step)

    def speed(self) -> dict[str, float]:
        """The means over the steps since the warm-up; nothing until there are any."""
        per_step = self.mean_step_seconds(self.last_step, self.last_time)
        if not per_step or self.warm_step is None:
            return {}
        speed = (self.tokens - self.warm_tokens) / (self.last_time - self.warm_time)
        return {
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.flops_per_token / self.peak, 4),
            "step_seconds": round(per_step, 4),
        }

    def finish(self) -> None:
        """Put the speed among the run's figures."""
        self.run.figures |= self.speed()


SHOWN = {
    "reward",
    "true_score",
    "kl",
    "entropy",
    "clip_fraction",
    "explained_variance",
    "accuracy",
    "reward_accuracy",
    "rewards/accuracies",  # trl's DPO
    "rewards/margins",
    "mean_token_accuracy",
}  # also on the line


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def stop_at_nan(loss: float, step: int, run: RunFolder) -> None:
    """Raise UserError if the loss is not a finite number; the last good checkpoint stays."""
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss} at step {step}", run)


def stop_at_bad_weights(models: Sequence[nn.Module], step: int, run: RunFolder) -> None:
    """Raise UserError, on every process, if a weight that learns is not a finite number: a loss tells of an update only after
    the next step, and what is saved is tried and resumed before. A sharded weight is looked at where its shard lies."""
    import torch

    def local(weight: Any) -> torch.Tensor:
        shard = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3's, which leaves the parameter itself empty
        return shard.to_local() if hasattr(shard, "to_local") else shard

    weights = [weight for model in models for weight in model.parameters() if weight.requires_grad]
    if on_any_process(not all(bool(torch.isfinite(local(weight)).all()) for weight in weights)):
        raise _diverged(f"a weight is not a finite number after step {step}", run)


def _diverged(what: str, run: RunFolder) -> UserError:
    kept = last_complete_checkpoint(run.checkpoints)
    return UserError(
        f"{what}: lower training.learning_rate, or lengthen the warm-up; "
        + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet")
    )


def dtype_name(args: TrainingArguments) -> str:
    """The number format that the matrix products run in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def compile_if_it_pays(model: Any, run: RunFolder, seconds_left: float) -> bool:
    """Compile the model in place (`nn.Module.compile`) when the time it saves in this run exceeds what compiling costs."""
    able = machine.can_compile()
    if not able.value:
        run.choose("torch.compile", False, able.reason)
        return False
    saved = seconds_left * COMPILE_SAVES
    if saved < COMPILE_SECONDS:
        run.choose(
            "torch.compile",
            False,
            f"would save about {duration(saved)} of {duration(seconds_left)} and cost {COMPILE_SECONDS}s",
        )
        return False
    run.choose(
        "torch.compile",
        True,
        f"saves about {duration(saved)} of {duration(seconds_left)}, costs about {COMPILE_SECONDS}s",
    )
    import torch

    if hasattr(model, "compiled_loss"):  # fused_loss.fuse_next_token_loss: only the training step is compiled
        model.compiled_loss = torch.compile(model.compiled_loss)
    else:
        model.compile()
    return True


# ---------------------------------------------------------------------------------------------- a library's Trainer


def fit(trainer: Trainer, run: RunFolder, *, time_limit_minutes: float | None = None) -> None:
    """`trainer.train()` with the frame around it. Raises Interrupted once a stopped run's checkpoint is on disk.

    Raises UserError if the processes did not come together as one group, or at a loss that is not a number.
    """
    from transformers import PrinterCallback, ProgressCallback

    args = trainer.args
    check_world_size(trainer.accelerator.num_processes)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    done = int(run.resume_from.name.split("-")[-1]) if run.resume_from else 0
    finished = 0 < args.max_steps <= done
    # a sitting that takes no step would end at the limit where the one before it did
    with StopSignals(run, None if finished else time_limit_minutes) as stop, write_errors_explained(run.checkpoints):
        frame = _frame_callback()(trainer, run, stop)
        trainer.add_callback(frame)
        if run.is_main:
            drop_half_written_checkpoints(run.checkpoints)
        wait_for_everyone()
        if run.resume_from:
            run.say(f"resuming after step {done}")
        if finished:
            trainer._load_from_checkpoint(str(run.resume_from))  # the training was finished; what came after it was not
        else:
            trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
            frame.report.finish()
            # some save what they have after the last step
            stop_at_bad_weights([cast("nn.Module", trainer.model)], trainer.state.global_step, run)
            # what follows has other shapes: evaluation and generation run eagerly
            cast("nn.Module", trainer.model)._compiled_call_impl = None
    if frame.interrupted or stop.asked():  # or while the last checkpoint was written
        kept = last_complete_checkpoint(run.checkpoints)
        left = f"checkpoint after step {kept.name.split('-')[-1]}" if kept else "no checkpoint was asked for"
        raise Interrupted(f"{stop.reason}: {left}")
    wait_for_everyone()


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps that `trainer.train()` will take."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    micro_batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * math.ceil(micro_batches / args.gradient_accumulation_steps))


def _frame_callback() -> type:
    """The callback class, made when first needed, since transformers takes seconds to import."""
    from transformers import TrainerCallback

    class FrameCallback(TrainerCallback):
        report: StepReport

        def __init__(self, trainer: Trainer, run: RunFolder, stop: StopSignals):
            self.trainer, self.run, self.stop = trainer, run, stop
            self.interrupted = False
            self.tokens_before = 0
            self.paused_at: float | None = None
            self.may_compile = "training.torch_compile" not in run.given and not trainer.args.torch_compile

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            flops = self.run.figures.get("flops_per_token", 0.0)
            self.report = StepReport(self.run, state.max_steps, flops, dtype_name(args), first_step=state.global_step)
            self.tokens_before = state.num_input_tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.stop.asked():
                self.interrupted = True
                control.should_save = control.should_training_stop = True
            self._look_before_saving(state, control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._look_before_saving(state, control)

        def _look_before_saving(self, state: Any, control: Any) -> None:
            if control.should_save:
                control.should_log = True
                stop_at_bad_weights([cast("nn.Module", self.trainer.model)], state.global_step, self.run)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs: dict[str, Any] = kwargs["logs"]
            figures = {
                k: v for k, v in logs.items() if k not in ("epoch", "total_flos", "num_input_tokens_seen", "num_tokens")
            }
            if "loss" not in figures:
                if any(k.startswith("eval_") for k in figures):
                    kept = {k: v for k, v in figures.items() if not k.endswith(("_runtime", "_per_second"))}
                    self.run.log(state.global_step, **kept)
                    self.run.say(f"step {state.global_step}  " + "  ".join(f"{k} {v:.4f}" for k, v in kept.items()))
                return
            loss = float(figures.pop("loss"))
            tokens = int(state.num_input_tokens_seen - self.tokens_before)
            self.tokens_before = state.num_input_tokens_seen
            figures.pop("train_tokens_per_second", None)
            self.report.line(state.global_step, loss, tokens, **figures)
            stop_at_nan(loss, state.global_step, self.run)
            self._compile(state)

        def _compile(self, state: Any) -> None:
            seconds = self.report.mean_step_seconds(state.global_step)
            if self.may_compile and seconds and state.global_step - (self.report.warm_step or 0) >= 5:
                self.may_compile = False
                compile_if_it_pays(self.trainer.model, self.run, seconds * (state.max_steps - state.global_step))

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self._resume_clock()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait_for_everyone()
            if self.run.is_main:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                self.run.mark_complete(folder, self.report.speed())
            wait_for_everyone()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._resume_clock()

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._resume_clock()

        def _resume_clock(self) -> None:
            if self.paused_at is not None:
                self.report.pause(time.perf_counter() - self.paused_at)
                self.paused_at = None

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self._resume_clock()

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            if self.paused_at is None:
                self.paused_at = time.perf_counter()

    return FrameCallback


# -------------------------------------------------------------------------------------------- a loop written out


def make_accelerator(args: TrainingArguments, **options: Any) -> Accelerator:
    """An Accelerator with the precision and accumulation that the `training` section says.

    Raises UserError for what only a library's Trainer does, and if the processes did not come together as one group.
    """
    from accelerate import Accelerator

    refuse_unused(args, {
        "eval_strategy": ("no", "a loop without a Trainer measures before the first step and after the last"),
        "save_strategy": ("steps", "a loop without a Trainer saves every training.save_steps, so that it can be resumed"),
        "report_to": ([], "the figures of a loop without a Trainer are in metrics.jsonl"),
        "neftune_noise_alpha": (None, "without a Trainer nothing adds noise to the embeddings"),
    })  # fmt: skip
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.use_cpu,
        **options,
    )
    check_world_size(accelerator.num_processes)
    return accelerator


class Loop:
    """The steps of a loop written out in a recipe, with everything that `fit` gives a Trainer.

        loop = Loop(run, training, accelerator, total_steps=500)
        for step in loop:
            ...
            loop.log(loss=loss.item(), tokens=n)

    What is checkpointed is what `accelerator.prepare` or `accelerator.register_for_checkpointing` was given, and the
    random states of Python, NumPy and torch, so that a resumed loop takes the steps that an uninterrupted one takes.
    `log` must be called once a step.
    """

    def __init__(
        self,
        run: RunFolder,
        args: TrainingArguments,
        accelerator: Accelerator,
        total_steps: int,
        time_limit_minutes: float | None = None,
    ):
        self.run, self.args, self.accelerator, self.total_steps = run, args, accelerator, total_steps
        # below 1 they are a share of the run, as in transformers' Trainer
        self.save_steps, self.logging_steps = (
            math.ceil(every * total_steps) if every < 1 else int(every)
            for every in (args.save_steps, args.logging_steps)
        )
        self.step = 0
        if run.is_main:
            drop_half_written_checkpoints(run.checkpoints)
        accelerator.wait_for_everyone()
        self.resume()
        # a sitting that takes no step would end at the limit where the one before it did
        self.stop = StopSignals(run, time_limit_minutes if self.step < total_steps else None)
        flops = run.figures.get("flops_per_token", 0.0)
        self.report = StepReport(run, total_steps, flops, dtype_name(args), first_step=self.step)

    def resume(self) -> None:
        """Load the last complete checkpoint of a resumed run."""
        if self.run.resume_from:
            self.accelerator.load_state(str(self.run.resume_from))
            self.step = int(self.run.resume_from.name.split("-")[-1])
            self.run.say(f"resuming after step {self.step}")

    def __iter__(self) -> Iterator[int]:
        with self.stop:
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                stopping = self.stop.asked()
                if stopping or self.step == self.total_steps or self.step % self.save_steps == 0:
                    started = time.perf_counter()
                    self.save()
                    self.report.pause(time.perf_counter() - started)
                if stopping:
                    raise Interrupted(f"{self.stop.reason}: checkpoint after step {self.step}")
        self.report.finish()
        if self.stop.asked():  # while the last checkpoint was written
            raise Interrupted(f"{self.stop.reason}: checkpoint after step {self.step}")

    def log(self, loss: float, tokens: int, **figures: Any) -> None:
        """The step's line. `tokens`: processed in this step by this process."""
        step = self.step + 1
        stop_at_nan(loss, step, self.run)
        if step % self.logging_steps == 0 or step == self.total_steps:
            self.report.line(step, loss, tokens * self.accelerator.num_processes, **figures)
        else:
            self.report.tokens += tokens * self.accelerator.num_processes

    def save(self) -> None:
        """Write a checkpoint and mark it complete; keep the last two."""
        import shutil

        stop_at_bad_weights(self.accelerator._models, self.step, self.run)
        folder = self.run.checkpoints / f"checkpoint-{self.step}"
        self.accelerator.wait_for_everyone()
        with write_errors_explained(folder):
            self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.run.is_main:
            self.run.mark_complete(folder, self.report.speed())
            older = complete_checkpoints(self.run.checkpoints)
            for stale in older[: -int(self.args.save_total_limit or len(older))]:
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()
