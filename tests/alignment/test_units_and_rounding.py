"""Scores in the units of their head, not rounded, and clipped on both sides; the calibration and the temperature that are meant."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.common import generation, preferences, rlhf
from recipes.common.sections import Evaluation
from recipes.common.shared_prompts import Rows, share
from tests.alignment.test_ppo_rollout import rewards_by_hand


def test_a_low_score_is_clipped_as_a_high_one_is(monkeypatch):
    assert rewards_by_hand(monkeypatch, {"reward_mean": 30.0, "reward_std": 4.0}) == [-5.0, -5.0, 5.0, -6.0]


def test_a_critic_is_in_the_units_of_the_head_that_it_starts_from(tiny, judge):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    critic = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    scale = SimpleNamespace(
        reward_mean=50.0, reward_std=9.0, reward_head_mean=1.0, reward_head_std=2.0
    )  # of a likelihood, of the head
    both = rlhf.ActorCritic(AutoModelForCausalLM.from_pretrained(tiny).eval(), critic, scale)
    rows = Rows(*share([[5, 9]], [[[8, 1]]], 0))
    with torch.no_grad():
        head = critic.score(critic.model(torch.tensor([[5, 9, 8, 1]])).last_hidden_state)[0, 1:3, 0]
        torch.testing.assert_close(both(rows).values[0], (head - 1) / 2, atol=1e-5, rtol=1e-5)


def test_scores_are_not_rounded_under_autocast(judge):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(judge)
    states = torch.randn(7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        told = rlhf.score_head(model, states)
    assert torch.equal(told, model.score(states)[:, 0])
    rlhf.keep_head_in_full_precision(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.score(states)[:, 0], told)


def test_calibration_error_on_hand_numbers():
    """Three pairs right at 95 %, one wrong at 73 %: (3 x 0.05 + 0.73) / 4."""
    data = {"ranks": [[0, 1]] * 4}
    sure, unsure = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))
    told = preferences.ranking_figures([[3.0, 0.0]] * 3 + [[0.0, 1.0]], data)["calibration_error"]
    assert told == pytest.approx((3 * (1 - sure) + unsure) / 4)


def test_sampled_answers_are_drawn_at_the_temperature_that_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        generation,
        "generate",
        lambda m, t, prompts, *, temperature=None, **_: seen.append(temperature) or [""] * len(prompts),
    )
    rows = [{"prompt": [{"role": "user", "content": "?"}], "task": "echo", "answer": "?"}]
    generation.exact_match(None, None, rows, Evaluation(temperature=0.3))
    assert seen == [None, 0.3]
