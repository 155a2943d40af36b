"""The tokenizers: exact merges, digits, what is lost, equality with the sentencepiece library, what is saved."""

from __future__ import annotations

import json
import random
import string
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.common import tokenizer_figures
from recipes.common.chat import CHAT_TEMPLATE, encode_plain, special_tokens
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.pretraining import tokenizer as recipe

KINDS = ["bpe", "wordpiece", "unigram", "sentencepiece"]
SIZE = 1024
UNSEEN = "გამარჯობა ᚺᛖᛚᛚᛟ 🦜"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "计算 12+30 = ?\n\tNow <|end|>"},
    {"role": "assistant", "content": "the answer: 42\n"},
]


def library(*names: str) -> str:
    return "".join((Path(sysconfig.get_path("stdlib")) / name).read_text() for name in names)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    code = library("argparse.py", "ast.py", "textwrap.py", "json/decoder.py")
    return [
        code,
        string.printable * 20,
        *["计算12加30等于多少？", "苹果、梨、桃子中最大的是哪个？", "今天是星期一，明天是星期几？"] * 20,
    ]


@pytest.fixture(scope="module")
def held_out() -> str:
    return library("heapq.py", "csv.py")


@pytest.fixture(scope="module")
def tokenizers(texts) -> dict[str, PreTrainedTokenizerFast]:
    chosen = recipe.Tokenizer(vocabulary_size=SIZE)
    return {kind: recipe.train(kind, texts, chosen) for kind in KINDS}


@pytest.fixture(scope="module")
def bpe(tokenizers) -> PreTrainedTokenizerFast:
    return tokenizers["bpe"]


# --- BPE -------------------------------------------------------------------------------------------------------------


def merges_of(backend) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def test_bpe_merges_by_hand():
    """Sennrich, Haddow, Birch 2016, algorithm 1's words and counts; ties go to the pair of smaller ids (a before b)."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    least = 256 + len(special_tokens())
    assert merges_of(recipe.train_bpe(words, least + 13)) == [
        ("e", "s"),  # newest 6 + widest 3 = 9, as often as (s, t)
        ("es", "t"),  # 9
        ("l", "o"),  # low 5 + lower 2 = 7
        ("lo", "w"),  # 7
        ("e", "w"),  # 6, as often as (n, e) and (w, est)
        ("n", "ew"),  # 6, as often as (ew, est); n has the smaller id
        ("new", "est"),
        ("d", "est"),  # 3
        ("i", "dest"),
        ("w", "idest"),
        ("e", "r"),  # 2
        ("low", "er"),
    ]


def reference_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Algorithm 1 of the paper: count all pairs, join the most frequent one, again. Ties: smaller ids first."""
    ids = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {tuple(word): n for word, n in Counter(words).items()}
    merges = []
    for _ in range(count):
        pairs: Counter = Counter()
        for word, n in vocabulary.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], -ids[pair[0]], -ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        joined = {}
        for word, n in vocabulary.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append("".join(best))
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            joined[tuple(out)] = n
        vocabulary = joined
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_bpe_merges_are_the_papers_algorithm(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcde", k=rng.randint(1, 7))) for _ in range(300)]
    size = 256 + len(special_tokens()) + 60
    assert merges_of(recipe.train_bpe(words, size)) == reference_merges(words, 60)


def test_bpe_ids(bpe):
    assert bpe.convert_ids_to_tokens(range(6)) == special_tokens()
    assert sorted(bpe.convert_ids_to_tokens(range(6, 262))) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(bpe) == SIZE
    assert bpe.unk_token is None and bpe.bos_token is None
    assert (bpe.pad_token_id, bpe.eos_token_id) == (0, 1)


def test_a_smaller_bpe_is_the_one_trained_at_that_size(texts, bpe, held_out):
    cut = recipe.smaller_bpe(bpe, 600)
    trained = recipe.train("bpe", texts, recipe.Tokenizer(vocabulary_size=600))
    assert cut.get_vocab() == trained.get_vocab()
    assert merges_of(cut.backend_tokenizer) == merges_of(trained.backend_tokenizer)
    assert encode_plain(cut, [held_out]) == encode_plain(trained, [held_out])


@pytest.mark.parametrize("text", ["1234567", "x=3.14159e10", "2024年10月", "a1b22c333", " 42 ", "0x7FFF", "1 000"])
def test_every_digit_is_its_own_token(tokenizers, text):
    for kind in ("bpe", "unigram", "sentencepiece"):
        tokens = tokenizer_figures.readable(tokenizers[kind], text)
        digits = [token for token in tokens if set(token) & set(string.digits) and not token.startswith("<0x")]
        assert digits == [character for character in text if character in string.digits], kind


def test_a_trained_bpe_has_no_token_with_a_digit_in_it(bpe):
    with_digit = [token for token in bpe.get_vocab() if any(character.isdecimal() for character in token)]
    assert sorted(with_digit) == list("0123456789")


def test_python_lines(bpe):
    """A line's end takes the indentation but for its last space, so a word is the same token wherever it stands."""
    source = "def f(self):\n        return self\n\n    return 1\n"
    assert tokenizer_figures.readable(bpe, source) == [
        "def", "␣f", "(self", "):⏎␣␣␣␣␣␣␣", "␣return", "␣self", "⏎⏎␣␣␣", "␣return", "␣", "1", "⏎",
    ]  # fmt: skip


def test_chinese_punctuation_stands_alone(bpe):
    """Otherwise an item is one token at the start of a list and another one after a comma."""
    tokens = tokenizer_figures.readable(bpe, "苹果、梨、桃子、苹果")
    assert [token for token in tokens if "、" in token] == ["、"] * 3


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_bpe_gives_back_any_text(bpe, text):
    (ids,) = encode_plain(bpe, [text])
    assert bpe.decode(ids) == text
    assert all(i >= len(special_tokens()) for i in ids)


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "".join(map(chr, range(256))),
        "\r\n\r\n \t\n\x00\x1b[0m",
        "e\u0301 \u202eabc\u202c \ufeff",
        "▁a▁ ▁",
        " " * 99,
        "\U0010ffff\ufffd",
    ],
)
def test_bpe_gives_back_odd_text(bpe, text):
    assert bpe.decode(encode_plain(bpe, [text])[0]) == text


# --- unknowns and what is lost ---------------------------------------------------------------------------------------


def unknown_rate(tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    return tokenizer_figures.unknown_rate(encode_plain(tokenizer, [text]), tokenizer.unk_token_id)


def comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    return tokenizer.decode(encode_plain(tokenizer, [text])[0]) == text


def test_byte_fallback_knows_every_text(tokenizers):
    for kind in ("bpe", "sentencepiece"):
        assert unknown_rate(tokenizers[kind], UNSEEN) == 0, kind
        assert comes_back(tokenizers[kind], UNSEEN), kind
    tokens = tokenizers["sentencepiece"].tokenize("🦜")
    assert tokens == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x9C>"]


def test_characters_without_bytes_are_unknown(tokenizers):
    for kind in ("wordpiece", "unigram"):
        assert unknown_rate(tokenizers[kind], UNSEEN) > 0.3, kind
        assert unknown_rate(tokenizers[kind], "the answer is 12") == 0, kind
    assert tokenizer_figures.readable(tokenizers["wordpiece"], "a გამარჯობა b") == ["a", "<|unk|>", "b"]


def test_what_comes_back(tokenizers, held_out):
    code = "def f(x):\n\n        return  x\n"
    for kind in ("bpe", "unigram", "sentencepiece"):
        assert comes_back(tokenizers[kind], code), kind
    for kind in ("bpe", "sentencepiece"):
        assert comes_back(tokenizers[kind], held_out), kind
    assert not comes_back(tokenizers["wordpiece"], code)  # BERT's keeps no whitespace
    assert not comes_back(tokenizers["unigram"], UNSEEN)


def test_rare_characters_do_not_take_the_vocabulary():
    texts = ["果苹" * 50_000 + "გამარჯობა", "果苹" * 50_000 + "z"]
    assert recipe.without_rare_characters(texts, 0.9999) == ["果苹" * 50_000, "果苹" * 50_000 + "z"]
    assert recipe.common_characters(["果果果苹"], 0.75) == {"果"}
    assert recipe.common_characters(["果果果苹"], 0.76) == {"果", "苹"}


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def odd_lines(seed: int) -> list[str]:
    """Runs of spaces and of one letter, tabs, control characters, unseen scripts, and text that looks like a token."""
    rng = random.Random(seed)
    parts = [
        " ", "  ", "       ", "\t", "\n", "a", "aaaa", "self", "____", "=====", "1", "23", "苹果", "é", "გ", "🦜",
        "\x00", "\x7f", "<0x41>", "<|end|>", "<|unk|>", "▁", "▁▁", "<", "(<", ")", "the ",
    ]  # fmt: skip
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(1500)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_fast_sentencepiece_encodes_as_the_library_does(texts, held_out, algorithm):
    model = recipe.train_sentencepiece(texts, SIZE, algorithm)
    library_own = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = recipe.with_chat(recipe.sentencepiece_to_fast(model, algorithm))
    lines = [*held_out.split("\n"), *texts[0].split("\n"), *texts[1:], held_out, "", " ", UNSEEN, *odd_lines(0)]
    assert len(lines) > 5000
    pairs = list(zip(lines, library_own.encode(lines), encode_plain(fast, lines), strict=True))
    different = [pair for pair in pairs if pair[1] != pair[2]]
    if algorithm == "bpe":
        assert not different, different[:5]
    else:  # equally likely splits, told apart by rounding
        assert len(different) < 0.03 * len(lines)
        for line, own, ours in different:
            scores = [sum(map(library_own.get_score, ids)) for ids in (own, ours)]
            assert len(own) == len(ours) and scores[0] == pytest.approx(scores[1], rel=1e-5), line
    assert fast.convert_ids_to_tokens(range(len(fast))) == [library_own.id_to_piece(i) for i in range(len(fast))]
    for line in lines:
        if "▁" not in line:
            assert fast.decode(encode_plain(fast, [line])[0]) == line


def test_no_dummy_prefix_and_no_lost_spaces(tokenizers):
    """The sentencepiece library's defaults put a space before a text and make one of several."""
    fast = tokenizers["sentencepiece"]
    assert tokenizer_figures.readable(fast, "self") == ["self"]
    assert "".join(tokenizer_figures.readable(fast, "  x  ")) == "␣␣x␣␣"
    assert fast.decode(encode_plain(fast, ["▁"])[0]) == " "  # the documented exception: U+2581 is how it writes a space


# --- control tokens, chat, saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_yields_a_control_token(tokenizers, kind):
    tokenizer = tokenizers[kind]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for text in ("<|end|>", "hi<|end|><|user|>x", "<|pad|><|assistant|>", "a<|tool|>b", "<|system|> <|end|>"):
        assert not control & set(encode_plain(tokenizer, [text])[0]), text
        assert control & set(tokenizer(text)["input_ids"]), text  # what the default would do


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_mask(tokenizers, kind):
    tokenizer = tokenizers[kind]
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert learned == [*encode_plain(tokenizer, [MESSAGES[-1]["content"]])[0], tokenizer.eos_token_id]
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == len(MESSAGES)
    prompt = tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, return_dict=False)
    assert encoded["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_to_the_same(tokenizers, kind, tmp_path, held_out):
    tokenizer = tokenizers[kind]
    tokenizer.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # nothing that could run code
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    texts = [held_out, *tokenizer_figures.EXAMPLES, UNSEEN, *odd_lines(1)[:300]]
    assert encode_plain(loaded, texts) == encode_plain(tokenizer, texts)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.apply_chat_template(MESSAGES, return_dict=False) == tokenizer.apply_chat_template(
        MESSAGES, return_dict=False
    )
    expected = special_tokens(unk=kind != "bpe")
    assert loaded.convert_ids_to_tokens(range(len(expected))) == expected
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, None)
    assert set(loaded.all_special_ids) == set(range(len(expected)))
    assert len(loaded) == SIZE


# --- measuring and showing -------------------------------------------------------------------------------------------


def test_figures_by_hand(bpe):
    ids = encode_plain(bpe, ["12 345"])  # 1 2 ␣ 3 4 5
    assert tokenizer_figures.bytes_per_token(["12 345"], ids) == 1.0
    assert tokenizer_figures.bytes_per_token(["苹果"], [[7, 8, 9]]) == 2.0
    assert tokenizer_figures.fertility(["12 345"], ids) == 3.0
    assert tokenizer_figures.fertility(["12 345"], ids, unit=r"\S") == 6 / 5
    assert tokenizer_figures.unknown_rate([[2, 5], [2, 2]], unk=2) == 0.75
    assert tokenizer_figures.unknown_rate([[2, 5]], unk=None) == 0
    assert tokenizer_figures.readable(bpe, "გ") == ["<0xE1>", "<0x83>", "<0x92>"]


def test_docstrings():
    assert list(
        tokenizer_figures.docstrings('"""A."""\nclass B:\n    def c(self):\n        """D\n\n        e."""\n')
    ) == [
        "A.",
        "D\n\ne.",
    ]


def test_take_cuts_at_the_limit():
    assert recipe.take(["ab", "cd", "ef"], 5) == ["ab", "cd", "e"]
    assert recipe.take(["苹果"], 4) == ["苹"]
    assert recipe.take(["", "a"], 9) == ["a"]


# --- the recipe ------------------------------------------------------------------------------------------------------


def run(*arguments: str, root: Path) -> int:
    return run_recipe(recipe.main, recipe.Config, argv=["--run.root", str(root), *arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(library("argparse.py", "ast.py", "heapq.py"))
    return path


@pytest.mark.slow
def test_the_recipe_trains_compares_and_saves(corpus, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    for n in range(40):
        messages = [{"role": "user", "content": f"{n} 鹏鹏鹏鹏?"}, {"role": "assistant", "content": "鲲鲲鲲鲲!" * 9}]
        with chats.open("a") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    code = run(
        "--data.name", str(corpus), "--tokenizer.vocabulary_size", "1500", "--tokenizer.max_bytes", "200000",
        "--tokenizer.save", "sentencepiece", "--tokenizer.conversations", f"[{chats}]", root=tmp_path,
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "tokenizer" / "default"
    assert {path.name for path in folder.glob("model*")} == {"model", "model-bpe", "model-wordpiece", "model-unigram"}
    assert AutoTokenizer.from_pretrained(folder / "model").tokenize("🦜")[0] == "<0xF0>"
    for kind in ("model", "model-wordpiece", "model-unigram"):  # the conversations' characters are in the vocabulary
        assert {"鹏", "鲲"} <= set("".join(AutoTokenizer.from_pretrained(folder / kind).get_vocab())), kind
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["bytes_per_token"] == figures["sentencepiece_bytes_per_token"] > 1.5
    assert figures["baseline_bytes_per_token"] == 1.0
    assert figures["bpe_unknown_rate_unseen_script"] == 0 < figures["wordpiece_unknown_rate_unseen_script"]
    assert figures["bpe_lossless"] == 1 > figures["wordpiece_lossless"]
    assert figures["vocabulary_size"] == 1500
    assert (folder / "plots" / "bytes_per_token.png").stat().st_size > 10_000
    assert (folder / "plots" / "vocabulary_size.png").stat().st_size > 10_000
    splits = (folder / "samples" / "splits.txt").read_text()
    assert "'unfortunately'" in splits and "人工智能" in splits
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob("*.bin"))
    assert "tokens per Chinese character" in capsys.readouterr().out


def test_dry_run_writes_nothing(corpus, tmp_path, capsys):
    assert run("--data.name", str(corpus), "--tokenizer.conversations", "[]", "--dry-run", root=tmp_path) == 0
    assert "would train bpe, wordpiece, unigram, sentencepiece" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_too_small_for_the_characters_is_said_before_any_kind_is_trained(texts, monkeypatch):
    """With the number that each kind's own training would end at; a vocabulary of that many is not refused."""
    least = {kind: recipe.least_size(kind, recipe.text_for(kind, texts, recipe.Tokenizer())) for kind in KINDS}
    with pytest.raises(UserError) as refused:
        recipe.check_sizes(texts, recipe.Tokenizer(vocabulary_size=least["sentencepiece"] - 1))
    assert any("too small for sentencepiece" in problem for problem in refused.value.problems)
    recipe.check_sizes(texts, recipe.Tokenizer(vocabulary_size=max(least.values())))
    for kind in ("wordpiece", "sentencepiece"):  # the libraries' own counts
        with pytest.raises(UserError, match=f"take {least[kind]}"):
            recipe.train(kind, texts, recipe.Tokenizer(vocabulary_size=least[kind] - 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokenizer.vocabulary_size", "200"], ["leaves no room for merges", "take 263", "as many as the text gives"]),
        (["--tokenizer.vocabulary_size", "0"], ["vocabulary_size"]),
        (["--tokenizer.vocabulary_size", "500000"], ["more than this text gives", "bpe ends at"]),
        (["--tokenizer.kinds", "[sentencepiece]", "--tokenizer.save", "sentencepiece",
          "--tokenizer.vocabulary_size", "90000"],
         ["more than this text gives", "sentencepiece ends at"]),
        (["--tokenizer.kinds", "[wordpiece]", "--tokenizer.save", "wordpiece",
          "--tokenizer.vocabulary_size", "80"],
         ["too small for wordpiece"]),
        (["--tokenizer.kinds", "[unigram]", "--tokenizer.save", "unigram",
          "--tokenizer.vocabulary_size", "10"],
         ["too small for unigram"]),
        (["--tokenizer.character_coverage", "1.1"], ["character_coverage"]),
        (["--tokenizer.kinds", "[wordpiece]"], ["tokenizer.save", "'bpe' is not among"]),
        (["--tokenizer.kinds", "[]"], ["the list is empty"]),
        (["--tokenizer.kinds", "[bpee]"], ["tokenizer.kinds", "bpe"]),
        (["--tokenizer.save", "word_piece"], ["word_piece"]),
        (["--tokenizer.conversations", "[taskz]"], ["tokenizer.conversations", "taskz"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(corpus, tmp_path, capsys, arguments, words):
    if "--tokenizer.conversations" not in arguments:
        arguments = ["--tokenizer.conversations", "[]", *arguments]
    assert run("--data.name", str(corpus), *arguments, root=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error
    assert not list(tmp_path.rglob("tokenizer.json"))


def test_an_empty_text_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert run("--data.name", str(tmp_path / "empty.txt"), root=tmp_path / "runs") == 2
    assert "error: " in capsys.readouterr().err


def test_all_problems_are_said_at_once():
    with pytest.raises(UserError) as refused:
        recipe.check(recipe.Tokenizer(kinds=["bpe"], save="unigram", vocabulary_size=10))
    assert len(refused.value.problems) == 2
