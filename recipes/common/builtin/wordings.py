"""The words of `tasks`: what things are called in English and Chinese, and how each form of question is asked."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """Something that has a name in each language."""

    en: str
    zh: str


def words(names: str) -> list[Word]:
    return [Word(*name.split("/")) for name in names.split()]


GOODS = words("apples/苹果 pears/梨 pens/笔 books/书 cups/杯子 eggs/鸡蛋 hats/帽子 bags/包 shoes/鞋 toys/玩具")
PEOPLE = words("Anna/小安 Ben/小本 Tom/小明 Mary/小红 Lucy/小丽 Jack/小刚 Sam/小军 Emma/小华")
WEEKDAYS = words(
    "Monday/星期一 Tuesday/星期二 Wednesday/星期三 Thursday/星期四 Friday/星期五 Saturday/星期六 Sunday/星期日"
)
MONTHS = words(
    """January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月
    October/十月 November/十一月 December/十二月"""
)
PLACES = words("first/第一个 second/第二个 third/第三个 fourth/第四个 fifth/第五个")
LETTERS = [Word(letter, letter) for letter in "abcdefghijklmnopqrstuvwxyz"]

# How each form is asked. The fields are the instance's; an English prompt's first letter is made a capital.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "add": {
        "en": ("What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"),
        "zh": ("{a}+{b}等于多少？", "{a}加{b}是多少？"),
    },
    "subtract": {
        "en": ("What is {a} - {b}?", "Take {b} from {a}.", "What is {a} minus {b}?"),
        "zh": ("{a}-{b}等于多少？", "{a}减{b}是多少？"),
    },
    "multiply": {
        "en": ("What is {a} * {b}?", "Multiply {a} by {b}.", "What is {a} times {b}?"),
        "zh": ("{a}*{b}等于多少？", "{a}乘{b}是多少？"),
    },
    "largest": {
        "en": ("Which is the largest: {items}?", "Find the largest of {items}.", "Give the maximum of {items}."),
        "zh": ("{items}中最大的是多少？", "找出最大的数：{items}。"),
    },
    "smallest": {
        "en": ("Which is the smallest: {items}?", "Find the smallest of {items}.", "Give the minimum of {items}."),
        "zh": ("{items}中最小的是多少？", "找出最小的数：{items}。"),
    },
    "ascending": {
        "en": ("Sort {items} from small to large.", "Put in increasing order: {items}.", "Sort upwards: {items}."),
        "zh": ("把{items}从小到大排列。", "从小到大排序：{items}。"),
    },
    "descending": {
        "en": ("Sort {items} from large to small.", "Put in decreasing order: {items}.", "Sort downwards: {items}."),
        "zh": ("把{items}从大到小排列。", "从大到小排序：{items}。"),
    },
    "reverse": {
        "en": ("Reverse this list: {items}.", "Write {items} backwards.", "Say in reverse: {items}."),
        "zh": ("把{items}倒过来写。", "倒序排列：{items}。"),
    },
    "count": {
        "en": ("How many items are in {items}?", "Count these: {items}.", "How many are there: {items}?"),
        "zh": ("{items}一共有几个？", "数一数有几个：{items}。"),
    },
    "occurrences": {
        "en": (
            "How many times is {item} in {items}?",
            "Count each {item} in {items}.",
            "How often is {item} in {items}?",
        ),
        "zh": ("{items}中有几个{item}？", "数一数{item}的个数：{items}。"),
    },
    "day after": {
        "en": ("What day is {n} days after {day}?", "Today is {day}. What day is it in {n} days?"),
        "zh": ("{day}之后{n}天是星期几？", "今天是{day}，{n}天后是星期几？"),
    },
    "day before": {
        "en": ("What day is {n} days before {day}?", "Today is {day}. What day was it {n} days ago?"),
        "zh": ("{day}之前{n}天是星期几？", "今天是{day}，{n}天前是星期几？"),
    },
    "date after": {
        "en": ("What is {n} days after {date}?", "Today is {date}. What date is it in {n} days?"),
        "zh": ("{date}之后{n}天是几号？", "今天是{date}，{n}天后是几号？"),
    },
    "date before": {
        "en": ("What is {n} days before {date}?", "Today is {date}. What date was it {n} days ago?"),
        "zh": ("{date}之前{n}天是几号？", "今天是{date}，{n}天前是几号？"),
    },
    "price": {
        "en": ("{costs}. How much do {item} cost?", "Prices: {table}. What do {item} cost?"),
        "zh": ("{table}。{item}多少元？", "价格：{table}。{item}要多少元？"),
    },
    "priced": {
        "en": ("{costs}. What costs {price}?", "Prices: {table}. Which cost {price}?"),
        "zh": ("{table}。什么卖{price}元？", "价格：{table}。哪样卖{price}元？"),
    },
    "older": {
        "en": ("{x} is {a} and {y} is {b}. Who is older?", "Who is older, {x} at {a} or {y} at {b}?"),
        "zh": ("{x}{a}岁，{y}{b}岁，谁更大？", "谁更大，{a}岁的{x}还是{b}岁的{y}？"),
    },
    "younger": {
        "en": ("{x} is {a} and {y} is {b}. Who is younger?", "Who is younger, {x} at {a} or {y} at {b}?"),
        "zh": ("{x}{a}岁，{y}{b}岁，谁更小？", "谁更小，{a}岁的{x}还是{b}岁的{y}？"),
    },
    "position": {
        "en": ("What is the {nth} item in {items}?", "Which is the {nth} of {items}?", "Name the {nth} one: {items}."),
        "zh": ("{items}中{nth}是什么？", "说出{nth}：{items}。"),
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
