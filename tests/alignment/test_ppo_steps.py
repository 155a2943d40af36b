"""PPO's update against slow loops, and a LoRA policy's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from recipes.alignment import ppo
from recipes.common import policy_figures, ppo_measure, ppo_rollout, rlhf
from recipes.common.errors import UserError
from recipes.common.generation import positions_of
from tests.alignment.ppo_by_hand import Setup, answer_in_lengths, digest, weights_of, whole
from tests.alignment.reward_functions import letters

# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ratio_of_the_first_minibatch_is_exactly_one(tiny, judge, critic, bf16):
    setup = Setup(tiny, judge, bf16=bf16, critic=critic, stop_kl=None)
    rollout = setup.collect()
    figures = setup.update(rollout)
    assert figures["ratio_error"] == 0.0
    assert figures["minibatches"] == 8 and figures["update_kl"] > 0  # 4 passes of 2, and the policy moved
    again = setup.collect()
    assert not torch.equal(again.logprobs, again.reference)


def test_reference_and_reward_model_never_change_and_policy_and_critic_do(tiny, judge):
    setup = Setup(tiny, judge)
    watched = {
        "reference": setup.reference,
        "reward": setup.reward_model,
        "policy": setup.policy,
        "critic": setup.model.critic,
    }
    before = {name: digest(model.parameters()) for name, model in watched.items()}
    for seed in range(2):
        setup.update(setup.collect(seed))
    changed = {name for name, model in watched.items() if digest(model.parameters()) != before[name]}
    assert changed == {"policy", "critic"}
    assert all(p.grad is None for p in (*setup.reference.parameters(), *setup.reward_model.parameters()))


def test_prompt_and_padding_never_get_loss(tiny, judge):
    """Noise on every logit but those that chose the response's real tokens leaves loss and gradient as they were."""
    setup = Setup(tiny, judge, epochs=1)
    rollout = setup.collect()
    length, mask = whole(rollout).prompt_length, rollout.mask

    def gradient(noise: float) -> torch.Tensor:
        logits = setup.policy(
            whole(rollout).input_ids,
            attention_mask=whole(rollout).attention_mask,
            position_ids=positions_of(whole(rollout).attention_mask),
        ).logits.detach()
        chooses = torch.zeros(whole(rollout).input_ids.shape, dtype=torch.bool)
        chooses[:, length - 1 : -1] = mask.bool()  # position t chooses token t + 1
        torch.manual_seed(1)
        logits = (logits + noise * torch.randn_like(logits) * ~chooses[..., None]).requires_grad_()
        logprobs = rlhf.token_logprobs(logits[:, length - 1 : -1], whole(rollout).input_ids[:, length:])
        rewards = rlhf.token_rewards(rollout.rewards, logprobs.detach(), rollout.reference, mask, 0.05)
        advantages, _ = rlhf.generalized_advantages(rewards, rollout.values, mask, 1.0, 0.95)
        loss, _ = rlhf.policy_loss(logprobs, rollout.logprobs, rlhf.whiten(advantages, mask), 0.2)
        (grad,) = torch.autograd.grad(rlhf.masked_mean(loss, mask), logits)
        assert (grad[~chooses] == 0).all() and (grad[chooses].abs().sum(-1) > 0).all()
        return grad

    torch.testing.assert_close(gradient(0.0), gradient(10.0), atol=1e-7, rtol=0)


def test_response_logits_are_those_that_choose_the_response(tiny, judge):
    setup = Setup(tiny, judge)
    rollout = setup.collect()
    full = setup.policy(
        whole(rollout).input_ids,
        attention_mask=whole(rollout).attention_mask,
        position_ids=positions_of(whole(rollout).attention_mask),
    ).logits
    cut = policy_figures.response_logits(
        setup.policy, whole(rollout).input_ids, whole(rollout).attention_mask, whole(rollout).prompt_length
    ).logits
    torch.testing.assert_close(cut, full[:, whole(rollout).prompt_length - 1 : -1], atol=1e-5, rtol=1e-5)


def test_in_an_update_only_the_logits_that_choose_an_answers_tokens_get_a_gradient(tiny, judge, monkeypatch):
    """The update itself: the vocabulary is reached once a token of the answers, from prompts and padding never."""
    setup = Setup(tiny, judge, micro=8, epochs=1)
    answer_in_lengths(monkeypatch, setup.tokenizer)
    rollout = setup.collect()
    seen: list[torch.Tensor] = []

    def watch(module, arguments, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(gradient.abs().sum(dim=-1)))

    handles = [part.register_forward_hook(watch) for part in (setup.policy.model.norm, setup.policy.lm_head)]
    setup.update(rollout)
    for handle in handles:
        handle.remove()
    logits, states = seen  # [1, T], [M, L]
    assert logits.numel() == (logits > 0).sum() == 21 == rollout.mask.sum()
    assert (states > 0).sum() == 21 and states.numel() > 60


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_passes_over_minibatches_equal_a_slow_loop_over_tokens(tiny, judge, critic, monkeypatch):
    """Two passes of two minibatches, one answer at a time without padding, one token at a time, equations as they stand."""
    import copy

    clip, value_clip, beta, gamma, lam, rate = 0.05, 0.002, 0.3, 0.97, 0.9, 0.5
    weight = 0.02  # a step of the critic's is not to shoot over the return
    knobs = {"clip": clip, "value_clip": value_clip, "gamma": gamma, "lam": lam, "epochs": 2, "stop_kl": None}
    setup = Setup(tiny, judge, critic=critic, value_coefficient=weight, **knobs)
    setup.config.training.max_grad_norm = 0.0
    if critic == "shared":
        torch.nn.init.normal_(setup.model.head.weight, std=0.1)
    answer_in_lengths(monkeypatch, setup.tokenizer)
    rollout = setup.collect()
    torch.manual_seed(0)
    rollout.reference = rollout.reference + 0.3 * torch.randn_like(rollout.reference)  # so that there is a penalty
    slow = copy.deepcopy(setup.model)
    answers = rollout.all.ids
    lengths = [len(answer) for answer in answers]

    def told(i: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        prompt = setup.prompts[i]
        ids = torch.tensor([prompt + answers[i]])
        out = slow.policy(ids, output_hidden_states=True)
        at = range(len(prompt) - 1, len(prompt) - 1 + lengths[i])  # where each token is chosen
        logprobs = [out.logits[0, t].log_softmax(-1)[a] for t, a in zip(at, answers[i], strict=True)]
        if critic == "shared":
            return logprobs, [slow.head(out.hidden_states[-1][0, t])[0] for t in at]
        states = slow.critic.model(ids).last_hidden_state[0]
        return logprobs, [(slow.critic.score(states[t])[0] - slow.mean) / slow.std for t in at]

    with torch.no_grad():
        old = [[[x.item() for x in part] for part in told(i)] for i in range(8)]
    advantages, returns = [], []
    for i, (logprobs, values) in enumerate(old):
        n = lengths[i]
        rewards = [-beta * (logprobs[t] - rollout.reference[i, t].item()) for t in range(n)]
        rewards[-1] += rollout.rewards[i].item()
        deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
        found = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        advantages.append(found)
        returns.append([a + v for a, v in zip(found, values, strict=True)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    advantages = [[(a - mean) / deviation for a in row] for row in advantages]

    clipped = {"policy": 0, "value": 0}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    for minibatch in (range(4), range(4, 8), order[:4], order[4:]):
        losses = []
        for i in minibatch:
            for t, (logprob, value) in enumerate(zip(*told(i), strict=True)):
                ratio, a = torch.exp(logprob - old[i][0][t]), advantages[i][t]
                policy_loss = -ratio * a
                if (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip):
                    policy_loss = torch.tensor(-(1 + clip if a > 0 else 1 - clip) * a)
                    clipped["policy"] += 1
                before, target = old[i][1][t], returns[i][t]
                value_loss = (value - target) ** 2 / 2
                if abs(value.item() - before) > value_clip:
                    kept = before + math.copysign(value_clip, value.item() - before)
                    if (kept - target) ** 2 / 2 > value_loss.item():
                        value_loss = torch.tensor((kept - target) ** 2 / 2)
                        clipped["value"] += 1
                losses.append(policy_loss + weight * value_loss)
        slow.zero_grad()
        (sum(losses) / len(losses)).backward()
        with torch.no_grad():
            for p in slow.parameters():
                if p.grad is not None:
                    p -= rate * p.grad

    before = weights_of(setup.model)
    figures = setup.update(rollout, beta)
    assert figures["minibatches"] == 4 and min(clipped.values()) > 0
    moved = (weights_of(setup.model) - before).abs().max()
    assert moved > 1e-2
    torch.testing.assert_close(weights_of(setup.model), weights_of(slow), atol=1e-3 * moved.item(), rtol=0)


def test_padding_with_the_stop_token_changes_nothing(tiny, judge, monkeypatch):
    """A policy without a pad token: `load_tokenizer` lets its stop token fill the batch, and the masks say what is real."""
    told = []
    for own in (True, False):
        setup = Setup(tiny, judge)
        if not own:
            setup.tokenizer.pad_token = setup.tokenizer.eos_token
        answer_in_lengths(monkeypatch, setup.tokenizer)
        rollout = setup.collect()
        setup.update(rollout)
        told.append((rollout, weights_of(setup.model)))
    (ours, weights), (theirs, other_weights) = told
    assert ours.mask.sum(dim=1).tolist() == theirs.mask.sum(dim=1).tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    for name in ("rewards", "logprobs", "values"):
        mask = 1 if name == "rewards" else ours.mask
        torch.testing.assert_close(getattr(ours, name) * mask, getattr(theirs, name) * mask, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, other_weights, atol=1e-6, rtol=0)


def test_accumulated_micro_batches_give_the_same_step_as_one_batch(tiny, judge):
    """8 at once against 2 x 4, with responses of different lengths: the mean is over the minibatch's tokens."""
    after = []
    for size, accumulation in ((8, 1), (4, 2)):
        setup = Setup(tiny, judge, micro=size, accumulate=accumulation, epochs=1)
        rollout = setup.collect()
        rollout.mask[::2, 2:] = 0
        figures = setup.update(rollout)
        assert figures["minibatches"] == 1
        after.append((figures["loss"], weights_of(setup.model)))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-6)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-6, rtol=0)


def test_passes_end_once_the_policy_is_too_far_from_the_one_that_answered(tiny, judge):
    setup = Setup(tiny, judge, stop_kl=1e-6, epochs=4)
    figures = setup.update(setup.collect())
    assert figures["minibatches"] == 2 and figures["update_kl"] > 1e-6  # the first minibatch is at 0, the second is not
    assert Setup(tiny, judge, stop_kl=None, epochs=4).update(Setup(tiny, judge).collect())["minibatches"] == 8


def test_a_steps_parts_are_timed_and_drawn(tiny, judge, tmp_path):
    from matplotlib.figure import Figure

    rollout = Setup(tiny, judge, function=letters).collect()
    assert set(rollout.all.seconds) == {"rollout", "score", "read"} and min(rollout.all.seconds.values()) > 0
    history = [{"rollout_seconds": x, "score_seconds": 1.0, "train_seconds": 2.0} for x in (90.0, 2.0, 4.0)]
    spent = ppo_measure.seconds_of(history)  # the first step warms up
    assert spent == {"rollout": 3.0, "score": 1.0, "train": 2.0}
    assert ppo_measure.seconds_of([{"reward": 1.0}]) == {}
    axes = Figure().add_subplot()
    ppo_measure.time_bars(axes, spent)
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0, 2.0]
    assert [text.get_text() for text in axes.texts] == ["3.00 s, 50%", "1.00 s, 17%", "2.00 s, 33%"]


def test_the_legend_of_reward_and_true_score_lies_below_both_axes(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from recipes.common.run_folder import RunFolder

    run, drawn = RunFolder(tmp_path, recipe="ppo"), {}

    def plot(name, draw):
        drawn[name] = Figure(layout="constrained")
        draw(drawn[name].add_subplot())

    monkeypatch.setattr(run, "plot", plot)
    for step in (1, 2, 3):
        run.log(step, reward=step, true_score=0.1 * step, kl=0.5, kl_k3=0.5, entropy=5.7, clip_fraction=0.1)
    ppo_measure.draw(run, learned=True)
    figure = drawn["reward_and_true_score"]
    figure.draw_without_rendering()
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2
    assert legend.get_window_extent().y1 < min(axes.bbox.y0 for axes in figure.axes)
    assert len(drawn["policy"].axes) == 2


@pytest.mark.parametrize("whitening", ["global", "prompt", "none"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_step_is_the_policy_gradient_of_the_advantages_that_the_settings_say(tiny, judge, kind, whitening):
    """At ratio 1 the surrogate's gradient is - mean A grad log pi; A: from score and penalty, against the other answer."""
    knobs = {"critic": "others", "answers": 2, "epochs": 1, "kl_estimator": kind, "whitening": whitening}
    setup = Setup(tiny, judge, micro=8, **knobs)
    setup.config.training.max_grad_norm = 0.0
    setup.prompts = [prompt for prompt in setup.prompts[:4] for _ in range(2)]
    rollout, beta = setup.collect(), 0.3
    torch.manual_seed(0)
    rollout.reference = rollout.reference + torch.randn_like(rollout.reference)
    mask, total = rollout.mask, []
    for row in range(8):  # a token at a time
        reward = rollout.rewards[row].item()
        for t in range(int(mask[row].sum())):
            d = (rollout.logprobs - rollout.reference)[row, t].item()
            reward -= beta * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
        total.append(reward)
    advantages = torch.tensor([[total[i] - total[i ^ 1]] * mask.shape[1] for i in range(8)])
    for rows in {"global": [slice(0, 8)], "prompt": [slice(i, i + 2) for i in (0, 2, 4, 6)], "none": []}[whitening]:
        real = advantages[rows][mask[rows].bool()]
        advantages[rows] = (advantages[rows] - real.mean()) / (real.var(correction=0) + 1e-8).sqrt()
    told = setup.model(setup.rows_of(rollout))
    loss = -(told.logprobs * advantages * mask).sum() / mask.sum()
    expected = [p.detach() - 0.5 * g for p, g in zip(
        setup.policy.parameters(), torch.autograd.grad(loss, list(setup.policy.parameters())), strict=True
    )]  # fmt: skip
    before = weights_of(setup.policy)
    setup.update(rollout, beta)
    for ours, theirs in zip(setup.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (weights_of(setup.policy) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (4, 2)])
def test_plain_text_adds_its_own_gradient_times_the_coefficient(tiny, judge, micro, accumulate):
    """PPO-ptx: against transformers' own language-model loss, over all blocks of the minibatch."""
    from transformers import AutoModelForCausalLM

    text = torch.randint(5, 200, (8, 12), generator=torch.Generator().manual_seed(0))
    after = {}
    for coefficient in (None, 0.0, 2.0):
        knobs = {"micro": micro, "accumulate": accumulate, "epochs": 1}
        setup = Setup(tiny, judge, pretraining_coefficient=coefficient or 0.0, **knobs)
        setup.config.training.max_grad_norm = 0.0
        figures = setup.update(setup.collect(), text=None if coefficient is None else text)
        after[coefficient] = weights_of(setup.policy)
        assert ("text_loss" in figures) == (coefficient is not None)
    assert torch.equal(after[None], after[0.0])
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    loss = plain(input_ids=text, labels=text).loss
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
    torch.testing.assert_close(after[2.0] - after[0.0], -0.5 * 2.0 * gradient, atol=2e-6, rtol=1e-3)
    assert figures["text_loss"] == pytest.approx(loss.item(), abs=1e-5)
    models = ppo_rollout.Models(rlhf.ActorCritic(plain, None), None, None, setup.tokenizer)
    setup.config.training.per_device_train_batch_size = 3  # 3 + 3 + 2 blocks: each weighs the same
    told = ppo_measure.text_loss(models, text, setup.config.training, setup.accelerator)
    assert told == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_while_the_critic_warms_up_nothing_moves_the_policy(tiny, judge, critic):
    setup = Setup(tiny, judge, critic=critic, pretraining_coefficient=1.0, entropy_coefficient=1.0)
    learns = setup.model.critic if critic == "separate" else setup.model.head
    before = {name: weights_of(model) for name, model in (("policy", setup.policy), ("critic", learns))}
    text = torch.randint(5, 200, (32, 12))
    assert "text_loss" not in setup.update(setup.collect(), text=text, critic_only=True)
    assert torch.equal(weights_of(setup.policy), before["policy"])
    assert not torch.equal(weights_of(learns), before["critic"])


# ---------------------------------------------------------------- a LoRA policy


def lora(saved: list[str] | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=saved)


@pytest.mark.parametrize("saved", [None, ["model.norm"]])
def test_the_reference_of_a_lora_policy_is_the_policy_without_its_adapter(tiny, judge, saved):
    setup = Setup(tiny, judge, lora=lora(saved))
    rollout = setup.collect()
    assert torch.equal(rollout.logprobs, rollout.reference)  # a fresh adapter changes nothing
    torch.manual_seed(0)
    for name, p in setup.policy.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            p.data += 0.3 * torch.randn_like(p)
    moved, full = setup.collect(), Setup(tiny, judge).reference
    mask = moved.mask.bool()
    logits = policy_figures.response_logits(
        full, whole(moved).input_ids, whole(moved).attention_mask, whole(moved).prompt_length
    ).logits
    alone = rlhf.token_logprobs(logits, whole(moved).input_ids[:, whole(moved).prompt_length :])
    torch.testing.assert_close(moved.reference[mask], alone[mask], atol=1e-6, rtol=1e-6)
    assert (moved.logprobs - moved.reference)[mask].abs().max() > 0.1


def test_biases_that_would_learn_in_the_reference_too_are_refused(tiny):
    from transformers import AutoConfig, AutoModelForCausalLM

    setup = Setup(tiny, None, critic="shared")
    setup.config.lora = lora()
    for attention_bias, bias in ((True, "none"), (False, "all")):  # nothing of the base learns
        shape = AutoConfig.from_pretrained(tiny, attention_bias=attention_bias)
        setup.config.lora.bias = bias
        ppo.adapted(AutoModelForCausalLM.from_config(shape), setup.config)
    setup.config.lora.bias = "all"
    with pytest.raises(UserError, match=r"lora.bias: all .* use none"):
        ppo.adapted(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, attention_bias=True)), setup.config
        )


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_only_adapter_and_critic_learn_and_the_base_never_changes(tiny, judge, critic):
    setup = Setup(tiny, judge, lora=lora(), critic=critic)
    base = {name: p for name, p in setup.policy.named_parameters() if "lora_" not in name}
    adapter = {name: p for name, p in setup.policy.named_parameters() if "lora_" in name}
    assert len(base) > len(adapter) > 0 and not any(p.requires_grad for p in base.values())
    before = digest(base.values()), digest(adapter.values())
    for seed in range(2):
        rollout = setup.collect(seed)
        setup.update(rollout)
    assert digest(base.values()) == before[0] and digest(adapter.values()) != before[1]
    assert (rollout.logprobs - rollout.reference).abs().max() > 0
    assert {p.requires_grad for p in setup.policy.parameters()} == {True, False}  # reading the reference froze nothing


def test_prompts_come_in_a_fresh_order_every_epoch_each_once():
    steps = [ppo_rollout.rows_of_step(step, 4, 10, seed=3) for step in range(5)]
    flat = [prompt for step in steps for prompt in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert ppo_rollout.rows_of_step(0, 25, 10, seed=3) == [
        *flat[:20],
        *ppo_rollout.rows_of_step(5, 4, 10, seed=3),
        *ppo_rollout.rows_of_step(24, 1, 10, seed=3),
    ]
    assert steps[2] == ppo_rollout.rows_of_step(2, 4, 10, seed=3) != ppo_rollout.rows_of_step(2, 4, 10, seed=4)
