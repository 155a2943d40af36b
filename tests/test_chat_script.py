"""`make chat`: streams, keeps and drops the conversation, obeys its commands, stops an answer and not the program."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_chat import make_model, make_tokenizer
from transformers import AutoTokenizer

from recipes.common.adapter_files import fingerprint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "chat.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer, max_position_embeddings=64).eval()


@pytest.fixture
def parrot(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model answers each question with the text that `parrot.answer` holds, token by token."""

    class Parrot:
        answer = "你好 world"
        prompts: list[str] = []
        interrupt_after: int | None = None

        def generate(self, input_ids: Any, streamer: Any, **_: Any) -> None:
            self.prompts.append(tokenizer.decode(input_ids[0]))
            streamer.put(input_ids)
            for i, token in enumerate(tokenizer(self.answer, add_special_tokens=False)["input_ids"]):
                if i == self.interrupt_after:
                    raise KeyboardInterrupt
                streamer.put(torch.tensor([token]))
            streamer.put(torch.tensor([tokenizer.eos_token_id]))
            streamer.end()

    parrot = Parrot()
    parrot.prompts = []
    monkeypatch.setattr(type(model), "generate", lambda self, **options: parrot.generate(**options))
    return parrot


class Pieces(io.StringIO):
    """An output that remembers in which pieces it came."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def talk(model: Any, tokenizer: Any, *lines: str, **options: Any) -> tuple[Any, Pieces]:
    out = Pieces()
    chat = script.Chat(model, tokenizer, out, **{"max_new_tokens": 30, "temperature": None, **options})
    script.converse(chat, script.reader(io.StringIO("".join(line + "\n" for line in lines))))
    return chat, out


def test_the_answer_comes_in_whole_characters_as_it_is_written(parrot: Any, model: Any, tokenizer: Any) -> None:
    _, out = talk(model, tokenizer, "hi")
    assert out.getvalue() == "你好 world\n"
    assert [piece for piece in out.pieces if piece] == [*"你好 world", "\n"]


def test_the_conversation_is_kept_until_reset(parrot: Any, model: Any, tokenizer: Any) -> None:
    parrot.answer = "a"
    chat, out = talk(model, tokenizer, "one", "two", "/reset", "three")
    assert parrot.prompts == [
        "<|user|>one<|end|><|assistant|>",
        "<|user|>one<|end|><|assistant|>a<|end|><|user|>two<|end|><|assistant|>",
        "<|user|>three<|end|><|assistant|>",
    ]
    assert [m["content"] for m in chat.messages] == ["three", "a"]
    assert "(the conversation is forgotten)" in out.getvalue()


def test_quit_leaves_at_once(parrot: Any, model: Any, tokenizer: Any) -> None:
    talk(model, tokenizer, "one", "/quit", "two")
    assert len(parrot.prompts) == 1


def test_help_and_unknown_commands_are_answered_by_the_program(parrot: Any, model: Any, tokenizer: Any) -> None:
    _, out = talk(model, tokenizer, "/help", "/exti", "", "   ")
    assert all(command in out.getvalue() for command in ("/help", "/reset", "/quit"))
    assert "(no command /exti; there are /help, /reset, /quit)" in out.getvalue()
    assert not parrot.prompts
    talk(model, tokenizer, "/usr/bin what is it?")
    assert parrot.prompts == ["<|user|>/usr/bin what is it?<|end|><|assistant|>"]


def test_ctrl_c_stops_the_answer_and_not_the_program(parrot: Any, model: Any, tokenizer: Any) -> None:
    parrot.answer, parrot.interrupt_after = "abcdef", 3
    chat, out = talk(model, tokenizer, "one")
    assert out.getvalue() == "abc\n(stopped)\n"
    assert [m["content"] for m in chat.messages] == ["one", "abc"]
    assert not model.training
    parrot.interrupt_after = None
    chat.ask("two")
    assert "abc<|end|><|user|>two" in parrot.prompts[-1]


def test_ctrl_c_at_the_prompt_drops_the_line(parrot: Any, model: Any, tokenizer: Any) -> None:
    lines: Iterator[Any] = iter([KeyboardInterrupt(), "hi", None])

    def read() -> str | None:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    script.converse(script.Chat(model, tokenizer, out, max_new_tokens=5, temperature=0), read)
    assert "(/quit or Ctrl-D leaves)" in out.getvalue()
    assert len(parrot.prompts) == 1


def test_a_full_context_forgets_its_oldest_turns_and_says_so(parrot: Any, model: Any, tokenizer: Any) -> None:
    parrot.answer = "x" * 8
    _, out = talk(model, tokenizer, *[f"question {n}" for n in range(4)])
    assert (
        "(the conversation has outgrown the model's 64 positions: the oldest 1 turn(s) are forgotten)" in out.getvalue()
    )
    assert all(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= 64 - 16 for prompt in parrot.prompts)
    assert "question 0" not in parrot.prompts[-1]
    assert "question 3" in parrot.prompts[-1]


def test_a_question_that_never_fits_is_refused_and_forgotten(parrot: Any, model: Any, tokenizer: Any) -> None:
    chat, out = talk(model, tokenizer, "x" * 100)
    assert "(too long: 103 tokens with the template, and the model has 64 positions)" in out.getvalue()
    assert chat.messages == []


def test_an_answer_that_does_not_end_is_said_to_be_cut(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _, out = talk(model, tokenizer, "hi", max_new_tokens=4, temperature=0)
    assert out.getvalue().endswith("(stopped after 4 tokens, --max-new-tokens)\n")


def test_temperature_zero_is_greedy_and_the_checkpoints_way_is_the_default(model: Any, tokenizer: Any) -> None:
    def answer(**options: Any) -> str:
        return talk(model, tokenizer, "hi", max_new_tokens=12, **options)[1].getvalue()

    greedy = answer(temperature=0)
    assert answer(temperature=None) == greedy  # it says nothing
    own = model.generation_config
    model.generation_config = type(own)(do_sample=True, temperature=5.0, eos_token_id=tokenizer.eos_token_id)
    try:
        assert answer(temperature=0) == greedy
        torch.manual_seed(0)
        assert answer(temperature=None) != greedy
    finally:
        model.generation_config = own


# --------------------------------------------------------------------------------------------------- which model


def saved(folder: Path, tokenizer: Any, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_furthest_stage_is_taken(tmp_path: Path) -> None:
    with pytest.raises(script.UserError, match="make quickstart"):
        script.newest_stage(tmp_path)
    for recipe in ("llama", "full", "ppo"):
        folder = tmp_path / recipe / "default" / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        found, what = script.newest_stage(tmp_path)
        assert found == folder
        assert what


def test_an_adapter_folder_talks_too(tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(tmp_path / "base", tokenizer, make_model(tokenizer))
    loaded, _ = script.load(str(base))
    adapted = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapter = saved(tmp_path / "adapter", tokenizer, adapted)
    ids = torch.tensor([[10, 11, 12]])
    expected = adapted.eval()(input_ids=ids).logits
    found, _ = script.load(str(adapter))
    assert torch.allclose(found(input_ids=ids).logits, expected, atol=1e-5)
    plain, _ = script.load(str(base))
    assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-5)


def test_an_adapter_whose_tokenizer_has_virtual_tokens_talks(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import save_file

    base, adapter = saved(tmp_path / "base", tokenizer, make_model(tokenizer)), tmp_path / "adapter"
    words = len(tokenizer)
    longer = AutoTokenizer.from_pretrained(base)
    longer.add_tokens(["<|prompt 0|>", "<|prompt 1|>"])
    longer.save_pretrained(adapter)
    save_file({"prompt.numbers": torch.randn(2, 32)}, adapter / "adapter_model.safetensors")
    told = {"method": "prompt_tuning", "settings": {"tokens": 2, "first_id": words}}
    (adapter / "adapter.json").write_text(json.dumps(told))
    (adapter / "base.json").write_text(
        json.dumps({"name": str(base), "fingerprint": fingerprint(make_model(tokenizer))})
    )
    found, _ = script.load(str(adapter))
    ids = torch.tensor([[words, 10, 11]])
    assert not torch.allclose(found(input_ids=ids).logits[0, -1], found(input_ids=ids[:, 1:]).logits[0, -1], atol=1e-5)
    assert found.generation_config.eos_token_id == tokenizer.eos_token_id


def test_an_adapter_of_a_method_that_peft_lacks_talks_on_the_base_that_it_knows(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import save_file

    base, adapter = saved(tmp_path / "base", tokenizer, make_model(tokenizer)), tmp_path / "adapter"
    tokenizer.save_pretrained(adapter)
    plain, _ = script.load(str(base))
    save_file({"model.norm.weight": 2 * plain.model.norm.weight.data}, adapter / "adapter_model.safetensors")
    (adapter / "adapter.json").write_text(json.dumps({"method": "bitfit", "settings": {"add_biases": False}}))
    (adapter / "base.json").write_text(json.dumps({"name": str(base), "fingerprint": fingerprint(plain)}))
    ids = torch.tensor([[10, 11, 12]])
    found, _ = script.load(str(adapter))
    assert torch.allclose(found(input_ids=ids).logits, 2 * plain(input_ids=ids).logits, atol=1e-5)

    plain.model.layers[0].mlp.up_proj.weight.data *= 2  # its base was trained again since
    plain.save_pretrained(base)
    with pytest.raises(script.UserError, match="was trained on another base"):
        script.load(str(adapter))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere/at/all/model"], "no such folder: nowhere/at/all/model"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv: list[str], told: str, capfd: Any, tmp_path: Path) -> None:
    try:
        code = script.main([*argv, "--runs", str(tmp_path)], io.StringIO(""), io.StringIO())
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    err = capfd.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, capfd: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    folder = saved(tmp_path / "bare", tokenizer, make_model(tokenizer))
    assert script.main([str(folder)], io.StringIO("hi\n"), io.StringIO()) == 2
    assert "no chat template" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- the program as it is run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return saved(tmp_path_factory.mktemp("chat"), tokenizer, make_model(tokenizer))


@pytest.mark.slow
def test_a_pipe_gets_answers_and_nothing_else(
    execute: Callable[..., Any], folder: Path, clean_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "--max-new-tokens", "3"],
        input=b"hi\n" + b"\xff\xfe broken bytes\n",
        env=clean_environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("(stopped after 3 tokens") == 2
    assert ">" not in done.stdout.decode().splitlines()[0][:2]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_a_long_answer_and_ctrl_d_leaves(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, str(SCRIPT), str(folder), "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=clean_environment, start_new_session=True
    )
    os.close(follower)
    seen = ""

    def wait_for(text: str, seconds: float = 90) -> None:
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < deadline, f"no {text!r} in {seen!r}"
            seen += os.read(leader, 4096).decode(errors="replace")

    try:
        wait_for("/help lists the commands")
        wait_for("> ")
        seen = ""
        os.write(leader, b"hi\n")
        wait_for("hi")
        deadline = time.monotonic() + 60
        while len(seen) < 12 and time.monotonic() < deadline:  # the answer is on its way
            seen += os.read(leader, 4096).decode(errors="replace")
        os.kill(process.pid, signal.SIGINT)
        wait_for("(stopped")
        wait_for("> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
