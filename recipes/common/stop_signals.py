"""Being asked to stop: SIGINT, SIGTERM and a time limit, with one answer for all processes."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from recipes.common import machine
from recipes.common.run_folder import RunFolder


def on_any_process(happened: bool) -> bool:
    """Whether it happened on one of the processes at least; all get the same answer, so all must ask."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return happened
    import torch
    import torch.distributed as dist

    flag = torch.tensor([happened], dtype=torch.int32, device="cuda" if machine.has_gpu() else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


class StopSignals:
    """While entered, SIGINT and SIGTERM (and a time limit) ask for a stop at the next step; a second SIGINT stops at once.

    At the last step too: what comes after the training may take longer than it.

    The limit counts from when the `run` was started, not from here: a scheduler's does, and a run may have several stages.
    """

    def __init__(self, run: RunFolder | None = None, time_limit_minutes: float | None = None):
        self.reason: str | None = None
        self._deadline = run.started + 60 * time_limit_minutes if run and time_limit_minutes else None
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        import threading

        if threading.current_thread() is threading.main_thread():  # Python takes handlers in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop now; with several processes all get the same answer (a scheduler may signal only one of them)."""
        if self._deadline is not None and time.perf_counter() > self._deadline and self.reason is None:
            self.reason = "run.time_limit_minutes"
        # a signal that arrives while they agree is this process's alone until they ask again
        stop = on_any_process(self.reason is not None)
        if stop and self.reason is None:
            self.reason = "another process was asked to stop"
        return stop
