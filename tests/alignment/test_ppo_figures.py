"""What a PPO run says of itself, on numbers that are given."""

from __future__ import annotations

import json
import math

import pytest
import torch

from recipes.alignment import ppo
from recipes.common import ppo_measure, rlhf
from recipes.common.data import load_data
from recipes.common.sections import Data, Evaluation
from tests.alignment.ppo_by_hand import Setup, answer_in_lengths, weights_of
from tests.alignment.test_ppo import run


def test_held_out_figures_are_means_over_answers_of_their_real_tokens(tiny, judge, monkeypatch):
    setup = Setup(tiny, judge)
    answer_in_lengths(monkeypatch, setup.tokenizer)
    asked = []

    def collect(rows, prompts, *, longest, seed):
        asked.append(([row["n"] for row in rows], len(prompts), longest, seed))
        setup.rows, setup.prompts = rows, prompts
        rollout = setup.collect()
        rollout.reference = rollout.reference + torch.where(rollout.mask.bool(), 0.25, 1e6)  # rubbish on padding
        rollout.rewards = torch.tensor([float(row["n"]) for row in rows])
        return rollout

    monkeypatch.setattr(
        "recipes.common.generation.generate_ids",
        lambda policy, prompts, **_: [[20] * (1 + len(p) % 4) + [setup.tokenizer.eos_token_id] for p in prompts],
    )
    rows, prompts, args = setup.rows, setup.prompts, setup.config.training
    args.seed = 7
    told, answers = ppo_measure.measure(
        collect, setup.models, rows, prompts, None, Evaluation(batch_size=3, max_new_tokens=5), args, setup.accelerator
    )
    assert asked == [([1, 2, 3], 3, 5, 7), ([4, 5, 6], 3, 5, 10), ([7, 8], 2, 5, 13)] and answers == []
    lengths = [2 + len(p) % 4 for p in prompts]
    assert told == pytest.approx(
        {"reward": 4.5, "kl": -0.25 * sum(lengths) / 8, "response_length": sum(lengths) / 8}, abs=1e-4
    )


def test_a_run_measures_held_out_rows_before_and_after_and_says_which_is_which(
    tiny, judge, preferences, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    from recipes.common.packing import pack_texts

    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"text": f"It is {n}, and q. " * 3}) + "\n" for n in range(60)))
    seen = []

    def measure(collect, models, rows, prompts, text, *_):
        seen.append(([row["prompt"] for row in rows], prompts, text))
        n = float(len(seen))
        names = ("reward", "kl", "response_length", "text_loss", "exact_match", "sampled_exact_match")
        return {name: n * 10**i for i, name in enumerate(names)}, []

    monkeypatch.setattr(ppo_measure, "measure", measure)
    more = {
        "training__max_steps": 1,
        "ppo__rollouts": 32,
        "ppo__epochs": 1,
        "pretraining__name": prose,
        "ppo__pretraining_coefficient": 1.0,
        "ppo__pretraining_length": 16,
    }
    assert run(tiny, judge, preferences, tmp_path, **more) == 0
    figures = json.loads((tmp_path / "ppo" / "default" / "metrics.json").read_text())
    wanted = {
        "reward_before": 1,
        "reward_after": 2,
        "kl": 20,
        "response_length_before": 100,
        "response_length_after": 200,
        "baseline_text_loss": 1000,
        "text_loss": 2000,
        "baseline_exact_match": 1e4,
        "exact_match": 2e4,
        "baseline_sampled_exact_match": 1e5,
        "sampled_exact_match": 2e5,
    }
    assert {name: figures[name] for name in wanted} == wanted
    data = load_data(Data(name=str(preferences)), "prompt")
    assert [rows for rows, _, _ in seen] == [data["validation"]["prompt"][:16]] * 2
    text = load_data(Data(name=str(prose)), "text")
    blocks = pack_texts(text["validation"], AutoTokenizer.from_pretrained(tiny), 16)["input_ids"]
    assert seen[0][2].tolist() == blocks[:16]


def test_the_ratio_tells_of_a_policy_that_is_not_the_one_that_answered(tiny, judge):
    setup = Setup(tiny, judge, epochs=1)
    rollout = setup.collect()
    rollout.logprobs = rollout.logprobs + math.log(2) * rollout.mask
    assert setup.update(rollout)["ratio_error"] == pytest.approx(0.5, abs=1e-5)


def test_an_entropy_bonus_adds_its_own_gradient_upwards(tiny, judge):
    after = {}
    for coefficient in (0.0, 2.0):
        setup = Setup(tiny, judge, micro=8, epochs=1, entropy_coefficient=coefficient)
        setup.config.training.max_grad_norm = 0.0
        rollout = setup.collect()
        entropy = rlhf.masked_mean(setup.model(setup.rows_of(rollout), with_entropy=True).entropy, rollout.mask)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(entropy, list(setup.policy.parameters()))])
        setup.update(rollout)
        after[coefficient] = weights_of(setup.policy)
    torch.testing.assert_close(after[2.0] - after[0.0], 0.5 * 2.0 * gradient, atol=2e-6, rtol=1e-3)


def test_the_gradient_of_a_minibatch_is_clipped_to_max_grad_norm(tiny, judge):
    setup = Setup(tiny, judge, micro=4, accumulate=2, epochs=1)
    setup.config.training.max_grad_norm = 1e-3
    before = weights_of(setup.model)
    setup.update(setup.collect())
    assert (weights_of(setup.model) - before).norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-3)  # SGD's rate: 0.5


def test_what_a_step_says_it_saw_is_what_it_says(tiny, judge):
    """One minibatch at pi = 2 pi_old: each figure, a token at a time."""
    setup = Setup(
        tiny, judge, micro=8, epochs=1, whitening="none", value_clip=0.1, value_coefficient=0.5, kl_coefficient=0.0
    )
    rollout = setup.collect()
    mask = rollout.mask.bool()
    rollout.logprobs = rollout.logprobs - math.log(2)
    rollout.values = rollout.values - 0.3
    rewards = rlhf.token_rewards(rollout.rewards, rollout.logprobs, rollout.reference, rollout.mask, 0.0)
    advantages, returns = rlhf.generalized_advantages(rewards, rollout.values, rollout.mask, 1.0, 0.95)
    policy = [-min(2 * a, 1.2 * a) for a in advantages[mask].tolist()]
    value = [
        max((v + 0.3 - r) ** 2, (v + 0.1 - r) ** 2) / 2
        for v, r in zip(rollout.values[mask].tolist(), returns[mask].tolist(), strict=True)
    ]
    beyond = [
        (v + 0.1 - r) ** 2 > (v + 0.3 - r) ** 2
        for v, r in zip(rollout.values[mask].tolist(), returns[mask].tolist(), strict=True)
    ]
    n = len(policy)
    figures = setup.update(rollout, 0.0)
    wanted = {
        "policy_loss": sum(policy) / n,
        "value_loss": sum(value) / n,
        "loss": (sum(policy) + 0.5 * sum(value)) / n,
        "clip_fraction": sum(a > 0 for a in advantages[mask].tolist()) / n,
        "value_clip_fraction": sum(beyond) / n,
        "update_kl": 2 - 1 - math.log(2),
    }
    error = (returns - rollout.values)[mask]
    wanted["explained_variance"] = 1 - (error.var(correction=0) / returns[mask].var(correction=0)).item()
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)


def test_the_entropy_is_that_of_the_distribution_each_token_was_drawn_from(tiny, judge, monkeypatch):
    setup = Setup(tiny, judge)
    answer_in_lengths(monkeypatch, setup.tokenizer)
    rollout = setup.collect()
    for row, (prompt, ids) in enumerate(zip(setup.prompts, rollout.all.ids, strict=True)):
        p = setup.policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(rollout.entropy[row, : len(ids)], -(p.exp() * p).sum(-1), atol=1e-5, rtol=1e-5)


def test_the_schedule_and_the_critics_own_rate_reach_the_optimizer(tiny, judge, preferences, tmp_path, monkeypatch):
    seen, update = [], ppo.update

    def watched(models, optimizer, *given, **more):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return update(models, optimizer, *given, **more)

    monkeypatch.setattr(ppo, "update", watched)
    more = {
        "training__max_steps": 4,
        "ppo__rollouts": 32,
        "ppo__epochs": 1,
        "training__lr_scheduler_type": "linear",
        "training__warmup_steps": 0,
        "ppo__critic_learning_rate": 1e-3,
        "evaluation__max_samples": 4,
    }
    assert run(tiny, judge, preferences, tmp_path, **more) == 0
    assert seen == [pytest.approx([1e-2 * share, 1e-3 * share]) for share in (1, 0.75, 0.5, 0.25)]
    rows = map(json.loads, (tmp_path / "ppo" / "default" / "metrics.jsonl").read_text().splitlines())
    assert [row["learning_rate"] for row in rows if "loss" in row] == [
        pytest.approx(s) for s in (1e-2, 7.5e-3, 5e-3, 2.5e-3)
    ]


def test_a_steps_figures_are_of_its_answers(tiny, judge, preferences, tmp_path, monkeypatch):
    """A reference that is moved by hand: nats a response, what is steered by it, and the reward of all answers."""
    kept, collect = [], ppo.collect

    def moved(*given, **more):
        rollout = collect(*given, **more)
        torch.manual_seed(0)
        rollout.reference = rollout.reference + torch.randn_like(rollout.reference)
        kept.append(rollout)
        return rollout

    monkeypatch.setattr(ppo, "collect", moved)
    more = {
        "training__max_steps": 2,
        "ppo__rollouts": 32,
        "ppo__epochs": 1,
        "ppo__answers": 2,
        "ppo__oversample": 2,
        "ppo__kl_target": 2.0,
        "evaluation__max_samples": 4,
    }
    assert run(tiny, judge, preferences, tmp_path, **more) == 0
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "default" / "metrics.jsonl").read_text().splitlines()]
    one, _two = (rollout for rollout in kept if rollout.answers == 2)
    d, mask = one.logprobs - one.reference, one.mask.float()
    wanted = {
        "reward": one.all.rewards.mean().item(),
        "kl": ((d * mask).sum() / 32).item(),
        "kl_k3": (((-d).exp() - 1 + d) * mask).sum().item() / 32,
        "entropy": ((one.entropy * mask).sum() / mask.sum()).item(),
        "response_length": one.all.lengths.mean().item(),
        "informative": (one.rewards.view(-1, 2)[:, 0] != one.rewards.view(-1, 2)[:, 1]).float().mean().item(),
    }
    assert {name: rows[0][name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    e = min(max(wanted["kl"] / 2 - 1, -0.2), 0.2)
    assert rows[1]["kl_coefficient"] == pytest.approx(0.01 * (1 + 0.1 * e), rel=1e-4)
