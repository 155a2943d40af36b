"""The mathematics of alignment against hand-computed tables, slow loops, exact sums and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from recipes.common import rlhf
from recipes.common.generation import positions_of


def left_to_right(*rows: int, width: int) -> torch.Tensor:
    """A [B, width] mask with that many real tokens in each row."""
    return torch.tensor([[1] * n + [0] * (width - n) for n in rows])


# ---------------------------------------------------------------- GAE


def test_gae_equals_a_table_computed_by_hand():
    # one response of 3 tokens and one of 2, in a width of 3; gamma 1/2, lambda 1/2; the values after the end are a trap
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 8.0, 0.0]])
    values = torch.tensor([[2.0, 4.0, 8.0], [4.0, 2.0, 100.0]])
    mask = left_to_right(3, 2, width=3)
    # row 1: delta = 1 + 2 - 2 = 1;  2 + 4 - 4 = 2;  4 + 0 - 8 = -4     A_3 = -4;  A_2 = 2 - 1 = 1;  A_1 = 1 + 1/4
    # row 2: delta = 0 + 1 - 4 = -3; 8 + 0 - 2 = 6                       A_2 = 6;   A_1 = -3 + 3/2
    advantages, returns = rlhf.generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0, -4.0], [-1.5, 6.0, 0.0]]
    assert returns.tolist() == [[3.25, 5.0, 4.0], [2.5, 8.0, 0.0]]


def test_gae_equals_the_sum_of_equation_16_term_by_term():
    torch.manual_seed(0)
    lengths = (7, 1, 4, 6)
    rewards, values = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    gamma, lam = 0.93, 0.81
    advantages, _ = rlhf.generalized_advantages(rewards, values, left_to_right(*lengths, width=7), gamma, lam)
    for b, length in enumerate(lengths):
        for t in range(7):
            total = 0.0  # A_t = sum_l (gamma lambda)^l delta_{t+l}
            for k in range(t, length):
                after = values[b, k + 1].item() if k + 1 < length else 0.0
                total += (gamma * lam) ** (k - t) * (rewards[b, k].item() + gamma * after - values[b, k].item())
            assert advantages[b, t].item() == pytest.approx(total, abs=1e-12)


def test_gae_at_lambda_1_is_reward_to_go_minus_value_and_at_lambda_0_the_td_error():
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5), left_to_right(5, 3, width=5)
    togo = (rewards * mask).flip(1).cumsum(1).flip(1)
    advantages, returns = rlhf.generalized_advantages(rewards * mask, values, mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, (togo - values) * mask)
    torch.testing.assert_close(returns, togo * mask)
    shifted = torch.cat([(values * mask)[:, 1:], torch.zeros(2, 1)], dim=1)
    advantages, _ = rlhf.generalized_advantages(rewards, values, mask, 0.9, 0.0)
    torch.testing.assert_close(advantages, (rewards + 0.9 * shifted - values) * mask)


def test_leave_one_out_advantages_on_hand_numbers():
    rewards = torch.tensor([[1.0, 2.0], [6.0, 50.0], [-1.0, 1.0], [4.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    mask = left_to_right(2, 1, 2, 2, 2, 2, width=2)  # R = 3, 6, 0 to one prompt and 4, 0, 5 to another
    advantages = rlhf.leave_one_out_advantages(rewards, mask, answers=3)
    assert advantages.tolist() == [[0.0, 0.0], [4.5, 0.0], [-4.5, -4.5], [1.5, 1.5], [-4.5, -4.5], [3.0, 3.0]]


def test_gae_ignores_everything_on_padding():
    rewards, values, mask = torch.randn(3, 6), torch.randn(3, 6), left_to_right(2, 6, 4, width=6)
    clean = rlhf.generalized_advantages(rewards * mask, values * mask, mask, 0.99, 0.95)
    rubbish = 1e6 * torch.randn(3, 6) * (1 - mask)
    dirty = rlhf.generalized_advantages(rewards * mask + rubbish, values * mask + rubbish, mask, 0.99, 0.95)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- models


def test_a_reference_that_would_learn_is_refused():
    from recipes.common.errors import UserError

    learner, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    rlhf.check_frozen(list(other.parameters()), learner, "why")
    for parameters in ([learner.weight], [torch.nn.Parameter(torch.zeros(1))]):
        with pytest.raises(UserError, match=r"would learn along with the policy.*why"):
            rlhf.check_frozen(parameters, learner, "why")


# ---------------------------------------------------------------- rewards


def test_the_score_lands_on_the_last_real_token_and_the_kl_on_every_real_one():
    mask = left_to_right(3, 1, width=4)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-0.5, -9.0, -9.0, -9.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0, -1.0], [-0.75, -1.0, -1.0, -1.0]])
    rewards = rlhf.token_rewards(torch.tensor([10.0, -4.0]), logprobs, reference, mask, kl_coefficient=0.1)
    expected = torch.tensor([[-0.05, 0.0, 0.1 + 10, 0.0], [-0.025 - 4, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_rewards_of_a_response_sum_to_score_minus_beta_kl():
    mask = left_to_right(5, 2, 3, width=5)
    logprobs, reference, scores = -torch.rand(3, 5), -torch.rand(3, 5), torch.randn(3)
    rewards = rlhf.token_rewards(scores, logprobs, reference, mask, 0.3)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * ((logprobs - reference) * mask).sum(1))


@pytest.mark.parametrize(("kind", "penalty"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_the_penalty_is_of_the_estimator_that_is_asked_for(kind, penalty):
    mask = left_to_right(2, 1, width=2)
    logprobs, reference = torch.tensor([[-1.0, -1.0], [-1.0, -9.0]]), torch.tensor([[-1.5, -1.5], [-1.5, -1.0]])
    rewards = rlhf.token_rewards(torch.tensor([3.0, 4.0]), logprobs, reference, mask, 0.1, kind)
    expected = torch.tensor([[-0.1 * penalty, 3 - 0.1 * penalty], [4 - 0.1 * penalty, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_adaptive_kl_coefficient_moves_two_percent_at_most_and_towards_the_target():
    def after(kl: float, target: float | None) -> float:
        beta = rlhf.KLCoefficient(0.5, target)
        beta.update(kl)
        again = rlhf.KLCoefficient(9.0, target)
        again.load_state_dict(beta.state_dict())
        assert again.value == beta.value
        return beta.value

    assert after(kl=100.0, target=1.0) == pytest.approx(0.5 * 1.02)
    assert after(kl=0.0, target=1.0) == pytest.approx(0.5 * 0.98)
    assert after(kl=1.1, target=1.0) == pytest.approx(0.5 * 1.01)
    assert after(kl=2.0, target=2.0) == 0.5
    assert after(kl=100.0, target=None) == 0.5


# ---------------------------------------------------------------- PPO's clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [  # PPO figure 1: the objective is min(rho A, clip(rho, 0.8, 1.2) A)
        (1.5, 2.0, 2.4, True),  # good action, already much likelier: no more credit, no gradient
        (0.5, 2.0, 1.0, False),  # good action that became less likely: full gradient back
        (1.5, -2.0, -3.0, False),  # bad action that became likelier: full gradient back
        (0.5, -2.0, -1.6, True),  # bad action, already much less likely: no gradient
        (1.1, 2.0, 2.2, False),
        (0.9, -2.0, -1.8, False),
        (1.0, 2.0, 2.0, False),
    ],
)
def test_policy_loss_takes_the_pessimistic_branch(ratio, advantage, expected, clipped):
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    loss, taken = rlhf.policy_loss(new, old, torch.tensor([[advantage]], dtype=torch.float64), clip=0.2)
    assert loss.item() == pytest.approx(-expected)
    assert bool(taken.item()) is clipped
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_at_ratio_1_the_surrogate_is_the_policy_gradient():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.randint(0, 5, (2, 3)), torch.randn(2, 3, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    (plain,) = torch.autograd.grad(-(logprobs * advantages).sum(), logits, retain_graph=True)
    loss, _ = rlhf.policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    (surrogate,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(surrogate, plain)


def test_gradient_of_the_surrogate_equals_finite_differences():
    torch.manual_seed(1)
    tokens, mask = torch.randint(0, 6, (3, 4)), left_to_right(4, 2, 3, width=4)
    old = -torch.rand(3, 4, dtype=torch.float64) * 2.5
    advantages = torch.randn(3, 4, dtype=torch.float64)

    def objective(logits):
        # token_logprobs works in fp32, too coarse for finite differences: the same two operations in fp64
        logprobs = logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return rlhf.masked_mean(rlhf.policy_loss(logprobs, old, advantages, 0.2)[0], mask)

    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(logits), logits)
    assert 0 < (gradient.abs().sum(-1) == 0).sum() < 12  # some tokens are clipped or padding, not all
    for index in itertools.product(range(3), range(4), range(6)):
        step = torch.zeros_like(logits)
        step[index] = 1e-6
        slope = (objective(logits + step) - objective(logits - step)) / 2e-6
        assert gradient[index].item() == pytest.approx(slope.item(), abs=1e-8)


def test_value_loss_clips_and_keeps_the_larger_error():
    returns, old = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])
    values = torch.tensor([0.1, 0.6, -0.5, 1.5], requires_grad=True)
    loss, clipped = rlhf.value_loss(values, old, returns, clip=0.2)
    # within the clip: (0.9)^2/2; moved past it towards the return: stays at 0.2, (0.8)^2/2; moved away: its own error,
    # (1.5)^2/2; overshot: clipped to 0.2, whose error is the larger
    torch.testing.assert_close(loss, torch.tensor([0.405, 0.32, 1.125, 0.32]))
    assert clipped.tolist() == [0.0, 1.0, 0.0, 1.0]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, -1.5, 0.0]))


# ---------------------------------------------------------------- KL estimators


def test_kl_estimators_on_hand_numbers():
    logprobs, reference = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    log2 = math.log(2)
    torch.testing.assert_close(rlhf.kl_estimate(logprobs, reference, "k1"), torch.tensor([log2, -log2]))
    torch.testing.assert_close(rlhf.kl_estimate(logprobs, reference, "k2"), torch.tensor([log2**2 / 2] * 2))
    torch.testing.assert_close(
        rlhf.kl_estimate(logprobs, reference, "k3"), torch.tensor([0.5 - 1 + log2, 2 - 1 - log2])
    )
    with pytest.raises(ValueError, match="k4"):
        rlhf.kl_estimate(logprobs, reference, "k4")


def test_k1_and_k3_have_the_exact_kl_as_their_mean_and_k2_is_close_to_it():
    torch.manual_seed(0)
    policy, reference = torch.randn(8).log_softmax(0), torch.randn(8).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    # in expectation, exactly: sum over the support instead of samples
    for kind in ("k1", "k3"):
        assert (policy.exp() * rlhf.kl_estimate(policy, reference, kind)).sum().item() == pytest.approx(exact, rel=1e-5)
    samples = torch.multinomial(policy.exp(), 200_000, replacement=True)
    k1, k3 = (rlhf.kl_estimate(policy[samples], reference[samples], kind) for kind in ("k1", "k3"))
    for estimate in (k1, k3):
        assert estimate.mean().item() == pytest.approx(exact, abs=4 * estimate.std().item() / 200_000**0.5)
    near = (policy + 0.05 * torch.randn(8)).log_softmax(0)
    small = (policy.exp() * (policy - near)).sum().item()
    assert (policy.exp() * rlhf.kl_estimate(policy, near, "k2")).sum().item() == pytest.approx(small, rel=0.1)
    d1, d3 = (rlhf.kl_estimate(policy[samples], near[samples], kind) for kind in ("k1", "k3"))
    assert d3.std() < d1.std() / 5 and (d3 >= 0).all() and (d1 < 0).any()


# ---------------------------------------------------------------- log-probabilities and masks


def test_token_logprobs_and_entropy_equal_the_definition():
    logits, tokens = 3 * torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    p = logits.softmax(-1)
    torch.testing.assert_close(rlhf.token_logprobs(logits, tokens), p.gather(-1, tokens[..., None]).squeeze(-1).log())
    torch.testing.assert_close(rlhf.token_entropy(logits), -(p * p.log()).sum(-1))
    assert rlhf.token_entropy(torch.zeros(1, 1, 7)).item() == pytest.approx(math.log(7))
    assert rlhf.token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32


def test_last_real_token_and_positions_under_both_paddings():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    assert rlhf.last_real_token(mask).tolist() == [2, 4, 4, 2]
    assert positions_of(mask).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="no real token"):
        rlhf.last_real_token(torch.tensor([[1, 0], [0, 0]]))


def test_whitening_looks_at_real_tokens_only_and_over_all_processes():
    x, mask = 5 + 3 * torch.randn(4, 6), left_to_right(6, 2, 5, 1, width=6)
    dirty = torch.where(mask.bool(), x, torch.full_like(x, 1e9))
    white = rlhf.whiten(dirty, mask)
    real = white[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-5) and real.std(correction=0).item() == pytest.approx(
        1, abs=1e-4
    )
    assert (white[~mask.bool()] == 0).all()
    scaled = rlhf.whiten(x, mask, shift=False)[mask.bool()]  # same mean, variance 1
    assert scaled.mean().item() == pytest.approx(x[mask.bool()].mean().item(), abs=1e-4)
    # two processes with two rows each: what a sum over processes gives is what one process with four rows gets
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    sums = iter(
        [
            sum(torch.stack([(v * m).sum().double(), m.sum().double()]) for v, m in halves),
            sum(
                torch.stack([((v - x[mask.bool()].mean()) ** 2 * m).sum().double(), m.sum().double()])
                for v, m in halves
            ),
        ]
    )
    torch.testing.assert_close(rlhf.whiten(x[:2], mask[:2], reduce=lambda _: next(sums)), rlhf.whiten(x, mask)[:2])


def test_whitening_a_constant_gives_zero_not_nan():
    assert torch.equal(rlhf.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3)), torch.zeros(2, 3))


def test_whitening_each_prompts_answers_equals_a_slow_loop():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(6, 4) * torch.tensor([1.0, 1, 1, 50, 50, 50])[:, None]  # two prompts of three answers
    mask = left_to_right(4, 2, 3, 1, 4, 2, width=4)
    dirty = torch.where(mask.bool(), x, torch.full_like(x, 1e6))
    white = rlhf.whiten_groups(dirty, mask.float(), 3)
    for rows in (range(3), range(3, 6)):
        real = [x[i, t].item() for i in rows for t in range(4) if mask[i, t]]
        mean = sum(real) / len(real)
        std = math.sqrt(sum((v - mean) ** 2 for v in real) / len(real))
        for i in rows:
            for t in range(4):
                expected = (x[i, t].item() - mean) / std if mask[i, t] else 0.0
                assert white[i, t].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(rlhf.whiten_groups(x, mask.float(), 6), rlhf.whiten(x, mask))  # all of one prompt
    assert torch.equal(rlhf.whiten_groups(torch.full((4, 3), 7.0), torch.ones(4, 3), 2), torch.zeros(4, 3))


def test_explained_variance():
    target, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), torch.tensor([[1, 1, 1, 0]])
    assert rlhf.explained_variance(target, target, mask).item() == pytest.approx(1)
    assert rlhf.explained_variance(target + 5, target, mask).item() == pytest.approx(
        1
    )  # a constant error explains all the same
    assert rlhf.explained_variance(torch.zeros(1, 4), target, mask).item() == pytest.approx(0)
    assert rlhf.explained_variance(-target, target, mask).item() == pytest.approx(-3)


# ---------------------------------------------------------------- K-way rankings


def test_two_completions_give_the_pairwise_loss():
    loss = rlhf.ranking_loss(torch.tensor([1.5, 0.5]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.0))))
    worse = rlhf.ranking_loss(torch.tensor([1.5, 0.5]), torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert worse.item() == pytest.approx(-math.log(1 / (1 + math.exp(1.0))))


def test_k_way_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs():
    torch.manual_seed(0)
    ranks = [[0, 1, 2, 3], [0, 0, 1], [0, 1], [0, 1, 1, 2, 2, 3]]  # K = 4, 3 (a tie), 2 and 6 (two ties)
    scores = [torch.randn(len(r)) for r in ranks]
    by_hand = []
    for s, r in zip(scores, ranks, strict=True):
        pairs = [
            -math.log(1 / (1 + math.exp(-(s[i] - s[j]).item())))
            for i in range(len(r))
            for j in range(len(r))
            if r[i] < r[j]
        ]
        by_hand.append(sum(pairs) / len(pairs))
    flat = (
        torch.cat(scores),
        torch.tensor([r for row in ranks for r in row]),
        torch.tensor([i for i, row in enumerate(ranks) for _ in row]),
    )
    assert rlhf.ranking_loss(*flat).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_loss_depends_neither_on_the_order_of_completions_nor_on_a_constant():
    scores, ranks, group = torch.randn(7), torch.tensor([0, 1, 2, 0, 1, 1, 3]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    shuffled = torch.randperm(7)
    loss = rlhf.ranking_loss(scores, ranks, group)
    torch.testing.assert_close(rlhf.ranking_loss(scores[shuffled], ranks[shuffled], group[shuffled]), loss)
    torch.testing.assert_close(rlhf.ranking_loss(scores + 11, ranks, group), loss)


def test_ties_give_no_pair_and_a_batch_of_ties_is_refused():
    scores = torch.tensor([0.0, 9.0, -9.0], requires_grad=True)
    # prompt 1 is all tied: it adds nothing, to the sum or to the count of prompts
    both = rlhf.ranking_loss(
        torch.cat([scores, torch.tensor([1.0, 2.0])]), torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 0, 0, 1, 1])
    )
    alone = rlhf.ranking_loss(scores, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    assert both.item() == alone.item()
    with pytest.raises(ValueError, match="no pair"):
        rlhf.ranking_loss(scores, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0]))


def test_margin_of_llama_2_is_taken_off_the_difference_by_rank_gap():
    scores, ranks, group = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long)
    loss = rlhf.ranking_loss(scores, ranks, group, margin=0.5)
    by_hand = [math.log1p(math.exp(-x)) for x in (2 - 1 - 0.5, 2 + 1 - 1.0, 1 + 1 - 0.5)]
    assert loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    assert torch.equal(rlhf.ranking_loss(scores, ranks, group, margin=0.0), rlhf.ranking_loss(scores, ranks, group))


def test_centering_is_trls_squared_sum_for_pairs_and_a_mean_over_prompts():
    scores, group = torch.tensor([2.0, 1.0, 4.0, -1.0]), torch.tensor([0, 0, 1, 1])
    pairs = rlhf.centering_loss(scores, torch.tensor([0, 1, 0, 1]), group)
    chosen, rejected = scores[::2], scores[1::2]
    torch.testing.assert_close(pairs, torch.mean((chosen + rejected) ** 2))  # as trl's RewardTrainer writes it
    three = rlhf.centering_loss(torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0]), torch.tensor([0, 1, 2, 0, 1]),
                                torch.tensor([0, 0, 0, 1, 1]))  # fmt: skip
    assert three.item() == pytest.approx(((9 + 16 + 25) / 3 + 4) / 2)


def test_a_pairs_weight_multiplies_its_loss_and_equal_ones_change_nothing():
    scores, ranks, group = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.long)
    weights = torch.tensor([[9.0, 0.5, 3.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    loss = rlhf.ranking_loss(scores, ranks, group, weights=weights)
    assert loss.item() == pytest.approx((0.5 * math.log1p(math.exp(-1)) + 3 * math.log1p(math.exp(-3))) / 2, rel=1e-6)
    assert torch.equal(
        rlhf.ranking_loss(scores, ranks, group, weights=torch.ones(3, 3)), rlhf.ranking_loss(scores, ranks, group)
    )


@pytest.mark.parametrize(("kind", "share"), [("k1", 1.0), ("k2", 0.0), ("k3", 0.0)])
def test_as_a_reward_only_k1_pulls_towards_the_reference(kind, share):
    """E[k grad log pi] over all tokens, exactly: which share of KL's own gradient it is, the two being close."""
    torch.manual_seed(0)
    reference = torch.randn(16, dtype=torch.float64)
    logits = (reference + 0.1 * torch.randn(16, dtype=torch.float64)).requires_grad_()
    logprobs, others = logits.log_softmax(0), reference.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - others)).sum(), logits, retain_graph=True)
    penalty = rlhf.kl_estimate(logprobs, others, kind).detach()
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * penalty * logprobs).sum(), logits)
    assert (gradient @ true / (true @ true)).item() == pytest.approx(share, abs=0.1)


def test_without_dropout_training_mode_computes_what_evaluation_mode_does():
    """OPT keeps its rates as numbers: of attention, of what follows it, and of whole layers."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=40, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, **sizes))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        rlhf.disable_dropout(model)
        assert torch.equal(model.train()(input_ids=ids).logits, expected)
