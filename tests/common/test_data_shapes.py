"""Rows without column names, parallel text line by line, and a column that names the split: through the data door."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes.common.data import load_data
from recipes.common.downstream import Downstream, load_rows
from recipes.common.errors import UserError
from recipes.common.sections import Data


def problems(kind: Any, **section: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_data(Data(**section), kind)
    return "\n".join(caught.value.problems)


# ---------------------------------------------------------------------------------------------- rows that are lists


@pytest.fixture
def lists(tmp_path: Path) -> str:
    """CLINC150's shape: split -> [[text, label], ...]."""
    path = tmp_path / "intents.json"
    rows = {
        "oos_val": [["who won", "oos"]],
        "val": [[f"held {i}", "ab"[i % 2]] for i in range(4)],
        "train": [[f"say {i}", "ab"[i // 30]] for i in range(60)],
        "test": [[f"test {i}", "ab"[i % 2]] for i in range(6)],
    }
    path.write_text(json.dumps(rows))
    return str(path)


def test_the_places_of_a_list_are_its_columns(lists: str) -> None:
    found = load_data(Data(name=lists, columns={"text": "0", "label": "1"}), "classification")
    assert {name: len(split) for name, split in found.items()} == {"train": 60, "validation": 4, "test": 6}
    assert found["train"][0] == {"text": "say 0", "text_pair": None, "label": "a"}
    assert load_data(Data(name=lists, columns={"text": "0"}), "text")["validation"]["text"][0] == "held 0"
    swapped = load_data(Data(name=lists, columns={"text": "1", "label": "0"}), "classification")
    assert swapped["train"][0]["label"] == "say 0"


def test_lists_in_json_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps([f"word {i}", f"Wort {i}"]) + "\n" for i in range(40)))
    found = load_data(Data(name=str(path), columns={"source": "0", "target": "1"}), "pair")
    assert {"source": "word 7", "target": "Wort 7"} in [*found["train"], *found["validation"]]


def test_lists_whose_columns_nobody_named_are_refused(lists: str) -> None:
    said = problems("classification", name=lists)
    assert "Columns: 0, 1" in said and "data.columns: {text: THEIRS, label: THEIRS}" in said
    assert "maps label to '2', which is not there" in problems(
        "classification", name=lists, columns={"text": "0", "label": "2"}
    )


@pytest.mark.parametrize("each", [1, 10, 30, 50])
def test_labels_per_class_is_exact(lists: str, each: int) -> None:
    settings = Downstream(
        data=lists, columns={"text": "0", "label": "1"}, validation_split="test", labels=1, labels_per_class=each
    )
    rows, held_out = load_rows(settings, "classification", "downstream")
    assert Counter(row["label"] for row in rows) == {"a": min(each, 30), "b": min(each, 30)}  # 30 is all there is
    assert rows[0]["text"] == "say 0" and len(held_out) == 6 and held_out[0]["text"].startswith("test")


def test_ten_labels_of_each_of_clinc150s_classes(shared_data: Path) -> None:
    settings = Downstream(
        data=str(shared_data / "clinc150/data_full.json"), columns={"text": "0", "label": "1"},
        validation_split="test", labels_per_class=10, eval_rows=4500,
    )  # fmt: skip
    rows, held_out = load_rows(settings, "classification", "downstream")
    assert set(Counter(row["label"] for row in rows).values()) == {10} and len(rows) == 1500
    assert set(Counter(row["label"] for row in held_out).values()) == {30} and len(held_out) == 4500
    assert not {row["text"] for row in rows} & {row["text"] for row in held_out}


def test_labels_per_class_of_pairs_is_refused(lists: str) -> None:
    with pytest.raises(UserError, match=r"^generation\.labels_per_class: 3, but rows of kind 'pair' have no class"):
        load_rows(Downstream(data=lists, labels_per_class=3), "pair", "generation")


# ---------------------------------------------------------------------------------------------- parallel text


@pytest.fixture
def parallel(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 2), ("test_2016", 3)):
        (tmp_path / f"{split}.en.gz").write_bytes(
            gzip.compress("".join(f"{split} {i}\n" for i in range(count)).encode())
        )
        (tmp_path / f"{split}.de.gz").write_bytes(
            gzip.compress("\n".join(f"{split}-{i}" for i in range(count)).encode())
        )
    (tmp_path / "README.md").write_text("no data")
    return tmp_path


def test_line_by_line_with_a_column_a_language(parallel: Path) -> None:
    columns = {"source": "en", "target": "de"}
    found = load_data(Data(name=str(parallel), columns=columns), "pair")
    assert found["train"].to_list() == [{"source": f"train {i}", "target": f"train-{i}"} for i in range(6)]
    assert len(found["validation"]) == 2
    other = load_data(Data(name=str(parallel), columns=columns, validation_split="test_2016"), "pair")
    assert other["validation"][2] == {"source": "test_2016 2", "target": "test_2016-2"}


def test_as_text_a_line_stands_beside_its_translation(parallel: Path) -> None:
    assert load_data(Data(name=str(parallel)), "text")["train"]["text"][:4] == [
        "train-0",
        "train 0",
        "train-1",
        "train 1",
    ]
    german = load_data(Data(name=str(parallel), columns={"text": "de"}), "text")
    assert german["train"]["text"] == [f"train-{i}" for i in range(6)]


def test_parallel_text_that_does_not_fit_is_refused(parallel: Path) -> None:
    columns = {"source": "en", "target": "de"}
    assert "maps target to 'fr'" in problems("pair", name=str(parallel), columns={"source": "en", "target": "fr"})
    (parallel / "train.de.gz").write_bytes(gzip.compress(b"one\n"))
    assert "1 line of de, 6 lines of en" in problems("pair", name=str(parallel), columns=columns)
    (parallel / "train.de.gz").unlink()
    assert "parallel text in de, en lacks train.de" in problems("pair", name=str(parallel), columns=columns)


# ---------------------------------------------------------------------------------------------- a column for the split


@pytest.fixture
def scored(tmp_path: Path) -> str:
    path = tmp_path / "pairs.tsv.gz"
    lines = ["split\tscore\tsentence1\tsentence2"]
    lines += [f'{split}\t{i}.0\tA "{split}" {i}\tB {i}' for split in ("train", "dev", "test") for i in range(4)]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return str(path)


COLUMNS = {"text": "sentence1", "text_pair": "sentence2", "label": "score", "split": "split"}


def test_a_column_of_splits_that_nobody_asked_for_is_told_of(scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_data(Data(name=scored, columns={"label": "score"}), "scored_pair")
    assert "its column `split` names dev, test, train, and all its rows are taken for train" in capsys.readouterr().out


def test_a_column_says_which_split_a_row_is_of(scored: str) -> None:
    found = load_data(Data(name=scored, columns=COLUMNS), "classification")
    for ours, theirs in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert (
            found[ours][1] == {"text": f'A "{theirs}" 1', "text_pair": "B 1", "label": "1.0"} and len(found[ours]) == 4
        )
    tested = load_data(Data(name=scored, columns=COLUMNS, validation_split="test"), "classification")
    assert set(tested) == {"train", "validation"} and tested["validation"][0]["text"] == 'A "test" 0'


def test_a_split_column_that_is_not_there_or_blank_is_refused(scored: str, tmp_path: Path) -> None:
    said = problems("classification", name=scored, columns={**COLUMNS, "split": "part"})
    assert "split is mapped to 'part', and row 2" in said and "split, score, sentence1, sentence2" in said
    path = tmp_path / "blank.tsv"
    path.write_text("split\tlabel\ttext\ntrain\tx\ta\n\ty\tb\n")
    assert "row 3" in problems("classification", name=str(path), columns={"split": "split"})
    path.write_text("split\tlabel\ttext\ntrain\tx\ta\ntrain\ty\tb\ttoo much\n")
    assert "4 fields where the header has 3" in problems("classification", name=str(path), columns={"split": "split"})
