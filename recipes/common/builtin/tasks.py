"""Small questions with one right answer, in English and Chinese: eleven families from arithmetic to table look-up.

An *instance* is a question whatever its wording and language (add 17 and 25). Its split is a hash of the instance, so a
held-out instance was never seen in any words. Questions and answers are made of language-neutral values (numbers, words
with a name in each language, lists of these) and are put into words last.

`load` gives conversations for supervised fine-tuning, `load_preferences` ranked answers for a reward model, `load_prompts`
questions that neither of them asks, for a policy to answer, and `check` says whether an answer is right: the reward that
can be trusted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from recipes.common.builtin.split import check_split, split_of
from recipes.common.builtin.wordings import (
    GOODS,
    MONTHS,
    PLACES,
    PROMPTS,
    RAMBLINGS,
    REFUSALS,
    TEAMS,
    Word,
)

Row: TypeAlias = dict[str, Any]
Value: TypeAlias = "int | Word | Sequence[int | Word]"

HELD_OUT = 5  # percent of the instances in validation, and as many in test
PROMPTS_ALONE = 10  # percent of train's instances that are kept for load_prompts: nothing else in train asks them
SIZES = {"train": 90_000, "validation": 2_000, "test": 2_000}
PROMPT_SIZES = {"train": 12_000, "validation": 2_000, "test": 2_000}
PREFERENCE_SIZES = {"train": 60_000, "validation": 600, "test": 600}
CHINESE = 0.3  # share of the rows
WRONG, WRONG_FORM = 1, 2  # ranks of the answers that are not right


@dataclass(slots=True)
class Instance:
    """One question before it is put into words."""

    form: str  # which group of PROMPTS asks it
    key: tuple[Any, ...]  # what makes it the same question: instances with equal keys are in one split
    fields: dict[str, Value]  # what the prompt is filled with
    answer: Value
    slips: Sequence[Value]  # wrong answers that somebody who nearly knows would give; some may repeat or be right


# ---------------------------------------------------------------------------------------------------- the families


def add(rng: random.Random) -> Instance:
    level, ones = rng.random(), rng.randint(0, 9)
    if level < 0.45:  # one digit more, and no carry
        ones = min(ones, 8)
        a, b = 10 * rng.randint(1, 9) + ones, rng.randint(1, 9 - ones)
    elif level < 0.9:  # two digits each, and no carry
        tens = rng.randint(1, 8)
        a, b = 10 * tens + ones, 10 * rng.randint(1, 9 - tens) + rng.randint(0, 9 - ones)
    else:
        b = rng.randint(1, 9)
        a = rng.randint(10, 99 - b)
    return Instance("add", (min(a, b), max(a, b)), {"a": a, "b": b}, a + b, [*number_slips(a + b), abs(a - b)])


def subtract(rng: random.Random) -> Instance:
    level, ones = rng.random(), rng.randint(0, 9)
    if level < 0.45:  # one digit less, and nothing borrowed
        a, b = 10 * rng.randint(1, 9) + ones, rng.randint(0, ones)
    elif level < 0.9:  # two digits each, and nothing borrowed
        tens = rng.randint(2, 9)
        a, b = 10 * tens + ones, 10 * rng.randint(1, tens - 1) + rng.randint(0, ones)
    else:
        a, b = rng.randint(11, 99), rng.randint(1, 9)
    if a == 2 * b or b == 0:  # the answer would stand in the question
        return subtract(rng)
    return Instance("subtract", (a, b), {"a": a, "b": b}, a - b, [*number_slips(a - b), a + b])


def multiply(rng: random.Random) -> Instance:
    b = rng.choice((2, 2, 2, 3, 3, 4))
    a = 0
    for _ in range(rng.choice((1, 2, 2, 3))):
        a = 10 * a + rng.randint(0 if a else 1, 9 // b)  # no digit carries
    if a == 1:
        a = 11
    return Instance("multiply", (a, b), {"a": a, "b": b}, a * b, [*number_slips(a * b), a + b, a * b + a])


def extreme(rng: random.Random) -> Instance:
    items = some_numbers(rng)
    form = rng.choice(("largest", "smallest"))
    ordered = sorted(items, reverse=form == "largest")
    return Instance(form, tuple(sorted(items)), {"items": items}, ordered[0], ordered[1:])


def sort(rng: random.Random) -> Instance:
    form = rng.choice(("ascending", "descending"))
    items = some_numbers(rng)
    ordered = sorted(items, reverse=form == "descending")
    if items == ordered:  # the answer would stand in the question
        items = items[::-1]
    return Instance(form, tuple(sorted(items)), {"items": items}, ordered, list_slips(rng, ordered))


def reverse(rng: random.Random) -> Instance:
    items: list[Any] = rng.sample(range(1, 10), rng.choice((2, 3, 3, 4)))
    answer = items[::-1]
    return Instance("reverse", min(names(items), names(answer)), {"items": items}, answer, list_slips(rng, answer))


def count(rng: random.Random) -> Instance:
    n = rng.randint(2, 6) if (distinct := rng.random() < 0.4) else rng.randint(1, 5)
    others = [number for number in range(1, 10) if number != n]  # the answer would stand in the question
    slips = [n + 1, n - 1 or n + 1]
    if distinct:
        items = rng.sample(others, n)
        return Instance("count", tuple(items), {"items": items}, n, slips)
    asked, other = rng.sample(others, 2)
    items = [asked] * n + [other] * rng.randint(1, 3)
    rng.shuffle(items)
    return Instance("occurrences", (asked, *items), {"items": items, "item": asked}, n, [*slips, len(items)])


def date(rng: random.Random) -> Instance:
    form = rng.choice(("month of", "month of", "day of", "year of"))
    year, month, day = rng.randint(1950, 2049), rng.randrange(12), rng.randint(1, 28)
    written = f"{year}-{month + 1:02}-{day:02}"
    answer: Value
    slips: list[Value]
    if form == "month of":
        answer, slips = MONTHS[month], [MONTHS[slip % 12] for slip in (month + 1, month - 1, day - 1)]
    elif form == "day of":
        answer, slips = day, [day + 1, day - 1 or day + 2, month + 1, year % 100]
    else:
        answer, slips = year, [year + 1, year - 1, year + 10, year - 10]
    return Instance(form, (written,), {"date": Word(written, written)}, answer, slips)


def lookup(rng: random.Random) -> Instance:
    prices = rng.sample(range(1, 10), len(GOODS))
    asked = rng.randrange(len(GOODS))
    price = prices[asked]
    slips = [*(prices[:asked] + prices[asked + 1 :]) * 2, price - 1 or price + 2, price + 1]
    return Instance("price", (asked, *prices), {"item": GOODS[asked], "table": table(GOODS, prices)}, price, slips)


def compare(rng: random.Random) -> Instance:
    form, team = rng.choice(("most", "fewest")), rng.choice(TEAMS)
    points = rng.sample(range(1, 10), len(team))
    best = points.index(max(points) if form == "most" else min(points))
    others = [*team[:best], *team[best + 1 :]]
    return Instance(form, (team[0].en, *points), {"points": table(team, points)}, team[best], others)


def table(names: Sequence[Word], numbers: Sequence[int]) -> Word:
    """One row of a table: Anna 5, Ben 3 | 小安5，小本3."""
    pairs = list(zip(names, numbers, strict=True))
    return Word(", ".join(f"{name.en} {n}" for name, n in pairs), "，".join(f"{name.zh}{n}" for name, n in pairs))


def position(rng: random.Random) -> Instance:
    items = rng.sample(range(1, 10), few(rng))
    nth = rng.randrange(len(items))
    slips = [*items[max(0, nth - 1) : nth + 2], *items]  # the neighbours more often
    return Instance("position", (*items, nth), {"items": items, "nth": PLACES[nth]}, items[nth], slips)


FAMILIES: dict[str, Callable[[random.Random], Instance]] = {
    family.__name__: family
    for family in (
        add,
        subtract,
        multiply,
        extreme,
        sort,
        reverse,
        count,
        date,
        lookup,
        compare,
        position,
    )
}


def some_numbers(rng: random.Random) -> list[int]:
    """Three to five different numbers below 10, or three below 100."""
    return rng.sample(range(1, 100), 3) if rng.random() < 0.15 else rng.sample(range(1, 10), few(rng))


def few(rng: random.Random) -> int:
    """The length of a list: from three to five, the shorter the more often."""
    return rng.choice((3, 3, 3, 4, 4, 5))


def names(items: Sequence[int | Word]) -> tuple[str, ...]:
    return tuple(say(item, "en") for item in items)


def number_slips(n: int) -> list[int]:
    """Off by one, by two or by ten, and the digits swapped."""
    near = [n - 1, n + 1, n - 1, n + 1, n - 2, n + 2, n - 10, n + 10]
    swapped = int(str(n)[::-1])
    return [slip for slip in [*near, swapped] if slip > 0]


def list_slips(rng: random.Random, answer: Sequence[Any]) -> list[Sequence[Any]]:
    """Two neighbours swapped, one item missing, one twice, one replaced by another, or all the other way round."""
    i = rng.randrange(len(answer) - 1)
    swapped = [*answer[:i], answer[i + 1], answer[i], *answer[i + 2 :]]
    twice = [*answer[: i + 1], answer[i], *answer[i + 2 :]]
    return [swapped, [*answer[:i], *answer[i + 1 :]], [*answer[: i + 1], *answer[i:]], twice, answer[::-1]]


# --------------------------------------------------------------------------------------------------- in words


def say(value: Value, language: str) -> str:
    """A value in words: 12 | Friday, 星期五 | 3 5 9."""
    if isinstance(value, Word):
        return value.zh if language == "zh" else value.en
    if isinstance(value, int):
        return str(value)
    return " ".join(say(item, language) for item in value)


def ask(instance: Instance, language: str, rng: random.Random) -> str:
    """The instance as a prompt, in one of its wordings."""
    wording = rng.choice(PROMPTS[instance.form][language])
    prompt = wording.format(**{name: say(value, language) for name, value in instance.fields.items()})
    return prompt[0].upper() + prompt[1:] if language == "en" else prompt


def draw(family: str, split: str, rng: random.Random, *, prompts_alone: bool = False) -> Instance:
    """An instance of the family that belongs to the split; of train, one that is asked without an answer, or one of the others."""
    while True:
        instance = FAMILIES[family](rng)
        key = f"{family} {instance.key}"
        if split_of(key, HELD_OUT) != split:
            continue
        # a second hash parts train's: what it would hold out is for load_prompts
        if split != "train" or (split_of(f"prompts {key}", PROMPTS_ALONE) == "validation") == prompts_alone:
            return instance


def draw_language(rng: random.Random) -> str:
    return "zh" if rng.random() < CHINESE else "en"


def load(split: str, seed: int) -> list[Row]:
    """Rows {"messages": [user, assistant], "task": family, "language": "en" | "zh", "answer"}.

    90,000 rows of train, 2,000 of each held-out split; the families in equal parts, four in five
    prompts different.
    """
    check_split(split)
    rows = []
    for row in questions(SIZES[split], split, random.Random(f"tasks {split} {seed}")):
        messages = [*row.pop("prompt"), {"role": "assistant", "content": row["answer"]}]
        rows.append({"messages": messages, **row})
    return rows


def load_prompts(split: str, seed: int) -> list[Row]:
    """Rows {"prompt": [user], "task", "language", "answer"}: what a policy answers by itself. `answer` is for `check` alone.

    Train's 12,000 rows ask instances that no other set's train split has in any words: InstructGPT keeps the prompts of its
    three steps apart, and a policy that meets the questions of its fine-tuning again recalls them. The held-out splits,
    2,000 rows each, ask the instances that every set holds out.
    """
    check_split(split)
    rng = random.Random(f"tasks_prompts {split} {seed}")
    return questions(PROMPT_SIZES[split], split, rng, prompts_alone=True)


def questions(count: int, split: str, rng: random.Random, *, prompts_alone: bool = False) -> list[Row]:
    """Rows {"prompt": [user], "task", "language", "answer"}, the families in equal parts, shuffled."""
    families = list(FAMILIES)
    asked: set[str] = set()
    rows: list[Row] = []
    for i in range(count):
        family, language = families[i % len(families)], draw_language(rng)
        for _ in range(5):  # a family of few instances has fewer prompts than rows
            instance = draw(family, split, rng, prompts_alone=prompts_alone)
            prompt = ask(instance, language, rng)
            if prompt not in asked:
                break
        asked.add(prompt)
        turn = {"role": "user", "content": prompt}
        rows.append({"prompt": [turn], "task": family, "language": language, "answer": say(instance.answer, language)})
    rng.shuffle(rows)
    return rows


TRANSLATION_SIZES = {"train": 20_000, "validation": 600, "test": 600}


def load_translation(split: str, seed: int) -> list[Row]:
    """Rows {"source": an English question, "target": the same question in Chinese, "task"}, split as `load`."""
    check_split(split)
    rng = random.Random(f"tasks_translation {split} {seed}")
    families = list(FAMILIES)
    rows = []
    for i in range(TRANSLATION_SIZES[split]):
        family = families[i % len(families)]
        instance = draw(family, split, rng)
        row = {"source": ask(instance, "en", rng), "target": say_in_chinese(instance), "task": family}
        rows.append(row)
    rng.shuffle(rows)
    return rows


def say_in_chinese(instance: Instance) -> str:
    """The question in the first of its Chinese wordings: one right translation, so that a metric has one answer to look for."""
    fields = {name: say(value, "zh") for name, value in instance.fields.items()}
    return PROMPTS[instance.form]["zh"][0].format(**fields)


# --------------------------------------------------------------------------------------------------- preferences


def load_preferences(split: str, seed: int) -> list[Row]:
    """Rows {"prompt": [user], "completions", "ranks", "task", "language", "answer"} of 4 to 6 completions, best first.

    Rank 0 is the right answer; 1 wrong ones, near misses and at least one answer to another question of the kind, which
    tie; 2 the wrong form (the right value in rambling words, no answer, the other language). 60,000 rows of train, 600
    of each held-out split, split as `load`.
    """
    check_split(split)
    rng = random.Random(f"tasks_preferences {split} {seed}")
    families = list(FAMILIES)
    rows = []
    for i in range(PREFERENCE_SIZES[split]):
        family, language = families[i % len(families)], draw_language(rng)
        instance = draw(family, split, rng)
        row: Row = {
            "prompt": [{"role": "user", "content": ask(instance, language, rng)}],
            "task": family,
            "language": language,
            "answer": say(instance.answer, language),
        }
        row["completions"], row["ranks"] = rank(instance, row, rng)
        rows.append(row)
    rng.shuffle(rows)
    return rows


def rank(instance: Instance, row: Row, rng: random.Random) -> tuple[list[str], list[int]]:
    """Completions of one prompt, best first, and their ranks: no two alike, only the first right."""
    family, language, answer = row["task"], row["language"], row["answer"]
    size = rng.randint(4, 6)
    chosen: dict[str, tuple[str, int]] = {normal(answer): (answer, 0)}

    def choose(text: str, its_rank: int) -> None:
        chosen.setdefault(normal(text), (text, its_rank))

    slips = [say(slip, language) for slip in instance.slips]
    rng.shuffle(slips)
    for slip in slips:
        if len(chosen) < size - 2:
            choose(slip, WRONG)
    while len(chosen) < size - 1:
        other = FAMILIES[family](rng)
        text = say(other.answer, language)
        if other.form == instance.form and text not in slips:  # of the form of an answer, and not near it
            choose(text, WRONG)
    while len(chosen) < size:
        choose(rambling(instance, row, rng), WRONG_FORM)
    return [text for text, _ in chosen.values()], [its_rank for _, its_rank in chosen.values()]


def rambling(instance: Instance, row: Row, rng: random.Random) -> str:
    """An answer of the wrong form: the right value among other words, the other language's word, or none at all."""
    language = row["language"]
    other_language = say(instance.answer, "en" if language == "zh" else "zh")
    if rng.random() < 0.2 and normal(other_language) != normal(row["answer"]):
        return other_language
    if rng.random() < 0.3:
        return rng.choice(REFUSALS[language])
    slip = say(rng.choice(instance.slips), language)
    return rng.choice(RAMBLINGS[language]).format(answer=row["answer"], slip=slip, prompt=row["prompt"][0]["content"])


# --------------------------------------------------------------------------------------------------- the checker

# Full-width forms (１２，．) to ASCII. The other compatibility characters (², ①) mean something else, and stay.
NARROW = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " ", 0x3002: "."}
BETWEEN = re.compile(r"\s*[,、]\s*|\s+")


def normal(answer: str) -> str:
    """An answer without what does not matter: outer space, a trailing full stop, case, commas or spaces between, digit width."""
    return BETWEEN.sub(" ", answer.translate(NARROW).strip().removesuffix(".").lower())


def check(row: Row, completion: str) -> bool:
    """Whether the completion is the row's answer, and nothing else beside it."""
    return normal(completion) == normal(row["answer"])
