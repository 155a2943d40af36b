"""What DPO, GRPO and the reward model say of themselves: of held-out rows, of the right model, under the right name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from recipes.alignment import dpo, reward_model
from recipes.common import own_answers, policy_figures
from recipes.common.sections import Evaluation
from tests.alignment import test_dpo, test_grpo, test_reward_model
from tests.alignment.test_grpo import questions  # noqa: F401
from tests.alignment.test_reward_model import trained  # noqa: F401


def test_an_answer_is_to_the_prompt_of_its_row(tiny, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.common import generation

    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    rows = [{"prompt": [{"role": "user", "content": letter}]} for letter in "kcqf"]
    monkeypatch.setattr(
        generation,
        "generate_ids",
        lambda policy, prompts, **_: [
            [t for t in prompt if tokenizer.decode([t]) in "kcqf"][-1:] for prompt in prompts
        ],
    )  # says the question again
    told = own_answers.sample_answers(model, tokenizer, rows, 3, Evaluation())
    assert [[answer.text for answer in some] for some in told] == [[letter] * 3 for letter in "kcqf"]


def test_figures_of_held_out_pairs_are_those_of_each_sequence_alone(tiny, tmp_path):
    setup = test_dpo.Setup(tiny, tmp_path, moved=True)
    ratios = setup.log_ratios().detach()
    told = dpo.judge_pairs(setup.trainer, setup.reference, setup.pairs, setup.config, setup.run)
    margins = 0.3 * (ratios[:, 0] - ratios[:, 1])
    start = dpo.log_probabilities(setup.reference.eval(), setup.pairs, 6, 0)
    likelier = (start[:, 0] > start[:, 1]).float().mean().item()
    lengths = [(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in setup.pairs]
    by_length = max(sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)) / 6
    wanted = {
        "reward_accuracy": (margins > 0).float().mean().item(),
        "baseline_accuracy": max(0.5, likelier, by_length),
        "baseline_likelihood_accuracy": likelier,
        "baseline_length_accuracy": by_length,
        "reward_margin": margins.mean().item(),
        "chosen_logp_change": ratios[:, 0].mean().item(),
        "rejected_logp_change": ratios[:, 1].mean().item(),
    }
    assert told == pytest.approx(wanted, abs=1e-4)
    assert by_length > 0.5  # the shorter one here


def measured(seen):
    def measure(policy, reference, tokenizer, rows, evaluation, *, score=None, **_):
        n = len(seen) + 1
        ids = [[5, tokenizer.eos_token_id]] * len(rows)
        told = score(rows, ids) if score else None
        seen.append(([row["prompt"][-1]["content"] for row in rows], reference is not policy, told))
        names = ("exact_match", "sampled_exact_match", "kl", "response_length", "reward")
        return policy_figures.Measured({name: n * 10.0**i for i, name in enumerate(names)}, [])

    return measure


SAID = {
    "exact_match": 2,
    "baseline_exact_match": 1,
    "sampled_exact_match": 20,
    "baseline_sampled_exact_match": 10,
    "kl": 200,
    "response_length_before": 1000,
    "response_length_after": 2000,
    "reward_before": 1e4,
    "reward_after": 2e4,
}


def test_dpo_measures_held_out_rows_and_says_which_figure_is_which(tiny, preferences, tmp_path, monkeypatch):
    from recipes.common.data import load_data
    from recipes.common.sections import Data

    seen, judged, judge = [], [], dpo.judge_pairs
    monkeypatch.setattr(policy_figures, "measure", measured(seen))
    monkeypatch.setattr(
        dpo, "judge_pairs", lambda t, r, pairs, *more: judged.extend(pairs) or judge(t, r, pairs, *more)
    )
    assert test_dpo.run(tiny, preferences, tmp_path, training__max_steps=1) == 0
    held_out = [p[-1]["content"] for p in load_data(Data(name=str(preferences)), "preference")["validation"]["prompt"]]
    assert [rows for rows, _, _ in seen] == [held_out[:16]] * 2
    assert judged and {pair["prompt"][-1]["content"] for pair in judged} <= set(held_out)
    figures = json.loads((tmp_path / "dpo" / "default" / "metrics.json").read_text())
    assert {name: figures[name] for name in SAID} == SAID


def test_grpo_measures_held_out_rows_with_the_weighted_rewards(tiny, questions, tmp_path, monkeypatch):  # noqa: F811
    from recipes.common.data import load_data
    from recipes.common.sections import Data

    seen = []
    monkeypatch.setattr(policy_figures, "measure", measured(seen))
    name = test_grpo.__name__
    more = {
        "grpo__rewards": f"[{name}:letters, {name}:letters]",
        "training__reward_weights": "[2.0, -0.5]",
        "grpo__missing_stop_penalty": 0.25,
        "training__max_steps": 1,
        "training__beta": 0,
    }
    assert test_grpo.run(tiny, questions, tmp_path, **more) == 0
    held_out = [p[-1]["content"] for p in load_data(Data(name=str(questions)), "prompt")["validation"]["prompt"]]
    assert [rows for rows, _, _ in seen] == [held_out[:16]] * 2
    assert all(apart for _, apart, _ in seen)  # the start, loaded anew where trl holds no reference
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny).decode([5])
    one = test_grpo.letters([text], [{}])[0]
    assert {round(value, 6) for _, _, told in seen for value in told} == {round(1.5 * one, 6)}
    figures = json.loads((tmp_path / "grpo" / "default" / "metrics.json").read_text())
    assert {name: figures[name] for name in SAID} == SAID


def test_a_reward_models_figures_are_of_held_out_rows_and_its_scale_of_their_best(trained, preferences):  # noqa: F811
    """All of metrics.json that tells of the trained model, from what was saved."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from recipes.common import preferences as figures_of
    from recipes.common.data import load_data
    from recipes.common.sections import Data

    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    data = load_data(Data(name=str(preferences), validation_fraction=0.25), "preference")
    held_out = reward_model.comparisons(data["validation"], tokenizer, 1024, None)
    train = reward_model.comparisons(data["train"], tokenizer, 1024, None)
    with torch.no_grad():
        scores = [[model(torch.tensor([ids])).logits.item() for ids in row] for row in held_out["sequences"]]
    told = figures_of.ranking_figures(scores, held_out)
    best = [
        s
        for row, ranks in zip(scores, held_out["ranks"], strict=True)
        for s, r in zip(row, ranks, strict=True)
        if r == 0
    ]
    figures = json.loads((trained / "metrics.json").read_text())
    wanted = {
        "reward_accuracy": told["accuracy"],
        "eval_loss": told["loss"],
        "calibration_error": told["calibration_error"],
        "reward_mean": np.mean(best),
        "reward_std": np.std(best),
        **figures_of.length_bias(scores, held_out),
        "baseline_words_accuracy": figures_of.words_baseline(train, held_out),
    }
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert [model.config.reward_mean, model.config.reward_std] == pytest.approx([np.mean(best), np.std(best)], abs=1e-4)


def test_accumulated_prompts_take_the_step_of_one_batch(tiny, preferences, tmp_path):
    from safetensors.torch import load_file

    after = []
    for size, accumulate in ((16, 1), (4, 4)):
        more = {
            "training__per_device_train_batch_size": size,
            "training__gradient_accumulation_steps": accumulate,
            "training__max_steps": 1,
            "training__optim": "sgd",
            "training__learning_rate": 0.5,
            "training__max_grad_norm": 0,
            "training__lr_scheduler_type": "constant",
            "training__warmup_steps": 0,
            "evaluation__max_samples": 8,
        }
        folder = tmp_path / str(size)
        # one epoch of 16 prompts: the same ones come
        few = folder.with_suffix(".jsonl")
        few.write_text("".join(preferences.read_text().splitlines(keepends=True)[:24]))
        assert test_reward_model.run(tiny, few, folder, data__validation_fraction=0.3333, **more) == 0
        after.append(load_file(folder / "reward_model" / "default" / "model" / "model.safetensors"))
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name], atol=1e-5, rtol=1e-4, msg=name)
