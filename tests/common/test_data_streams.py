"""The data door on what is too large for memory, on streams, and on the hub."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recipes.common.data import load_data, tables
from recipes.common.errors import UserError
from recipes.common.sections import Data
from tests.common.data_files import problems, qa, questions, write_jsonl

# --- size and streams -----------------------------------------------------------------------------


def test_many_batches_and_a_table_on_the_disk(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    file = write_jsonl(tmp_path / "a.jsonl", qa(100))
    small = load_data(Data(name=file), "conversation")
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    large = load_data(Data(name=file), "conversation")
    assert {k: v.to_list() for k, v in small.items()} == {k: v.to_list() for k, v in large.items()}
    assert list((tmp_path / "cache").iterdir()) == []  # nothing is left behind
    assert len(large["train"].map(lambda row: {"n": len(row["messages"])})) == 95


def test_stream_of_a_file(tmp_path, capsys):
    import datasets

    rows = [*qa(300), {"question": "x", "answer": ""}]
    section = Data(
        name=write_jsonl(tmp_path / "a.jsonl.gz", rows), streaming=True, on_bad_row="skip", validation_fraction=0.2
    )
    found = load_data(section, "conversation")
    assert isinstance(found, datasets.IterableDatasetDict)
    train, held_out = questions(found["train"]), questions(found["validation"])
    assert "skipped 1 of 301 rows" in capsys.readouterr().out
    assert len(train) + len(held_out) == 300 and not set(train) & set(held_out)
    assert 30 < len(held_out) < 90
    assert train == questions(found["train"])  # a second epoch
    assert next(iter(found["train"]))["tools"] is None


def test_stream_resumes_where_it_stopped(tmp_path):
    found = load_data(Data(name=write_jsonl(tmp_path / "a.jsonl", qa(50)), streaming=True), "conversation")["train"]
    whole = questions(found)
    head = iter(found)
    first = [next(head)["messages"][0]["content"] for _ in range(10)]
    state = found.state_dict()
    found.load_state_dict(state)
    assert first + questions(found) == whole


def test_stream_with_splits_limits_and_several_files(tmp_path):
    write_jsonl(tmp_path / "train" / "a.jsonl", qa(10))
    write_jsonl(tmp_path / "train" / "b.jsonl", qa(10, 20))
    write_jsonl(tmp_path / "dev" / "a.jsonl", qa(10, 50))
    section = Data(name=str(tmp_path), streaming=True, max_samples=15, max_validation_samples=4)
    found = load_data(section, "conversation")
    assert questions(found["train"]) == [row["question"] for row in qa(10) + qa(5, 20)]
    assert len(questions(found["validation"])) == 4
    assert load_data(Data(name=str(tmp_path), streaming=True), "conversation")["train"].num_shards == 2


def test_stream_says_bad_rows_where_it_meets_them(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*qa(5), {"question": "x", "answer": ""}])
    found = load_data(Data(name=file, streaming=True), "conversation")
    with pytest.raises(UserError, match=r"a\.jsonl:6: empty answer"):
        list(found["train"])
    first_bad = write_jsonl(tmp_path / "b.jsonl", [{"a": 1}, *qa(5)])
    assert "b.jsonl:1" in problems(name=first_bad, streaming=True)[0]
    none = write_jsonl(tmp_path / "c.jsonl", [{"a": 1}] * 1200)
    assert "the first 1,000 rows are all bad" in problems(name=none, streaming=True, on_bad_row="skip")[-1]


def test_stream_of_what_has_to_be_read_whole(tmp_path, stub):
    (tmp_path / "a.json").write_text(json.dumps(qa(20)))
    found = load_data(Data(name=str(tmp_path / "a.json"), streaming=True), "conversation")
    assert len(questions(found["train"])) == 19
    mixed = [stub, write_jsonl(tmp_path / "b.jsonl", qa(5))]
    assert "stub has to be read whole" in problems(name=mixed, streaming=True)[0]


@pytest.mark.parametrize("kind", ["preference", "prompt", "classification", "pair", "image"])
def test_what_is_chosen_from_is_not_streamed(tmp_path, kind):
    assert "are read whole; leave it out" in problems(kind, name=str(tmp_path), streaming=True)[0]


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub of one data set, "some/set", whose splits a test fills in."""
    import datasets
    import huggingface_hub

    splits: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None = None, *, split: str, streaming: bool = False) -> Any:
        if subset not in (None, "main"):
            raise ValueError(f"BuilderConfig {subset!r} not found. Available: ['main']")
        base, _, part = split.partition("[")
        rows = splits[base]
        rows = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
        rows = rows.select(range(int(part.strip(":]")))) if part else rows
        return rows.to_iterable_dataset(num_shards=2) if streaming else rows

    def split_names(name: str, subset: str | None = None) -> list[str]:
        load_dataset(name, subset, split=next(iter(splits)))
        return list(splits)

    def dataset_info(self: Any, name: str, timeout: float) -> None:
        if name != "some/set":
            from huggingface_hub.errors import RepositoryNotFoundError

            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # it wants an HTTP response to be made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return splits


def test_hub(hub):
    hub |= {"train_sft": qa(10), "test_sft": qa(4, 50), "validation": qa(2, 90)}
    found = load_data(Data(name="some/set", split="train_sft", validation_split="test_sft"), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 10, "validation": 4}
    found = load_data(Data(name="some/set", subset="main", split="train_sft[:6]"), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "validation": 2}


def test_a_class_of_the_hub_is_its_name_and_not_its_number(hub):
    """An answer that is written, or read off a blank, is a word: "Sports", not "1"."""
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["World", "Sports", "Sci/Tech"])
    )
    hub |= {
        split: datasets.Dataset.from_dict(
            {"text": [f"{split} {i}" for i in range(4)], "label": [0, 1, 2, 1]}, features=features
        )
        for split in ("train", "validation")
    }
    found = load_data(Data(name="some/set"), "classification")
    names = ["World", "Sports", "Sci/Tech", "Sports"]
    assert [row["label"] for row in found["train"]] == [row["label"] for row in found["validation"]] == names


def test_a_row_without_a_class_keeps_its_number():
    from recipes.common.data.readers import with_class_names

    assert with_class_names({"label": -1, "text": "x"}, {"label": ["a", "b"]}) == {"label": -1, "text": "x"}


def test_hub_mistakes(hub):
    hub |= {"train_sft": [*qa(3), {"question": "x", "answer": ""}]}
    assert "it has train_sft (did you mean 'train_sft'?)" in problems(name="some/set")[0]
    assert "some/set (train_sft): row 4: empty answer" in problems(name="some/set", split="train_sft")[0]
    wrong = problems(name="some/set", subset="man", split="train_sft")[0]
    assert wrong.startswith("data.subset: 'man' of some/set") and "Available: ['main']" in wrong
    assert "no public data set of that name" in problems(name="other/set")[0]


def test_hub_stream(hub, capsys):
    hub |= {"train": [*qa(200), {"question": "x", "answer": ""}], "validation": qa(7, 500)}
    found = load_data(Data(name="some/set", streaming=True, on_bad_row="skip"), "conversation")
    assert questions(found["train"]) == [row["question"] for row in qa(200)]
    assert len(questions(found["validation"])) == 7
    assert "skipped 1 of" in capsys.readouterr().out
    assert found["train"].num_shards == 2
    with pytest.raises(UserError, match="empty answer"):
        list(load_data(Data(name="some/set", streaming=True), "conversation")["train"])


def test_hub_stream_without_a_held_out_split(hub):
    hub |= {"train": qa(200)}
    assert "data.max_validation_samples" in problems(name="some/set", streaming=True)[0]
    section = Data(name="some/set", streaming=True, max_validation_samples=4, validation_fraction=0.1)
    found = load_data(section, "conversation")
    held_out = questions(found["validation"])
    assert len(held_out) == 4 and not set(held_out) & set(questions(found["train"]))
