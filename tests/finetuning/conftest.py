"""The tiny chat model, fresh or saved, a run that is not written anywhere, and the arguments that the frame sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import make_model, make_tokenizer

from recipes.common.run_folder import RunFolder


@pytest.fixture
def tokenizer() -> Any:
    """Fresh for each test, since tests change its template."""
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """Fresh for each test."""
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two, saved."""
    folder = tmp_path_factory.mktemp("chat_model")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines: whatever is asked, the answer is "yes"."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"prompt": f"Is it {n}?", "completion": "yes"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Heard(RunFolder):
    """A run that keeps what it says."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), recipe="test", dry=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def run() -> Heard:
    return Heard()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """An SFTConfig with what the frame and the recipes set."""

    def make(**changes: Any) -> Any:
        from trl import SFTConfig

        fixed = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "assistant_only_loss": True,
            "packing": True,
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
        }
        return SFTConfig(**{**fixed, **changes})

    return make


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows that are always answered "yes", and such that are always answered "no"."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for answer in ("yes", "no"):
        made[answer] = folder / f"{answer}.jsonl"
        rows = [{"prompt": f"Was it {n}?", "completion": answer} for n in range(200)]
        made[answer].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made
