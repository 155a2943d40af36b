"""Signals and a time limit ask for a stop; what the training makes of it is in test_training.py."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.common import stop_signals
from recipes.common.stop_signals import StopSignals


def test_a_signal_while_the_processes_agree_waits_until_they_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stopped alone would leave the others waiting for it."""
    with StopSignals() as stop:
        monkeypatch.setattr(stop_signals, "on_any_process", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert not stop.asked() and stop.reason == "SIGTERM"
        monkeypatch.setattr(stop_signals, "on_any_process", lambda happened: happened)
        assert stop.asked()


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() and stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_a_time_limit_counts_from_the_start_of_the_run_not_of_its_stage() -> None:
    run: Any = SimpleNamespace(started=time.perf_counter() - 120)
    assert StopSignals(run, time_limit_minutes=1).asked()
    assert not StopSignals(run, time_limit_minutes=3).asked()
