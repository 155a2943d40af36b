"""Small questions whose answers can be checked, in English and Chinese: twelve families from arithmetic to table look-up.

An *instance* is a question whatever its wording and language (add 17 and 25). Its split is a hash of the instance, so a
held-out instance was never seen in any words. What is asked and answered is built from language-neutral values
(numbers, words with their two names, lists of these) and put into words last.

`load` gives conversations for supervised fine-tuning, `load_preferences` ranked answers for a reward model, and `check`
says whether an answer is right: the reward that can be trusted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from recipes.common.builtin.split import check_split, split_of

Row: TypeAlias = dict[str, Any]

HELD_OUT = 5  # percent of the instances in validation, and as many in test
SIZES = {"train": 40_000, "validation": 2_000, "test": 2_000}
PREFERENCE_SIZES = {"train": 12_000, "validation": 600, "test": 600}
CHINESE = 0.3  # share of the rows


class Word(NamedTuple):
    """Something that has a name in each language."""

    en: str
    zh: str


Value: TypeAlias = "int | Word | list[int] | list[Word] | list[int | Word]"


@dataclass(slots=True)
class Instance:
    """One question, before it is put into words."""

    form: str  # which group of PROMPTS asks it
    key: tuple  # what makes it the same question: instances with equal keys are in one split
    fields: dict[str, Value]  # what the prompt is filled with
    answer: Value
    slips: list[Value]  # wrong answers that somebody who nearly knows would give


def words(*pairs: str) -> list[Word]:
    return [Word(*pair.split("/")) for pair in pairs]


THINGS = words(
    *"apple/苹果 pear/梨 plum/李子 lemon/柠檬 peach/桃子 grape/葡萄 cat/猫 dog/狗 fish/鱼 bird/鸟 horse/马 cow/牛 pig/猪".split(),
    *"sheep/羊 duck/鸭 frog/青蛙 pen/笔 book/书 cup/杯子 lamp/灯 door/门 tree/树 moon/月亮 star/星星 sun/太阳 rain/雨".split(),
    *"snow/雪 wind/风 rice/米 milk/牛奶 bread/面包 tea/茶 salt/盐 egg/鸡蛋 red/红 blue/蓝 gold/金 stone/石头 river/河 hat/帽子".split(),
)
GOODS = words(
    *"apples/苹果 pears/梨 plums/李子 lemons/柠檬 peaches/桃子 pens/笔 books/书 cups/杯子 eggs/鸡蛋 cakes/蛋糕 hats/帽子".split(),
    *"bags/包 lamps/灯 shoes/鞋 balls/球 toys/玩具".split(),
)
PEOPLE = words(
    *"Anna/小安 Ben/小本 Tom/小明 Mary/小红 Lucy/小丽 Jack/小刚 Lily/小美 Sam/小军 Emma/小华 Paul/小强".split()
)
WEEKDAYS = words(
    *"Monday/星期一 Tuesday/星期二 Wednesday/星期三 Thursday/星期四 Friday/星期五 Saturday/星期六 Sunday/星期日".split()
)
MONTHS = words(
    *"January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月".split(),
    *"October/十月 November/十一月 December/十二月".split(),
)
PLACES = words(*"first/第一个 second/第二个 third/第三个 fourth/第四个 fifth/第五个".split())
LETTERS = [Word(letter, letter) for letter in "abcdefghijklmnopqrstuvwxyz"]

# How each form is asked. The fields are the instance's; a prompt's first letter is made a capital.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "add": {
        "en": (
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "{a} plus {b} equals what?",
            "Compute {a} + {b}.",
            "{who} has {a} coins and gets {b} more. How many coins now?",
        ),
        "zh": ("{a}+{b}等于多少？", "{a}加{b}是多少？", "计算{a}+{b}。", "{who}有{a}元，又得到{b}元，现在有多少元？"),
    },
    "subtract": {
        "en": (
            "What is {a} - {b}?",
            "Subtract {b} from {a}.",
            "What is {a} minus {b}?",
            "Compute {a} - {b}.",
            "{who} has {a} coins and spends {b}. How many coins are left?",
        ),
        "zh": ("{a}-{b}等于多少？", "{a}减{b}是多少？", "计算{a}-{b}。", "{who}有{a}元，花了{b}元，还剩多少元？"),
    },
    "multiply": {
        "en": (
            "What is {a} * {b}?",
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Compute {a} * {b}.",
            "{a} boxes hold {b} pens each. How many pens in all?",
        ),
        "zh": ("{a}*{b}等于多少？", "{a}乘{b}是多少？", "计算{a}*{b}。", "{a}个盒子，每盒{b}支笔，一共多少支？"),
    },
    "largest": {
        "en": (
            "Which is the largest: {items}?",
            "Find the maximum of {items}.",
            "What is the biggest number in {items}?",
        ),
        "zh": ("{items}中最大的数是多少？", "找出最大的数：{items}。", "求{items}的最大值。"),
    },
    "smallest": {
        "en": (
            "Which is the smallest: {items}?",
            "Find the minimum of {items}.",
            "What is the lowest number in {items}?",
        ),
        "zh": ("{items}中最小的数是多少？", "找出最小的数：{items}。", "求{items}的最小值。"),
    },
    "ascending": {
        "en": (
            "Sort {items} from small to large.",
            "Sort in ascending order: {items}.",
            "Put {items} in increasing order.",
        ),
        "zh": ("把{items}从小到大排列。", "从小到大排序：{items}。", "将{items}按升序排列。"),
    },
    "descending": {
        "en": (
            "Sort {items} from large to small.",
            "Sort in descending order: {items}.",
            "Put {items} in decreasing order.",
        ),
        "zh": ("把{items}从大到小排列。", "从大到小排序：{items}。", "将{items}按降序排列。"),
    },
    "alphabetical": {
        "en": (
            "Sort {items} alphabetically.",
            "Put {items} in alphabetical order.",
            "Sort in alphabetical order: {items}.",
        ),
        "zh": ("把{items}按字母顺序排列。", "按字母顺序排序：{items}。", "将{items}按字母表排列。"),
    },
    "reverse": {
        "en": (
            "Reverse this list: {items}.",
            "Write {items} backwards.",
            "Put {items} in reverse order.",
            "Say these in reverse: {items}.",
        ),
        "zh": ("把{items}倒过来写。", "倒序排列：{items}。", "将{items}反过来说。"),
    },
    "count": {
        "en": (
            "How many items are in this list: {items}?",
            "Count these words: {items}.",
            "How many words are here: {items}?",
        ),
        "zh": ("这里有几个词：{items}？", "数一数有多少个词：{items}。", "{items}，一共几个词？"),
    },
    "occurrences": {
        "en": (
            "How many times does {item} appear in {items}?",
            "Count each {item} in {items}.",
            "How often is {item} in this list: {items}?",
        ),
        "zh": ("{items}中有几个{item}？", "{item}在{items}中出现几次？", "数一数{items}里{item}的个数。"),
    },
    "day after": {
        "en": (
            "Today is {day}. What day is it in {n} days?",
            "What day comes {n} days after {day}?",
            "It is {day}. Which weekday is it {n} days from now?",
        ),
        "zh": ("今天是{day}，{n}天后是星期几？", "{day}之后{n}天是星期几？", "{day}再过{n}天是星期几？"),
    },
    "day before": {
        "en": (
            "Today is {day}. What day was it {n} days ago?",
            "What day comes {n} days before {day}?",
            "It is {day}. Which weekday was {n} days earlier?",
        ),
        "zh": ("今天是{day}，{n}天前是星期几？", "{day}之前{n}天是星期几？", "{day}往前{n}天是星期几？"),
    },
    "month after": {
        "en": ("Which month comes {n} months after {month}?", "It is {month}. Which month is it in {n} months?"),
        "zh": ("{month}之后{n}个月是几月？", "现在是{month}，再过{n}个月是几月？"),
    },
    "month before": {
        "en": ("Which month comes {n} months before {month}?", "It is {month}. Which month was it {n} months ago?"),
        "zh": ("{month}之前{n}个月是几月？", "现在是{month}，{n}个月前是几月？"),
    },
    "date after": {
        "en": (
            "What is the date {n} days after {date}?",
            "Today is {date}. What is the date in {n} days?",
            "Which date is {n} days later than {date}?",
        ),
        "zh": ("{date}之后{n}天是几月几日？", "今天是{date}，{n}天后是几月几日？", "{date}再过{n}天是哪天？"),
    },
    "date before": {
        "en": (
            "What is the date {n} days before {date}?",
            "Today is {date}. What was the date {n} days ago?",
            "Which date is {n} days earlier than {date}?",
        ),
        "zh": ("{date}之前{n}天是几月几日？", "今天是{date}，{n}天前是几月几日？", "{date}往前{n}天是哪天？"),
    },
    "price": {
        "en": (
            "{costs}. How much do {item} cost?",
            "Prices: {table}. What is the price of {item}?",
            "Price list: {table}. How much are {item}?",
        ),
        "zh": ("{costs}。{item}多少元？", "价格：{table}。{item}的价格是多少？", "价目表：{table}。{item}要多少元？"),
    },
    "priced": {
        "en": (
            "{costs}. What costs {price}?",
            "Prices: {table}. Which item costs {price}?",
            "Price list: {table}. What can I buy for {price}?",
        ),
        "zh": (
            "{costs}。什么卖{price}元？",
            "价格：{table}。哪样东西{price}元？",
            "价目表：{table}。{price}元能买什么？",
        ),
    },
    "older": {
        "en": (
            "{x} is {a} years old and {y} is {b}. Who is older?",
            "{x} is {a} and {y} is {b}. Which one is older?",
            "Who is older, {x} at {a} or {y} at {b}?",
        ),
        "zh": (
            "{x}{a}岁，{y}{b}岁，谁年纪大？",
            "{x}今年{a}岁，{y}今年{b}岁。谁更大？",
            "谁更年长：{a}岁的{x}还是{b}岁的{y}？",
        ),
    },
    "younger": {
        "en": (
            "{x} is {a} years old and {y} is {b}. Who is younger?",
            "{x} is {a} and {y} is {b}. Which one is younger?",
            "Who is younger, {x} at {a} or {y} at {b}?",
        ),
        "zh": (
            "{x}{a}岁，{y}{b}岁，谁年纪小？",
            "{x}今年{a}岁，{y}今年{b}岁。谁更小？",
            "谁更年轻：{a}岁的{x}还是{b}岁的{y}？",
        ),
    },
    "more": {
        "en": (
            "{x} has {a} points and {y} has {b}. Who has more?",
            "{x} scored {a} and {y} scored {b}. Who won?",
        ),
        "zh": ("{x}有{a}分，{y}有{b}分，谁的分多？", "{x}得{a}分，{y}得{b}分。谁赢了？"),
    },
    "position": {
        "en": (
            "What is the {nth} item in {items}?",
            "Which word is {nth} in this list: {items}?",
            "Give the {nth} word of {items}.",
            "Name the {nth} one: {items}.",
        ),
        "zh": ("{items}中{nth}是什么？", "说出{nth}词：{items}。", "{items}，{nth}词是哪个？"),
    },
}


def add(rng: random.Random) -> Instance:
    level = rng.random()
    if level < 0.3:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
    elif level < 0.65:
        b = rng.randint(1, 9)
        a = rng.randint(10, 99 - b)
    else:
        a = rng.randint(10, 89)
        b = rng.randint(10, 99 - a)
    low, high = sorted((a, b))
    if rng.random() < 0.5:
        a, b = b, a
    slips = number_slips(a + b, high - low)
    return Instance("add", (low, high), {"a": a, "b": b, "who": rng.choice(PEOPLE)}, a + b, slips)


def subtract(rng: random.Random) -> Instance:
    level = rng.random()
    a = rng.randint(3, 20) if level < 0.4 else rng.randint(11, 99)
    b = rng.randint(1, min(a - 1, 9)) if level < 0.7 else rng.randint(1, a - 1)
    if a == 2 * b:  # the answer would stand in the question
        b -= 1
    return Instance("subtract", (a, b), {"a": a, "b": b, "who": rng.choice(PEOPLE)}, a - b, number_slips(a - b, a + b))


def multiply(rng: random.Random) -> Instance:
    a = rng.choice((2, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    b = rng.randint(2, 99 // a if a <= 5 else 9)
    low, high = sorted((a, b))
    if rng.random() < 0.5:
        a, b = b, a
    return Instance(
        "multiply", (low, high), {"a": a, "b": b}, a * b, [*number_slips(a * b, a + b), a * b + a, a * b - b]
    )


def numbers(rng: random.Random, least: int = 3, most: int = 5) -> list[int]:
    """Some different numbers: below 10 or below 100."""
    return rng.sample(range(1, 10 if rng.random() < 0.4 else 100), rng.randint(least, most))


def extreme(rng: random.Random) -> Instance:
    items = numbers(rng)
    form = rng.choice(("largest", "smallest"))
    ordered = sorted(items, reverse=form == "largest")
    slips: list[Value] = [ordered[1], ordered[-1], ordered[1], rng.choice(ordered[1:])]
    return Instance(form, tuple(sorted(items)), {"items": items}, ordered[0], slips)


def sort(rng: random.Random) -> Instance:
    form = rng.choice(("ascending", "descending", "alphabetical"))
    items: list[Any] = rng.sample(LETTERS, rng.randint(3, 5)) if form == "alphabetical" else numbers(rng)
    ordered = sorted(items, reverse=form == "descending")
    if items == ordered:
        items = items[1:] + items[:1]
    return Instance(form, tuple(sorted(items)), {"items": items}, ordered, list_slips(rng, ordered, items))


def some(rng: random.Random, size: int) -> list[Any]:
    """Some different things of one kind: words, letters or numbers."""
    kind = rng.random()
    if kind < 0.6:
        return rng.sample(THINGS, size)
    return rng.sample(LETTERS, size) if kind < 0.8 else rng.sample(range(1, 100), size)


def reverse(rng: random.Random) -> Instance:
    items = some(rng, rng.randint(3, 5))
    answer = items[::-1]
    key = min(names(items), names(answer))
    return Instance("reverse", key, {"items": items}, answer, list_slips(rng, answer, items))


def count(rng: random.Random) -> Instance:
    if rng.random() < 0.4:
        n = rng.randint(2, 7)
        items = rng.sample(THINGS, n)
        return Instance("count", names(items), {"items": items}, n, [n - 1, n + 1, n + 2])
    kinds = rng.sample(THINGS if rng.random() < 0.5 else LETTERS, 3)
    n = rng.randint(1, 5)
    items = [kinds[0]] * n + [rng.choice(kinds[1:]) for _ in range(rng.randint(1, 3))]
    rng.shuffle(items)
    slips: list[Value] = [n - 1, n + 1, len(items)] if n > 1 else [n + 1, len(items)]
    return Instance("occurrences", (kinds[0].en, *names(items)), {"items": items, "item": kinds[0]}, n, slips)


def weekday(rng: random.Random) -> Instance:
    day, n, sign = rng.randrange(7), rng.choice((2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 15, 16, 20)), rng.choice((1, -1))
    slips: list[Value] = [WEEKDAYS[(day + sign * n + slip) % 7] for slip in (1, -1, 2, -2)] + [
        WEEKDAYS[(day - sign * n) % 7]
    ]
    form = "day after" if sign == 1 else "day before"
    return Instance(form, (day, sign * n), {"day": WEEKDAYS[day], "n": n}, WEEKDAYS[(day + sign * n) % 7], slips)


def date(rng: random.Random) -> Instance:
    month, sign = rng.randrange(12), rng.choice((1, -1))
    slips: list[Value]
    if rng.random() < 0.4:
        n = rng.randint(2, 11)
        slips = [MONTHS[(month + sign * n + slip) % 12] for slip in (1, -1, 2, -2)] + [MONTHS[(month - sign * n) % 12]]
        form = "month after" if sign == 1 else "month before"
        return Instance(
            form, (month, sign * n), {"month": MONTHS[month], "n": n}, MONTHS[(month + sign * n) % 12], slips
        )
    n = rng.randint(2, 10)
    day = rng.randint(1, 28 - n)
    start, end = (day, day + n) if sign == 1 else (day + n, day)
    slips = [on(month, end + slip) for slip in (1, -1) if 1 <= end + slip <= 28]
    slips += [on((month + 1) % 12, end), on((month - 1) % 12, end), on(month, max(1, start - sign * n))]
    form = "date after" if sign == 1 else "date before"
    return Instance(form, (month, start, end), {"date": on(month, start), "n": n}, on(month, end), slips)


def on(month: int, day: int) -> Word:
    return Word(f"{MONTHS[month].en} {day}", f"{month + 1}月{day}日")


def lookup(rng: random.Random) -> Instance:
    goods = rng.sample(GOODS, rng.randint(2, 4))
    prices = rng.sample(range(1, 20), len(goods))
    asked = rng.randrange(len(goods))
    pairs = list(zip(goods, prices, strict=True))
    fields: dict[str, Value] = {
        "item": goods[asked],
        "price": prices[asked],
        "table": Word(", ".join(f"{w.en} {p}" for w, p in pairs), "，".join(f"{w.zh}{p}元" for w, p in pairs)),
        "costs": Word(", ".join(f"{w.en} cost {p}" for w, p in pairs), "，".join(f"{w.zh}{p}元" for w, p in pairs)),
    }
    key = (*sorted((w.en, p) for w, p in pairs), asked)
    slips: list[Value]
    if rng.random() < 0.5:
        slips = [p for p in prices if p != prices[asked]] + [prices[asked] + 1, prices[asked] - 1]
        return Instance("price", key, fields, prices[asked], slips)
    slips = [w for w in goods if w != goods[asked]]
    return Instance("priced", key, fields, goods[asked], slips)


def compare(rng: random.Random) -> Instance:
    form = rng.choice(("older", "younger", "more"))
    x, y = rng.sample(PEOPLE, 2)
    a, b = rng.sample(range(3, 80), 2)
    winner, loser = (x, y) if (a > b) == (form != "younger") else (y, x)
    return Instance(form, tuple(sorted((a, b))), {"x": x, "y": y, "a": a, "b": b}, winner, [loser])


def position(rng: random.Random) -> Instance:
    items = rng.sample(THINGS, rng.randint(3, 5))
    nth = rng.randrange(len(items))
    slips: list[Value] = [items[i] for i in (nth - 1, nth + 1) if 0 <= i < len(items)] + [
        w for w in items if w != items[nth]
    ]
    return Instance("position", (*names(items), nth), {"items": items, "nth": PLACES[nth]}, items[nth], slips)


FAMILIES: dict[str, Callable[[random.Random], Instance]] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "extreme": extreme,
    "sort": sort,
    "reverse": reverse,
    "count": count,
    "weekday": weekday,
    "date": date,
    "lookup": lookup,
    "compare": compare,
    "position": position,
}


def names(items: list[Any]) -> tuple[str, ...]:
    return tuple(item.en if isinstance(item, Word) else str(item) for item in items)


def number_slips(n: int, other: int) -> list[Value]:
    """Off by one, off by ten, digits swapped, the other operation."""
    slips = [n - 1, n + 1, n - 10, n + 10, n % 10 * 10 + n // 10 if 9 < n < 100 and n % 10 else n + 2, other]
    return [slip for slip in slips if slip > 0 and slip != n]


def list_slips(rng: random.Random, answer: list[Any], items: list[Any]) -> list[Value]:
    """Two neighbours swapped, one missing, one twice, as it was given, the other way round."""
    i = rng.randrange(len(answer) - 1)
    j = rng.randrange(len(answer))
    swapped = [*answer[:i], answer[i + 1], answer[i], *answer[i + 2 :]]
    return [swapped, answer[:j] + answer[j + 1 :], answer[: j + 1] + answer[j:], items, answer[::-1]]


def say(value: Value, language: str) -> str:
    """A value in words: 12 | Friday, 星期五 | 3, 5, 9 or 3、5、9."""
    if isinstance(value, Word):
        return value.zh if language == "zh" else value.en
    if isinstance(value, list):
        return ("、" if language == "zh" else ", ").join(say(item, language) for item in value)
    return str(value)


def ask(instance: Instance, language: str, rng: random.Random) -> str:
    """The instance as a prompt, in one of its wordings."""
    prompt = rng.choice(PROMPTS[instance.form][language]).format(
        **{name: say(value, language) for name, value in instance.fields.items()}
    )
    return prompt[0].upper() + prompt[1:]


def draw(family: str, split: str, rng: random.Random) -> Instance:
    """An instance of the family that belongs to the split."""
    while True:
        instance = FAMILIES[family](rng)
        if split_of(f"{family} {instance.key}", HELD_OUT) == split:
            return instance


def load(split: str, seed: int) -> list[Row]:
    """Rows {"messages": [user, assistant], "task": family, "language": "en" | "zh", "answer"}, families in equal parts."""
    check_split(split)
    rng = random.Random(f"tasks {split} {seed}")
    families = list(FAMILIES)
    rows = []
    for i in range(SIZES[split]):
        family = families[i % len(families)]
        language = "zh" if rng.random() < CHINESE else "en"
        instance = draw(family, split, rng)
        answer = say(instance.answer, language)
        messages = [
            {"role": "user", "content": ask(instance, language, rng)},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages, "task": family, "language": language, "answer": answer})
    rng.shuffle(rows)
    return rows


# Full-width forms (１２，．) to ASCII; the other compatibility characters (², ①) are other numbers and stay.
NARROW = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " ", 0x3002: "."}
COMMA = re.compile(r"\s*[,、]\s*")


def normal(answer: str) -> str:
    """An answer without what does not matter: outer space, a trailing full stop, case, comma spacing, digit width."""
    return COMMA.sub(", ", answer.translate(NARROW).strip().removesuffix(".").rstrip().lower())


def check(row: Row, completion: str) -> bool:
    """Whether the completion is the row's answer, and nothing else beside it."""
    return normal(completion) == normal(row["answer"])
