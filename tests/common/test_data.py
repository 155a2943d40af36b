"""The data door on files of every kind, good and bad, and on the real sets beside the checkout."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.common import data as door
from recipes.common.data import load_data
from recipes.common.errors import UserError
from recipes.common.sections import Data
from tests.common.data_files import problems, qa, questions, write_jsonl, write_parquet

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
        (
            ["train-00000-of-00001-a09b74b3.jsonl", "test-00000-of-00001-6e925c6d.jsonl"],
            {"train": 10, "validation": 10},
        ),
        (["gsm_train.jsonl", "gsm_test.jsonl.gz"], {"train": 10, "validation": 10}),
        (["train_sft.jsonl", "train_gen.jsonl", "test_sft.jsonl"], {"train": 20, "validation": 10}),
        (["train_sft/0.jsonl", "test_sft/0.jsonl"], {"train": 10, "validation": 10}),
        (["data.jsonl", "gsm_test.jsonl"], {"train": 10, "validation": 10}),
        (["a.jsonl", "b.jsonl"], {"train": 19, "validation": 1}),
        (["contest.jsonl", "latest.jsonl"], {"train": 19, "validation": 1}),
    ],
)
def test_folder(tmp_path, names, expected, capsys):
    for i, name in enumerate(names):
        write_jsonl(tmp_path / name, qa(10, 100 * i))
    found = load_data(Data(name=str(tmp_path)), "conversation")
    words = {word for name in names for word in re.split(r"[\W\d_]+", name)}
    assert {split: len(rows) for split, rows in found.items()} == expected
    assert ("by their names, train: " in capsys.readouterr().out) == bool(words & {"train", "test"})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gsm_train.txt", "gsm_test.txt"], {"train": 1, "validation": 1}),
        (["train/test_utils.txt", "train/b.txt", "test/a.txt"], {"train": 2, "validation": 1}),
        (["test_utils.txt", "utils.txt", "how-to-test.txt"], {"train": 2, "validation": 1}),  # titles
        (["src/a.txt", "utils.txt", "test/a.txt"], {"train": 2, "validation": 1}),  # trees of code
        (["src/train.txt", "utils.txt", "src/a.txt"], {"train": 2, "validation": 1}),
    ],
)
def test_folder_of_documents(tmp_path, names, expected, capsys):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"What {name} holds.")
    found = load_data(Data(name=str(tmp_path)), "text")
    assert {split: len(rows) for split, rows in found.items()} == expected
    assert ("one pile of documents" in capsys.readouterr().out) == ("utils.txt" in names)


def test_parquet_of_datasets_keeps_the_names_of_its_classes(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": [f"text {i}" for i in range(10)], "label": [i % 2 for i in range(10)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = load_data(Data(name=str(tmp_path / "a.parquet")), "classification")
    assert set(found["train"]["label"]) == {"bad", "good"}


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


def test_bad_images_are_named(tmp_path, own_cache):
    from PIL import Image

    _image(tmp_path / "a" / "x.png", 1)
    (tmp_path / "a" / "y.png").write_bytes(b"hello")
    (tmp_path / "a" / "z.png").touch()
    Image.effect_noise((64, 64), 50).save(tmp_path / "a" / "cut.png")
    whole = (tmp_path / "a" / "cut.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is there
    found = problems("image", name=str(tmp_path))
    assert "cut.png is not a whole image: image file is truncated" in found[0]
    assert "y.png is not a whole image" in found[1] and "z.png is empty" in found[2] and "3 of 4 images" in found[3]


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
    assert "0.png is not a whole image" in said and "1.png is empty" in said


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
