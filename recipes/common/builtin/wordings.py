"""The words of `tasks`: what things are called in English and Chinese, and how each form of question is asked."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """Something that has a name in each language."""

    en: str
    zh: str


def words(names: str) -> list[Word]:
    return [Word(*name.split("/")) for name in names.split()]


# The columns of three tables, in the order in which each table has them.
GOODS = words("pens/笔 books/书 eggs/蛋")
TEAMS = words("Anna/小安 Ben/小本 Tom/小明"), words("Mary/小红 Jack/小刚 Sam/小军")
MONTHS = words(
    """January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月
    October/十月 November/十一月 December/十二月"""
)
PLACES = words("first/第一个 second/第二个 third/第三个 fourth/第四个 fifth/第五个")

# How each form is asked. The fields are the instance's; what is asked about comes last in every wording, so that it lies
# at the same distance from the answer. An English prompt's first letter is made a capital.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "add": {
        "en": ("What is {a} + {b}?", "Compute {a} + {b}.", "Add up: {a} + {b}."),
        "zh": ("计算{a} + {b}。", "求和：{a} + {b}。"),
    },
    "subtract": {
        "en": ("What is {a} - {b}?", "Compute {a} - {b}.", "Subtract: {a} - {b}."),
        "zh": ("计算{a} - {b}。", "求差：{a} - {b}。"),
    },
    "multiply": {
        "en": ("What is {a} * {b}?", "Compute {a} * {b}.", "Multiply: {a} * {b}."),
        "zh": ("计算{a} * {b}。", "求积：{a} * {b}。"),
    },
    "largest": {
        "en": ("Which is the largest: {items}?", "Find the largest: {items}.", "Give the maximum of {items}."),
        "zh": ("哪个最大：{items}？", "找出最大的数：{items}。"),
    },
    "smallest": {
        "en": ("Which is the smallest: {items}?", "Find the smallest: {items}.", "Give the minimum of {items}."),
        "zh": ("哪个最小：{items}？", "找出最小的数：{items}。"),
    },
    "ascending": {
        "en": ("Sort from small to large: {items}.", "Sort in ascending order: {items}.", "Sort upwards: {items}."),
        "zh": ("从小到大排列：{items}。", "按升序排序：{items}。"),
    },
    "descending": {
        "en": ("Sort from large to small: {items}.", "Sort in descending order: {items}.", "Sort downwards: {items}."),
        "zh": ("从大到小排列：{items}。", "按降序排序：{items}。"),
    },
    "reverse": {
        "en": ("Reverse this list: {items}.", "Write backwards: {items}.", "Say in reverse: {items}."),
        "zh": ("倒过来写：{items}。", "倒序排列：{items}。"),
    },
    "count": {
        "en": ("How many numbers are in {items}?", "Count these numbers: {items}.", "How many are here: {items}?"),
        "zh": ("一共有几个数：{items}？", "数一数有几个：{items}。"),
    },
    "occurrences": {
        "en": ("How many times is {item} in {items}?", "How often is {item} in {items}?", "Count {item} in {items}."),
        "zh": ("有几个{item}：{items}？", "数一数{item}：{items}。"),
    },
    "month of": {
        "en": ("Which month is it on {date}?", "Name the month of {date}."),
        "zh": ("说出月份：{date}。", "这是几月：{date}？"),
    },
    "day of": {
        "en": ("Which day of the month is it on {date}?", "Name the day of {date}."),
        "zh": ("说出是几号：{date}。", "这是几号：{date}？"),
    },
    "year of": {
        "en": ("Which year is it on {date}?", "Name the year of {date}."),
        "zh": ("说出年份：{date}。", "这是哪年：{date}？"),
    },
    "price": {
        "en": ("Prices: {table}. How much: {item}?", "Price list: {table}. What price: {item}?"),
        "zh": ("价格：{table}。多少元：{item}？", "价目表：{table}。要多少元：{item}？"),
    },
    "most": {
        "en": ("Who has most: {points}?", "Who has the largest number: {points}?"),
        "zh": ("谁的最多：{points}？", "谁的数最大：{points}？"),
    },
    "fewest": {
        "en": ("Who has fewest: {points}?", "Who has the smallest number: {points}?"),
        "zh": ("谁的最少：{points}？", "谁的数最小：{points}？"),
    },
    "position": {
        "en": ("Which is the {nth} of {items}?", "Give the {nth} of {items}.", "What is the {nth} of {items}?"),
        "zh": ("{nth}是什么：{items}？", "说出{nth}数：{items}。"),
    },
}

# Answers of the wrong form. The slip is a wrong value of the right form.
RAMBLINGS = {
    "en": (
        "I think it is {answer}.",
        "{answer} or {slip}",
        "The answer is {answer}, or maybe {slip}.",
        "{answer} {answer} {answer}",
        "{prompt} {answer}",
        "First {slip}, then {answer}.",
    ),
    "zh": (
        "我觉得是{answer}。",
        "{answer}或者{slip}",
        "答案是{answer}，也可能是{slip}。",
        "{answer} {answer} {answer}",
        "{prompt}{answer}",
        "先是{slip}，然后是{answer}。",
    ),
}
REFUSALS = {
    "en": ("I don't know.", "?", "...", "I cannot answer that.", "Sorry."),
    "zh": ("我不知道。", "？", "……", "我无法回答。", "对不起。"),
}
