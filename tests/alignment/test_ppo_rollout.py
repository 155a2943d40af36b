"""PPO's rollouts: answers, their log-probabilities and rewards, and which of them are learned from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recipes.alignment import ppo
from recipes.common import ppo_rollout, rlhf
from recipes.common.errors import UserError
from recipes.common.generation import positions_of
from recipes.common.sections import Data, Evaluation, Model, Run
from tests.alignment.ppo_by_hand import Setup, weights_of, whole

# ---------------------------------------------------------------- rollouts


def test_rollout_has_the_shapes_and_masks_it_says(tiny, judge):
    setup = Setup(tiny, judge)
    rollout = setup.collect()
    longest = max(map(len, setup.prompts))
    B, P, R = 8, whole(rollout).prompt_length, rollout.mask.shape[1]
    assert (
        longest == P and R <= 5 and whole(rollout).input_ids.shape == whole(rollout).attention_mask.shape == (B, P + R)
    )
    for row, prompt in enumerate(setup.prompts):
        assert whole(rollout).input_ids[row, P - len(prompt) : P].tolist() == prompt  # padded on the left
        assert whole(rollout).attention_mask[row, :P].tolist() == [0] * (P - len(prompt)) + [1] * len(prompt)
        response, mask = whole(rollout).input_ids[row, P:].tolist(), rollout.mask[row].tolist()
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
        response = whole(rollout).input_ids[row, whole(rollout).prompt_length :][:n]
        logits = setup.policy(torch.tensor([[*prompt, *response.tolist()]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, :n], expected, atol=1e-5, rtol=1e-5)


def test_answers_are_drawn_from_the_distribution_whose_logprobs_are_taken(tiny, judge):
    """A policy that ships with top_k, a temperature or a repetition penalty must not be sampled with them."""
    setup = Setup(tiny, judge, max_new_tokens=1)
    own = setup.policy.generation_config
    own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.do_sample = 0.1, 3, 0.5, 3.0, True
    setup.prompts, setup.rows = setup.prompts[:1] * 4000, setup.rows[:1] * 4000
    setup.config.training.per_device_train_batch_size = 4000
    rollout = setup.collect()
    counts = torch.bincount(whole(rollout).input_ids[:, -1], minlength=setup.policy.config.vocab_size)
    expected = setup.policy(torch.tensor(setup.prompts[:1])).logits[0, -1].softmax(-1) * 4000
    z = (counts - expected) / expected.sqrt()
    assert z.abs().max() < 6 and z.square().mean() < 1.6
    assert setup.policy.generation_config is own and own.top_k == 3  # saved with the model as it came


def test_critic_started_from_the_reward_model_ends_at_the_reward(tiny, judge):
    """V of the last token's state would be the reward itself: the critic reads in the units that it is to predict."""
    setup = Setup(tiny, judge, missing_stop_penalty=0.0, reward_clip=1e9)
    rollout = setup.collect()
    mask = whole(rollout).attention_mask
    states = rlhf.backbone_states(setup.model.critic, whole(rollout).input_ids, mask, positions_of(mask))
    last = rlhf.last_real_token(whole(rollout).attention_mask)
    values = (rlhf.score_head(setup.model.critic, states) - setup.model.mean) / setup.model.std
    torch.testing.assert_close(values[torch.arange(8), last], rollout.rewards, atol=1e-5, rtol=1e-5)


def test_a_batch_holds_whole_prompts_and_so_many_answers_at_most():
    chosen = list(range(10, 20))  # two to a prompt
    sizes = [[len(some) for some in ppo_rollout.whole_prompts(chosen, 2, most)] for most in (1, 4, 5, 99)]
    assert sizes == [[2] * 5, [4, 4, 2], [4, 4, 2], [10]]
    assert [i for some in ppo_rollout.whole_prompts(chosen, 2, 4) for i in some] == chosen


def rewards_by_hand(monkeypatch, scale: dict[str, float] | None, function: Any = None, **knobs: object) -> list[float]:
    """`ppo.reward` of four answers, the last without an end, that a reward model with this scale scores 2, 6, 100 and 6."""
    from types import SimpleNamespace

    from accelerate import Accelerator
    from transformers import TrainingArguments

    scores = torch.tensor([2.0, 6.0, 100.0, 6.0])
    monkeypatch.setattr(rlhf, "shared_states", lambda model, rows: None)
    monkeypatch.setattr(rlhf, "answer_scores", lambda model, states, rows: scores[rows.input_ids[:, -1:] - 10])
    answers = ppo_rollout.Answers(
        rows=[{"n": n} for n in range(4)],
        prompts=[[5]] * 4,
        ids=[[10 + n] for n in range(4)],
        texts=["a", "b", "c", "d"],
        stopped=torch.tensor([True, True, True, False]),
        lengths=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        rewards=torch.zeros(4),
    )
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    model: Any = torch.nn.Identity() if scale is not None else None
    if scale is not None:
        model.config = SimpleNamespace(**scale)
    models = ppo_rollout.Models(None, None, model, tokenizer, function)  # type: ignore[arg-type]
    args = TrainingArguments(output_dir="unused", per_device_train_batch_size=3, use_cpu=True)
    given = ppo.PPO(**{"reward_clip": 5.0, "missing_stop_penalty": 1.0, **knobs})  # type: ignore[arg-type]
    config = ppo.Config(Model(), Data(), given, args, Evaluation(), Run())
    return ppo.reward(models, answers, 1, config, Accelerator(cpu=True)).tolist()


SCALE = {"reward_mean": 2.0, "reward_std": 4.0}


def test_reward_is_normalised_clipped_and_lowered_for_an_answer_without_end(monkeypatch):
    assert rewards_by_hand(monkeypatch, SCALE) == [0.0, 1.0, 5.0, 0.0]
    assert rewards_by_hand(monkeypatch, {}) == [2.0, 5.0, 5.0, 4.0]  # another's reward model


def test_each_token_costs_the_length_penalty(monkeypatch):
    assert rewards_by_hand(monkeypatch, SCALE, length_penalty=0.25) == [-0.25, 0.5, 4.25, -1.0]


def test_a_reward_function_stands_alone_or_beside_the_reward_model(monkeypatch):
    def told(answers, rows):
        return [row["n"] * 10 + "abcd".index(text) for text, row in zip(answers, rows, strict=True)]

    assert rewards_by_hand(monkeypatch, None, told) == [0.0, 11.0, 22.0, 32.0]  # not clipped; the last does not end
    assert rewards_by_hand(monkeypatch, SCALE, told) == [0.0, 12.0, 27.0, 33.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [(lambda answers, rows: [1.0], "1 numbers for 4"), (lambda answers, rows: [float("inf")] * 4, "inf")],
)
def test_what_a_reward_function_must_not_give_is_refused(monkeypatch, function, said):
    with pytest.raises(UserError, match=rf"ppo.reward_function.*{said}"):
        rewards_by_hand(monkeypatch, None, function)


def test_a_reward_that_is_not_a_number_is_refused(tiny, judge):
    setup = Setup(tiny, judge)
    setup.reward_model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"ppo.reward_model.*nan"):
        setup.collect()


# ---------------------------------------------------------------- which answers are learned from


def test_most_spread_picks_the_prompts_whose_answers_differ_most_in_the_order_asked():
    rewards = torch.tensor([0.0, 1.0, 7.0, 7.0, 5.0, 3.0, 1.0, 0.0])  # spread 0.5, 0, 1, 0.5
    assert ppo_rollout.spread_of(rewards, 2).tolist() == [0.5, 0.0, 1.0, 0.5]
    assert ppo_rollout.most_spread(rewards, 2, 1) == [4, 5]
    assert ppo_rollout.most_spread(rewards, 2, 2) == [0, 1, 4, 5]  # of equal spread the one that was asked first
    assert ppo_rollout.most_spread(rewards, 2, 4) == list(range(8))
    assert ppo_rollout.most_spread(rewards, 4, 1) == [0, 1, 2, 3]  # spread 3.3 against 1.9


def test_an_oversampled_step_learns_from_the_prompts_of_the_largest_spread(tiny):
    """8 prompts of 2 answers, whose rewards are apart by what the function says of the prompt."""
    apart = [3, 8, 1, 6, 2, 7, 5, 4]

    def function(answers, rows):
        return [apart[row["n"] - 1] * (i % 2) for i, row in enumerate(rows)]

    knobs = {"answers": 2, "critic": "others", "missing_stop_penalty": 0.0, "stop_kl": None}
    setup = Setup(tiny, None, function=function, **knobs)
    setup.rows = [row for row in setup.rows for _ in range(2)]
    setup.prompts = [prompt for prompt in setup.prompts for _ in range(2)]
    rollout = setup.collect(oversample=2)
    assert rollout.kept == [2, 3, 6, 7, 10, 11, 12, 13]
    assert rollout.rewards.tolist() == [0, 8, 0, 6, 0, 7, 0, 5]
    assert rollout.all.rewards.tolist() == [x for n in apart for x in (0, n)]
    for row, i in enumerate(rollout.kept):
        real = whole(rollout).input_ids[row][whole(rollout).attention_mask[row].bool()].tolist()
        assert real == setup.prompts[i] + rollout.all.ids[i]
    before, figures = weights_of(setup.policy), setup.update(rollout)
    assert figures["minibatches"] == 8 and figures["ratio_error"] == 0  # 4 passes over 8 answers by 4
    assert not torch.equal(before, weights_of(setup.policy))


def test_without_oversampling_all_answers_are_kept_and_drawn_as_in_one_batch(tiny, judge):
    from recipes.common.generation import generate_ids

    setup = Setup(tiny, judge)
    rollout = setup.collect(seed=3)
    stop, fill = setup.tokenizer.eos_token_id, setup.tokenizer.pad_token_id
    drawn = generate_ids(
        setup.policy, setup.prompts, stop=[stop], pad=fill, max_new_tokens=5, batch_size=8, temperature=1.0, seed=3
    )
    assert rollout.kept == list(range(8)) and rollout.all.ids == drawn
    assert torch.equal(rollout.rewards, rollout.all.rewards)


def test_what_answers_in_the_policys_place_has_its_weights_first_and_is_read_by_the_policy(tiny, judge):
    """vLLM through trl, of which this machine has none: what we ask of it, and what becomes of its answers."""

    class Engine:
        called: list[str] = []

        def sync_weights(self):
            self.called.append("sync")

        def generate(self, prompts, images, num_generations):
            assert self.called[-1] == "sync" and images is None and num_generations == 1
            assert self.max_completion_length == 5 and self.generation_kwargs == {"stop_token_ids": [stop]}
            self.called.append("generate")
            return prompts, [[20 + n] * 4 + [stop] * (n % 2) for n in range(len(prompts))], None, None

    setup = Setup(tiny, judge)
    stop = setup.tokenizer.eos_token_id
    setup.models.engine = Engine()
    rollout = setup.collect()
    assert Engine.called == ["sync", "generate"]
    assert rollout.all.stopped.tolist() == [False, True] * 4 and rollout.all.lengths.tolist() == [4.0, 5.0] * 4
    assert torch.equal(rollout.logprobs, rollout.reference)
    logits = setup.policy(torch.tensor([setup.prompts[2] + [22] * 4])).logits[0, -5:-1].log_softmax(-1)
    torch.testing.assert_close(rollout.logprobs[2, :4], logits[:, 22], atol=1e-5, rtol=1e-5)


def test_vllm_is_asked_in_trls_own_terms_and_draws_from_the_whole_distribution(tiny, judge, monkeypatch):
    import inspect

    from trl.generation import vllm_generation

    real, setup = vllm_generation.VLLMGeneration, Setup(tiny, judge)
    signature = inspect.signature(real)
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", lambda *given, **named: signature.bind(*given, **named))
    bound = ppo_rollout.start_vllm(setup.policy, setup.tokenizer, setup.accelerator)
    bound.apply_defaults()
    told = bound.arguments
    assert told["model"] is setup.policy and told["processing_class"] is setup.tokenizer
    assert told["mode"] == "colocate" and told["max_model_length"] == 128
    wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: told[name] for name in wanted} == wanted
    inspect.signature(real.generate).bind(None, prompts=[[1]], images=None, num_generations=1)
