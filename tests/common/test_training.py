"""The frame around training, on a regression of a few numbers: resume, signals, not-a-number, half-written checkpoints, figures."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.common import machine, training
from recipes.common.errors import Interrupted, UserError
from recipes.common.machine import Choice
from recipes.common.run_folder import RunFolder, last_complete_checkpoint
from recipes.common.run_opening import open_folder
from recipes.common.training import (
    Loop,
    StepReport,
    duration,
    fit,
    make_accelerator,
    total_steps,
    training_defaults,
)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No accelerate state or signal handler from another test, and no time spent on measuring the peak."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(machine, "peak_flops", lambda name: 1e9)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        assert signal.getsignal(number) is handler, "the loop left its signal handler behind"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """`full_disk(n)`: from now on no file may grow beyond n bytes. What the libraries make of it is what a full disk is to them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """TrainingArguments in fp32 on the CPU."""
    from transformers import TrainingArguments

    def make(**changes: Any) -> Any:
        plain = {"use_cpu": True, "bf16": False, "save_steps": 4, "save_total_limit": 2, "logging_steps": 1}
        return TrainingArguments(output_dir=str(tmp_path / "unused"), report_to="none", **{**plain, **changes})

    return make


def train(
    run: RunFolder, args: Any, steps: int = 10, at: dict[int, Callable[[], None]] | None = None, **options: Any
) -> tuple[torch.Tensor, list[float]]:
    """A loop written out: dropout and fresh noise every step, so that the random state matters. Gives weights and losses."""
    torch.manual_seed(3)
    accelerator = make_accelerator(args)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loop = Loop(run, args, accelerator, total_steps=steps, **options)
    losses = []
    for step in loop:
        if at and step in at:
            at[step]()
        x = torch.randn(16, 4)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        loop.log(loss=loss.item(), tokens=16, reward=1.5)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


class Squares(torch.nn.Module):
    """What a Trainer takes: it gives its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


def resumed(run: RunFolder) -> RunFolder:
    """The same folder, opened again with --run.resume true."""
    again = RunFolder(run.path, recipe="demo")
    again.resume_from = last_complete_checkpoint(again.checkpoints)
    return again


def made(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path, recipe="demo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 5, 8])
def test_a_signal_checkpoints_and_the_resumed_loop_ends_as_the_uninterrupted(
    arguments: Any, tmp_path: Path, number: signal.Signals, step: int
) -> None:
    expected, losses = train(made(tmp_path / "whole"), arguments())
    run = made(tmp_path / "parts")
    with pytest.raises(Interrupted, match=f"{number.name}: checkpoint after step {step + 1}"):
        train(run, arguments(), at={step: lambda: os.kill(os.getpid(), number)})
    assert (run.checkpoints / f"checkpoint-{step + 1}" / "complete").exists()
    weights, rest = train(resumed(run), arguments())
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert rest == pytest.approx(losses[step + 1 :], abs=1e-6)
    assert [row["step"] for row in run.history()] == list(range(1, 11))


@pytest.mark.parametrize("while_saving", [False, True])
def test_a_signal_at_the_last_step_is_told_after_it(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_saving: bool
) -> None:
    """What comes after the training may take longer than it."""
    expected, _ = train(made(tmp_path / "whole"), arguments())
    run = made(tmp_path / "run")
    mark = RunFolder.mark_complete

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="SIGTERM: checkpoint after step 10"):
        if while_saving:
            patched.setattr(
                RunFolder, "mark_complete", lambda *told: (mark(*told), terminate() if "10" in told[1].name else None)
            )
        train(run, arguments(), at={} if while_saving else {9: terminate})
    assert (run.checkpoints / "checkpoint-10" / "complete").exists()
    weights, losses = train(resumed(run), arguments(), time_limit_minutes=1e-9)  # which comes too late
    assert losses == []
    torch.testing.assert_close(weights, expected, atol=0, rtol=0)


@pytest.mark.parametrize("save", ["steps", "no"])
@pytest.mark.parametrize("moment", ["on_step_end", "on_train_end"])
def test_a_trainer_tells_of_a_signal_at_the_last_step_after_it(
    arguments: Any, tmp_path: Path, save: str, moment: str
) -> None:
    from transformers import Trainer, TrainerCallback

    class Terminates(TrainerCallback):
        def terminate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    setattr(Terminates, moment, Terminates.terminate)

    def trainer(run: RunFolder, callbacks: Any = None) -> Any:
        args = arguments(max_steps=8, save_strategy=save)
        args.output_dir = str(run.checkpoints)
        return Trainer(Squares(), args, train_dataset=[{"x": torch.randn(2)} for _ in range(16)], callbacks=callbacks)

    run = made(tmp_path / "run")
    saved = save == "steps" or moment == "on_step_end"
    with pytest.raises(Interrupted, match=f"SIGTERM: {'checkpoint after step 8' if saved else 'no checkpoint was'}"):
        fit(trainer(run, [Terminates()]), run)
    assert (run.checkpoints / "checkpoint-8" / "complete").exists() == saved
    if saved:
        fit(trainer(run), resumed(run), time_limit_minutes=1e-9)  # which comes too late
        assert [row["step"] for row in run.history()] == list(range(1, 9))


def test_a_time_limit_stops_as_a_signal_does(arguments: Any, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    with pytest.raises(Interrupted, match=r"run\.time_limit_minutes: checkpoint after step 3"):
        train(run, arguments(), at={2: lambda: time.sleep(1.2)}, time_limit_minutes=1.0 / 60)
    assert (run.checkpoints / "checkpoint-3" / "complete").exists()


def test_the_steps_of_part_of_an_epoch_are_those_that_the_trainer_takes() -> None:
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2)
    trainer: Any = SimpleNamespace(args=args, get_train_dataloader=lambda: range(7))
    assert total_steps(trainer) == 6  # of 4 an epoch, where two whole ones would be 8


def test_a_finished_loop_resumed_takes_no_step(arguments: Any, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    expected, _ = train(run, arguments())
    last = json.loads((run.checkpoints / "checkpoint-10" / "complete").read_text())
    assert last["speed"] == {key: run.figures[key] for key in ("tokens_per_second", "mfu", "step_seconds")}
    weights, losses = train(resumed(run), arguments())
    assert losses == []
    torch.testing.assert_close(weights, expected, atol=0, rtol=0)


def test_only_the_last_checkpoints_are_kept(arguments: Any, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    train(run, arguments(save_steps=2))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-8"]


def test_a_half_written_checkpoint_is_passed_over(arguments: Any, tmp_path: Path) -> None:
    expected, _ = train(made(tmp_path / "whole"), arguments())
    run = made(tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(run, arguments(), at={5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    (run.checkpoints / "checkpoint-6" / "complete").unlink()  # killed while it wrote this one
    for file in (run.checkpoints / "checkpoint-6").iterdir():
        file.write_bytes(b"torn")
    (run.checkpoints / "checkpoint-9").mkdir()
    again = resumed(run)
    assert again.resume_from == run.checkpoints / "checkpoint-4"
    again.forget_after(4)
    weights, _ = train(again, arguments())
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert [row["step"] for row in run.history()] == list(range(1, 11))
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_half_written_checkpoint_takes_no_good_one_s_place(arguments: Any, tmp_path: Path) -> None:
    """Only so many are kept, by their number: what a kill left behind must not count among them."""
    run = made(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(run, arguments(), at={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    (run.checkpoints / "checkpoint-7").mkdir()
    train(resumed(run), arguments(), steps=8)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_a_disk_that_is_full_is_one_error_and_the_last_checkpoint_stays(
    arguments: Any, tmp_path: Path, full_disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """With capsys, so that what is printed goes to no file."""
    expected, _ = train(made(tmp_path / "whole"), arguments())
    run = made(tmp_path / "parts")
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-8: .* MiB are free there\); free space") as caught:
        train(run, arguments(), at={5: lambda: full_disk(4000)})
    assert len(caught.value.problems) == 1
    assert last_complete_checkpoint(run.checkpoints) == run.checkpoints / "checkpoint-4"
    full_disk(2**30)
    weights, _ = train(resumed(run), arguments())
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, losses = train(made(tmp_path / "whole"), arguments())
    killed = made(tmp_path / "killed")
    (killed.path / "config.yaml").write_text("a: 1\n")
    killed.log(1, loss=99.0)
    (killed.checkpoints / "checkpoint-4").mkdir(parents=True)  # half-written
    again = open_folder(
        killed.path, recipe="test", fingerprint="a: 1\n", resume=True, overwrite=False, dry=False, given=set()
    )
    assert f"{killed.path} holds no complete checkpoint to go on from: starting afresh" in capsys.readouterr().out
    weights_again, losses_again = train(again, arguments())
    assert torch.equal(weights, weights_again)
    assert losses == losses_again
    assert [row["step"] for row in again.history()] == list(range(1, 11))  # nothing of the killed run is left


def test_processes_that_formed_no_group_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    """In a loop written out and in a library's Trainer; each process would train by itself."""
    alone = SimpleNamespace(num_processes=1)
    args = arguments()
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: alone)
    for name in ("WORLD_SIZE", "RECIPES_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="2 processes were started, and the group that they formed has 1"):
        make_accelerator(args)
    with pytest.raises(UserError, match="2 processes were started, and the group that they formed has 1"):
        fit(SimpleNamespace(args=args, accelerator=alone), None)


def test_a_loop_refuses_what_only_a_trainer_does(arguments: Any) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir="unused", use_cpu=True, bf16=False, eval_strategy="epoch", report_to="tensorboard"
    )
    with pytest.raises(UserError) as caught:
        make_accelerator(args)
    assert [problem.split(" has no say")[0] for problem in caught.value.problems] == [
        "training.eval_strategy: epoch", "training.report_to: tensorboard",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"training\.save_strategy: best has no say.*saves every"):
        make_accelerator(arguments(save_strategy="best"))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(
    arguments: Any, tmp_path: Path, loss: float
) -> None:
    run = made(tmp_path / "run")
    loop = Loop(run, arguments(), make_accelerator(arguments()), total_steps=10)
    with pytest.raises(UserError, match=r"at step 6: lower training\.learning_rate.*checkpoint-4$") as caught:
        for step in loop:
            loop.log(loss=loss if step == 5 else 1.0, tokens=1)
    assert str(loss) in str(caught.value)
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-4"]


def test_weights_that_are_no_numbers_are_not_saved(arguments: Any, tmp_path: Path) -> None:
    """A finite loss says nothing of the update after it."""
    run, args = made(tmp_path / "run"), arguments()
    accelerator = make_accelerator(args)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    loop = Loop(run, args, accelerator, total_steps=10)
    with pytest.raises(UserError, match=r"a weight is not a finite number after step 8: lower.*checkpoint-4$"):
        for step in loop:
            if step == 6:
                model.weight.data[0, 1] = float("nan")
            loop.log(loss=1.0, tokens=1)
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("save", "left"), [("steps", ["checkpoint-4"]), ("epoch", ["checkpoint-4", "checkpoint-6"]), ("no", [])]
)
def test_a_trainer_saves_and_tries_no_weights_that_are_no_numbers(
    arguments: Any, tmp_path: Path, save: str, left: list[str]
) -> None:
    from transformers import Trainer, TrainerCallback

    class Spoils(TrainerCallback):
        """After the loss of step 7, as an update may; and a sampler that looks at what is saved."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                model.layer.weight.data.fill_(float("inf"))

        def on_save(self, *_: Any, **__: Any) -> None:
            assert bool(torch.isfinite(model.layer.weight).all())

    run, model = made(tmp_path / "run"), Squares()
    rows = [{"x": torch.randn(2)} for _ in range(16)]
    args = arguments(max_steps=8, save_strategy=save)
    args.output_dir = str(run.checkpoints)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Spoils()])
    last = left[-1] if left else "no checkpoint had been written yet"
    with pytest.raises(UserError, match=f"a weight is not a finite number after step 8: .*{last}$"):
        fit(trainer, run)
    assert sorted(p.name for p in run.checkpoints.glob("checkpoint-*")) == left


def test_a_loss_that_is_no_number_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint had been written yet"):
        training.stop_at_nan(float("nan"), 1, made(tmp_path / "run"))
    training.stop_at_nan(1e30, 1, made(tmp_path / "other"))


@pytest.mark.parametrize("every", [1, 3])
def test_lines_say_the_loss_and_what_was_processed(
    arguments: Any, tmp_path: Path, every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run")
    run.figures["flops_per_token"] = 100.0
    train(run, arguments(logging_steps=every), steps=10)
    rows = run.history()
    assert [row["step"] for row in rows] == [n for n in range(1, 11) if n % every == 0 or n == 10]
    assert rows[0]["reward"] == 1.5 and rows[0]["loss"] > 0
    assert rows[0].keys() == {"step", "loss", "reward", "tokens_per_second", "mfu", "peak_memory_gib"}
    out = capsys.readouterr().out
    assert f"step {every}/10  loss {rows[0]['loss']:.4f}  reward 1.5" in out and "left 0s" in out
    assert {"tokens_per_second", "mfu", "step_seconds"} <= run.figures.keys()


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(training.time, "perf_counter", lambda: self.now)


def test_speed_mfu_and_time_left_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    run = made(tmp_path / "run")
    report = StepReport(run, total_steps=100, flops_per_token=2e6, dtype_name="float32")  # the peak is 1e9
    clock.now += 50  # the first step compiles
    row = report.line(1, 2.0, 500)
    assert row["tokens_per_second"] == 10.0 and row["mfu"] == 0.02
    for step in range(2, 11):
        clock.now += 2
        if step == 7:
            clock.now += 30  # an evaluation
            report.pause(30)
        row = report.line(step, 2.0, 500)
        assert row["tokens_per_second"] == 250.0, step
        assert row["mfu"] == 0.5
    report.finish()
    assert run.figures == {"tokens_per_second": 250.0, "mfu": 0.5, "step_seconds": 2.0}  # neither warm-up nor pause
    assert "step 10/100  loss 2.0000  250 tok/s  mfu 50.0%" in capsys.readouterr().out.splitlines()[-1]


def test_time_left_is_what_the_remaining_steps_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    report = StepReport(made(tmp_path / "run"), 100, 1.0, "float32", first_step=40)
    for step in range(41, 51):
        clock.now += 3
        report.line(step, 1.0, 1)
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 2m30s")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.7, "1h00m"), (7260, "2h01m")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# ---------------------------------------------------------------------------------------------- training_defaults


def test_what_the_frame_fills_in_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "choose_bf16", lambda: Choice(True, "this processor has x"))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    chosen = training_defaults(Path("runs/demo"), {})
    assert chosen["output_dir"][0] == "runs/demo"
    assert chosen["bf16"] == (True, "machine: this processor has x")
    assert chosen["use_cpu"] == (True, "machine: has no GPU")
    assert chosen["report_to"][0] == "none"
    assert all(origin.startswith(("frame: ", "machine: ")) for _, origin in chosen.values())
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    assert chosen.keys() <= known.keys()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"output_dir": "x"}, "training.output_dir belongs to the frame"),
        ({"resume_from_checkpoint": "x"}, "use --run.resume true"),
        ({"overwrite_output_dir": True}, "use --run.overwrite true"),
        ({"log_level": "loud"}, "training.log_level must be one of detail, debug, .*, not 'loud'"),
        ({"torch_compile_backend": "indutcor"}, "training.torch_compile_backend must be one of .*inductor"),
        ({"packing_strategy": "bff"}, "training.packing_strategy must be one of bfd, bfd_split, wrapped, not 'bff'"),
        (
            {"logging_strategy": "no"},
            "training.logging_strategy: no would break .*a loss that is not a number stops the run",
        ),
        (
            {"save_only_model": True},
            "training.save_only_model: True would break .*a resumed run ends with the same weights",
        ),
        ({"ignore_data_skip": True}, "training.ignore_data_skip: True would break .*it sees no row twice"),
        ({"save_total_limit": 1}, "training.save_total_limit: 1 leaves no whole checkpoint"),
        ({"fsdp_config": {"fsdp_versio": 2}}, "training.fsdp_config: there is no fsdp_versio; did you mean version?"),
        (
            {"accelerator_config": {"even_batch": True}},
            "training.accelerator_config: .*even_batch; did you mean even_batches?",
        ),
        ({"gradient_checkpointing_kwargs": {"use_reentrnt": False}}, "no use_reentrnt; did you mean use_reentrant?"),
        ({"push_to_hub": True}, "training.push_to_hub: nothing is uploaded from here"),
        ({"chat_template_path": "x.jinja"}, "training.chat_template_path: model.chat_template takes the file"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel: true needs the package liger-kernel"),
        ({"bf16": True}, "training.bf16: true, but this processor lacks it; leave it out"),
        ({"fp16": True}, "training.fp16: true needs a GPU"),
        ({"torch_compile": True}, "training.torch_compile: true, but no compiler; leave it out"),
        ({"use_cpu": False}, "training.use_cpu: false, but torch sees no GPU"),
        ({"activation_offloading": True}, "training.activation_offloading: true, but there is no GPU"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(
    given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "choose_bf16", lambda: Choice(False, "this processor lacks it"))
    monkeypatch.setattr(machine, "can_compile", lambda: Choice(False, "no compiler"))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(training, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=says):
        training_defaults(Path("x"), given)


def test_what_is_as_the_frame_has_it_is_taken() -> None:
    given = {"logging_strategy": "steps", "save_only_model": False, "ignore_data_skip": False, "save_total_limit": None}
    mappings = {"fsdp_config": {"fsdp_version": 2, "cpu_offload": True}, "accelerator_config": {"even_batches": False}}
    training_defaults(Path("x"), {**given, **mappings, "gradient_checkpointing_kwargs": {"use_reentrant": False}})


def test_everything_that_is_refused_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    with pytest.raises(UserError) as caught:
        training_defaults(Path("x"), {"output_dir": "x", "fp16": True, "use_cpu": False})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(("seconds", "compiles"), [(60.0, False), (300.0, False), (3600.0, True)])
def test_compiling_waits_until_it_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, compiles: bool
) -> None:
    monkeypatch.setattr(machine, "can_compile", lambda: Choice(True, "yes"))
    called: list[bool] = []
    model = type("M", (), {"compile": lambda self: called.append(True)})()
    run = made(tmp_path / "run")
    assert training.compile_if_it_pays(model, run, seconds) is compiles
    assert bool(called) is compiles
    assert run.choices["torch.compile"].startswith(str(compiles))
