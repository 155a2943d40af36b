"""Models and tokenizers from the `model` section: what is made on the way, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat import make_model, make_tokenizer, save_tokenizer_and_model

from recipes.common import hub, models
from recipes.common.errors import UserError
from recipes.common.masked_language import add_marks
from recipes.common.models import (
    ensure_made,
    extend_vocabulary,
    fresh_config,
    load_model,
    load_tokenizer,
    refuse_quantised,
)
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Model

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", recipe="test")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer and a model of it."""
    folder = tmp_path_factory.mktemp("saved")
    save_tokenizer_and_model(folder)
    return folder


def problems(function: Any, *arguments: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------- ensure_made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would run; the recipe in them "succeeds" and leaves its model."""
    lines: list[list[str]] = []

    def pretend(line: list[str], **_: Any) -> Any:
        lines.append(line)
        root, recipe = line[line.index("--run.root") + 1], Path(line[1]).stem
        Path(root, recipe, "default", "model").mkdir(parents=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pretend)
    return lines


def test_a_missing_result_is_made_once_and_with_no_more_than_is_needed(
    tmp_path: Path, run: RunFolder, started: list[list[str]]
) -> None:
    name = f"{tmp_path}/runs/tokenizer/default/model"
    assert ensure_made(name, run) == name
    script = str(ROOT / "recipes/pretraining/tokenizer.py")  # whole: the working folder may be another one
    assert started == [[sys.executable, script, "--run.root", f"{tmp_path}/runs", "--tokenizer.kinds", "[bpe]"]]
    assert ensure_made(name, run) == name
    assert len(started) == 1


def test_a_run_named_after_a_config_is_made_with_that_config(
    tmp_path: Path, run: RunFolder, started: list[list[str]]
) -> None:
    name = f"{tmp_path}/runs/tokenizer/multi30k/model"
    assert ensure_made(name, run) == name
    config = str(ROOT / "configs/pretraining/tokenizer/multi30k.yaml")
    assert started[0][4:] == ["--tokenizer.kinds", "[bpe]", "--config", config, "--run.name", "multi30k"]
    run.dry = True
    name = f"{tmp_path}/runs/tokenizer/shakespeare/model"
    assert problems(ensure_made, name, run) == [
        f"{name} is not there yet: `make tokenizer CONFIG=shakespeare` makes it"
    ]


def test_an_interrupted_run_goes_on_under_its_own_config(
    tmp_path: Path, run: RunFolder, started: list[list[str]]
) -> None:
    begun = tmp_path / "runs/tokenizer/default/config.yaml"
    begun.parent.mkdir(parents=True)
    begun.write_text("tokenizer: {kinds: [bpe, unigram]}\n")
    ensure_made(f"{tmp_path}/runs/tokenizer/default/model", run)
    assert started[0][4:] == ["--config", str(begun), "--run.resume", "true"]


@pytest.mark.parametrize("name", ["gpt2", "some/model", "runs/nothing/default/model", "results/llama/default/model"])
def test_other_names_come_back_as_they_are(name: str, run: RunFolder, started: list[list[str]]) -> None:
    assert ensure_made(name, run) == name
    assert not started


@pytest.mark.parametrize("why", ["dry", "workers", "another name"])
def test_what_is_not_made_on_the_way_says_what_makes_it(
    tmp_path: Path, run: RunFolder, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    run.dry = why == "dry"
    if why == "workers":
        monkeypatch.setenv("WORLD_SIZE", "2")
    name = f"{tmp_path}/runs/llama/{'mine' if why == 'another name' else 'default'}/model"
    assert problems(ensure_made, name, run) == [f"{name} is not there yet: `make llama` makes it"]
    assert not started


def test_a_result_that_could_not_be_made(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    (problem,) = problems(ensure_made, f"{tmp_path}/runs/llama/default/model", run)
    assert "`make llama` ended with exit code 2; its messages are above" in problem


# ---------------------------------------------------------------------------------------------- a fresh config


def test_a_fresh_config_takes_the_vocabulary_of_the_tokenizer() -> None:
    config = fresh_config({**LLAMA, "num_attention_heads": 2}, 263)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 263)
    assert fresh_config({**LLAMA, "num_attention_heads": 2, "vocab_size": 512}, 263).vocab_size == 512


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ["needs a model_type"]),
        ({"model_type": "lama"}, ["has no `lama`; did you mean `llama`?"]),
        (
            {**LLAMA, "hiden_size": 3, "num_hidden_layers": 0},
            [
                "num_hidden_layers is 0",
                "model.config.hiden_size is not a field of LlamaConfig; did you mean `hidden_size`?",
            ],
        ),
        ({**LLAMA, "num_attention_heads": 5}, ["hidden_size 32 is not a multiple of num_attention_heads 5"]),
        (
            {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 3},
            ["4 is not a multiple of num_key_value_heads 3"],
        ),
        (
            {**LLAMA, "num_attention_heads": 2, "hidden_act": 3},
            ["model.config: Field 'hidden_act' expected str, got int"],
        ),
    ],
)
def test_a_config_that_cannot_be(fields: dict[str, Any], said: list[str]) -> None:
    found = problems(fresh_config, fields, 263)
    assert len(found) == len(said)
    for problem, words in zip(found, said, strict=True):
        assert words in problem


# ---------------------------------------------------------------------------------------------- what belongs together


def test_a_model_from_scratch_knows_the_tokenizers_special_tokens(saved: Path, run: RunFolder) -> None:
    section = Model(config={**LLAMA, "num_attention_heads": 2}, tokenizer=str(saved / "tokenizer"))
    tokenizer = load_tokenizer(section, run, chat=True)
    model = load_model(section, tokenizer, run)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_more_tokens_than_the_model_has(saved: Path, run: RunFolder) -> None:
    section = Model(config={**LLAMA, "num_attention_heads": 2, "vocab_size": 100}, tokenizer=str(saved / "tokenizer"))
    tokenizer = load_tokenizer(section, run)
    (problem,) = problems(load_model, section, tokenizer, run)
    assert f"the tokenizer has {len(tokenizer)} tokens, the model 100: they do not belong together" in problem


def test_another_tokenizer_than_the_models_own(saved: Path, run: RunFolder, tmp_path: Path) -> None:
    """One with fewer tokens fits by its size, and would read every id as another word."""
    own = make_tokenizer()
    own.add_tokens(["another"])
    make_model(own).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    section = Model(name=str(tmp_path / "model"), tokenizer=str(saved / "tokenizer"))
    (problem,) = problems(load_model, section, load_tokenizer(section, run), run)
    assert "is not the tokenizer that" in problem and "leave out model.tokenizer" in problem


def test_name_and_config_exclude_each_other(saved: Path, run: RunFolder) -> None:
    for section in (Model(), Model(name=str(saved / "model"), config=LLAMA)):
        assert "either name (pretrained) or config" in problems(load_model, section, None, run)[0]


def test_a_tokenizer_that_no_chat_could_use(saved: Path, run: RunFolder, tmp_path: Path) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    assert (
        "has no chat template"
        in problems(lambda: load_tokenizer(Model(name=str(tmp_path / "plain")), run, chat=True))[0]
    )
    plain.eos_token = None
    plain.save_pretrained(tmp_path / "endless")
    endless = Model(name=str(tmp_path / "endless"))
    assert "no end-of-text token" in problems(load_tokenizer, endless, run)[0]
    assert load_tokenizer(endless, run, writes=False).pad_token == plain.pad_token  # a BERT's, to classify with
    plain.pad_token = None
    plain.save_pretrained(tmp_path / "endless")
    assert "neither a padding" in problems(lambda: load_tokenizer(endless, run, writes=False))[0]
    assert "needs a tokenizer" in problems(load_tokenizer, Model(config=LLAMA), run)[0]


def test_padding_falls_back_to_the_end_token(run: RunFolder, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    loaded = load_tokenizer(Model(name=str(tmp_path / "no_pad")), run)
    assert loaded.pad_token == loaded.eos_token


# ---------------------------------------------------------------------------------------------- what a checkpoint lacks


def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path: Path, run: RunFolder) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        BertForMaskedLM,
        LlamaForSequenceClassification,
    )

    policy = make_model(make_tokenizer())
    reward, short, encoder, chat, tied = (tmp_path / name for name in ("reward", "short", "encoder", "chat", "tied"))
    LlamaForSequenceClassification(policy.config).save_pretrained(tied)  # complete, since its embeddings are the head
    assert "tied scores or labels texts, it holds a LlamaForSeq" in problems(load_model, Model(str(tied)), None, run)[0]
    policy.config.tie_word_embeddings = False
    LlamaForSequenceClassification(policy.config).save_pretrained(reward)
    (said,) = problems(load_model, Model(name=str(reward)), None, run)
    assert "lacks 1 of the weights of a LlamaForCausalLM" in said and ": lm_head.weight; it holds a LlamaForSeq" in said
    policy.config.tie_word_embeddings = True

    policy.save_pretrained(short)
    weights = load_file(short / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, short / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.input_layernorm.weight" in problems(load_model, Model(name=str(short)), None, run)[0]
    # a score that a reward model of this kind would start with may be random; the layers below it may not
    classes = AutoModelForSequenceClassification
    assert "model.layers.1." in problems(load_model, Model(name=str(short)), None, run, classes)[0]
    policy.save_pretrained(chat)
    assert load_model(Model(name=str(chat)), None, run, classes, num_labels=1).score.weight.shape[0] == 1

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=50)).save_pretrained(encoder)
    assert (
        load_model(Model(name=str(encoder)), None, run, classes).bert.pooler is not None
    )  # the pooler is new with the head
    assert "is an encoder, it holds a BertForMaskedLM" in problems(load_model, Model(name=str(encoder)), None, run)[0]


def test_the_revision_of_a_model_is_not_asked_of_another_tokenizer(
    saved: Path, run: RunFolder, monkeypatch: Any
) -> None:
    import transformers

    asked: list[Any] = []

    def load(name: str, revision: str | None) -> Any:
        asked.append(revision)
        return make_tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    load_tokenizer(Model(name=str(saved), revision="v2"), run)
    load_tokenizer(Model(name="some/model", tokenizer=str(saved), revision="v2"), run)
    assert asked == ["v2", None]


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, as a laptop on a train has none; the real call would not even resolve the name."""
    import huggingface_hub

    def fail(self: Any, name: str, timeout: float) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)


def test_a_name_that_nobody_knows_is_refused_at_once_without_a_network(
    unreachable: None, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own loaders would retry for half a minute."""
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", pytest.fail)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
    began = time.perf_counter()
    for load in (
        lambda: load_tokenizer(Model(name="nobody/no-such"), run),
        lambda: load_model(Model(name="nobody/no-such"), None, run),
    ):
        (problem,) = problems(load)
        assert "`nobody/no-such`: it is not a local folder, and the hub cannot be reached from here" in problem
        assert "Name or service not known" in problem and "HF_HUB_OFFLINE" in problem
    assert time.perf_counter() - began < 2


def test_what_was_fetched_before_serves_without_a_network(
    unreachable: None, run: RunFolder, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "models--some--model" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked: dict[str, Any] = {}
    models._from_pretrained("model", lambda name, **options: asked.update(options), "some/model", revision="main")
    assert asked == {"revision": "main", "local_files_only": True}


def test_names_that_are_no_hub_ids() -> None:
    assert "has not the form of a hub id" in str(hub.why_not_on_hub("a b/c", "model"))
    assert hub.HUB_ID.fullmatch("gpt2") and hub.HUB_ID.fullmatch("meta-llama/Llama-3.1-8B")
    assert not hub.HUB_ID.fullmatch("a/b/c") and not hub.HUB_ID.fullmatch("x" * 97)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": ["llama"]}, "transformers has no"),
        ({"hidden_size": [32]}, "hidden_size"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"num_attention_heads": {"a": 1}}, "num_attention_heads"),
        ({"hidden_act": "siluu"}, "no llama can be made of it: 'siluu'"),
    ],
)
def test_a_config_of_the_wrong_kinds_is_refused(run: RunFolder, change: dict[str, Any], said: str) -> None:
    assert said in problems(load_model, Model(config={**LLAMA, **change}), None, run)[0]


# ------------------------------------------------------------------------------------ what a tokenizer may lack


def test_missing_marks_are_added_and_said_to_a_fresh_model(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, run = make_tokenizer(), RunFolder(Path("nowhere"), recipe="bert", dry=True)
    size = len(tokenizer)
    assert (
        extend_vocabulary(lambda given: (add_marks(given), "what it gives")[1], tokenizer, Model(config={}), run)
        == "what it gives"
    )
    assert len(tokenizer) == size + 3 and "[CLS], [SEP], [MASK]" in capsys.readouterr().out
    extend_vocabulary(add_marks, tokenizer, Model(config={}), run)
    assert capsys.readouterr().out == ""  # nothing is missing now


def test_a_pretrained_model_without_marks_is_refused_with_the_way_to_add_them() -> None:
    """And the way that is said works."""
    from transformers import BertConfig, BertForPreTraining

    tokenizer, run = make_tokenizer(), RunFolder(Path("nowhere"), recipe="bert", dry=True)
    size = len(tokenizer)
    with pytest.raises(UserError, match=r"has no \[CLS\], \[SEP\], \[MASK\].*add_tokens.*resize_token_embeddings"):
        extend_vocabulary(add_marks, tokenizer, Model(name="theirs"), run)

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForPreTraining(BertConfig(vocab_size=size, **sizes))
    tokenizer.add_tokens(["[CLS]", "[SEP]", "[MASK]"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    extend_vocabulary(add_marks, tokenizer, Model(name="ours"), run)
    assert tokenizer.mask_token_id == size + 2 < model.get_input_embeddings().weight.shape[0]


def test_a_hundred_missing_sentinels_are_not_all_listed() -> None:
    from recipes.common.span_corruption import add_sentinels

    run = RunFolder(Path("nowhere"), recipe="t5", dry=True)
    with pytest.raises(UserError, match=r"<extra_id_0>, <extra_id_1>, \.\.\., <extra_id_99>") as refused:
        extend_vocabulary(add_sentinels, make_tokenizer(), Model(name="theirs"), run)
    assert "<extra_id_50>" not in str(refused.value)


def test_weights_that_were_saved_in_few_bits_are_refused_where_they_are_to_learn() -> None:
    config = SimpleNamespace(_name_or_path="four-bits")
    with pytest.raises(UserError, match="four-bits was saved quantised"):
        refuse_quantised(SimpleNamespace(config=config, hf_quantizer=SimpleNamespace(pre_quantized=True)))
    for quantizer in (None, SimpleNamespace(pre_quantized=False)):  # qlora's own
        refuse_quantised(SimpleNamespace(config=config, hf_quantizer=quantizer))
