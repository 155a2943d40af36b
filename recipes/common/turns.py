"""The turns of a conversation, in any spelling that data sets use, as {"role", "content"}; order, history, tools.

OpenAI's messages, ShareGPT's from/value, alpaca's instruction and input with a history, hh-rlhf's "\\n\\nHuman: ...".
Whatever is wrong is a BadRow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common.row_values import BadRow, listed, nearest, one_of, shown_type, string, unjson

Message = dict[str, str]

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what a turn may hold beside its content
# Whose turn may come after whose; None is the start.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_messages(value: Any, name: str) -> list[Message]:
    """Turns in any spelling (role/content, ShareGPT's from/value, one turn alone, JSON in a string) as role/content.

    A function call becomes an assistant's turn that holds the call as JSON, an observation a tool's turn. An empty
    system turn is left out. Raises BadRow.
    """
    value = unjson(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{name} is {shown_type(value)}, not a list of turns such as {{role: user, content: ...}}")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        at = f"{name}, turn {number}" if len(value) > 1 else name
        if not isinstance(turn, Mapping):
            raise BadRow(f"{at} is {shown_type(turn)}, not an object such as {{role: user, content: ...}}")
        if turn.get("role") is not None:
            said, content = turn["role"], turn.get("content")
        elif turn.get("from") is not None:
            said, content = turn["from"], turn.get("value")
        else:
            raise BadRow(f"{at} has neither role and content nor from and value; it has {listed(turn)}")
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            near = nearest(str(said), ROLES)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise BadRow(f"{at}: unknown role {said!r}{hint}; known are {', '.join(ROLES)}")
        if role == "assistant" and turn.get("weight") == 0:
            raise BadRow(f"{at} has weight 0, so it is not to be learned, and here every answer is: leave the row out")
        if thought := next((name for name in THOUGHTS if turn.get(name)), None):
            raise BadRow(
                f"{at} has {thought} beside its content, and no chat template is given it here: put it into the content, as the "
                "model is to write it (<think>...</think>), or leave that field out"
            )
        if calls := turn.get("tool_calls"):
            said_too = [content] if isinstance(content, str) and content else []
            content = "\n".join([*said_too, *(call_json(call, at) for call in calls)])
        if isinstance(content, list):  # OpenAI's content parts
            parts = [p.get("text") if isinstance(p, Mapping) else p for p in content]
            if not all(isinstance(p, str) for p in parts):
                raise BadRow(f"{at}: content has parts that are not text")
            content = "".join(parts)  # type: ignore[arg-type]
        if content is None:
            raise BadRow(f"{at} ({said}) has no content")
        content = string(content, f"{at} ({said})")
        if role == "system" and not content.strip():
            continue
        messages.append({"role": role, "content": content})
    if not messages:
        raise BadRow(f"{name} holds no turns")
    return messages


def check_order(messages: Sequence[Message], name: str = "") -> None:
    """Raise BadRow unless turns follow one another as they can (system, user, assistant, ...) and say something."""
    before: str | None = None
    at = f"{name}: " if name else ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = f"after {before}" if before else "first"
            raise BadRow(
                f"{at}roles out of order: turn {number} is {role}, {after}; expected {one_of(FOLLOWS[before])}"
            )
        if not message["content"].strip() and role != "tool":  # a tool may well answer nothing
            if role == "assistant":
                raise BadRow(f"{at}empty answer: turn {number} (assistant) holds no text")
            raise BadRow(f"{at}turn {number} ({role}) is empty")
        before = role


def check_prompt(messages: Sequence[Message]) -> None:
    """Raise BadRow unless `messages` is in order and ends where the assistant is to answer."""
    check_order(messages)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"] if messages else "nobody"
        raise BadRow(f"the prompt must end with the user's turn; it ends with the turn of {last}")


def prompt_turns(row: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    """Turns before the answer, from prompt (+ input, as alpaca) with history and system."""
    value = row[names["prompt"]] if "prompt" in names else ""
    extra = string(row[names["input"]], names["input"]) if "input" in names else ""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = hh_turns(value, names["prompt"])
        if messages[-1] == {"role": "assistant", "content": ""}:  # "...\n\nAssistant:" asks for the answer
            messages.pop()
    elif isinstance(value, str):
        text = "\n".join(part for part in (value, extra) if part.strip())
        if not text:
            raise BadRow(f"{names.get('prompt') or names['input']} is empty")
        messages = [{"role": "user", "content": text}]
    else:
        messages = read_messages(value, names["prompt"])
    history: list[Message] = []
    if "history" in names:
        pairs = unjson(row[names["history"]]) or []
        if not isinstance(pairs, list):
            raise BadRow(f"{names['history']} is {shown_type(pairs)}, not a list of [question, answer] pairs")
        for number, pair in enumerate(pairs, 1):
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
                raise BadRow(f"{names['history']}: entry {number} is not a pair of strings [question, answer]")
            history += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return with_system([*history, *messages], row, names)


def context_turns(row: Mapping[str, Any], names: Mapping[str, str]) -> list[Message] | None:
    """What precedes answers that are to be ranked; None where no column holds it."""
    if "messages" in names and "prompt" not in names:
        return with_system(read_messages(row[names["messages"]], names["messages"]), row, names)
    return prompt_turns(row, names) if {"prompt", "input"} & set(names) else None


def with_system(messages: list[Message], row: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    system = string(row[names["system"]], names["system"]) if "system" in names else ""
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise BadRow(f"two system prompts that differ: one in {names['system']}, one in the first turn")
        return messages
    return [{"role": "system", "content": system}, *messages]


def hh_turns(text: str, name: str) -> list[Message]:
    """The turns of Anthropic's hh-rlhf strings: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    if not turns:
        raise BadRow(f"{name} has no turn that begins with Human: or Assistant:")
    return turns


def call_json(call: Any, at: str) -> str:
    """A tool call as the JSON that the model is to write."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{at}: a tool call without a function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRow(f"{at}: the arguments of the call of {function['name']} are not JSON: {error}") from None
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def tools_json(value: Any) -> str | None:
    """The tools that a conversation may call: a JSON list in a string (TRL's form), None where there are none."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"tools is not JSON: {error}") from None
    if isinstance(value, Mapping):
        value = [value]
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"tools is {shown_type(value)}, not a list of functions")
    return json.dumps(value, ensure_ascii=False)
