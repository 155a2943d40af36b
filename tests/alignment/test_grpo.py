"""GRPO: its loss and group baseline against the formulas, what a reward is shown, and the recipe end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.alignment import grpo
from recipes.common import policy_figures, rlhf
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder


def letters(answers: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward that a random model gets some of: the share of small letters."""
    return [sum(c.isascii() and c.islower() for c in text) / max(1, len(text)) for text in answers]


def rows(count: int = 64) -> list[dict[str, Any]]:
    return [{"prompt": f"Is it {n}?", "task": "echo", "answer": "k", "shade": f"s{n}"} for n in range(count)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def arguments(tiny: Path, data: Path, root: Path, **more: object) -> list[str]:
    """A command line; `training__beta=0.5` stands for `--training.beta 0.5`."""
    given = {
        "model__name": tiny,
        "data__name": data,
        "grpo__rewards": f"[{__name__}:letters]",
        "grpo__missing_stop_penalty": 0,
        "training__num_generations": 8,
        "training__per_device_train_batch_size": 32,
        "training__steps_per_generation": 2,
        "training__num_iterations": 2,
        "training__max_completion_length": 4,
        "training__max_steps": 24,
        "training__learning_rate": 5e-2,
        "training__logging_steps": 4,
        "training__save_steps": 100,
        "training__bf16": "false",
        "evaluation__max_samples": 16,
        "evaluation__max_new_tokens": 4,
        "run__root": root,
        "run__threads": 1,
        **more,
    }
    return [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def run(*given: object, **more: object) -> int:
    return run_recipe(grpo.main, grpo.Config, arguments(*given, **more))  # type: ignore[arg-type]


def trainer_of(tiny: Path, folder: Path, reward: Any, own_pad: bool = True, **training: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if not own_pad:
        tokenizer.pad_token = tokenizer.eos_token
    fixed = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "num_generations": 4,
        "per_device_train_batch_size": 8, "steps_per_generation": 1, "max_completion_length": 5,
    }  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **{**fixed, **training})
    asked = [{**row, "prompt": [{"role": "user", "content": row["prompt"] + "!" * i}]} for i, row in enumerate(rows(8))]
    data = Dataset.from_list(asked)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    wrapped = grpo.as_trl(grpo.of_texts(reward), "mine", tokenizer, [tokenizer.eos_token_id])
    trainer = GRPOTrainer(model, wrapped, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


# ---------------------------------------------------------------- rewards


def test_a_reward_is_shown_the_rows_fields_and_the_answer_as_it_was_written(tiny):
    """Special tokens inside an answer are shown; whether it ends is the penalty's to say."""
    from transformers import AutoTokenizer

    from recipes.common.verifiable_rewards import tasks

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    k, stop, user = (tokenizer.convert_tokens_to_ids(t) for t in ("k", "<|end|>", "<|user|>"))
    seen = []

    def spy(answers, rows):
        seen.append((list(answers), [row["shade"] for row in rows]))
        return tasks(answers, rows)

    reward = grpo.as_trl(grpo.of_texts(spy), "a:b", tokenizer, [stop])
    told: dict[str, float] = {}
    values = reward(
        prompts=["p"] * 4,
        completions=[[{"role": "assistant", "content": "k"}]] * 4,  # what trl makes of all of them
        completion_ids=[[k, stop], [k, user, stop], [k], [k, k, k]],
        log_metric=told.__setitem__,
        task=["echo"] * 4, answer=["k"] * 4, shade=["a", "b", "c", "d"],
        trainer_state=object(), log_extra=print,
    )  # fmt: skip
    assert seen == [(["k", "k<|user|>", "k", "kkk"], ["a", "b", "c", "d"])]
    assert values == [1.0, 0.0, 1.0, 0.0]
    assert told == {"true_score": 0.5}
    assert reward.__name__ == "a.b" and len(reward.latest) == 4
    learned = grpo.as_trl(lambda answers, rows: [float(answer.ended) for answer in answers], "c", tokenizer, [stop])
    assert learned(["p"] * 2, None, completion_ids=[[k, stop], [k, k]]) == [1.0, 0.0]


def test_an_answer_that_does_not_end_loses_the_penalty_once_however_many_rewards_there_are(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    k, stop, other = (tokenizer.convert_tokens_to_ids(t) for t in ("k", "<|end|>", "<|tool|>"))
    config = SimpleNamespace(
        grpo=grpo.GRPO(rewards=["tasks", "tasks"], missing_stop_penalty=0.5),
        training=SimpleNamespace(reward_weights=[0.25, 0.75]),
    )
    rewards = grpo.load_rewards(
        config, ["task", "answer"], tokenizer, [stop, other], RunFolder(tmp_path, recipe="grpo")
    )
    asked = {"prompts": ["p"] * 4, "completions": ["k"] * 4, "completion_ids": [[k, stop], [k, other], [k], []]}
    told = [one(**asked, task=["echo"] * 4, answer=["k"] * 4) for one in rewards]
    totals = [
        sum(w * value for w, value in zip(config.training.reward_weights, values, strict=True))
        for values in zip(*told, strict=True)
    ]
    assert totals == [1.0, 1.0, 0.5, -0.5]
    assert [one.__name__ for one in rewards] == ["tasks", "tasks", "missing_stop"]


def test_as_many_weights_as_rewards(tiny, tmp_path):
    config = SimpleNamespace(grpo=grpo.GRPO(rewards=["tasks"]), training=SimpleNamespace(reward_weights=[0.25, 0.75]))
    with pytest.raises(UserError, match=r"training\.reward_weights: 2 weights for 1 grpo\.rewards"):
        grpo.load_rewards(config, ["task", "answer"], None, [], RunFolder(tmp_path, recipe="grpo"))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([1.0], "1 numbers for 2"),
        ([1.0, float("nan")], "nan"),
        ([float("inf"), 0.0], "inf"),
        ([1.0, None], "else than a list of numbers"),
        (1.0, "else than a list of numbers"),
    ],
)
def test_what_a_reward_must_not_give_is_refused(tiny, told, said):
    from transformers import AutoTokenizer

    reward = grpo.as_trl(lambda answers, rows: told, "a:b", AutoTokenizer.from_pretrained(tiny), [1])
    with pytest.raises(UserError, match=rf"grpo.rewards: a:b: it gave .*{said}"):
        reward(prompts=["p"] * 2, completions=["k"] * 2, completion_ids=[[5], [6]])


def test_a_reward_model_that_gives_no_number_is_refused(tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from recipes.common.generation import Answer
    from recipes.common.own_answers import reward_scores

    judge = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    judge.score.weight.data.fill_(float("nan"))
    asked = [{"prompt": [{"role": "user", "content": "Is it?"}]}]
    with pytest.raises(UserError, match="the reward model: it gave an answer the score nan"):
        reward_scores(judge, AutoTokenizer.from_pretrained(tiny), asked, [[Answer("k"), Answer("c")]], 4)


def test_the_rows_fields_reach_it_through_trl(tiny, tmp_path):
    seen = []

    def spy(answers, rows):
        seen.extend((row["prompt"][0]["content"], row["shade"], row["answer"]) for row in rows)
        return letters(answers, rows)

    trainer = trainer_of(tiny, tmp_path, spy)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert len(seen) == 8
    assert all(prompt.rstrip("!") == f"Is it {shade[1:]}?" and answer == "k" for prompt, shade, answer in seen)
    assert len(set(seen[:4])) == len(set(seen[4:])) == 1 and seen[0] != seen[4]  # two groups of four


# ---------------------------------------------------------------- group baseline, clip-higher, length


def test_an_answers_advantage_is_its_distance_from_its_groups_mean(tiny, tmp_path):
    values = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    trainer = trainer_of(tiny, tmp_path, lambda answers, rows: values.flatten().tolist())
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    expected = (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(inputs["advantages"], expected.flatten(), atol=1e-5, rtol=0)
    assert (inputs["advantages"][4:] == 0).all()  # all alike: nothing to learn


def test_padding_with_the_stop_token_changes_nothing(tiny, tmp_path):
    """A policy without a pad token: the tokens that are learned from, and their advantages, are the same."""
    told = []
    for own in (True, False):
        trainer = trainer_of(tiny, tmp_path, letters, own_pad=own)
        trainer.model.train()
        torch.manual_seed(0)
        told.append(trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader()))))
    for name in ("prompt_mask", "completion_mask", "advantages"):
        torch.testing.assert_close(told[0][name], told[1][name])
    mask = told[0]["completion_mask"]
    assert torch.equal(told[0]["completion_ids"] * mask, told[1]["completion_ids"] * mask)
    assert not torch.equal(told[0]["prompt_ids"], told[1]["prompt_ids"])  # two lengths of prompt in the batch


def test_the_reference_never_changes_and_the_policy_does(tiny, tmp_path):
    more = {"beta": 0.1, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    trainer = trainer_of(tiny, tmp_path, letters, **more)
    watched = (trainer.ref_model, trainer.model)
    before, after = [], []
    for kept in (before, after):
        kept += [hash(tuple(p.detach().numpy().tobytes() for p in model.parameters())) for model in watched]
        if kept is before:
            trainer.train()
    assert after[0] == before[0] and after[1] != before[1]


def made_up_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """A batch with answers of 1, 5, 3 and 5 tokens, and ratios far from 1."""
    torch.manual_seed(3)
    prompts = torch.randint(10, 200, (4, 6))
    answers = torch.randint(10, 200, (4, 5))
    mask = (torch.arange(5) < torch.tensor([1, 5, 3, 5])[:, None]).long()
    ids = torch.cat([prompts, answers], dim=1)
    with torch.no_grad():
        logits = policy_figures.response_logits(trainer.model, ids, torch.ones_like(ids), 6).logits
        logprobs = rlhf.token_logprobs(logits, answers)
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.25, 1.5])[torch.stack([torch.randperm(5) for _ in range(4)])]
    ratio[0, 0] = 1.25  # which clip-higher lets rise
    return {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers, "completion_mask": mask,
        "advantages": torch.tensor([1.0, 1.0, -1.0, -0.5]), "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logprobs - ratio.log(),
    }  # fmt: skip


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_loss_is_ppos_with_another_upper_clip_and_the_length_divides_as_the_type_says(tiny, tmp_path, loss_type):
    trainer = trainer_of(tiny, tmp_path, letters, loss_type=loss_type, epsilon=0.2, epsilon_high=0.28)
    trainer.model.train()
    batch = made_up_batch(trainer)
    mask, advantages, old = batch["completion_mask"].float(), batch["advantages"][:, None], batch["old_per_token_logps"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logprobs = rlhf.token_logprobs(
        policy_figures.response_logits(trainer.model, ids, attention, 6).logits, batch["completion_ids"]
    )
    ratio = torch.exp(logprobs - old)
    token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = {
        "grpo": ((token * mask).sum(1) / mask.sum(1)).mean(),
        "bnpo": (token * mask).sum() / mask.sum(),
        "dapo": (token * mask).sum() / mask.sum(),
        "dr_grpo": (token * mask).sum() / (4 * 5),
    }[loss_type]
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), expected, atol=1e-5, rtol=1e-4)


def test_scoring_only_the_answers_changes_neither_loss_nor_gradient(tiny, tmp_path):
    from recipes.common import sft

    seen = []
    for ours in (False, True):
        trainer = trainer_of(tiny, tmp_path, letters, beta=0.1)
        if ours:
            sft.project_only_labels(trainer.model)
        trainer.model.train()
        batch = {**made_up_batch(trainer), "ref_per_token_logps": torch.full((4, 5), -5.0)}
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        seen.append((loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
        seen[-1] += (trainer._metrics["train"]["entropy"][-1],)
    torch.testing.assert_close(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-6, rtol=1e-4)
    assert seen[0][2] == pytest.approx(seen[1][2], abs=1e-5)


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tiny, questions, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert run(tiny, questions, root, training__beta=0.01) == 0
    return root / "grpo" / "default"


def test_held_out_reward_rises_at_a_kl_that_is_reported(trained):
    figures = json.loads((trained / "metrics.json").read_text())
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert figures["reward_after"] > figures["reward_before"] + 0.25
    assert 0 < figures["kl"] < 40
    assert {"exact_match", "sampled_exact_match", "baseline_exact_match"} <= set(figures)
    assert [row["step"] for row in history] == [4, 8, 12, 16, 20, 24]
    wanted = {"reward", "true_score", "kl", "entropy", "clip_ratio/region_mean", "completions/mean_length"}
    assert all(wanted <= set(row) for row in history)
    assert history[-1]["tokens_per_second"] > 0
    for plot in ("reward", "groups", "policy", "length"):
        assert (trained / "plots" / f"{plot}.png").stat().st_size > 5_000
    assert list((trained / "samples").glob("step_*.txt"))
    assert "greedy answers changed" in (trained / "samples" / "before_and_after.txt").read_text()


@pytest.mark.parametrize("stop_after", [4, 6, 7])  # between two batches of answers; within one
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    trained, tiny, questions, tmp_path, monkeypatch, stop_after
):
    from safetensors.torch import load_file

    from recipes.common import training

    left = iter(range(1, 1000))

    def asked(self):
        self.reason = "test"
        return next(left) >= stop_after

    monkeypatch.setattr(training.StopSignals, "asked", asked)
    assert run(tiny, questions, tmp_path, training__beta=0.01) == 130
    monkeypatch.undo()
    assert run(tiny, questions, tmp_path, training__beta=0.01, run__resume="true") == 0
    ours, whole = (load_file(p / "model" / "model.safetensors") for p in (tmp_path / "grpo" / "default", trained))
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
def test_an_adapter_learns_too(tiny, questions, tmp_path):
    more = {
        "lora__r": 8,
        "lora__lora_alpha": 8,
        "lora__target_modules": "[q_proj, v_proj, down_proj]",
        "training__learning_rate": 5e-2,
    }
    assert run(tiny, questions, tmp_path, **more, training__max_steps=8) == 0
    folder = tmp_path / "grpo" / "default"
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["kl"] > 0 and figures["trainable_parameters"] < figures["parameters"] / 4
    assert (folder / "adapter" / "adapter_model.safetensors").exists() and (folder / "model" / "config.json").exists()


def test_rewards_that_tell_nothing_apart_are_said_once(tiny, questions, tmp_path, capsys):
    reward = "[tests.alignment.reward_functions:alike]"
    assert run(tiny, questions, tmp_path, grpo__rewards=reward, training__max_steps=8) == 0
    assert capsys.readouterr().out.count("  step 4: all answers to each prompt got the same reward") == 1


def test_columns_with_the_names_of_a_rewards_arguments_are_left_out(tiny, tmp_path):
    """trl hands a reward its own arguments by these names, and every column of the rows too."""
    data = tmp_path / "questions.jsonl"
    more = dict.fromkeys(("prompts", "completions", "completion_ids", "log_metric", "trainer_state"), "a")
    data.write_text("".join(json.dumps(row | more) + "\n" for row in rows()))
    assert run(tiny, data, tmp_path, training__max_steps=1) == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"training__max_completion_length": 124}, "leaves no room for training.max_completion_length 124"),
        ({"grpo__rewards": "[task]"}, "no reward is called task"),
        ({"grpo__rewards": "[]"}, "nothing is rewarded"),
        ({"grpo__rewards": "[nowhere:reward]"}, "cannot be imported"),
        ({"training__num_generations": 1}, "at least 2 generations"),
        ({"training__num_generations": 5}, "divisible by num_generations"),
        ({"training__use_vllm": "true"}, "vllm is not installed"),
        ({"model__name": "null", "model__config": "{model_type: llama}"}, "model.name"),
        ({"lora__init_lora_weights": "false", "lora__lora_alpha": 64}, "lora.init_lora_weights"),
        ({"lora__r": 1000, "lora__lora_alpha": 4, "lora__target_modules": "[q_proj]"}, "lora.r: 1000 is above what"),
        ({"lora__init_lora_weights": "pissa"}, "lora.init_lora_weights"),
        ({"lora__target_modules": "[qproj]"}, "lora.target_modules: nothing in LlamaForCausalLM is called qproj"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, told, tiny, questions, tmp_path, capsys):
    if "training__use_vllm" in more and __import__("importlib.util").util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    assert run(tiny, questions, tmp_path, **more) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_prompt_longer_than_the_context_is_refused_by_its_row(tiny, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({**row, "prompt": row["prompt"] * 40}) + "\n" for row in rows(30)))
    assert run(tiny, path, tmp_path) == 2
    error = capsys.readouterr().err
    assert "the prompt of row 1 ('Is it" in error and "longer than the context of 128" in error
