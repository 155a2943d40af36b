"""The words of `tasks`: what things are called in English and Chinese, and how each form of question is asked."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """Something that has a name in each language."""

    en: str
    zh: str


def words(names: str) -> list[Word]:
    return [Word(*name.split("/")) for name in names.split()]


THINGS = words(
    """apple/苹果 pear/梨 plum/李子 lemon/柠檬 peach/桃子 grape/葡萄 cat/猫 dog/狗 fish/鱼 bird/鸟 horse/马 cow/牛
    pig/猪 sheep/羊 duck/鸭 frog/青蛙 pen/笔 book/书 cup/杯子 lamp/灯 door/门 tree/树 moon/月亮 star/星星 sun/太阳
    rain/雨 snow/雪 wind/风 rice/米 milk/牛奶 bread/面包 tea/茶 salt/盐 egg/鸡蛋 red/红 blue/蓝 gold/金 stone/石头
    river/河 hat/帽子"""
)
GOODS = words(
    """apples/苹果 pears/梨 plums/李子 lemons/柠檬 peaches/桃子 pens/笔 books/书 cups/杯子 eggs/鸡蛋 cakes/蛋糕
    hats/帽子 bags/包 lamps/灯 shoes/鞋 balls/球 toys/玩具"""
)
PEOPLE = words("Anna/小安 Ben/小本 Tom/小明 Mary/小红 Lucy/小丽 Jack/小刚 Lily/小美 Sam/小军 Emma/小华 Paul/小强")
WEEKDAYS = words(
    "Monday/星期一 Tuesday/星期二 Wednesday/星期三 Thursday/星期四 Friday/星期五 Saturday/星期六 Sunday/星期日"
)
MONTHS = words(
    """January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月
    October/十月 November/十一月 December/十二月"""
)
PLACES = words("first/第一个 second/第二个 third/第三个 fourth/第四个 fifth/第五个")
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
            "Which is the {nth} in this list: {items}?",
            "Give the {nth} item of {items}.",
            "Name the {nth} one: {items}.",
        ),
        "zh": ("{items}中{nth}是什么？", "说出{nth}：{items}。", "{items}，{nth}是哪个？"),
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
