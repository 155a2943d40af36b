"""The benchmark: turns, ratios, the stored file, how a recipe is timed. The long measurements are not run here."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_chat import make_tokenizer, save_tokenizer_and_model

from recipes.common import machine
from recipes.common.config import load_config
from scripts import bench
from scripts.bench_rows import finetuning, harness, materials, pretraining, recipe_runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def test_contestants_take_turns_in_both_orders() -> None:
    order: list[str] = []

    def contestant(name: str, figure: float) -> float:
        order.append(name)
        return figure

    found = harness.interleave({"a": lambda: contestant("a", 1.0), "ours": lambda: contestant("ours", 2.0)}, 2)
    assert order == ["a", "ours", "ours", "a"]
    assert found == {"a": [1.0, 1.0], "ours": [2.0, 2.0]}


def test_ratio_above_one_is_better_in_either_unit() -> None:
    assert harness.compare({"a": [2.0], "ours": [6.0]}) == {"a": {"median": 3.0, "min": 3.0, "max": 3.0}}
    assert harness.compare({"a": [6.0], "ours": [2.0]}, higher_is_better=False)["a"]["median"] == 3.0


def test_ratio_is_taken_within_a_round() -> None:
    """A machine that gets 10 times slower after the first round changes no ratio."""
    found = harness.compare({"a": [100.0, 10.0, 10.0], "ours": [200.0, 20.0, 30.0]})
    assert found == {"a": {"median": 2.0, "min": 2.0, "max": 3.0}}


def measured(steps: int, rounds: int) -> dict[str, object]:
    return harness.result("help", "--help", "seconds", {"a": [6.0] * rounds, "ours": [2.0] * rounds}, False)


def test_result_is_stored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(bench.ROWS, "help", measured)
    assert bench.main(["help", "--rounds", "2", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "help.json").read_text())
    assert stored["ours_is_better_by"]["a"]["median"] == 3.0
    assert stored["rounds"] == {"a": [6.0, 6.0], "ours": [2.0, 2.0]}
    assert stored["machine"]["cores"] >= 1
    assert {"processor", "versions"} <= set(stored["machine"])
    assert stored["measured_at"].startswith("20")
    assert "| help | a | 6.00 | seconds | 3.00 x (3.00 to 3.00) |" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("no such option"), harness.Failed("no such option")])
def test_a_failing_row_keeps_the_others_and_makes_the_exit_code_1(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def broken(steps: int, rounds: int) -> dict[str, object]:
        raise error

    monkeypatch.setitem(bench.ROWS, "llama", broken)
    monkeypatch.setitem(bench.ROWS, "help", measured)
    assert bench.main(["llama", "help", "--output", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["help.json"]
    told = capsys.readouterr()
    assert "| help | ours |" in told.out
    assert "no such option" in told.err
    assert "not measured, see above: llama" in told.err


def test_seconds_until_a_line_stops_the_process() -> None:
    program = "import time; print('before'); print('step 1/3', flush=True); time.sleep(600)"
    assert harness.seconds_until([sys.executable, "-c", program], r"^step 1/", harness.environment_of_own()) < 300


def test_a_process_that_ends_before_its_first_step_is_a_failure_with_what_it_said() -> None:
    with pytest.raises(harness.Failed, match="no such model"):
        harness.seconds_until(
            [sys.executable, "-c", "print('no such model')"], r"^step 1/", harness.environment_of_own()
        )
    with pytest.raises(harness.Failed, match="ended with 3"):
        harness.call([sys.executable, "-c", "raise SystemExit(3)"], harness.environment_of_own())


def test_a_skipped_row_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(materials, "ALPACA", tmp_path / "absent.json")
    assert bench.main(["sft", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "skipped" in capsys.readouterr().err


def test_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["lama", "--output", str(tmp_path)])
    assert stopped.value.code == 2


# ------------------------------------------------------------------------------------------- recipes as contestants

CHANGED = {
    "pretraining.bert": {
        "bert.row_length": 40,
        "model.config": {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 192,
        },
    },
    "pretraining.t5": {
        "t5.input_length": 32,
        "model.config": {
            "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
        },
    },
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a recipe's laptop config tiny: bytes, a text of some lines, a model of thousands of parameters."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = [f"the {a} sat by the {b}, and ran from the other {b} again." for a in "bcdfgh" for b in "klmnpr"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(materials, "TOKENIZER", tmp_path / "tokenizer")

    def shrink(recipe: str) -> None:
        changed = {key: json.dumps(value) for key, value in CHANGED[recipe].items()}
        corner = {
            "data.name": str(tmp_path / "text.jsonl"), "data.validation_fraction": 0.2,
            "training.per_device_train_batch_size": 4, **changed,
        }  # fmt: skip
        monkeypatch.setattr(recipe_runs, "CORNER", corner)

    return shrink


def test_a_recipe_is_timed_in_its_own_training_and_left(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.common import span_corruption, training

    tiny("pretraining.t5")
    fit, corrupt = training.fit, span_corruption.corrupt

    def slow(*given: Any) -> Any:
        time.sleep(0.02)
        return corrupt(*given)

    monkeypatch.setattr(span_corruption, "corrupt", slow)
    settings = recipe_runs.with_tokenizer(Path("unused"))
    timed = recipe_runs.timed_training("pretraining.t5", 3, **settings)
    assert len(timed.seconds) == len(timed.waits) == 3
    assert all(4 * 0.02 <= wait < second for wait, second in zip(timed.waits, timed.seconds, strict=True))
    assert training.fit is fit


@pytest.mark.parametrize("recipe", pretraining.CORRUPTING)
def test_on_a_gpu_a_recipe_is_timed_at_its_real_sizes_on_data_that_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str
) -> None:
    assert recipe_runs.config_of_this_machine(f"pretraining.{recipe}", tmp_path) == {}
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    written = recipe_runs.config_of_this_machine(f"pretraining.{recipe}", tmp_path)["config"]
    folder = ROOT / "configs" / "pretraining" / recipe
    timed, laptop, real = (yaml.safe_load(f.read_text()) for f in (written, folder / "cpu.yaml", folder / "gpu.yaml"))
    assert timed["model"] == real["model"] and timed["training"] == real["training"]
    assert timed["data"] == laptop["data"]
    module = importlib.import_module(f"recipes.pretraining.{recipe}")
    assert (
        load_config(module.Config, ["--config", str(written)], config_folder=folder).values["data"]["name"] == "pydocs"
    )


def test_a_recipe_that_refuses_its_input_is_a_failure(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("pretraining.bert")
    with pytest.raises(harness.Failed, match=r"pretraining\.bert ended with 2"):
        recipe_runs.timed_training(
            "pretraining.bert", 1, bert__row_length=400, **recipe_runs.with_tokenizer(Path("unused"))
        )
    assert "bert.row_length" in capsys.readouterr().err


def test_the_bert_peer_has_the_recipes_pairs_and_the_librarys_defaults(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("pretraining.bert")
    peers: list[tuple[Any, ...]] = []
    defaults = pretraining.trainer_defaults
    monkeypatch.setattr(pretraining, "trainer_defaults", lambda *given: (peers.append(given), defaults(*given))[1])
    found = pretraining.bert(1, 1)
    assert found["batch"] == [4, 40] and set(found["figures"]) == {pretraining.TRAINER, "ours"}
    assert min(found["figures"].values()) > 0

    model, rows, collate, batch_size, _ = peers[0]
    assert (model.config._attn_implementation, model.dtype.itemsize, batch_size) == ("sdpa", 4, 4)
    mask, tokenizer = collate.tokenizer.mask_token_id, collate.tokenizer
    assert not any(mask in row["input_ids"] for row in rows)
    assert "the " in tokenizer.decode(rows[0]["input_ids"]) and {*rows["next_sentence_label"]} <= {0, 1}
    batch = collate([rows[i] for i in range(16)])
    assert set(batch) == {"input_ids", "token_type_ids", "next_sentence_label", "attention_mask", "labels"}
    hidden = batch["labels"] != -100
    marks = sum(i in tokenizer.all_special_ids for i in batch["labels"][hidden].tolist())
    assert 0.2 < hidden.float().mean() < 0.4 and marks == 0  # the laptop config's 30 %


def test_the_t5_peer_has_the_recipes_spans(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("pretraining.t5")
    peers: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pretraining, "trainer_defaults", lambda *given: (peers.append(given), [0.5])[1])
    found = pretraining.t5(1, 1)
    assert found["figures"][pretraining.TRAINER] == 4 * found["batch"][1] / 0.5
    model, rows, collate, *_ = peers[0]
    batch = collate([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"], rows[1]["input_ids"]]
    assert model(**batch).loss > 0


def test_waiting_for_data_has_a_figure_a_recipe_and_a_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"bert": recipe_runs.Timed([1.0, 3.0], [0.1, 0.1]), "t5": recipe_runs.Timed([2.0], [0.02])}
    monkeypatch.setattr(pretraining, "CORRUPTING", tuple(timed))
    monkeypatch.setattr(pretraining, "timed_training", lambda recipe, steps, **_: timed[recipe.split(".")[1]])
    found = pretraining.data(2, 1)
    assert found["figures"] == {"bert": 5.0, "t5": 1.0} and found["goal"] == 5.0
    assert "| data | bert | 5.00 | % of a step |  |" in harness.table([found])


def test_the_lora_recipe_against_a_loop_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop learns as many numbers, from the same packed rows, and its loss is finite."""
    import peft

    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(99)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(recipe_runs, "CORNER", {"data.name": str(tmp_path / "chat.jsonl"), "lora.r": 2})

    def small(folder: Path, positions: int) -> None:
        save_tokenizer_and_model(tmp_path)
        (tmp_path / "model").rename(folder / "model")
        for file in (folder / "model").iterdir():
            file.rename(folder / file.name)

    monkeypatch.setattr(finetuning, "small_chat_model", small)
    wrapped, learned = peft.get_peft_model, []

    def seen(*given: Any, **options: Any) -> Any:
        model = wrapped(*given, **options)
        learned.append(model.get_nb_trainable_parameters())
        return model

    monkeypatch.setattr(peft, "get_peft_model", seen)
    found = finetuning.adapter("lora", 1, 1)
    precision = "bf16" if machine.choose_bf16().value else "fp32"
    assert set(found["figures"]) == {f"PEFT loop by hand, {precision}", "ours"} and min(found["figures"].values()) > 0
    assert found["batch"] == [24, 64] and found["adapter"] == "LORA"
    assert len(learned) == 3 and len(set(learned)) == 1  # the recipe looked at, the loop, the recipe timed
