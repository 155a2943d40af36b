"""Launchers: what is started, what is refused and why, and that as many processes work together as were asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from recipes.common import launch
from recipes.common.errors import UserError
from recipes.common.launch import LAUNCHERS, asked_on, check_world_size, command, launcher_arguments
from tests.conftest import ROOT, Checkout

Execute = Callable[..., "subprocess.CompletedProcess[str]"]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # these tests form groups of CPU processes, on a machine with GPUs too
SHARDED = [name for name in LAUNCHERS if name not in ("single", "ddp")]


def problems(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """What the UserError says that this call must raise."""
    with pytest.raises(UserError) as error:
        function(*arguments, **named)
    return "\n".join(error.value.problems)


# Really launched


def launched(checkout: Checkout, execute: Execute, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "recipes.common.launch", *words]
    return execute(line, cwd=checkout.root, PYTHONPATH=str(checkout.root), **{**NO_GPU, **environment})


def test_a_reader_of_the_list_may_leave_early(checkout: Checkout, execute: Execute) -> None:
    list_all = f"set -o pipefail; {sys.executable} -m recipes.common.launch --list | true"
    done = execute(["bash", "-c", list_all], cwd=checkout.root, PYTHONPATH=str(checkout.root))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_two_processes_form_one_group(checkout: Checkout, execute: Execute) -> None:
    done = launched(checkout, execute, "tiny", "--launch", "ddp", "--nproc", "2", "--", "--x.y", "a b")
    assert done.returncode == 0, done.stderr
    threads = max(1, launch.core_count() // 2)
    lines = done.stdout.splitlines()
    assert f"$ OMP_NUM_THREADS={threads} ACCELERATE_USE_CPU=true " in lines[0]
    # 1 + 2: each process saw the other's number.
    assert sorted(line for line in lines if line.startswith("process")) == [
        f"process 0 of 2: total 3, threads {threads}",
        f"process 1 of 2: total 3, threads {threads}",
    ]
    config = checkout.root / "configs/demo/tiny/cpu.yaml"
    assert done.stdout.count(f"arguments ['--config', '{config}', '--x.y', 'a b']") == 2


def test_single_takes_the_place_of_the_launcher(checkout: Checkout, execute: Execute) -> None:
    done = launched(checkout, execute, "demo/tiny", "--config", "gpu", "--", "--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"arguments ['--config', '{checkout.root}/configs/demo/tiny/gpu.yaml', '--quick']\n"


@pytest.mark.slow
def test_plain_torchrun_forms_one_group(checkout: Checkout, execute: Execute) -> None:
    """Without our help accelerate would make two replicas of it, each with a total of 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = execute([*torchrun, "recipes/demo/tiny.py"], cwd=checkout.root, PYTHONPATH=str(checkout.root), **NO_GPU)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: total 3" in done.stdout
    assert "process 1 of 2: total 3" in done.stdout


@pytest.mark.slow
def test_accelerate_on_cpu_starts_one_process_and_is_refused(checkout: Checkout, execute: Execute) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = execute([*accelerate, "recipes/demo/tiny.py"], cwd=checkout.root, PYTHONPATH=str(checkout.root), **NO_GPU)
    assert done.returncode != 0
    assert "error: accelerate launch was asked for 2 and started 1 process" in done.stderr
    assert "make tiny LAUNCH=ddp NPROC=2" in done.stderr
    assert "total" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_accelerate_that_would_ignore_sharding_is_refused(checkout: Checkout, execute: Execute, name: str) -> None:
    if name == "zero2":
        pytest.importorskip("deepspeed", reason="make setup-distributed installs DeepSpeed")
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"configs/accelerate/{name}.yaml",
    ]
    line = [*accelerate, "--num_processes", "2", "--main_process_port", "0", "recipes/demo/tiny.py"]
    done = execute(line, cwd=checkout.root, PYTHONPATH=str(checkout.root), **NO_GPU)
    assert done.returncode != 0
    assert "without one accelerate ignores FSDP and DeepSpeed without a word" in done.stderr
    assert "total" not in done.stdout


@pytest.mark.slow
def test_deepspeed_launcher(checkout: Checkout, execute: Execute) -> None:
    """It starts two processes that form a group, and its `--local_rank=N` does not reach the recipe."""
    pytest.importorskip("deepspeed", reason="make setup-distributed installs DeepSpeed")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29731"]
    done = execute(
        [*deepspeed, "recipes/demo/tiny.py", "--x.y", "1"],
        cwd=checkout.root,
        PYTHONPATH=str(checkout.root),
        DS_ACCELERATOR="cpu",
        LOCAL_SIZE="2",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: total 3" in done.stdout
    assert "process 1 of 2: total 3" in done.stdout
    assert done.stdout.count("arguments ['--x.y', '1']") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit(2)", 2, ""),
        ("sys.exit(130)", 130, ""),
        ("raise ValueError('a bug')", 1, "error: process 1 of 2 ended with exit code 1, and the others were stopped"),
        ("os.kill(os.getpid(), 9)", 1, "error: process 1 of 2 was killed by SIGKILL (out of memory, most likely)"),
    ],
)
def test_exit_code_of_the_worker_that_failed(
    checkout: Checkout, execute: Execute, ending: str, code: int, said: str
) -> None:
    """torchrun by itself exits 1 whatever happened, with its own traceback."""
    script = checkout.root / "recipes/demo/tiny.py"
    script.write_text(f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(60)\n")
    done = launched(checkout, execute, "tiny", "--launch", "ddp", "--nproc", "2")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert ("Traceback" in done.stderr) == ("ValueError" in ending)
    if not said:
        assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_workers_and_ends_with_130(
    checkout: Checkout, clean_environment: dict[str, str], number: signal.Signals
) -> None:
    """They have the time to write a checkpoint, and their parent waits for it."""
    (checkout.root / "recipes/demo/tiny.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(1)\n"
        "    open(f'saved-{os.environ[\"RANK\"]}', 'w').write(signal.Signals(number).name)\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(f'ready-{os.environ[\"RANK\"]}', 'w')\n"
        "time.sleep(60)\n"
    )
    line = [sys.executable, "-m", "recipes.common.launch", "tiny", "--launch", "ddp", "--nproc", "2"]
    environment = {**clean_environment, **NO_GPU, "PYTHONPATH": str(checkout.root)}
    process = subprocess.Popen(line, cwd=checkout.root, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(checkout.root.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert {file.read_text() for file in checkout.root.glob("saved-*")} == {number.name}
    assert len(list(checkout.root.glob("saved-*"))) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tinny"], ["no recipe called tinny; did you mean tiny?"]),
        (["quickstrt", "--targets", "help quickstart"], ["did you mean quickstart?"]),
        (["zzzzzz"], ["no recipe called zzzzzz among the 1 recipes"]),
        (["other/tiny"], ["no recipe called other/tiny; did you mean tiny?"]),
        (["recipes/demo/tinny.py"], ["no script recipes/demo/tinny.py; did you mean tiny?"]),
        ([], ["which recipe?"]),
        (["tiny", "--config", "gpuu"], ["no config gpuu; did you mean gpu? (tiny has cpu, gpu)"]),
        (["tiny", "--config", "mine.yaml"], ["no config mine.yaml"]),
        (["tiny", "--launch", "dpp"], ["no launcher LAUNCH=dpp; did you mean ddp?"]),
        (["tiny", "--launch", "ddp", "--nproc", "0"], ["NPROC=0: at least 1 process"]),
        (["tiny", "--launch", "ddp", "--nproc", "-2"], ["NPROC=-2: at least 1 process"]),
        (["tiny", "--launch", "ddp", "--nproc", "two"], ["NPROC=two is not a whole number"]),
        (["tiny", "--launch", "ddp", "--nproc", "1.5"], ["NPROC=1.5 is not a whole number"]),
        (["tiny", "--launch", "ddp", "--nproc", ""], ["NPROC= is not a whole number"]),
        (["tiny", "--launch", "ddp", "--nproc", "999"], ["NPROC=999: this machine has no GPU and"]),
        (["tiny", "--nproc", "2"], ["LAUNCH=single is one process, and NPROC=2 asks for 2: add LAUNCH=ddp"]),
        (["tiny", "--launch", "zero3", "--nproc", "x"], ["NPROC=x is", "LAUNCH=zero3: there is no GPU here"]),
        (["tiny", "--config", "gpuu", "--launch", "dpp", "--nproc", "0"], ["gpuu", "dpp", "NPROC=0"]),
        *[(["tiny", "--launch", name], [f"LAUNCH={name}: there is no GPU", "LAUNCH=ddp"]) for name in SHARDED],
    ],
)
def test_bad_input(
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: list[str],
) -> None:
    """Exit code 2 and every problem at once, before anything is started."""
    monkeypatch.setattr(launch, "ROOT", checkout.root)
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("started"))
    monkeypatch.chdir(checkout.root)
    assert launch.main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert all(line.startswith("error: ") for line in told.err.splitlines())
    for text in said:
        assert text in told.err


# The command for machines that are not here

SCRIPT, CONFIG = Path("/r/recipes/demo/tiny.py"), Path("/r/configs/demo/tiny/gpu.yaml")


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "single"])
def test_command_with_gpus(name: str) -> None:
    line, environment = command(SCRIPT, CONFIG, name, 4, ["--a.b", "1"], gpus=8, cores=64)
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    options, recipe = line[3 : line.index(str(SCRIPT))], line[line.index(str(SCRIPT)) :]
    assert recipe == [str(SCRIPT), "--config", str(CONFIG), "--a.b", "1"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.pop("--config_file") == str(ROOT / f"configs/accelerate/{name}.yaml")
    if name.startswith("zero"):
        assert given.pop("--deepspeed_config_file") == str(ROOT / f"configs/deepspeed/{name}.json")
    assert given == {"--num_machines": "1", "--num_processes": "4", "--main_process_port": "0"}
    # A quarter of the cores each; ACCELERATE_USE_CPU must not be there.
    assert environment == {"RECIPES_WORLD_SIZE": "4", "OMP_NUM_THREADS": "16"}


def test_command_of_one_process_and_a_config_of_its_own() -> None:
    line, environment = command(SCRIPT, CONFIG, "single", 1, ["--config", "other.yaml"], gpus=8, cores=64)
    assert line == [sys.executable, str(SCRIPT), "--config", "other.yaml"]
    line, _ = command(SCRIPT, CONFIG, "single", 1, ["--config=other.yaml"], gpus=8, cores=64)
    assert line == [sys.executable, str(SCRIPT), "--config=other.yaml"]
    assert environment == {"RECIPES_WORLD_SIZE": "1"}


def test_room_on_a_machine_with_gpus() -> None:
    for name in LAUNCHERS:
        launch.check_room(1, name, gpus=1, cores=4)
    launch.check_room(8, "fsdp", gpus=8, cores=4)  # a process a GPU: the cores do not count
    assert "this machine has 1 GPU" in problems(launch.check_room, 2, "ddp", gpus=1, cores=64)
    assert "this machine has 8 GPUs" in problems(launch.check_room, 9, "zero3", gpus=8, cores=64)
    assert "add LAUNCH=ddp, fsdp or zero3" in problems(launch.check_room, 2, "single", gpus=8, cores=64)


def test_gpus_are_not_looked_for_with_torch_where_there_is_no_device_file() -> None:
    code = "import sys; from recipes.common.launch import gpu_count; print(gpu_count(), 'torch' in sys.modules)"
    if launch.gpu_files():
        pytest.skip("this machine has GPUs")
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["0", "False"]


# The check after a launch


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that nobody launched, on a machine without a GPU."""
    for name in ("WORLD_SIZE", "RECIPES_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_USE_DEEPSPEED", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    return monkeypatch


def test_a_process_by_itself_passes(no_launcher: pytest.MonkeyPatch) -> None:
    check_world_size()
    check_world_size(formed=1)
    assert "ACCELERATE_USE_CPU" not in os.environ


def test_fewer_or_more_than_asked(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RECIPES_WORLD_SIZE", "4")
    assert "was asked for 4 and started 1 process" in problems(check_world_size)
    no_launcher.setenv("WORLD_SIZE", "2")
    assert "was asked for 4 and started 2 processes" in problems(check_world_size)
    no_launcher.setenv("WORLD_SIZE", "4")
    check_world_size(formed=4)


def test_replicas_that_formed_no_group(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("WORLD_SIZE", "2")
    check_world_size()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert "the group that they formed has 1" in problems(check_world_size, formed=1)


def test_workers_on_gpus_are_left_alone(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setattr(launch, "gpu_count", lambda: 2)
    no_launcher.setenv("WORLD_SIZE", "2")
    no_launcher.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_world_size(formed=2)
    assert "ACCELERATE_USE_CPU" not in os.environ


@pytest.mark.parametrize(("name", "starter"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")])
def test_copies_by_a_scheduler(no_launcher: pytest.MonkeyPatch, name: str, starter: str) -> None:
    no_launcher.setenv(name, "1")
    check_world_size()
    no_launcher.setenv(name, "8")
    assert f"{starter} started 8 copies" in problems(check_world_size)
    no_launcher.setenv("WORLD_SIZE", "16")  # a launcher in each task: as it should be
    check_world_size()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_asked_of_accelerate_without_a_gpu(no_launcher: pytest.MonkeyPatch, name: str) -> None:
    no_launcher.setenv(f"ACCELERATE_USE_{name}", "true")
    assert "accelerate ignores FSDP and DeepSpeed" in problems(check_world_size)
    no_launcher.setenv(f"ACCELERATE_USE_{name}", "false")
    check_world_size()


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_sharding_asked_of_the_trainer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    training = SimpleNamespace(
        **{"deepspeed": None, "fsdp": None, "use_cpu": False, name: "configs/deepspeed/zero3.json"}
    )
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    assert f"training.{name}: there is no GPU here" in problems(launch.check_sharding, training)
    monkeypatch.setattr(launch, "gpu_count", lambda: 1)
    launch.check_sharding(training)
    training.use_cpu = True
    assert f"training.{name}" in problems(launch.check_sharding, training)
    launch.check_sharding(SimpleNamespace(deepspeed=None, fsdp=[], use_cpu=True))


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("python bin/accelerate launch --cpu --num_processes 2 x.py", (2, "accelerate launch")),
        ("bin/accelerate launch --num-processes=16 --num_machines 2 x.py", (16, "accelerate launch")),
        ("accelerate-launch --num_processes 3 x.py", (3, "accelerate launch")),
        ("python -m accelerate.commands.launch --num_processes 3 x.py --num_processes 9", (3, "accelerate launch")),
        ("python -u bin/torchrun --nproc_per_node 2 x.py", (2, "torchrun")),
        ("torchrun --nnodes=4 --nproc-per-node=8 x.py", (32, "torchrun")),
        ("python -m torch.distributed.run --standalone --nproc_per_node=2 x.py", (2, "torchrun")),
        ("torchrun --nnodes=1:4 --nproc-per-node=8 x.py", None),  # as many machines as come
        ("torchrun --nproc-per-node=gpu x.py", None),
        ("python bin/deepspeed --num_gpus 2 x.py", (2, "deepspeed")),
        ("deepspeed --num_nodes 2 --num_accelerators=4 x.py", (8, "deepspeed")),
        ("deepspeed --hostfile hosts --num_gpus 4 x.py", None),  # as many machines as the file has
        ("deepspeed -H hosts --num_gpus 4 x.py", None),
        ("python -m deepspeed.launcher.runner --num_gpus 2 x.py", (2, "deepspeed")),
        ("python -u -m deepspeed.launcher.launch --world_info=e30= x.py", None),
        ("python x.py --num_processes 4", None),
        ("bash -c torchrun --nproc_per_node 4 x.py", (4, "torchrun")),
        ("make llama LAUNCH=ddp NPROC=2", None),
        ("", None),
    ],
)
def test_what_a_command_line_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, asked: tuple[int, str] | None
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no configuration of the user's own
    assert asked_on(line.split()) == asked


def test_processes_asked_for_in_accelerates_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("num_processes: 2\nuse_cpu: true\n")
    assert asked_on(["accelerate", "launch", "x.py"]) == (2, "accelerate launch")
    other = tmp_path / "other.yaml"
    other.write_text("num_processes: 5\n")
    assert asked_on(["accelerate", "launch", "--config_file", str(other), "x.py"]) == (5, "accelerate launch")
    assert asked_on(["accelerate", "launch", "--config_file", str(other), "--num_processes", "3", "x.py"])[0] == 3


def test_launcher_arguments() -> None:
    given = ["--local_rank=1", "--a.b", "1", "--local-rank", "0", "--c", "--local-rank=2"]
    assert launcher_arguments(given) == ["--a.b", "1", "--c"]
    assert launcher_arguments(["--local_rank"]) == []
    assert launcher_arguments([]) == []


def test_environment_defaults_leave_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "svg")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    launch.environment_defaults()
    assert os.environ["MPLBACKEND"] == "svg"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["RAYON_NUM_THREADS"] == "3"
    monkeypatch.undo()


def test_recipes_have_names_of_their_own() -> None:
    """`make <recipe>` has one recipe to mean."""
    files = [path for path in ROOT.glob("recipes/*/*.py") if path.parent.name != "common" and path.stem[0] != "_"]
    assert sorted(path.stem for path in files) == sorted(launch.recipes())
    for path in files:
        assert launch.summary(path) != "(no docstring)", path


def test_importing_is_light() -> None:
    code = (
        "import sys, recipes.common.launch; print(sorted({'torch', 'yaml', 'psutil', 'accelerate'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# The configurations, read by the libraries themselves


def as_accelerate_reads(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> Any:
    """What `accelerate launch` makes of configs/accelerate/<name>.yaml and these options."""
    from accelerate.commands import launch as accelerate_launch

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    parser = accelerate_launch.launch_command_parser()
    options = ("--config_file", f"configs/accelerate/{name}.yaml", "--main_process_port", "0", *options)
    arguments, defaults, precision = accelerate_launch._validate_launch_command(parser.parse_args([*options, "x.py"]))
    fields = list(defaults.deepspeed_config) + (["mixed_precision"] if precision else [])
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return arguments


@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_accelerate_configuration(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / f"configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(file))
    kind = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type == kind
    if name == "single":
        return
    # The command line must win over the file.
    asked = as_accelerate_reads(name, monkeypatch, tmp_path, "--num_processes", "6", "--num_machines", "3")
    assert (asked.num_processes, asked.num_machines) == (6, 3)
    assert (asked.use_fsdp, asked.use_deepspeed) == (name == "fsdp", kind == "DEEPSPEED")
    # accelerate takes these from the command line only and says nothing when a file has them; mixed_precision would win
    # over training.bf16: false.
    ignored = {"rdzv_backend", "same_network", "enable_cpu_affinity", "mixed_precision"}
    assert not ignored & set(yaml.safe_load(file.read_text()))


def test_every_launcher_has_its_files() -> None:
    assert {file.stem for file in (ROOT / "configs/accelerate").glob("*")} == set(LAUNCHERS)
    assert {file.stem for file in (ROOT / "configs/deepspeed").glob("*")} == {
        n for n in LAUNCHERS if n.startswith("zero")
    }


def test_fsdp_as_accelerate_sets_it_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = as_accelerate_reads("fsdp", monkeypatch, tmp_path, "--num_processes", "2")
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"  # so that training.bf16 decides
    plugin.set_mixed_precision("bf16")
    assert str(plugin.mixed_precision_policy.param_dtype) == "torch.bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name.startswith("zero")])
def test_deepspeed_configuration(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """accelerate takes it with its own file, transformers fills in all that is "auto", DeepSpeed knows every key."""
    pytest.importorskip("deepspeed", reason="make setup-distributed installs DeepSpeed")
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments = as_accelerate_reads(name, monkeypatch, tmp_path, "--num_processes", "2")
    assert arguments.deepspeed_multinode_launcher == "standard"
    for key, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    stage = int(name[4])
    assert plugin.zero_stage == stage
    assert plugin.offload_optimizer_device == ("cpu" if "offload" in name else "none")
    assert plugin.offload_param_device == ("cpu" if name == "zero3_offload" else "none")
    assert plugin.zero3_init_flag == (stage == 3)
    assert plugin.zero3_save_16bit_model == (stage == 3)  # else a ZeRO-3 run saves no weights that load

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    training = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=4, gradient_accumulation_steps=3
    )
    filled = HfTrainerDeepSpeedConfig(str(ROOT / f"configs/deepspeed/{name}.json"))
    filled.trainer_config_process(training)
    filled.trainer_config_finalize(
        training, SimpleNamespace(), num_training_steps=10
    )  # a model without hidden_size too
    unset_hf_deepspeed_config()
    assert "auto" not in str(filled.config)
    assert filled.config["train_batch_size"] == 12
    assert filled.config["bf16"] == {"enabled": True}
    assert filled.config["fp16"] == {"enabled": False}
    # The optimizer and the schedule are the recipe's: a second one here would be refused, or win.
    assert not {"optimizer", "scheduler"} & set(filled.config)
    zero = DeepSpeedZeroConfig(**filled.config["zero_optimization"])
    assert zero.stage == stage
    assert (zero.offload_optimizer is not None) == ("offload" in name)
