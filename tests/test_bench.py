"""The benchmark's arithmetic: turns, ratios, the stored file. The long measurements are not run here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import bench

pytestmark = pytest.mark.slow


def test_contestants_take_turns_in_both_orders() -> None:
    order: list[str] = []

    def contestant(name: str, figure: float) -> float:
        order.append(name)
        return figure

    found = bench.interleave({"a": lambda: contestant("a", 1.0), "ours": lambda: contestant("ours", 2.0)}, 2)
    assert order == ["a", "ours", "ours", "a"]
    assert found == {"a": [1.0, 1.0], "ours": [2.0, 2.0]}


def test_ratio_above_one_is_better_in_either_unit() -> None:
    assert bench.compare({"a": [2.0], "ours": [6.0]}) == {"a": {"median": 3.0, "min": 3.0, "max": 3.0}}
    assert bench.compare({"a": [6.0], "ours": [2.0]}, higher_is_better=False)["a"]["median"] == 3.0


def test_ratio_is_taken_within_a_round() -> None:
    """A machine that gets 10 times slower after the first round changes no ratio."""
    found = bench.compare({"a": [100.0, 10.0, 10.0], "ours": [200.0, 20.0, 30.0]})
    assert found == {"a": {"median": 2.0, "min": 2.0, "max": 3.0}}


def measured(steps: int, rounds: int) -> dict[str, object]:
    return bench.result("help", "--help", "seconds", {"a": [6.0] * rounds, "ours": [2.0] * rounds}, False)


def test_result_is_stored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(bench.ROWS, "help", measured)
    assert bench.main(["help", "--rounds", "2", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "help.json").read_text())
    assert stored["ours_is_better_by"]["a"]["median"] == 3.0
    assert stored["rounds"] == {"a": [6.0, 6.0], "ours": [2.0, 2.0]}
    assert stored["machine"]["cores"] >= 1
    assert {"processor", "versions"} <= set(stored["machine"])
    assert stored["measured_at"].startswith("20")
    assert "| help | a | 6.00 | seconds | 3.00 x (3.00 to 3.00) |" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("no such option"), bench.Failed("no such option")])
def test_a_failing_row_keeps_the_others_and_makes_the_exit_code_1(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def broken(steps: int, rounds: int) -> dict[str, object]:
        raise error

    monkeypatch.setitem(bench.ROWS, "llama", broken)
    monkeypatch.setitem(bench.ROWS, "help", measured)
    assert bench.main(["llama", "help", "--output", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["help.json"]
    told = capsys.readouterr()
    assert "| help | ours |" in told.out
    assert "no such option" in told.err
    assert "not measured, see above: llama" in told.err


def test_seconds_until_a_line_stops_the_process() -> None:
    program = "import time; print('before'); print('step 1/3', flush=True); time.sleep(600)"
    assert bench._seconds_until([sys.executable, "-c", program], r"^step 1/", bench._environment()) < 300


def test_a_process_that_ends_before_its_first_step_is_a_failure_with_what_it_said() -> None:
    with pytest.raises(bench.Failed, match="no such model"):
        bench._seconds_until([sys.executable, "-c", "print('no such model')"], r"^step 1/", bench._environment())
    with pytest.raises(bench.Failed, match="ended with 3"):
        bench._call([sys.executable, "-c", "raise SystemExit(3)"], bench._environment())


def test_a_skipped_row_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench, "ALPACA", tmp_path / "absent.json")
    assert bench.main(["sft", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "skipped" in capsys.readouterr().err


def test_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["lama", "--output", str(tmp_path)])
    assert stopped.value.code == 2
