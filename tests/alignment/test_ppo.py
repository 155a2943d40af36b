"""PPO, the recipe end to end on a tiny model: what a run leaves, resume, two processes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.alignment import ppo
from recipes.common import generation
from recipes.common.recipe import run_recipe
from tests.alignment import seeded_ppo
from tests.conftest import ROOT


def arguments(tiny: Path, judge: Path, data: Path, root: Path, **more: object) -> list[str]:
    """A command line; `ppo__clip=0.1` stands for `--ppo.clip 0.1`."""
    given = {
        "model__name": tiny,
        "data__name": data,
        "ppo__reward_model": judge,
        "ppo__rollouts": 128,
        "ppo__max_new_tokens": 4,
        "ppo__kl_coefficient": 0.01,
        "ppo__critic": "separate",
        "ppo__answers": 1,
        "ppo__epochs": 2,
        "training__gradient_accumulation_steps": 1,
        "training__adam_beta2": 0.95,
        "training__max_steps": 8,
        "training__learning_rate": 1e-2,
        "training__per_device_train_batch_size": 32,
        "training__bf16": "false",
        "evaluation__max_samples": 16,
        "evaluation__max_new_tokens": 4,
        "run__root": root,
        "run__threads": 1,
        **more,
    }
    if not any(key.startswith("lora") for key in given):
        given["lora"] = "null"  # all of the tiny model's weights learn
    return [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def run(*given: object, **more: object) -> int:
    return run_recipe(ppo.main, ppo.Config, arguments(*given, **more))  # type: ignore[arg-type]


# ---------------------------------------------------------------- end to end

LONGER = {"training__max_steps": 12, "ppo__kl_target": 2.0}


@pytest.fixture(scope="module")
def trained(tiny, judge, preferences, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert run(tiny, judge, preferences, root, **LONGER) == 0
    return root / "ppo" / "default"


def test_reward_rises_at_a_kl_that_is_reported(trained):
    figures = json.loads((trained / "metrics.json").read_text())
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert figures["reward_after"] > figures["reward_before"] + 0.5
    assert 0 < figures["kl"] < 20
    assert [row["step"] for row in history] == list(range(1, 13))
    assert history[0]["kl"] == history[0]["kl_k3"] == history[0]["ratio_error"] == 0.0
    wanted = {
        "reward",
        "kl",
        "kl_k3",
        "entropy",
        "clip_fraction",
        "explained_variance",
        "value_loss",
        "response_length",
    }
    assert all(wanted <= set(row) for row in history)
    assert "true_score" not in history[0]  # these answers cannot be checked
    assert history[-1]["kl_coefficient"] != history[0]["kl_coefficient"]
    for plot in ("reward_and_true_score", "frontier", "kl", "critic", "policy"):
        assert (trained / "plots" / f"{plot}.png").stat().st_size > 5_000


@pytest.mark.slow
def test_reward_rises_without_a_critic_too(tiny, judge, preferences, tmp_path):
    more = {"training__max_steps": 12, "ppo__critic": "others", "ppo__answers": 4}
    assert run(tiny, judge, preferences, tmp_path, **more) == 0
    folder = tmp_path / "ppo" / "default"
    figures = json.loads((folder / "metrics.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert figures["reward_after"] > figures["reward_before"] + 0.5
    assert history[0]["ratio_error"] == 0.0 and "explained_variance" not in history[0]


@pytest.mark.slow
def test_while_the_critic_warms_up_the_policy_and_its_kl_coefficient_stay(tiny, judge, preferences, tmp_path):
    """AdamW would shrink weights without a gradient too, and a KL of 0 would lower the coefficient."""
    warm = {"training__max_steps": 3, "ppo__critic_warmup": 3, "training__weight_decay": 0.1, "ppo__kl_target": 2.0}
    assert run(tiny, judge, preferences, tmp_path, **warm) == 0
    folder = tmp_path / "ppo" / "default"
    before, after = (load_file(f / "model.safetensors") for f in (tiny, folder / "model"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kl_coefficient"] for row in rows if "kl_coefficient" in row} == {0.01}


@pytest.mark.slow
def test_shares_of_the_run_and_a_schedule_with_settings_are_honoured(tiny, judge, preferences, tmp_path):
    """As under the libraries' Trainers: a line and a checkpoint each half of the run, and the schedule's own arguments."""
    half = {"training__max_steps": 4, "training__logging_steps": 0.5, "training__save_steps": 0.5}
    wsd = {
        "training__lr_scheduler_type": "warmup_stable_decay",
        "training__lr_scheduler_kwargs": "{num_decay_steps: 1}",
    }
    assert run(tiny, judge, preferences, tmp_path, **half, **wsd) == 0
    folder = tmp_path / "ppo" / "default"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ppo__critic": "others"}, "ppo.critic"),
        ({"ppo__critic": "others", "ppo__answers": 2, "ppo__critic_warmup": 1}, "ppo.critic"),
        ({"ppo__answers": 3}, "ppo.answers"),
    ],
)
def test_answers_that_cannot_be_compared_or_dealt_out_are_refused(
    tiny, judge, preferences, tmp_path, capsys, more, said
):
    assert run(tiny, judge, preferences, tmp_path, **more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ppo" / "default").exists()


def test_gradient_checkpointing_is_at_work_in_an_update(tiny, judge, preferences, tmp_path, monkeypatch):
    """transformers checkpoints a layer in training mode alone, and what `from_pretrained` gives is in evaluation mode."""
    from transformers import modeling_utils

    plain, seen = modeling_utils.checkpoint, []

    def checkpoint(layer, *given, **more):
        seen.append(torch.is_grad_enabled())
        return plain(layer, *given, **more)

    monkeypatch.setattr(modeling_utils, "checkpoint", checkpoint)
    short = {"ppo__rollouts": 32, "ppo__epochs": 1, "training__max_steps": 1, "evaluation__max_samples": 4}
    assert run(tiny, judge, preferences, tmp_path, training__gradient_checkpointing="true", **short) == 0
    assert sum(seen) == 4  # two layers of the policy, two of the critic, one micro-batch
    metrics = (tmp_path / "ppo" / "default" / "metrics.jsonl").read_text().splitlines()
    assert [row["ratio_error"] for row in map(json.loads, metrics) if "ratio_error" in row] == [0.0]


def test_what_answered_is_what_learns_though_the_model_has_dropout(tiny, judge, preferences, tmp_path):
    import shutil

    wet = tmp_path / "wet"
    shutil.copytree(tiny, wet)
    config = json.loads((wet / "config.json").read_text())
    (wet / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    short = {"ppo__rollouts": 32, "ppo__epochs": 1, "training__max_steps": 1, "evaluation__max_samples": 4}
    assert run(wet, judge, preferences, tmp_path, **short) == 0
    metrics = (tmp_path / "ppo" / "default" / "metrics.jsonl").read_text().splitlines()
    assert [row["ratio_error"] for row in map(json.loads, metrics) if "ratio_error" in row] == [0.0]


def test_rewards_that_tell_nothing_apart_are_said_once(tiny, judge, preferences, tmp_path, capsys):
    alike = {"ppo__reward_model": "null", "ppo__reward_function": "tests.alignment.reward_functions:alike"}
    sizes = {"ppo__rollouts": 32, "ppo__epochs": 1, "training__max_steps": 2, "evaluation__max_samples": 4}
    sizes |= {"ppo__missing_stop_penalty": 0, "ppo__critic": "others", "ppo__answers": 2}
    assert run(tiny, judge, preferences, tmp_path, **alike, **sizes) == 0
    assert capsys.readouterr().out.count("  step 1: all answers to each prompt got the same reward") == 1


def test_policy_loads_as_a_plain_causal_model_without_value_head(trained, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert AutoTokenizer.from_pretrained(trained / "model").chat_template
    assert {n for n, _ in model.named_parameters()} == {
        n for n, _ in AutoModelForCausalLM.from_pretrained(tiny).named_parameters()
    }


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    trained, tiny, judge, preferences, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    from recipes.common import training

    given = tiny, judge, preferences, tmp_path
    stop_after = {"steps": 5}

    def asked(self):
        stop_after["steps"] -= 1
        self.reason = "test" if stop_after["steps"] == 0 else None
        return self.reason is not None

    monkeypatch.setattr(training.StopSignals, "asked", asked)
    assert run(*given, **LONGER) == 130
    monkeypatch.undo()
    assert run(*given, **LONGER, run__resume="true") == 0
    ours, whole = (load_file(p / "model" / "model.safetensors") for p in (tmp_path / "ppo" / "default", trained))
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)
    mine, theirs = (
        json.loads((p / "metrics.jsonl").read_text().splitlines()[-1]) for p in (tmp_path / "ppo" / "default", trained)
    )
    for name in ("loss", "kl", "reward", "kl_coefficient"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6)


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": f"It is {n}, and q. " * 3}) + "\n" for n in range(60)))
    return path


EVERYTHING = {  # that is off by default
    "ppo__rollouts": 64,
    "ppo__answers": 4,
    "ppo__oversample": 2,
    "ppo__reward_function": "tests.alignment.reward_functions:letters",
    "ppo__critic": "shared",
    "ppo__whitening": "prompt",
    "ppo__kl_estimator": "k3",
    "ppo__kl_target": 2.0,
    "ppo__length_penalty": 0.05,
    "ppo__entropy_coefficient": 0.001,
    "ppo__pretraining_coefficient": 1.0,
    "ppo__pretraining_length": 16,
    "ppo__stop_kl": "null",
    "lora__r": 8,
    "lora__target_modules": "[v_proj, o_proj, up_proj, down_proj]",
    "lora__lora_alpha": 32,
    "training__learning_rate": 3e-2,
    "training__lr_scheduler_type": "constant",
    "training__max_steps": 6,
}


@pytest.fixture(scope="module")
def sharp(tiny, tmp_path_factory) -> Path:
    """The tiny model with larger logits: behind the last norm, those of an embedding of 0.02 leave an adapter no say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharp")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.get_input_embeddings().weight.data *= 10
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_everything(sharp, judge, preferences, prose, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("everything")
    assert run(sharp, judge, preferences, root, **EVERYTHING, pretraining__name=prose) == 0
    return root / "ppo" / "default"


def test_all_of_it_together_learns_and_tells_what_it_did(with_everything):
    figures = json.loads((with_everything / "metrics.json").read_text())
    history = [json.loads(line) for line in (with_everything / "metrics.jsonl").read_text().splitlines()]
    assert history[0]["kl"] == history[0]["kl_k3"] == history[0]["ratio_error"] == 0.0
    assert figures["reward_after"] > figures["reward_before"] + 0.3 and figures["kl"] > 0
    assert figures["text_loss"] < figures["baseline_text_loss"] - 1  # held-out prose
    assert history[-1]["text_loss"] < history[0]["text_loss"] - 0.1
    assert all(0 < row["informative"] <= 1 and row["minibatches"] == 4 for row in history)  # 2 passes over 64 by 32
    assert figures["trainable_parameters"] < figures["parameters"] / 4
    for plot in ("reward_and_true_score", "frontier", "kl", "critic", "groups", "policy"):
        assert (with_everything / "plots" / f"{plot}.png").stat().st_size > 5_000


def test_the_adapter_on_its_base_and_the_merged_model_are_the_same(with_everything, sharp):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(sharp)
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, with_everything / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(with_everything / "model").eval()(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (plain - merged).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(with_everything / "adapter").chat_template


def test_all_of_it_together_is_resumed_exactly(
    with_everything, sharp, judge, preferences, prose, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    from recipes.common import training

    given, more = (sharp, judge, preferences, tmp_path), {**EVERYTHING, "pretraining__name": prose}
    left = iter(range(2, -1, -1))  # stops before the third step

    def asked(self):
        self.reason = "test" if next(left) == 0 else None
        return self.reason is not None

    monkeypatch.setattr(training.StopSignals, "asked", asked)
    assert run(*given, **more) == 130
    monkeypatch.undo()
    assert run(*given, **more, run__resume="true") == 0
    folder = tmp_path / "ppo" / "default"
    ours, whole = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (folder, with_everything))
    assert ours.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)
    mine, theirs = (json.loads((p / "metrics.jsonl").read_text().splitlines()[-1]) for p in (folder, with_everything))
    for name in ("loss", "kl", "reward", "kl_coefficient", "text_loss"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6)


TWO = {  # a pass is one minibatch: which rows come together does not depend on the number of processes
    "ppo__rollouts": 32,
    "ppo__epochs": 2,
    "ppo__stop_kl": "null",
    "ppo__kl_target": 2.0,
    "training__optim": "sgd",  # Adam would make as much of a rounding as of a gradient
    "training__learning_rate": 0.5,
    "training__gradient_accumulation_steps": 1,
    "training__max_steps": 4,
    "training__save_steps": 100,
    "evaluation__max_samples": 4,
}


@pytest.fixture
def beside_one_process(execute, tmp_path, monkeypatch):
    """Run one line in this process and in the two that `launcher` starts: (one's rows, two's rows, two's weights, one's weights)."""

    def run_both(line, launcher, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(generation, "generate_ids", seeded_ppo.seeded)
            alone = line(tmp_path / "one", training__per_device_train_batch_size=32)
            assert run_recipe(ppo.main, ppo.Config, alone) == 0
        given = line(tmp_path / "two", training__per_device_train_batch_size=16)
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = execute([sys.executable, *launcher, seeded_ppo.__file__, *given], timeout=600, **environment)
        assert done.returncode == 0, done.stderr
        folders = [tmp_path / processes / "ppo" / "default" for processes in ("one", "two")]
        one, two = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
        ours, whole = (load_file(f / "model" / "model.safetensors") for f in reversed(folders))
        return one, two, ours, whole

    return run_both


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ppo__critic": "shared", "ppo__pretraining_coefficient": 0.5, "ppo__entropy_coefficient": 0.01},
        {"ppo__critic_warmup": 1},  # DDP waits for the policy's gradients in that step too
        {
            "ppo__critic": "others",
            "ppo__answers": 4,
            "lora__r": 4,
            "lora__lora_alpha": 8,
            "lora__target_modules": "[v_proj, o_proj, up_proj, down_proj]",
        },
    ],
    ids=["separate", "shared", "warmup", "others"],
)
def test_two_processes_take_the_steps_of_one(tiny, judge, preferences, prose, beside_one_process, more):
    """LAUNCH=ddp NPROC=2 on CPU, each with half of the answers: the figures and the weights of one process with all.

    All that is changed is what the answers are drawn by: seeds of their prompt's own here, each process's otherwise.
    """
    text = {"pretraining__name": prose, "ppo__pretraining_length": 16} if "ppo__pretraining_coefficient" in more else {}
    one, two, ours, whole = beside_one_process(
        lambda root, **size: arguments(tiny, judge, preferences, root, **TWO, **more, **text, **size),
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ACCELERATE_USE_CPU="true",
    )
    assert [row["step"] for row in two] == [1, 2, 3, 4] and two[-1]["kl"] != 0 and two[0]["ratio_error"] == 0
    names = {"loss", "policy_loss", "value_loss", "clip_fraction", "update_kl", "reward", "kl", "entropy"}
    names |= {"response_length", "kl_coefficient"} | ({"text_loss"} if text else set())
    for name in names | ({"explained_variance"} if more.get("ppo__critic") != "others" else {"informative"}):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=2e-4, rel=1e-3), name
    start = load_file(tiny / "model.safetensors")
    for name, weight in whole.items():
        assert (ours[name] - weight).norm() < 0.02 * (weight - start[name]).norm() + 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_a_sharded_run_takes_the_steps_of_one_process(tiny, judge, preferences, beside_one_process, launch):
    """Policy, critic and reference cut in two: answers, figures and the saved policy are those of one process."""
    pytest.importorskip("deepspeed")
    one, two, ours, whole = beside_one_process(
        lambda root, **size: arguments(tiny, judge, preferences, root, **TWO, **size),
        ["tests/sharded_on_cpu.py", launch, "2"],
    )
    assert len(two) == 4 and two[-1]["kl"] != 0 and two[0]["ratio_error"] == 0
    for name in ("loss", "policy_loss", "value_loss", "reward", "kl", "entropy", "explained_variance"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=2e-4, rel=1e-3), name
    start = load_file(tiny / "model.safetensors")
    assert ours.keys() == whole.keys()
    for name, weight in whole.items():
        assert (ours[name] - weight).norm() < 0.02 * (weight - start[name]).norm() + 1e-5, name


@pytest.mark.slow
def test_a_checker_alone_raises_the_held_out_reward(tiny, preferences, tmp_path):
    more = {
        "ppo__reward_model": "null",
        "ppo__reward_function": "tests.alignment.reward_functions:letters",
        "ppo__critic": "others",
    }
    more |= {"ppo__answers": 4, "ppo__missing_stop_penalty": 0, "ppo__oversample": 2, "ppo__rollouts": 64}
    assert run(tiny, "null", preferences, tmp_path, **more, training__max_steps=16) == 0
    folder = tmp_path / "ppo" / "default"
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["reward_before"] < 0.1 and figures["reward_after"] > figures["reward_before"] + 0.2
    assert figures["kl"] > 0


# ---------------------------------------------------------------- bad input

FUNCTION = {"ppo__reward_model": "null", "ppo__reward_function": "tests.alignment.reward_functions:letters"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ppo__rollouts": 50}, "multiple of the minibatch"),
        ({"ppo__max_new_tokens": 200}, "positions"),
        ({"ppo__max_prompt_length": 1}, "ppo.max_prompt_length"),
        ({"ppo__reward_model": "null"}, "nothing is rewarded"),
        (FUNCTION, "ppo.critic: separate starts from the reward model"),
        ({"ppo__reward_function": "task"}, "no reward is called task"),
        ({"ppo__reward_function": "tasks"}, "reads the column task"),
        ({"ppo__reward_function": "nowhere:reward"}, "cannot be imported"),
        ({"ppo__oversample": 2}, "ppo.oversample"),
        ({"ppo__kl_coefficient": 0, "ppo__kl_target": 2}, "ppo.kl_target: it steers ppo.kl_coefficient by factors"),
        ({"ppo__whitening": "prompt"}, "ppo.whitening"),
        ({"ppo__pretraining_coefficient": 1}, "ppo.pretraining_coefficient"),
        ({"pretraining__name": "pydocs"}, "ppo.pretraining_coefficient"),
        ({"ppo__engine": "vllm"}, "ppo.engine: vllm is not installed"),
        ({"lora__target_modules": "[q_pro]"}, "did you mean q_proj"),
        ({"lora__init_lora_weights": "false", "lora__lora_alpha": 4}, "lora.init_lora_weights"),
        ({"lora__init_lora_weights": "pissa", "lora__lora_alpha": 4}, "lora.init_lora_weights"),
        ({"model__attention": "flex_attention"}, "use sdpa, or eager"),
        ({"ppo__gamma": 1.01}, "ppo.gamma"),
        ({"ppo__lam": 95}, "ppo.lam"),
        ({"lora__lora_dropout": 0.1}, "lora.lora_dropout: 0.1 has no say here"),
        ({"training__data_seed": 1}, "training.data_seed: 1 has no say"),
        ({"training__torch_compile": "true"}, "training.torch_compile: True has no say"),
        ({"training__neftune_noise_alpha": 5}, "training.neftune_noise_alpha: 5.0 has no say"),
        ({"training__label_smoothing_factor": 0.1}, "training.label_smoothing_factor: 0.1 has no say"),
        ({"training__per_device_eval_batch_size": 4}, "training.per_device_eval_batch_size: 4 has no say"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, said, tiny, judge, preferences, tmp_path, capsys):
    if "ppo__engine" in more and importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    assert run(tiny, judge, preferences, tmp_path, **more) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_reward_model_with_another_tokenizer_is_refused(tiny, judge, preferences, tmp_path, capsys):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(judge, other)
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    assert run(tiny, other, preferences, tmp_path) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_reward_model_that_is_asked_by_another_template_is_refused(tiny, judge, preferences, tmp_path, capsys):
    """The same vocabulary and other tokens for the same conversation: it would score what it was never trained on."""
    import shutil

    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(judge, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- '<|' ~", "{{- ' <|' ~")
    tokenizer.save_pretrained(other)
    assert run(tiny, other, preferences, tmp_path) == 2
    error = capsys.readouterr().err
    assert "ppo.reward_model" in error and "another chat template" in error and "Traceback" not in error


def test_a_language_model_is_no_reward_model(tiny, preferences, tmp_path, capsys):
    assert run(tiny, tiny, preferences, tmp_path) == 2
    assert "reward model" in capsys.readouterr().err
