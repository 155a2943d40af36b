"""PPO: what the first minibatch must be, what must never matter, and the recipe end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.alignment import ppo, reward_model
from recipes.common import rlhf
from recipes.common.recipe import run_recipe
from recipes.common.sections import Data, Evaluation, Model, Run


@pytest.fixture(scope="module")
def judge(tiny, preferences, tmp_path_factory) -> Path:
    """A reward model of the tiny language: "k" is best."""
    root = tmp_path_factory.mktemp("judge")
    argv = [
        *("--model.name", str(tiny), "--data.name", str(preferences), "--run.root", str(root), "--run.threads", "1"),
        *("--training.max_steps", "40", "--training.per_device_train_batch_size", "16"),
        *("--training.learning_rate", "3e-3", "--training.bf16", "false"),
        *("--reward.frozen_layers", "0", "--reward.new_layers", "0", "--reward.optimizer", "adamw"),
        *("--reward.language_coefficient", "0"),
    ]
    assert run_recipe(reward_model.main, reward_model.Config, argv) == 0
    return root / "reward_model" / "default" / "model"


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
    return [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def run(*given: object, **more: object) -> int:
    return run_recipe(ppo.main, ppo.Config, arguments(*given, **more))  # type: ignore[arg-type]


class Setup:
    """The recipe's pieces, put together by hand in fp32 on one process."""

    def __init__(
        self, tiny: Path, judge: Path, bf16: bool = False, micro: int = 4, accumulate: int = 1, **knobs: object
    ):
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
            TrainingArguments,
        )

        from recipes.common.training import make_accelerator

        self.tokenizer = AutoTokenizer.from_pretrained(tiny)
        arguments = TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            use_cpu=True,
            bf16=bf16,
        )
        knobs = {"rollouts": 8, "max_new_tokens": 5, **knobs}
        self.config = ppo.Config(Model(), Data(), ppo.PPO(**knobs), arguments, Evaluation(), Run())  # type: ignore[arg-type]
        self.accelerator = ppo.count_accumulation(make_accelerator(arguments))
        self.policy = AutoModelForCausalLM.from_pretrained(tiny)
        self.reference = AutoModelForCausalLM.from_pretrained(tiny).eval().requires_grad_(False)
        self.reward_model = AutoModelForSequenceClassification.from_pretrained(judge).eval().requires_grad_(False)
        critic = (
            AutoModelForSequenceClassification.from_pretrained(judge) if self.config.ppo.critic == "separate" else None
        )
        self.model = rlhf.ActorCritic(self.policy, critic, self.reward_model.config)
        rlhf.disable_dropout(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        ask = [
            [{"role": "user", "content": "Is it 3" + "?" * n}] for n in range(1, 9)
        ]  # 8 prompts of different lengths
        self.prompts = [rlhf.prompt_ids(self.tokenizer, messages) for messages in ask]

        self.models = ppo.Models(self.model, self.reference, self.reward_model, self.tokenizer)

    def collect(self, seed: int = 0) -> ppo.Rollout:
        longest = self.config.ppo.max_new_tokens
        return ppo.collect(self.models, self.prompts, self.config, self.accelerator, longest=longest, seed=seed)

    def update(self, rollout: ppo.Rollout, beta: float = 0.05) -> dict[str, float]:
        return ppo.update(self.models, self.optimizer, rollout, beta, self.config, self.accelerator, seed=0)


# ---------------------------------------------------------------- rollouts


def test_rollout_has_the_shapes_and_masks_it_says(tiny, judge):
    setup = Setup(tiny, judge)
    rollout = setup.collect()
    longest = max(map(len, setup.prompts))
    B, P, R = 8, rollout.prompt_length, rollout.mask.shape[1]
    assert longest == P and R <= 5 and rollout.input_ids.shape == rollout.attention_mask.shape == (B, P + R)
    for row, prompt in enumerate(setup.prompts):
        assert rollout.input_ids[row, P - len(prompt) : P].tolist() == prompt  # padded on the left
        assert rollout.attention_mask[row, :P].tolist() == [0] * (P - len(prompt)) + [1] * len(prompt)
        response, mask = rollout.input_ids[row, P:].tolist(), rollout.mask[row].tolist()
        if setup.tokenizer.eos_token_id in response:
            assert (
                sum(mask) == response.index(setup.tokenizer.eos_token_id) + 1
            )  # the stop token is real, what follows not
        else:
            assert all(mask)


def test_kl_is_exactly_zero_while_policy_and_reference_are_the_same(tiny, judge):
    rollout = Setup(tiny, judge).collect()
    assert torch.equal(rollout.logprobs, rollout.reference)
    for kind in ("k1", "k2", "k3"):
        assert (rlhf.kl_estimate(rollout.logprobs, rollout.reference, kind) == 0).all()


def test_rollout_logprobs_equal_those_of_each_sequence_alone(tiny, judge):
    """Padding, batching and cutting the logits to the response change nothing."""
    setup = Setup(tiny, judge)
    rollout = setup.collect()
    for row, prompt in enumerate(setup.prompts):
        n = int(rollout.mask[row].sum())
        response = rollout.input_ids[row, rollout.prompt_length :][:n]
        logits = setup.policy(torch.tensor([[*prompt, *response.tolist()]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, :n], expected, atol=1e-5, rtol=1e-5)


def test_answers_are_drawn_from_the_distribution_whose_logprobs_are_taken(tiny, judge):
    """A policy that ships with top_k, a temperature or a repetition penalty must not be sampled with them."""
    setup = Setup(tiny, judge, max_new_tokens=1)
    own = setup.policy.generation_config
    own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.do_sample = 0.1, 3, 0.5, 3.0, True
    setup.prompts = setup.prompts[:1] * 4000
    setup.config.training.per_device_train_batch_size = 4000
    rollout = setup.collect()
    counts = torch.bincount(rollout.input_ids[:, -1], minlength=setup.policy.config.vocab_size)
    expected = setup.policy(torch.tensor(setup.prompts[:1])).logits[0, -1].softmax(-1) * 4000
    z = (counts - expected) / expected.sqrt()
    assert z.abs().max() < 6 and z.square().mean() < 1.6
    assert setup.policy.generation_config is own and own.top_k == 3  # saved with the model as it came


def test_critic_started_from_the_reward_model_ends_at_the_reward(tiny, judge):
    """V of the last token's state would be the reward itself: the critic reads in the units that it is to predict."""
    setup = Setup(tiny, judge, missing_stop_penalty=0.0, reward_clip=1e9)
    rollout = setup.collect()
    states = rlhf.backbone_states(setup.model.critic, rollout.input_ids, rollout.attention_mask)
    last = rlhf.last_real_token(rollout.attention_mask)
    values = (rlhf.score_head(setup.model.critic, states) - setup.model.mean) / setup.model.std
    torch.testing.assert_close(values[torch.arange(8), last], rollout.rewards, atol=1e-5, rtol=1e-5)


def test_reward_is_normalised_clipped_and_lowered_for_an_answer_without_end():
    class Told:
        reward_mean, reward_std = 2.0, 4.0

    scores, stopped = torch.tensor([2.0, 6.0, 100.0, 6.0]), torch.tensor([True, True, True, False])
    knobs = ppo.PPO(reward_clip=5.0, missing_stop_penalty=1.0)
    assert ppo.reward(scores, stopped, Told(), knobs).tolist() == [0.0, 1.0, 5.0, 0.0]
    assert ppo.reward(scores, stopped, object(), knobs).tolist() == [2.0, 5.0, 5.0, 4.0]  # another's reward model


def test_a_reward_that_is_not_a_number_is_refused(tiny, judge):
    from recipes.common.errors import UserError

    setup = Setup(tiny, judge)
    setup.reward_model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="nan"):
        setup.collect()


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

    def digest(model):
        return hash(tuple(p.detach().numpy().tobytes() for p in model.parameters()))

    watched = {
        "reference": setup.reference,
        "reward": setup.reward_model,
        "policy": setup.policy,
        "critic": setup.model.critic,
    }
    before = {name: digest(model) for name, model in watched.items()}
    for seed in range(2):
        setup.update(setup.collect(seed))
    changed = {name for name, model in watched.items() if digest(model) != before[name]}
    assert changed == {"policy", "critic"}
    assert all(p.grad is None for p in (*setup.reference.parameters(), *setup.reward_model.parameters()))


def test_prompt_and_padding_never_get_loss(tiny, judge):
    """Noise on every logit but those that chose the response's real tokens leaves loss and gradient as they were."""
    setup = Setup(tiny, judge, epochs=1)
    rollout = setup.collect()
    length, mask = rollout.prompt_length, rollout.mask

    def gradient(noise: float) -> torch.Tensor:
        logits = setup.policy(
            rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rlhf.positions(rollout.attention_mask),
        ).logits.detach()
        chooses = torch.zeros(rollout.input_ids.shape, dtype=torch.bool)
        chooses[:, length - 1 : -1] = mask.bool()  # position t chooses token t + 1
        torch.manual_seed(1)
        logits = (logits + noise * torch.randn_like(logits) * ~chooses[..., None]).requires_grad_()
        logprobs = rlhf.token_logprobs(logits[:, length - 1 : -1], rollout.input_ids[:, length:])
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
        rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=rlhf.positions(rollout.attention_mask)
    ).logits
    cut = rlhf.response_logits(setup.policy, rollout.input_ids, rollout.attention_mask, rollout.prompt_length).logits
    torch.testing.assert_close(cut, full[:, rollout.prompt_length - 1 : -1], atol=1e-5, rtol=1e-5)


def test_accumulated_micro_batches_give_the_same_step_as_one_batch(tiny, judge):
    """8 at once against 2 x 4, with responses of different lengths: the mean is over the minibatch's tokens."""
    after = []
    for size, accumulation in ((8, 1), (4, 2)):
        setup = Setup(tiny, judge, micro=size, accumulate=accumulation, epochs=1)
        rollout = setup.collect()
        rollout.mask[::2, 2:] = 0
        figures = setup.update(rollout)
        assert figures["minibatches"] == 1
        after.append((figures["loss"], torch.cat([p.detach().flatten() for p in setup.model.parameters()])))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-6)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-6, rtol=0)


def test_passes_end_once_the_policy_is_too_far_from_the_one_that_answered(tiny, judge):
    setup = Setup(tiny, judge, stop_kl=1e-6, epochs=4)
    figures = setup.update(setup.collect())
    assert figures["minibatches"] == 2 and figures["update_kl"] > 1e-6  # the first minibatch is at 0, the second is not
    assert Setup(tiny, judge, stop_kl=None, epochs=4).update(Setup(tiny, judge).collect())["minibatches"] == 8


def test_prompts_come_in_a_fresh_order_every_epoch_each_once():
    steps = [ppo.prompts_of_step(step, 4, 10, seed=3) for step in range(5)]
    flat = [prompt for step in steps for prompt in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert ppo.prompts_of_step(0, 25, 10, seed=3) == [
        *flat[:20],
        *ppo.prompts_of_step(5, 4, 10, seed=3),
        *ppo.prompts_of_step(24, 1, 10, seed=3),
    ]
    assert steps[2] == ppo.prompts_of_step(2, 4, 10, seed=3) != ppo.prompts_of_step(2, 4, 10, seed=4)


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


def test_reward_rises_without_a_critic_too(tiny, judge, preferences, tmp_path):
    more = {"training__max_steps": 12, "ppo__critic": "others", "ppo__answers": 4}
    assert run(tiny, judge, preferences, tmp_path, **more) == 0
    folder = tmp_path / "ppo" / "default"
    figures = json.loads((folder / "metrics.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert figures["reward_after"] > figures["reward_before"] + 0.5
    assert history[0]["ratio_error"] == 0.0 and "explained_variance" not in history[0]


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


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ppo__rollouts": 50}, "multiple of the minibatch"),
        ({"ppo__max_new_tokens": 200}, "positions"),
        ({"ppo__max_prompt_length": 1}, "ppo.max_prompt_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, said, tiny, judge, preferences, tmp_path, capsys):
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


def test_a_language_model_is_no_reward_model(tiny, preferences, tmp_path, capsys):
    assert run(tiny, tiny, preferences, tmp_path) == 2
    assert "reward model" in capsys.readouterr().err
