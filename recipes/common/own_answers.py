"""A policy's own answers and what they are worth: what DPO can learn from, and what best-of-n picks from.

Made-up mistakes are not the ones that a policy makes: to learn which answers to avoid, it has to be shown its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes.common.errors import UserError
from recipes.common.generation import Answer
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Evaluation, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def sample_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    count: int,
    evaluation: Evaluation,
    *,
    seed: int = 0,
    bf16: bool = False,
) -> list[list[Answer]]:
    """`count` answers to the prompt of each row, at temperature 1. Several processes share the rows; all get all."""
    import torch.distributed as dist

    from recipes.common.generation import as_answers, generate_ids, pad_id, prompt_ids, prompt_of, stop_ids

    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    prompts = [prompt_of(row) for row in rows[rank::world] for _ in range(count)]
    stops = stop_ids(policy, tokenizer)
    written = generate_ids(
        policy, prompt_ids(tokenizer, prompts), stop=stops, pad=pad_id(tokenizer), temperature=1.0, seed=seed + rank,
        max_new_tokens=evaluation.max_new_tokens, batch_size=evaluation.batch_size, bf16=bf16,
    )  # fmt: skip
    flat = as_answers(tokenizer, written, stops)
    mine = [flat[i : i + count] for i in range(0, len(flat), count)]
    shares: list[Any] = [mine]
    if several:
        shares = [None] * world
        dist.all_gather_object(shares, mine)
    return [shares[i % world][i // world] for i in range(len(rows))]


def checker_scores(rows: Sequence[Row], answers: Sequence[Sequence[Answer]]) -> list[list[float]]:
    """1 for each answer whose text is right, 0 for the others, by the tasks' checker. Raises UserError for rows without one."""
    from recipes.common.builtin.tasks import check
    from recipes.common.generation import is_checkable

    if rows and not is_checkable(rows[0]):
        raise UserError(
            "data: these rows have no checker (`task` and `answer`, as the builtin sets tasks and tasks_preferences "
            "have): name a reward model that is to judge the answers"
        )
    return [[float(check(row, answer.text)) for answer in some] for row, some in zip(rows, answers, strict=True)]


PROBE = [  # a conversation with words, digits, signs and another script
    {"role": "user", "content": "Add 17 and 2.5, please!\n你好"},
    {"role": "assistant", "content": "It's 19.5 (unfortunately)."},
]


def written(tokenizer: PreTrainedTokenizerBase, by_template: bool) -> list[int]:
    """The ids of a conversation as the chat template writes it, or of its words alone."""
    if by_template:
        return tokenizer.apply_chat_template(PROBE, return_dict=False)  # type: ignore[return-value]
    return [token for turn in PROBE for token in tokenizer(turn["content"])["input_ids"]]


def load_reward_model(
    name: str, model: Model, tokenizer: PreTrainedTokenizerBase, run: RunFolder, key: str
) -> PreTrainedModel:
    """A reward model that reads the tokens which the policy writes. Raises UserError if `name`, given as `key`, is none,
    or if its own tokenizer writes a conversation in other tokens: another vocabulary, other merges, another template."""
    from transformers import AutoModelForSequenceClassification

    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.shared_prompts import check_apart

    section = Model(name=name, dtype=model.dtype, attention=model.attention)
    own = load_tokenizer(section, run)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{key}: {name} has another tokenizer than the policy {model.name}, so it would score other text than was "
            "written; train one from the same base (recipes/alignment/reward_model.py)"
        )
    by_template = bool(own.chat_template)  # a reward model without one is asked by the policy's
    if written(own, by_template) != written(tokenizer, by_template):
        raise UserError(
            f"{key}: {name} has the vocabulary of the policy {model.name} and writes the same conversation in other tokens "
            "(another chat template, or other merges), so it would score what it was never trained on; train one from "
            "the same base, or give the policy its template (model.chat_template)"
        )
    made = load_model(section, tokenizer, run, auto_class=AutoModelForSequenceClassification)
    if made.config.num_labels != 1 or not hasattr(made, "score"):
        raise UserError(
            f"{key}: {name} gives {made.config.num_labels} labels; a reward model is a decoder with a `score` head of "
            "one, as recipes/alignment/reward_model.py makes"
        )
    check_apart(made)
    return made.requires_grad_(False).eval()


def reward_scores(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    answers: Sequence[Sequence[Answer]],
    batch_size: int,
    *,
    bf16: bool = False,
) -> list[list[float]]:
    """The reward model's score of each answer of each row, in its standard deviations above a good held-out answer.

    It is read at the answer's stop token; of one that was cut, at its last word. Raises UserError for nan or inf, and for a
    window that is shorter than a prompt with its answer.
    """
    from recipes.common.chat import encode_plain
    from recipes.common.generation import inference, pad_id, prompt_ids, prompt_of, turn_end
    from recipes.common.rlhf import answer_scores, shared_states
    from recipes.common.shared_prompts import Rows, check_window, share
    from recipes.common.verifiable_rewards import checked

    prompts = prompt_ids(tokenizer, [prompt_of(row) for row in rows])
    stop, flat = turn_end(tokenizer)[0], []
    for i, some in enumerate(answers):
        for k, ids in enumerate(encode_plain(tokenizer, [answer.text for answer in some])):
            flat.append((i, k, [*ids, stop] if some[k].ended or not ids else ids))
    flat.sort(key=lambda entry: len(prompts[entry[0]]) + len(entry[2]))
    if flat:
        check_window(reward_model.config, len(prompts[flat[-1][0]]) + len(flat[-1][2]))
    scores = [[0.0] * len(some) for some in answers]
    mean = getattr(reward_model.config, "reward_mean", 0.0)
    std = getattr(reward_model.config, "reward_std", 1.0)
    with inference(reward_model, bf16=bf16):
        for start in range(0, len(flat), batch_size):
            chunk = flat[start : start + batch_size]
            alone = share([prompts[i] for i, _, _ in chunk], [[ids] for _, _, ids in chunk], pad_id(tokenizer))
            alone = Rows(*(field.to(reward_model.device) for field in alone))
            told = answer_scores(reward_model, shared_states(reward_model, alone), alone).flatten().tolist()
            for (i, k, _), score in zip(chunk, checked(told, len(chunk), "the reward model"), strict=True):
                scores[i][k] = (score - mean) / std
    return scores
