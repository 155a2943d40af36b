"""GPT-1, GPT-2 and GPT-3: one objective, three Transformers, and three ways to get a task out of them.

    loss = - 1/T sum_t log p(x_t | x_<t)

    gpt1   h = LN(h + Attention(h));  h = LN(h + MLP(h))          post-norm; then fine-tuned: L3 = L2 + lambda L1
    gpt2   h = h + Attention(LN(h));  h = h + MLP(LN(h))          pre-norm; residual projections start 1/sqrt(2 layers) smaller
    gpt3   gpt2 with every second layer banded:   x . . . .       a token sees the w tokens up to itself: w = 2 here;
                                                  x x . . .       tasks from examples in the prompt, no gradient step
                                                  . x x . .
                                                  . . x x .

Radford et al. 2018, https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf
Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
Brown et al. 2020, https://arxiv.org/abs/2005.14165

    make gpt                                        # laptop, offline, minutes: gpt2; CONFIG=gpt1, CONFIG=gpt3
    make gpt CONFIG=gpu                             # one GPU: GPT-2's smallest size, a public corpus
    make gpt CONFIG=cluster LAUNCH=fsdp NPROC=8     # a node: GPT-3 1.3B; scripts/ has SLURM

model.config.model_type says which: `openai-gpt`, `gpt2`, or `gpt_neo` (transformers' name for GPT-3's alternation). The
objective is here; common/gpt_tasks.py has GPT-1's input transformations and fine-tuning, common/banded_attention.py
GPT-3's band, common/in_context.py its zero-, one- and few-shot evaluation.

Laptop result: RESULTS.md#gpt.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section
from recipes.common.downstream import Downstream, name_of
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Model, PositiveFloat, PositiveInt, Run

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIANTS = {"openai-gpt": "gpt1", "gpt2": "gpt2", "gpt_neo": "gpt3"}


@dataclass
class Gpt:
    """Knobs of the objective and of what is done with the model; the architecture's are in model.config."""

    block_length: PositiveInt = 512  # tokens a sample; documents are packed into such blocks (GPT-1: 512)
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW; GPT's own is adamw
    muon_learning_rate: PositiveFloat = 0.01  # of the hidden matrices, scaled to AdamW's update size (Moonshot 2025)
    prompts: tuple[str, ...] = ("def", "import", "The")  # continued as it learns
    tasks: dict[str, Literal["classification", "entailment", "similarity", "multiple_choice"]] = field(
        default_factory=dict  # fine-tuned on, data -> input transformation (GPT-1, figure 1); the rest is in downstream
    )
    auxiliary_loss: float = (
        0.0  # lambda, the share of the language loss in fine-tuning; GPT-1: 0.5; above 0: 0 is run too
    )
    in_context: str | None = None  # labelled rows asked for with examples in the prompt, no gradient step
    shots: tuple[int, ...] = (0, 1, 4)  # examples in the prompt: zero, one, few (GPT-3: 10 to 100)


@dataclass
class Config:
    """Sections of this recipe."""

    model: Model
    data: Data
    gpt: Gpt
    downstream: Downstream
    training: Section[transformers.TrainingArguments]
    run: Run


def check(config: Config) -> None:
    """Raise UserError, all problems at once, for what would fail or mislead after the long work."""
    gpt, shape = config.gpt, config.model.config or {}
    kind = shape.get("model_type")
    problems = []
    if config.model.config is not None and kind not in VARIANTS:
        known = ", ".join(f"{name} ({variant})" for name, variant in VARIANTS.items())
        problems.append(f"model.config.model_type: {kind!r} is no GPT of this recipe; one of {known}")
    if kind in ("openai-gpt", "gpt_neo") and config.model.attention != "eager":
        problems.append(
            f"model.attention: {config.model.attention}: transformers writes {kind} with plain products: set eager"
        )
    if shape.get("tie_word_embeddings") is False:
        problems.append("model.config.tie_word_embeddings: false: a GPT's head is its embedding (GPT-1, equation 2)")
    if gpt.in_context and kind == "openai-gpt":
        problems.append(
            "gpt.in_context: GPT-1 is fine-tuned (gpt.tasks), and has no cache of what it read: leave it out"
        )
    names = [name_of(source) for source in gpt.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        problems.append(
            f"gpt.tasks: several are called {min(twice)!r}, and their figures go by that name: rename a file"
        )
    if gpt.auxiliary_loss < 0:
        problems.append(f"gpt.auxiliary_loss is {gpt.auxiliary_loss}: a share of a loss is 0 or above; GPT-1 used 0.5")
    if any(count < 0 for count in gpt.shots):
        problems.append(f"gpt.shots: {list(gpt.shots)}: a prompt holds 0 examples or more")
    if gpt.in_context and not gpt.shots:
        problems.append(
            "gpt.shots: no number of examples to ask gpt.in_context with: give [0], or leave gpt.in_context out"
        )
    if problems:
        raise UserError(problems)


def make_model(config: Config, run: RunFolder) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model; GPT-1's markers are in both where there are tasks to fine-tune on."""
    from recipes.common.gpt_tasks import add_markers
    from recipes.common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(config.model, run)
    if config.model.config is None:  # pretrained: its own vocabulary first, then rows for the markers
        model = load_model(config.model, tokenizer, run)
        if model.config.model_type not in VARIANTS:
            raise UserError(
                f"model.name: a {model.config.model_type} is no GPT of this recipe; one of {', '.join(VARIANTS)}"
            )
        if config.gpt.tasks:
            add_markers(tokenizer)
            model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
        return tokenizer, finish(model, fresh=False)
    if config.gpt.tasks:
        add_markers(tokenizer)
    return tokenizer, finish(load_model(config.model, tokenizer, run), fresh=True)


def finish(model: Any, fresh: bool) -> PreTrainedModel:
    """What transformers lacks for GPT-3: GPT-2's start for fresh weights, and local layers that compute the band alone."""
    if model.config.model_type == "gpt_neo":
        from recipes.common.banded_attention import start_like_gpt3, use_fast_attention

        if fresh and model.device.type != "meta":
            start_like_gpt3(model)
        use_fast_attention(model)
    return model


def from_scratch(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same architecture with random weights, those of the seed."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)

    attention = model.config._attn_implementation
    return finish(AutoModelForCausalLM.from_config(model.config, attn_implementation=attention), fresh=True)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Data, model, optimizer, train, evaluate, save, and then the tasks."""
    import torch
    from transformers import Trainer, TrainerCallback

    from recipes.common.data import load_data
    from recipes.common.fused_loss import fuse_next_token_loss
    from recipes.common.generation import continue_prompts
    from recipes.common.gpt_tasks import compare_on_task, load_task
    from recipes.common.held_out import draw_by_position, held_out_blocks, loss_by_position, unigram_loss
    from recipes.common.in_context import ask_in_context, check_room, load_questions
    from recipes.common.optimizers import check_muon, muon_with_adamw, slow_queries
    from recipes.common.packing import check_lengths, pack_texts, stacked
    from recipes.common.preflight import enough_blocks, preflight
    from recipes.common.sharding import whole_model
    from recipes.common.training import fit, total_steps

    gpt, training = config.gpt, config.training
    check(config)
    if gpt.optimizer == "muon":
        check_muon(training)
    tokenizer, model = make_model(config, run)
    lengths = {"gpt.block_length": gpt.block_length}
    if gpt.tasks:
        lengths["downstream.max_length"] = config.downstream.max_length
    check_lengths(lengths, model)
    fuse_next_token_loss(model)

    data = load_data(config.data, "text")
    pack = partial(pack_texts, tokenizer=tokenizer, length=gpt.block_length)
    blocks = enough_blocks(pack, data["train"], run, training)
    held_out, tokens_per_character = enough_blocks(
        lambda rows: held_out_blocks([row["text"] for row in rows], tokenizer, gpt.block_length),
        data["validation"], run,
    )  # fmt: skip

    def settings(source: str) -> Downstream:
        return dataclasses.replace(config.downstream, data=source)

    tasks = [load_task(kind, settings(source), tokenizer, training.seed, run.dry) for source, kind in gpt.tasks.items()]
    questions = load_questions(settings(gpt.in_context), run.dry) if gpt.in_context else None
    if questions is not None:
        check_room(tokenizer, questions[0], max(gpt.shots), gpt.block_length)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = stacked(rows)  # (batch, block_length)
        return {"input_ids": ids, "labels": ids}

    class ShowSamples(TrainerCallback):
        """Text that the model writes at each checkpoint: how it learns, to be read."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.sample(f"step-{state.global_step:06d}.txt", continue_prompts(model, tokenizer, gpt.prompts))

    optimizer = None  # None: the Trainer makes training.optim
    if gpt.optimizer == "muon":
        optimizer = muon_with_adamw(model, training, gpt.muon_learning_rate)
        if model.config.model_type == "gpt_neo":  # its attention is not scaled
            queries = [p for name, p in model.named_parameters() if name.endswith(".q_proj.weight")]
            slow_queries(optimizer, queries, model.config.hidden_size // model.config.num_attention_heads)
    trainer = Trainer(
        model, training, train_dataset=blocks, data_collator=collate, optimizers=(optimizer, None), callbacks=[ShowSamples()]
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    preflight(run, model, batch, args=training, total_steps=total_steps(trainer))
    untrained = loss_by_position(whole_model(trainer), held_out[:16], training.bf16)
    fit(trainer, run, time_limit_minutes=config.run.time_limit_minutes)
    model = whole_model(trainer)
    run.save_model(model, tokenizer)
    run.plot_curve("loss", "loss")

    by_position = loss_by_position(model, held_out, training.bf16)
    run.plot("loss_by_position", lambda axes: draw_by_position(axes, by_position))
    counted = stacked(itertools.islice(blocks, 20_000))
    unigram = unigram_loss([counted], [torch.tensor(held_out)[:, 1:]], len(tokenizer))
    eighth = max(1, len(by_position) // 8)
    figures = {
        "eval_loss": by_position.mean(),
        "unigram_loss": unigram,
        "untrained_loss": untrained.mean(),
        "eval_loss_per_character": by_position.mean() * tokens_per_character,
        "unigram_loss_per_character": unigram * tokens_per_character,
        "loss_early_in_context": by_position[:eighth].mean(),  # what reading on buys: learning in context, no gradient
        "loss_late_in_context": by_position[-eighth:].mean(),
    }
    if model.config.model_type == "gpt_neo" and run.is_main:
        from recipes.common.banded_attention import banded_speedup

        window, heads = model.config.window_size, model.config.num_attention_heads
        head = model.config.hidden_size // heads
        figures[f"band_speedup_{32 * window}"] = banded_speedup(window, 32 * window, heads, head, training.device)
    if questions is not None:
        figures |= ask_in_context(model, tokenizer, questions, gpt.shots, gpt.block_length, training, run)
    for task in tasks:
        starts = (model, from_scratch(model, training.seed))
        figures |= compare_on_task(task, starts, gpt.auxiliary_loss, training, run)
    return {name: round(float(value), 4) for name, value in figures.items()}


if __name__ == "__main__":
    run_recipe(main, Config)
