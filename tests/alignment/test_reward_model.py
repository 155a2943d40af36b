"""The reward model: where the score is read, the K-way batch, and the recipe end to end on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.alignment import reward_model
from recipes.common import preferences as figures_of
from recipes.common import rlhf
from recipes.common.generation import positions_of
from recipes.common.recipe import run_recipe
from recipes.common.shared_prompts import Rows, attention_mask


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
        "reward__likelihood_coefficient": 0,
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
            library = scorer(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, 0]
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
    with pytest.raises(UserError, match="with which an answer ends"):
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


def shared(rows):
    """What `collate` makes of rows: the shared rows, and the ranks and prompt of each answer, [N]."""
    batch = reward_model.collate(rows, fill=0)
    ranks = batch.pop("ranks")
    there = ranks >= 0
    return Rows(**batch), ranks[there], there.nonzero()[:, 0]


def states_of(model, rows):
    """Their last hidden states."""
    mask = attention_mask(rows, model.config)
    return model.model(rows.input_ids, mask, position_ids=rows.position_ids).last_hidden_state


def test_answer_logprobs_are_those_of_each_answer_alone(scorer):
    """Against a loop over the answers' tokens, with padding in the batch."""
    rows = [
        {"sequences": [[5, 9, 8, 1], [5, 9, 7, 7, 7, 1]], "ranks": [0, 1], "start": 2},
        {"sequences": [[6, 4, 1]], "ranks": [0], "start": 1},
    ]
    batch, _, _ = shared(rows)
    table = scorer.get_input_embeddings().weight
    with torch.no_grad():
        found = rlhf.answer_logprobs(scorer, states_of(scorer, batch), batch)
        assert found.shape == batch.mask.shape and found[batch.mask == 0].abs().sum() == 0
        expected = []
        for ids, start in (([5, 9, 8, 1], 2), ([5, 9, 7, 7, 7, 1], 2), ([6, 4, 1], 1)):
            logits = scorer.model(input_ids=torch.tensor([ids])).last_hidden_state[0] @ table.T
            expected += [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))]
    torch.testing.assert_close(found[batch.mask.bool()], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_score_adds_the_answers_log_likelihood_to_the_head_and_teaches_both(scorer, monkeypatch):
    rows, _, _ = shared([{"sequences": [[5, 9, 8, 1], [5, 7, 1]], "ranks": [0, 1], "start": 1}])
    states = states_of(scorer, rows)
    plain = rlhf.answer_scores(scorer, states, rows)  # [1, 2]
    likely = rlhf.answer_logprobs(scorer, states, rows)  # [1, 2, 3]
    monkeypatch.setattr(scorer.config, "reward_likelihood", 0.5, raising=False)
    found = rlhf.answer_scores(scorer, states, rows)
    torch.testing.assert_close(found, plain + 0.5 * likely.sum(dim=2))
    assert torch.equal(rlhf.answer_scores(scorer, states, rows, likely), found)
    so_far = rlhf.token_scores(scorer, states, rows)  # [1, 2, 3]
    head = rlhf.score_head(scorer, states.flatten(0, 1)[rows.at[0, 1, 0]])
    torch.testing.assert_close(so_far[0, 1, 0], head + 0.5 * likely[0, 1, 0])  # after the answer's first token
    assert torch.equal(so_far[0, [0, 1], [2, 1]], found[0])
    table = scorer.get_input_embeddings().weight.requires_grad_(True)
    gradients = torch.autograd.grad(found[0, 0] - found[0, 1], [table, scorer.score.weight])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.slow
def test_a_model_that_grew_is_trained_saved_and_loaded_by_the_library(tiny, preferences, tmp_path):
    from transformers import AutoModelForSequenceClassification

    more = {"reward__new_layers": 1, "reward__frozen_layers": 1, "reward__optimizer": "muon"}
    more["reward__language_coefficient"], more["reward__likelihood_coefficient"] = 1.0, 0.3
    assert run(tiny, preferences, tmp_path, **more) == 0
    saved = tmp_path / "reward_model" / "default"
    model = AutoModelForSequenceClassification.from_pretrained(saved / "model")
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    assert model.config.num_hidden_layers == base.config.num_hidden_layers + 1
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    figures = json.loads((saved / "metrics.json").read_text())
    assert figures["eval_loss"] < figures["baseline_loss"]


# ---------------------------------------------------------------- candidates


def test_the_models_own_mistakes_join_the_given_answers_or_stand_alone_below_the_best(tiny, monkeypatch, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainingArguments

    from recipes.common import own_answers
    from recipes.common.errors import UserError
    from recipes.common.run_folder import RunFolder
    from recipes.common.sections import Data, Evaluation, Model, Run

    given = {"task": "echo", "answer": "k", "completions": ["k", "f"], "ranks": [0, 2]}
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Is it {n}?"}], **given} for n in range(2)])
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    config = reward_model.Config(Model(name=str(tiny)), Data(), reward_model.Reward(), arguments, Evaluation(), Run())
    run_folder, tokenizer = RunFolder(tmp_path / "run", recipe="reward_model"), AutoTokenizer.from_pretrained(tiny)

    def written(answers):  # "..." was cut
        return [
            [own_answers.Answer(text.removesuffix("..."), not text.endswith("...")) for text in some]
            for some in answers
        ]

    def made(answers, *, beside_given):
        monkeypatch.setattr(own_answers, "sample_answers", lambda *_, **__: written(answers))
        found = reward_model.sample_candidates(rows, tokenizer, config, run_folder, beside_given=beside_given)
        return [(row["completions"], row["ranks"]) for row in found]

    answers = [["c", "k", "c", "", "q", "f..."], ["k", "k"]]  # twice, right, empty, cut; and all right
    assert made(answers, beside_given=False) == [(["k", "c", "q"], [0, 1, 1])]
    assert made(answers, beside_given=True) == [(["k", "f", "c", "q"], [0, 2, 1, 1]), (["k", "f"], [0, 2])]
    with pytest.raises(UserError, match="answered every sampled prompt right"):
        made([["k"], ["k"]], beside_given=True)


# ---------------------------------------------------------------- the K-way batch


def test_one_forward_an_answer_gives_the_mean_of_the_pairwise_losses_and_gradients(scorer):
    """All K answers in one batch element against what a pairs-only trainer would do: C(K,2) forwards of two."""
    rows = [
        {"sequences": [[5, 9, 1], [5, 8, 8, 1], [5, 7, 1], [5, 6, 1]], "ranks": [0, 1, 1, 2], "start": 1},
        {"sequences": [[6, 9, 9, 9, 1], [6, 8, 1]], "ranks": [0, 1], "start": 1},
    ]
    batch, ranks, group = shared(rows)
    assert batch.input_ids.numel() == 17 and group.tolist() == [0, 0, 0, 0, 1, 1]
    scores = rlhf.answer_scores(scorer, states_of(scorer, batch), batch)  # [2, 4]
    loss = rlhf.ranking_loss(scores[batch.mask.any(dim=2)], ranks, group)
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
    assert forwards == 12 and len(ranks) == 6


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
    assert figures["reward_accuracy"] > 0.9 > max(figures[f"baseline_{n}_accuracy"] for n in ("untrained", "length"))
    assert figures["baseline_words_accuracy"] == 1  # in this language one word tells all
    assert figures["eval_loss"] < figures["baseline_loss"] == pytest.approx(math.log(2), abs=0.1)
    told = [figures[f"baseline_{name}_accuracy"] for name in ("untrained", "length", "words")]
    assert figures["baseline_accuracy"] == max(0.5, *told)
    assert figures["label_length_correlation"] == 0  # all answers are of one length
    for plot in ("rewards", "calibration", "accuracy_by_rank_gap", "accuracy_by_margin", "loss", "accuracy"):
        assert (trained / "plots" / f"{plot}.png").stat().st_size > 5_000


def test_scores_are_shown_after_each_token_and_end_at_the_answers_own(trained):
    shown = (trained / "samples" / "per_token.txt").read_text().split("\n\n")
    ranked = (trained / "samples" / "ranked.txt").read_text().splitlines()
    assert len(shown) == 8
    for block in shown:
        lines = block.strip().splitlines()
        answers = ranked[ranked.index(lines[0]) + 1 :]
        assert lines[0].startswith("user: ") and lines[1].startswith("  rank ")
        best = lines[2 : next(i for i in range(2, len(lines)) if lines[i].startswith("  rank"))]
        assert [line.split()[1] for line in best] == [repr(answers[0].split("'")[1]), "'<|end|>'"]
        assert best[-1].split()[0] == answers[0].split()[0]  # the score that is trained, and ranked by


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


def test_stock_pipeline_serves_the_score(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    served = pipeline("text-classification", model=str(trained / "model"), device="cpu", function_to_apply="none")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    messages = [{"role": "user", "content": "Is it 3?"}, {"role": "assistant", "content": "k"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert served(text)[0]["score"] == pytest.approx(model(**ids).logits.item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [0.0, 0.3])
def test_demonstrations_score_zero_on_average(tiny, preferences, tmp_path, likelihood):
    """The head's own mean and spread are kept beside those of the score, which may hold the answer's likelihood."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = []
    for n in range(40):
        turns = [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": ("c", "q")[n % 2]}]
        rows.append({"messages": turns})
    shown = tmp_path / "shown.jsonl"
    shown.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"demonstrations__name": shown, "demonstrations__validation_fraction": 0.5, "training__max_steps": 4}
    more["reward__likelihood_coefficient"] = likelihood
    assert run(tiny, preferences, tmp_path, **more) == 0
    saved = tmp_path / "reward_model" / "default" / "model"
    model, tokenizer = (c.from_pretrained(saved) for c in (AutoModelForSequenceClassification, AutoTokenizer))

    from recipes.common.data import load_data
    from recipes.common.sections import Data

    held_out = load_data(Data(name=str(shown), validation_fraction=0.5), "conversation")["validation"]["messages"]
    scores = [
        model(**tokenizer.apply_chat_template(m, return_tensors="pt", return_dict=True)).logits.item() for m in held_out
    ]
    assert len(scores) > 5 and model.config.reward_head_mean == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert (model.config.reward_mean == model.config.reward_head_mean) == (likelihood == 0)
    figures = json.loads((saved.parent / "metrics.json").read_text())
    card = (saved.parent / "README.md").read_text()
    assert ("head_accuracy" in figures) == ("The head alone ranks" in card) == (likelihood > 0)


def test_balanced_weights_leave_nothing_to_gain_from_length():
    """The derivative of the weighted loss along "score = length" is 0, the mean weight 1, and the K answers' loss agrees."""
    import random

    from datasets import Dataset

    rng, rows = random.Random(0), []
    for _ in range(200):
        k = rng.randint(2, 4)
        lengths = sorted((rng.randint(2, 12) for _ in range(k)), reverse=True)
        if rng.random() < 0.25:
            lengths.reverse()
        rows.append({"sequences": [[1] * n for n in lengths], "ranks": list(range(k)), "start": 1})
    data = Dataset.from_list(rows)
    tilt, scale = figures_of.length_balance(data)
    assert tilt > 0.05  # the longer one wins mostly: such pairs weigh less

    batch, ranks, group = shared(rows)
    lengths = batch.mask.sum(dim=2)[batch.mask.any(dim=2)]
    weights = scale * torch.exp(-tilt * (lengths[:, None] - lengths[None, :]))
    slope = torch.zeros((), requires_grad=True)
    for pair_weights, expected in ((weights, 0.0), (None, -0.5)):
        loss = rlhf.ranking_loss(slope * lengths, ranks, group, weights=pair_weights)
        (gradient,) = torch.autograd.grad(loss, slope)
        assert gradient.item() == pytest.approx(expected, abs=1e-4) if expected == 0 else gradient.item() < expected
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    weighted = rlhf.ranking_loss(0.0 * lengths, ranks, group, weights=weights)
    assert weighted.item() == pytest.approx(math.log(2), abs=1e-4)  # mean weight 1


@pytest.fixture(scope="module")
def long_winded(tmp_path_factory) -> Path:
    """Pairs where "k" wins over "q" four times in five, and so does the longer one; held out, length tells nothing."""
    import random

    rng, folder = random.Random(0), tmp_path_factory.mktemp("long_winded")
    for split, longer_wins in (("train", 0.8), ("validation", 0.5)):
        rows = []
        for n in range(320):
            lengths = sorted(rng.sample(range(8), 2), reverse=True)
            words = ["k", "q"] if rng.random() < 0.8 else ["q", "k"]
            if rng.random() > longer_wins:
                lengths.reverse()
            completions = [word + " f" * length for word, length in zip(words, lengths, strict=True)]
            prompt = [{"role": "user", "content": f"Is it {n}{'?' if split == 'train' else '!'}"}]
            rows.append({"prompt": prompt, "completions": completions, "ranks": [0, 1]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_balanced_pairs_lower_the_length_bias_and_raise_accuracy_where_length_tells_nothing(
    tiny, long_winded, tmp_path
):
    told = {}
    for balance in ("false", "true"):
        assert run(tiny, long_winded, tmp_path / balance, reward__balance_lengths=balance) == 0
        told[balance] = json.loads((tmp_path / balance / "reward_model" / "default" / "metrics.json").read_text())
    biased, balanced = told["false"], told["true"]
    assert abs(biased["label_length_correlation"]) < 0.15 and biased["length_correlation"] > 0.4
    assert abs(balanced["length_correlation"]) < 0.5 * biased["length_correlation"]
    assert balanced["reward_accuracy"] > biased["reward_accuracy"]


@pytest.mark.parametrize("likelihood", [0.0, 0.7])
def test_the_trainers_loss_is_the_sum_of_what_the_config_asks_for(tiny, likelihood):
    """With a likelihood in the score the head is taught by itself too: it is what the stock class serves."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

    from recipes.common.sections import Data, Evaluation, Model, Run

    rows = [
        {"sequences": [[5, 9, 1], [5, 8, 8, 1], [5, 7, 1]], "ranks": [0, 1, 2], "start": 1, "length": 4},
        {"sequences": [[6, 9, 9, 9, 1], [6, 8, 1]], "ranks": [0, 1], "start": 1, "length": 5},
    ]
    knobs = reward_model.Reward(
        margin=0.5, centering_coefficient=0.1, balance_lengths=True, language_coefficient=0.3,
        likelihood_coefficient=likelihood,
    )  # fmt: skip
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    config = reward_model.Config(Model(), Data(), knobs, arguments, Evaluation(), Run())
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.config.reward_likelihood = likelihood
    data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(tiny)
    trainer = reward_model.make_trainer(model, tokenizer, data, data, config)
    batch = reward_model.collate(rows, fill=0)
    found = trainer.compute_loss(model, batch)

    ids, mask = rlhf.pad([sequence for row in rows for sequence in row["sequences"]], 0, "right")  # a row an answer
    head = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    told, ranks, group = shared(rows)
    logprobs = rlhf.answer_logprobs(model, states_of(model, told), told)  # [2, 3, R]
    scores = head + likelihood * logprobs.sum(dim=2)[told.mask.any(dim=2)]
    tilt, scale = figures_of.length_balance(data)
    lengths = torch.tensor([3.0, 4, 3, 5, 3])
    weights = scale * torch.exp(-tilt * (lengths[:, None] - lengths[None, :]))
    expected = rlhf.ranking_loss(scores, ranks, group, 0.5, weights)
    expected = expected + 0.1 * rlhf.centering_loss(scores, ranks, group)
    if likelihood:
        expected = expected + rlhf.ranking_loss(head, ranks, group, 0.5, weights)
    language = -logprobs[[0, 1], 0][told.mask[[0, 1], 0].bool()].mean()  # of the best answers, which come first here
    expected = expected + 0.3 * language
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    right = [scores[i] > scores[j] for i, j in ((0, 1), (0, 2), (1, 2), (3, 4))]
    (accuracy,) = trainer.accuracies  # what the next line of the log will say
    assert accuracy.item() == pytest.approx(sum(right).item() / 4)


def test_scores_are_read_without_dropout_and_training_goes_on_with_it(tiny):
    from types import SimpleNamespace

    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, attention_dropout=0.5).train()
    rows = [
        {"sequences": [[5, 9, 1], [5, 8, 8, 1], [5, 7, 1]], "ranks": [0, 1, 2], "start": 1, "length": 4},
        {"sequences": [[6, 9, 9, 9, 1], [6, 8, 1]], "ranks": [0, 1], "start": 1, "length": 5},
    ]
    config = SimpleNamespace(evaluation=SimpleNamespace(batch_size=6), training=SimpleNamespace(bf16=False))
    found = reward_model.score_all(model, Dataset.from_list(rows), SimpleNamespace(pad_token_id=0), config)
    assert model.training
    model.eval()
    with torch.no_grad():
        alone = [[model(torch.tensor([ids])).logits.item() for ids in row["sequences"]] for row in rows]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_batch_holds_rows_of_like_length_in_an_order_that_the_epoch_decides(tiny):
    import random

    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

    from recipes.common.sections import Data, Evaluation, Model, Run

    rng = random.Random(0)
    rows = [
        {"sequences": [[5] * n, [5, 1]], "ranks": [0, 1], "start": 1, "length": n}
        for n in (rng.randint(2, 50) for _ in range(400))
    ]
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", per_device_train_batch_size=8)
    config = reward_model.Config(Model(), Data(), reward_model.Reward(), arguments, Evaluation(), Run())
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    data = Dataset.from_list(rows)
    trainer = reward_model.make_trainer(model, AutoTokenizer.from_pretrained(tiny), data, data, config)
    orders = []
    for epoch in (0, 0, 1):
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(400))
    lengths = [rows[i]["length"] for i in orders[2]]
    spread = [max(some) - min(some) for some in (lengths[at : at + 8] for at in range(0, 400, 8))]
    assert sum(spread) / len(spread) < 5  # of 48; batches in no order would spread over 38


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


def test_answers_that_are_the_same_tokens_are_refused_by_row_or_skipped(tiny, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    from recipes.common.errors import UserError
    from recipes.common.run_folder import RunFolder

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ask = [{"role": "user", "content": "Is it?"}]
    rows = Dataset.from_list(
        [
            {"prompt": ask, "completions": ["k", "c"], "ranks": [0, 1]},
            {"prompt": ask, "completions": ["k", "c", "k"], "ranks": [0, 1, 1]},
        ]
    )
    told = RunFolder(tmp_path, recipe="reward_model")
    with pytest.raises(UserError, match=r"row 2.*same tokens"):
        reward_model.comparisons(rows, tokenizer, 64, told)
    assert len(reward_model.comparisons(rows, tokenizer, 64, told, skip=True)) == 1


def test_answers_beyond_the_models_positions_are_left_out(tiny, preferences, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    prompt = [{"role": "user", "content": "Is it 5?"}]
    long = {"prompt": prompt, "completions": ["k " * 200, "c"], "ranks": [0, 1]}
    path.write_text(preferences.read_text() + json.dumps(long) + "\n")
    assert run(tiny, path, tmp_path, training__max_steps=1) == 0
    assert "longer than 128 tokens" in capsys.readouterr().out  # reward.max_length is 256


def saved_as(folder: Path, tiny: Path, config: object) -> Path:
    """A model of this config and the size of the tiny tokenizer, saved with that tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = ("pad_token_id", tokenizer.pad_token_id), ("eos_token_id", tokenizer.eos_token_id), ("bos_token_id", None)
    for name, value in (("vocab_size", len(tokenizer)), *ids):
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_of_learned_positions_trains_and_is_saved(tiny, preferences, tmp_path):
    """GPT-2 counts positions from a row's first column, padding or not, unless it is told where its tokens stand."""
    from transformers import GPT2Config

    gpt2 = saved_as(tmp_path / "gpt2", tiny, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128))
    assert run(gpt2, preferences, tmp_path, training__max_steps=2) == 0


def test_a_window_shorter_than_a_prompt_with_its_answers_is_refused(tiny, preferences, tmp_path, capsys):
    from transformers import MistralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MistralConfig(**sizes, num_key_value_heads=2, max_position_embeddings=128, sliding_window=8)
    mistral = saved_as(tmp_path / "mistral", tiny, config)
    assert run(mistral, preferences, tmp_path) == 2
    error = capsys.readouterr().err
    assert "look back 8 tokens" in error and "Traceback" not in error


def test_a_model_without_a_pad_token_of_its_own_is_refused(tiny, preferences, tmp_path, capsys):
    """Its stop token would fill the batch, and `from_pretrained` would read the score before it."""
    import shutil

    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(other)
    assert AutoTokenizer.from_pretrained(other).pad_token is None
    assert run(other, preferences, tmp_path) == 2
    error = capsys.readouterr().err
    assert "with which an answer ends" in error and "model.tokenizer" in error and "Traceback" not in error


@pytest.mark.parametrize("more", [{"training__label_smoothing_factor": 0.1}, {"training__data_seed": 1}])
def test_keys_that_only_the_librarys_own_loss_and_order_read_are_refused(more, tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, **more) == 2
    (key,) = more
    error = capsys.readouterr().err
    assert f"{key.replace('__', '.')}: " in error and "has no say here" in error and "Traceback" not in error


@pytest.mark.parametrize("coefficient", ["language", "likelihood"])
def test_a_head_that_caps_its_logits_has_no_likelihood_to_give(coefficient, tiny, preferences, tmp_path, capsys):
    from transformers import Gemma2Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
    gemma = saved_as(tmp_path / "gemma", tiny, config)
    assert run(gemma, preferences, tmp_path, **{f"reward__{coefficient}_coefficient": 0.1}) == 2
    error = capsys.readouterr().err
    assert f"reward.{coefficient}_coefficient" in error and "scales or caps" in error and "Traceback" not in error


def test_a_limit_that_leaves_nothing_is_refused(tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, reward__max_length=2) == 2
    assert "reward.max_length" in capsys.readouterr().err


def test_dry_run_trains_nothing(tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, "--dry-run") == 0
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "reward_model").exists()
