"""The mathematics of learning from human feedback as pure functions: rankings, log-probabilities, KL, GAE, losses.

Papers, by the name used below:
  InstructGPT  Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
  PPO          Schulman et al. 2017, https://arxiv.org/abs/1707.06347
  GAE          Schulman et al. 2016, https://arxiv.org/abs/1506.02438
  Ziegler      Ziegler et al. 2019, https://arxiv.org/abs/1909.08593
  k1, k2, k3   Schulman 2020, http://joschu.net/blog/kl-approx.html
  Llama 2      Touvron et al. 2023, https://arxiv.org/abs/2307.09288
  Eisenstein   Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244

Shapes: B sequences of P prompt tokens (padded on the left) and R response tokens (padded on the right); V words;
`mask` [B, R] is 1 on the response's real tokens, the stop token included, 0 on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.errors import UserError
from recipes.common.generation import positions_of
from recipes.common.sharding import gathered
from recipes.common.shared_prompts import Rows, at_places, attention_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes; the identity when there is one


# ---------------------------------------------------------------- rankings and scores


def untied_pairs(ranks: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the better and of the worse answer of every untied pair of every prompt: [pairs] both.

    ranks, group: [N], one entry a completion; rank 0 is best; `group` says which prompt it answers. Raises ValueError
    when nothing can be compared.
    """
    pair = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])  # [N, N], row wins over column
    winner, loser = pair.nonzero(as_tuple=True)  # [pairs]
    if len(winner) == 0:
        raise ValueError("no pair to compare: every completion of every prompt has the same rank")
    return winner, loser


def mean_over_prompts(values: Tensor, prompt: Tensor) -> Tensor:
    """Mean of a pair's value over the pairs of each prompt, then over the prompts: both [pairs] -> []."""
    _, prompt, pairs = prompt.unique(return_inverse=True, return_counts=True)
    return (values / pairs[prompt]).sum() / len(pairs)


def ranking_loss(
    scores: Tensor, ranks: Tensor, group: Tensor, margin: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """InstructGPT eq. (1): - 1/C(K,2) E log sigmoid(r_w - r_l), over all pairs of each prompt, then over the prompts.

    scores, ranks, group: [N], as in `untied_pairs`. Completions of equal rank make no pair, so C(K,2) becomes the number
    of the prompt's untied pairs. Every prompt weighs the same, however many completions it has.

    margin: Llama 2 eq. (2), log sigmoid(r_w - r_l - m): m is this times the difference of ranks, so that answers that are
    further apart for people get scores that are further apart. weights: [N, N], of the pair (better, worse); default: 1.
    """
    winner, loser = untied_pairs(ranks, group)
    apart = margin * (ranks[loser] - ranks[winner])
    losses = -F.logsigmoid(scores[winner].float() - scores[loser].float() - apart)  # [pairs]
    if weights is not None:
        losses = losses * weights[winner, loser]
    return mean_over_prompts(losses, group[winner])


def centering_loss(scores: Tensor, ranks: Tensor, group: Tensor) -> Tensor:
    """(r_w + r_l)^2 over the same pairs: the ranking loss sees differences alone, and lets all scores drift together.

    Eisenstein; what TRL's center_rewards_coefficient weighs.
    """
    winner, loser = untied_pairs(ranks, group)
    return mean_over_prompts((scores[winner].float() + scores[loser].float()) ** 2, group[winner])


def last_real_token(attention_mask: Tensor) -> Tensor:
    """[B, L] of 0 and 1 -> [B], the index of the last 1, wherever the padding is. Raises ValueError on an empty row."""
    if not bool(attention_mask.any(dim=1).all()):
        raise ValueError("a row of the batch has no real token")
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).to(torch.int8).argmax(dim=1)


# ---------------------------------------------------------------- log-probabilities


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(token) = logit[token] - logsumexp(logits): [B, R, V] and [B, R] -> [B, R] in fp32.

    Gathers before it normalises: autograd keeps one fp32 copy of the logits, and no [B, R, V] log-softmax beside it.
    """
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, nats: [B, R, V] -> [B, R]. H = logsumexp(l) - sum_v softmax(l)_v l_v."""
    logits = logits.float()
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


# ---------------------------------------------------------------- masked statistics


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean of x over the entries where mask is 1; over all processes when `reduce` sums over them."""
    total, count = (x * mask).sum(), mask.sum()
    if reduce is not None:
        total, count = reduce(torch.stack([total.double(), count.double()]))
    return (total / count).to(x.dtype)


def whiten(x: Tensor, mask: Tensor, *, shift: bool = True, reduce: Reduce | None = None) -> Tensor:
    """To variance 1 (the biased one), and mean 0 where `shift`, over the entries where mask is 1; 0 where mask is 0."""
    mean = masked_mean(x, mask, reduce)
    variance = masked_mean((x - mean) ** 2, mask, reduce)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift else white + mean) * mask


def whiten_groups(x: Tensor, mask: Tensor, answers: int) -> Tensor:
    """`whiten` within the answers to each prompt, which stand next to each other: [B, R] -> [B, R], 0 where mask is 0.

    A prompt that is hardly ever, or nearly always, answered right weighs as much as any other.
    """
    x, m = x.view(-1, answers, x.shape[1]), mask.view(-1, answers, x.shape[1])  # [prompts, answers, R]
    count = m.sum(dim=(1, 2), keepdim=True)
    centred = (x - (x * m).sum(dim=(1, 2), keepdim=True) / count) * m
    variance = centred.square().sum(dim=(1, 2), keepdim=True) / count
    return (centred * torch.rsqrt(variance + 1e-8)).view(mask.shape)


def explained_variance(predicted: Tensor, target: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """1 - Var(target - predicted) / Var(target): 1 is a perfect critic, 0 no better than a constant, below 0 worse."""
    error = target - predicted
    mean_error, mean_target = masked_mean(error, mask, reduce), masked_mean(target, mask, reduce)
    unexplained = masked_mean((error - mean_error) ** 2, mask, reduce)
    return 1 - unexplained / masked_mean((target - mean_target) ** 2, mask, reduce).clamp(min=1e-8)


# ---------------------------------------------------------------- KL


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str = "k1") -> Tensor:
    """KL(pi || reference) from tokens sampled from pi, per token. With d = log pi - log reference:

    k1 = d                    unbiased, high variance, may be negative
    k2 = d^2 / 2              biased, low variance
    k3 = exp(-d) - 1 + d      unbiased, never negative, low variance while the two are close

    That is their value. As a penalty in the reward only k1 pulls towards the reference: the gradient of E[k] with k held
    fixed, E[k grad log pi], is KL's for k1, and nearly none for k2 and k3 while the two are close, where both are ~ d^2 / 2.
    """
    d = logprobs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {kind!r}: k1, k2 or k3")


class KLCoefficient:
    """beta of the KL penalty: fixed, or steered so that the KL comes to a target (Ziegler section 2.2).

    beta <- beta (1 + 0.1 e),  e = clip(kl / target - 1, -0.2, 0.2)          at most 2 % a step

    Has state_dict and load_state_dict, so that it can be checkpointed.
    """

    def __init__(self, value: float, target: float | None = None):
        self.value, self.target = value, target

    def update(self, kl: float) -> None:
        """`kl`: nats a response, the mean of the step that was just taken."""
        if self.target is not None:
            self.value *= 1 + 0.1 * min(max(kl / self.target - 1, -0.2), 0.2)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


# ---------------------------------------------------------------- rewards and advantages


def token_rewards(
    scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coefficient: float, kind: str = "k1"
) -> Tensor:
    """InstructGPT eq. (2) without its pretraining term, a token at a time.

    r_t = -beta (log pi_t - log ref_t) + [t = T] score          T is the last real token

    scores: [B], one a response; logprobs, reference, mask: [B, R] -> [B, R], 0 on padding. kind: of `kl_estimate`.
    """
    rewards = -kl_coefficient * kl_estimate(logprobs, reference, kind) * mask
    return rewards.scatter_add(1, last_real_token(mask)[:, None], scores[:, None].to(rewards.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE eq. (16) as the backward recursion, and the returns that the critic learns: all [B, R].

    delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lambda A_{t+1}      return_t = A_t + V_t
    A response ends at its last real token: nothing after it is bootstrapped from. Padding gets 0.
    """
    mask = mask.to(values.dtype)
    values = values * mask  # so that V after the last token is 0
    advantages = torch.zeros_like(values)
    after, value_after = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
        value_after = values[:, t]
    return advantages, advantages + values


def leave_one_out_advantages(rewards: Tensor, mask: Tensor, answers: int) -> Tensor:
    """RLOO: A = R - mean R of the other answers to the same prompt, the same at every token of an answer: [B, R].

    rewards: [B, R], the KL penalty and the score of each token, whose sum is an answer's R; rows of one prompt are next
    to each other, `answers` of them. Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
    """
    total = (rewards * mask).sum(dim=1).view(-1, answers)  # [prompts, answers]
    others = (total.sum(dim=1, keepdim=True) - total) / (answers - 1)
    return (total - others).reshape(-1, 1) * mask


# ---------------------------------------------------------------- the losses, per token


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO eq. (7), negated to be minimised: - min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi / pi_old.

    All [B, R] -> (loss a token, whether the clipped branch was taken, through which no gradient flows).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, clipped), (clipped < free).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2): moved by over eps, V only learns to go back.

    All [B, R] -> (loss a token, whether the clipped branch was taken). From OpenAI's baselines; not in the PPO paper.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    free_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(free_error, clipped_error), (clipped_error > free_error).float()


# ---------------------------------------------------------------- models


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """A prompt as policy and reward model see it: the chat template up to where the assistant is to answer."""
    return tokenizer.apply_chat_template(  # type: ignore[return-value]  # its annotation covers every option
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def pad(sequences: Sequence[Sequence[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    """Ragged ids -> input_ids and attention_mask [B, L], L the longest, padded on the "left" or "right"."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), fill)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask


def backbone_states(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of a sequence-classification model's backbone."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).last_hidden_state


def score_head(model: Any, states: Tensor) -> Tensor:
    """The scalar head outside of autocast: [..., H] -> [...] in fp32. bf16 would round a score of 4 to 1/32."""
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.to(model.score.weight.dtype)).squeeze(-1).float()


def keep_head_in_full_precision(model: Any) -> None:
    """Run the score head outside of autocast in the model's own forward too: differences of rounded scores teach little."""
    head = model.score.forward

    def forward(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return head(states.to(model.score.weight.dtype))

    model.score.forward = forward


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head says of each sequence, read at its last real token: [B, L] -> [B] in fp32.

    What `model(input_ids, attention_mask).logits` gives, except that real tokens are known by the mask, not by being
    other than the pad token, and that the head is not rounded to bf16.
    """
    states = backbone_states(model, input_ids, attention_mask, positions_of(attention_mask))
    return score_head(model, states[torch.arange(len(states), device=states.device), last_real_token(attention_mask)])


def shared_states(model: PreTrainedModel, rows: Rows) -> Tensor:
    """`backbone_states` of shared rows: [M, L, H]."""
    return backbone_states(model, rows.input_ids, attention_mask(rows, model.config), rows.position_ids)


def answer_logprobs(model: Any, states: Tensor, rows: Rows) -> Tensor:
    """log p(y_t | x, y_<t) of every answer token by the word embeddings, which are the output head too: last hidden states
    [M, L, H] -> [B, K, R], 0 on padding."""
    real = rows.mask.bool()
    before = at_places(states, rows.before)[real]  # [T, H]
    table = gathered(model.get_input_embeddings().weight).to(before.dtype)  # [V, H]
    told = token_logprobs(before @ table.T, at_places(rows.input_ids, rows.at)[real])  # [T]
    return torch.zeros(real.shape, device=told.device).masked_scatter(real, told.float())


def token_scores(model: Any, states: Tensor, rows: Rows, logprobs: Tensor | None = None) -> Tensor:
    """What an answer's score would be, were each of its tokens the last: last hidden states [M, L, H] -> [B, K, R] in fp32.

        score = head(h_t) + config.reward_likelihood * sum_{i <= t} log p(y_i | x, y_<i)

    The head is what `AutoModelForSequenceClassification` gives. `logprobs`: `answer_logprobs`, where they are known.
    """
    told = score_head(model, at_places(states, rows.at))
    if weight := getattr(model.config, "reward_likelihood", 0.0):
        told = told + weight * (answer_logprobs(model, states, rows) if logprobs is None else logprobs).cumsum(dim=2)
    return told


def answer_scores(model: Any, states: Tensor, rows: Rows, logprobs: Tensor | None = None) -> Tensor:
    """The score of each answer, that of its last token: [M, L, H] -> [B, K] in fp32."""
    last = (rows.mask.sum(dim=2, keepdim=True) - 1).clamp(min=0)  # [B, K, 1]
    return token_scores(model, states, rows, logprobs).gather(2, last).squeeze(2)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: the log-probability of a token must not depend on when it is computed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Llama and its kin keep a rate and call the functional form; OPT has four of them, and skips whole layers
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def check_own_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where padding and what ends an answer are the same token."""
    from recipes.common.generation import turn_end

    if tokenizer.pad_token_id == turn_end(tokenizer)[0]:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, with which an answer ends: a score is read at the last token that "
            "is not padding, so the end would go unread; give a model.tokenizer that has a pad token of its own"
        )


def answers_told(model: Any, rows: Rows, with_entropy: bool = False, **options: Any) -> tuple[Any, Tensor, Any]:
    """A causal model's output on shared rows, the log-probability of every answer token, [B, K, R], and, if asked for, the
    entropy of the distribution that it was drawn from, [B, K, R]; 0 on padding. The output's logits are [1, T, V].

    Only the T places that an answer token follows reach the vocabulary.
    """
    real = rows.mask.bool()
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, states: at_places(states[0], rows.before[real])[None])
    try:
        out = model(
            input_ids=rows.input_ids,
            attention_mask=attention_mask(rows, model.config),
            position_ids=rows.position_ids,
            use_cache=False,
            **options,
        )
    finally:
        handle.remove()
    logits = out.logits[0].float()  # [T, V]
    assert len(logits) == rows.mask.sum(), f"{type(model).__name__} does not call its output embeddings"
    nothing = logits.new_zeros(real.shape)  # [B, K, R]
    logprobs = nothing.masked_scatter(real, token_logprobs(logits, at_places(rows.input_ids, rows.at[real])))
    return out, logprobs, nothing.masked_scatter(real, token_entropy(logits)) if with_entropy else None


def next_token_loss(model: nn.Module, text: Tensor) -> Tensor:
    """- mean log p(x_t | x_<t) of blocks of plain text, [T, S] -> []: the pretraining term of InstructGPT eq. (2)."""
    logits = model(input_ids=text, use_cache=False).logits[:, :-1]  # [T, S-1, V]
    return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


def check_frozen(parameters: Sequence[nn.Parameter], learner: nn.Module, why: str) -> None:
    """Raise UserError, with what to do about it, where one of the reference's parameters would learn."""
    learns = {id(p) for p in learner.parameters() if p.requires_grad}
    if any(p.requires_grad or id(p) in learns for p in parameters):
        raise UserError(
            f"the reference would learn along with the policy, and there would be no distance from it: {why}"
        )


def check_adapter_off(base: Sequence[nn.Parameter], adapted: nn.Module, bias: str) -> None:
    """Raise UserError where the model without its adapter, `base`, which is to be the reference, would learn as well.

    peft trains the model's own biases where lora.bias asks for it, and switching the adapter off does not put them back.
    """
    check_frozen(base, adapted, f"lora.bias: {bias} makes weights of the model itself learn; use none")


def check_fresh_adapter(kl: float, dtype: torch.dtype) -> None:
    """Raise UserError where a policy is `kl` nats an answer from its reference, itself without its adapter, before the first
    step: the adapter starts as something (lora.init_lora_weights: false), or the model below was changed for it (pissa).

    DoRA computes each weight anew, which rounds in the `dtype` of the model: a hundredth of a nat in bf16, of 64 tokens."""
    if abs(kl) > (1e-3 if dtype == torch.float32 else 0.2):
        raise UserError(
            f"lora: a fresh adapter is {kl:.3g} nats away from the model without it, which is the reference: use an "
            "initialisation that leaves the model as it is (lora.init_lora_weights: true)"
        )


FLAT_REWARDS = (
    "  step {step}: all answers to each prompt got the same reward, so nothing is learned of them: the policy gets none right, or "
    "all; or answers are drawn too much alike"
)


class Told(NamedTuple):
    """What policy and critic say of N answers."""

    logprobs: Tensor  # [N, R], log pi of each token
    values: Tensor  # [N, R], the critic's value before it
    entropy: Tensor | None  # [N, R], if asked for
    text_loss: Tensor | None  # [], of the plain text, if there is any


class ActorCritic(nn.Module):
    """Policy and critic as one module: one optimizer, one DDP wrapper or ZeRO engine and one forward hold both.

    The critic is a model of its own, started from the reward model (InstructGPT), or a linear head on the policy's last
    hidden states, started at 0. Its values are in the units of the normalised reward, (score - mean) / std, so that a
    critic started from the reward model predicts that reward from the first step. Of a reward model whose score holds a
    likelihood it starts from the head, by the head's own mean and spread.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None, scale: Any = None):
        """`scale`: the reward model's config, which holds reward_head_mean and reward_head_std if our recipe made it."""
        super().__init__()
        self.policy, self.critic = policy, critic
        self.mean, self.std = getattr(scale, "reward_head_mean", 0.0), getattr(scale, "reward_head_std", 1.0)
        self.head: Any = None
        if critic is None:
            self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> Any:
        """The policy's; DeepSpeed and our preflight look for it."""
        return self.policy.config

    def forward(
        self, rows: Rows, with_entropy: bool = False, text: Tensor | None = None, critic_only: bool = False
    ) -> Told:
        """Log-probabilities and values of N = B K answers, [N, R]; `text` [T, S] goes through the same forward, as DDP wants it.

        `critic_only`: what a critic learns moves its own weights alone, not the policy's that its head stands on.
        """
        out, logprobs, entropy = answers_told(
            self.policy, rows, with_entropy, output_hidden_states=self.critic is None
        )  # [B, K, R]
        if self.critic is None:
            states = at_places(out.hidden_states[-1], rows.before)  # [B, K, R, H]
            states = states.detach() if critic_only else states
            with torch.autocast(states.device.type, enabled=False):
                # DeepSpeed in 16 bits has the head in them too
                values = F.linear(states.float(), self.head.weight.float(), self.head.bias.float()).squeeze(-1)
        else:
            states = at_places(shared_states(self.critic, rows), rows.before)
            values = (score_head(self.critic, states) - self.mean) / self.std
        return Told(
            logprobs.flatten(0, 1),
            values.flatten(0, 1),
            entropy.flatten(0, 1) if with_entropy else None,
            None if text is None else next_token_loss(self.policy, text),
        )
