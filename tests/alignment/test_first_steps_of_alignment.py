"""Every gpu.yaml and cluster.yaml of alignment takes its first steps, saves and scores, on tiny stand-ins for the hub's.

What a single process on a processor cannot show is left out: vLLM, flash attention, and the launchers, which
tests/pretraining/test_llama.py and others run in two processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from first_steps import configs_of, named, takes_its_first_steps


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins are, and the runs."""
    return tmp_path_factory.mktemp("hub")


@pytest.mark.slow
@pytest.mark.parametrize("config", configs_of("alignment"), ids=named)
def test_it_takes_its_first_steps(run_in_process: Callable[..., Any], hub: Path, config: Path) -> None:
    takes_its_first_steps(run_in_process, hub, config)
