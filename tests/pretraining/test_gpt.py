"""GPT-1, -2 and -3 in this process on a text of a few kilobytes: they learn, fine-tune, are asked in context, and save whole."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recipes.common.banded_attention import FastSelfAttention
from recipes.common.errors import UserError
from recipes.common.gpt_tasks import MARKERS
from recipes.common.held_out import held_out_blocks, loss_by_position, unigram_loss
from recipes.common.run_folder import RunFolder
from recipes.pretraining import gpt

NOUNS = ("cat", "dog", "owl", "fox")
MODELS: dict[str, dict[str, Any]] = {
    "gpt1": {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt3": {
        "model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/, text.txt (lines of a small grammar), one.jsonl and two.jsonl (rows with a class, of one text and of two)."""
    folder = tmp_path_factory.mktemp("sources")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    lines = [
        f"the {a} {verb} {place} the {b} again and again"
        for a, verb, place, b in itertools.product(NOUNS, ("sat", "ran", "hid"), ("on", "under", "by"), NOUNS)
    ]
    (folder / "text.txt").write_text("\n".join(lines * 3) + "\n")
    one = [{"text": line, "label": line.split()[1]} for line in lines]
    two = [
        {"text": a, "text_pair": b, "label": "no" if i % 2 else "yes"}
        for i, (a, b) in enumerate(zip(lines, lines[::-1], strict=True))
    ]
    for name, rows in (("one", one), ("two", two)):
        random.Random(0).shuffle(rows)  # classes mixed, as the first rows are used
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(sources: Path, variant: str = "gpt2", *more: str, **changes: Any) -> list[str]:
    """A command line: hidden 32, 2 layers, blocks of 64 bytes."""
    words = {
        "model.tokenizer": sources / "tokenizer",
        "model.config": json.dumps(MODELS[variant]),
        "data.name": sources / "text.txt",
        "gpt.block_length": 64,
        "gpt.prompts": '["the "]',
        "gpt.tasks": "{}",
        "downstream.labels": 32,
        "downstream.steps": 6,
        "downstream.batch_size": 4,
        "downstream.max_length": 64,
        "downstream.eval_rows": 4,
        "training.max_steps": 40,
        "training.per_device_train_batch_size": 8,
        "training.learning_rate": 2e-2,
        "training.lr_scheduler_type": "linear",
        "training.lr_scheduler_kwargs": "{}",
        "training.warmup_steps": 2,
        "training.save_steps": 20,
        "training.bf16": "false",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [*(word for key, value in words.items() for word in (f"--{key}", str(value))), *more]


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_it_learns_and_what_it_saves_is_the_librarys(
    run_in_process: Any, sources: Path, tmp_path: Path, variant: str
) -> None:
    done = run_in_process(
        gpt, tiny(sources, variant, gpt__tasks=json.dumps({f"{sources}/one.jsonl": "classification"})), tmp_path
    )
    assert done.code == 0, done.err
    losses, figures = [row["loss"] for row in done.history()], done.figures
    assert len(losses) == 40
    vocabulary = 262 + len(MARKERS)
    assert losses[0] == pytest.approx(math.log(vocabulary), rel=0.1)  # it starts as a uniform guess
    assert figures["untrained_loss"] == pytest.approx(math.log(vocabulary), rel=0.1)
    assert figures["eval_loss"] < figures["unigram_loss"] < figures["untrained_loss"]
    assert figures["eval_loss_per_character"] == pytest.approx(figures["eval_loss"], rel=0.05)  # a token is a byte here
    assert figures["unigram_loss_per_character"] == pytest.approx(figures["unigram_loss"], rel=0.05)
    assert figures["loss_late_in_context"] < figures["loss_early_in_context"]
    assert {"one_accuracy", "baseline_one_accuracy", "one_most_common", "tokens_per_second"} <= figures.keys()
    assert "one_without_lm_accuracy" not in figures  # lambda is 0
    assert ("band_speedup_512" in figures) == (variant == "gpt3")
    for name in ("plots/loss.png", "plots/loss_by_position.png", "samples/step-000020.txt", "README.md"):
        assert (done.folder / name).stat().st_size > 0, name

    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    assert len(tokenizer) == vocabulary and set(MARKERS) <= set(tokenizer.get_vocab())
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model", attn_implementation="eager").eval()
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    # plain transformers scores the held-out text as the run did, whose local layers computed the band alone
    text = gpt_validation(sources)
    blocks, _ = held_out_blocks(text, tokenizer, 64)
    assert loss_by_position(model, blocks, bf16=False).mean() == pytest.approx(figures["eval_loss"], abs=1e-3)


def gpt_validation(sources: Path) -> list[str]:
    from recipes.common.data import load_data
    from recipes.common.sections import Data

    return [row["text"] for row in load_data(Data(name=str(sources / "text.txt")), "text")["validation"]]


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_the_loss_that_is_trained_on_is_the_mean_over_what_is_predicted(
    run_in_process: Any, sources: Path, tmp_path: Path, variant: str
) -> None:
    """In blocks of 8 tokens 7 are predicted: a mean over 8 would be an eighth too small."""
    words = {"gpt__block_length": 8, "training__max_steps": 1, "training__per_device_train_batch_size": 64}
    done = run_in_process(gpt, tiny(sources, variant, **words), tmp_path)
    assert done.code == 0, done.err
    assert done.history()[0]["loss"] == pytest.approx(done.figures["untrained_loss"], rel=0.03)


@pytest.mark.slow
def test_gpt1_tunes_each_kind_of_task_with_and_without_the_language_loss(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    pairs = [{"source": f"the {a}", "target": f"sat by the {a} {i}"} for i in range(30) for a in NOUNS]
    (sources / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (sources / "alike.jsonl").write_text((sources / "two.jsonl").read_text())
    kinds = {"one": "classification", "two": "entailment", "alike": "similarity", "pairs": "multiple_choice"}
    tasks = {f"{sources}/{name}.jsonl": kind for name, kind in kinds.items()}
    words = {"gpt__tasks": json.dumps(tasks), "gpt__auxiliary_loss": 0.5, "training__max_steps": 3}
    done = run_in_process(gpt, tiny(sources, "gpt1", **words), tmp_path)
    assert done.code == 0, done.err
    for name in kinds:
        for key in (f"{name}_accuracy", f"baseline_{name}_accuracy", f"{name}_without_lm_accuracy"):
            assert 0 <= done.figures[key] <= 1, key


@pytest.mark.slow
def test_gpt3_is_asked_with_no_one_and_a_few_examples(run_in_process: Any, sources: Path, tmp_path: Path) -> None:
    words = {"gpt__in_context": f"{sources}/one.jsonl", "gpt__shots": "[0, 1, 2]", "training__max_steps": 3}
    done = run_in_process(gpt, tiny(sources, "gpt3", **words), tmp_path)
    assert done.code == 0, done.err
    for shots in (0, 1, 2):
        assert 0 <= done.figures[f"in_context_accuracy_{shots}_shot"] <= 1
    shown = (done.folder / "samples/prompt.txt").read_text()
    assert shown.count("Answer: ") == 2 and shown.endswith("Answer:")


@pytest.mark.slow
def test_a_run_stopped_in_its_fine_tuning_resumes_to_the_same_figures(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    """W_y and the random start are drawn from the seed, not from where training left the random numbers."""
    words = {"gpt__tasks": json.dumps({f"{sources}/one.jsonl": "classification"}), "downstream__eval_rows": 40}
    line = tiny(sources, "gpt2", training__max_steps=3, downstream__steps=20, **words)
    whole = run_in_process(gpt, line, tmp_path)
    assert whole.code == 0, whole.err
    (whole.folder / "metrics.json").unlink()  # as it was while the tasks were learned
    again = run_in_process(gpt, [*line, "--run.resume", "true"], tmp_path)
    assert again.code == 0, again.err
    of_tasks = [name for name in whole.figures if "one_" in name]
    assert of_tasks and all(again.figures[name] == whole.figures[name] for name in of_tasks)
    losses = [re.findall(r"one, (?:pretrained|from scratch): loss ([\d.]+)", run.out) for run in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_weights(stop_and_resume: Any, sources: Path) -> None:
    short = {"training__max_steps": 12, "training__save_steps": 6}
    whole, _, resumed = stop_and_resume(gpt, tiny(sources, "gpt3", **short), 7)
    assert "resuming after step 8" in resumed.out
    assert resumed.figures["eval_loss"] == pytest.approx(whole.figures["eval_loss"], abs=1e-4)
    assert resumed.figures["untrained_loss"] == whole.figures["untrained_loss"]
    weights = [load_file(run.folder / "model/model.safetensors") for run in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=0, msg=name)


# ------------------------------------------------------------------------------------------------ architectures


def make(variant: str, **changes: Any) -> Any:
    from recipes.common.models import load_model
    from recipes.common.sections import Model

    torch.manual_seed(0)
    shape = {**MODELS[variant], "vocab_size": 50, "initializer_range": 0.3, **changes}
    run = RunFolder(Path("nowhere"), recipe="gpt", dry=True)
    return gpt.finish(load_model(Model(config=shape, attention="eager"), None, run), fresh=True).eval()


@pytest.mark.parametrize("variant", MODELS)
def test_no_prediction_sees_its_target(variant: str) -> None:
    """Changing a token moves its own and later predictions alone: those before are the same, bit by bit."""
    model = make(variant)
    ids = torch.randint(0, 50, (1, 48))
    with torch.no_grad():
        before = model(input_ids=ids).logits[0]
        for place in (0, 1, 15, 16, 17, 30, 47):
            other = ids.clone()
            other[0, place] = (other[0, place] + 7) % 50
            after = model(input_ids=other).logits[0]
            assert after[:place].equal(before[:place]), place
            assert not after[place].equal(before[place]), place


def test_gpt1_normalises_after_each_block_and_gpt2_and_gpt3_before() -> None:
    ids = torch.randint(0, 50, (2, 20))
    for variant, post in (("gpt1", True), ("gpt2", False), ("gpt3", False)):
        model = make(variant)
        caught = []
        hook = model.base_model.h[-1].register_forward_hook(
            lambda _m, _i, out, caught=caught: caught.append(out[0] if isinstance(out, (tuple, list)) else out)
        )
        with torch.no_grad():
            model(input_ids=ids)
        hook.remove()
        spread = caught[0].std(dim=-1, unbiased=False)
        assert torch.allclose(spread, torch.ones_like(spread), atol=1e-2) == post, variant
        assert hasattr(model.base_model, "ln_f") != post  # pre-norm needs one at the end


def test_from_scratch_is_the_same_architecture_with_other_weights() -> None:
    model = make("gpt3")
    other, third = gpt.from_scratch(model, 1), gpt.from_scratch(model, 1)
    assert all(weight.equal(third.state_dict()[name]) for name, weight in other.state_dict().items())
    assert other.state_dict().keys() == model.state_dict().keys()
    assert {type(block.attn.attention) for block in other.transformer.h} == {FastSelfAttention}
    q = "transformer.h.0.attn.attention.q_proj.weight"
    assert not other.state_dict()[q].equal(model.state_dict()[q])
    assert other.state_dict()[q].std() == pytest.approx(0.3 / 4, rel=0.1)  # 1/sqrt(head of 16)


# ------------------------------------------------------------------------------------------------- the figures


def test_the_loss_by_position_is_the_models_own() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=1, n_positions=12)).eval()
    blocks = torch.randint(0, 50, (7, 10)).tolist()
    found = loss_by_position(model, blocks, bf16=False, batch_size=3)
    model.eval()
    ids = torch.tensor(blocks)
    assert found.shape == (9,)
    assert found.mean() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    words = model(ids[:, :4]).logits[:, -1].log_softmax(-1)
    assert found[3] == pytest.approx(-words[torch.arange(7), ids[:, 4]].mean().item(), rel=1e-5)


def test_the_unigram_loss_by_hand() -> None:
    """Counts 3, 1, 0 plus one of 7; a label of -100 is no target."""
    expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    assert unigram_loss([torch.tensor([[0, 0], [0, 1]])], [torch.tensor([[-100, 0, 2]])], 3) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(rng.choice(3, (100, 100), p=[0.5, 0.25, 0.25]))
    assert unigram_loss([drawn], [drawn], 3) == pytest.approx(1.5 * math.log(2), rel=0.01)  # the source's entropy


def test_held_out_blocks_lose_at_most_one_blocks_tail() -> None:
    tokenizer = make_tokenizer()
    texts = ["abc", "defgh", "ij"]
    blocks, per_character = held_out_blocks(texts, tokenizer, 4)
    ids = [token for block in blocks for token in block]
    assert tokenizer.decode(ids) == "abc<|end|>defgh<|end|>ij"
    assert per_character == 13 / 10
    with pytest.raises(UserError, match="shorter than one block of 20"):
        held_out_blocks(texts, tokenizer, 20)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("variant", "changes", "says"),
    [
        ("gpt2", {"gpt__block_length": 65}, "gpt.block_length is 65, but the model has 64 positions"),
        ("gpt1", {"gpt__block_length": 65, "model__attention": "eager"}, "block_length is 65, but the model has 64 positions"),
        ("gpt3", {"gpt__block_length": 65, "model__attention": "eager"}, "block_length is 65, but the model has 64 positions"),
        ("gpt2", {"gpt__block_length": 7}, "gpt.block_length is 7 tokens, too short"),
        ("gpt2", {"model__config": '{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}', "gpt__block_length": 1025},
         "block_length is 1025, but the model has 1024 positions"),  # the library's own number, which the config leaves out
        ("gpt2", {"downstream__max_length": 100, "gpt__tasks": '{"pydocs_package": "classification"}'},
         "downstream.max_length is 100, but the model has 64 positions"),
        ("gpt1", {"model__attention": "sdpa"}, "set eager"),
        ("gpt1", {"gpt__in_context": "pydocs_package", "model__attention": "eager"}, "gpt.in_context: GPT-1"),
        ("gpt2", {"gpt__auxiliary_loss": -1}, "gpt.auxiliary_loss is -1"),
        ("gpt2", {"gpt__shots": "[0, -2]"}, "gpt.shots"),
        ("gpt2", {"gpt__shots": "[]", "gpt__in_context": "pydocs_package"}, "gpt.shots"),
        ("gpt2", {"model__config": '{"model_type": "llama"}'}, "is no GPT of this recipe"),
        ("gpt2", {"model__config": '{"model_type": "gpt2", "n_positions": 64, "tie_word_embeddings": false}'}, "tie_word"),
        ("gpt2", {"gpt__tasks": '{"a": "translation"}'}, "gpt.tasks"),
        ("gpt2", {"gpt__tasks": '{"a/x.jsonl": "classification", "b/x.jsonl": "similarity"}'}, "several are called 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_runs(
    run_in_process: Any, sources: Path, tmp_path: Path, variant: str, changes: dict[str, Any], says: str
) -> None:
    done = run_in_process(gpt, tiny(sources, variant, **changes), tmp_path)
    assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.err
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_their_task_are_said_before_the_training(
    run_in_process: Any, sources: Path, tmp_path: Path
) -> None:
    classify = json.dumps({f"{sources}/one.jsonl": "classification"})
    for changes, says in (
        ({"gpt__tasks": classify, "downstream__validation_split": "dev"}, "has no split 'dev'"),
        ({"gpt__tasks": json.dumps({f"{sources}/one.jsonl": "similarity"})}, "needs two texts"),
        ({"gpt__tasks": json.dumps({f"{sources}/two.jsonl": "classification"})}, "and these have two"),
        ({"gpt__in_context": f"{sources}/one.jsonl", "downstream__labels": 1}, "one class alone"),
        ({"gpt__in_context": f"{sources}/one.jsonl", "gpt__shots": "[0, 33]"}, "33 examples of 32 rows"),
        ({"gpt__in_context": f"{sources}/one.jsonl", "gpt__shots": "[8]"}, "a prompt with 8 examples takes"),
    ):
        done = run_in_process(gpt, tiny(sources, **changes), tmp_path)
        assert done.code == 2 and says in done.err and "step 1/" not in done.out, done.err
        assert not list(tmp_path.iterdir())
