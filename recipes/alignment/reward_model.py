"""Reward model: a language model with a scalar head, trained so that better answers score higher.

    loss = - 1/C(K,2)  E  log sigmoid(r(x, y_w) - r(x, y_l))        InstructGPT eq. (1)

over all pairs (y_w better than y_l) of the K ranked answers to a prompt x. All K of a prompt are one batch element: one
forward an answer serves its K - 1 pairs, and pairs of one prompt do not overfit as they do when shuffled apart. Plain
pairs are K = 2. The score is read at the answer's last token, which is the stop token.

A small model loses what it knows about answers while it is bent to score them. Three things keep it: its lowest layers
can stay frozen, fresh layers can be put on top of its own, and it can go on predicting the best answers' tokens (GRM).

InstructGPT: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; GRM: Yang et al. 2024, https://arxiv.org/abs/2406.10216

    make reward_model                                       # laptop, offline, 6 minutes, from `make full`
    make reward_model CONFIG=real                           # laptop, human preferences (hh-rlhf), 10 minutes
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
    from torch import Tensor
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
    from recipes.common.generation import generate, is_checkable
    from recipes.common.models import load_model

    if not is_checkable(rows[0]):
        raise UserError("reward.candidates: sampled answers need a labeller, and only the builtin tasks have a checker")
    policy, k = load_model(config.model, tokenizer, run), config.reward.samples
    answers = generate(
        policy.to(config.training.device), tokenizer, [row["prompt"] for row in rows for _ in range(k)],
        max_new_tokens=config.evaluation.max_new_tokens, batch_size=config.evaluation.batch_size,
        temperature=1.0, seed=config.training.seed, bf16=config.training.bf16,
    )  # fmt: skip
    found, wrong_ones = [], 0
    for i, row in enumerate(rows):
        wrong = [text for text in dict.fromkeys(answers[i * k : (i + 1) * k]) if text.strip() and not check(row, text)]
        wrong_ones += bool(wrong)
        kept = len(row["completions"]) if beside_given else 1
        completions, ranks = row["completions"][:kept], row["ranks"][:kept]
        new = [text for text in wrong if text not in completions]
        if kept > 1 or new:
            found.append({"prompt": row["prompt"], "completions": completions + new, "ranks": ranks + [1] * len(new)})
    if not wrong_ones:
        raise UserError(
            "reward.candidates: the model answered every sampled prompt right, so there is nothing to compare"
        )
    run.say(f"  sampled {k} answers to {len(rows)} prompts: {wrong_ones} prompts with wrong ones")
    return rows.from_list(found)


def comparisons(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, run: RunFolder) -> Any:
    """Canonical preference rows with "sequences" beside them: K lists of ids, each prompt, answer, stop token.

    Adds "length", of the longest, and "start", the prompt's length. Raises UserError when reward.max_length leaves nothing.
    """
    from recipes.common.chat import encode_plain
    from recipes.common.rlhf import prompt_ids

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_ids(tokenizer, row["prompt"])
        answers = encode_plain(tokenizer, row["completions"])
        sequences = [[*prompt, *answer, tokenizer.eos_token_id] for answer in answers]
        return {"sequences": sequences, "length": max(map(len, sequences)), "start": len(prompt)}

    encoded = rows.map(encode)
    kept = encoded.filter(lambda row: row["length"] <= max_length)
    if len(kept) == 0:
        raise UserError(f"reward.max_length: every one of {len(rows)} comparisons is longer than {max_length} tokens")
    if len(kept) < len(rows):
        run.say(f"  {len(rows) - len(kept)} of {len(rows)} comparisons are longer than {max_length} tokens: left out")
    return kept


def collate(rows: list[dict[str, Any]], fill: int) -> dict[str, torch.Tensor]:
    """B prompts -> one batch of N = sum of their K sequences: input_ids, attention_mask [N, L]; ranks, group, start [N].

    `group` says which prompt a sequence answers, `start` where its answer begins.
    """
    import torch

    from recipes.common.rlhf import pad

    ids, mask = pad([sequence for row in rows for sequence in row["sequences"]], fill, "right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
        "group": torch.tensor([i for i, row in enumerate(rows) for _ in row["ranks"]]),
        "start": torch.tensor([row["start"] for row in rows for _ in row["ranks"]]),
    }


# ---------------------------------------------------------------- model


def grow(model: PreTrainedModel, layers: int) -> None:
    """Put fresh layers on top of the model's own, initialised as the library does it.

    A language model's last hidden state before a token says which token it expects. Whether the one that came is the
    expected one is another question, which no layer of it was trained to ask: fresh layers on top learn that soonest.
    Raises UserError for a model that is not a stack of `layers`.
    """
    import copy

    own = getattr(model.base_model, "layers", None)
    if layers and (own is None or not hasattr(getattr(own[-1], "self_attn", None), "layer_idx")):
        raise UserError(f"reward.new_layers: {type(model).__name__} is no stack of `layers` like LLaMA's: use 0")
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


def language_loss(hidden: Tensor, batch: dict[str, Tensor], table: Tensor) -> Tensor:
    """- mean log p(y_t | x, y_<t) over the tokens of the best-ranked answers, stop token included.

    hidden [N, L, H]; the batch of `collate`; table [V, H], the word embeddings, which are the output head too.
    """
    import torch
    import torch.nn.functional as F

    ids = batch["input_ids"]
    place = torch.arange(1, ids.shape[1], device=ids.device)  # of the token that is predicted
    answer = (place >= batch["start"][:, None]) & batch["attention_mask"][:, 1:].bool()  # [N, L-1]
    answer &= (batch["ranks"] == 0)[:, None]
    return F.cross_entropy((hidden[:, :-1][answer] @ table.T.to(hidden.dtype)).float(), ids[:, 1:][answer])


# ---------------------------------------------------------------- training


def make_trainer(model: Any, tokenizer: Any, train: Any, held_out: Any, config: Config) -> Trainer:
    """transformers' Trainer with the K-way loss: TRL's RewardTrainer knows pairs only."""
    import torch
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from recipes.common.rlhf import ranking_loss

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
            ranks, group = inputs["ranks"], inputs["group"]  # [N]
            told = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                output_hidden_states=config.reward.language_coefficient > 0,
            )
            scores = told.logits.squeeze(-1)  # [N]
            with torch.no_grad():
                pair = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])  # [N, N]
                difference = (scores[:, None] - scores[None, :])[pair]
                self.accuracies.append(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())
            loss = ranking_loss(scores, ranks, group)
            if config.reward.language_coefficient:
                table = self.model.get_input_embeddings().weight
                loss = loss + config.reward.language_coefficient * language_loss(told.hidden_states[-1], inputs, table)
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


def score_all(model: PreTrainedModel, data: Any, tokenizer: Any, config: Config) -> list[list[float]]:
    """The score of every answer of every prompt, batched by length so that little is padding."""
    import torch

    from recipes.common.rlhf import pad, sequence_scores

    flat = [(i, k, sequence) for i, row in enumerate(data["sequences"]) for k, sequence in enumerate(row)]
    flat.sort(key=lambda entry: len(entry[2]))
    scores = [[0.0] * len(row) for row in data["ranks"]]
    device, training = model.device, model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.training.bf16):
        for start in range(0, len(flat), config.evaluation.batch_size):
            chunk = flat[start : start + config.evaluation.batch_size]
            ids, mask = pad([sequence for _, _, sequence in chunk], tokenizer.pad_token_id, "right")
            for (i, k, _), score in zip(
                chunk, sequence_scores(model, ids.to(device), mask.to(device)).tolist(), strict=True
            ):
                scores[i][k] = score
    model.train(training)
    return scores


def pairs_of(scores: list[list[float]], data: Any) -> tuple[Any, Any, Any]:
    """Every untied pair: score of the better - of the worse [P], rank gap [P], weight [P] = 1 / pairs of its prompt."""
    import numpy as np

    differences, gaps, weights = [], [], []
    for row, ranks in zip(scores, data["ranks"], strict=True):
        pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
        differences += [row[i] - row[j] for i, j in pairs]
        gaps += [ranks[j] - ranks[i] for i, j in pairs]
        weights += [1 / len(pairs)] * len(pairs)
    return np.array(differences), np.array(gaps), np.array(weights)


def ranking_figures(scores: list[list[float]], data: Any) -> dict[str, float]:
    """Share of pairs ranked right (an equal score is half right), the K-way loss, how far confidence is from truth."""
    import numpy as np

    differences, gaps, weights = pairs_of(scores, data)
    right = np.where(differences == 0, 0.5, differences > 0)
    predicted, observed, count = calibration(differences)
    return {
        "accuracy": float(right.mean()),
        "loss": float((np.logaddexp(0, -differences) * weights).sum() / weights.sum()),
        "calibration_error": float((np.abs(predicted - observed) * count).sum() / count.sum()),
        **{f"accuracy_gap_{gap}": float(right[gaps == gap].mean()) for gap in np.unique(gaps)},
    }


def calibration(differences: Any, bins: int = 10) -> tuple[Any, Any, Any]:
    """Confidence of the model in the answer it prefers, 0.5 to 1, against how often that one is the better: by bin.

    Returns mean confidence, share right and count of the bins that hold any pair.
    """
    import numpy as np

    confidence, right = 1 / (1 + np.exp(-np.abs(differences))), differences > 0
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = np.unique(which)
    return tuple(
        np.array([f(which == b) for b in filled])
        for f in (lambda m: confidence[m].mean(), lambda m: right[m].mean(), lambda m: m.sum())
    )  # type: ignore[return-value]


def length_baseline(train: Any, held_out: Any) -> float:
    """Accuracy of preferring the longer answer, or the shorter: whichever is right more often in training."""

    def longer_is_better(data: Any) -> float:
        return ranking_figures([[float(len(s)) for s in row] for row in data["sequences"]], data)["accuracy"]

    share = longer_is_better(train.select(range(min(len(train), 2000))))
    return longer_is_better(held_out) if share >= 0.5 else 1 - longer_is_better(held_out)


# ---------------------------------------------------------------- saving


def save_and_reload(model: PreTrainedModel, tokenizer: Any, held_out: Any, run: RunFolder) -> None:
    """Save, load with AutoModelForSequenceClassification, compare: a lost score head is this topic's classic bug."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from recipes.common.rlhf import pad, sequence_scores

    folder = run.save_model(model, tokenizer)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    sequences = [sequence for row in held_out["sequences"][:4] for sequence in row]
    model.eval()
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = (t.to(model.device) for t in pad(sequences, tokenizer.pad_token_id, side))
            kept, loaded = sequence_scores(model, ids, mask), reloaded(input_ids=ids, attention_mask=mask).logits[:, 0]
            if not torch.allclose(loaded.float(), kept, atol=1e-3 if model.dtype == torch.float32 else 0.1):
                raise RuntimeError(f"the saved reward model gives other scores: {loaded.tolist()}, not {kept.tolist()}")


def plots(scores: list[list[float]], held_out: Any, run: RunFolder) -> None:
    """Scores of the best against the others, accuracy by rank gap, calibration, and the training curves."""
    best = [
        s
        for row, ranks in zip(scores, held_out["ranks"], strict=True)
        for s, r in zip(row, ranks, strict=True)
        if r == 0
    ]
    rest = [
        s
        for row, ranks in zip(scores, held_out["ranks"], strict=True)
        for s, r in zip(row, ranks, strict=True)
        if r > 0
    ]

    def histogram(axes: Any) -> None:
        import numpy as np

        edges = np.linspace(min(best + rest), max(best + rest), 41)
        axes.hist(
            [best, rest], edges, label=["best ranked", "the others"], histtype="stepfilled", alpha=0.55, density=True
        )
        axes.set_xlabel("score of held-out answers")
        axes.set_ylabel("density")
        axes.legend(frameon=False)

    def reliability(axes: Any) -> None:
        predicted, observed, count = calibration(pairs_of(scores, held_out)[0])
        axes.plot([0.5, 1], [0.5, 1], "--", color="grey", label="perfect")
        axes.scatter(
            predicted, observed, s=20 + 300 * count / count.max(), alpha=0.7, label="held-out pairs (area: how many)"
        )
        axes.set_xlabel("model's confidence, sigmoid |r_1 - r_2|")
        axes.set_ylabel("share of pairs that it ranks right")
        axes.legend(frameon=False, loc="upper left")

    def by_gap(axes: Any) -> None:
        import numpy as np

        differences, gaps, _ = pairs_of(scores, held_out)
        found = np.unique(gaps)
        axes.bar(found, [(differences[gaps == g] > 0).mean() for g in found], width=0.6)
        axes.axhline(0.5, color="grey", linestyle="--")
        axes.set_xticks(found)
        axes.set_ylim(0, 1)
        axes.set_xlabel("difference of ranks")
        axes.set_ylabel("accuracy")

    run.plot("rewards", histogram)
    run.plot("calibration", reliability)
    run.plot("accuracy_by_rank_gap", by_gap)
    run.plot_curve("loss", "loss", "eval_loss")
    run.plot_curve("accuracy", "accuracy", "eval_accuracy")


def ranked_sample(scores: list[list[float]], held_out: Any, count: int = 20) -> str:
    """Some held-out prompts with their answers, from the highest score down, beside the rank that they should have."""
    lines = []
    for row, row_scores in zip(held_out.select(range(min(count, len(scores)))), scores, strict=False):
        lines.append(f"{row['prompt'][-1]['role']}: {row['prompt'][-1]['content']}")
        order = sorted(range(len(row_scores)), key=lambda k: -row_scores[k])
        lines += [f"  {row_scores[k]:+7.2f}  rank {row['ranks'][k]}  {row['completions'][k]!r}" for k in order]
    return "\n".join(lines) + "\n"


def main(config: Config, run: RunFolder) -> dict[str, float]:
    """Train the reward model; figures on held-out comparisons beside baselines that have learned nothing."""
    import math

    import numpy as np
    from datasets import concatenate_datasets
    from transformers import AutoModelForSequenceClassification

    from recipes.common.data import load_data
    from recipes.common.models import load_model, load_tokenizer
    from recipes.common.optimizers import muon_with_adamw, refuse_muon_on_shards
    from recipes.common.preflight import preflight
    from recipes.common.rlhf import check_own_pad_token, disable_dropout, keep_head_in_full_precision
    from recipes.common.training import fit

    if config.reward.optimizer == "muon":
        refuse_muon_on_shards(config.training)
    tokenizer = load_tokenizer(config.model, run, chat=True)
    check_own_pad_token(tokenizer)
    model = load_model(config.model, tokenizer, run, auto_class=AutoModelForSequenceClassification, num_labels=1)
    if not hasattr(model, "score"):
        raise UserError(
            f"model.name: {type(model).__name__} has no `score` head on its last token: give a decoder-only model"
        )
    if config.reward.language_coefficient and not model.config.tie_word_embeddings:
        raise UserError(
            "reward.language_coefficient: the output head of this model is not its word embeddings, and a "
            "sequence-classification model does not have it: use 0"
        )
    freeze(model, config.reward.frozen_layers)
    grow(model, config.reward.new_layers)
    keep_head_in_full_precision(model)
    disable_dropout(model)  # answers of one prompt are compared with each other: noise between them is not wanted

    data = load_data(config.data, "preference")
    rows, limit = data["train"], config.reward.max_length
    held_out_rows = data["validation"].select(range(min(len(data["validation"]), config.evaluation.max_samples)))
    held_out, sampled_held_out = comparisons(held_out_rows, tokenizer, limit, run), None
    if config.reward.candidates != "given" and not run.dry:
        both = config.reward.candidates == "both"
        asked = min(len(rows), config.reward.sampled_prompts)
        own = sample_candidates(rows.select(range(asked)), tokenizer, config, run, beside_given=both)
        others = [rows.skip(asked).select_columns(own.column_names)] if both and asked < len(rows) else []
        rows = concatenate_datasets([own, *others])
        own = sample_candidates(held_out_rows, tokenizer, config, run, beside_given=False)
        sampled_held_out = comparisons(own, tokenizer, limit, run)
    train = comparisons(rows, tokenizer, limit, run)

    args = config.training
    prompts_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(train) / prompts_a_step)
    batch = collate(
        list(train.select(range(min(len(train), args.per_device_train_batch_size)))), tokenizer.pad_token_id
    )
    preflight(run, model, batch, args=args, total_steps=steps)

    untrained = ranking_figures(score_all(model, held_out, tokenizer, config), held_out)
    length = length_baseline(train, held_out)
    trainer = make_trainer(model, tokenizer, train, held_out, config)
    if config.reward.optimizer == "muon":
        trainer.optimizer = muon_with_adamw(model, args, config.reward.muon_learning_rate)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    scores = score_all(model, held_out, tokenizer, config)
    figures = ranking_figures(scores, held_out)
    if sampled_held_out is not None:
        own_scores = score_all(model, sampled_held_out, tokenizer, config)
        figures["sampled_reward_accuracy"] = ranking_figures(own_scores, sampled_held_out)["accuracy"]

    # InstructGPT shifts scores so that good answers get 0 on average; dividing by the spread lets one KL coefficient
    # serve every reward model. Kept in config.json, for the head has no bias: (score - reward_mean) / reward_std.
    best = [
        s
        for row, ranks in zip(scores, held_out["ranks"], strict=True)
        for s, r in zip(row, ranks, strict=True)
        if r == 0
    ]
    model.config.reward_mean = float(np.mean(best))
    model.config.reward_std = float(np.std([s for row in scores for s in row]))
    save_and_reload(model, tokenizer, held_out, run)

    plots(scores, held_out, run)
    run.sample("ranked.txt", ranked_sample(scores, held_out))
    run.card(
        "The score of a conversation is `model(**inputs).logits`, read at its last token, the stop token. "
        "`recipes/alignment/ppo.py` uses (score - config.reward_mean) / config.reward_std: the best-ranked held-out "
        "answers get 0 on average, and all held-out answers have spread 1."
    )
    return {
        "reward_accuracy": figures.pop("accuracy"),
        "baseline_accuracy": max(0.5, untrained["accuracy"], length),
        "baseline_untrained_accuracy": untrained["accuracy"],
        "baseline_length_accuracy": length,
        "eval_loss": figures.pop("loss"),
        "baseline_loss": untrained["loss"],
        **figures,
        "reward_mean": model.config.reward_mean,
        "reward_std": model.config.reward_std,
    }


if __name__ == "__main__":
    run_recipe(main, Config)
