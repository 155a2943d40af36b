"""The benchmark's arithmetic: turns, ratios, the stored file. The long measurements are not run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import bench

pytestmark = pytest.mark.slow


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str, seconds: float) -> list[float]:
        order.append(name)
        return [seconds]

    found = bench.interleave({"a": lambda: contestant("a", 1.0), "ours": lambda: contestant("ours", 2.0)}, 2)
    assert order == ["a", "ours", "a", "ours"]
    assert found == {"a": [1.0, 1.0], "ours": [2.0, 2.0]}


def test_ratio_above_one_is_better_in_either_unit() -> None:
    assert bench.compare({"a": 2.0, "ours": 6.0}) == {"a": 3.0}
    assert bench.compare({"a": 6.0, "ours": 2.0}, higher_is_better=False) == {"a": 3.0}


def test_result_is_stored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(
        bench.ROWS, "help", lambda steps, rounds: bench.result("help", "seconds", {"a": 6.0, "ours": 2.0}, False)
    )
    assert bench.main(["help", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "help.json").read_text())
    assert stored["ours_is_better_by"] == {"a": 3.0}
    assert stored["machine"]["cores"] >= 1
    assert "| help | a | 6.00 | seconds | 3.00 x |" in capsys.readouterr().out


def test_a_skipped_row_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench, "ALPACA", tmp_path / "absent.json")
    assert bench.main(["sft", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "skipped" in capsys.readouterr().err


def test_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["lama", "--output", str(tmp_path)])
    assert stopped.value.code == 2
