"""Supervised fine-tuning, what its recipes share: the trainer, its loss on a processor, and the before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from recipes.common.generation import exact_match, generate, inference, is_checkable, pad_id, prompt_of
from recipes.common.length_groups import group_by_length
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Evaluation
from recipes.common.sft_packing import IGNORED, PackedRows
from recipes.common.sharding import saved_by_trainer, sharded

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from matplotlib.axes import Axes
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

SHOWN = 8  # questions that cannot be checked, of which the answers are kept in samples/
ROWS_AT_A_TIME = 64  # learned tokens are scored in multiples of this
LONG_ANSWER = 96  # tokens of those answers


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Dataset],
    args: SFTConfig,
    peft_config: PeftConfig | None = None,
) -> SFTTrainer:
    """TRL's SFTTrainer on the rows of `prepare`; with PackedRows, and with our loss where TRL's kernel cannot run."""
    from trl import SFTTrainer

    args = copy.copy(args)
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.assistant_only_loss, args.eos_token = False, None  # done by `prepare`; TRL would look for messages again
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    # FlashAttention takes documents apart in a single row only, which is what TRL's own collator makes (for it, at no
    # cost: it never looks outside a document); the other kernels do it in any row.
    if args.packing and not model.config._attn_implementation.startswith("flash"):
        assert args.max_length is not None
        trainer.data_collator = PackedRows(pad_id(tokenizer), args.max_length, args.per_device_train_batch_size)
    if args.train_sampling_strategy == "group_by_length":
        group_by_length(trainer, [len(ids) for ids in data["train"]["input_ids"]])
    score_only_answers(trainer)
    return trainer


def model_of(trainer: SFTTrainer) -> Any:
    """The model that learns, not wrapped for distribution; of whatever class the recipe made it."""
    return trainer.model


def announce(trainer: SFTTrainer, run: RunFolder, answers: Callable[[], Any] | None = None) -> dict[str, torch.Tensor]:
    """Check the first batch and say what is about to run (`--dry-run` ends here); gives the batch. `answers`: preflight's."""
    from recipes.common.memory_estimate import numbers_of
    from recipes.common.preflight import preflight
    from recipes.common.training import total_steps

    batch = next(iter(trainer.get_train_dataloader()))
    # TRL's fused head holds a few logits at a time, ours those of the tokens that are learned
    scored = int((batch["labels"] != IGNORED).sum()) if scores_only_answers(trainer) else 0
    preflight(
        run, model_of(trainer), batch,
        args=trainer.args, total_steps=total_steps(trainer), trainer=trainer, scored=scored, answers=answers,
    )  # fmt: skip
    if scores_only_answers(trainer):
        # MFU must not count the products that are saved: the head's, for tokens that are not learned
        head = model_of(trainer).get_output_embeddings().weight
        saved = 1 - (batch["labels"] != IGNORED).float().mean().item()
        run.figures["flops_per_token"] -= (6 if head.requires_grad else 4) * numbers_of(head) * saved
    return batch


def scores_only_answers(trainer: SFTTrainer) -> bool:
    """Whether `score_only_answers` applies: on a processor, to models that neither scale nor cap their logits."""
    return trainer.args.device.type == "cpu" and plain_logits(model_of(trainer))


def plain_logits(model: Any) -> bool:
    """Whether the logits are the head's product and nothing else."""
    config = model.config.get_text_config()
    reshaping = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    reshaped = any(getattr(config, name, None) not in (None, 1.0) for name in reshaping)
    return not reshaped and not getattr(config, "output_router_logits", False)


def score_only_answers(trainer: SFTTrainer) -> None:
    """On a processor, project only the tokens that are learned onto the vocabulary.

    TRL's fused head is a Triton kernel. Where that cannot run, its fallback scores every token, prompts included, in
    float32, vocabulary slice by slice: more than half of a step's time for a small model.
    """
    if scores_only_answers(trainer):
        project_only_labels(model_of(trainer))


def project_only_labels(model: Any) -> None:
    """Replace what a trl trainer put in as the model's fused head; for models with `plain_logits`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    fused_forward = base.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or kwargs.get("labels") is None:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        return _score(hidden, labels, self.get_output_embeddings())

    forward.__wrapped__ = fused_forward  # type: ignore[attr-defined]  # generate() reads the signature
    base.forward = MethodType(forward, base)


def _score(hidden: torch.Tensor, labels: torch.Tensor, head: torch.nn.Module) -> Any:
    """Log-probability of each learned token: hidden [batch, length, width], labels [batch, length] -> TRL's output."""
    import torch

    return torch.compiler.disable(_score_eagerly)(hidden, labels, head)


def _score_eagerly(hidden: torch.Tensor, labels: torch.Tensor, head: torch.nn.Module) -> Any:
    # not compiled: how many tokens are learned differs from batch to batch
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    hidden, labels = hidden[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    targets = labels[mask]  # [learned]
    places = mask.flatten().nonzero()[:, 0]
    # whole multiples of rows: oneDNN builds, and keeps, a kernel for every shape of a product that it meets
    filling = places.new_zeros(-len(places) % ROWS_AT_A_TIME)
    logits = head(hidden.flatten(0, 1)[torch.cat([places, filling])])[: len(places)].float()  # [learned, vocabulary]
    log_p = logits.log_softmax(-1)
    learned = log_p.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        top1 = log_p.argmax(-1) == targets
        entropy = -(log_p.exp() * log_p).sum(-1)
        mean_logits = logits.mean(-1)
    log_probs = logits.new_zeros(mask.shape).masked_scatter(mask, learned)
    return FusedCausalLMOutput(
        loss=-learned.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs).masked_scatter(mask, entropy),
        mean_logits=torch.zeros_like(log_probs).masked_scatter(mask, mean_logits),
        is_top1=torch.zeros_like(mask).masked_scatter(mask, top1),
        label_mask=mask,
    )


# ---------------------------------------------------------------------------------------------------- before and after


def held_out_loss(trainer: SFTTrainer) -> float:
    """Mean cross-entropy (nats a token) over all learned tokens of the held-out rows, on all processes together.

    `trainer.evaluate()` averages the batches' means instead: a batch with few answers weighs as much as a full one.
    """
    import torch

    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    data, model = cast("Dataset", trainer.eval_dataset), model_of(trainer)
    mine = islice(data, accelerator.process_index, None, accelerator.num_processes)
    total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    with inference(model, bf16=trainer.args.bf16):
        while samples := list(islice(mine, size)):
            batch = trainer._prepare_inputs(trainer.data_collator(samples))
            out = model(**batch, use_cache=False, fused_lm_head=True)
            total += torch.stack([-out.log_probs.double().sum(), out.label_mask.double().sum()])
    total = accelerator.reduce(total)
    return round(float(total[0] / total[1].clamp(min=1)), 4)


@dataclass
class Measured:
    """What a model can do: the held-out loss, flat figures of exact match (none without rows to check), the answers."""

    loss: float
    figures: dict[str, float]
    answers: list[dict[str, Any]]


def measure(
    trainer: SFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    evaluation: Evaluation,
    run: RunFolder,
    when: str,
) -> Measured:
    """Held-out loss, exact match on the rows that can be checked, and a few answers to the others.

    Where no process holds the whole model, only the loss: to write, each would wait for all others at each token.
    """
    if sharded(trainer):
        return measure_in_pieces(trainer, run, when)
    loss = held_out_loss(trainer)
    checkable: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for row in rows:
        (checkable if is_checkable(row) else others).append(row)
        if len(checkable) >= evaluation.max_samples and len(others) >= SHOWN:
            break
    model, bf16 = model_of(trainer), trainer.args.bf16
    figures: dict[str, float] = {}
    answers: list[dict[str, Any]] = []
    if checkable:
        figures = exact_match(model, tokenizer, checkable, evaluation, seed=trainer.args.seed, bf16=bf16)
        answers = figures.pop("answers")  # type: ignore[assignment]
    if others:
        prompts = [prompt_of(row) for row in others[:SHOWN]]
        written = generate(model, tokenizer, prompts, max_new_tokens=LONG_ANSWER, bf16=bf16)
        answers += [
            {"prompt": prompt[-1]["content"], "expected": row["messages"][-1]["content"], "greedy": text}
            for prompt, row, text in zip(prompts, others, written, strict=False)
        ]
    matched = f", exact match {figures['exact_match']:.1%}" if figures else ""
    sampled = f", sampled {figures['sampled_exact_match']:.1%}" if figures else ""
    run.say(f"{when}: held-out loss {loss:.4f}{matched}{sampled}")
    return Measured(loss, figures, answers)


def measure_in_pieces(trainer: SFTTrainer, run: RunFolder, when: str) -> Measured:
    """The loss alone. FSDP cuts the model as training starts, and evaluates only then: what was before is told after."""
    started = [told["eval_loss"] for told in trainer.state.log_history if told["step"] == 0 and "eval_loss" in told]
    if not started:
        trainer.args.eval_on_start = True
        return Measured(float("nan"), {}, [])
    loss, then = round(trainer.evaluate()["eval_loss"], 4), round(started[0], 4)
    run.say(
        f"{when}: held-out loss {loss:.4f}, before {then:.4f}; the model is sharded, so its answers are not looked at here"
    )
    return Measured(loss, {"baseline_loss": then}, [])


def report(run: RunFolder, before: Measured, after: Measured) -> dict[str, float]:
    """Plots and samples of the two; gives the flat figures: eval_loss, exact_match, ..., and baseline_* from before."""
    run.plot_curve("loss", "loss", label="training loss, nats a learned token")
    tasks = sorted(key for key in after.figures if key.startswith("exact_match_"))
    if tasks:
        run.plot("exact_match_by_task", lambda axes: _bars(axes, tasks, before, after))
    run.sample("answers.md", side_by_side(before, after))
    baseline = {
        f"baseline_{key}": value
        for key, value in before.figures.items()
        if key in ("exact_match", "sampled_exact_match")
    }
    return {"eval_loss": after.loss, "baseline_loss": before.loss, **after.figures, **baseline}


def _bars(axes: Axes, tasks: list[str], before: Measured, after: Measured) -> None:
    names = [task.removeprefix("exact_match_").replace("_", " ") for task in tasks]
    places = range(len(tasks))
    axes.bar([p - 0.2 for p in places], [before.figures[task] for task in tasks], 0.4, label="before", color="0.7")
    axes.bar([p + 0.2 for p in places], [after.figures[task] for task in tasks], 0.4, label="after")
    axes.set_xticks(list(places), names, rotation=40, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel("held-out questions answered exactly right")
    axes.legend(frameon=False, loc="upper left")


def side_by_side(before: Measured, after: Measured) -> str:
    """A Markdown table of some answers, before and after: three of each task, and those that nobody can check."""
    shown: list[int] = []
    seen: dict[str, int] = {}
    for i, answer in enumerate(after.answers):
        task = answer.get("task")
        seen[task or ""] = seen.get(task or "", 0) + 1
        if task is None or seen[task] <= 3:
            shown.append(i)
    shown.sort(key=lambda i: after.answers[i].get("task") or "~")
    lines = ["| task | question | expected | before | after |  |", "|---|---|---|---|---|---|"]
    for i in shown:
        now, then = after.answers[i], before.answers[i]
        mark = {True: "right", False: "wrong", None: ""}[now.get("right")]
        cells = [now.get("task") or "", now["prompt"], now["expected"], then["greedy"], now["greedy"], mark]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table: on one line, shortened, nothing in it that Markdown would act on."""
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("\r", "").replace("\n", "⏎")
    return text if len(text) <= 240 else text[:237] + "..."


def save(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
    """The model to model/, gathered from all devices where it is sharded."""
    if sharded(trainer):
        with saved_by_trainer(trainer, run.path / "model", run) as folder:
            if run.is_main:
                tokenizer.save_pretrained(folder)
    else:
        run.save_model(model_of(trainer), tokenizer)
