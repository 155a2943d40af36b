"""P-tuning: freeze the model, and learn the vectors of tokens that stand among the words of a template.

    T = {[P_0 : i], x, [P_i+1 : m], anchor words}          P_i stand before, behind, or between what is asked
    h_i = MLP([LSTM_forward(p_0 : i) ; LSTM_backward(p_i : m)])      what the model reads for P_i  (equations 5 and 6)

The vectors are not learned freely: a bidirectional LSTM and an MLP of two layers with a ReLU make them from a small
table, so that they depend on each other. Afterwards only the h_i are kept; the LSTM costs nothing at inference, and every
row is m tokens longer. A few words of the template that stay words anchor it: `{v*8}{text}{v*8} Answer:`.
(peft.PromptEncoder has this LSTM, and an MLP variant of three linear layers without an LSTM, which is not in the paper;
where its model puts the vectors is only in front.)

Liu et al. 2021, https://arxiv.org/abs/2103.10385

    make p_tuning                                    # laptop, offline, 3 minutes, from what `make llama` made
    make p_tuning CONFIG=gpu                         # one GPU, a public model and instruction set
    make p_tuning CONFIG=cluster LAUNCH=ddp NPROC=8  # a node; scripts/ has SLURM

Leaves adapter/ (the vectors, and the tokenizer that puts them into a row). Laptop result: RESULTS.md#p_tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import trl


@dataclass
class Template:
    """Where the virtual tokens stand."""

    text: str = "{v*8}{text}{v*8}"  # {v*n}: n virtual tokens; {text}: what the user says, or the text; {text_pair}


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    template: Template
    p_tuning: Section[peft.PromptEncoderConfig] = field(
        default_factory=defaults(task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM")
    )
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def closed_form(settings: peft.PromptEncoderConfig, tokens: int, width: int) -> int:
    """How many numbers learn: the table, L bidirectional LSTM layers, the MLP.

    w: width, h: encoder_hidden_size, a direction's.  LSTM layer of input n: 2 (4h n + 4h h + 8h), n = w, then 2h
    LSTM   tokens w + layers + (2h 2h + 2h) + (2h w + w)        MLP   tokens w + (w h + h) + (h h + h) + (h w + w)
    """
    h = settings.encoder_hidden_size or width
    if settings.encoder_reparameterization_type != "LSTM":
        return tokens * width + (width * h + h) + (h * h + h) + (h * width + width)
    inputs = [width, *[2 * h] * (settings.encoder_num_layers - 1)]
    lstm = sum(2 * (4 * h * n + 4 * h * h + 8 * h) for n in inputs)
    return tokens * width + lstm + (2 * h * 2 * h + 2 * h) + (2 * h * width + width)


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, virtual tokens in the template, train what makes their vectors, save the vectors."""
    from peft import PromptEncoder

    from recipes.common import adaptation, prompt_encoder, virtual_tokens

    settings = config.p_tuning
    template = virtual_tokens.read_template(config.template.text, "template.text")
    prompt_encoder.check_encoder(settings, "p_tuning")
    if settings.num_virtual_tokens not in (None, template.tokens):
        raise UserError(
            f"p_tuning.num_virtual_tokens is {settings.num_virtual_tokens}, but template.text has {template.tokens} "
            "places for them: leave it out"
        )
    prompt_encoder.refuse_shards(config.training, "p_tuning")
    virtual_tokens.check_type(settings.task_type, "p_tuning")
    task = adaptation.prepare(config.model, config.data, settings.task_type, run)
    prompt_encoder.check_room(task.base, template.tokens, config.training.max_length)

    first_id = virtual_tokens.place(task, template, config.training)
    width = task.base.get_input_embeddings().embedding_dim
    settings.num_virtual_tokens, settings.token_dim, settings.num_transformer_submodules = template.tokens, width, 1
    settings.encoder_hidden_size = settings.encoder_hidden_size or width
    adaptation.seed_again()
    virtual_tokens.put_in(task.base, PromptEncoder(settings), template.tokens, first_id)
    adaptation.freeze(task.base, prompt_encoder.learned_names(task.base))
    run.say(
        f"  p_tuning: {template.tokens} vectors of {width} in {config.template.text!r}, made by an "
        f"{settings.encoder_reparameterization_type} encoder: {closed_form(settings, template.tokens, width):,} numbers "
        f"learn, {template.tokens * width:,} stay"
    )
    trainer, figures = adaptation.learn(task, task.base, config.training, config.evaluation, run, config.run)

    names = prompt_encoder.settle(task.base)
    told = {"tokens": template.tokens, "first_id": first_id, "template": config.template.text}
    figures["adapter_bytes"] = adaptation.save(task, trainer, task.base, run, "p_tuning", told, names)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
