"""The files in scripts/ parse, pass shellcheck, and start what they say, on pretended clusters of two machines."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.common.launch import LAUNCHERS
from tests.conftest import ROOT, Checkout

Execute = Callable[..., "subprocess.CompletedProcess[str]"]
SHELL = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.slurm"), ROOT / ".ci/run"])
SLURM = ["accelerate.slurm", "torchrun.slurm"]


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_parses_and_passes_shellcheck(file: Path, execute: Execute) -> None:
    parsed = execute(["bash", "-n", file])
    assert (parsed.returncode, parsed.stderr) == (0, "")
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not in this environment (make setup-dev installs it)")
    checked = execute([shellcheck, "-x", file])
    assert (checked.returncode, checked.stdout) == (0, "")
    if file.name != "resolve.sh":  # sourced by the others
        assert "set -euo pipefail" in file.read_text()


@pytest.mark.parametrize("name", SLURM)
def test_what_a_user_must_edit_is_marked(name: str) -> None:
    text = (ROOT / "scripts" / name).read_text()
    for option in ("nodes", "gpus-per-node", "cpus-per-task", "time", "partition", "account"):
        assert re.search(rf"^##?SBATCH --{option}=.*# EDIT", text, re.MULTILINE), option


# Two machines that are not there

SRUN = """#!/bin/bash
# One task a node, all at once. An option of srun's own is --name=value.
echo "$*" >>"$FAKE_LOG"
while [[ $1 == --* ]]; do shift; done
[[ -n ${FAKE_DRY:-} ]] && exit 0
for rank in 0 1; do SLURM_PROCID=$rank "$@" & pids+=($!); done
code=0; for pid in "${pids[@]}"; do wait "$pid" || code=$?; done; exit $code
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames nodes[1-2]" ]] && printf '%s\\n' ${FAKE_HEAD:-node1} node2
"""
SSH = """#!/bin/bash
# -o BatchMode=yes HOST COMMAND
echo "$3 $4" >>"$FAKE_LOG"
# Another machine's processes are no part of this terminal.
[[ -n ${FAKE_DRY:-} ]] || exec setsid bash -c "$4"
"""


@pytest.fixture
def cluster(checkout: Checkout, tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes with four GPUs each; what srun or ssh was asked for goes to FAKE_LOG."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ssh", SSH)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_DRY": "1",
        "SLURM_SUBMIT_DIR": str(checkout.root),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "48",
        "CUDA_VISIBLE_DEVICES": "",
    }


def asked(cluster: dict[str, str]) -> list[str]:
    log = Path(cluster["FAKE_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def as_the_shell_reads(line: str, **variables: str) -> list[str]:
    """The words of a command line for `bash -c`."""
    script = f"printf '%s\\n' {line}"
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "single"])
def test_accelerate_on_slurm(checkout: Checkout, cluster: dict[str, str], execute: Execute, launcher: str) -> None:
    words = ["tiny", "gpu", launcher, "--a.b", "two words"]
    done = execute(["bash", "scripts/accelerate.slurm", *words], cwd=checkout.root, **cluster)
    assert done.returncode == 0, done.stderr
    [line] = asked(cluster)
    prefix = "--wait=60 --kill-on-bad-exit=1 bash -c "
    assert line.startswith(prefix)
    command = line.removeprefix(prefix)
    assert "--machine_rank $SLURM_PROCID" in command  # read on the node
    assert as_the_shell_reads(command, SLURM_PROCID="1") == [
        *(".venv/bin/python", "-m", "accelerate.commands.launch"),
        *("--config_file", f"configs/accelerate/{launcher}.yaml"),
        *("--num_machines", "2", "--num_processes", "8"),
        *("--main_process_ip", "node1", "--main_process_port", "24711", "--machine_rank", "1"),
        *("recipes/demo/tiny.py", "--config", "configs/demo/tiny/gpu.yaml", "--a.b", "two words"),
    ]


def test_torchrun_on_slurm(checkout: Checkout, cluster: dict[str, str], execute: Execute) -> None:
    done = execute(["bash", "scripts/torchrun.slurm", "tiny", "gpu", "--a.b", "1"], cwd=checkout.root, **cluster)
    assert done.returncode == 0, done.stderr
    [line] = asked(cluster)
    assert line.split() == [
        *("--wait=60", "--kill-on-bad-exit=1"),
        *(".venv/bin/python", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "4"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:24711", "--rdzv_id", "4711"),
        *("recipes/demo/tiny.py", "--config", "configs/demo/tiny/gpu.yaml", "--a.b", "1"),
    ]


@pytest.mark.parametrize("name", SLURM)
def test_a_job_that_comes_back_resumes(
    checkout: Checkout, cluster: dict[str, str], execute: Execute, name: str
) -> None:
    words = ["tiny", "gpu", *(["ddp"] if name == "accelerate.slurm" else [])]
    execute(["bash", f"scripts/{name}", *words], cwd=checkout.root, **cluster)
    execute(["bash", f"scripts/{name}", *words], cwd=checkout.root, SLURM_RESTART_COUNT="1", **cluster)
    options = ["--run.overwrite", "true", "--a.b", "two words", "--run.resume=false"]  # how it was to begin
    execute(["bash", f"scripts/{name}", *words, *options], cwd=checkout.root, SLURM_RESTART_COUNT="1", **cluster)
    first, second, third = ([word.strip("'") for word in line.split()] for line in asked(cluster))
    assert "--run.resume" not in first
    assert second[-2:] == ["--run.resume", "true"]
    assert third[-5:] == ["--a.b", "two", "words", "--run.resume", "true"]
    assert "--run.overwrite" not in third and "--run.resume=false" not in third


@pytest.mark.parametrize("name", SLURM)
def test_the_processes_get_the_cores_of_the_job(
    checkout: Checkout, cluster: dict[str, str], execute: Execute, name: str
) -> None:
    """srun takes them from SRUN_CPUS_PER_TASK alone since Slurm 22.05."""
    Path(cluster["PATH"].split(":")[0], "srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK" >>"$FAKE_LOG"\n')
    words = ["tiny", "gpu", *(["ddp"] if name == "accelerate.slurm" else [])]
    execute(["bash", f"scripts/{name}", *words], cwd=checkout.root, **cluster)
    assert asked(cluster) == ["48"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("accelerate.slurm", "usage: sbatch scripts/accelerate.slurm RECIPE CONFIG LAUNCH"),
        ("accelerate.slurm tiny gpu", "usage:"),
        ("torchrun.slurm tiny", "usage: sbatch scripts/torchrun.slurm RECIPE CONFIG"),
        ("accelerate.slurm tinny gpu ddp", "error: there is no recipe called tinny"),
        ("accelerate.slurm errors gpu ddp", "error: there is no recipe called errors"),
        ("accelerate.slurm tiny gpuu ddp", "error: there is no config configs/demo/tiny/gpuu.yaml"),
        ("accelerate.slurm tiny gpu dpp", "error: there is no launcher dpp"),
        ("accelerate.slurm tiny gpu single", "error: there is no launcher single for several machines"),
        ("ssh_hosts.sh hosts tiny gpu", "usage: scripts/ssh_hosts.sh HOSTFILE RECIPE CONFIG LAUNCH"),
        ("ssh_hosts.sh none tiny gpu ddp", "error: there is no host file"),
        ("ssh_hosts.sh hosts tinny gpu ddp", "error: there is no recipe called tinny"),
        ("ssh_hosts.sh bad tiny gpu ddp", "`node1 slots=x` is not `name slots=N`"),
        ("ssh_hosts.sh unequal tiny gpu ddp", "all machines need the same number of slots"),
        ("ssh_hosts.sh empty tiny gpu ddp", "names no machine"),
    ],
)
def test_bad_arguments(checkout: Checkout, cluster: dict[str, str], execute: Execute, line: str, said: str) -> None:
    """Exit code 2 and one line, before any machine is asked for anything."""
    for name, text in (("hosts", "node1 slots=4\n"), ("bad", "node1 slots=x\n"), ("empty", "# none\n\n")):
        (checkout.root / name).write_text(text)
    (checkout.root / "unequal").write_text("node1 slots=4\nnode2 slots=8\n")
    script, *words = line.split()
    done = execute(["bash", f"scripts/{script}", *words], cwd=checkout.root, **cluster)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert asked(cluster) == []


def test_outside_of_slurm(checkout: Checkout, cluster: dict[str, str], execute: Execute) -> None:
    del cluster["SLURM_SUBMIT_DIR"]
    done = execute(["bash", "scripts/accelerate.slurm", "tiny", "gpu", "ddp"], cwd=checkout.root, **cluster)
    assert done.returncode != 0
    assert "submit this with sbatch" in done.stderr


def test_ssh_hosts(checkout: Checkout, cluster: dict[str, str], execute: Execute, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two machines\nnode1 slots=4\n\nnode2 slots=4\n")
    words = [tmp_path / "hosts", "tiny", "gpu", "zero3", "--a.b", "two words"]
    done = execute(["bash", checkout.root / "scripts/ssh_hosts.sh", *words], cwd=tmp_path, **cluster)
    assert done.returncode == 0, done.stderr
    log = Path(cluster["FAKE_LOG"]).read_text()
    for rank, host in enumerate(("node1", "node2")):
        command = re.search(rf"^{host} echo .*?--machine_rank {rank} .*$", log, re.MULTILINE | re.DOTALL)
        assert command, log
        text = command.group().partition("exec ")[2].partition("\n")[0]
        assert shlex.split(text) == [
            *(".venv/bin/python", "-m", "accelerate.commands.launch"),
            *("--config_file", "configs/accelerate/zero3.yaml", "--num_machines", "2", "--num_processes", "8"),
            *("--main_process_ip", "node1", "--main_process_port", "29500", "--machine_rank", str(rank)),
            *("recipes/demo/tiny.py", "--config", "configs/demo/tiny/gpu.yaml", "--a.b", "two words"),
        ]
        assert f"cd '{checkout.root}'" in command.group()


# The same files, really run: both machines are this one, with one CPU process each


@pytest.mark.slow
@pytest.mark.parametrize("line", ["accelerate.slurm tiny gpu ddp", "torchrun.slurm tiny gpu"])
def test_two_nodes_form_one_group(checkout: Checkout, cluster: dict[str, str], execute: Execute, line: str) -> None:
    script, *words = line.split()
    job = str(os.getpid())  # the port comes from it
    cluster |= {"FAKE_DRY": "", "FAKE_HEAD": "127.0.0.1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": job}
    done = execute(
        ["bash", f"scripts/{script}", *words, "--a.b", "two words"],
        cwd=checkout.root,
        **{**cluster, "SLURM_CPUS_PER_TASK": "1", "PYTHONPATH": str(checkout.root)},
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: total 3, threads 1" in done.stdout
    assert "process 1 of 2: total 3, threads 1" in done.stdout
    assert done.stdout.count("'--a.b', 'two words'") == 2


@pytest.fixture
def two_hosts(checkout: Checkout, cluster: dict[str, str], clean_environment: dict[str, str]) -> dict[str, str]:
    """The environment for ssh_hosts.sh on two names of this machine, in the file `hosts`."""
    (checkout.root / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    port = str(20000 + os.getpid() % 20000)
    return {**clean_environment, **cluster, "FAKE_DRY": "", "MASTER_PORT": port, "PYTHONPATH": str(checkout.root)}


@pytest.mark.slow
def test_two_hosts_form_one_group(checkout: Checkout, two_hosts: dict[str, str], execute: Execute) -> None:
    done = execute(["bash", "scripts/ssh_hosts.sh", "hosts", "tiny", "gpu", "ddp"], cwd=checkout.root, **two_hosts)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: total 3" in done.stdout
    assert "process 1 of 2: total 3" in done.stdout


@pytest.mark.slow
def test_ctrl_c_stops_all_hosts_and_waits_for_them(checkout: Checkout, two_hosts: dict[str, str]) -> None:
    (checkout.root / "recipes/demo/tiny.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(1)\n"
        "    open(f'saved-{os.environ[\"RANK\"]}', 'w')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(f'ready-{os.environ[\"RANK\"]}', 'w')\n"
        "time.sleep(60)\n"
    )
    line = ["bash", "scripts/ssh_hosts.sh", "hosts", "tiny", "gpu", "ddp"]
    # Its own process group, which gets the signal as a terminal's would.
    # A test run in the background inherits an ignored SIGINT, and bash cannot trap a signal that was ignored when it started.
    process = subprocess.Popen(
        line,
        cwd=checkout.root,
        env=two_hosts,
        stderr=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while len(list(checkout.root.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert len(list(checkout.root.glob("saved-*"))) == 2


@pytest.mark.slow
def test_a_host_that_fails_stops_the_others(checkout: Checkout, two_hosts: dict[str, str], execute: Execute) -> None:
    script = checkout.root / "recipes/demo/tiny.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(3)\ntime.sleep(100)\n")
    begun = time.monotonic()
    done = execute(["bash", "scripts/ssh_hosts.sh", "hosts", "tiny", "gpu", "ddp"], cwd=checkout.root, **two_hosts)
    assert done.returncode not in (0, 130)
    assert time.monotonic() - begun < 60
