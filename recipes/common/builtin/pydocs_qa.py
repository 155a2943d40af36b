"""Questions about the standard library, answered with what its docstrings say.

They are asked of the files of `pydocs`, and a question lies in the split of its file: a model trained on the training
split of either set has not read the held-out answers. `path` names the file that holds the answer, so the same rows
serve retrieval with gold labels.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from recipes.common.builtin import pydocs
from recipes.common.builtin.split import check_split, split_of

Row: TypeAlias = dict[str, Any]
Function = ast.FunctionDef | ast.AsyncFunctionDef

LONGEST, SHORTEST = 300, 20  # characters of an answer taken from a docstring
MOST_OF_A_FILE = 60  # rows; tkinter alone would be a sixth of all questions
LEFT_OUT = {"idlelib", "lib2to3", "distutils", "turtledemo"}  # programs and retired packages, not what people call

QUESTIONS: dict[str, tuple[str, ...]] = {
    "function": ("What does `{name}` do?", "What is the function `{name}` for?", "Explain `{name}` in short."),
    "method": ("What does `{name}` do?", "What is the method `{name}` for?", "Explain `{name}` in short."),
    "class": ("What is `{name}`?", "What is the class `{name}` for?", "Describe the class `{name}`."),
    "module": (
        "What is the module `{name}` for?",
        "What does the module `{name}` offer?",
        "Describe the module `{name}`.",
    ),
    "which": (
        "Which {kind} of `{owner}` fits this description: {text}",
        "Name the {kind} of `{owner}` that is documented as: {text}",
        "{text} Which {kind} of `{owner}` is that?",
    ),
    "parameters": (
        "What are the parameters of `{name}`?",
        "Which arguments does `{name}` take?",
        "List the parameters of `{name}`.",
    ),
    "returns": ("What does `{name}` return?", "What is the return value of `{name}`?"),
    "raises": ("When does `{name}` raise {error}?", "Under what condition is {error} raised by `{name}`?"),
}

MARKUP = (  # reStructuredText and old quoting, to one style
    (re.compile(r":\w+:`~?([^`<>]+)`"), r"`\1`"),
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"`([\w.]+)'"), r"`\1`"),
)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!cf\.)(?<!vs\.)\s+(?=[A-Z`\"'(*])")
UNFIT = re.compile(
    r">>>|->|\bXXX\b|TODO|FIXME|https?:|^See |^Override|^Deprecated|^Private|^Internal|\bdocstring\b|[:,(]$"
)
RAISES = re.compile(
    r"\b[Rr]aises? (?:an? |the )?[`'*]*([A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration|Empty|Full))[`'*]* "
    r"(?:if|when|unless)\b"
)


class Documented(NamedTuple):
    """A module, class, function or method with a docstring."""

    kind: str  # module | class | function | method
    owner: str  # dotted name of what holds it; "" for a module
    name: str  # its full dotted name
    paragraphs: list[str]  # the docstring's, cleaned
    parameters: list[str]  # of a function or method, without self


def load(split: str, seed: int) -> list[Row]:
    """Rows {"messages": [user, assistant], "path", "name"} about the files of one split, in an order given by the seed.

    The seed also picks the wording. Raises UserError when this Python came without its source.
    """
    check_split(split)
    rng = random.Random(f"pydocs_qa {split} {seed}")
    rows = []
    answered: set[str] = set()  # the same sentence about ten things answers none of them well
    for path, text in pydocs.documents():
        if path.endswith(".py") and split_of(path, pydocs.HELD_OUT) == split and is_public(path):
            pairs = []
            for thing in documented(path, text):
                first = summary(thing)
                if first and first not in answered:
                    answered.add(first)
                    pairs += [(thing.name, question, answer) for question, answer in ask(thing, first, rng)]
            rng.shuffle(pairs)
            rows += [row(path, *pair) for pair in pairs[:MOST_OF_A_FILE]]
    rng.shuffle(rows)
    return rows


def row(path: str, name: str, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "path": path, "name": name}


def is_public(path: str) -> bool:
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return parts[0] not in LEFT_OUT and not any(part.startswith("_") for part in parts)


def documented(path: str, text: str) -> Iterator[Documented]:
    """The public things of a source file that have a docstring, in order."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(text)
    yield Documented("module", "", module, paragraphs(tree), [])
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield Documented("function", module, f"{module}.{node.name}", paragraphs(node), parameters(node))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            owner = f"{module}.{node.name}"
            yield Documented("class", module, owner, paragraphs(node), [])
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    name = f"{owner}.{inner.name}"
                    yield Documented("method", owner, name, paragraphs(inner), parameters(inner)[1:])


def parameters(node: Function) -> list[str]:
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in found]


def paragraphs(node: ast.Module | ast.ClassDef | Function) -> list[str]:
    """The docstring's paragraphs of plain prose, each on one line, in one style of quoting."""
    prose = []
    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
        if not any(line.startswith((" ", "\t", "-", "*", "+", ">>>")) for line in paragraph.splitlines()):
            text = " ".join(paragraph.split())
            for pattern, replacement in MARKUP:
                text = pattern.sub(replacement, text)
            prose.append(text)
        else:
            prose.append("")  # keeps what follows from passing for the first paragraph
    return prose


def fit(text: str) -> str:
    """The text as an answer that ends in a full stop, or "" if it is not one."""
    fits = SHORTEST <= len(text) <= LONGEST and text[0].isupper() and text.count(" ") >= 2 and not UNFIT.search(text)
    if not fits or text.count("`") % 2:
        return ""
    return text if text.endswith((".", "!", "?")) else text + "."


def summary(thing: Documented) -> str:
    """The first paragraph, or its first sentence where that is too long; "" if neither is an answer."""
    first = thing.paragraphs[0]
    return fit(first) or fit(SENTENCE_END.split(first)[0])


def ask(thing: Documented, first: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions about one thing with their answers; `first` is its summary."""

    def question(form: str, **fields: str) -> str:
        return rng.choice(QUESTIONS[form]).format(name=thing.name, kind=thing.kind, owner=thing.owner, **fields)

    short = thing.name.rsplit(".", 1)[-1]
    sentence = SENTENCE_END.split(first)[0]
    sentences = [fit(sentence) for paragraph in thing.paragraphs for sentence in SENTENCE_END.split(paragraph)]
    # Half of the things are asked for by name, half by description, unless the description gives the name away.
    if thing.owner and rng.random() < 0.5 and short.lower() not in sentence.lower():
        yield question("which", text=sentence), f"`{thing.name}`"
    else:
        yield question(thing.kind), first
    if len(thing.parameters) > 1 and all(is_told(name, thing) for name in thing.parameters):
        yield question("parameters"), ", ".join(f"`{name}`" for name in thing.parameters)
    if thing.kind in ("function", "method"):
        for sentence in sentences[1:]:
            if re.match(r"Returns? ", sentence):
                yield question("returns"), sentence
                break
    for sentence in sentences:
        if raised := RAISES.search(sentence):
            yield question("raises", error=f"`{raised[1]}`"), sentence
            break


def is_told(name: str, thing: Documented) -> bool:
    """Whether the docstring speaks of the parameter (a one-letter name could be any letter)."""
    return (
        len(name) > 1
        and not name.startswith("_")
        and any(re.search(rf"\b{re.escape(name)}\b", paragraph, re.IGNORECASE) for paragraph in thing.paragraphs)
    )
