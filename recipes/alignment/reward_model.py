"""Reward model: a language model with a scalar head, trained so that better answers score higher.

    loss = - 1/C(K,2)  E  log sigmoid(r(x, y_w) - r(x, y_l))        InstructGPT eq. (1)

over all pairs (y_w better than y_l) of the K ranked answers to a prompt x. All K of a prompt are one batch element: one
forward an answer serves its K - 1 pairs, pairs of one prompt do not overfit as they do when shuffled apart, and the prompt
is read once for all of them (recipes/common/shared_prompts.py). Plain pairs are K = 2. The score is read at the answer's
last token, which is the stop token.

A small model loses what it knows about answers while it is bent to score them. Three things keep it: its lowest layers can
stay frozen, fresh layers can be put on top of its own, and it can go on predicting the best answers' tokens (GRM). What a
language model knows about an answer is how likely it is, which no hidden state holds, so the score can have it beside the head:

    r(x, y) = head(h_last) + lambda log p(y | x)       lambda = reward.likelihood_coefficient, p by the tied word embeddings

The loss then has a second term, the same one of the head alone. Beside a likelihood that ranks most pairs right already it would
learn nothing, and it is what AutoModelForSequenceClassification serves.

Three more, all off by default, are about what the scores are to look like:

    log sigmoid(r_w - r_l - m)     further apart where people are surer: m grows with the ranks (Llama 2, eq. 2)
    + (r_w + r_l)^2                around 0, where differences alone let them drift (Eisenstein 2023)
    w log sigmoid(r_w - r_l)       no higher for being longer: pairs are weighed so that length tells nothing of who won

InstructGPT: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; GRM: Yang et al. 2024, https://arxiv.org/abs/2406.10216
Llama 2: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244

    make reward_model                                       # laptop, offline, 3 to 5 minutes, from `make full`
    make reward_model CONFIG=length_debiased                # laptop, with pairs of which length tells nothing
    make reward_model CONFIG=real                           # laptop, human preferences (hh-rlhf)
    make reward_model CONFIG=gpu                            # one GPU, a public model and preference set
    make reward_model CONFIG=cluster LAUNCH=zero3 NPROC=8   # a node

Laptop result: RESULTS.md#reward_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from recipes.common.config import Section
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass
class Reward:
    """The reward model's own knobs."""

    max_length: PositiveInt = 1024  # tokens of prompt and answer; longer ones are left out (TRL's RewardConfig)
    candidates: Literal["given", "sampled", "both"] = "given"  # the data's answers, the model's own (InstructGPT), both
    sampled_prompts: PositiveInt = 4000  # training prompts that the model answers itself, if candidates are sampled
    samples: PositiveInt = 6  # answers that it gives to each (InstructGPT: 4 to 9)
    new_layers: NonNegativeInt = 0  # fresh layers on top of the model's own
    frozen_layers: NonNegativeInt = 0  # lowest layers that stay as they are
    language_coefficient: NonNegativeFloat = 0.0  # weight of the language-model loss on the best answers (GRM)
    likelihood_coefficient: NonNegativeFloat = 0.0  # weight, in the score, of the model's own log p(answer | prompt)
    margin: NonNegativeFloat = 0.0  # m for one rank between two answers (Llama 2: 1/3, or 1 where it is to tell more)
    centering_coefficient: NonNegativeFloat = 0.0  # weight of a pair's (r_w + r_l)^2 (TRL: 0.01)
    balance_lengths: bool = False  # weigh the pairs so that length alone does not tell the better one
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, as a small model was pretrained
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices; training.learning_rate is that of the rest


@dataclass
class Config:
    model: Model
    data: Data
    reward: Reward
    training: Section[transformers.TrainingArguments]
    evaluation: Evaluation
    run: Run
    demonstrations: Data | None = (
        None  # answers that are to score 0 on average (InstructGPT); default: the held-out best
    )


# ---------------------------------------------------------------- data: a batch element is a prompt with its K answers


def sample_candidates(
    rows: datasets.Dataset, tokenizer: Any, config: Config, run: RunFolder, *, beside_given: bool
) -> Any:
    """Comparisons with the wrong answers that the starting model itself gives, at temperature 1, beside the wrong ones
    of the data or instead of them.

    Made-up mistakes are not the ones that a policy makes, and a reward model that never saw the policy's is soon gamed:
    InstructGPT's labellers rank its own policies' answers. The labeller here is the task's checker, on training prompts
    only; the wrong answers tie, below the best. Prompts with nothing to compare are left out. UserError if nothing can
    be checked.
    """
    from recipes.common.builtin.tasks import check
    from recipes.common.generation import is_checkable
    from recipes.common.models import load_model
    from recipes.common.own_answers import sample_answers
    from recipes.common.sharding import loaded_whole

    if not is_checkable(rows[0]):
        raise UserError("reward.candidates: sampled answers need a labeller, and only the builtin tasks have a checker")
    with loaded_whole():  # it writes, and learns nothing
        policy: Any = load_model(config.model, tokenizer, run)
    answers = sample_answers(
        policy.to(config.training.device), tokenizer, list(rows), config.reward.samples, config.evaluation,
        seed=config.training.seed, bf16=config.training.bf16,
    )  # fmt: skip
    found, wrong_ones = [], 0
    for row, texts in zip(rows, answers, strict=True):
        # what was cut is left out: the stop token that it is to be scored at is not there
        ended = dict.fromkeys(text for text, end in texts if end)
        wrong = [text for text in ended if text.strip() and not check(row, text)]
        wrong_ones += bool(wrong)
        kept = len(row["completions"]) if beside_given else 1
        completions, ranks = row["completions"][:kept], row["ranks"][:kept]
        new = [text for text in wrong if text not in completions]
        if kept > 1 or new:
            found.append({"prompt": row["prompt"], "completions": completions + new, "ranks": ranks + [1] * len(new)})
    if not wrong_ones:
        raise UserError(
            "reward.candidates: the model answered every sampled prompt right (answers that evaluation.max_new_tokens cut "
            "are left out), so there is nothing to compare"
        )
    run.say(f"  sampled {config.reward.samples} answers to {len(rows)} prompts: {wrong_ones} prompts with wrong ones")
    return rows.from_list(found)


def comparisons(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, run: RunFolder, *, skip: bool = False
) -> Any:
    """Canonical preference rows with "sequences" beside them: K lists of ids, each prompt, answer, stop token.

    Adds "length", of the longest, and "start", the prompt's length. Raises UserError when reward.max_length leaves nothing,
    and for answers of different rank that are the same tokens (`skip` leaves such rows out).
    """
    from recipes.common.chat import encode_plain
    from recipes.common.generation import turn_end
    from recipes.common.rlhf import prompt_ids

    stop = turn_end(tokenizer)[0]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_ids(tokenizer, row["prompt"])
        answers = encode_plain(tokenizer, row["completions"])
        sequences = [[*prompt, *answer, stop] for answer in answers]
        ranks: dict[tuple[int, ...], int] = {}
        alike = any(ranks.setdefault(tuple(a), r) != r for a, r in zip(answers, row["ranks"], strict=True))
        return {"sequences": sequences, "length": max(map(len, sequences)), "start": len(prompt), "alike": alike}

    encoded = rows.map(encode)
    alike = [i for i, same in enumerate(encoded["alike"]) if same]
    if alike and not skip:
        raise UserError(
            f"data: row {alike[0] + 1} ({rows[alike[0]]['prompt'][-1]['content'][:40]!r}): two answers of different rank "
            "are the same tokens, so that no score could tell them apart; leave such rows out (data.on_bad_row: skip)"
        )
    kept = encoded.filter(lambda row: row["length"] <= max_length and not row["alike"]).remove_columns("alike")
    if len(kept) == 0:
        raise UserError(f"reward.max_length: every one of {len(rows)} comparisons is longer than {max_length} tokens")
    if len(kept) < len(rows):
        why = f"longer than {max_length} tokens" + (", or of answers that are the same tokens" if alike else "")
        run.say(f"  {len(rows) - len(kept)} of {len(rows)} comparisons are {why}: left out")
    return kept


def row_length(row: dict[str, Any]) -> int:
    """Tokens of the row that holds a prompt and all of its answers."""
    return row["start"] + sum(len(sequence) - row["start"] for sequence in row["sequences"])


def demonstrations(data: Data, tokenizer: Any, config: Config, run: RunFolder) -> Any:
    """Held-out conversations in the form of comparisons, with nothing to compare: K = 1."""
    from recipes.common.data import load_data

    rows = load_data(data, "conversation")["validation"]
    rows = rows.select(range(min(len(rows), config.evaluation.max_samples)))
    alone = [{"prompt": turns[:-1], "completions": [turns[-1]["content"]], "ranks": [0]} for turns in rows["messages"]]
    return comparisons(type(rows).from_list(alone), tokenizer, config.reward.max_length, run)


def collate(rows: list[dict[str, Any]], fill: int) -> dict[str, torch.Tensor]:
    """B prompts with their K answers each: the fields of `shared_prompts.Rows`, and `ranks` [B, K].

    A prompt of fewer answers than another has rank -1 where it has none. The stop token is an answer's last.
    """
    import torch

    from recipes.common.shared_prompts import share

    prompts = [row["sequences"][0][: row["start"]] for row in rows]
    answers = [[sequence[row["start"] :] for sequence in row["sequences"]] for row in rows]
    ranks = [torch.tensor(row["ranks"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ranks, batch_first=True, padding_value=-1)
    return {**share(prompts, answers, fill)._asdict(), "ranks": padded}


# ---------------------------------------------------------------- model


def grow(model: PreTrainedModel, layers: int) -> None:
    """Put fresh layers on top of the model's own, initialised as the library does it.

    Of frozen layers they are what learns about answers. Raises UserError for a model that is not a stack of `layers`, or whose
    layers no process holds whole.
    """
    import copy

    own = getattr(model.base_model, "layers", None)
    if layers and (own is None or not hasattr(getattr(own[-1], "self_attn", None), "layer_idx")):
        raise UserError(f"reward.new_layers: {type(model).__name__} is no stack of `layers` like LLaMA's: use 0")
    if layers and hasattr(next(own.parameters()), "ds_id"):
        raise UserError("reward.new_layers: ZeRO-3 has cut the model's own layers already: use 0, or launch with zero2")
    for _ in range(layers):
        fresh = copy.deepcopy(own[-1]).requires_grad_(True)  # it may be a frozen one's copy
        fresh.self_attn.layer_idx = len(own)
        for module in fresh.modules():
            module._is_hf_initialized = False
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)
        own.append(fresh)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types.append(model.config.layer_types[-1])
        model.config.num_hidden_layers = len(own)


def freeze(model: PreTrainedModel, layers: int) -> None:
    """Keep the lowest layers as they are. Raises UserError where there are not so many."""
    own = getattr(model.base_model, "layers", [])
    if layers > len(own):
        raise UserError(f"reward.frozen_layers: {layers} of {len(own)} layers cannot be frozen")
    for layer in own[:layers]:
        layer.requires_grad_(False)


# ---------------------------------------------------------------- training


def make_trainer(model: Any, tokenizer: Any, train: Any, held_out: Any, config: Config) -> Trainer:
    """transformers' Trainer with the K-way loss: TRL's RewardTrainer knows pairs only."""
    import torch
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from recipes.common.preferences import length_balance, ranking_figures
    from recipes.common.rlhf import answer_logprobs, answer_scores, centering_loss, ranking_loss
    from recipes.common.shared_prompts import Rows, attention_mask

    knobs = config.reward
    tilt, scale = length_balance(train) if knobs.balance_lengths else (0.0, 1.0)

    class ByLength(torch.utils.data.Sampler):
        """Rows of a similar length together, in an order that the epoch alone decides: a resumed run finds it again."""

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(train)

        def __iter__(self):  # type: ignore[no-untyped-def]
            generator = torch.Generator().manual_seed(config.training.seed + self.epoch)
            size = config.training.per_device_train_batch_size * config.training.world_size
            return iter(get_length_grouped_indices(train["length"], size, generator=generator))

    class RewardTrainer(Trainer):
        model_accepts_loss_kwargs = False  # our loss is a mean: the Trainer is to divide it by the accumulation steps
        accuracies: list[torch.Tensor] = []

        def _get_train_sampler(self, train_dataset=None):  # type: ignore[no-untyped-def]
            return ByLength()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            rows, ranks = Rows(**{name: inputs[name] for name in Rows._fields}), inputs["ranks"]
            told = model(
                input_ids=rows.input_ids,
                attention_mask=attention_mask(rows, self.model.config),
                position_ids=rows.position_ids,
                use_cache=False,
                output_hidden_states=True,
            )
            states = told.hidden_states[-1]  # [M, L, H]
            there = ranks >= 0  # [B, K]
            reads = knobs.language_coefficient or knobs.likelihood_coefficient
            logprobs = answer_logprobs(self.model, states, rows) if reads else None  # [B, K, R]
            scores = answer_scores(self.model, states, rows, logprobs)[there]  # [N], as are the next two
            ranks_of, group = ranks[there], there.nonzero()[:, 0]
            with torch.no_grad():
                pair = (group[:, None] == group[None, :]) & (ranks_of[:, None] < ranks_of[None, :])  # [N, N]
                difference = (scores[:, None] - scores[None, :])[pair]
                self.accuracies.append(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())
            weights = None
            if knobs.balance_lengths:
                lengths = rows.mask.sum(dim=2)[there]  # [N]; a prompt's answers share its prompt
                weights = scale * torch.exp(-tilt * (lengths[:, None] - lengths[None, :]))  # [N, N]
            loss = ranking_loss(scores, ranks_of, group, knobs.margin, weights)
            if knobs.likelihood_coefficient:
                # with the likelihood most pairs are right from the start, and the head would learn nothing
                head = answer_scores(self.model, states, rows, torch.zeros_like(logprobs))[there]
                loss = loss + ranking_loss(head, ranks_of, group, knobs.margin, weights)
            if knobs.centering_coefficient:
                loss = loss + knobs.centering_coefficient * centering_loss(scores, ranks_of, group)
            if knobs.language_coefficient:
                best = rows.mask.bool() & (ranks == 0)[:, :, None]
                loss = loss - knobs.language_coefficient * logprobs[best].mean()
            return (loss, {"scores": scores}) if return_outputs else loss

        def log(self, logs, start_time=None):  # type: ignore[no-untyped-def]
            if "loss" in logs and self.accuracies:
                logs["accuracy"] = torch.stack(self.accuracies).mean().item()
                self.accuracies.clear()
            super().log(logs, start_time)

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):  # type: ignore[no-untyped-def]
            figures = ranking_figures(score_all(self.model, held_out, tokenizer, config), held_out)
            metrics = {f"eval_{name}": figures[name] for name in ("loss", "accuracy")}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    config.training.remove_unused_columns = False  # ours are not arguments of the model's forward
    trainer = RewardTrainer(
        model=model,
        args=config.training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.model_accepts_loss_kwargs = False  # the constructor looks at the model and would set it
    return trainer


# ---------------------------------------------------------------- evaluation


def score_all(
    model: PreTrainedModel, data: Any, tokenizer: Any, config: Config, *, head_alone: bool = False
) -> list[list[float]]:
    """The score of every answer of every prompt, batched by length so that little is padding.

    `head_alone`: without the likelihood, what AutoModelForSequenceClassification gives.
    """
    import torch

    from recipes.common.rlhf import answer_scores, shared_states
    from recipes.common.shared_prompts import Rows

    order = sorted(range(len(data)), key=data["length"].__getitem__)
    size = max(1, config.evaluation.batch_size // max(map(len, data["ranks"])))  # prompts
    scores: list[list[float]] = [[] for _ in order]
    device, training = model.device, model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.training.bf16):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = {
                name: x.to(device) for name, x in collate(list(data.select(chosen)), tokenizer.pad_token_id).items()
            }
            real, rows = batch.pop("ranks") >= 0, Rows(**batch)  # [B, K]
            states = shared_states(model, rows)
            told = answer_scores(
                model, states, rows, torch.zeros_like(rows.mask.float()) if head_alone else None
            )  # [B, K]
            for i, some, are_there in zip(chosen, told.tolist(), real.tolist(), strict=True):
                scores[i] = [score for score, is_one in zip(some, are_there, strict=True) if is_one]
    model.train(training)
    return scores


def per_token(model: PreTrainedModel, scores: list[list[float]], data: Any, tokenizer: Any, count: int = 8) -> str:
    """The score after each token of some prompts' best- and worst-scored answers, to see where the model makes up its mind.

    Nothing trains the score of an unfinished answer: what it says is what its state knows so far.
    """
    from recipes.common.generation import inference
    from recipes.common.rlhf import shared_states, token_scores
    from recipes.common.shared_prompts import Rows

    lines = []
    with inference(model):
        for row, told in zip(data.select(range(min(count, len(data)))), scores, strict=False):
            lines += ["", f"{row['prompt'][-1]['role']}: {row['prompt'][-1]['content']}"]
            batch = {name: x.to(model.device) for name, x in collate([row], tokenizer.pad_token_id).items()}
            del batch["ranks"]
            rows = Rows(**batch)
            after = token_scores(model, shared_states(model, rows), rows)[0].tolist()  # [K, R]
            order = sorted(range(len(told)), key=lambda k: -told[k])
            for k in dict.fromkeys((order[0], order[-1])):
                tokens = [tokenizer.decode([i]) for i in row["sequences"][k][row["start"] :]]
                lines.append(f"  rank {row['ranks'][k]}")
                lines += [f"    {score:+7.2f}  {token!r}" for score, token in zip(after[k], tokens, strict=False)]
    return "\n".join(lines[1:]) + "\n"


# ---------------------------------------------------------------- saving


def save_and_reload(model: PreTrainedModel, tokenizer: Any, held_out: Any, run: RunFolder) -> None:
    """Save, load with AutoModelForSequenceClassification, compare: a lost score head is this topic's classic bug."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from recipes.common.generation import positions_of
    from recipes.common.rlhf import pad, sequence_scores
    from recipes.common.sharding import loaded_whole

    folder = run.save_model(model, tokenizer)
    with loaded_whole():
        reloaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=model.dtype)
    reloaded.to(model.device).eval()
    sequences = [sequence for row in held_out["sequences"][:4] for sequence in row]
    model.eval()
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = (t.to(model.device) for t in pad(sequences, tokenizer.pad_token_id, side))
            # learned positions (GPT-2's) are counted from a row's first column unless it is told better
            placed = {"position_ids": positions_of(mask)} if side == "left" else {}
            kept = sequence_scores(model, ids, mask)
            loaded = reloaded(input_ids=ids, attention_mask=mask, **placed).logits[:, 0]
            if not torch.allclose(loaded.float(), kept, atol=1e-3 if model.dtype == torch.float32 else 0.1):
                raise RuntimeError(f"the saved reward model gives other scores: {loaded.tolist()}, not {kept.tolist()}")


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Train the reward model; figures on held-out comparisons beside baselines that read no meaning."""
    import math

    import numpy as np
    from datasets import concatenate_datasets
    from transformers import AutoModelForSequenceClassification

    from recipes.common.data import load_data
    from recipes.common.generation import model_positions
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.optimizers import check_muon, muon_with_adamw
    from recipes.common.preferences import (
        best_ranked,
        draw,
        length_baseline,
        length_bias,
        ranked_sample,
        ranking_figures,
        words_baseline,
    )
    from recipes.common.preflight import enough_rows, preflight
    from recipes.common.rlhf import check_own_pad_token, disable_dropout, keep_head_in_full_precision
    from recipes.common.sft import plain_logits
    from recipes.common.sharding import sharded, whole_model
    from recipes.common.shared_prompts import check_apart, check_window
    from recipes.common.training import fit, refuse_unused

    refuse_unused(config.training, {
        "label_smoothing_factor": (0.0, "the ranking loss has no labels to smooth"),
        "data_seed": (None, "training.seed decides the order of the rows"),
    })  # fmt: skip
    if config.reward.optimizer == "muon":
        check_muon(config.training)
    tokenizer = load_tokenizer(config.model, run, chat=True)
    check_own_pad_token(tokenizer)
    model = load_model(config.model, tokenizer, run, auto_class=AutoModelForSequenceClassification, num_labels=1)
    if not hasattr(model, "score"):
        raise UserError(
            f"model.name: {type(model).__name__} has no `score` head on its last token: give a decoder-only model"
        )
    knobs = config.reward
    if (knobs.language_coefficient or knobs.likelihood_coefficient) and not (
        model.config.tie_word_embeddings and plain_logits(model)
    ):
        name = "language" if knobs.language_coefficient else "likelihood"
        raise UserError(
            f"reward.{name}_coefficient: the output head of this model is not its word embeddings alone (it has weights of its "
            "own, or scales or caps the logits), and a sequence-classification model does not have it: use 0"
        )
    check_apart(model)
    freeze(model, config.reward.frozen_layers)
    grow(model, config.reward.new_layers)
    model.config.reward_likelihood = knobs.likelihood_coefficient
    keep_head_in_full_precision(model)
    disable_dropout(model)  # answers of one prompt are compared with each other: noise between them is not wanted

    data, skip = load_data(config.data, "preference"), config.data.on_bad_row == "skip"
    rows = enough_rows(data["train"], config.training, run)
    limit = min(config.reward.max_length, model_positions(model) or config.reward.max_length)
    held_out_rows = data["validation"].select(range(min(len(data["validation"]), config.evaluation.max_samples)))
    held_out, sampled_held_out = comparisons(held_out_rows, tokenizer, limit, run, skip=skip), None
    shown = demonstrations(config.demonstrations, tokenizer, config, run) if config.demonstrations else None
    if config.reward.candidates != "given" and not run.dry:
        both = config.reward.candidates == "both"
        asked = min(len(rows), config.reward.sampled_prompts)
        own = sample_candidates(rows.select(range(asked)), tokenizer, config, run, beside_given=both)
        others = [rows.skip(asked).select_columns(own.column_names)] if both and asked < len(rows) else []
        rows = concatenate_datasets([own, *others])
        own = sample_candidates(held_out_rows, tokenizer, config, run, beside_given=False)
        sampled_held_out = comparisons(own, tokenizer, limit, run, skip=True)
        skip = True  # two of its answers may be other text and the same tokens
    train = comparisons(rows, tokenizer, limit, run, skip=skip)
    check_window(model.config, max(map(row_length, (*train, *held_out, *(shown or ()), *(sampled_held_out or ())))))

    args = config.training
    prompts_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(train) / prompts_a_step)
    batch = collate(
        list(train.select(range(min(len(train), args.per_device_train_batch_size)))), tokenizer.pad_token_id
    )
    preflight(run, model, batch, args=args, total_steps=steps)

    trainer = make_trainer(model, tokenizer, train, held_out, config)
    if (knobs.language_coefficient or knobs.likelihood_coefficient) and sharded(trainer):
        raise UserError(
            "reward.language_coefficient, reward.likelihood_coefficient: they take the product with the whole word "
            "embeddings, and no process holds those: use 0, or launch with ddp or zero2"
        )
    untrained = ranking_figures(score_all(whole_model(trainer), held_out, tokenizer, config), held_out)
    length, words = length_baseline(train, held_out), words_baseline(train, held_out)
    if config.reward.optimizer == "muon":
        trainer.optimizer = muon_with_adamw(model, args, config.reward.muon_learning_rate)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    model = whole_model(trainer)
    scores = score_all(model, held_out, tokenizer, config)
    figures = ranking_figures(scores, held_out)
    if sampled_held_out is not None:
        own_scores = score_all(model, sampled_held_out, tokenizer, config)
        figures["sampled_reward_accuracy"] = ranking_figures(own_scores, sampled_held_out)["accuracy"]

    # InstructGPT shifts scores so that demonstrations get 0 on average; dividing by their spread lets one KL coefficient
    # serve every reward model. Kept in config.json, for the head has no bias: (score - reward_mean) / reward_std. The
    # head's own pair is for a critic that starts from it.
    def mean_and_std(of_held_out: list[list[float]], head_alone: bool) -> tuple[float, float]:
        told, rows_of = of_held_out, held_out
        if shown is not None:
            told, rows_of = score_all(model, shown, tokenizer, config, head_alone=head_alone), shown
        good = best_ranked(told, rows_of)
        return float(np.mean(good)), float(np.std(good)) or 1.0

    model.config.reward_mean, model.config.reward_std = of_head = mean_and_std(scores, False)
    if knobs.likelihood_coefficient:
        head = score_all(model, held_out, tokenizer, config, head_alone=True)
        figures["head_accuracy"] = ranking_figures(head, held_out)["accuracy"]
        of_head = mean_and_std(head, True)
    model.config.reward_head_mean, model.config.reward_head_std = of_head
    save_and_reload(model, tokenizer, held_out, run)

    draw(scores, held_out, run)
    run.sample("ranked.txt", ranked_sample(scores, held_out))
    run.sample("per_token.txt", per_token(model, scores, held_out, tokenizer))
    run.card(
        "The score of a conversation is `model(**inputs).logits`, read at its last token, the stop token"
        + (
            f", and {knobs.likelihood_coefficient:g} times the answer's log-likelihood by the model's own word embeddings "
            f"(`recipes/common/rlhf.py: answer_scores`). The head alone ranks {figures['head_accuracy']:.3f} of the held-out "
            f"pairs right, with the likelihood {figures['accuracy']:.3f}. "
            if knobs.likelihood_coefficient
            else ". "
        )
        + "`recipes/alignment/ppo.py` uses (score - config.reward_mean) / config.reward_std: "
        f"{'demonstrations' if shown is not None else 'the best-ranked held-out answers'} get 0 on average, with "
        "spread 1."
    )
    return {
        "reward_accuracy": figures.pop("accuracy"),
        "baseline_accuracy": max(0.5, untrained["accuracy"], length, words),
        "baseline_untrained_accuracy": untrained["accuracy"],
        "baseline_length_accuracy": length,
        "baseline_words_accuracy": words,
        "eval_loss": figures.pop("loss"),
        "baseline_loss": untrained["loss"],
        **figures,
        **length_bias(scores, held_out),
        "reward_mean": model.config.reward_mean,
        "reward_std": model.config.reward_std,
    }


if __name__ == "__main__":
    run_recipe(main, Config)
