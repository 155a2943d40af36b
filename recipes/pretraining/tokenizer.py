"""Train a tokenizer four ways on the same text, compare them on held-out text, and save the one that is wanted.

    bpe            start from the 256 bytes; join the pair that stands side by side most often; repeat
                       a, b = argmax count(a b)            "l o w" x 5, "l o w e r" x 2:  l+o, lo+w, ...
                   then encode by replaying the joins in order. Every text is bytes, so nothing is ever unknown.
    wordpiece      BERT's. The paper joins the pair that raises the likelihood of the text most,
                       a, b = argmax count(a b) / (count(a) count(b))
                   (the `tokenizers` library joins by count, as BPE does), and encodes a word by its longest known
                   beginning, then the longest known rest (marked ##). A word with an unknown character is one <|unk|>.
    unigram        start from 100,000 substrings; expectation-maximisation gives each piece x a probability p(x) for
                       L = sum over texts of log sum over splits S of prod_{x in S} p(x)
                   drop the half of the pieces that L misses least; repeat. Encode by the likeliest split (Viterbi).
    sentencepiece  BPE or Unigram on raw text with the space as a character (U+2581), no words cut first: LLaMA's. A
                   character that is not in the vocabulary falls back to its bytes: <0xE4><0xBD><0xA0>.

Sennrich, Haddow, Birch 2016, https://arxiv.org/abs/1508.07909; Radford et al. 2019 (byte-level);
Schuster, Nakajima 2012, and Wu et al. 2016, https://arxiv.org/abs/1609.08144 (WordPiece);
Kudo 2018, https://arxiv.org/abs/1804.10959 (Unigram); Kudo, Richardson 2018, https://arxiv.org/abs/1808.06226

    make tokenizer                    # laptop, offline, under 2 minutes
    make tokenizer CONFIG=gpu         # a public corpus, a vocabulary of 32,000 (needs network and memory, no GPU)
    make tokenizer CONFIG=cluster     # 128,000 tokens from 2 GB of text, on one node

The text is `data` and, so that chat and Chinese are in the vocabulary too, the messages of `tokenizer.conversations`.
Laptop result: RESULTS.md#tokenizer.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from recipes.common.builtin import BUILTINS
from recipes.common.chat import (
    END_TOKEN,
    PAD_TOKEN,
    ROLE_TOKENS,
    UNK_TOKEN,
    add_chat_template,
    encode_plain,
    special_tokens,
)
from recipes.common.errors import DryRunDone, UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, PositiveInt, Run, UpToOne
from recipes.common.tokenizer_figures import (
    AT_A_GLANCE,
    COLUMNS,
    EXAMPLES,
    SPACE,
    byte_count,
    bytes_per_token,
    comparison,
    draw_domains,
    draw_sizes,
    measure,
    probes,
    show_splits,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

Kind = Literal["bpe", "wordpiece", "unigram", "sentencepiece"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass
class Tokenizer:
    """Which tokenizers to train, on how much, and which one to keep."""

    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))  # trained and compared
    save: Kind = "bpe"  # goes to model/; the others go to model-<kind>/
    vocabulary_size: PositiveInt = 8192  # tokens, special ones included; the same for all
    conversations: list[str] = field(default_factory=lambda: ["tasks", "pydocs_qa"])  # their messages join the text
    max_bytes: PositiveInt = 12_000_000  # of data that is trained on; each conversation set adds at most a tenth of it
    unigram_max_bytes: PositiveInt = 3_000_000  # of all that, what Unigram sees: it takes ten times longer
    character_coverage: UpToOne = 0.9999  # of the text; rarer characters are left to bytes or <|unk|>
    sentencepiece: Literal["bpe", "unigram"] = "bpe"  # which algorithm SentencePiece runs; LLaMA 1 and 2 use bpe


@dataclass
class Config:
    """Sections of this recipe."""

    data: Data
    tokenizer: Tokenizer
    run: Run


# --- how text is cut before a tokenizer learns pieces ----------------------------------------------------------------

# The space after a line's end belongs to the end, but for the last one, which stays with the word: a line begins with
# "\n       " and " return", the same token as in the middle of a line. 7 % fewer tokens than GPT-4's cut on our text.
LINE_END = r"[\r\n]+(?:[ \t]+(?=[ \t]))?"
# GPT-4's, but each digit stands alone, so that numbers are spelt the same way whatever their length and carrying can be
# learned, and so does Chinese punctuation, so that an item of a list is the same token wherever it stands.
BPE_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}\u3000-\u303F\uFF00-\uFFEF]?\p{L}+|\p{N}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+(?:{LINE_END})?|\s*{LINE_END}|\s+(?!\S)|\s+"
)
# Unigram picks candidates by how many different words hold them, so it needs words as long as SentencePiece's.
UNIGRAM_WORDS = rf"\p{{N}}| ?[^\s\p{{N}}]+(?:{LINE_END})?|\s*{LINE_END}|\s+(?!\S)|\s+"
# A Unigram model finds any piece of its vocabulary in the text, control tokens and <0x41> as well: cut those open.
CONTROL_TEXT = r"<(?=\|(?:pad|end|unk|system|user|assistant|tool)\|>|0x[0-9A-F]{2}>)"
DRY_BYTES = 1_000_000  # of a stream that a dry run reads
HELD_OUT_BYTES = 5_000_000  # enough for two digits of every figure
LONGEST_TOKEN = 16  # bytes, as SentencePiece's 16 characters: words and indentation, not lines that are often repeated


# --- four ways to train ----------------------------------------------------------------------------------------------


def train_bpe(texts: Sequence[str], vocabulary_size: int) -> Backend:
    """Byte-level BPE. The first ids are the special tokens, then the 256 bytes, then the merges in their order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_wordpiece(texts: Sequence[str], vocabulary_size: int) -> Backend:
    """BERT's cased WordPiece: whitespace is dropped, punctuation and Chinese characters stand alone."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token=UNK_TOKEN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=special_tokens(unk=True), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_unigram(texts: Sequence[str], vocabulary_size: int) -> Backend:
    """Unigram language model over characters, spaces kept as they are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNIGRAM_WORDS), "isolated"),
            pre_tokenizers.Split(Regex(CONTROL_TEXT), "isolated"),
        ]
    )
    backend.decoder = decoders.Fuse()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens(unk=True),
        unk_token=UNK_TOKEN,
        # with a million and 0.75, the library's own: twice the time for 1 % fewer tokens
        seed_size=max(100_000, 10 * vocabulary_size),  # type: ignore[call-arg]  # missing in the library's stubs only
        shrinking_factor=0.5,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_sentencepiece(texts: Sequence[str], vocabulary_size: int, algorithm: str = "bpe") -> bytes:
    """The sentencepiece library with byte fallback, set so that text comes back as it was. Returns its model file.

    Its own defaults change text: NFKC, a space put before the first word, runs of spaces made one. All are off.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type=algorithm,
        vocab_size=vocabulary_size,
        character_coverage=1.0,  # of what it is given: `train` has left out the rare characters
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation
        pad_id=0, pad_piece=PAD_TOKEN, eos_id=1, eos_piece=END_TOKEN, unk_id=2, unk_piece=UNK_TOKEN, bos_id=-1,
        control_symbols=list(ROLE_TOKENS),
        max_sentence_length=1_000_000,  # bytes; longer lines are skipped, from 4192 on by default
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def sentencepiece_to_fast(model: bytes, algorithm: str = "bpe") -> Backend:
    """The same encodings from the `tokenizers` library, which AutoTokenizer loads and which gives character offsets.

    No piece holds a space after another character, so cutting there changes nothing and lets short words be cached.
    BPE gives the same ids for every text. Unigram adds up scores in double precision here, in single in sentencepiece:
    where two splits are equally likely (a run of 11 spaces as 4+7 or 7+4) the one or the other may come out.
    """
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    cuts = [pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")]
    if algorithm == "unigram":
        scored = [(piece, processor.get_score(i)) for i, piece in enumerate(pieces)]
        backend = Tokenizer(models.Unigram(scored, unk_id=processor.unk_id(), byte_fallback=True))
        cuts.append(pre_tokenizers.Split(Regex(CONTROL_TEXT), "isolated"))
    else:
        # SentencePiece joins the two neighbours whose union is the best piece. As a list of merges: every way to cut a
        # piece in two known ones, better pieces first. (Its BPE scores are 0, -1, -2, ... in the order of the ids.)
        normal = {
            pieces[i] for i in ids if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
        }
        merges = [
            (piece[:cut], piece[cut:])
            for piece in sorted(normal, key=lambda piece: -processor.get_score(processor.piece_to_id(piece)))
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        backend = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token=UNK_TOKEN, fuse_unk=True, byte_fallback=True)
        )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def with_chat(backend: Backend) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with our special tokens and chat template; `save_pretrained` writes JSON only."""
    from transformers import PreTrainedTokenizerFast

    unk = {"unk_token": UNK_TOKEN} if backend.token_to_id(UNK_TOKEN) is not None else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **unk,
    )
    add_chat_template(tokenizer)
    return tokenizer


def smaller_bpe(tokenizer: PreTrainedTokenizerFast, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """The BPE that the same text gives at a smaller size: merges are learned in order, so it is the first ones."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: i for token, i in state["model"]["vocab"].items() if i < vocabulary_size}
    kept = vocabulary_size - (len(state["model"]["vocab"]) - len(state["model"]["merges"]))
    state["model"] |= {"vocab": vocabulary, "merges": state["model"]["merges"][:kept]}
    return with_chat(Tokenizer.from_str(json.dumps(state)))


def train(kind: Kind, texts: Sequence[str], settings: Tokenizer) -> PreTrainedTokenizerFast:
    """Train one kind on the texts. Raises UserError if the vocabulary is too large or too small for them."""
    size = settings.vocabulary_size
    texts = text_for(kind, texts, settings)
    if kind == "sentencepiece":
        try:
            model = train_sentencepiece(texts, size, settings.sentencepiece)
        except RuntimeError as error:
            # "... set it to a value <= 5000." or "... smaller than required_chars. 300 vs 400."
            if (found := re.search(r"(?:<=|vs) (\d+)", str(error))) is None:
                raise
            raise UserError(_misfit(kind, size, int(found[1]))) from error
        backend = sentencepiece_to_fast(model, settings.sentencepiece)
    elif kind == "unigram":
        if (least := least_size(kind, texts)) > size:
            raise UserError(_misfit(kind, size, least))
        backend = train_unigram(texts, size)
    else:
        backend = {"bpe": train_bpe, "wordpiece": train_wordpiece}[kind](texts, size)
    if (got := backend.get_vocab_size()) != size:
        raise UserError(_misfit(kind, size, got))
    return with_chat(backend)


def text_for(kind: Kind, texts: Sequence[str], settings: Tokenizer) -> Sequence[str]:
    """What of the text a kind is trained on."""
    if kind == "unigram":
        texts = take(texts, settings.unigram_max_bytes)
    return texts if kind == "bpe" else without_rare_characters(texts, settings.character_coverage)


def least_size(kind: Kind, texts: Sequence[str]) -> int:
    """Tokens that a kind has before it learns any piece of this text: the special ones, and its bytes or characters."""
    marks, alphabet = len(special_tokens(unk=kind != "bpe")), set().union(*map(set, texts))
    if kind == "bpe":
        return marks + 256
    if kind == "wordpiece":  # and those that stand within a word, marked ##, which pairs of neighbours tell
        pairs: set[tuple[str, str]] = set().union(*(pairwise(text) for text in texts))
        return train_wordpiece([*alphabet, " ".join(map("".join, pairs))], 1).get_vocab_size()
    if kind == "sentencepiece":
        return marks + 256 + len({SPACE if character == " " else character for character in alphabet} - {"\n", "\0"})
    return marks + len(alphabet)


def check_sizes(texts: Sequence[str], settings: Tokenizer) -> None:
    """Raise UserError, before any kind is trained, for those whose characters alone are more than the vocabulary."""
    size, alphabet = settings.vocabulary_size, set().union(*map(set, texts))
    if size >= 256 + len(special_tokens(unk=True)) + 2 * len(alphabet):
        return  # enough for all, without a closer look
    least = {kind: least_size(kind, text_for(kind, texts, settings)) for kind in dict.fromkeys(settings.kinds)}
    if problems := [_misfit(kind, size, needed) for kind, needed in least.items() if needed > size]:
        raise UserError(problems)


def _misfit(kind: str, asked: int, possible: int) -> str:
    if asked > possible:
        return (
            f"tokenizer.vocabulary_size: {asked:,} is more than this text gives: {kind} ends at {possible:,} tokens; "
            "ask for at most that, or give more text"
        )
    return (
        f"tokenizer.vocabulary_size: {asked:,} is too small for {kind}: the characters of this text and the special "
        f"tokens take {possible:,}; ask for more than that, or lower tokenizer.character_coverage"
    )


# --- text ------------------------------------------------------------------------------------------------------------


def without_rare_characters(texts: Sequence[str], coverage: float) -> list[str]:
    """The texts without the rarest characters that make up the last 1 - coverage of them.

    Every character of the text gets a piece of its own in a character vocabulary; a name in Georgian would take thirty.
    """
    alphabet = common_characters(texts, coverage)
    rare = {ord(character): None for character in set().union(*map(set, texts)) - alphabet}
    return [text.translate(rare) for text in texts]


def common_characters(texts: Iterable[str], coverage: float) -> set[str]:
    """The most frequent characters, as many as make up `coverage` of the text, and all of ASCII that it has."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    left = coverage * counts.total()
    kept = {character for character in counts if character.isascii()}
    for character, count in counts.most_common():
        if left <= 0:
            break
        kept.add(character)
        left -= count
    return kept


def take(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The first texts, together at most max_bytes of UTF-8; the last one is cut."""
    taken, left = [], max_bytes
    for text in texts:
        raw = text.encode()
        if len(raw) > left:
            text = raw[:left].decode(errors="ignore")
        if text:
            taken.append(text)
        left -= len(raw)
        if left <= 0:
            break
    return taken


def training_text(data: Data, settings: Tokenizer, dry: bool = False) -> tuple[list[str], list[str]]:
    """(texts to train on, held-out texts of `data`). Raises UserError if either is empty.

    A dry run makes no builtin conversations, in which nothing can be wrong, and reads little of a stream.
    """
    from recipes.common.data import load_data

    def shuffled(rows: Any) -> Any:  # a sample of all of it, not its first files; a stream comes as it comes
        return rows if data.streaming else rows.shuffle(seed=data.seed)

    splits = load_data(data, "text")
    most = min(DRY_BYTES if dry and data.streaming else settings.max_bytes, settings.max_bytes)
    texts = take((row["text"] for row in shuffled(splits["train"])), most)
    held_out = take((row["text"] for row in splits["validation"]), min(most, HELD_OUT_BYTES))
    if not texts or not held_out:
        raise UserError(f"data.name: {data.name} has no text to {'train on' if not texts else 'measure on'}")
    for name in settings.conversations:
        if dry and name in made_later(settings):
            continue
        source = replace(data, name=name, subset=None, split="train", validation_split=None, columns=None)
        try:
            rows = shuffled(load_data(source, "conversation")["train"])
        except UserError as error:
            raise UserError([p.replace("data.name", "tokenizer.conversations") for p in error.problems]) from error
        texts += take((message["content"] for row in rows for message in row["messages"]), settings.max_bytes // 10)
    random.Random(data.seed).shuffle(texts)  # so that the first ones are a sample of all
    return texts, held_out


def made_later(settings: Tokenizer) -> list[str]:
    """The builtin sets among the conversations."""
    return [name for name in settings.conversations if name in BUILTINS and BUILTINS[name].kind == "conversation"]


# --- the recipe ------------------------------------------------------------------------------------------------------


def check(settings: Tokenizer) -> None:
    """Raise UserError with everything that is wrong in the tokenizer section."""
    problems = []
    if not settings.kinds:
        problems.append(f"tokenizer.kinds: the list is empty; choose from {', '.join(KINDS)}")
    if settings.kinds and settings.save not in settings.kinds:
        problems.append(
            f"tokenizer.save: {settings.save!r} is not among the kinds that are trained ({', '.join(settings.kinds)}); "
            f"add it to tokenizer.kinds, or save {settings.kinds[0]}"
        )
    least = 256 + len(special_tokens(unk="sentencepiece" in settings.kinds))
    if settings.vocabulary_size <= least and {"bpe", "sentencepiece"} & set(settings.kinds):
        problems.append(
            f"tokenizer.vocabulary_size: {settings.vocabulary_size} leaves no room for merges: the 256 bytes and the "
            f"special tokens take {least}; ask for more than that, as many as the text gives"
        )
    if problems:
        raise UserError(problems)


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Text, train each kind, measure it on held-out text, save, show."""
    settings = config.tokenizer
    check(settings)
    texts, held_out = training_text(config.data, settings, run.dry)
    run.say(f"  text: {byte_count(texts) / 1e6:.1f} MB to train on, {byte_count(held_out) / 1e6:.2f} MB held out")
    check_sizes(texts, settings)
    if run.dry:
        if later := made_later(settings):
            each = "each" if len(later) > 1 else "to it"
            run.say(f"  {' and '.join(later)} add at most {settings.max_bytes / 1e7:.1f} MB {each}")
        if config.data.streaming:
            run.say(f"  the text is a stream: a dry run reads {DRY_BYTES / 1e6:.0f} MB of it at most")
        kinds = ", ".join(settings.kinds)
        run.say(
            f"  would train {kinds}, {settings.vocabulary_size:,} tokens each, and save {settings.save} as the model's"
        )
        raise DryRunDone

    domains = {"held_out": held_out, **probes(config.data.seed)}
    tokenizers: dict[Kind, PreTrainedTokenizerFast] = {}
    measured: dict[Kind, dict[str, float]] = {}
    for number, kind in enumerate(dict.fromkeys(settings.kinds), 1):
        started = time.perf_counter()
        tokenizers[kind] = train(kind, texts, settings)
        seconds = time.perf_counter() - started
        measured[kind] = {**measure(tokenizers[kind], domains, take(texts, 2_000_000)), "train_seconds": seconds}
        run.log(number, kind=kind, **measured[kind])
        figure = measured[kind]["bytes_per_token"]
        run.say(f"  {number}/{len(settings.kinds)} {kind}: {figure:.2f} bytes per token, trained in {seconds:.1f} s")
    for kind, tokenizer in tokenizers.items():
        run.save_model(tokenizer, folder="model" if kind == settings.save else f"model-{kind}")

    table = comparison(measured)
    width = max(len(row[0]) for row in table)
    run.say("\n" + "\n".join(f"  {row[0]:<{width}}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in table))
    glance = show_splits(tokenizers, AT_A_GLANCE)
    run.say("\n" + textwrap.indent(glance, "  "))
    run.sample("splits.txt", show_splits(tokenizers, EXAMPLES))
    run.plot("bytes_per_token", draw_domains(measured))
    if "bpe" in tokenizers:
        bpe = tokenizers["bpe"]
        smaller = {size: smaller_bpe(bpe, size) for size in (2**power for power in range(9, 30)) if size < len(bpe)}
        curve = {size: bytes_per_token(held_out, encode_plain(cut, held_out)) for size, cut in smaller.items()}
        run.plot("vocabulary_size", draw_sizes({**curve, len(bpe): measured["bpe"]["bytes_per_token"]}, measured))
    markdown = [f"| {' | '.join(row)} |" for row in table]
    run.card("\n".join([markdown[0], "|---" + "|---:" * len(measured) + "|", *markdown[1:]]))
    run.card(f"How they split a word and a sentence, each with its number of tokens:\n\n```text\n{glance}```")
    run.card(
        "Encode training text with `tokenizer(text, split_special_tokens=True)`: without it, a document that holds the "
        "characters `<|end|>` yields the control token. The chat template does the same for messages. "
        "The Chinese figures are on held-out questions of `tasks`, which are made from templates. WordPiece drops "
        "whitespace, which the others spend tokens on: compare its bytes per token with what comes back."
    )
    return {
        "bytes_per_token": measured[settings.save]["bytes_per_token"],
        "baseline_bytes_per_token": 1.0,  # raw bytes
        "vocabulary_size": len(tokenizers[settings.save]),
        **{f"{kind}_{name}": figures[name] for kind, figures in measured.items() for name in COLUMNS},
    }


if __name__ == "__main__":
    run_recipe(main, Config)
