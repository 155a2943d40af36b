"""Wrong input to a recipe ends with exit code 2 and says what to change, without a traceback and without leaving a run behind."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import TINY_LLAMA, make_model, save_tokenizer_and_model

from recipes.common import machine
from recipes.common.machine import Choice
from recipes.pretraining import llama


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases name: a tokenizer, a model of it, texts good and bad."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = save_tokenizer_and_model(folder)
    small = make_model(tokenizer)
    small.resize_token_embeddings(100)
    small.save_pretrained(folder / "small_model")
    make_model(tokenizer).save_pretrained(folder / "cut_model")
    weights = folder / "cut_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    make_model(tokenizer).save_pretrained(folder / "other_sizes")
    config = folder / "other_sizes" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 48}))
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 200)
    (folder / "short.txt").write_text("one line\ntwo\nthree\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes(b"caf\xe9 au lait\n" * 20)
    (folder / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / "nothing").mkdir()
    (folder / "broken.yaml").write_text("training: {max_steps: 3\n")
    (folder / "list.yaml").write_text("- training\n")
    (folder / "typo.yaml").write_text("training:\n  max_step: 3\n")
    return folder


def line(sources: Path, changes: dict[str, Any]) -> list[str]:
    """The command line of a run that works, with changes; None leaves a word out."""
    words = {
        "model.tokenizer": "{}/tokenizer",
        "model.config": json.dumps(TINY_LLAMA),
        "data.name": "{}/text.txt",
        "llama.block_length": 64,
        "llama.compare_with_xz": "false",
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.bf16": "false",
        **changes,
    }
    return [
        word
        for key, value in words.items()
        if value is not None
        for word in (f"--{key}", str(value).replace("{}/", f"{sources}/"))
    ]


def model(**changes: Any) -> dict[str, Any]:
    return {"model.config": json.dumps({**TINY_LLAMA, **changes})}


CASES: list[tuple[dict[str, Any], str]] = [
    # misspelt keys, at each depth
    ({"modle.name": "x"}, "model"),
    ({"trainig.max_steps": 3}, "training"),
    ({"training.max_step": 3}, "max_steps"),
    ({"training.learning_rat": 1e-3}, "learning_rate"),
    ({"llama.block_lenght": 3}, "block_length"),
    ({"data.nmae": "x"}, "data.name"),
    ({"run.nam": "x"}, "run.name"),
    ({"model.tokeniser": "x"}, "model.tokenizer"),
    (model(hiden_size=32), "hidden_size"),
    (model(num_hidden_layer=2), "num_hidden_layers"),
    (model(model_type="lama"), "llama"),
    ({"model.config": '{"model_type": "bert", "num_attention_heads": 4, "hidden_size": 32}'}, "trains a LLaMA"),
    # wrong types and values
    ({"training.max_steps": "many"}, "training.max_steps"),
    ({"training.learning_rate": "fast"}, "training.learning_rate"),
    ({"training.bf16": "perhaps"}, "training.bf16"),
    ({"training.lr_scheduler_type": "cosin"}, "cosine"),
    ({"training.seed": "lucky"}, "training.seed"),
    ({"llama.block_length": "long"}, "llama.block_length"),
    ({"llama.block_length": 0}, "llama.block_length"),
    ({"llama.block_length": -64}, "llama.block_length"),
    ({"llama.block_length": 1.5}, "llama.block_length"),
    ({"llama.block_length": 1}, "too short: use 8 at least"),
    ({"llama.muon_learning_rate": 0}, "llama.muon_learning_rate"),
    ({"llama.muon_learning_rate": -1}, "llama.muon_learning_rate"),
    ({"llama.evaluation_stride": 0}, "llama.evaluation_stride"),
    ({"llama.evaluation_stride": 1.5}, "llama.evaluation_stride"),
    ({"llama.optimizer": "mion"}, "muon"),
    ({"llama.mask_documents": "maybe"}, "llama.mask_documents"),
    ({"model.dtype": "float8"}, "float16"),
    ({"model.attention": "spda"}, "sdpa"),
    ({"model.config": "llama"}, "model.config"),
    ({"data.validation_fraction": 0}, "data.validation_fraction"),
    ({"data.validation_fraction": 1.5}, "data.validation_fraction"),
    ({"data.max_samples": 0}, "data.max_samples"),
    ({"data.max_samples": -3}, "data.max_samples"),
    ({"data.on_bad_row": "ignore"}, "skip"),
    ({"run.threads": 0}, "run.threads"),
    ({"run.threads": 4_000_000_000}, "run.threads"),
    ({"run.time_limit_minutes": 0}, "run.time_limit_minutes"),
    ({"run.resume": "sure"}, "run.resume"),
    # models that cannot be
    (model(hidden_size=0), "hidden_size is 0: it must be above 0"),
    (model(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (model(num_attention_heads=0), "num_attention_heads is 0"),
    (model(hidden_size=33), "not a multiple of num_attention_heads"),
    (model(num_attention_heads=4, num_key_value_heads=3), "not a multiple of num_key_value_heads"),
    (model(vocab_size=100), "they do not belong together"),
    (model(max_position_embeddings=32), "the model has 32 positions"),
    ({"model.config": "{}"}, "model_type"),
    ({"model.config": '{"hidden_size": 32}'}, "needs a model_type"),
    ({"model.config": "null", "model.name": "null"}, "either name (pretrained) or config"),
    ({"model.name": "{}/model"}, "not both"),
    ({"model.config": "null", "model.name": "{}/small_model"}, "they do not belong together"),
    ({"model.config": "null", "model.name": "{}/modle"}, "did you mean"),
    ({"model.config": "null", "model.name": "{}/nothing"}, "holds no config.json"),
    ({"model.config": "null", "model.name": "nobody/no-such-model"}, "HF_HUB_OFFLINE"),
    ({"model.tokenizer": "null"}, "model.tokenizer"),
    ({"model.tokenizer": "nobody/no-such-tokenizer"}, "HF_HUB_OFFLINE"),
    ({"model.tokenizer": "{}/nothing"}, "tokenizer"),
    ({"model.chat_template": "{}/none.jinja"}, "no such file"),
    ({"model.chat_template": "{}/latin1.txt"}, "is not UTF-8 text"),
    ({"model.config": "null", "model.name": "{}/cut_model"}, "cut_model cannot be loaded"),
    ({"model.config": "null", "model.name": "{}/other_sizes"}, "other_sizes cannot be loaded"),
    # data
    ({"data.name": "{}/txt.txt"}, "text.txt"),
    ({"data.name": "{}/empty.txt"}, "is empty"),
    ({"data.name": "{}/nothing"}, "holds no data file"),
    ({"data.name": "{}/latin1.txt"}, "UTF-8"),
    ({"data.name": "{}/broken.jsonl"}, "broken.jsonl:2"),
    ({"data.name": "{}/photo.png"}, "photo.png"),
    ({"data.name": "pydoc"}, "pydocs"),
    ({"data.name": "nobody/no-such-set"}, "no-such-set"),
    ({"data.name": "{}/short.txt", "llama.block_length": 60}, "shorter than one block of 60 tokens"),
    ({"data.subset": "en"}, "data.subset"),
    ({"data.split": "trian"}, "train"),
    # the frame's own
    ({"training.output_dir": "x"}, "leave it out"),
    ({"training.resume_from_checkpoint": "x"}, "--run.resume true"),
    ({"training.push_to_hub": "true"}, "nothing is uploaded"),
    ({"training.log_level": "loud"}, "warning"),
    ({"training.torch_compile_backend": "indutcor"}, "inductor"),
    ({"training.fp16": "true", "training.bf16": None}, "needs a GPU"),
    # what a library refuses only as it comes to it
    ({"training.lr_scheduler_type": "cosine"}, "training.lr_scheduler_kwargs are another schedule's"),
    ({"training.lr_scheduler_kwargs": "{foo: 1}"}, "unexpected keyword argument 'foo'"),
    ({"training.optim": "galore_adamw", "llama.optimizer": "adamw"}, "error: training: "),
    ({"training.report_to": "wandb"}, "error: training: "),
    ({"training.use_cpu": "false"}, "no GPU"),
    ({"run.name": "a/b"}, "folder's name"),
    ({"run.name": "../up"}, "folder's name"),
    ({"run.resume": "true"}, "nothing to resume"),
    ({"run.resume": "true", "run.overwrite": "true"}, "contradict"),
    ({"config": "{}/none.yaml"}, "no such file"),
    ({"config": "{}/broken.yaml"}, "broken.yaml"),
    ({"config": "{}/list.yaml"}, "list.yaml"),
    ({"config": "{}/typo.yaml"}, "max_steps"),
]


def refused(done: Any, says: str, root: Path) -> None:
    assert done.code == 2, done.out + done.err
    assert says in done.err
    assert all(text.startswith("error: ") for text in done.err.splitlines()[:1]), done.err
    assert "Traceback" not in done.err + done.out


@pytest.mark.parametrize(
    ("changes", "says"), CASES, ids=[" ".join(f"{k}={v}" for k, v in c.items())[:60] for c, _ in CASES]
)
def test_it_is_refused(
    run_in_process: Any, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, says: str
) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    done = run_in_process(llama, line(sources, changes), tmp_path)
    refused(done, says, tmp_path)
    assert not (tmp_path / "llama").exists(), "what is left would keep the corrected run from starting"


def test_every_problem_is_said_at_once(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    wrong = {"training.max_step": 3, "llama.block_length": 0, "data.nmae": "x", "run.threads": "two"}
    done = run_in_process(llama, line(sources, wrong), tmp_path)
    assert done.code == 2
    for word in ("max_step", "llama.block_length", "data.nmae", "run.threads"):
        assert word in done.err
    assert not list(tmp_path.iterdir())


def test_bf16_where_there_is_none(
    run_in_process: Any, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "choose_bf16", lambda: Choice(False, "this processor lacks it"))
    done = run_in_process(llama, line(sources, {"training.bf16": "true"}), tmp_path)
    refused(done, "this processor lacks it; leave it out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "more", "says"),
    [
        (["config.yaml", "metrics.json"], {}, "already holds a finished run"),
        (["config.yaml"], {}, "already holds an unfinished run"),
        (["thesis.txt"], {"run.overwrite": "true"}, "not deleting it"),
        (["config.yaml"], {"run.resume": "true"}, "its config was another one"),
    ],
)
def test_a_folder_that_is_taken_is_left_as_it_is(
    run_in_process: Any, sources: Path, tmp_path: Path, files: list[str], more: dict[str, Any], says: str
) -> None:
    folder = tmp_path / "llama" / "default"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}\n")
    refused(run_in_process(llama, line(sources, more), tmp_path), says, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == files
    assert all((folder / name).read_text() == "{}\n" for name in files)


def test_a_run_that_is_refused_leaves_the_one_that_it_was_to_overwrite(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    done = run_in_process(llama, line(sources, {}), tmp_path)
    assert done.code == 0, done.err
    before = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    wrong = line(sources, {"data.name": "{}/txt.txt", "run.overwrite": "true"})
    refused(run_in_process(llama, wrong, tmp_path), "text.txt", tmp_path)
    assert {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()} == before
    again = run_in_process(llama, line(sources, {"run.overwrite": "true"}), tmp_path)
    assert again.code == 0, again.err
    assert [path.name for path in done.folder.parent.iterdir()] == ["default"]


@pytest.mark.parametrize("told", ["2,1", "abc", "0"])
def test_a_number_of_threads_that_is_none(
    told: str, run_in_process: Any, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    refused(run_in_process(llama, line(sources, {}), tmp_path), f"OMP_NUM_THREADS={told}: give one number", tmp_path)


def test_a_file_in_the_way_of_the_run_folder(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "default").write_text("a file")
    refused(run_in_process(llama, line(sources, {}), tmp_path), "is a file, not a run folder", tmp_path)


def test_a_file_in_the_way_of_the_root(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    refused(run_in_process(llama, line(sources, {}), tmp_path / "root"), "choose another --run.root", tmp_path)


@pytest.mark.slow
def test_a_disk_that_is_full_and_then_is_not(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    """No file may grow beyond 60 kB, which the weights do: one error, and the run goes on once there is room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = line(sources, {"training.save_steps": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        done = run_in_process(llama, words, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(done, "free space and go on with --run.resume true", tmp_path)
    again = run_in_process(llama, [*words, "--run.resume", "true"], tmp_path)
    assert again.code == 0, again.err
    assert [row["step"] for row in again.history()] == [1, 2]
