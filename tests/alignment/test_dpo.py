"""DPO: its loss against the paper's formula, pairs as trl makes them, and the recipe end to end on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recipes.alignment import dpo
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run


def arguments(tiny: Path, data: Path, root: Path, **more: object) -> list[str]:
    """A command line; `training__beta=0.5` stands for `--training.beta 0.5`."""
    given = {
        "model__name": tiny,
        "data__name": data,
        "dpo__candidates": "given",
        "dpo__pairs_per_prompt": 2,
        "training__max_steps": 20,
        "training__learning_rate": 5e-3,
        "training__warmup_steps": 0,
        "training__per_device_train_batch_size": 16,
        "training__save_steps": 10,
        "training__bf16": "false",
        "training__loss_type": "[sigmoid]",  # the paper's; cpu.yaml adds another
        "training__loss_weights": "null",
        "evaluation__max_samples": 16,
        "evaluation__max_new_tokens": 4,
        "run__root": root,
        "run__threads": 1,
        **more,
    }
    return [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def run(*given: object, **more: object) -> int:
    return run_recipe(dpo.main, dpo.Config, arguments(*given, **more))  # type: ignore[arg-type]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Setup:
    """The recipe's pieces, put together by hand in fp32."""

    def __init__(self, tiny: Path, folder: Path, moved: bool = False, lora: Any = None, **training: Any):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig

        fixed = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "beta": 0.3}
        args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=6, **{**fixed, **training})
        self.config = dpo.Config(
            Model(str(tiny)), Data(), dpo.DPO(samples=4), args, Evaluation(batch_size=4, max_new_tokens=4), Run(), lora
        )
        self.tokenizer = AutoTokenizer.from_pretrained(tiny)
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
        self.reference.requires_grad_(False)
        self.run = RunFolder(folder, recipe="dpo", dry=True)
        rows = [
            {
                "prompt": [{"role": "user", "content": "?" * (1 + n)}],
                "completions": ["k", "cq" * n or "c"],
                "ranks": [0, 1],
            }
            for n in range(6)
        ]
        self.pairs = dpo.encode(dpo.pairs_of(rows, None, 0), self.tokenizer, self.policy, self.config, self.run)
        self.trainer = dpo.make_trainer(
            self.policy, None if lora else self.reference, self.tokenizer, self.pairs, self.pairs, self.config
        )
        if moved:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)

    def batch(self) -> Any:
        return self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(6)])

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.trainer.model, self.batch())

    def log_ratios(self) -> torch.Tensor:
        """log pi / pi_ref of chosen and rejected, each sequence on its own: [N, 2]."""

        def of(model: Any, pair: Any, side: str) -> torch.Tensor:
            ids, start = torch.tensor([pair["prompt_ids"] + pair[side]]), len(pair["prompt_ids"])
            logprobs = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
            return logprobs.gather(-1, ids[0, start:, None]).sum()

        sides = ("chosen_ids", "rejected_ids")
        return torch.stack(
            [torch.stack([of(self.policy, p, s) - of(self.reference, p, s) for s in sides]) for p in self.pairs]
        )


# ---------------------------------------------------------------- pairs


def test_every_untied_pair_of_k_ranked_answers_the_better_first():
    row = {"prompt": "x", "completions": ["a", "b", "c", "d"], "ranks": [0, 1, 1, 2]}
    pairs = dpo.pairs_of([row], None, 0)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    some = [dpo.pairs_of([row] * 50, 2, seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and len(some[0]) == 100
    assert {(p["chosen"], p["rejected"]) for p in some[0]} == {(p["chosen"], p["rejected"]) for p in pairs}


def test_pairs_are_encoded_as_trl_does(tiny, tmp_path):
    from datasets import Dataset
    from trl import DPOTrainer

    setup = Setup(tiny, tmp_path)
    rows = [
        {"prompt": p["prompt"], **{s: [{"role": "assistant", "content": p[s]}] for s in ("chosen", "rejected")}}
        for p in setup.pairs
    ]
    args = setup.config.training
    theirs = DPOTrainer._prepare_dataset(setup.trainer, Dataset.from_list(rows), setup.tokenizer, args, "train")
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert theirs[name] == [pair[name] for pair in setup.pairs]
    assert all(pair["chosen_ids"][-1] == setup.tokenizer.eos_token_id for pair in setup.pairs)


def test_pairs_that_are_too_long_are_left_out_not_cut(tiny, tmp_path):
    setup = Setup(tiny, tmp_path)
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in setup.pairs]
    setup.config.training.max_length = sorted(lengths)[2]
    kept = dpo.encode(setup.pairs, setup.tokenizer, setup.policy, setup.config, setup.run)
    assert [p["row"] for p in kept] == [
        p["row"] for p, n in zip(setup.pairs, lengths, strict=True) if n <= sorted(lengths)[2]
    ]
    setup.config.training.max_length = 3
    with pytest.raises(UserError, match="every one of 6 pairs is longer than 3 tokens"):
        dpo.encode(setup.pairs, setup.tokenizer, setup.policy, setup.config, setup.run)


def test_answers_that_the_template_makes_one_are_refused_with_their_row(tiny, tmp_path):
    setup = Setup(tiny, tmp_path)
    setup.tokenizer.chat_template = setup.tokenizer.chat_template.replace("{{- content", "{{- content|trim")
    pair = {"row": 7, "prompt": [{"role": "user", "content": "Is it?"}], "chosen": "k", "rejected": "k ", "ended": True}
    with pytest.raises(UserError, match=r"row 7 \('Is it\?'\): chosen equals rejected"):
        dpo.encode([*setup.pairs, pair], setup.tokenizer, setup.policy, setup.config, setup.run)


# ---------------------------------------------------------------- the loss


def test_the_first_loss_is_log_2_and_has_a_gradient(tiny, tmp_path):
    setup = Setup(tiny, tmp_path)
    loss = setup.loss()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert sum(p.grad.abs().sum() for p in setup.policy.parameters()) > 0
    assert all(p.grad is None for p in setup.reference.parameters())


def test_the_loss_is_the_papers(tiny, tmp_path):
    setup = Setup(tiny, tmp_path, moved=True)
    margin = setup.log_ratios() @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(setup.loss(), -F.logsigmoid(0.3 * margin).mean(), atol=1e-5, rtol=1e-4)


def test_ipo_and_smoothing_come_by_trls_own_keys(tiny, tmp_path):
    setup = Setup(tiny, tmp_path, moved=True, loss_type=["ipo"])
    ratios = setup.log_ratios()
    lengths = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in setup.pairs])
    margin = (ratios / lengths) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(setup.loss(), ((margin - 1 / 0.6) ** 2).mean(), atol=1e-5, rtol=1e-4)

    setup = Setup(tiny, tmp_path, moved=True, loss_type=["robust"], label_smoothing=0.1)
    margin = 0.3 * setup.log_ratios() @ torch.tensor([1.0, -1.0])
    robust = (-0.9 * F.logsigmoid(margin) + 0.1 * F.logsigmoid(-margin)) / 0.8
    torch.testing.assert_close(setup.loss(), robust.mean(), atol=1e-5, rtol=1e-4)


def test_scoring_only_the_answers_changes_neither_loss_nor_figures(tiny, tmp_path, monkeypatch):
    """On a processor our head stands in for trl's, whose kernel is for GPUs."""
    from recipes.common import sft

    seen = []
    for plain in (True, False):
        monkeypatch.setattr(sft, "plain_logits", lambda model, plain=plain: plain)
        setup = Setup(tiny, tmp_path, moved=True)
        assert (setup.policy.forward.__func__.__module__ == sft.__name__) is plain
        setup.trainer.model.train()
        loss = setup.loss()
        loss.backward()
        figures = {name: values[-1] for name, values in setup.trainer._metrics["train"].items()}
        seen.append((loss.detach(), torch.cat([p.grad.flatten() for p in setup.policy.parameters()]), figures))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-6, rtol=1e-4)
    assert seen[0][2] == pytest.approx(seen[1][2], abs=1e-5)


def test_the_reference_is_the_policy_without_its_adapter(tiny, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
    setup = Setup(tiny, tmp_path, lora=lora)
    assert setup.trainer.ref_model is None
    assert setup.loss().item() == pytest.approx(math.log(2), abs=1e-6)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in setup.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    margin = setup.log_ratios() @ torch.tensor([1.0, -1.0])  # setup.policy holds the adapter's layers
    assert margin.abs().max() > 1e-3
    torch.testing.assert_close(setup.loss(), -F.logsigmoid(0.3 * margin).mean(), atol=1e-5, rtol=1e-4)


def test_biases_that_would_learn_in_the_reference_too_are_refused(tiny, tmp_path):
    """Switching the adapter off does not put them back, so the reference would move with the policy."""
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all")
    setup = Setup(tiny, tmp_path, lora=lora)  # a model without biases: nothing of it learns
    biased = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, attention_bias=True))
    with pytest.raises(UserError, match=r"lora.bias: all .* use none"):
        dpo.make_trainer(biased, None, setup.tokenizer, setup.pairs, setup.pairs, setup.config)


def test_the_reference_never_changes_and_the_policy_does(tiny, tmp_path):
    setup = Setup(tiny, tmp_path, max_steps=3, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)

    def digests() -> list[int]:
        return [
            hash(tuple(p.detach().numpy().tobytes() for p in model.parameters()))
            for model in (setup.reference, setup.policy)
        ]

    before = digests()
    setup.trainer.train()
    after = digests()
    assert after[0] == before[0] and after[1] != before[1]


def test_padding_with_the_stop_token_changes_nothing(tiny, tmp_path):
    """A policy without a pad token: `load_tokenizer` lets its stop token fill the batch."""
    losses, margins = [], []
    for own in (True, False):
        setup = Setup(tiny, tmp_path, moved=True)
        if not own:
            setup.tokenizer.pad_token = setup.tokenizer.eos_token
            setup.trainer.data_collator.pad_token_id = setup.tokenizer.eos_token_id
        ids = setup.batch()["input_ids"]
        assert (ids == 0).any() == own  # 0 is the tokenizer's own pad token
        losses.append(setup.loss())
        with torch.no_grad():
            margins.append(dpo.log_probabilities(setup.policy, setup.pairs, 4, setup.tokenizer.pad_token_id))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(margins[0], margins[1])


def test_a_gradient_of_zero_ends_the_run():
    from transformers import TrainerState

    check = dpo.gradient_check()
    for bad in (0.0, float("nan")):
        with pytest.raises(UserError, match="the gradient of step 1 is"):
            dpo.gradient_check().on_log(None, TrainerState(global_step=1), None, logs={"loss": 0.69, "grad_norm": bad})
    check.on_log(None, TrainerState(global_step=1), None, logs={"grad_norm": 0.1})
    check.on_log(None, TrainerState(global_step=9), None, logs={"grad_norm": 0.0})  # only the first step is looked at


# ---------------------------------------------------------------- own answers

CHECKABLE = [
    {"prompt": [{"role": "user", "content": f"Is it {n}?"}], "task": "echo", "answer": "k", "completions": ["k", "f"]}
    for n in range(3)
]


def own(monkeypatch, tiny, tmp_path, answers, **knobs):
    """The comparisons of these answers; "c..." is a "c" that was cut."""
    from recipes.common import own_answers

    setup = Setup(tiny, tmp_path)
    for name, value in knobs.items():
        setattr(setup.config.dpo, name, value)
    written = [[own_answers.Answer(t.removesuffix("..."), not t.endswith("...")) for t in some] for some in answers]
    monkeypatch.setattr(own_answers, "sample_answers", lambda *_, **__: written)
    return dpo.rank_own(CHECKABLE, setup.policy, setup.tokenizer, setup.config, setup.run)


def test_right_answers_of_ones_own_stand_above_wrong_ones(monkeypatch, tiny, tmp_path):
    answers = [["c", "k", "K.", "c", ""], ["k", "k", "k", "k"], ["c", "q"]]
    (found,) = own(monkeypatch, tiny, tmp_path, answers, candidates="sampled")
    assert (found["completions"], found["ranks"]) == (["c", "k", "K."], [1.0, 0.0, 0.0])
    both = own(monkeypatch, tiny, tmp_path, answers, candidates="both")
    assert [(row["completions"], row["ranks"]) for row in both] == [
        (["k", "c", "K."], [0.0, 1.0, 0.0]),
        (["k", "c", "q"], [0.0, 1.0, 1.0]),
    ]
    with pytest.raises(UserError, match="nothing to prefer"):
        own(monkeypatch, tiny, tmp_path, [["k"], ["c"], ["q", "c"]], candidates="sampled")


def test_a_reward_models_best_and_worst_are_compared(monkeypatch, tiny, tmp_path):
    from recipes.common import own_answers

    class Judge:
        def to(self, device):
            return self

    monkeypatch.setattr(own_answers, "load_reward_model", lambda *_: Judge())
    monkeypatch.setattr(
        own_answers, "reward_scores", lambda _, __, rows, answers, *a, **k: [[ord(a.text) for a in s] for s in answers]
    )
    answers = [["c", "k", "f"], ["q"], ["b", "a"]]
    found = own(monkeypatch, tiny, tmp_path, answers, candidates="sampled", judge="some/model")
    assert [row["completions"] for row in found] == [["k", "c"], ["b", "a"]]
    assert all(row["ranks"][0] == 0 < row["ranks"][1] for row in found)
    both = own(monkeypatch, tiny, tmp_path, answers, candidates="both", judge="some/model")  # the data's best: k
    assert [row["completions"] for row in both] == [["k", "c"], ["q", "k"], ["k", "a"]]


def test_an_answer_that_was_cut_is_never_the_better_one_and_gets_no_stop_token(monkeypatch, tiny, tmp_path):
    (found,) = own(monkeypatch, tiny, tmp_path, [["k...", "k", "c..."], ["k...", "c"], ["k..."]], candidates="sampled")
    assert (found["completions"], found["ranks"]) == (["k", "k", "c"], [1.0, 0.0, 1.0])
    assert found["ended"] == [False, True, False]
    setup = Setup(tiny, tmp_path)
    pairs = dpo.pairs_of([found], None, 0)
    pairs = dpo.encode(pairs, setup.tokenizer, setup.policy, setup.config, setup.run)
    k, c, stop = (setup.tokenizer.convert_tokens_to_ids(token) for token in ("k", "c", "<|end|>"))
    assert [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs] == [([k, stop], [k]), ([k, stop], [c])]


def test_a_reward_models_favourite_is_its_favourite_of_those_that_ended(monkeypatch, tiny, tmp_path):
    from recipes.common import own_answers

    monkeypatch.setattr(own_answers, "load_reward_model", lambda *_: torch.nn.Module())
    monkeypatch.setattr(
        own_answers, "reward_scores", lambda _, __, rows, answers, *a, **k: [[ord(a.text) for a in s] for s in answers]
    )
    answers = [["q...", "k", "f"], ["c", "k..."], ["b...", "a..."]]
    (found,) = own(monkeypatch, tiny, tmp_path, answers, candidates="sampled", judge="some/model")
    assert (found["completions"], found["ended"]) == (["k", "f"], [True, True])


def test_the_held_out_loss_is_the_one_that_was_trained_with():
    assert dpo.loss_figures(0.5, ["sigmoid"]) == {"eval_loss": 0.5, "baseline_loss": math.log(2)}
    assert dpo.loss_figures(25.0, ["ipo"]) == {"eval_loss": 25.0}


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tiny, preferences, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert run(tiny, preferences, root) == 0
    return root / "dpo" / "default"


def test_held_out_pairs_are_ranked_better_than_without_preferences(trained):
    figures = json.loads((trained / "metrics.json").read_text())
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert figures["reward_accuracy"] > figures["baseline_accuracy"] + 0.1
    assert figures["reward_margin"] > 0 and figures["eval_loss"] < figures["baseline_loss"] == math.log(2)
    assert figures["chosen_logp_change"] > figures["rejected_logp_change"]
    assert figures["kl"] > 0
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and history[0]["grad_norm"] > 0
    assert history[-2]["rewards/margins"] > 0.1
    assert history[-1]["eval_loss"] == figures["eval_loss"]
    for plot in ("loss", "accuracy", "margins", "log_probabilities"):
        assert (trained / "plots" / f"{plot}.png").stat().st_size > 5_000
    assert "greedy answers changed" in (trained / "samples" / "before_and_after.txt").read_text()


def test_it_loads_as_the_plain_model_that_it_was(trained, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, start = (AutoModelForCausalLM.from_pretrained(p) for p in (trained / "model", tiny))
    assert AutoTokenizer.from_pretrained(trained / "model").chat_template
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in start.named_parameters()}


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(trained, tiny, preferences, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from recipes.common import training

    left = iter(range(1000))

    def asked(self):
        self.reason = "test"
        return next(left) >= 6

    monkeypatch.setattr(training.StopSignals, "asked", asked)
    assert run(tiny, preferences, tmp_path) == 130
    monkeypatch.undo()
    assert run(tiny, preferences, tmp_path, run__resume="true") == 0
    ours, whole = (load_file(p / "model" / "model.safetensors") for p in (tmp_path / "dpo" / "default", trained))
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(("more", "kept"), [({}, "model"), ({"lora__r": 2, "lora__lora_alpha": 2}, "adapter")])
def test_what_was_learned_is_saved_before_it_is_measured(more, kept, tiny, preferences, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("no memory for the figures")

    monkeypatch.setattr(dpo, "judge_pairs", fails)
    assert run(tiny, preferences, tmp_path, training__max_steps=1, **more) == 2
    assert list((tmp_path / "dpo" / "default" / kept).glob("*.safetensors"))


@pytest.mark.slow
def test_an_adapter_is_saved_beside_the_merged_model(tiny, preferences, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    more = {
        "lora__r": 8,
        "lora__lora_alpha": 8,
        "lora__target_modules": "[q_proj, v_proj, down_proj]",
        "training__max_steps": 10,
    }
    assert run(tiny, preferences, tmp_path, **more, training__learning_rate=2e-2) == 0
    folder = tmp_path / "dpo" / "default"
    assert json.loads((folder / "metrics.json").read_text())["reward_margin"] > 0.01
    ids = torch.randint(10, 250, (2, 12))
    base, merged = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (tiny, folder / "model"))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        torch.testing.assert_close(adapted, merged(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, adapted, atol=1e-3)


# ---------------------------------------------------------------- bad input

PROMPT = [{"role": "user", "content": "Is it?"}]
BAD_ROWS = {
    "chosen equals rejected": {"prompt": PROMPT, "chosen": "k", "rejected": "k"},
    "empty answer": {"prompt": PROMPT, "chosen": "k", "rejected": " "},
    "fewer than 2 ranked completions": {"prompt": PROMPT, "completions": ["k"], "ranks": [0]},
}


@pytest.mark.parametrize("told", BAD_ROWS)
def test_rows_that_prefer_nothing_are_refused_by_their_line(told, tiny, tmp_path, capsys):
    rows = [{"prompt": f"Is it {n}?", "chosen": "k", "rejected": "c"} for n in range(4)]
    rows.append(BAD_ROWS[told])
    assert run(tiny, written(tmp_path / "rows.jsonl", rows), tmp_path) == 2
    error = capsys.readouterr().err
    assert told in error and "rows.jsonl:5" in error and "Traceback" not in error


def test_a_prompt_longer_than_the_context_is_refused_by_its_row(tiny, tmp_path, capsys):
    rows = [{"prompt": f"Is it {n}?", "chosen": "k", "rejected": "c"} for n in range(40)]
    rows += [{"prompt": f"{n} " + "z" * 400, "chosen": "k", "rejected": "c"} for n in range(2)]
    data = written(tmp_path / "rows.jsonl", rows)
    assert run(tiny, data, tmp_path) == 2
    error = capsys.readouterr().err
    assert "longer than the context of 128" in error and "zzz" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"training__label_smoothing": 0.1}, "training.label_smoothing: 0.1 does nothing"),
        ({"training__loss_type": "[sigmod]"}, "no loss is called sigmod"),
        ({"training__padding_free": "true"}, "training.padding_free"),
        ({"dpo__candidates": "sampled"}, "no checker"),
        ({"lora__init_lora_weights": "false", "lora__lora_alpha": 64}, "lora.init_lora_weights"),
        ({"lora__r": 1000, "lora__lora_alpha": 4, "lora__target_modules": "[q_proj]"}, "lora.r: 1000 is above what"),
        ({"lora__init_lora_weights": "pissa"}, "lora.init_lora_weights"),
        ({"lora__target_modules": "[qproj]"}, "lora.target_modules: nothing in LlamaForCausalLM is called qproj"),
        ({"model__name": "null", "model__config": "{model_type: llama}"}, "model.name"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, told, tiny, preferences, tmp_path, capsys):
    assert run(tiny, preferences, tmp_path, **more) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
