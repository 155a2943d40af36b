"""Every known schema to its canonical row, and every bad row to a text that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recipes.common import formats
from recipes.common.formats import canonical_row
from recipes.common.row_values import BadRow


def turns(*said: str) -> list[dict[str, str]]:
    """turns("u: hello", "a: hi") -> messages"""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[one[0]], "content": one[3:]} for one in said]


def sharegpt(*said: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "human", "a": "gpt", "t": "observation", "f": "function_call"}
    return [{"from": names[one[0]], "value": one[3:]} for one in said]


CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "alpaca": ({"instruction": "Add", "input": "", "output": "3"}, turns("u: Add", "a: 3")),
    "alpaca with input": ({"instruction": "Add", "input": "1 2", "output": "3"}, turns("u: Add\n1 2", "a: 3")),
    "alpaca with all": (
        {"instruction": "c", "input": "", "output": "C", "system": "S", "history": [["a", "A"], ["b", "B"]]},
        turns("s: S", "u: a", "a: A", "u: b", "a: B", "u: c", "a: C"),
    ),
    "alpaca with nulls": (
        {"instruction": "Add", "input": None, "output": "3", "system": None, "history": None},
        turns("u: Add", "a: 3"),
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann", "category": "qa"},
        turns("u: Who?\nAnn wrote it.", "a: Ann"),
    ),
    "input and output": ({"input": "Add", "output": "3"}, turns("u: Add", "a: 3")),
    "an answer that is a whole number": ({"prompt": "Add", "completion": 3, "label": True}, turns("u: Add", "a: 3")),
    "fields that say nothing": (
        {"messages": [*turns("u: hi"), turns("a: hello")[0] | {"weight": 1, "reasoning_content": None}]},
        turns("u: hi", "a: hello"),
    ),
    "sharegpt": ({"conversations": sharegpt("u: hi", "a: hello")}, turns("u: hi", "a: hello")),
    "sharegpt with a system column": (
        {"conversations": sharegpt("u: hi", "a: hello"), "system": "S"},
        turns("s: S", "u: hi", "a: hello"),
    ),
    "sharegpt with a system turn": (
        {"conversations": sharegpt("s: S", "u: hi", "a: hello"), "system": ""},
        turns("s: S", "u: hi", "a: hello"),
    ),
    "sharegpt with an empty system turn": (
        {"conversations": sharegpt("s: ", "u: hi", "a: hello")},
        turns("u: hi", "a: hello"),
    ),
    "sharegpt with tools": (
        {"conversations": sharegpt("u: rain?", 'f: {"name": "w"}', "t: yes", "a: It rains.")},
        turns("u: rain?", 'a: {"name": "w"}', "t: yes", "a: It rains."),
    ),
    "messages": ({"messages": turns("u: hi", "a: hello")}, turns("u: hi", "a: hello")),
    "messages as JSON in a string": ({"messages": json.dumps(turns("u: hi", "a: hello"))}, turns("u: hi", "a: hello")),
    "messages before a prompt column": (
        {"prompt": "hi", "messages": turns("u: hi", "a: hello", "u: bye", "a: bye!")},
        turns("u: hi", "a: hello", "u: bye", "a: bye!"),
    ),
    "messages with content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *turns("a: hello")]},
        turns("u: hi", "a: hello"),
    ),
    "messages with tool calls": (
        {
            "messages": [
                *turns("u: rain?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": '{"at": "Paris"}'}}],
                },
                *turns("t: yes", "a: It rains."),
            ]
        },
        turns("u: rain?", 'a: {"name": "w", "arguments": {"at": "Paris"}}', "t: yes", "a: It rains."),
    ),
    "prompt and completion": ({"prompt": "hi", "completion": "hello"}, turns("u: hi", "a: hello")),
    "prompt and completion as messages": (
        {"prompt": turns("s: S", "u: hi"), "completion": turns("a: hello")},
        turns("s: S", "u: hi", "a: hello"),
    ),
    "question and answer": ({"question": "2+2?", "answer": "4"}, turns("u: 2+2?", "a: 4")),
    "squad": (
        {"context": "It is red.", "question": "Colour?", "answers": {"text": ["red"], "answer_start": [6]}},
        turns("u: Colour?\nIt is red.", "a: red"),
    ),
    "hh prompt": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": "d"},
        turns("u: a", "a: b", "u: c", "a: d"),
    ),
    "best of a pair": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, turns("u: q", "a: good")),
    "best of K": (
        {"prompt": "q", "completions": ["b", "a", "c"], "scores": [1, 2, 0.5]},
        turns("u: q", "a: a"),
    ),
    "Chinese": ({"instruction": "你好", "output": "您好！"}, turns("u: 你好", "a: 您好！")),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversation(case):
    row, messages = CONVERSATIONS[case]
    assert canonical_row(row, "conversation") == {"messages": messages}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_prompt_is_what_precedes_the_last_answer(case):
    row, messages = CONVERSATIONS[case]
    assert canonical_row(row, "prompt")["prompt"] == messages[:-1]


PAIR: dict[str, Any] = {"prompt": turns("u: q"), "completions": ["good", "bad"], "ranks": [0, 1]}
TALK: dict[str, Any] = {"prompt": turns("u: a", "a: b", "u: c"), "completions": ["good", "bad"], "ranks": [0, 1]}
PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strings": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, PAIR),
    "alpaca": ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
    "question": ({"question": "q", "chosen": "good", "rejected": "bad"}, PAIR),
    "system": (
        {"system": "S", "question": "q", "chosen": "good", "rejected": "bad"},
        PAIR | {"prompt": turns("s: S", "u: q")},
    ),
    "prompt as messages": ({"prompt": turns("u: q"), "chosen": turns("a: good"), "rejected": turns("a: bad")}, PAIR),
    "whole conversations": ({"chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad")}, PAIR),
    "whole conversations beside a prompt": (
        {"prompt": "q", "chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad"), "score_chosen": 9.0},
        PAIR,
    ),
    "sharegpt": (
        {
            "conversations": sharegpt("u: a", "a: b", "u: c"),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        TALK,
    ),
    "messages as context": ({"messages": turns("u: q"), "chosen": "good", "rejected": "bad"}, PAIR),
    "hh": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
        },
        TALK,
    ),
    "hh with blank lines inside a turn": (
        {"chosen": "\n\nHuman: x\n\ny\n\nAssistant: good", "rejected": "\n\nHuman: x\n\ny\n\nAssistant: bad"},
        PAIR | {"prompt": turns("u: x\n\ny")},
    ),
    "ranks": (
        {"prompt": "q", "completions": ["b", "a", "c"], "ranks": [2, 1, 3]},
        {"prompt": turns("u: q"), "completions": ["a", "b", "c"], "ranks": [0, 1, 2]},
    ),
    "scores with a tie": (
        {"prompt": "q", "responses": ["b", "a", "c"], "scores": [0.5, 0.9, 0.5]},
        {"prompt": turns("u: q"), "completions": ["a", "b", "c"], "ranks": [0, 1, 1]},
    ),
    "scores in CSV": (
        {"prompt": "q", "completions": '["b", "a"]', "scores": "[1, 2]"},
        {"prompt": turns("u: q"), "completions": ["a", "b"], "ranks": [0, 1]},
    ),
    "completions as turns": (
        {"prompt": "q", "completions": [turns("a: bad")[0], {"from": "gpt", "value": "good"}], "ranks": [1, 0]},
        PAIR,
    ),
    "K-way before an answer column": (
        {"prompt": "q", "completions": ["good", "bad"], "ranks": [0, 1], "answer": "good"},
        PAIR,
    ),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preference(case):
    row, expected = PREFERENCES[case]
    assert canonical_row(row, "preference") == expected


@pytest.mark.parametrize("case", PREFERENCES)
def test_preference_serves_as_conversation_and_prompt(case):
    row, expected = PREFERENCES[case]
    best = {"role": "assistant", "content": expected["completions"][0]}
    assert canonical_row(row, "conversation") == {"messages": [*expected["prompt"], best]}
    assert canonical_row(row, "prompt")["prompt"] == expected["prompt"]


@pytest.mark.parametrize("case", PREFERENCES)
def test_canonical_rows_are_recognised_as_what_they_are(case):
    expected = PREFERENCES[case][1]
    assert canonical_row(expected, "preference") == expected


def test_prompt_without_answer():
    assert canonical_row({"prompt": "q"}, "prompt") == {"prompt": turns("u: q")}
    assert canonical_row({"messages": turns("u: a", "a: b", "u: c")}, "prompt") == {
        "prompt": turns("u: a", "a: b", "u: c")
    }


def test_prompt_keeps_the_other_columns_for_the_reward():
    row = {"question": "2+2?", "answer": "4", "level": 3, "note": None, "system": "S"}
    assert canonical_row(row, "prompt") == {"prompt": turns("s: S", "u: 2+2?"), "answer": "4", "level": 3}
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad", "source": "x"}
    assert canonical_row(pair, "prompt") == {"prompt": turns("u: q"), "source": "x"}


def test_text():
    assert canonical_row({"text": "One.\nTwo.", "url": "x"}, "text") == {"text": "One.\nTwo."}
    assert canonical_row({"content": "x = 1", "path": "a.py"}, "text") == {"text": "x = 1"}


TOOL = {"name": "w", "description": "天气", "parameters": {}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (json.dumps([TOOL]), [TOOL]),
        (json.dumps(TOOL), [TOOL]),
        ([TOOL, TOOL], [TOOL, TOOL]),
        ("", None),
        ("[]", None),
        ([], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("kind", ["conversation", "prompt"])
def test_tools_are_a_json_list_or_absent(value, expected, kind):
    found = canonical_row({"conversations": sharegpt("u: hi", "a: hello"), "tools": value}, kind)
    assert (json.loads(found["tools"]) if "tools" in found else None) == expected


@pytest.mark.parametrize(
    ("row", "columns", "kind", "expected"),
    [
        (
            {"frage": "q", "antwort": "a"},
            {"prompt": "frage", "completion": "antwort"},
            "conversation",
            turns("u: q", "a: a"),
        ),
        ({"q": "q", "answer": "a"}, {"prompt": "q"}, "conversation", turns("u: q", "a: a")),
        # what is mapped goes before what would be recognised
        (
            {"messages": turns("u: x", "a: y"), "question": "q", "answer": "a"},
            {"prompt": "question", "completion": "answer"},
            "conversation",
            turns("u: q", "a: a"),
        ),
        ({"dialog": turns("u: q", "a: a"), "sys": "S"}, {"messages": "dialog", "system": "sys"}, "conversation", None),
        # a row may lack an optional column
        ({"q": "q", "answer": "a"}, {"prompt": "q", "system": "sys"}, "conversation", turns("u: q", "a: a")),
    ],
)
def test_columns_map(row, columns, kind, expected):
    expected = expected or turns("s: S", "u: q", "a: a")
    assert canonical_row(row, kind, columns) == {"messages": expected}


def test_columns_map_of_a_preference():
    row = {"p": "q", "answers": ["bad", "good"], "grades": [1, 5]}
    columns = {"prompt": "p", "completions": "answers", "scores": "grades"}
    assert canonical_row(row, "preference", columns) == PAIR


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        (
            {"promt": "question"},
            [
                "'promt' is not a column of ours",
                "did you mean 'prompt'",
                "text, text_pair, source, target, messages, prompt",
            ],
        ),
        ({"instruction": "x"}, ["'instruction'", "did you mean 'prompt'"]),
        ({"zzz": "x"}, ["'zzz'", "ours -> theirs"]),
    ],
)
def test_unknown_name_of_ours_is_refused(columns, fragments):
    (problem,) = formats.check_columns(columns)
    assert all(fragment in problem for fragment in fragments), problem
    assert formats.check_columns({"prompt": "a", "completion": "b"}) == formats.check_columns(None) == []


C, P, R, T = "conversation", "preference", "prompt", "text"
BAD = [
    # missing columns
    ({"instruction": "a", "outptu": "b"}, C, ["no column 'output'", "nearest is 'outptu'", "{completion: outptu}"]),
    ({"instruction": "a", "extra": "b"}, C, ["no completion column", "Columns: instruction, extra", "THEIRS"]),
    (
        {"a": 1, "b": 2},
        C,
        ["no column is one that is known", "Columns: a, b", "messages", "{prompt: THEIRS, completion: THEIRS}"],
    ),
    ({}, C, ["Columns: none"]),
    ({"prompt": "q", "chosen": "a", "rejcted": "b"}, P, ["no column 'rejected'", "nearest is 'rejcted'"]),
    ({"txt": "a"}, T, ["no column 'text'", "nearest is 'txt'", "data.columns: {text: txt}"]),
    ({"instruction": "a", "output": None}, C, ["output is null"]),
    ({"chosen": "a", "rejected": "b"}, P, ["no column holds the prompt", "{prompt: THEIRS}"]),
    # kinds that do not fit
    ({"text": "a"}, C, ["plain text", "no turns", "can serve as 'text'"]),
    ({"messages": turns("u: q", "a: a")}, T, ["conversations", "cannot serve as 'text'", "'conversation' or 'prompt'"]),
    ({"prompt": "q", "completion": "a"}, P, ["nothing to rank"]),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, T, ["ranked answers", "cannot serve as 'text'"]),
    # turns
    ({"messages": turns("u: q")}, C, ["no assistant turn"]),
    ({"messages": turns("u: q", "a: a", "u: r")}, C, ["last turn is not the assistant's"]),
    ({"messages": turns("u: q", "u: r", "a: a")}, C, ["out of order", "turn 2 is user, after user", "'assistant'"]),
    ({"messages": turns("a: a", "u: q", "a: b")}, C, ["out of order", "turn 1 is assistant, first"]),
    ({"messages": turns("u: q", "s: S", "a: b")}, C, ["turn 2 is system, after user"]),
    ({"messages": turns("u: q", "t: x", "a: b")}, C, ["turn 2 is tool, after user"]),
    ({"messages": turns("u: q", "a: ")}, C, ["empty answer", "turn 2"]),
    ({"messages": turns("u: \n", "a: a")}, C, ["turn 1 (user) is empty"]),
    ({"messages": []}, C, ["messages holds no turns"]),
    ({"messages": "hello"}, C, ["messages is a string ('hello'), not a list of turns"]),
    ({"messages": ["hello"]}, C, ["messages is a string ('hello'), not an object"]),
    ({"messages": ["a", "b"]}, C, ["messages, turn 1 is a string"]),
    ({"messages": [{"role": "usr", "content": "q"}]}, C, ["unknown role 'usr'", "did you mean 'user'"]),
    ({"messages": [{"role": 3, "content": "q"}]}, C, ["unknown role 3"]),
    ({"messages": [{"who": "user", "said": "q"}]}, C, ["neither role and content nor from and value", "who, said"]),
    ({"messages": [{"role": "user"}]}, C, ["(user) has no content"]),
    ({"messages": [{"role": "user", "content": 7}]}, C, ["is a number (7), not text"]),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, C, ["parts that are not text"]),
    ({"messages": [*turns("s: A", "u: q", "a: a")], "system": "B"}, C, ["two system prompts that differ"]),
    ({"messages": turns("u: q", "a: a"), "tools": "{oops"}, C, ["tools is not JSON"]),
    ({"messages": turns("u: q", "a: a"), "tools": "3"}, C, ["tools is a number (3), not a list"]),
    # prompt and completion
    ({"instruction": "a", "output": " \n"}, C, ["empty answer", "output holds no text"]),
    ({"instruction": "", "input": "", "output": "b"}, C, ["instruction is empty"]),
    ({"instruction": "a", "output": 4.5}, C, ["output is a number (4.5)"]),
    ({"prompt": "a", "completion": "b", "label": False}, C, ["label is false", "an answer that was rejected"]),
    ({"messages": [*turns("u: q"), turns("a: a")[0] | {"weight": 0}]}, C, ["turn 2 has weight 0"]),
    (
        {"messages": [*turns("u: q"), turns("a: a")[0] | {"reasoning_content": "r"}]},
        C,
        ["turn 2 has reasoning_content"],
    ),
    ({"instruction": ["x"], "output": "4"}, C, ["instruction is a string"]),
    ({"prompt": "a", "completion": "b", "history": "c"}, C, ["history is a string ('c'), not a list"]),
    ({"prompt": "a", "completion": "b", "history": [["c"]]}, C, ["entry 1 is not a pair"]),
    ({"question": "a", "answers": {"text": []}}, C, ["this question has no answer"]),
    ({"prompt": "a", "completion": turns("u: b")}, C, ["out of order"]),
    ({"text": 3}, T, ["text is a number (3), not text"]),
    ({"text": True}, T, ["text is true, not text"]),
    # preferences
    ({"prompt": "q", "chosen": "same", "rejected": "same"}, P, ["chosen equals rejected"]),
    ({"prompt": "q", "chosen": " ", "rejected": "b"}, P, ["empty answer", "chosen"]),
    ({"prompt": "q", "chosen": turns("u: q", "a: a"), "rejected": "b"}, P, ["make both the same"]),
    ({"prompt": "q", "chosen": turns("a: a", "u: x"), "rejected": turns("a: b")}, P, ["several turns"]),
    (
        {"chosen": turns("u: q", "a: x", "u: r", "a: a"), "rejected": turns("u: q", "a: y", "u: r", "a: b")},
        P,
        ["part at turn 2", "different prompts"],
    ),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"},
        P,
        ["rejected: roles out of order: turn 3"],
    ),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, P, ["empty answer: chosen"]),
    ({"prompt": turns("u: q", "a: x"), "chosen": "a", "rejected": "b"}, P, ["must end with the user's turn"]),
    ({"prompt": "q", "completions": ["a"], "ranks": [0]}, P, ["fewer than 2 ranked completions", "holds 1"]),
    ({"prompt": "q", "completions": ["a", "b"]}, P, ["without their order", "{scores: THEIRS}"]),
    ({"prompt": "q", "completions": ["a", "b"], "ranks": [0]}, P, ["ranks has 1 entries for 2"]),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}, P, ["all 2 completions are tied"]),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, None]}, P, ["numbers only"]),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, float("nan")]}, P, ["numbers only"]),
    ({"prompt": "q", "completions": ["a", "a", "b"], "ranks": [0, 1, 2]}, P, ["two different places", "'a'"]),
    ({"prompt": "q", "completions": ["a", " "], "ranks": [0, 1]}, P, ["empty answer: completions[2]"]),
    ({"prompt": "q", "completions": "ab", "ranks": [0, 1]}, P, ["not a list of answers"]),
    ({"completions": ["a", "b"], "ranks": [0, 1]}, P, ["no column holds the prompt"]),
    # prompts
    ({"messages": turns("s: S")}, R, ["end with the user's turn"]),
    ({"prompt": turns("u: q", "a: a")}, R, ["end with the user's turn"]),
]


@pytest.mark.parametrize(("row", "kind", "fragments"), BAD, ids=range(len(BAD)))
def test_bad_row(row, kind, fragments):
    with pytest.raises(BadRow) as caught:
        canonical_row(row, kind)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_mapped_column_that_is_not_there():
    with pytest.raises(BadRow, match=r"maps prompt to 'questoin'.*did you mean 'question'.*Columns: question, answer"):
        canonical_row({"question": "a", "answer": "b"}, "conversation", {"prompt": "questoin"})


def test_rows_are_not_changed():
    row = {"conversations": sharegpt("u: hi", "a: hello"), "system": "S", "tools": [TOOL]}
    before = json.dumps(row)
    canonical_row(row, "conversation")
    canonical_row(row, "prompt")
    assert json.dumps(row) == before


def test_convert_keeps_what_a_builtin_row_adds():
    row = {"messages": turns("u: q", "a: a"), "task": "add"}
    assert formats.convert(row, "conversation", "prompt") == {"prompt": turns("u: q"), "task": "add"}
    ranked = PAIR | {"task": "add"}
    assert formats.convert(ranked, "preference", "conversation") == {
        "messages": turns("u: q", "a: good"),
        "task": "add",
    }
    with pytest.raises(BadRow, match="nothing to rank"):
        formats.convert(row, "conversation", "preference")


def test_picked_columns():
    assert formats.picked_columns(["img", "fine_label", "id"], "image") == {"image": "img", "label": "fine_label"}
    assert formats.picked_columns(["image", "alt"], "image_caption", {"caption": "alt"})["caption"] == "alt"
    with pytest.raises(BadRow, match="no caption column"):
        formats.picked_columns(["image", "alt"], "image_caption")


# ------------------------------------------------------------------------------------------- classes and pairs


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a b", "label": "yes"}, {"text": "a b", "text_pair": None, "label": "yes"}),
        ({"sentence": "a b", "label": 2}, {"text": "a b", "text_pair": None, "label": "2"}),  # SST-2
        ({"premise": "a", "hypothesis": "b", "label": 0}, {"text": "a", "text_pair": "b", "label": "0"}),  # MNLI
        ({"sentence1": "a", "sentence2": "b", "label": 1}, {"text": "a", "text_pair": "b", "label": "1"}),  # MRPC
        ({"text": "a", "text_pair": None, "label": "x", "id": 3}, {"text": "a", "text_pair": None, "label": "x"}),
    ],
)
def test_labelled_texts_are_recognised(row, expected):
    assert canonical_row(row, "classification") == expected


@pytest.mark.parametrize("score", [2.6, "2.600", 3])  # as the hub has STS-B, as a table has it, a whole number
def test_two_texts_and_how_alike_they_are(score):
    row = {"sentence1": "a", "sentence2": "b", "label": score}
    assert canonical_row(row, "scored_pair") == {"text": "a", "text_pair": "b", "label": float(score)}


@pytest.mark.parametrize("score", ["much", True, float("nan"), [1]])
def test_a_score_is_a_number(score):
    with pytest.raises(BadRow, match=r"label is .*, not a number"):
        canonical_row({"sentence1": "a", "sentence2": "b", "label": score}, "scored_pair")
    with pytest.raises(BadRow, match="no text_pair column"):
        canonical_row({"sentence1": "a", "label": 1.0}, "scored_pair")


def test_a_text_and_what_it_becomes_is_recognised_or_mapped():
    assert canonical_row({"src": "a", "tgt": "b"}, "pair") == {"source": "a", "target": "b"}
    mapped = canonical_row({"en": "a", "zh": "b"}, "pair", {"source": "en", "target": "zh"})
    assert mapped == {"source": "a", "target": "b"}


def test_a_labelled_text_serves_as_text_and_a_text_has_no_class():
    assert canonical_row({"text": "a", "label": "x"}, "text") == {"text": "a"}
    assert formats.convert({"source": "a", "target": "b"}, "pair", "text") == {"text": "a\nb"}
    with pytest.raises(BadRow, match="no label column"):
        canonical_row({"text": "a"}, "classification")
    with pytest.raises(BadRow, match="label is true"):
        canonical_row({"text": "a", "label": True}, "classification")
    with pytest.raises(BadRow, match="no target column"):
        canonical_row({"source": "a"}, "pair")
