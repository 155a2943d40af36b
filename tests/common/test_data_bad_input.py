"""The data door on bad files, rows, names and folders: one clear error each, or skipped and counted."""

from __future__ import annotations

import gzip
import json

import pytest

from recipes.common.data import load_data
from recipes.common.sections import Data
from tests.common.data_files import problems, qa, write_jsonl, write_parquet

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
    "a number without end": (
        "a.jsonl",
        GOOD + b'{"question": ' + b"9" * 5000 + b"}\n",
        "conversation",
        ["a.jsonl:2: broken"],
    ),
    "a number without end in a JSON": ("a.json", b"[" + b"9" * 5000 + b"]", "conversation", ["a.json: broken JSON"]),
    "an answer that is a number": (
        "a.jsonl",
        GOOD + b'{"question": "x", "answers": {"text": [5]}}\n',
        "conversation",
        ["a.jsonl:2: answers.text is a number (5), not text"],
    ),
    "SQuAD with null answers": (
        "a.json",
        b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": null}]}]}]}',
        "conversation",
        ["row 1: answers is null"],
    ),
    "SQuAD with paragraphs of text": ("a.json", b'{"data": [{"paragraphs": ["c"]}]}', "conversation", ["a.json"]),
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
    "the same complaint of two numbers": (
        "a.jsonl",
        b'{"text": 3.5}\n{"text": -4e-7}\n{"text": "a"}\n',
        "text",
        ["a.jsonl:1: text is a number (3.5), not text (and 1 more line: lines 2)"],
    ),
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
        ({"train_test.jsonl": "{}"}, ["train_test.jsonl names several splits (train, test)"]),
        ({"train.jsonl": "{}", "extra.jsonl": "{}"}, ["train.jsonl (train)", "others are not: extra.jsonl"]),
        ({"train.txt": "a", "test.txt": "b", "extra.txt": "c"}, ["train.txt (train)", "others are not: extra.txt"]),
        ({"a.csv": "question;answer\nx;y\n"}, ["a.csv:1: the header is one field", "separated by ';'"]),
    ],
)
def test_bad_folder(tmp_path, files, fragments):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    text = "\n".join(problems(name=str(tmp_path)))
    assert all(fragment in text for fragment in fragments), text


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
