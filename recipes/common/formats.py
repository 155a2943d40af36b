"""Any known schema in, one canonical row out: pure functions, no files, no heavy imports (turns.py reads the turns).

    text          {"text": str}
    conversation  {"messages": [{"role": "system|user|assistant|tool", "content": str}, ...]}, the answer last
    preference    {"prompt": messages, "completions": [str, ...], "ranks": [int, ...]}, best first, ties allowed
    prompt        {"prompt": messages}, what precedes the answer
    classification {"text": str, "text_pair": str or None, "label": str}, one text or two and their class
    scored_pair   {"text": str, "text_pair": str, "label": float}, two texts and a number: how alike they are
    pair          {"source": str, "target": str}, a text and what it is to become: a translation, a summary

Words with their tags (`labelling`) are read by recipes/common/labelling.py.

A row is recognised by its columns (alpaca, ShareGPT, messages, prompt/completion, question/answer, SQuAD,
chosen/rejected in all forms, K-way), and what it holds (its native kind) is then turned into the kind that is asked
for, or refused with the reason. Whatever is wrong with a row is a `BadRow` that says what, and how to put it right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from recipes.common.row_values import BadRow, listed, nearest, numbers, one_of, shown, shown_type, string, unjson
from recipes.common.turns import (
    Message,
    check_order,
    check_prompt,
    context_turns,
    hh_turns,
    prompt_turns,
    read_messages,
    tools_json,
    with_system,
)

Kind = Literal[
    "text", "conversation", "preference", "prompt", "classification", "scored_pair", "pair", "image", "image_caption"
]

# Our name of a column -> the names that it goes by in the wild, most telling first.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "sentence", "sentence1", "premise"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "source": ("source", "src"),
    "target": ("target", "tgt", "summary"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query", "problem"),
    "input": ("input", "context"),
    "completion": ("completion", "output", "response", "answer", "solution", "answers"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "completions": ("completions", "responses"),
    "ranks": ("ranks",),
    "scores": ("scores",),
    "image": ("image", "img"),
    "label": ("label", "labels", "fine_label"),
    "caption": ("caption", "text", "captions"),
    "split": (),  # which split a row is of, where a file has all of them: only where data.columns maps it
}
# A row may lack these even where data.columns maps them.
OPTIONAL = frozenset({"input", "system", "history", "tools", "text_pair"})
# Kinds whose rows have no turns, and so no tools; and those that say which tools they have among their own columns.
WITHOUT_TURNS = ("text", "classification", "scored_pair", "pair")
WITH_TOOLS = ("conversation", "preference")

# What a native kind can serve as.
SERVES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "conversation": ("conversation", "prompt"),
    "preference": ("preference", "conversation", "prompt"),
    "prompt": ("prompt",),
    "classification": ("classification", "text"),
    "scored_pair": ("scored_pair",),
    "pair": ("pair", "text"),
    "labelling": ("labelling",),
    "image": ("image",),
    "image_caption": ("image_caption",),
}
HOLDS: dict[str, str] = {
    "text": "plain text",
    "conversation": "conversations",
    "preference": "ranked answers",
    "prompt": "prompts without an answer",
    "classification": "texts with a class",
    "scored_pair": "two texts with a number",
    "pair": "texts with what they become",
    "labelling": "words with their tags",
    "image": "images with labels",
    "image_caption": "images with captions",
}
NEEDS: dict[str, str] = {
    "text": "a column of plain text (text)",
    "conversation": "turns (messages), or a prompt and its answer (prompt, completion)",
    "preference": "two answers (chosen, rejected), or more with their order (prompt, completions, ranks or scores)",
    "prompt": "turns (messages), or a prompt",
    "classification": "a text and its class (text, label), and the second text if there are two (text_pair)",
    "scored_pair": "two texts and a number (text, text_pair, label)",
    "pair": "a text and what it becomes (source, target)",
    "image": "an image and its class (image, label)",
    "image_caption": "an image and its caption (image, caption)",
}
WHY_NOT: dict[tuple[str, str], str] = {
    ("text", "conversation"): "plain text has no turns",
    ("text", "preference"): "plain text has no answers to rank",
    ("text", "prompt"): "plain text has no turns",
    ("conversation", "text"): "its turns have roles, and joined into plain text they would lose whose words are whose",
    ("conversation", "preference"): "with one answer a prompt there is nothing to rank",
    ("preference", "text"): "its turns have roles, and joined into plain text they would lose whose words are whose",
    ("prompt", "text"): "a prompt is a user's turn, not a document",
    ("prompt", "conversation"): "there is no answer to learn",
    ("prompt", "preference"): "there are no answers to rank",
}


def misfit(native: str, kind: str) -> str | None:
    """Why rows of kind `native` cannot serve as `kind`, and what they can serve as; None if they can."""
    if kind in SERVES[native]:
        return None
    reason = WHY_NOT.get((native, kind), f"{HOLDS[kind]} are needed")
    return (
        f"holds {HOLDS[native]}, which cannot serve as {kind!r}: {reason}. It can serve as {one_of(SERVES[native])}. "
        f"For {kind!r} a row needs {NEEDS[kind]}"
    )


def check_columns(columns: Mapping[str, str] | None) -> list[str]:
    """Say what is wrong with `data.columns` (ours -> theirs) before any row is read; [] if nothing is."""
    problems = []
    for ours in columns or {}:
        if ours in ALIASES:
            continue
        renamed = next((name for name, aliases in ALIASES.items() if ours in aliases), None)
        near = renamed or nearest(ours, ALIASES)
        hint = f" (did you mean {near!r}?)" if near else ""
        problems.append(
            f"data.columns: {ours!r} is not a column of ours{hint}. The map goes ours -> theirs; "
            f"ours are {', '.join(ALIASES)}"
        )
    return problems


def canonical_row(row: Mapping[str, Any], kind: Kind, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Turn one raw row into the canonical row of `kind`.

    row: a raw row of any known schema
    columns: ours -> theirs, goes before what the columns' own names say
    A "prompt" row keeps the row's other columns (a reward function reads them), the reference answer among them, under
    the names that they have in the source. "tools" (a JSON list in a string) is kept for every kind but "text".
    Raises BadRow where the row cannot be used.
    """
    present = {name: value for name, value in row.items() if value is not None}
    mapping = tuple(sorted(columns.items())) if columns else ()
    schema, names = _schema(tuple(present), kind, mapping, tuple(row))
    native, result, used = _READERS[schema](present, names)
    if native == "prompt" != kind:  # turns without an answer at their end: only the values could tell
        if any(message["role"] == "assistant" for message in result["prompt"]):
            raise BadRow(
                "the last turn is not the assistant's: end the conversation with its answer, or drop the last turn"
            )
        raise BadRow("no assistant turn: there is no answer to learn")
    result = convert(result, native, kind)
    if kind in WITHOUT_TURNS:
        return result
    if kind == "prompt":
        check_prompt(result["prompt"])
    if "tools" in names and names["tools"] in present and (tools := tools_json(present[names["tools"]])):
        result["tools"] = tools
    if kind == "prompt":
        taken = {names[ours] for ours in (*used, "tools") if ours in names} | set(result)
        result |= {name: value for name, value in present.items() if name not in taken}
    return result


def convert(row: Mapping[str, Any], native: str, kind: str) -> dict[str, Any]:
    """Turn a canonical row of kind `native` into one of `kind`; columns outside the canonical ones are kept.

    A preference row serves as a conversation through its best completion, and as a prompt without any; a pair as a text of
    both, one below the other (a translation so: XLM's objective, Conneau & Lample 2019, https://arxiv.org/abs/1901.07291).
    Raises BadRow where `native` cannot serve as `kind` or nothing precedes the answer.
    """
    if native == kind:
        return dict(row)
    if reason := misfit(native, kind):
        raise BadRow(reason)
    if native == "classification":
        return {"text": row["text"]}
    if native == "pair":
        return {"text": f"{row['source']}\n{row['target']}"}
    others = {name: value for name, value in row.items() if name not in ("messages", "prompt", "completions", "ranks")}
    if native == "preference" and kind == "conversation":
        best = {"role": "assistant", "content": row["completions"][0]}
        return {"messages": [*row["prompt"], best], **others}
    prompt = row["prompt"] if native == "preference" else row["messages"][:-1]
    if not prompt or prompt[-1]["role"] == "system":
        raise BadRow("nothing precedes the answer, so there is no prompt")
    return {"prompt": list(prompt), **others}


def picked_columns(keys: Iterable[str], kind: Kind, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which column of a table is which of ours, for the kinds that need no reading of values (image, image_caption).

    Returns ours -> theirs with exactly the canonical columns of `kind`. Raises BadRow where one is missing.
    """
    wanted = {"image": ("image", "label"), "image_caption": ("image", "caption")}[kind]
    keys = tuple(keys)
    names = _names(keys, tuple(sorted((columns or {}).items())))
    for ours in wanted:
        if ours not in names:
            raise BadRow(_missing([ours], keys, kind))
    return {ours: names[ours] for ours in wanted}


# --- which schema ---------------------------------------------------------------------------------

# The columns of ours that a schema cannot do without; one of several sets. The order in which schemas are tried is in
# _TRIED: ranked answers before one answer, since a preference row often carries a plain answer too.
_SCHEMAS: dict[str, tuple[tuple[str, ...], ...]] = {
    "k_way": (("completions", "ranks"), ("completions", "scores"), ("completions",)),
    "pair": (("chosen", "rejected"),),
    "turns": (("messages",),),
    "answered": (("prompt", "completion"), ("input", "completion")),
    "unanswered": (("prompt",), ("input",)),
    "text": (("text",),),
    "labelled": (("text", "label"),),
    "scored": (("text", "text_pair", "label"),),
    "mapped": (("source", "target"),),
}
_TRIED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "conversation": ("k_way", "pair", "turns", "answered"),
    "preference": ("k_way", "pair"),
    "prompt": ("k_way", "pair", "turns", "answered", "unanswered"),
    "classification": ("labelled",),
    "scored_pair": ("scored",),
    "pair": ("mapped",),
}
_NATIVE = {
    "k_way": "preference",
    "pair": "preference",
    "turns": "conversation",
    "answered": "conversation",
    "unanswered": "prompt",
    "text": "text",
    "labelled": "classification",
    "scored": "scored_pair",
    "mapped": "pair",
}


@lru_cache(maxsize=4096)
def _names(keys: tuple[str, ...], mapping: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Ours -> theirs for the columns that are there: data.columns first, then the known names."""
    names = {ours: theirs for ours, theirs in mapping if theirs in keys}
    free = [key for key in keys if key not in names.values()]
    for ours, aliases in ALIASES.items():
        if ours not in names and ours not in dict(mapping):
            found = next((alias for alias in aliases if alias in free), None)
            # "context" is what a question or an instruction is about only where there is one (Dolly, SQuAD)
            if found is not None and not (found == "context" and not {"instruction", "question"} & set(keys)):
                names[ours] = found
    return names


def _schema(
    keys: tuple[str, ...], kind: str, mapping: tuple[tuple[str, str], ...], columns: tuple[str, ...]
) -> tuple[str, dict[str, str]]:
    """The schema of rows whose non-null columns are `keys` (of all `columns`), and ours -> theirs. Raises BadRow."""
    found = _schema_or_problem(keys, kind, mapping, columns)
    if isinstance(found, str):
        raise BadRow(found)
    return found


@lru_cache(maxsize=4096)
def _schema_or_problem(
    keys: tuple[str, ...], kind: str, mapping: tuple[tuple[str, str], ...], columns: tuple[str, ...]
) -> tuple[str, dict[str, str]] | str:
    for ours, theirs in mapping:
        if theirs not in columns and ours not in OPTIONAL:
            near = nearest(theirs, columns)
            return (
                f"data.columns maps {ours} to {theirs!r}, which is not there"
                f"{f' (did you mean {near!r}?)' if near else ''}. Columns: {listed(columns)}"
            )
    names = _names(keys, mapping)
    mapped = {ours for ours, theirs in mapping if theirs in keys}

    def fits(schema: str) -> bool:
        # Without an order, several completions are only worth an error to somebody who wants a preference.
        forms = _SCHEMAS[schema] if schema != "k_way" or kind == "preference" else _SCHEMAS[schema][:2]
        return any(all(ours in names for ours in form) for form in forms)

    fitting = [schema for schema in _TRIED[kind] if fits(schema)]
    if fitting:  # what the user mapped goes before what was merely recognised
        return max(fitting, key=lambda s: len(mapped & {ours for form in _SCHEMAS[s] for ours in form})), names
    filled = _names(columns, mapping)
    nulls = [theirs for ours, theirs in filled.items() if theirs not in keys and ours not in OPTIONAL]
    if nulls and any(all(o in filled for o in form) for schema in _TRIED[kind] for form in _SCHEMAS[schema]):
        return f"{listed(nulls)} {'is' if len(nulls) == 1 else 'are'} null; for {kind!r} a row needs {NEEDS[kind]}"
    # A half is nearer to what the user meant than another kind is: what is missing comes before what it can serve as.
    halves = {
        "conversation": ("prompt", "completion"),
        "preference": ("chosen", "rejected"),
        "classification": ("text", "label"),
        "scored_pair": ("text", "text_pair", "label"),
        "pair": ("source", "target"),
    }.get(kind, ())
    lacks = [ours for ours in halves if ours not in names]
    if len(lacks) in (0, len(halves)):
        for schema in ("k_way", "pair", "turns", "answered", "text"):
            if all(ours in names for ours in _SCHEMAS[schema][0]) and (reason := misfit(_NATIVE[schema], kind)):
                return reason
        lacks = {
            "text": ["text"],
            "conversation": ["messages", "prompt", "completion"],
            "preference": ["chosen", "rejected", "completions"],
            "prompt": ["messages", "prompt"],
            "classification": ["text", "label"],
            "scored_pair": ["text", "text_pair", "label"],
            "pair": ["source", "target"],
        }[kind]
    return _missing(lacks, columns, kind)


def _missing(lacks: Sequence[str], columns: tuple[str, ...], kind: str) -> str:
    """The text for a column that is not there: what was found, the nearest name, the line that maps it."""
    unknown = [column for column in columns if not any(column in aliases for aliases in ALIASES.values())]
    for ours in lacks:
        for alias in ALIASES[ours]:
            if near := nearest(alias, unknown):
                return (
                    f"no column {alias!r}; nearest is {near!r}. Columns: {listed(columns)}. "
                    f"If {near!r} is it, set data.columns: {{{ours}: {near}}}"
                )
    what = f"no {lacks[0]} column" if len(lacks) == 1 else "no column is one that is known"
    wanted = [
        ours for ours in lacks if ours not in ("messages", "completions")
    ]  # the simpler of the forms as an example
    example = ", ".join(f"{ours}: THEIRS" for ours in wanted)
    return (
        f"{what}. Columns: {listed(columns)}. For {kind!r} a row needs {NEEDS[kind]}; "
        f"say which column is which: data.columns: {{{example}}}"
    )


# --- the schemas ----------------------------------------------------------------------------------
# Each reader: (row without nulls, ours -> theirs) -> (native kind, canonical row, the columns of ours that it used up)


def _read_text(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    return "text", {"text": string(row[names["text"]], names["text"])}, {"text"}


def _read_labelled(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    label, second = row[names["label"]], names.get("text_pair")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRow(f"{names['label']} is {shown_type(label)}, not the name or the number of a class")
    result = {
        "text": string(row[names["text"]], names["text"]),
        "text_pair": string(row[second], second) if second is not None and second in row else None,
        "label": str(label),
    }
    return "classification", result, {"text", "text_pair", "label"}


def _read_scored(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    result: dict[str, Any] = {ours: string(row[names[ours]], names[ours]) for ours in ("text", "text_pair")}
    value = row[names["label"]]
    try:
        result["label"] = float(value)  # a table has numbers as text
    except (TypeError, ValueError):
        result["label"] = math.nan
    if isinstance(value, bool) or not math.isfinite(result["label"]):
        raise BadRow(f"{names['label']} is {shown_type(value)}, not a number")
    return "scored_pair", result, {"text", "text_pair", "label"}


def _read_mapped(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    result = {ours: string(row[names[ours]], names[ours]) for ours in ("source", "target")}
    if not result["target"].strip():
        raise BadRow(f"empty target: {names['target']} holds no text")
    return "pair", result, {"source", "target"}


def _read_turns(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    messages = with_system(read_messages(row[names["messages"]], names["messages"]), row, names)
    check_order(messages)
    used = {"messages", "system"}
    if messages[-1]["role"] == "assistant":
        return "conversation", {"messages": messages}, used
    return "prompt", {"prompt": messages}, used


def _read_answered(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    messages = prompt_turns(row, names)
    answer = row[names["completion"]]
    if row.get("label") is False:  # KTO's rows
        raise BadRow(f"label is false, so {names['completion']} is an answer that was rejected: leave such rows out")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)  # as a table has it
    if isinstance(answer, str):
        messages = [*messages, {"role": "assistant", "content": answer}]
    elif isinstance(answer, Mapping) and "text" in answer and not {"role", "from"} & set(answer):  # SQuAD
        texts = answer["text"]
        if not texts:
            raise BadRow(f"{names['completion']} is empty: this question has no answer")
        text = texts[0] if isinstance(texts, list) else texts
        if not isinstance(text, str):
            raise BadRow(f"{names['completion']}.text is {shown_type(text)}, not text")
        messages = [*messages, {"role": "assistant", "content": text}]
    else:
        messages = [*messages, *read_messages(answer, names["completion"])]
    if not messages[-1]["content"].strip():
        raise BadRow(f"empty answer: {names['completion']} holds no text")
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"{names['completion']} ends with the {messages[-1]['role']}'s turn, not with an answer of the assistant"
        )
    # The answer is left for the reward function of a prompt row.
    return "conversation", {"messages": messages}, {"prompt", "input", "system", "history"}


def _read_unanswered(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    messages = prompt_turns(row, names)
    check_order(messages)
    return "prompt", {"prompt": messages}, {"prompt", "input", "system", "history"}


def _read_pair(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    sides: list[tuple[list[Message], bool]] = []  # (turns, whether they hold the whole conversation)
    context = context_turns(row, names)
    for ours in ("chosen", "rejected"):
        value, name = row[names[ours]], names[ours]
        if isinstance(value, str) and value.startswith("\n\nHuman:"):
            turns, whole = hh_turns(value, name), True
        elif isinstance(value, str):
            turns, whole = [{"role": "assistant", "content": value}], False
        else:
            turns = read_messages(value, name)
            whole = turns[0]["role"] != "assistant"
        if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
            raise BadRow(f"empty answer: {name} holds no text in its last turn")
        sides.append((turns, whole))
    (chosen, whole), (rejected, other_whole) = sides
    if whole != other_whole:
        raise BadRow(
            "one of chosen and rejected is a whole conversation and the other only an answer; make both the same"
        )
    if whole:
        for turns, ours in ((chosen, "chosen"), (rejected, "rejected")):
            check_order(turns, names[ours])
            if turns[-1]["role"] != "assistant":
                raise BadRow(
                    f"{names[ours]} ends with the {turns[-1]['role']}'s turn, not with an answer of the assistant"
                )
        if chosen[:-1] != rejected[:-1]:
            turn = next(
                (i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
                min(len(chosen), len(rejected)) - 1,
            )
            raise BadRow(
                f"chosen and rejected part at turn {turn + 1}, before the last one: they answer different prompts"
            )
        prompt = with_system(chosen[:-1], row, names)
    else:
        if context is None:
            raise BadRow(
                f"chosen and rejected hold answers, and no column holds the prompt. Columns: {listed(row)}; "
                "set data.columns: {prompt: THEIRS}"
            )
        if len(chosen) > 1 or len(rejected) > 1:
            raise BadRow("an answer of several turns cannot be ranked; keep one turn in chosen and rejected")
        prompt = context
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise BadRow("chosen equals rejected: there is nothing to prefer")
    check_prompt(prompt)
    completions = [chosen[-1]["content"], rejected[-1]["content"]]
    used = {"prompt", "input", "system", "history", "messages", "chosen", "rejected"}
    return "preference", {"prompt": prompt, "completions": completions, "ranks": [0, 1]}, used


def _read_k_way(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any], set[str]]:
    name = names["completions"]
    prompt = context_turns(row, names)
    if prompt is None:
        raise BadRow(f"no column holds the prompt. Columns: {listed(row)}; set data.columns: {{prompt: THEIRS}}")
    values = unjson(row[name])
    if not isinstance(values, list):
        raise BadRow(f"{name} is {shown_type(values)}, not a list of answers")
    completions = []
    for i, value in enumerate(values, 1):
        if isinstance(value, str):
            answer = value
        else:
            turns = read_messages(value, f"{name}[{i}]")
            if len(turns) > 1 or turns[0]["role"] != "assistant":
                raise BadRow(f"{name}[{i}] must be one turn of the assistant")
            answer = turns[0]["content"]
        if not answer.strip():
            raise BadRow(f"empty answer: {name}[{i}] holds no text")
        completions.append(answer)
    if len(completions) < 2:
        raise BadRow(f"fewer than 2 ranked completions: {name} holds {len(completions)}")
    if "ranks" in names:
        order = numbers(row[names["ranks"]], names["ranks"], len(completions))
    elif "scores" in names:
        order = [-score for score in numbers(row[names["scores"]], names["scores"], len(completions))]
    else:
        raise BadRow(
            f"{name} without their order: add ranks (0 = best) or scores (more is better), "
            f"or map them with data.columns: {{scores: THEIRS}}. Columns: {listed(row)}"
        )
    levels = sorted(set(order))
    if len(levels) < 2:
        raise BadRow(f"all {len(completions)} completions are tied: there is nothing to prefer")
    place: dict[str, float] = {}
    for answer, rank in zip(completions, order, strict=True):
        if place.setdefault(answer, rank) != rank:
            raise BadRow(f"the same completion has two different places: {shown(answer)}")
    best_first = sorted(range(len(order)), key=order.__getitem__)
    check_prompt(prompt)
    result = {
        "prompt": prompt,
        "completions": [completions[i] for i in best_first],
        "ranks": [levels.index(order[i]) for i in best_first],
    }
    return "preference", result, {"prompt", "input", "system", "history", "messages", "completions", "ranks", "scores"}


_READERS = {
    "text": _read_text,
    "turns": _read_turns,
    "answered": _read_answered,
    "unanswered": _read_unanswered,
    "pair": _read_pair,
    "k_way": _read_k_way,
    "labelled": _read_labelled,
    "scored": _read_scored,
    "mapped": _read_mapped,
}
