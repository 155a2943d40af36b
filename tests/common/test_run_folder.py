"""The run folder: written whole or not at all, whose it is, and what resume and overwrite may do to it."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.common.errors import UserError
from recipes.common.run_folder import (
    COMPLETE,
    RunFolder,
    draw_curve,
    drop_half_written_checkpoints,
    folder_written_atomically,
    last_complete_checkpoint,
    write_atomically,
    write_errors_explained,
)
from recipes.common.run_opening import open_folder

CONFIG = "training:\n  max_steps: 3\nrun:\n  name: default\n"


def opened(path: Path, **how: Any) -> RunFolder:
    """The folder as `run_recipe` opens it, of a run that has ended: it does not hold it any more."""
    run = held(path, **how)
    run.unlock()
    return run


def held(path: Path, **how: Any) -> RunFolder:
    """The folder as `run_recipe` opens it."""
    usual = {"fingerprint": CONFIG, "resume": False, "overwrite": False, "dry": False, "given": set()}
    return open_folder(path, recipe="test", **{**usual, **how})


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    made = folder / "checkpoints" / f"checkpoint-{step}"
    made.mkdir(parents=True)
    if complete:
        RunFolder(folder, recipe="test").mark_complete(made, {})
    return made


# ---------------------------------------------------------------------------------------------- atomic writes


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    write_atomically(file, "first")
    write_atomically(file, b"second")
    assert content(tmp_path) == {"deep/a.txt": "second"}
    assert file.stat().st_mode & 0o777 == 0o644  # mkstemp's own would shut out everybody else


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.txt", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.txt", "new, cut short")
    assert content(tmp_path) == {"a.txt": "old"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with folder_written_atomically(target) as folder:
        (folder / "old.txt").write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), folder_written_atomically(target) as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError
    assert content(tmp_path) == {"model/old.txt": "old"}
    with folder_written_atomically(target) as folder:
        (folder / "new.txt").write_text("new")
    assert content(tmp_path) == {"model/new.txt": "new"}  # the old files are gone, not mixed with the new


def test_a_model_that_does_not_fit_on_the_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    """As safetensors and torch really fail, where no file may grow beyond a kilobyte."""
    import torch
    from safetensors.torch import save_file

    weights = {"a": torch.zeros(10_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save in (save_file, torch.save):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with (
                pytest.raises(UserError, match=r"cannot write .*model: "),
                folder_written_atomically(tmp_path / "model") as f,
            ):
                save(weights, f / "weights")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), RuntimeError("a bug"), UserError("x")):
        with pytest.raises(type(error)) as caught, write_errors_explained(tmp_path):
            raise error
        assert caught.value is error


# ---------------------------------------------------------------------------------------------- whose it is


def test_a_new_folder_holds_its_config(tmp_path: Path) -> None:
    run = opened(tmp_path / "new")
    assert content(run.path) == {"config.yaml": CONFIG}
    assert run.resume_from is None


@pytest.mark.parametrize(("finished", "said"), [(False, "an unfinished run"), (True, "a finished run")])
def test_a_folder_that_is_taken_is_not_touched(tmp_path: Path, finished: bool, said: str) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=1.0)
    if finished:
        write_atomically(run.path / "metrics.json", "{}")
    before = content(run.path)
    with pytest.raises(UserError, match=f"already holds {said}.*--run.resume true.*--run.overwrite true"):
        opened(run.path)
    assert content(run.path) == before


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path / "dry", dry=True, overwrite=True)
    run.log(1, loss=1.0)
    run.sample("a.txt", "text")
    run.plot("loss", lambda axes: None)
    assert not run.path.exists()


def test_other_ranks_write_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    run = opened(tmp_path / "run")
    run.say("hello")
    run.choose("precision", "bf16", "because")
    run.log(1, loss=1.0)
    run.sample("a.txt", "text")
    run.leave_if_unused()
    assert not run.path.exists()
    assert capsys.readouterr().out == ""


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file, not a run folder"):
        opened(tmp_path / "run")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        opened(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "mine"


# ---------------------------------------------------------------------------------------------- one run at a time


def test_a_folder_in_which_a_process_runs_is_not_another_s(tmp_path: Path) -> None:
    run = held(tmp_path / "run")
    run.log(1, loss=1.0)
    before = content(run.path)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\) is running in {run.path}"):
            held(run.path, **how)
    held(run.path, dry=True).leave_if_unused()
    assert content(run.path) == before
    run.unlock()
    again = held(run.path, overwrite=True)  # the lock is its own, not the one that was put aside with the folder
    with pytest.raises(UserError, match="another process"):
        held(run.path, resume=True)
    again.leave_if_unused()
    again.unlock()
    assert content(run.path) == {name: text for name, text in before.items() if name != ".lock"}


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = f"""import sys, time
from pathlib import Path
from recipes.common.run_opening import open_folder
run = open_folder(Path({str(tmp_path / "run")!r}), recipe="test", fingerprint={CONFIG!r}, resume=False, overwrite=False,
    dry=False, given=set())
print("held", flush=True)
time.sleep(60)
"""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another process \(pid {other.pid}\)"):
            opened(tmp_path / "run", resume=True)
        other.kill()
    opened(tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == {"config.yaml": CONFIG}


def test_a_worker_that_outlives_its_run_holds_nothing(tmp_path: Path) -> None:
    """DataLoader's and datasets' are forked: they have what the run has open."""
    run = held(tmp_path / "run")
    told, tell = os.pipe()
    if (worker := os.fork()) == 0:
        os.write(tell, b"here")
        time.sleep(60)
        os._exit(0)
    assert os.read(told, 4) == b"here" and run._lock is not None
    run._lock.close()  # as a process that is killed
    try:
        opened(tmp_path / "run", resume=True)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert content(opened(tmp_path / "run").path) == {"config.yaml": CONFIG}


# ---------------------------------------------------------------------------------------------- overwrite


def test_overwrite_deletes_what_a_run_left(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=1.0)
    checkpoint(run.path, 4)
    again = opened(run.path, overwrite=True, fingerprint="another: 1\n")
    assert content(again.path) == {"config.yaml": "another: 1\n"}
    assert again.resume_from is None
    again.log(1, loss=2.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_run_that_is_refused_overwrites_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=1.0)
    before = content(run.path)
    again = opened(run.path, overwrite=True, fingerprint="another: 1\n")
    again.leave_if_unused()
    assert content(tmp_path / "run") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_overwrite_deletes_no_folder_that_no_recipe_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no recipe made it: not deleting it"):
        opened(tmp_path, overwrite=True)
    for how in ({}, {"resume": True}):
        with pytest.raises(UserError, match="no recipe made it: not writing into it"):
            opened(tmp_path, **how)
    assert content(tmp_path) == {"thesis.txt": "years of work"}


def test_resume_and_overwrite_contradict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contradict each other"):
        opened(tmp_path / "run", resume=True, overwrite=True)


# ---------------------------------------------------------------------------------------------- resume


def test_resume_takes_the_last_complete_checkpoint_and_drops_what_came_after_it(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    for step in range(1, 13):
        run.log(step, loss=float(step))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # the process was killed in the middle of a line
    for step in (4, 8, 10):
        checkpoint(run.path, step)
    checkpoint(run.path, 12, complete=False)
    again = opened(run.path, resume=True)
    assert again.resume_from == run.checkpoints / "checkpoint-10"  # by number: as text 8 would be the last
    assert [row["step"] for row in again.history()] == list(range(1, 11))


def test_resume_without_a_complete_checkpoint_starts_afresh_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=1.0)
    checkpoint(run.path, 4, complete=False)
    again = opened(run.path, resume=True)
    assert again.resume_from is None and again.history() == []
    assert "holds no complete checkpoint to go on from: starting afresh" in capsys.readouterr().out


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        opened(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_job_that_was_put_back_before_it_had_a_folder_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = opened(tmp_path / "none", resume=True)
    assert run.resume_from is None and (tmp_path / "none" / "config.yaml").exists()


def test_resume_under_another_config_names_the_first_difference(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(UserError, match=r"`max_steps: 5` \(was `max_steps: 3`\)"):
        opened(run.path, resume=True, fingerprint=CONFIG.replace("3", "5"))
    assert content(run.path) == {"config.yaml": CONFIG}


def test_resume_may_take_another_time_limit(tmp_path: Path) -> None:
    limited = CONFIG + "  time_limit_minutes: 5.0\n"
    run = opened(tmp_path / "run", fingerprint=limited)
    checkpoint(run.path, 4)
    again = opened(run.path, resume=True, fingerprint=CONFIG + "  time_limit_minutes: null\n")
    assert again.resume_from == run.checkpoints / "checkpoint-4"


def test_a_resumed_run_counts_what_earlier_sittings_took(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.started -= 100
    saved = checkpoint(run.path, 4)
    run.mark_complete(saved, {"tokens_per_second": 5.0})
    again = opened(run.path, resume=True)
    assert again.figures == {"tokens_per_second": 5.0}  # of the steps before: it may take none itself
    assert 100 <= again.seconds_before <= again.wall_seconds() < 110
    again.started -= 7
    assert 107 <= again.wall_seconds() < 120


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", "mine, not json\n", "metrics.jsonl is damaged, or not a run's: Expecting value"),
        ("metrics.jsonl", "[1]\n", "a line is no object with a step"),
        (
            "checkpoints/checkpoint-4/complete",
            "",
            "complete is damaged: delete .*checkpoint-4 to go on from the checkpoint",
        ),
    ],
)
def test_a_damaged_folder_is_not_resumed(tmp_path: Path, file: str, text: str, said: str) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=1.0)
    checkpoint(run.path, 4)
    (run.path / file).write_text(text)
    with pytest.raises(UserError, match=said):
        opened(run.path, resume=True)
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize("stage", ["", "stages/first"])
@pytest.mark.parametrize("file", ["optimizer.pt", "shards/rank_1.pt"])
@pytest.mark.parametrize("text", [None, "", "numb", "numbers"])
def test_a_checkpoint_that_has_lost_something_is_not_gone_on_from(
    tmp_path: Path, stage: str, file: str, text: str | None
) -> None:
    run = opened(tmp_path / "run")
    made = checkpoint(run.path / stage, 4, complete=False)
    for name in ("optimizer.pt", "shards/rank_1.pt"):
        write_atomically(made / name, "numbers")
    run.mark_complete(made, {})
    (made / file).unlink() if text is None else (made / file).write_text(text)
    if text == "numbers":
        assert opened(run.path, resume=True).resume_from == (None if stage else made)
        return
    with pytest.raises(UserError) as caught:
        opened(run.path, resume=True)
    way_out = f"delete {made} to go on from the checkpoint before it"
    assert caught.value.problems == [f"{made / file} is damaged or missing: {way_out}"]


def test_a_run_is_resumed_by_as_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path / "run")
    made = checkpoint(run.path, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=rf"{run.path} was run with 1 process, now 2: .*launch it with as many, or give"
    ):
        opened(run.path, resume=True)
    run.mark_complete(made, {})
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="was run with 2 processes, now 1"):
        opened(run.path, resume=True)
    (made / COMPLETE).write_text('{"wall_seconds": 1.5, "speed": {}}\n')  # as it was before it said with how many
    assert opened(run.path, resume=True).seconds_before == 1.5


def test_an_empty_config_is_not_resumed(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    checkpoint(run.path, 4)
    (run.path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"its config\.yaml is empty, so nothing says what was run"):
        opened(run.path, resume=True)


def test_a_file_in_a_checkpoint_s_place_is_dropped(tmp_path: Path) -> None:
    for step, complete in ((4, True), (8, False)):
        checkpoint(tmp_path, step, complete)
    (tmp_path / "checkpoints" / "checkpoint-9").write_text("no folder")
    drop_half_written_checkpoints(tmp_path / "checkpoints")
    assert [left.name for left in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_checkpoints_of_other_names_are_none(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "tmp-checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMPLETE).touch()
    assert last_complete_checkpoint(tmp_path) is None


# ---------------------------------------------------------------------------------------------- what is left


def test_a_folder_in_which_nothing_ran_goes_again(tmp_path: Path) -> None:
    run = opened(tmp_path / "recipe" / "run")
    run.checkpoints.mkdir()
    run.leave_if_unused()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_leave_at_once_are_not_in_each_other_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "recipe" / "run")
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda folder: (remove(folder), folder.parent.rmdir()))
    run.leave_if_unused()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_a_folder_that_another_process_has_just_made(tmp_path: Path) -> None:
    run = opened(tmp_path / "recipe" / "run")
    opened(run.path, dry=True).leave_if_unused()
    assert content(run.path) == {"config.yaml": CONFIG}


def test_a_folder_in_which_something_ran_stays(tmp_path: Path) -> None:
    run = opened(tmp_path / "recipe" / "run")
    run.log(1, loss=1.0)
    run.leave_if_unused()
    assert (run.path / "config.yaml").exists() and len(run.history()) == 1


def test_not_a_number_is_null_in_the_metrics(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.log(1, loss=float("nan"), reward=float("inf"), accuracy=0.5)
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "reward": None, "accuracy": 0.5}


def test_a_choice_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(tmp_path / "run")
    for _ in range(2):
        run.choose("precision", "bf16", "the processor has it")
    assert capsys.readouterr().out == "  precision: bf16 (the processor has it)\n"
    assert run.choices == {"precision": "bf16 (the processor has it)"}


def test_a_curve_of_many_points_has_its_mean_on_top() -> None:
    from matplotlib.figure import Figure

    values = [float(step % 2) for step in range(400)]
    few, many = Figure().add_subplot(), Figure().add_subplot()
    draw_curve(few, range(30), values[:30], "loss")
    assert [line.get_label() for line in few.lines] == ["loss"]
    draw_curve(many, range(400), values, "loss")
    points, mean = many.lines
    assert list(points.get_ydata()) == values
    assert list(mean.get_xdata()) == list(range(9, 400)) and set(mean.get_ydata()) == {0.5}
    assert mean.get_label() == "loss, mean of 10"
    some = Figure().add_subplot()
    draw_curve(some, range(64), values[:64], "loss", color="C1")
    assert [line.get_color() for line in some.lines] == ["C1", "C1"] and some.lines[1].get_label() == "loss, mean of 8"


def test_figures_of_unlike_size_have_panels_and_a_goal_is_dotted_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    run, drawn = opened(tmp_path / "run"), {}

    def plot(name: str, draw: Any) -> None:
        drawn[name] = Figure()
        draw(drawn[name].add_subplot())

    monkeypatch.setattr(run, "plot", plot)
    for step in (1, 2, 3):
        run.log(step, entropy=5.7, clip_fraction=0.01 * step, rank=4 - step, rank_budget=4 - step)
    run.plot_panels("policy", "entropy", "clip_fraction", "kl")  # no KL was logged: no panel
    run.plot_panels("nothing", "kl")
    run.plot_curve("rank", "rank", goal="rank_budget")
    assert list(drawn) == ["policy", "rank"]
    assert [[line.get_label() for line in axes.lines] for axes in drawn["policy"].axes] == [
        ["entropy"],
        ["clip fraction"],
    ]
    assert drawn["policy"].axes[1].get_ylim()[1] < 0.05
    rank, budget = drawn["rank"].axes[0].lines
    assert (rank.get_label(), budget.get_label()) == ("rank", "rank budget")
    assert (rank.get_linestyle(), budget.get_linestyle()) == ("-", ":")
