"""The builtin sets: deterministic, disjoint, honest answers, and a checker that credits the answer and nothing else."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest

from recipes.common.builtin import BUILTINS, tasks, wordings
from recipes.common.builtin.split import SPLITS, split_of
from recipes.common.errors import UserError

Row = dict[str, Any]


@cache
def rows(name: str, split: str) -> list[Row]:
    return BUILTINS[name].load(split, 0)


def prompt(row: Row) -> str:
    return (row["messages"] if "messages" in row else row["prompt"])[0]["content"]


# ------------------------------------------------------------------------------------------------------- all sets


def test_importing_the_sets_imports_nothing_heavy() -> None:
    code = (
        "import sys, recipes.common.builtin as b; print(*b.BUILTINS); "
        "sys.exit(bool({'torch', 'datasets', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, list(BUILTINS))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTINS)
def test_a_seed_gives_the_same_rows_and_another_seed_others(name: str) -> None:
    load = BUILTINS[name].load
    assert load("validation", 0) == rows(name, "validation")
    assert load("validation", 1) != rows(name, "validation")


@pytest.mark.parametrize("name", BUILTINS)
def test_an_unknown_split_is_the_users_error(name: str) -> None:
    with pytest.raises(UserError, match="train, validation, test"):
        BUILTINS[name].load("dev", 0)


@pytest.mark.parametrize("name", BUILTINS)
def test_rows_have_the_form_of_their_kind(name: str) -> None:
    for row in rows(name, "validation"):
        match BUILTINS[name].kind:
            case "text":
                assert isinstance(row["text"], str) and row["text"].strip()
            case "conversation":
                assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
                assert all(message["content"].strip() for message in row["messages"])
            case "prompt":
                assert [message["role"] for message in row["prompt"]] == ["user"]
            case "preference":
                assert [message["role"] for message in row["prompt"]] == ["user"]
                assert 4 <= len(row["completions"]) == len(row["ranks"]) <= 6
                assert row["ranks"][0] == 0 < row["ranks"][1] and row["ranks"] == sorted(row["ranks"])
            case "classification":
                assert row["text"].strip() and row["label"]
                assert row["text_pair"] is None or row["text_pair"].strip()
            case "pair":
                assert row["source"].strip() and row["target"].strip()
            case "labelling":
                assert len(row["words"]) == len(row["tags"]) > 0 and all(word.strip() for word in row["words"])
            case kind:
                pytest.fail(f"no check for rows of kind {kind}")


def test_a_key_has_one_split_and_the_shares_are_as_asked() -> None:
    shares = Counter(split_of(f"key {i}", 5) for i in range(20_000))
    assert {split: round(shares[split] / 200) for split in SPLITS} == {"train": 90, "validation": 5, "test": 5}
    assert split_of("add (17, 25)", 5) == "train"  # the same on every machine: held-out stays held out


# ---------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tasks", tasks.SIZES),
        ("tasks_prompts", tasks.PROMPT_SIZES),
        ("tasks_preferences", tasks.PREFERENCE_SIZES),
    ],
)
def test_sizes_families_and_languages_are_as_promised(name: str, sizes: dict[str, int]) -> None:
    assert 8 <= len(tasks.FAMILIES) <= 12
    for split in SPLITS:
        drawn = rows(name, split)
        assert len(drawn) == sizes[split]
        families = Counter(row["task"] for row in drawn)
        assert families.keys() == tasks.FAMILIES.keys()
        assert max(families.values()) - min(families.values()) <= 1
        assert abs(sum(row["language"] == "zh" for row in drawn) / len(drawn) - tasks.CHINESE) < 0.05
        for row in drawn[:2_000]:
            assert any("\u4e00" <= character <= "\u9fff" for character in prompt(row)) == (row["language"] == "zh")


def test_prompts_and_answers_are_short_and_seldom_repeated() -> None:
    train = rows("tasks", "train")
    assert max(len(prompt(row).split()) for row in train) <= 25
    assert max(len(prompt(row)) for row in train) < 100
    assert max(len(row["answer"]) for row in train) < 40
    assert len({prompt(row) for row in train[:40_000]}) > 0.85 * 40_000
    assert len({prompt(row) for row in train}) > 0.8 * len(train)


def instances(monkeypatch: pytest.MonkeyPatch, load: Any, split: str) -> set[str]:
    """The instances that a set asks about: every one it draws and keeps."""
    drawn: set[str] = set()
    draw = tasks.draw

    def note(family: str, *rest: Any, **how: bool) -> tasks.Instance:
        instance = draw(family, *rest, **how)
        drawn.add(f"{family} {instance.key}")
        return instance

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "draw", note)
        load(split, 7)
    return drawn


@pytest.mark.slow
def test_no_instance_is_in_two_splits_of_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = (tasks.load, tasks.load_preferences, tasks.load_translation)
    asked = {split: set().union(*(instances(monkeypatch, load, split) for load in answered)) for split in SPLITS}
    alone = {split: instances(monkeypatch, tasks.load_prompts, split) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not (asked[one] | alone[one]) & (asked[other] | alone[other])
    assert not asked["train"] & alone["train"]  # what a policy answers by itself, nothing taught it
    for drawn in (asked["validation"], alone["train"]):
        for family in tasks.FAMILIES:  # even a family of few instances has some
            assert len([key for key in drawn if key.startswith(f"{family} ")]) >= 6, family
    # a tenth of what the others could ask: counted where nearly all instances have been drawn
    products = [len([key for key in keys if key.startswith("multiply ")]) for keys in (alone["train"], asked["train"])]
    assert 0.05 < products[0] / sum(products) < 0.2


def test_no_prompt_of_one_split_is_asked_in_another() -> None:
    """The same from the outside, with the order of lists and numbers that the instance forgets put back."""
    prompts = {
        split: {prompt(row) for name in ("tasks", "tasks_prompts", "tasks_preferences") for row in rows(name, split)}
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not prompts[one] & prompts[other]


def test_the_same_question_in_other_words_is_the_same_instance() -> None:
    rng = random.Random(0)
    keys: dict[frozenset[Any], set[str]] = defaultdict(set)
    for _ in range(4_000):
        instance = tasks.add(rng)
        numbers = frozenset((instance.fields["a"], instance.fields["b"]))
        keys[numbers].add(str(instance.key))
    assert all(len(found) == 1 for found in keys.values())
    assert len({next(iter(found)) for found in keys.values()}) == len(keys)


def test_the_most_common_answer_of_a_family_is_no_good_answer() -> None:
    """In training, where there are thousands of rows; held out, where there are 180, two standard errors more."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows("tasks", "train"):
        answers[row["task"]][tasks.normal(row["answer"])] += 1
    for family, found in answers.items():
        ((most_common, times),) = found.most_common(1)
        assert times < 0.25 * found.total(), family
        held_out = [row for row in rows("tasks", "validation") if row["task"] == family]
        right = sum(tasks.check(row, most_common) for row in held_out)
        assert right < 0.25 * len(held_out) + 2 * (0.25 * 0.75 * len(held_out)) ** 0.5, family


COMPUTED = ("add", "subtract", "multiply", "count", "sort", "reverse")


@pytest.mark.slow
def test_what_must_be_computed_does_not_stand_in_the_prompt() -> None:
    for split in SPLITS:
        for row in rows("tasks", split):
            if row["task"] in COMPUTED or (row["task"] == "date" and not row["answer"].isdigit()):  # a month's name
                answer = re.escape(row["answer"])
                assert not re.search(rf"(?<![0-9A-Za-z]){answer}(?![0-9A-Za-z])", prompt(row)), row


MONTHS = {"en": [month.en for month in wordings.MONTHS], "zh": [month.zh for month in wordings.MONTHS]}


def worked_out(row: Row) -> str:
    """The answer, from the words of the prompt alone."""
    text, language = prompt(row), row["language"]

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    after_colon = re.split(r"[:：]| in | of ", text)[-1]
    items = re.findall(r"\d+", after_colon)
    numbers = [int(item) for item in re.findall(r"\d+", text)]
    match row["task"]:
        case "add":
            return str(numbers[0] + numbers[1])
        case "subtract":
            return str(numbers[0] - numbers[1])
        case "multiply":
            return str(numbers[0] * numbers[1])
        case "extreme":
            return str(max(numbers) if says("largest", "maximum", "最大") else min(numbers))
        case "sort":
            down = says("large to small", "descending", "downwards", "从大到小", "降序")
            return " ".join(map(str, sorted(numbers, reverse=down)))
        case "reverse":
            return " ".join(items[::-1])
        case "count" if len(numbers) > len(items):
            return str(items.count(str(numbers[0])))
        case "count":
            return str(len(items))
        case "date" if says("year", "年"):
            return items[0]
        case "date" if says("day", "几号"):
            return str(numbers[2])
        case "date":
            return MONTHS[language][numbers[1] - 1]
        case "lookup":
            prices, question = re.split(r"[.。]", text, maxsplit=1)
            pairs = re.findall(r"([a-z]+|[\u4e00-\u9fff])\s?(\d)", re.split("[:：]", prices)[1])
            return dict(pairs)[re.split("[:：]", question)[-1].strip(" ?？")]
        case "compare":
            points = {name: int(number) for name, number in re.findall(r"(小.|[A-Z][a-z]+) ?(\d)", text)}
            return (min if says("fewest", "smallest", "最少", "最小") else max)(points, key=lambda name: points[name])
        case "position":
            place = [i for i, nth in enumerate(wordings.PLACES) if nth[language == "zh"] in text]
            return items[place[0]]
    raise AssertionError(f"no solver for {row['task']}")


def test_answers_agree_with_the_words_of_the_prompt() -> None:
    """Every question solved anew from its text, so that a wording that says another thing than the instance is found."""
    for split in SPLITS:
        for row in rows("tasks", split):
            assert worked_out(row) == row["answer"], row


def test_every_form_has_several_wordings_in_both_languages_and_all_are_used() -> None:
    openings = {
        (language, re.split(r"[{\d]", wording)[0])
        for forms in wordings.PROMPTS.values()
        for language, choices in forms.items()
        for wording in choices
    }
    for forms in wordings.PROMPTS.values():
        assert forms.keys() == {"en", "zh"}
        assert min(len(set(choices)) for choices in forms.values()) >= 2
    texts = [prompt(row) for row in rows("tasks", "train")]
    for _, opening in openings:
        assert not opening or any(text.startswith(opening[:1].upper() + opening[1:]) for text in texts), opening


# --------------------------------------------------------------------------------------------------------- check


def test_every_rows_own_answer_passes() -> None:
    for split in SPLITS:
        for row in rows("tasks", split):
            assert tasks.check(row, row["messages"][1]["content"])


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("12", "12", True),
        ("12", " 12\n", True),
        ("12", "12.", True),
        ("12", "12。", True),
        ("12", "１２", True),
        ("12", "１２．", True),
        ("12", "\u300012", True),
        ("12", "12..", False),
        ("12", ".12", False),
        ("12", "12 or 13", False),
        ("12", "12, 13", False),
        ("12", "12 12", False),
        ("12", "The answer is 12.", False),
        ("12", "答案是12", False),
        ("12", "1 2", False),
        ("12", "21", False),
        ("12", "120", False),
        ("12", "012", False),
        ("12", "-12", False),
        ("12", "12.0", False),
        ("12", "1²", False),
        ("12", "⑫", False),
        ("12", "", False),
        ("12", ".", False),
        ("12", "twelve", False),
        ("3, 5, 9", "3, 5, 9", True),
        ("3, 5, 9", "3,5,9", True),
        ("3, 5, 9", "3 , 5 ,9.", True),
        ("3, 5, 9", "3，5，9", True),
        ("3, 5, 9", "3、5、9", True),
        ("3、5、9", "3, 5, 9", True),
        ("3 5 9", "3, 5, 9", True),
        ("3, 5, 9", "359", False),
        ("3, 5, 9", "3, 9, 5", False),
        ("3, 5, 9", "3, 5", False),
        ("3, 5, 9", "3, 5, 9, 9", False),
        ("3, 5, 9", "3, 5, 9,", False),
        ("3, 5, 9", "3, 5, and 9", False),
        ("3, 5, 9", "[3, 5, 9]", False),
        ("Friday", "friday", True),
        ("Friday", "FRIDAY.", True),
        ("Friday", "Fri", False),
        ("Friday", "Fridays", False),
        ("Friday", "星期五", False),
        ("Friday", "on Friday", False),
        ("Friday", "Friday or Saturday", False),
        ("星期五", "星期五", True),
        ("星期五", "星期五。", True),
        ("星期五", "星期", False),
        ("星期五", "是星期五", False),
        ("星期五", "Friday", False),
        ("March 5", "march 5", True),
        ("March 5", "March5", False),
        ("March 5", "March 15", False),
        ("3月5日", "３月５日", True),
        ("3月5日", "3月15日", False),
        ("cat, dog", "Cat, Dog", True),
        ("cat, dog", "dog, cat", False),
    ],
)
def test_check(answer: str, completion: str, right: bool) -> None:
    assert tasks.check({"answer": answer}, completion) is right


def test_check_refuses_other_rows_answers_and_answers_in_other_words() -> None:
    drawn = rows("tasks", "validation")
    for row, other in pairwise(drawn):
        answer = row["answer"]
        if tasks.normal(other["answer"]) != tasks.normal(answer):
            assert not tasks.check(row, other["answer"])
        wrong = (f"{answer} {answer}", f"It is {answer}", f"{answer}, {answer}", answer[:-1], answer + "1", prompt(row))
        for completion in wrong:
            assert not tasks.check(row, completion), (row, completion)


# --------------------------------------------------------------------------------------------------- preferences


def test_only_the_best_completion_is_right_and_no_two_are_alike() -> None:
    for split in SPLITS:
        for row in rows("tasks_preferences", split):
            right = [tasks.check(row, completion) for completion in row["completions"]]
            assert right == [True] + [False] * (len(right) - 1), row
            assert len({tasks.normal(completion) for completion in row["completions"]}) == len(right), row
            assert {0, tasks.WRONG, tasks.WRONG_FORM} == set(row["ranks"]), row
            assert row["ranks"].count(tasks.WRONG) >= 2 and row["ranks"].count(tasks.WRONG_FORM) == 1, row


def test_every_size_from_four_to_six_is_common() -> None:
    sizes = Counter(len(row["completions"]) for row in rows("tasks_preferences", "train"))
    assert sizes.keys() == {4, 5, 6}
    assert min(sizes.values()) > 3_000


def test_length_does_not_tell_the_right_answer_from_a_wrong_one() -> None:
    pairs = [
        (row["answer"], completion)
        for row in rows("tasks_preferences", "train")
        for completion, rank in zip(row["completions"], row["ranks"], strict=True)
        if rank == tasks.WRONG
    ]
    assert len(pairs) > 12_000
    shortest = sum(len(right) < len(wrong) for right, wrong in pairs) / len(pairs)
    longest = sum(len(right) > len(wrong) for right, wrong in pairs) / len(pairs)
    assert max(shortest, longest) < 0.25  # most pairs tie
    assert abs(shortest - longest) < 0.03  # and guessing among the ties is guessing: under 0.52 either way


def test_the_first_wrong_answer_is_near_the_right_one() -> None:
    for row in rows("tasks_preferences", "validation"):
        near = row["completions"][1]
        match row["task"]:
            case "add" | "subtract" | "multiply" | "count" | "extreme":
                assert re.fullmatch(r"\d+", near), row
            case "sort" | "reverse":
                assert set(near.split()) <= set(row["answer"].split()), row
            case "position" | "compare" | "lookup" if not near.isdigit():
                assert near.lower() in prompt(row).lower(), row
        assert all(completion.strip() for completion in row["completions"])


# ---------------------------------------------------------------------------------------------------- translation


def test_translation_says_the_same_numbers_in_both_languages() -> None:
    for row in rows("tasks_translation", "validation"):
        assert sorted(re.findall(r"\d+", row["source"])) == sorted(re.findall(r"\d+", row["target"])), row
    held_out = {row["source"] for row in rows("tasks_translation", "validation")}
    assert not held_out & {row["source"] for row in rows("tasks_translation", "train")}
