"""The data door on files of every kind, good and bad, and on the real sets beside the checkout."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.common import data as door
from recipes.common.builtin import BUILTINS
from recipes.common.data import load_data, tables
from recipes.common.errors import UserError
from recipes.common.sections import Data


def qa(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def questions(rows: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def problems(*args: Any, **section: Any) -> list[str]:
    """What load_data says is wrong."""
    kind: Any = args[0] if args else "conversation"
    with pytest.raises(UserError) as caught:
        load_data(Data(**section), kind)
    return caught.value.problems


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> str:
    """A builtin set of conversations with a column of its own."""

    def load(split: str, seed: int) -> list[dict[str, Any]]:
        first = {"train": 0, "validation": 100, "test": 200}[split] + 1000 * seed
        return [
            {
                "messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": str(-i)}],
                "task": "negate",
            }
            for i in range(first, first + (20 if split == "train" else 5))
        ]

    monkeypatch.setitem(BUILTINS, "stub", SimpleNamespace(kind="conversation", load=load))
    return "stub"


# --- file formats ---------------------------------------------------------------------------------


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows))


def write_json_data(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps({"data": rows}, indent=1))


def write_csv(path: Path, rows: list[Any], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


FORMATS = {
    "rows.jsonl": write_jsonl,
    "rows.ndjson": write_jsonl,
    "lines.json": write_jsonl,
    "list.json": write_json,
    "data.json": write_json_data,
    "rows.csv": write_csv,
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gz", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, name, gz):
    rows = qa(40)
    rows[3]["answer"] = 'six, "exactly"；六'
    file = tmp_path / name
    FORMATS[name](file, rows)
    if gz:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file = tmp_path / f"{name}.gz"
    if name.endswith(".tsv"):  # no quoting there
        file.write_bytes(gzip.compress(_tsv(rows)) if gz else _tsv(rows))
    found = load_data(Data(name=str(file), validation_fraction=0.25), "conversation")
    assert found["train"].column_names == ["messages"]
    assert len(found["train"]) == 30 and len(found["validation"]) == 10
    pairs = {tuple(m["content"] for m in row["messages"]) for split in found.values() for row in split}
    assert pairs == {(row["question"], row["answer"]) for row in rows}


def _tsv(rows: list[Any]) -> bytes:
    return "".join("\t".join(line) + "\n" for line in [rows[0].keys(), *(row.values() for row in rows)]).encode()


def test_csv_with_line_breaks_inside_a_field_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes('﻿question,answer\n"a\nb",1\n\nc,2\n'.encode())
    found = load_data(Data(name=str(file), validation_fraction=0.5), "conversation")
    assert sorted(questions(found["train"]) + questions(found["validation"])) == ["a\nb", "c"]


def test_json_with_splits(tmp_path):
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"train": qa(5), "val": qa(2, 10), "test": qa(3, 20)}))
    found = load_data(Data(name=str(file)), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "validation": 2, "test": 3}


def test_squad_json(tmp_path):
    paragraph = {
        "context": "It is red.",
        "qas": [{"id": i, "question": f"{i}?", "answers": [{"text": "red"}]} for i in "ab"],
    }
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [paragraph]}]}))
    found = load_data(Data(name=str(file)), "conversation")
    assert sorted(questions([*found["train"], *found["validation"]])) == ["a?\nIt is red.", "b?\nIt is red."]


# --- text -----------------------------------------------------------------------------------------


def test_one_text_file_is_cut_near_its_end_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    file = tmp_path / "a.txt"
    file.write_text(text)
    found = load_data(Data(name=str(file), validation_fraction=0.1), "text")
    head, tail = found["train"]["text"][0], found["validation"]["text"][0]
    assert head + tail == text and tail.startswith("line ") and head.endswith("\n")
    assert abs(len(tail) / len(text) - 0.1) < 0.002


@pytest.mark.parametrize("text", ["x" * 1000, "one line\n" + "y" * 1000, "a\n" * 10])
def test_cut_leaves_both_sides_whatever_the_lines(text):
    head, tail = door.cut_document(text, 0.2)
    assert head + tail == text and head and tail


def test_cut_of_next_to_nothing_is_refused():
    with pytest.raises(UserError, match="nothing on one side"):
        door.cut_document("ab", 0.01)


def test_folder_of_texts_is_one_document_a_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.md").write_text(f"document {i}\n\nsecond paragraph")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.md").write_text("not data")
    found = load_data(Data(name=str(tmp_path), validation_fraction=0.2), "text")
    assert len(found["train"]) == 16 and len(found["validation"]) == 4
    assert all(row["text"].endswith("paragraph") for row in found["train"])


def test_blank_texts_are_left_out_and_counted(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["one", "", "two", " \n", "three"]])
    found = load_data(Data(name=file), "text")
    assert len(found["train"]) + len(found["validation"]) == 3
    assert "left out 2 of 5 rows whose text is blank" in capsys.readouterr().out


# --- folders and splits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], {"train": 10, "validation": 10, "test": 10}),
        (["train.jsonl", "dev.jsonl"], {"train": 10, "validation": 10}),
        (["train.jsonl", "valid.jsonl"], {"train": 10, "validation": 10}),
        (["train.jsonl", "test.jsonl"], {"train": 10, "validation": 10}),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl"], {"train": 20, "validation": 10}),
        (["train/a.jsonl", "train/b.jsonl", "val/a.jsonl"], {"train": 20, "validation": 10}),
        (["a.jsonl", "b.jsonl"], {"train": 19, "validation": 1}),
        (["all.jsonl", "test.jsonl.gz"], {"train": 10, "validation": 10}),
        (["train.jsonl", "extra.jsonl"], {"train": 9, "validation": 1}),
    ],
)
def test_folder(tmp_path, names, expected, capsys):
    for i, name in enumerate(names):
        write_jsonl(tmp_path / name, qa(10, 100 * i))
    found = load_data(Data(name=str(tmp_path)), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == expected
    if "extra.jsonl" in names:
        assert "left out" in (out := capsys.readouterr().out) and "extra.jsonl" in out


def test_folder_of_save_to_disk(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(qa(8))}).save_to_disk(str(tmp_path / "saved"))
    found = load_data(Data(name=str(tmp_path / "saved"), validation_fraction=0.25), "conversation")
    assert (len(found["train"]), len(found["validation"])) == (6, 2)


def test_a_split_can_be_chosen(tmp_path):
    for i, name in enumerate(["train", "validation", "test"]):
        write_jsonl(tmp_path / f"{name}.jsonl", qa(3 + i, 100 * i))
    found = load_data(Data(name=str(tmp_path), split="validation", validation_split="test"), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "validation": 5}


def test_held_out_rows_depend_on_seed_and_content_alone(tmp_path):
    rows = qa(200)
    a = write_jsonl(tmp_path / "a.jsonl", rows)
    b = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    first, again, backwards, other = (
        set(questions(load_data(Data(name=name, seed=seed), "conversation")["validation"]))
        for name, seed in ((a, 0), (a, 0), (b, 0), (a, 1))
    )
    assert len(first) == 10
    assert first == again == backwards
    assert first != other


def test_equal_rows_never_stand_on_both_sides(tmp_path):
    rows = qa(50) * 4
    found = load_data(Data(name=write_jsonl(tmp_path / "a.jsonl", rows), validation_fraction=0.3), "conversation")
    train, held_out = questions(found["train"]), questions(found["validation"])
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 200 and len(held_out) == 60


def test_training_rows_that_are_in_a_held_out_split_are_left_out(tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", qa(10))
    write_jsonl(tmp_path / "validation.jsonl", qa(5, 8))
    write_jsonl(tmp_path / "test.jsonl", qa(1, 0))
    found = load_data(Data(name=str(tmp_path)), "conversation")
    assert questions(found["train"]) == [row["question"] for row in qa(7, 1)]
    assert "left out 3 training rows that also stand in the held-out rows" in capsys.readouterr().out


def test_limits_keep_the_first(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", qa(10))
    write_jsonl(tmp_path / "dev.jsonl", qa(10, 50))
    found = load_data(Data(name=str(tmp_path), max_samples=3, max_validation_samples=2), "conversation")
    assert questions(found["train"]) == [row["question"] for row in qa(3)]
    assert questions(found["validation"]) == [row["question"] for row in qa(2, 50)]


# --- several sources ------------------------------------------------------------------------------


def test_a_list_is_put_together_and_mixed(tmp_path, stub):
    alpaca = [{"output": str(i), "input": "", "instruction": f"count {i}"} for i in range(40)]
    tool = {
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "tools": '[{"name": "w"}]',
    }
    names = [
        write_jsonl(tmp_path / "a.jsonl", alpaca),
        write_jsonl(tmp_path / "b.jsonl", [tool, *({"messages": _talk(i)} for i in range(19))]),
        stub,
    ]
    found = load_data(Data(name=names, max_samples=30), "conversation")
    again = load_data(Data(name=names, max_samples=30), "conversation")
    assert sorted(found["train"].column_names) == ["messages", "task", "tools"]
    assert len(found["validation"]) == 2 + 1 + 5 and len(found["test"]) == 5
    assert {row["task"] for row in found["train"]} == {None, "negate"}
    assert any(text.startswith("count") for text in questions(found["train"]))  # the first 30 are of all sources
    assert found["train"].to_list() == again["train"].to_list()


def _talk(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]


def test_overlapping_sources_do_not_leak(tmp_path):
    names = [write_jsonl(tmp_path / "a.jsonl", qa(100)), write_jsonl(tmp_path / "b.jsonl", qa(100, 50))]
    found = load_data(Data(name=names, validation_fraction=0.2), "conversation")
    assert not set(questions(found["train"])) & set(questions(found["validation"]))


def test_mistakes_of_all_sources_are_said_at_once(tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"question": "a", "answer": ""}, *qa(3)])
    found = problems(name=[str(tmp_path / "missing.jsonl"), bad, "tusks"])
    assert len(found) == 2 and "missing.jsonl" in found[0] and "tusks" in found[1]
    worse = write_jsonl(tmp_path / "worse.jsonl", [{"question": 1, "answer": "b"}, *qa(3)])
    text = "\n".join(problems(name=[bad, worse]))
    assert "bad.jsonl:1: empty answer" in text and "worse.jsonl:1: question is" in text


# --- kinds ----------------------------------------------------------------------------------------


def test_preference_columns_and_types(tmp_path):
    rows = [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "scores": [1, 3, 2]} for i in range(10)]
    found = load_data(Data(name=write_jsonl(tmp_path / "a.jsonl", rows)), "preference")
    assert found["train"][0] == {
        "prompt": [{"role": "user", "content": found["train"][0]["prompt"][0]["content"]}],
        "completions": ["b", "c", "a"],
        "ranks": [0, 1, 2],
    }


def test_prompt_keeps_other_columns(tmp_path):
    rows = [row | {"level": i / 2 if i else 1, **({"hint": "h"} if i == 9 else {})} for i, row in enumerate(qa(10))]
    found = load_data(Data(name=write_jsonl(tmp_path / "a.jsonl", rows)), "prompt")
    assert sorted(found["train"].column_names) == ["answer", "hint", "level", "prompt"]
    assert found["train"][-1]["hint"] in ("h", None)


def test_prompt_whose_other_columns_mix_types_is_refused(tmp_path):
    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": "high"}]
    (problem,) = problems("prompt", name=write_jsonl(tmp_path / "a.jsonl", rows))
    assert "column 'level' mixes types" in problem


def test_builtin(stub):
    found = load_data(Data(name=stub), "conversation")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 20, "validation": 5, "test": 5}
    assert found["train"][0] == {
        "messages": [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}],
        "task": "negate",
    }
    assert load_data(Data(name=stub, seed=1), "conversation")["train"][0]["messages"][0]["content"] == "1000"
    prompts = load_data(Data(name=stub, max_samples=2), "prompt")["train"]
    assert prompts.to_list()[1] == {"prompt": [{"role": "user", "content": "1"}], "task": "negate"}


def test_builtin_that_holds_another_kind(stub):
    (problem,) = problems("text", name=stub)
    assert "'stub' holds conversations" in problem and "can serve as 'conversation' or 'prompt'" in problem
    assert "needs no map" in problems(name=stub, columns={"prompt": "x"})[0]
    assert "data.subset" in problems(name=stub, subset="x")[0]


# --- bad input ------------------------------------------------------------------------------------

GOOD = json.dumps(qa(1)[0]).encode() + b"\n"
GZ = gzip.compress(GOOD * 2000)
BAD_FILES = {
    # name, bytes, kind, what the message must hold
    "broken JSON": (
        "a.jsonl",
        GOOD + b'{"question": "x", \n' + GOOD,
        "conversation",
        ["a.jsonl:2: broken JSON", "column"],
    ),
    "last line cut": ("a.jsonl", GOOD + GOOD[:-10], "conversation", ["a.jsonl:2: broken JSON"]),
    "not an object": ("a.jsonl", GOOD + b"7\n", "conversation", ["a.jsonl:2: a row must be an object", "a number (7)"]),
    "JSON array as lines": ("a.jsonl", b"[\n" + GOOD + b"]\n", "conversation", ["one JSON array", ".json"]),
    "nested": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "conversation", ["a.jsonl:2", "nested too deeply"]),
    "not UTF-8": ("a.jsonl", GOOD + b'{"question": "\xff"}\n', "conversation", ["a.jsonl:2", "byte 0xff", "offset %d"]),
    "UTF-16": (
        "a.jsonl",
        GOOD.decode().encode("utf-16"),
        "conversation",
        ["looks like UTF-16", "Save the file as UTF-8"],
    ),
    "gzip without .gz": ("a.jsonl", GZ, "conversation", ["looks like gzip"]),
    "surrogate": (
        "a.jsonl",
        GOOD + b'{"question": "\\ud83d", "answer": "b"}\n',
        "conversation",
        ["a.jsonl:2", "\\ud83d"],
    ),
    "wrong columns": (
        "a.jsonl",
        b'{"a": 1}\n{"a": 2}\n',
        "conversation",
        ["a.jsonl:1: no column", "1 more line: lines 2"],
    ),
    "empty answer": (
        "a.jsonl",
        GOOD + b'{"question": "x", "answer": ""}\n',
        "conversation",
        ["a.jsonl:2: empty answer"],
    ),
    "empty": ("a.jsonl", b"", "conversation", ["a.jsonl is empty"]),
    "blank": ("a.jsonl", b"\n\n", "conversation", ["a.jsonl holds no rows"]),
    "one row": ("a.jsonl", GOOD, "conversation", ["a.jsonl: only 1 row", "nothing can be held out"]),
    "equal rows": ("a.jsonl", GOOD * 3, "conversation", ["only 3 rows (all equal)"]),
    "cut gzip": ("a.jsonl.gz", GZ[:-20], "conversation", ["a.jsonl.gz: the gzip file is cut short"]),
    "no gzip": ("a.jsonl.gz", GOOD, "conversation", ["not a gzip file"]),
    "damaged gzip": (
        "a.jsonl.gz",
        GZ[:30] + b"\0\0\0\0" + GZ[34:],
        "conversation",
        ["a.jsonl.gz: not a gzip file, or a damaged"],
    ),
    "empty JSON": ("a.json", b" \n", "conversation", ["a.json is empty"]),
    "broken JSON file": ("a.json", b'[\n{"question": "x"\n', "conversation", ["a.json:3: broken JSON"]),
    "JSON of another shape": ("a.json", b'{"a": {"b": 1}}', "conversation", ["must be a list of rows"]),
    "JSON by columns": ("a.json", b'{"question": ["a"], "answer": ["b"]}', "conversation", ["must be a list of rows"]),
    "JSON number": ("a.json", b"3", "conversation", ["must be a list of rows"]),
    "JSON empty list": ("a.json", b"[]", "conversation", ["a.json holds no rows"]),
    "JSON row": (
        "a.json",
        b'[{"question": "a", "answer": "b"}, 7]',
        "conversation",
        ["a.json:1: row 2", "a number (7)"],
    ),
    "JSON not UTF-8": ("a.json", b'[\n"\xe9"]', "conversation", ["a.json:2: not UTF-8", "offset 3"]),
    "ragged": ("a.csv", b"question,answer\na,b\nc,d,e\n", "conversation", ["a.csv:3: 3 fields where the header has 2"]),
    "short": ("a.csv", b"question,answer\na\nc,d\n", "conversation", ["a.csv:2: 1 field where the header has 2"]),
    "open quote": ("a.csv", b'question,answer\na,b\n"c,d\n', "conversation", ["a.csv:3: broken CSV"]),
    "semicolons": ("a.csv", b"question;answer\na;b\n", "conversation", ["question;answer"]),
    "header twice": ("a.csv", b"question,answer,answer\na,b,c\n", "conversation", ["a.csv:1", "'answer' twice"]),
    "header only": ("a.csv", b"question,answer\n", "conversation", ["a.csv holds no rows"]),
    "CSV not UTF-8": ("a.csv", b"question,answer\na,\xe9\n", "conversation", ["a.csv:2: not UTF-8", "offset 18"]),
    "no Parquet": ("a.parquet", b"hello", "conversation", ["a.parquet: not a Parquet file"]),
    "text not UTF-8": ("a.txt", b"one\ntwo \xff\n", "text", ["a.txt:2: not UTF-8: byte 0xff at offset 8"]),
    "blank text": ("a.txt", b" \n ", "text", ["holds only blank text"]),
    "text asked for turns": ("a.txt", b"hello\n", "conversation", ["a.txt: holds plain text", "no turns"]),
    "unknown ending": ("a.xlsx", b"hello", "text", ["no reader for files called 'a.xlsx'", ".jsonl", ".parquet"]),
    "text is a number": ("a.jsonl", b'{"text": 3}\n{"text": "a"}\n', "text", ["a.jsonl:1: text is a number (3)"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    name, content, kind, fragments = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    text = "\n".join(problems(kind, name=str(tmp_path / name)))
    at = content.find(b"\xff")
    for fragment in fragments:
        assert (fragment % at if "%d" in fragment else fragment) in text, text


def test_bad_parquet_row_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*qa(2), {"question": "x", "answer": None}])
    assert "a.parquet: row 3: answer is null" in problems(name=str(tmp_path / "a.parquet"))[0]


def test_all_mistakes_at_once_up_to_ten_and_a_count(tmp_path):
    rows = [*qa(5), *({"messages": [{"role": f"role{i}", "content": "x"}]} for i in range(14))]
    rows += [{"question": "x", "answer": ""}] * 3
    found = problems(name=write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(found) == 12
    assert all("unknown role 'role" in problem for problem in found[:10])
    assert found[10] == "... and 7 more bad rows"
    assert "17 of 22 rows are bad" in found[11] and "data.on_bad_row: skip" in found[11]


def test_equal_mistakes_are_one_message(tmp_path):
    rows = [*qa(2), *([{"question": "x", "answer": ""}] * 6)]
    found = problems(name=write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(found) == 2 and "(and 5 more lines: lines 4, 5, 6, ...)" in found[0]


def test_mistakes_before_a_file_breaks_off_are_not_lost(tmp_path):
    bad = json.dumps({"question": "x", "answer": ""}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bad + GOOD * 2000)[:-20])
    found = problems(name=str(tmp_path / "a.jsonl.gz"))
    assert "a.jsonl.gz:1: empty answer" in found[0] and "cut short" in found[1]


def test_skip_counts_and_lists(tmp_path, capsys):
    rows = [*qa(20), {"question": "x", "answer": ""}, 3, *qa(1, 50)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = load_data(Data(name=file, on_bad_row="skip"), "conversation")
    assert len(found["train"]) + len(found["validation"]) == 21
    out = capsys.readouterr().out
    assert "skipped 2 of 23 rows" in out and "a.jsonl:21: empty answer" in out and "a.jsonl:22" in out


def test_skip_is_silent_on_other_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    file = write_jsonl(tmp_path / "a.jsonl", [*qa(20), 3])
    load_data(Data(name=file, on_bad_row="skip"), "conversation")
    assert capsys.readouterr().out == ""


def test_skip_refuses_a_source_that_is_bad_throughout(tmp_path):
    found = problems(name=write_jsonl(tmp_path / "a.jsonl", [{"a": 1}] * 5), on_bad_row="skip")
    assert "all 5 rows are bad" in found[-1]


@pytest.mark.parametrize(
    ("section", "fragments"),
    [
        ({"split": "trian"}, ["data.split", "no split 'trian'", "it has train", "did you mean 'train'"]),
        ({"validation_split": "dev"}, ["data.validation_split", "no split 'dev'"]),
        ({"validation_split": "train"}, ["data.validation_split", "is the training split too"]),
        ({"validation_fraction": 0.99}, ["data.validation_fraction", "leaves nothing to train on"]),
        ({"columns": {"promt": "question"}}, ["data.columns", "'promt'", "'prompt'"]),
        ({"columns": {"prompt": "questoin"}}, ["data.columns maps prompt", "did you mean 'question'"]),
        ({"columns": {"system": "sytem"}}, ["data.columns: no row", "'sytem'"]),
        ({"subset": "main"}, ["data.subset", "'main'"]),
    ],
)
def test_bad_section(tmp_path, section, fragments):
    file = write_jsonl(tmp_path / "a.jsonl", qa(10))
    text = "\n".join(problems(**{"name": file, **section}))
    assert all(fragment in text for fragment in fragments), text


def test_bad_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", qa(3))
    assert "is blank" in problems(name=" ")[0]
    assert "the list is empty" in problems(name=[])[0]
    assert "nearest is 'train.jsonl'" in problems(name="tarin.jsonl")[0]
    assert "no 'nowhere'" in problems(name=str(tmp_path / "nowhere" / "a.jsonl"))[0]
    assert "did you mean 'pydocs'" in problems("text", name="pydoc")[0]
    assert "cannot be reached" in problems(name="nobody/nothing")[0]
    for odd in ("x" * 5000, "a\0b", "~nosuchuser/a"):
        assert problems(name=odd)


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({}, ["holds no data file", "it is empty"]),
        ({"a.bin": "x"}, ["holds no data file", ".bin"]),
        ({"state.json": "{}"}, ["damaged folder of save_to_disk"]),
        ({"a.png": "x"}, ["learn from images"]),
        ({"a.jsonl": "{}", "b.csv": "a"}, ["mixes formats", "1 of jsonl", "1 of csv", "a.jsonl"]),
        ({"a.jsonl": ""}, ["a.jsonl is empty"]),
        ({"train.json": '{"x": [{}], "y": [{}]}'}, ["splits of its own (x, y)"]),
    ],
)
def test_bad_folder(tmp_path, files, fragments):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    text = "\n".join(problems(name=str(tmp_path)))
    assert all(fragment in text for fragment in fragments), text


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
        rows = datasets.Dataset.from_list(splits[base])
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


# --- images ---------------------------------------------------------------------------------------


def _image(path: Path, shade: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_image_folder_with_classes(tmp_path, own_cache):
    for i in range(20):
        _image(tmp_path / "set" / ("cat" if i % 2 else "dog") / f"{i}.png", 10 * i)
    found = load_data(Data(name=str(tmp_path / "set"), validation_fraction=0.2), "image")
    assert (len(found["train"]), len(found["validation"])) == (16, 4)
    assert found["train"].features["label"].names == ["cat", "dog"]
    assert found["train"][0]["image"].size == (4, 4)


def test_image_folder_with_captions(tmp_path, own_cache):
    lines = ["file_name,alt"]
    for i in range(4):
        _image(tmp_path / "set" / f"{i}.png", 10 * i)
        lines.append(f"{i}.png,shade {i}")
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = load_data(Data(name=str(tmp_path / "set"), columns={"caption": "alt"}), "image_caption")
    assert found["train"].column_names == ["image", "caption"]
    assert all(row["caption"] == f"shade {row['image'].getpixel((0, 0)) // 10}" for row in found["train"])
    assert "no caption column" in problems("image_caption", name=str(tmp_path / "set"))[0]


GOOD_ROW, BAD_ROW = {"question": "a", "answer": "b"}, {"question": "a", "answer": ""}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([GOOD_ROW, GOOD_ROW, BAD_ROW], "a.json:10: row 3: empty answer"),
        ({"version": {"data": [1, 2]}, "data": [GOOD_ROW, BAD_ROW]}, "a.json:13: row 2: empty answer"),
        ({"dev": [GOOD_ROW], "train": [GOOD_ROW, BAD_ROW]}, "a.json (train):13: row 2: empty answer"),
        ({"train": [GOOD_ROW, GOOD_ROW], "test": [BAD_ROW]}, "a.json (test):13: row 1: empty answer"),
    ],
)
def test_a_bad_row_of_a_json_file_is_named_with_its_line(tmp_path, content, said):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=2))
    assert json.dumps(content, indent=2).split("\n")[int(said.split(":")[1]) - 1].strip() == "{"
    assert said in problems(name=str(tmp_path / "a.json"))[0]


def test_the_nested_rows_of_squad_are_named_by_their_number(tmp_path):
    asked = [{"question": "q", "answers": [{"text": "x"}]}, {"question": "q", "answers": []}]
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": asked}]}]}))
    assert "a.json: row 2: " in problems(name=str(tmp_path / "a.json"))[0]


def test_bad_images_are_named(tmp_path, own_cache):
    _image(tmp_path / "a" / "x.png", 1)
    (tmp_path / "a" / "y.png").write_bytes(b"hello")
    (tmp_path / "a" / "z.png").touch()
    found = problems("image", name=str(tmp_path))
    assert "y.png is not an image" in found[0] and "z.png is empty" in found[1] and "2 of 3 images" in found[2]


def test_bad_images_are_skipped_counted_and_listed(tmp_path, own_cache, capsys):
    for i in range(6):
        _image(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", 10 * i)
    (tmp_path / "set" / "a" / "0.png").write_bytes(b"hello")
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"")
    found = load_data(Data(name=str(tmp_path / "set"), on_bad_row="skip", validation_fraction=0.2), "image")
    shades = [row["image"].getpixel((0, 0)) for split in found.values() for row in split]  # all of them are images
    assert sorted(shades) == [20, 30, 40, 50]
    said = capsys.readouterr().out
    assert "skipped 2 of 6 images (data.on_bad_row: skip)" in said
    assert "0.png is not an image" in said and "1.png is empty" in said


def test_a_folder_of_bad_images_only(tmp_path, own_cache):
    (tmp_path / "x.png").write_bytes(b"hello")
    assert "nothing is left to use" in problems("image", name=str(tmp_path), on_bad_row="skip")[-1]


# --- real data ------------------------------------------------------------------------------------


def test_tinyshakespeare(shared_data):
    found = load_data(Data(name=str(shared_data / "tinyshakespeare.txt")), "text")
    text = (shared_data / "tinyshakespeare.txt").read_text()
    assert found["train"]["text"][0] + found["validation"]["text"][0] == text
    assert abs(len(found["validation"]["text"][0]) / len(text) - 0.05) < 0.001


def test_alpaca(shared_data):
    names = [str(shared_data / f"llama_factory/alpaca_{language}_demo.json") for language in ("en", "zh")]
    found = load_data(Data(name=names), "conversation")
    raw = [row for name in names for row in json.loads(Path(name).read_text())]
    assert len(found["train"]) + len(found["validation"]) == len(raw)
    answers = {row["messages"][-1]["content"] for split in found.values() for row in split}
    assert answers == {row["output"] for row in raw}
    with_input = next(row for row in raw if row["input"])
    asked = {text for split in found.values() for text in questions(split)}
    assert f"{with_input['instruction']}\n{with_input['input']}" in asked


def test_dpo(shared_data):
    found = load_data(Data(name=str(shared_data / "llama_factory/dpo_en_demo.json")), "preference")
    rows = [row for split in found.values() for row in split]
    assert len(rows) == 300
    assert sum(row["prompt"][0]["role"] == "system" for row in rows) == 80
    assert all(row["prompt"][-1]["role"] == "user" and row["ranks"] == [0, 1] for row in rows)


def test_hh_rlhf(shared_data, capsys):
    name = str(shared_data / "hh_rlhf/harmless_base_test.jsonl.gz")
    text = "\n".join(problems("preference", name=name))
    assert ":87: empty answer" in text and ":668: chosen: roles out of order" in text and "13 of 2,312" in text
    found = load_data(Data(name=name, on_bad_row="skip"), "preference")
    assert "skipped 13 of 2,312 rows" in capsys.readouterr().out
    rows = [row for split in found.values() for row in split]
    assert len(rows) == 2299
    assert all("\n\nHuman:" not in m["content"] for row in rows for m in row["prompt"])
    first = next(r for r in rows if r["prompt"][0]["content"] == "what are some pranks with a pen i can do?")
    assert [m["role"] for m in first["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert first["completions"][0].startswith("No, sorry!")
    assert first["completions"][1].startswith("There are lots of funny things")


def test_glaive_tool_calls(shared_data):
    found = load_data(Data(name=str(shared_data / "llama_factory/glaive_toolcall_en_demo.json")), "conversation")
    rows = [row for split in found.values() for row in split]
    assert len(rows) == 300
    called = [row for row in rows if any(m["role"] == "tool" for m in row["messages"])]
    assert len(called) > 100
    for row in called:
        at = next(i for i, m in enumerate(row["messages"]) if m["role"] == "tool")
        call = json.loads(row["messages"][at - 1]["content"])
        assert row["messages"][at - 1]["role"] == "assistant"
        assert call["name"] in {tool["name"] for tool in json.loads(row["tools"])}


def test_xquad(shared_data):
    found = load_data(Data(name=str(shared_data / "xquad/xquad.zh.json")), "conversation")
    assert sum(map(len, found.values())) == 1190
