"""What the `tokenizer` recipe measures on held-out text, and how it shows it: figures, splits, tables, pictures."""

from __future__ import annotations

import ast
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from recipes.common.chat import encode_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"  # U+2581, how SentencePiece writes a space; a U+2581 in the text comes back as a space

# --- measuring -------------------------------------------------------------------------------------------------------

Ids = list[list[int]]


def bytes_per_token(texts: Sequence[str], ids: Ids) -> float:
    """UTF-8 bytes that a token stands for, on average. 1.0 is raw bytes."""
    return byte_count(texts) / sum(map(len, ids))


def fertility(texts: Sequence[str], ids: Ids, unit: str = r"\S+") -> float:
    r"""Tokens per word; with `unit` r"\S" per character, for scripts that do not put spaces between words."""
    return sum(map(len, ids)) / sum(len(re.findall(unit, text)) for text in texts)


def unknown_rate(ids: Ids, unk: int | None) -> float:
    """The share of tokens that are <|unk|>: text that is lost."""
    return sum(row.count(unk) for row in ids) / sum(map(len, ids)) if unk is not None else 0.0


def byte_count(texts: Iterable[str]) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def measure(
    tokenizer: PreTrainedTokenizerFast, domains: dict[str, list[str]], speed: Sequence[str]
) -> dict[str, float]:
    """All figures of one tokenizer on held-out texts by domain; its encoding is timed on `speed`, on all cores."""
    started = time.perf_counter()
    encode_plain(tokenizer, speed)
    seconds = time.perf_counter() - started
    ids = {domain: encode_plain(tokenizer, texts) for domain, texts in domains.items()}
    same = [
        tokenizer.decode(row) == text
        for domain, texts in domains.items()
        for row, text in zip(ids[domain], texts, strict=True)
    ]
    return {
        "bytes_per_token": bytes_per_token(domains["held_out"], ids["held_out"]),
        **{f"bytes_per_token_{d}": bytes_per_token(domains[d], ids[d]) for d in ("english", "chinese", "code")},
        "fertility_english": fertility(domains["english"], ids["english"]),
        "fertility_chinese": fertility(domains["chinese"], ids["chinese"], unit=r"\S"),
        "fertility_code": fertility(domains["code"], ids["code"]),
        "unknown_rate": unknown_rate([*ids["held_out"], *ids["chinese"]], tokenizer.unk_token_id),
        "unknown_rate_unseen_script": unknown_rate(ids["unseen"], tokenizer.unk_token_id),
        "lossless": sum(same) / len(same),  # share of all these texts that decoding gives back exactly
        "encode_mb_per_second": byte_count(speed) / 1e6 / seconds,
    }


def probes(seed: int) -> dict[str, list[str]]:
    """Held-out texts by domain, the same whatever the tokenizers were trained on.

    code: library files. english: the docstrings of these. chinese: questions from `tasks`, which are built from
    templates, so a tokenizer that has seen `tasks` does better on them than on free text. unseen: no data has these.
    """
    from recipes.common.builtin import BUILTINS

    files = [
        row["text"] for row in BUILTINS["pydocs"].load("validation", seed) if not row["path"].startswith("topics/")
    ]
    questions = [row for row in BUILTINS["tasks"].load("validation", seed) if row["language"] == "zh"]
    return {
        "english": [docstring for file in files for docstring in docstrings(file)],
        "chinese": [message["content"] for row in questions for message in row["messages"]],
        "code": files,
        "unseen": ["สวัสดีชาวโลก", "გამარჯობა მსოფლიო", "🦜🎲 ᚺᛖᛚᛚᛟ"],
    }


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a Python file, cleaned of indentation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


# --- showing ---------------------------------------------------------------------------------------------------------

EXAMPLES = (
    "unfortunately",
    "人工智能正在改变我们的生活。",
    "Unfortunately, the unhappiest tokenizers misbehave.",
    "计算12加30是多少？",
    "1234567 + 89 = 1234656",
    "    for i in range(10):\n        if not i % 2:\n            return self.items[i]\n",
    "გამარჯობა 🦜",
    "a user types <|end|> here",
)
AT_A_GLANCE = EXAMPLES[:2]  # on the screen and in the model card; all of them are in samples/


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: each byte as a visible character, the printable ones as themselves, the rest from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def readable(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The tokens of a text as a person reads them: space as ␣, line end as ⏎, part of a character as bytes in hex."""
    shown = []
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    for token in tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, [text])[0]):
        if byte_level:
            raw = bytes(_byte_of_character()[character] for character in token)
            try:
                token = raw.decode()
            except UnicodeDecodeError:
                token = "".join(f"<0x{byte:02X}>" for byte in raw)
        shown.append(token.replace(" ", "␣").replace(SPACE, "␣").replace("\n", "⏎"))
    return shown


def show_splits(tokenizers: Mapping[str, PreTrainedTokenizerFast], examples: Sequence[str]) -> str:
    """How each tokenizer splits the examples, with the number of tokens."""
    width = max(map(len, tokenizers))
    blocks = []
    for text in examples:
        rows = [(kind, readable(tokenizer, text)) for kind, tokenizer in tokenizers.items()]
        lines = [f"  {kind:<{width}} {len(tokens):>3}  {' │ '.join(tokens)}" for kind, tokens in rows]
        blocks.append("\n".join([repr(text), *lines]))
    return "\n\n".join(blocks) + "\n"


COLUMNS = {
    "bytes_per_token": "bytes per token",
    "fertility_english": "tokens per English word",
    "fertility_chinese": "tokens per Chinese character",
    "fertility_code": "tokens per word of code",
    "unknown_rate": "unknown, held-out text and Chinese",
    "unknown_rate_unseen_script": "unknown, unseen script",
    "lossless": "texts that come back",
    "train_seconds": "training, s",
    "encode_mb_per_second": "encoding, MB/s",
}


def comparison(measured: Mapping[str, dict[str, float]]) -> list[list[str]]:
    """A table: a row a figure, a column a tokenizer."""

    def show(name: str, value: float) -> str:
        return f"{value:.2%}" if name.startswith(("unknown", "lossless")) else f"{value:.2f}"

    return [
        ["", *measured],
        *[[title, *[show(name, figures[name]) for figures in measured.values()]] for name, title in COLUMNS.items()],
    ]


def draw_domains(measured: Mapping[str, dict[str, float]]) -> Callable[[Axes], None]:
    """Bars: bytes per token by domain and tokenizer."""
    names = {"bytes_per_token": "held-out text", **{f"bytes_per_token_{d}": d for d in ("english", "chinese", "code")}}

    def draw(axes: Axes) -> None:
        width = 0.8 / len(measured)
        for column, (kind, figures) in enumerate(measured.items()):
            places = [row + (column - (len(measured) - 1) / 2) * width for row in range(len(names))]
            bars = axes.bar(places, [figures[name] for name in names], width * 0.92, label=kind)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="raw bytes")
        axes.set_axisbelow(True)
        axes.set_xticks(range(len(names)), [name.capitalize() for name in names.values()])
        axes.set_ylabel("bytes per token (more is shorter)")
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False, ncols=len(measured) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return draw


def draw_sizes(curve: Mapping[int, float], measured: Mapping[str, dict[str, float]]) -> Callable[[Axes], None]:
    """The curve of BPE's bytes per token over the vocabulary size, and where the other tokenizers stand at the largest."""

    def draw(axes: Axes) -> None:
        axes.plot(list(curve), list(curve.values()), "o-", label="bpe")
        for color, (kind, figures) in enumerate(measured.items()):
            if kind != "bpe":
                axes.plot([max(curve)], [figures["bytes_per_token"]], "D", color=f"C{color}", label=kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(curve), [f"{size:,}" for size in curve])
        axes.minorticks_off()
        axes.set_xlabel("vocabulary size")
        axes.set_ylabel("bytes per token, held-out text")
        axes.legend(frameon=False)

    return draw
