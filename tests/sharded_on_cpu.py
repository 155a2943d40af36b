"""What stands in for GPUs where FSDP and DeepSpeed are tested: processes of this machine's processor, joined by gloo.

    python tests/sharded_on_cpu.py LAUNCH PROCESSES recipes/<chapter>/<recipe>.py --config ... --section.key value

`make <recipe> LAUNCH=zero3` refuses a machine without a GPU, since accelerate would quietly train without sharding there.
Here accelerate is told otherwise, in float32: parameters, gradients and optimizer state are cut and gathered as on a cluster.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HERE = "RECIPES_SHARDED_ON_CPU"


def environment(launch: str, processes: int) -> dict[str, str]:
    """What `make <recipe> LAUNCH=<launch>` would put into the environment of a worker on a machine with GPUs."""
    import torch
    from accelerate.commands import launch as commands
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    from recipes.common.launch import command

    line, ours = command(Path("x.py"), Path("x.yaml"), launch, processes, gpus=processes, cores=processes)
    args = commands.launch_command_parser().parse_args(line[3:])
    args.deepspeed_fields_from_accelerate_config = ""
    has_gpu, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        args, _, _ = commands._validate_launch_command(args)
    finally:
        torch.cuda.is_available = has_gpu
    theirs = prepare_deepspeed_cmd_env(args)[1] if launch.startswith("zero") else prepare_multi_gpu_env(args)
    new = {key: value for key, value in theirs.items() if os.environ.get(key) != value}
    return new | ours | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def work(script: str, arguments: list[str]) -> None:
    """A worker: the recipe, on a machine that says it has GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from recipes.common import launch, training

    launch.gpu_count = lambda: 8
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    plain = training.training_defaults

    def with_gpus(*args: Any, **kwargs: Any) -> dict[str, tuple[Any, str]]:
        return {
            **plain(*args, **kwargs),
            "use_cpu": (False, "machine: has a GPU"),
            "bf16": (False, "no GPU has it here"),
        }

    training.training_defaults = with_gpus
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # Not its own all-reduce in shared memory: it is compiled at the first use, and a process that was killed meanwhile
        # leaves a lock on which every later one waits for ever.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if os.environ.get(HERE):
        work(sys.argv[1], sys.argv[2:])
    else:
        kind, count, *rest = sys.argv[1:]
        os.environ |= environment(kind, int(count)) | {HERE: "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        os.execv(sys.executable, [sys.executable, *torchrun, __file__, *rest])
