"""Talk to a model in the terminal: the words appear as they are written, and the conversation is kept.

    make chat                                   # what the quickstart made: after PPO, else SFT, else pretraining
    make chat MODEL=runs/lora/default/adapter   # any local folder (adapters too) or hub id
    make chat ARGS='--temperature 1'
    echo 'What is 17 + 25?' | make chat         # one line, one answer

Ctrl-C stops an answer, not the program. /help lists the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common.launch import environment_defaults  # noqa: E402

environment_defaults()

from recipes.common.errors import UserError  # noqa: E402
from recipes.common.generation import (  # noqa: E402
    decode,
    inference,
    model_positions,
    pad_id,
    plain_choices,
    prompt_ids,
    stop_ids,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = {
    "ppo": "PPO",
    "full": "SFT",
    "lora": "SFT, LoRA",
    "llama": "pretrained only: it continues text, it does not answer",
}
COMMANDS = {"/help": "this list", "/reset": "forget the conversation", "/quit": "leave (or Ctrl-D)"}


def newest_stage(runs: Path) -> tuple[Path, str]:
    """The furthest stage of the quickstart that is there, and what it is. Raises UserError when there is none."""
    for recipe, what in STAGES.items():
        folder = runs / recipe / "default" / "model"
        if (folder / "config.json").exists():
            return folder, what
    raise UserError(
        f"nothing to talk to below {runs}: `make quickstart` makes a model, and `make chat MODEL=<folder or hub id>` "
        "takes any other"
    )


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder, an adapter folder or a hub id, on the GPU if there is one. Raises UserError if it cannot chat."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from recipes.common.adapter_files import base_of, is_adapter, load_adapter
    from recipes.common.machine import has_gpu
    from recipes.common.models import load_model, load_tokenizer, settle_stops
    from recipes.common.run_folder import RunFolder
    from recipes.common.sections import Model

    disable_progress_bar()
    set_verbosity_error()
    section, nowhere = Model(name=name, dtype="auto"), RunFolder(Path("runs/chat"), recipe="chat", dry=True)
    tokenizer = load_tokenizer(section, nowhere, chat=True)
    if is_adapter(name):
        if (base := base_of(Path(name))) is None:
            raise UserError(f"{name} does not say which model it was trained on (base.json, adapter_config.json)")
        # the adapter's tokenizer may have virtual tokens, for which the base has no rows
        model: Any = load_adapter(load_model(Model(name=base, dtype="auto"), None, nowhere), name)
        settle_stops(model, tokenizer, nowhere)
    else:
        model = load_model(section, tokenizer, nowhere)
    return model.to("cuda" if has_gpu() else "cpu").eval(), tokenizer


class Words:
    """A transformers streamer: hands text on as soon as its last character is whole, keeps all ids of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int], show: Callable[[str], None]):
        self.tokenizer, self.stops, self.show = tokenizer, stops, show
        self.prompt_seen = self.ended = False
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """New token ids; the first call brings the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.ended = token in self.stops
            if not self.ended:
                self.ids.append(token)
        self._show(decode(self.tokenizer, self.ids), whole="\ufffd")

    def end(self) -> None:
        """The answer is finished: show what is left, incomplete characters too."""
        self._show(decode(self.tokenizer, self.ids))

    def _show(self, text: str, whole: str | None = None) -> None:
        if whole:
            text = text.rstrip(whole)  # bytes of a character whose other bytes are still to come
        if text.startswith(self.text) and len(text) > len(self.text):
            self.show(text[len(self.text) :])
            self.text = text


class Chat:
    """A conversation with a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: TextIO,
        *,
        max_new_tokens: int,
        temperature: float | None,
    ):
        self.model, self.tokenizer, self.out = model, tokenizer, out
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.stops = stop_ids(model, tokenizer)
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def note(self, text: str) -> None:
        """Something that the program says, not the model."""
        self.say(f"({text})")

    def ask(self, question: str) -> None:
        """Put a question, show the answer as it comes, remember both."""
        import torch

        self.messages.append({"role": "user", "content": question})
        prompt = self._prompt_that_fits()
        if prompt is None:
            self.messages.pop()
            return
        positions = model_positions(self.model)
        room = self.max_new_tokens if positions is None else min(self.max_new_tokens, positions - len(prompt))
        words = Words(self.tokenizer, self.stops, lambda text: self.say(text, end=""))
        ids = torch.tensor([prompt], device=self.model.device)
        try:
            with inference(self.model) as base:
                self._generate(base, ids, words, room)
            self.say("")
            if not words.ended:
                self.note(
                    f"stopped after {room} tokens" + (", --max-new-tokens" if room == self.max_new_tokens else "")
                )
        except KeyboardInterrupt:
            words.end()
            self.say("")
            self.note("stopped")
        self.messages.append({"role": "assistant", "content": words.text})

    def _generate(self, base: Any, ids: torch.Tensor, words: Words, room: int) -> None:
        import torch
        from transformers import GenerationConfig

        fixed = {"max_new_tokens": room, "eos_token_id": self.stops, "pad_token_id": pad_id(self.tokenizer)}
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": words}
        if self.temperature is None:  # as the checkpoint's authors would have it; greedy where they say nothing
            base.generate(**asked, **fixed)
            return
        how = (
            {"do_sample": False}
            if self.temperature == 0
            else {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        )
        with plain_choices(base):
            base.generate(**asked, generation_config=GenerationConfig(**fixed, **how))

    def _prompt_that_fits(self) -> list[int] | None:
        """The conversation as token ids, without its oldest turns if the model has no room for all of it."""
        positions = model_positions(self.model)
        dropped, kept = 0, self.messages
        while True:
            (prompt,) = prompt_ids(self.tokenizer, [kept])
            if positions is None or len(prompt) + min(self.max_new_tokens, positions // 4) <= positions:
                break
            if len(kept) == 1:  # nothing is forgotten for a question that cannot be asked
                self.note(f"too long: {len(prompt)} tokens with the template, and the model has {positions} positions")
                return None
            kept = kept[2:]
            dropped += 1
        self.messages = kept
        if dropped:
            self.note(
                f"the conversation has outgrown the model's {positions} positions: the oldest {dropped} turn(s) are "
                "forgotten"
            )
        return prompt

    def obey(self, command: str) -> bool:
        """Do what a line beginning with / says; False to leave."""
        if command == "/reset":
            self.messages.clear()
            self.note("the conversation is forgotten")
        elif command == "/help":
            self.say("\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items()))
        elif command != "/quit":
            self.note(f"no command {command}; there are {', '.join(COMMANDS)}")
        return command != "/quit"


def converse(chat: Chat, read: Callable[[], str | None]) -> None:
    """Line by line until /quit or the end of the input (None)."""
    while True:
        try:
            line = read()
        except KeyboardInterrupt:  # at the prompt, as in a shell: the line is dropped
            chat.say("")
            chat.note("/quit or Ctrl-D leaves")
            continue
        if line is None:
            return
        line = line.strip()
        if line.startswith("/") and " " not in line:
            if not chat.obey(line):
                return
        elif line:
            chat.ask(line)


def reader(stdin: TextIO) -> Callable[[], str | None]:
    """Reads a line: with a prompt and line editing at a terminal, plainly from a pipe."""
    if not stdin.isatty():
        return lambda: stdin.readline() or None
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401  # arrow keys and history in input()

    def read() -> str | None:
        try:
            return input("\n> ")
        except EOFError:
            print()
            return None

    return read


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model", nargs="?", help="folder (a model's or an adapter's) or hub id; default: the newest quickstart stage"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: the likeliest word each time; 1: as often as the model believes; default: the checkpoint's own way",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if parsed.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if parsed.temperature is not None and not parsed.temperature >= 0:  # nor nan
        parser.error("--temperature must be at least 0")
    return parsed


def main(argv: list[str], stdin: TextIO, stdout: TextIO) -> int:
    """Exit code: 0, or 2 when there is no such model."""
    asked = arguments(argv)
    try:
        name, what = (asked.model, "") if asked.model else newest_stage(asked.runs)
        model, tokenizer = load(str(name))
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    if hasattr(stdin, "reconfigure"):
        stdin.reconfigure(encoding="utf-8", errors="replace")
    if hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="replace")  # a terminal of few characters
    chat = Chat(model, tokenizer, stdout, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature)
    if stdin.isatty():
        size = sum(p.numel() for p in model.parameters())
        chat.say(f"{name}{f' ({what})' if what else ''}: {size / 1e6:,.1f} million parameters, on {model.device.type}")
        chat.say("/help lists the commands, Ctrl-C stops an answer")
    converse(chat, reader(stdin))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], sys.stdin, sys.stdout))
    except KeyboardInterrupt:  # while the model was loading
        sys.exit(130)
