"""Prompt tuning: freeze the model, and learn the vectors of a few tokens that stand in front of every row.

    [P; X]        P [tokens, width] learned, X [n, width] the embeddings of the row: tokens x width numbers in all
    inference     rows are longer by the tokens; one frozen model serves any number of prompts in one batch

The start matters for small models (section 3.2): `random`, uniform in [-0.5, 0.5]; `vocabulary`, the vectors of tokens
drawn from the 5,000 commonest; `labels`, those of the answers' or classes' words; `text`, those of a text. (peft's own
random start is N(0, 1), its vocabulary start draws rare and control tokens too, and it has no labels.)

Lester, Al-Rfou, Constant 2021, https://arxiv.org/abs/2104.08691

    make prompt_tuning                                    # laptop, offline, 3 minutes, from what `make llama` made
    make prompt_tuning CONFIG=gpu                         # one GPU, a public model and instruction set
    make prompt_tuning CONFIG=cluster LAUNCH=ddp NPROC=8  # a node; scripts/ has SLURM

Leaves adapter/ (the vectors, and the tokenizer that puts them into a row). Laptop result: RESULTS.md#prompt_tuning.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.common.config import Section, defaults
from recipes.common.errors import UserError
from recipes.common.recipe import run_recipe
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation, Model, Run

if TYPE_CHECKING:
    import peft
    import torch
    import trl

    from recipes.common.adaptation import Task

COMMON = 5000  # tokens that the paper's vocabulary start draws from


@dataclass
class Start:
    """The first values of the vectors."""

    kind: Literal["random", "vocabulary", "labels", "text"] = "vocabulary"  # the paper's figure 3b; text is peft's
    text: str | None = None  # for `text`: its tokens, over and over until all vectors have one


@dataclass(kw_only=True)
class Config:
    """Sections of this recipe; what trl.SFTConfig leaves off by default and this topic is about is on."""

    model: Model
    data: Data
    prompt_tuning: Section[peft.PromptTuningConfig] = field(
        default_factory=defaults(task_type="CAUSAL_LM", num_virtual_tokens=20)
    )
    start: Start
    training: Section[trl.SFTConfig] = field(default_factory=defaults(assistant_only_loss=True, packing=True))
    evaluation: Evaluation
    run: Run


def first_vectors(task: Task, start: Start, tokens: int, seed: int) -> torch.Tensor:
    """[tokens, width]: where the prompt starts. Raises UserError where the start asks for what is not there."""
    import torch

    words = task.base.get_input_embeddings()
    draw = torch.Generator().manual_seed(seed)
    if start.kind == "random":
        return torch.rand(tokens, words.embedding_dim, generator=draw) - 0.5

    def vectors(ids: torch.Tensor | list[int]) -> torch.Tensor:
        """[ids, width], as the layer gives them: BART's and Gemma's are larger than their table's by the root of the width."""
        with torch.no_grad():
            return words(torch.as_tensor(ids, device=words.weight.device)).float()

    common = common_tokens(task)
    drawn = vectors(common[torch.randint(len(common), (tokens,), generator=draw)])
    if start.kind == "vocabulary":
        return drawn
    if start.kind == "text":
        ids = _ids(task, start.text or "")
        if not ids:
            raise UserError("start.text: a start of kind text needs a text")
        return vectors(torch.tensor(ids).repeat(-(-tokens // len(ids)))[:tokens])
    # a label of several tokens: their mean
    means = [vectors(_ids(task, label)).mean(0) for label in labels_of(task, tokens)]
    return torch.cat([torch.stack(means), drawn])[:tokens]  # more vectors than labels: the vocabulary's


def common_tokens(task: Task) -> torch.Tensor:
    """The ids of the 5,000 tokens that the training rows have most of, none of them a control token."""
    import torch

    column = {"CAUSAL_LM": "messages", "SEQ_2_SEQ_LM": "source", "SEQ_CLS": "text"}[task.type]
    rows = task.data["train"].take(2000)[column]
    texts = [" ".join(m["content"] for m in row) for row in rows] if task.type == "CAUSAL_LM" else rows
    counts = Counter(token for text in texts for token in _ids(task, text))
    return torch.tensor([token for token, _ in counts.most_common(COMMON)])


def labels_of(task: Task, most: int) -> list[str]:
    """The classes, or the commonest answers of the training rows."""
    if task.type == "SEQ_CLS":
        return task.classes[:most]
    rows = task.data["train"].take(20_000)
    answers = rows["target"] if task.type == "SEQ_2_SEQ_LM" else [row[-1]["content"] for row in rows["messages"]]
    return [answer for answer, _ in Counter(a for a in answers if a.strip()).most_common(most)]


def _ids(task: Task, text: str) -> list[int]:
    from recipes.common.chat import encode_plain

    return encode_plain(task.tokenizer, [text])[0]


def main(config: Config, run: RunFolder) -> dict[str, Any]:
    """Base and task, vectors in front of every row, train them, save them."""
    from peft import PromptEmbedding

    from recipes.common import adaptation, prompt_encoder, virtual_tokens

    settings = config.prompt_tuning
    prompt_encoder.check_encoder(settings, "prompt_tuning")
    if settings.prompt_tuning_init != "RANDOM":
        raise UserError("prompt_tuning.prompt_tuning_init: this recipe has the paper's starts; set start.kind instead")
    prompt_encoder.refuse_shards(config.training, "prompt_tuning")
    virtual_tokens.check_type(settings.task_type, "prompt_tuning")
    tokens = settings.num_virtual_tokens or 0
    task = adaptation.prepare(config.model, config.data, settings.task_type, run)
    prompt_encoder.check_room(task.base, tokens, config.training.max_length)

    vectors = first_vectors(task, config.start, tokens, config.training.seed)
    template = virtual_tokens.read_template(f"{{v*{tokens}}}{{text}}", "prompt_tuning")
    first_id = virtual_tokens.place(task, template, config.training, in_front=True)
    settings.token_dim, settings.num_transformer_submodules = vectors.shape[1], 1
    encoder = PromptEmbedding(settings, task.base.get_input_embeddings())
    encoder.embedding.weight.data.copy_(vectors)
    virtual_tokens.put_in(task.base, encoder, tokens, first_id)
    learned = adaptation.freeze(task.base, prompt_encoder.learned_names(task.base))
    run.say(
        f"  prompt_tuning: {tokens} vectors of {vectors.shape[1]} in front of each row, {learned:,} numbers learn; "
        f"start: {config.start.kind}"
    )
    trainer, figures = adaptation.learn(task, task.base, config.training, config.evaluation, run, config.run)

    names = prompt_encoder.settle(task.base)
    told = {"tokens": tokens, "first_id": first_id}
    figures["adapter_bytes"] = adaptation.save(task, trainer, task.base, run, "prompt_tuning", told, names)
    return figures


if __name__ == "__main__":
    run_recipe(main, Config)
