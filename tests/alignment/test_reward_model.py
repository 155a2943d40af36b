"""The reward model: where the score is read, the K-way batch, and the recipe end to end on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.alignment import reward_model
from recipes.common import rlhf
from recipes.common.recipe import run_recipe


def run(tiny: Path, data: Path, root: Path, *flags: str, **more: object) -> int:
    """The recipe's exit code; `reward__max_length=2` stands for `--reward.max_length 2`."""
    given = {
        "model__name": tiny,
        "data__name": data,
        "data__validation_fraction": 0.25,
        "training__max_steps": 30,
        "training__per_device_train_batch_size": 16,
        "training__learning_rate": 3e-3,
        "training__bf16": "false",
        "reward__new_layers": 0,
        "reward__frozen_layers": 0,
        "reward__language_coefficient": 0,
        "reward__optimizer": "adamw",
        "run__root": root,
        "run__threads": 1,
        **more,
    }
    argv = [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    return run_recipe(reward_model.main, reward_model.Config, [*argv, *flags])


@pytest.fixture(scope="module")
def scorer(tiny):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()


# ---------------------------------------------------------------- where the score is read


def test_score_is_read_at_the_last_real_token_whatever_the_padding(scorer):
    sequences = [[5, 9, 8, 1], [7, 1], [6, 11, 12, 13, 14, 1]]
    with torch.no_grad():
        alone = torch.cat([scorer(input_ids=torch.tensor([s])).logits[:, 0] for s in sequences])
        for side in ("left", "right"):
            ids, mask = rlhf.pad(sequences, 0, side)
            assert ids.shape == (3, 6) and mask.sum(1).tolist() == [4, 2, 6]
            torch.testing.assert_close(rlhf.sequence_scores(scorer, ids, mask), alone, atol=1e-6, rtol=1e-5)
            library = scorer(input_ids=ids, attention_mask=mask, position_ids=rlhf.positions(mask)).logits[:, 0]
            torch.testing.assert_close(library, alone, atol=1e-6, rtol=1e-5)  # what a stock from_pretrained serves


def test_the_stop_token_is_what_is_scored_and_what_lies_on_padding_is_not(scorer):
    ids, mask = rlhf.pad([[5, 9, 8, 1], [7, 1]], 0, "right")
    with torch.no_grad():
        scores = rlhf.sequence_scores(scorer, ids, mask)
        other = ids.clone()
        other[1, 2:] = torch.tensor([33, 44])  # rubbish on padding
        assert torch.equal(rlhf.sequence_scores(scorer, other, mask), scores)
        other = ids.clone()
        other[0, 3] = 2  # another last token: another score
        changed = rlhf.sequence_scores(scorer, other, mask)
        assert changed[0] != scores[0] and changed[1] == scores[1]


def test_a_tokenizer_that_pads_with_its_stop_token_is_refused(tiny):
    from transformers import AutoTokenizer

    from recipes.common.errors import UserError

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rlhf.check_own_pad_token(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="stop token"):
        rlhf.check_own_pad_token(tokenizer)


# ---------------------------------------------------------------- layers on top


def test_fresh_layers_are_no_copies_and_frozen_ones_stay(tiny):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    own = len(model.model.layers)
    reward_model.freeze(model, 1)
    reward_model.grow(model, 2)
    assert model.config.num_hidden_layers == len(model.model.layers) == own + 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(own + 2))
    old, fresh, other = (model.model.layers[i].mlp.up_proj.weight for i in (own - 1, own, own + 1))
    assert not torch.equal(old, fresh) and not torch.equal(fresh, other)
    torch.testing.assert_close(fresh.std().item(), model.config.initializer_range, atol=0.002, rtol=0)
    assert torch.equal(model.model.layers[own].input_layernorm.weight, torch.ones_like(model.model.norm.weight))

    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.tensor([[5, 9, 8, 1]])).logits.sum().backward()
    optimizer.step()
    unchanged = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged == {name for name in before if name.startswith("model.layers.0.")}

    reward_model.freeze(model, len(model.model.layers))
    reward_model.grow(model, 1)
    assert {p.requires_grad for p in model.model.layers[-1].parameters()} == {True}
    assert {p.requires_grad for layer in model.model.layers[:-1] for p in layer.parameters()} == {False}


def test_more_layers_frozen_than_there_are_is_refused(tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, reward__frozen_layers=99) == 2
    assert "reward.frozen_layers" in capsys.readouterr().err


def test_language_loss_is_that_of_the_best_answers_tokens_alone(scorer):
    """Against a loop over the answer's tokens, with padding and worse answers in the batch."""
    rows = [
        {"sequences": [[5, 9, 8, 1], [5, 9, 7, 7, 7, 1]], "ranks": [0, 1], "start": 2},
        {"sequences": [[6, 4, 1]], "ranks": [0], "start": 1},
    ]
    batch = reward_model.collate(rows, fill=0)
    table = scorer.get_input_embeddings().weight
    with torch.no_grad():
        hidden = scorer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        found = reward_model.language_loss(hidden, batch, table)
        losses = []
        for ids, start in (([5, 9, 8, 1], 2), ([6, 4, 1], 1)):
            logits = scorer.model(input_ids=torch.tensor([ids])).last_hidden_state[0] @ table.T
            losses += [-logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))]
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_a_model_that_grew_is_trained_saved_and_loaded_by_the_library(tiny, preferences, tmp_path):
    from transformers import AutoModelForSequenceClassification

    more = {"reward__new_layers": 1, "reward__frozen_layers": 1, "reward__optimizer": "muon"}
    more["reward__language_coefficient"] = 1.0
    assert run(tiny, preferences, tmp_path, **more) == 0
    saved = tmp_path / "reward_model" / "default"
    model = AutoModelForSequenceClassification.from_pretrained(saved / "model")
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    assert model.config.num_hidden_layers == base.config.num_hidden_layers + 1
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    figures = json.loads((saved / "metrics.json").read_text())
    assert figures["eval_loss"] < figures["baseline_loss"]


# ---------------------------------------------------------------- the K-way batch


def test_one_forward_an_answer_gives_the_mean_of_the_pairwise_losses_and_gradients(scorer):
    """All K answers in one batch element against what a pairs-only trainer would do: C(K,2) forwards of two."""
    rows = [
        {"sequences": [[5, 9, 1], [5, 8, 8, 1], [5, 7, 1], [5, 6, 1]], "ranks": [0, 1, 1, 2], "start": 1},
        {"sequences": [[6, 9, 9, 9, 1], [6, 8, 1]], "ranks": [0, 1], "start": 1},
    ]
    batch = reward_model.collate(rows, fill=0)
    assert batch["input_ids"].shape == (6, 5) and batch["group"].tolist() == [0, 0, 0, 0, 1, 1]
    scores = scorer(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    loss = rlhf.ranking_loss(scores, batch["ranks"], batch["group"])
    (gradient,) = torch.autograd.grad(loss, scorer.score.weight)

    prompts, forwards = [], 0
    for row in rows:
        pairs = []
        for i, better in enumerate(row["sequences"]):
            for j, worse in enumerate(row["sequences"]):
                if row["ranks"][i] < row["ranks"][j]:
                    high, low = (scorer(input_ids=torch.tensor([s])).logits[0, 0] for s in (better, worse))
                    forwards += 2
                    pairs.append(-torch.nn.functional.logsigmoid(high - low))
        prompts.append(torch.stack(pairs).mean())
    pairwise = torch.stack(prompts).mean()
    (slow_gradient,) = torch.autograd.grad(pairwise, scorer.score.weight)
    torch.testing.assert_close(loss, pairwise, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, slow_gradient, atol=1e-6, rtol=1e-4)
    assert forwards == 12 and len(batch["input_ids"]) == 6


def test_figures_on_hand_numbers():
    data = {"ranks": [[0, 1, 1], [0, 1, 2]], "sequences": [[[1] * 5, [1], [1]], [[1], [1] * 2, [1] * 3]]}
    scores = [[2.0, 1.0, 3.0], [5.0, 5.0, 0.0]]
    # prompt 1: 2 > 1 right, 2 > 3 wrong; prompt 2: 5 = 5 half, 5 > 0 right (gap 2), 5 > 0 right (gap 1)
    figures = reward_model.ranking_figures(scores, data)
    assert figures["accuracy"] == pytest.approx(3.5 / 5)
    assert figures["accuracy_gap_1"] == pytest.approx(2.5 / 4) and figures["accuracy_gap_2"] == 1
    first = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    second = (math.log(2) + 2 * math.log1p(math.exp(-5))) / 3
    assert figures["loss"] == pytest.approx((first + second) / 2)


def test_length_baseline_takes_the_direction_that_training_shows():
    from datasets import Dataset

    short_wins = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1], [1, 1]]}] * 4)
    long_wins = Dataset.from_list([{"ranks": [0, 1], "sequences": [[1, 1], [1]]}] * 4)
    assert reward_model.length_baseline(short_wins, short_wins) == 1
    assert reward_model.length_baseline(long_wins, long_wins) == 1
    assert reward_model.length_baseline(short_wins, long_wins) == 0


def test_a_perfectly_calibrated_model_has_no_calibration_error():
    import numpy as np

    rng = np.random.default_rng(0)
    margin = np.abs(rng.normal(0, 2, 100_000))
    right = rng.random(100_000) < 1 / (1 + np.exp(-margin))
    predicted, observed, count = reward_model.calibration(np.where(right, margin, -margin))
    assert (np.abs(predicted - observed) < 0.02).all() and count.sum() == 100_000
    predicted, observed, _ = reward_model.calibration(np.full(10, 3.0))  # always right, at 95 % confidence
    assert observed.tolist() == [1.0] and predicted.tolist() == [pytest.approx(1 / (1 + math.exp(-3)))]


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tiny, preferences, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert run(tiny, preferences, root) == 0
    return root / "reward_model" / "default"


def test_it_learns_the_order_and_says_so_beside_baselines(trained):
    figures = json.loads((trained / "metrics.json").read_text())
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in history if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert figures["reward_accuracy"] > 0.9 > figures["baseline_accuracy"] >= 0.5
    assert figures["eval_loss"] < figures["baseline_loss"] == pytest.approx(math.log(2), abs=0.1)
    for plot in ("rewards", "calibration", "accuracy_by_rank_gap", "loss", "accuracy"):
        assert (trained / "plots" / f"{plot}.png").stat().st_size > 5_000


def test_what_is_saved_scores_the_same_with_the_stock_class_and_is_centred(trained, preferences):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert model.config.num_labels == 1 and not list(trained.glob("model/*.bin"))
    scores = {}
    for word in ("k", "c", "q"):
        messages = [{"role": "user", "content": "Is it 3?"}, {"role": "assistant", "content": word}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        scores[word] = (model(**ids).logits.item() - model.config.reward_mean) / model.config.reward_std
    assert scores["k"] > scores["c"] > scores["q"]
    assert abs(scores["k"]) < 0.7  # best-ranked answers are around 0


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(trained, tiny, preferences, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from recipes.common import training

    stop_after = {"steps": 13}

    def asked(self):
        stop_after["steps"] -= 1
        self.reason = "test" if stop_after["steps"] < 0 else None
        return self.reason is not None

    monkeypatch.setattr(training.StopSignals, "asked", asked)
    assert run(tiny, preferences, tmp_path) == 130
    monkeypatch.undo()
    assert run(tiny, preferences, tmp_path, run__resume="true") == 0
    ours, whole = (
        load_file(p / "model" / "model.safetensors") for p in (tmp_path / "reward_model" / "default", trained)
    )
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completions": ["yes"], "ranks": [0]}, "completion"),
        ({"completions": ["yes", "no"], "ranks": [0, 0]}, "tied"),
        ({"completions": ["yes", ""], "ranks": [0, 1]}, "empty"),
        ({"chosen": "yes", "rejected": "yes"}, "equals"),
    ],
)
def test_rows_with_nothing_to_compare_are_refused_by_line(row, said, tiny, preferences, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    good = preferences.read_text().splitlines()[:3]
    path.write_text("\n".join([*good, json.dumps({"prompt": [{"role": "user", "content": "Is it?"}], **row})]) + "\n")
    assert run(tiny, path, tmp_path) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl" in error and "4" in error and said in error.lower() and "Traceback" not in error


def test_a_limit_that_leaves_nothing_is_refused(tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, reward__max_length=2) == 2
    assert "reward.max_length" in capsys.readouterr().err


def test_dry_run_trains_nothing(tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, "--dry-run") == 0
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "reward_model").exists()
